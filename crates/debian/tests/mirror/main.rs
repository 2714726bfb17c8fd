//! Builds against a small mirror of the test's own, honest and hostile. Every lie must end in one clear sentence and leave no broken cache.

mod archive;
mod server;

use archive::{Archive, Package, key, sign};
use debian::{Error, Image, Progress, Request, Silent, build};
use server::{Answer, Mirror};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

struct Bench {
    mirror: Mirror,
    cache: tempfile::TempDir,
    archive: Archive,
}

impl Bench {
    fn new() -> Self {
        let bench =
            Bench { mirror: Mirror::start(), cache: tempfile::tempdir().unwrap(), archive: Archive::small() };
        std::fs::write(bench.keyring(), &key().public).unwrap();
        bench.serve();
        bench
    }

    fn keyring(&self) -> std::path::PathBuf {
        self.cache.path().join("keyring.asc")
    }

    fn serve(&self) {
        for (path, bytes) in self.archive.files() {
            self.mirror.set(&path, Answer::Body(bytes));
        }
    }

    fn request(&self) -> Request {
        let mut request = Request::new(self.cache.path().join("cache"));
        request.mirrors = vec![self.mirror.url()];
        request.keyrings = vec![self.keyring()];
        request.disk_size = 64 << 20;
        request.index_age_max = Duration::ZERO;
        request
    }

    fn build(&self) -> Result<Image, Error> {
        build(&self.request(), &mut Silent, &AtomicBool::new(false))
    }

    /// The message of the failure, which must be one line and leave nothing half done.
    fn failure(&self) -> String {
        let message = self.build().unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        self.assert_clean();
        message
    }

    fn assert_clean(&self) {
        let partial = std::fs::read_dir(self.cache.path().join("cache/partial")).unwrap();
        assert_eq!(partial.count(), 0, "nothing half done is left");
    }
}

#[test]
fn an_honest_mirror_gives_an_image() {
    let bench = Bench::new();
    let image = bench.build().unwrap();
    assert_eq!((image.codename.as_str(), image.packages, image.cached), ("inn", 2, false));
    assert_eq!(std::fs::read(&image.kernel).unwrap(), b"kernel");
    let again = bench.build().unwrap();
    assert!(again.cached && again.disk == image.disk);
    if let Ok(check) = std::process::Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&image.disk).output() {
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    }
}

