//! What the cache holds, and which of it nobody needs any more.
//!
//! An image is *current* while some request leads to it. It is *superseded* once newer packages have led its last request
//! elsewhere. Use is noted in the time of its `image.json` ([`mark_used`]); that of a download, in the download's own time.
//! What is removed is renamed into `partial/` first, so that a process killed meanwhile leaves no broken image. Open files
//! stay usable: a running guest does not notice that its image has gone.

use crate::cache::{self, Cache, Kind, KnownRequest};
use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

/// What may go.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Superseded images that nobody has used for this long.
    pub superseded_unused_max: Duration,
    /// Current images and downloads that nobody has used for this long.
    pub unused_max: Duration,
    /// Images that stay in any case: any path inside them will do.
    pub keep: Vec<PathBuf>,
}

impl Policy {
    /// What is removed without being asked for: superseded images after a day, everything else after 30 days.
    pub fn automatic() -> Self {
        let day = Duration::from_secs(24 * 3600);
        Self { superseded_unused_max: day, unused_max: day.saturating_mul(30), keep: Vec::new() }
    }

    /// Everything that no guest keeps.
    pub fn everything() -> Self {
        Self { superseded_unused_max: Duration::ZERO, unused_max: Duration::ZERO, keep: Vec::new() }
    }
}

/// One finished image.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CachedImage {
    /// Its name: the hash of what it was made from.
    pub key: String,
    /// Code name and version of the release.
    pub release: String,
    /// Number of packages.
    pub packages: u64,
    /// Bytes on the host's disk.
    pub bytes: u64,
    /// When it was used last, in seconds since 1970.
    pub used: u64,
    /// Whether some request still leads to it.
    pub current: bool,
}

/// What a cache holds.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Survey {
    /// Finished images, the one used last first.
    pub images: Vec<CachedImage>,
    /// Number of downloads kept.
    pub downloads: u64,
    /// Their bytes on the host's disk.
    pub download_bytes: u64,
}

impl Survey {
    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.images.iter().fold(self.download_bytes, |sum, image| sum.saturating_add(image.bytes))
    }
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Pruned {
    /// Number of images.
    pub images: u64,
    /// Number of downloads.
    pub downloads: u64,
    /// Bytes on the host's disk.
    pub bytes: u64,
}

/// Notes that an image is used now. `disk` is any file in it.
pub fn mark_used(disk: &Path) {
    // One that cannot be marked is only thought older than it is.
    let mark = || -> io::Result<()> {
        let record = disk.with_file_name("image.json");
        File::options().write(true).open(record)?.set_times(FileTimes::new().set_modified(SystemTime::now()))
    };
    let _ = mark();
}

/// Looks at the cache at `root`; one that is not there is empty.
pub fn survey(root: &Path) -> Survey {
    let current = current(root);
    let mut images: Vec<_> = entries(&root.join("images"))
        .filter_map(|directory| {
            let key = directory.file_name()?.to_str()?.to_owned();
            let record: serde_json::Value =
                serde_json::from_slice(&fs::read(directory.join("image.json")).unwrap_or_default())
                    .unwrap_or_default();
            let text = |name: &str| record.get(name).and_then(|value| value.as_str()).unwrap_or("?");
            Some(CachedImage {
                release: format!("{} {}", text("codename"), text("version")),
                packages: record.get("packages").and_then(serde_json::Value::as_u64).unwrap_or(0),
                bytes: bytes_of(&directory),
                used: seconds(used(&directory.join("image.json"))),
                current: current.contains(&key),
                key,
            })
        })
        .collect();
    images.sort_by_key(|image| std::cmp::Reverse(image.used));
    let mut survey = Survey { images, ..Survey::default() };
    for object in entries(&root.join("objects")) {
        survey.downloads = survey.downloads.saturating_add(1);
        survey.download_bytes = survey.download_bytes.saturating_add(bytes_of(&object));
    }
    survey
}

/// Removes what a killed process left half written, unless somebody is building just now.
pub fn clear_interrupted(root: &Path) {
    if entries(&root.join("partial")).next().is_some()
        && let Ok(cache) = Cache::open(root)
    {
        // Taking the lock clears; a lock that another process holds is left to it.
        let _ = cache.lock(&AtomicBool::new(true), &mut || ());
    }
}

/// Removes what `policy` says. Waits for another process that builds, until `stop`.
pub fn prune(root: &Path, policy: &Policy, stop: &AtomicBool) -> Result<Pruned, cache::Error> {
    let cache = Cache::open(root)?;
    let _lock = cache.lock(stop, &mut || ())?;
    let current = current(root);
    let kept = |directory: &Path| policy.keep.iter().any(|path| path.starts_with(directory));
    let mut pruned = Pruned::default();
    for directory in entries(&root.join("images")) {
        let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let limit = if current.contains(name) { policy.unused_max } else { policy.superseded_unused_max };
        if !kept(&directory) && unused_for(&directory.join("image.json"), limit) {
            let bytes = bytes_of(&directory);
            remove(&cache, &directory, name)?;
            pruned.images = pruned.images.saturating_add(1);
            pruned.bytes = pruned.bytes.saturating_add(bytes);
        }
    }
    for object in entries(&root.join("objects")).filter(|object| unused_for(object, policy.unused_max)) {
        let bytes = bytes_of(&object);
        if fs::remove_file(&object).is_ok() {
            pruned.downloads = pruned.downloads.saturating_add(1);
            pruned.bytes = pruned.bytes.saturating_add(bytes);
        }
    }
    forget_requests(root);
    Ok(pruned)
}

