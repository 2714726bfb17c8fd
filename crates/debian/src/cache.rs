//! The cache on disk: content-addressed downloads, what is known of each suite, and finished images.
//!
//! ```text
//! CACHE/lock              held by the one process that builds; waiting for it can be interrupted
//! CACHE/partial/          files being written or removed; emptied by whoever takes the lock
//! CACHE/objects/SHA256    downloads, named by their hash
//! CACHE/suites/KEY.json   the newest date seen of a suite of an archive (against rollback)
//! CACHE/images/KEY/       finished images, named by all that went into them
//! CACHE/requests/KEY.json which image a request led to, and when that was last checked against the mirror
//! ```
//! Files appear under their final name only when complete (written, then renamed), so a process killed at any moment leaves nothing broken.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// What can fail in the cache.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error(
        "cannot use the cache at {path}: {source}; check space and permissions, or give another cache directory"
    )]
    Io {
        /// The path concerned.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The caller asked to stop while waiting for the lock.
    #[error("stopped")]
    Stopped,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// What is remembered of a suite: kept per archive, so that one mirror may lag behind another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KnownSuite {
    /// Newest `Date` seen, in seconds since 1970: older files are refused from then on.
    pub newest: u64,
}

/// Which image a request led to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KnownRequest {
    /// When the mirror was last asked, in seconds since 1970.
    pub checked: u64,
    /// Name of the directory in `images/`.
    pub image: String,
}

/// A cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// The right to write to the cache; given back when dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl Cache {
    /// Opens the cache, making its directories.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for part in ["objects", "partial", "suites", "images", "requests"] {
            let path = root.join(part);
            fs::create_dir_all(&path).map_err(io_error(&path))?;
        }
        Ok(Cache { root: root.to_owned() })
    }

    /// Takes the lock, waiting for another process if there is one; `waiting` is called once before a wait.
    pub fn lock(&self, stop: &AtomicBool, waiting: &mut dyn FnMut()) -> Result<Lock, Error> {
        let path = self.root.join("lock");
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(io_error(&path))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if stop.load(Ordering::SeqCst) => return Err(Error::Stopped),
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut told, true) {
                        waiting();
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(TryLockError::Error(source)) => return Err(Error::Io { path, source }),
            }
        }
        self.clear_partial();
        Ok(Lock(file))
    }

    /// Removes what a killed process left. Only the lock's holder may.
    fn clear_partial(&self) {
        let Ok(entries) = fs::read_dir(self.partial()) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }

    /// Directory for files being written.
    pub fn partial(&self) -> PathBuf {
        self.root.join("partial")
    }

    /// Path of a finished image's directory.
    pub fn image(&self, key: &str) -> PathBuf {
        self.root.join("images").join(key)
    }

    /// Path of the object with this hash, if it is there, whole and unchanged. A broken one is removed.
    pub fn object(&self, sha256: &str, size: u64) -> Option<PathBuf> {
        let path = self.root.join("objects").join(sha256);
        if !path.try_exists().unwrap_or(false) {
            return None;
        }
        let whole = fs::metadata(&path).is_ok_and(|metadata| metadata.len() == size)
            && hash_file(&path).is_ok_and(|hash| hash == sha256);
        if whole {
            // What is used stays; a file that cannot be marked is only thought older than it is.
            let _ =
                File::options().write(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
            return Some(path);
        }
        let _ = fs::remove_file(&path);
        None
    }

    /// A new file that becomes an object when finished.
    pub fn new_object(&self) -> Result<NewObject, Error> {
        let partial = self.partial();
        let file = tempfile::NamedTempFile::new_in(&partial).map_err(io_error(&partial))?;
        Ok(NewObject { file, hash: Sha256::new(), directory: self.root.join("objects") })
    }

    /// Reads a small record; a missing or unreadable one is as if never written.
    pub fn read<T: DeserializeOwned>(&self, kind: Kind, key: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.record_path(kind, key)).ok()?).ok()
    }

    /// Writes a small record.
    pub fn write<T: Serialize>(&self, kind: Kind, key: &str, value: &T) -> Result<(), Error> {
        let path = self.record_path(kind, key);
        let bytes = serde_json::to_vec(value)
            .map_err(|error| Error::Io { path: path.clone(), source: error.into() })?;
        let partial = self.partial();
        let mut file = tempfile::NamedTempFile::new_in(&partial).map_err(io_error(&partial))?;
        file.write_all(&bytes).map_err(io_error(&path))?;
        file.persist(&path).map_err(|error| Error::Io { path, source: error.error })?;
        Ok(())
    }

    fn record_path(&self, kind: Kind, key: &str) -> PathBuf {
        let directory = match kind {
            Kind::Suite => "suites",
            Kind::Request => "requests",
        };
        self.root.join(directory).join(format!("{key}.json"))
    }
}

/// The kinds of small records.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// [`KnownSuite`], by [`key_of`] base and suite.
    Suite,
    /// [`KnownRequest`], by [`key_of`] the request.
    Request,
}

/// A download in progress: hashed while written, removed unless finished.
#[derive(Debug)]
pub struct NewObject {
    file: tempfile::NamedTempFile,
    hash: Sha256,
    directory: PathBuf,
}

impl Write for NewObject {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hash.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl NewObject {
    /// Files the object under its name if its hash is `sha256`; otherwise gives back the hash it has.
    pub fn finish(self, sha256: &str) -> Result<Result<PathBuf, String>, Error> {
        let found = hex(&self.hash.finalize());
        if found != sha256 {
            return Ok(Err(found));
        }
        let path = self.directory.join(sha256);
        self.file.persist(&path).map_err(|error| Error::Io { path: path.clone(), source: error.error })?;
        Ok(Ok(path))
    }
}

/// SHA-256 of a file in hexadecimal.
fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(buffer.get(..count).unwrap_or_default());
    }
}

/// A file name for anything: the SHA-256 of its parts, each ended by a zero byte.
pub fn key_of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
        hash.update([0]);
    }
    hex(&hash.finalize())
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn objects_are_whole_or_absent() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let mut object = cache.new_object().unwrap();
        object.write_all(b"data").unwrap();
        assert!(object.finish(EMPTY).unwrap().is_err(), "a wrong hash is not filed");
        let path = cache.new_object().unwrap().finish(EMPTY).unwrap().unwrap();
        assert_eq!(cache.object(EMPTY, 0).unwrap(), path);
        fs::write(&path, b"broken").unwrap();
        assert_eq!(cache.object(EMPTY, 0), None);
        assert!(!path.exists(), "a broken object is removed so that it is fetched again");
        assert_eq!(fs::read_dir(cache.partial()).unwrap().count(), 0);
    }

    #[test]
    fn the_lock_keeps_others_out_and_can_be_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let go = AtomicBool::new(false);
        let lock = cache.lock(&go, &mut || ()).unwrap();
        fs::write(cache.partial().join("left"), b"x").unwrap();
        let stop = AtomicBool::new(true);
        assert!(matches!(cache.lock(&stop, &mut || ()), Err(Error::Stopped)));
        drop(lock);
        cache.lock(&go, &mut || ()).unwrap();
        assert!(!cache.partial().join("left").exists());
    }

    #[test]
    fn records_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let key = key_of([b"a".as_slice(), b"b"]);
        assert!(cache.read::<KnownRequest>(Kind::Request, &key).is_none());
        cache.write(Kind::Request, &key, &KnownRequest { checked: 7, image: "i".into() }).unwrap();
        assert_eq!(cache.read::<KnownRequest>(Kind::Request, &key).unwrap().checked, 7);
    }
}