#[test]
fn a_cached_image_needs_no_mirror() {
    let bench = Bench::new();
    let image = bench.build().unwrap();
    bench.mirror.stop();
    let offline = bench.build().unwrap();
    assert!(offline.cached && offline.offline && offline.disk == image.disk);
    let mut request = bench.request();
    request.index_age_max = Duration::from_secs(600);
    let start = Instant::now();
    let fresh = build(&request, &mut Silent, &AtomicBool::new(false)).unwrap();
    assert!(fresh.cached && !fresh.offline && start.elapsed() < Duration::from_millis(500));
    request.hostname = "other".to_owned();
    let message = build(&request, &mut Silent, &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(message.contains("check the network"), "{message}");
}

#[test]
fn a_broken_download_in_the_cache_is_fetched_again() {
    let bench = Bench::new();
    bench.build().unwrap();
    for entry in std::fs::read_dir(bench.cache.path().join("cache/objects")).unwrap() {
        std::fs::write(entry.unwrap().path(), b"rot").unwrap();
    }
    let mut request = bench.request();
    request.hostname = "other".to_owned();
    assert!(!build(&request, &mut Silent, &AtomicBool::new(false)).unwrap().cached);
}

#[test]
fn a_changed_package_is_caught() {
    let bench = Bench::new();
    let (path, mut bytes) = bench.archive.deb("linux-image-cloud-amd64");
    *bytes.last_mut().unwrap() ^= 1;
    bench.mirror.set(&path, Answer::Body(bytes));
    assert!(bench.failure().contains("do not match the signed index"));
    bench.serve();
    bench.build().unwrap();
}

#[test]
fn a_changed_index_is_caught() {
    let bench = Bench::new();
    let mut bytes = bench.archive.index();
    *bytes.last_mut().unwrap() ^= 1;
    bench.mirror.set("/dists/inn/main/binary-amd64/Packages.xz", Answer::Body(bytes));
    assert!(bench.failure().contains("do not match the signed index"));
}

#[test]
fn unsigned_and_foreign_releases_are_refused() {
    let mut bench = Bench::new();
    let release = bench.archive.release();
    let path = "/dists/stable/InRelease";
    bench.mirror.set(path, Answer::Body(release.clone().into_bytes()));
    assert!(bench.failure().contains("no clearsigned OpenPGP message"));
    let stranger = archive::Key::new();
    bench.mirror.set(path, Answer::Body(sign(&stranger, &release)));
    assert!(bench.failure().contains("a key that is not trusted"));
    let signed = String::from_utf8(sign(key(), &release)).unwrap();
    let changed = signed.replace("Codename: inn", "Codename: out");
    bench.mirror.set(path, Answer::Body(changed.into_bytes()));
    assert!(bench.failure().contains("does not match the text"));
    // Text before the signed part is not part of it.
    let prefixed = format!("Codename: evil\n{signed}");
    bench.mirror.set(path, Answer::Body(prefixed.into_bytes()));
    assert!(bench.build().is_err() || bench.build().unwrap().codename == "inn");
    bench.archive.date = "nonsense".to_owned();
    bench.serve();
    assert!(bench.failure().contains("field Date"));
}

#[test]
fn thousands_of_signatures_do_not_keep_us() {
    let bench = Bench::new();
    let text = bench.archive.release() + &"X-Much: more of this\n".repeat(10_000);
    bench.mirror.set("/dists/stable/InRelease", Answer::Body(archive::sign_wrongly(key(), &text, 3000)));
    let start = Instant::now();
    assert!(bench.failure().contains("does not match the text"));
    assert!(start.elapsed() < Duration::from_secs(15), "it took {:?}", start.elapsed());
}

#[test]
fn somebody_elses_archive_stops_no_build() {
    let bench = Bench::new();
    let (other, security) = (Mirror::start(), Mirror::start());
    other.set("/dists/inn-security/InRelease", Answer::Status(401));
    let release = bench.archive.release().replace("Codename: inn", "Codename: inn-security");
    let mut request = bench.request();
    request.mirrors = vec![bench.mirror.url(), other.url()];
    let build = |request: &Request| build(request, &mut Silent, &AtomicBool::new(false));
    let message = build(&request).unwrap_err().to_string();
    assert!(message.contains("HTTP 401"), "nobody has it, and one may: {message}");
    security.set("/dists/inn-security/InRelease", Answer::Body(sign(key(), &release)));
    let index = "/dists/inn-security/main/binary-amd64/Packages.xz";
    security.set(index, Answer::Body(bench.archive.index()));
    request.mirrors.push(security.url());
    build(&request).unwrap();
}

#[test]
fn stale_and_rolled_back_releases_are_refused() {
    let mut bench = Bench::new();
    bench.archive.valid_until = Some("Thu, 02 Jan 2020 00:00:00 UTC".to_owned());
    bench.serve();
    assert!(bench.failure().contains("expired on"));
    let mut request = bench.request();
    request.accept_stale = true;
    build(&request, &mut Silent, &AtomicBool::new(false)).unwrap();
    bench.archive.valid_until = None;
    bench.archive.date = "Mon, 01 Jan 2018 00:00:00 UTC".to_owned();
    bench.serve();
    assert!(bench.failure().contains("went back in time"));
}

#[test]
fn truncated_and_endless_bodies_end() {
    let bench = Bench::new();
    let (path, bytes) = bench.archive.deb("linux-image-cloud-amd64");
    bench.mirror.set(&path, Answer::Truncated(bytes.clone(), bytes.len() / 2));
    assert!(bench.failure().contains("sent only"));
    bench.mirror.set(&path, Answer::Endless);
    assert!(bench.failure().contains("sends more than"));
    bench.mirror.set(&path, Answer::Status(500));
    assert!(bench.failure().contains("HTTP 500"));
    bench.serve();
    bench.mirror.set("/dists/stable/InRelease", Answer::Endless);
    assert!(bench.failure().contains("sends more than"));
    bench.mirror.set("/dists/stable/InRelease", Answer::Status(404));
    assert!(bench.failure().contains("does not exist"));
}

/// Sets `stop` as soon as a phase has begun.
struct StopAt(debian::Phase, Arc<AtomicBool>);

impl Progress for StopAt {
    fn started(&mut self, phase: debian::Phase, _: u64) {
        if phase == self.0 {
            let stop = Arc::clone(&self.1);
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                stop.store(true, Ordering::SeqCst);
            });
        }
    }
    fn advanced(&mut self, _: u64) {}
    fn finished(&mut self) {}
}