/// An image vanishes as a whole, however long its removal takes.
fn remove(cache: &Cache, directory: &Path, name: &str) -> Result<(), cache::Error> {
    let doomed = cache.partial().join(format!("pruned-{name}"));
    fs::rename(directory, &doomed)
        .and_then(|()| fs::remove_dir_all(&doomed))
        .map_err(|source| cache::Error::Io { path: directory.to_owned(), source })
}

/// Forgets requests whose image is gone.
fn forget_requests(root: &Path) {
    for record in entries(&root.join("requests")) {
        let known =
            fs::read(&record).ok().and_then(|bytes| serde_json::from_slice::<KnownRequest>(&bytes).ok());
        if known.is_none_or(|known| !root.join("images").join(known.image).exists()) {
            let _ = fs::remove_file(&record);
        }
    }
}

/// Names of the images that requests lead to.
fn current(root: &Path) -> BTreeSet<String> {
    let Ok(cache) = Cache::open(root) else { return BTreeSet::new() };
    entries(&root.join("requests"))
        .filter_map(|path| path.file_stem()?.to_str().map(str::to_owned))
        .filter_map(|key| cache.read::<KnownRequest>(Kind::Request, &key))
        .map(|known| known.image)
        .collect()
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The last use that was noted. What cannot be read was never used.
fn used(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|about| about.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn unused_for(path: &Path, limit: Duration) -> bool {
    // A time in the future is no time ago.
    SystemTime::now().duration_since(used(path)).unwrap_or_default() >= limit
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Bytes that a file, or the files of a directory, take on the host's disk.
fn bytes_of(path: &Path) -> u64 {
    let Ok(about) = fs::symlink_metadata(path) else { return 0 };
    let own = about.blocks().saturating_mul(512);
    if !about.is_dir() {
        return own;
    }
    entries(path).fold(own, |sum, file| sum.saturating_add(bytes_of(&file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench(tempfile::TempDir);

    impl Bench {
        fn new() -> Self {
            let bench = Self(tempfile::tempdir().unwrap());
            Cache::open(bench.root()).unwrap();
            bench
        }

        fn root(&self) -> &Path {
            self.0.path()
        }

        fn image(&self, name: &str, days: u64) -> PathBuf {
            let directory = self.root().join("images").join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("disk.img"), [1; 8192]).unwrap();
            let record = r#"{"codename":"trixie","version":"13.1","packages":7}"#;
            fs::write(directory.join("image.json"), record).unwrap();
            age(&directory.join("image.json"), days);
            directory
        }

        fn request(&self, key: &str, image: &str) {
            let cache = Cache::open(self.root()).unwrap();
            cache.write(Kind::Request, key, &KnownRequest { checked: 1, image: image.into() }).unwrap();
        }

        fn images(&self) -> Vec<String> {
            let mut names: Vec<_> = survey(self.root()).images.into_iter().map(|image| image.key).collect();
            names.sort();
            names
        }
    }

    fn age(path: &Path, days: u64) {
        let then = SystemTime::now() - Duration::from_secs(days * 24 * 3600 + 60);
        File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    }

    #[test]
    fn superseded_images_go_after_a_day_and_others_after_a_month() {
        let bench = Bench::new();
        for (name, days) in [("current", 20), ("forgotten", 31), ("old", 2), ("young", 0), ("kept", 90)] {
            bench.image(name, days);
        }
        bench.request("a", "current");
        bench.request("b", "forgotten");
        bench.request("c", "gone");
        for (name, days) in [("fresh", 1), ("stale", 40)] {
            fs::write(bench.root().join("objects").join(name), b"deb").unwrap();
            age(&bench.root().join("objects").join(name), days);
        }
        let mut policy = Policy::automatic();
        policy.keep.push(bench.root().join("images/kept/vmlinuz"));
        let pruned = prune(bench.root(), &policy, &AtomicBool::new(false)).unwrap();
        assert_eq!((pruned.images, pruned.downloads), (2, 1));
        assert!(pruned.bytes >= 2 * 8192, "{pruned:?}");
        assert_eq!(bench.images(), ["current", "kept", "young"]);
        let left: Vec<_> = entries(&bench.root().join("requests")).collect();
        assert_eq!(left.len(), 1, "{left:?}");
        let survey = survey(bench.root());
        assert_eq!((survey.downloads, survey.images.iter().filter(|image| image.current).count()), (1, 1));
        assert_eq!(survey.images[0].release, "trixie 13.1");
        assert!(entries(&bench.root().join("partial")).next().is_none());
    }

    #[test]
    fn an_image_in_use_is_young_again() {
        let bench = Bench::new();
        let image = bench.image("used", 90);
        mark_used(&image.join("disk.img"));
        let pruned = prune(bench.root(), &Policy::automatic(), &AtomicBool::new(false)).unwrap();
        assert_eq!(pruned, Pruned::default());
        let pruned = prune(bench.root(), &Policy::everything(), &AtomicBool::new(false)).unwrap();
        assert_eq!(pruned.images, 1);
    }

    #[test]
    fn what_a_killed_build_left_goes_unless_somebody_builds() {
        let bench = Bench::new();
        let left = bench.root().join("partial/half");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("disk.img"), b"x").unwrap();
        let cache = Cache::open(bench.root()).unwrap();
        let lock = cache.lock(&AtomicBool::new(false), &mut || ()).unwrap();
        fs::create_dir(&left).unwrap();
        clear_interrupted(bench.root());
        assert!(left.exists());
        drop(lock);
        clear_interrupted(bench.root());
        assert!(!left.exists());
        clear_interrupted(&bench.root().join("nowhere"));
    }
}