#[test]
fn a_hanging_mirror_can_be_interrupted() {
    let bench = Bench::new();
    let (path, _) = bench.archive.deb("linux-image-cloud-amd64");
    for (path, phase) in
        [(path.as_str(), debian::Phase::Downloading), ("/dists/stable/InRelease", debian::Phase::Indexing)]
    {
        bench.mirror.set(path, Answer::Hang);
        let stop = Arc::new(AtomicBool::new(false));
        let start = Instant::now();
        let error = build(&bench.request(), &mut StopAt(phase, Arc::clone(&stop)), &stop).unwrap_err();
        assert!(error.is_stopped(), "{error}");
        assert!(start.elapsed() < Duration::from_secs(3), "it took {:?}", start.elapsed());
        bench.assert_clean();
    }
}

#[test]
fn packages_cannot_leave_the_image() {
    for (name, needle) in
        [("../../evil", "leads out of the file system"), ("/../evil", "leads out of the file system")]
    {
        let mut bench = Bench::new();
        bench.archive.packages[0].files.push((name.to_owned(), b"x".to_vec()));
        bench.serve();
        let message = bench.failure();
        assert!(message.contains(needle), "{message}");
        assert!(!Path::new("/evil").exists() && !bench.cache.path().join("evil").exists());
    }
    // A path through a link of the package's own stays inside, whatever the link says.
    let mut bench = Bench::new();
    bench.archive.packages[0].links.push(("out".to_owned(), "/../../../../tmp".to_owned()));
    bench.archive.packages[0].files.push(("out/yado-evil".to_owned(), b"x".to_vec()));
    bench.serve();
    bench.build().unwrap();
    assert!(!Path::new("/tmp/yado-evil").exists());
}

#[test]
fn unsafe_index_entries_and_two_owners_are_refused() {
    let mut bench = Bench::new();
    bench.archive.packages[0].filename = Some("../../../etc/passwd".to_owned());
    bench.serve();
    assert!(bench.failure().contains("unsafe Filename"));
    let mut bench = Bench::new();
    bench.archive.packages.push(Package::new("thief", &[("boot/vmlinuz-1", "other")]));
    bench.serve();
    let mut request = bench.request();
    request.extra_packages = vec!["thief".to_owned()];
    let message = build(&request, &mut Silent, &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(message.contains("both have /boot/vmlinuz-1"), "{message}");
    request.extra_packages = vec!["nobody".to_owned()];
    let message = build(&request, &mut Silent, &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(message.contains("no package nobody"), "{message}");
}

#[test]
fn two_builds_at_once_share_one_image() {
    let bench = Bench::new();
    let images: Vec<Image> = std::thread::scope(|scope| {
        let builds: Vec<_> = (0..3).map(|_| scope.spawn(|| bench.build().unwrap())).collect();
        builds.into_iter().map(|build| build.join().unwrap()).collect()
    });
    assert!(images.iter().all(|image| image.disk == images[0].disk));
    assert_eq!(images.iter().filter(|image| !image.cached).count(), 1);
}
