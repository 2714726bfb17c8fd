//! The archives that a guest is built from: verified Release files, their package indices, and the packages.

use crate::cache::{self, Cache, Kind, KnownSuite, key_of};
use crate::deb;
use crate::fetch::{self, Client};
use crate::index::INDEX_BYTES_MAX;
use crate::release::{self, IndexFile, Release};
use crate::signature::{self, Keyring};
use crate::sources::Base;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, SystemTime};

/// Largest InRelease file.
const RELEASE_BYTES_MAX: u64 = 8 << 20;
/// Transfers at once.
pub const CONNECTIONS: usize = 8;

/// Why the archives cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be fetched.
    #[error(transparent)]
    Fetch(#[from] fetch::Error),
    /// A Release file is not signed by Debian.
    #[error("{url}: {source}. Give another --mirror")]
    Signature {
        /// The file.
        url: String,
        /// Why.
        source: signature::Error,
    },
    /// A Release file is not acceptable.
    #[error("{url}: {source}")]
    Release {
        /// The file.
        url: String,
        /// Why.
        source: release::Error,
    },
    /// A suite has no packages for this architecture.
    #[error("{url}: the suite has no package index for {}; choose another suite", crate::ARCHITECTURE)]
    NoIndex {
        /// The Release file.
        url: String,
    },
    /// A file is not the one that was signed.
    #[error(
        "{url}: its contents do not match the signed index (SHA-256 {found}, not {expected}); the mirror is damaged or lies, give another --mirror"
    )]
    Hash {
        /// The file.
        url: String,
        /// SHA-256 in the index.
        expected: String,
        /// SHA-256 of what came.
        found: String,
    },
    /// An index cannot be unpacked.
    #[error("{url}: {source}")]
    Index {
        /// The file.
        url: String,
        /// Why.
        source: deb::Error,
    },
    /// None of the bases has the suite.
    #[error(
        "none of the APT sources has Debian's {suite} ({reasons}); give one that has: --mirror http://MIRROR/debian"
    )]
    NoSuite {
        /// The suite.
        suite: String,
        /// What each said.
        reasons: String,
    },
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
}

impl Error {
    /// True if the mirror could not be reached at all, so that what is in the cache may still serve.
    pub fn is_offline(&self) -> bool {
        use fetch::Error::{Network, Refused, Truncated};
        matches!(self, Error::Fetch(Network { .. } | Truncated { .. } | Refused { status: 500.., .. }))
    }

    /// True if the caller asked to stop.
    pub fn is_stopped(&self) -> bool {
        matches!(self, Error::Fetch(fetch::Error::Stopped) | Error::Cache(cache::Error::Stopped))
    }
}

/// A suite of an archive, verified.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The archive's base.
    pub base: String,
    /// The suite's code name, which is also its directory under `dists/`.
    pub name: String,
    /// What its Release file says.
    pub release: Release,
    /// Its unpacked `Packages` file.
    pub packages: String,
}

/// A file to download.
#[derive(Clone, Debug)]
pub struct Download {
    /// Where from.
    pub url: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

/// What archives are read with.
pub struct Reader<'a> {
    /// Fetches.
    pub client: &'a Client,
    /// Keeps.
    pub cache: &'a Cache,
    /// Verifies.
    pub keyring: &'a Keyring,
    /// Lets an expired Release through.
    pub accept_stale: bool,
}

impl Reader<'_> {
    /// Reads the wanted suite and, where they exist, its updates and its security suite.
    pub fn suites(&self, bases: &[Base], wanted: &str) -> Result<Vec<Suite>, Error> {
        let (base, release) = self.main_release(bases, wanted)?;
        let codename = release.codename.clone();
        let mut found = vec![(base.clone(), release)];
        let updates = format!("{codename}-updates");
        if let Some(release) = self.optional_release(&base, &updates)? {
            found.push((base.clone(), release));
        }
        let security = format!("{codename}-security");
        found.extend(self.security_release(bases, &base, &security)?);
        found.into_iter().map(|(base, release)| self.with_index(base, release)).collect()
    }

    /// The security suite, which has a place of its own or is with `main` or another base. Those others may be somebody else's altogether:
    /// what they answer counts only if nobody has the suite.
    fn security_release(
        &self,
        bases: &[Base],
        main: &str,
        suite: &str,
    ) -> Result<Option<(String, Release)>, Error> {
        let (own, others): (Vec<&Base>, Vec<&Base>) = bases.iter().partition(|base| base.security);
        let mut refused = None;
        for base in own.into_iter().chain(others.into_iter().filter(|base| base.url != main)) {
            match self.optional_release(&base.url, suite) {
                Ok(Some(release)) => return Ok(Some((base.url.clone(), release))),
                Ok(None) => {}
                Err(error) if error.is_stopped() || base.security || self.knows(&base.url, suite) => {
                    return Err(error);
                }
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        refused.map_or(Ok(None), Err)
    }

    /// The wanted suite from the first base that has it.
    fn main_release(&self, bases: &[Base], wanted: &str) -> Result<(String, Release), Error> {
        let mut reasons = Vec::new();
        let mut offline = None;
        for base in bases.iter().filter(|base| !base.security) {
            match self.release(&base.url, wanted) {
                Ok(release) => return Ok((base.url.clone(), release)),
                Err(error) if error.is_stopped() => return Err(error),
                Err(error) if error.is_offline() => offline = Some(error),
                Err(error @ Error::Fetch(fetch::Error::Missing { .. })) => reasons.push(error.to_string()),
                // One base only: its own error says most.
                Err(error) if bases.iter().filter(|base| !base.security).count() == 1 => return Err(error),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(offline
            .unwrap_or_else(|| Error::NoSuite { suite: wanted.to_owned(), reasons: reasons.join("; ") }))
    }

    /// A suite that may be missing, but if it is there must be right.
    fn optional_release(&self, base: &str, suite: &str) -> Result<Option<Release>, Error> {
        match self.release(base, suite) {
            // One that was there and is no more keeps updates from the guest.
            Err(Error::Fetch(fetch::Error::Missing { .. })) if !self.knows(base, suite) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Whether the mirror has had this suite.
    fn knows(&self, base: &str, suite: &str) -> bool {
        self.cache.read::<KnownSuite>(Kind::Suite, &key_of([base.as_bytes(), suite.as_bytes()])).is_some()
    }

    /// Fetches and verifies a Release file, and remembers its date.
    fn release(&self, base: &str, suite: &str) -> Result<Release, Error> {
        let url = format!("{base}/dists/{suite}/InRelease");
        let file = self.client.get(&url, RELEASE_BYTES_MAX)?;
        let now = SystemTime::now();
        let text = self
            .keyring
            .verify(&file, now)
            .map_err(|source| Error::Signature { url: url.clone(), source })?;
        let refuse = |source| Error::Release { url: url.clone(), source };
        let release = Release::parse(&text).map_err(refuse)?;
        let key = key_of([base.as_bytes(), release.codename.as_bytes()]);
        let known: Option<KnownSuite> = self.cache.read(Kind::Suite, &key);
        let newest =
            known.and_then(|known| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(known.newest)));
        release.check(suite, now, newest, self.accept_stale).map_err(refuse)?;
        let newest = release.time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.cache.write(Kind::Suite, &key, &KnownSuite { newest })?;
        Ok(release)
    }

    fn with_index(&self, base: String, release: Release) -> Result<Suite, Error> {
        let name = release.codename.clone();
        let path = format!("main/binary-{}/Packages.xz", crate::ARCHITECTURE);
        let directory = format!("{base}/dists/{name}");
        let missing = || Error::NoIndex { url: format!("{directory}/InRelease") };
        let IndexFile { sha256, size } = release.files.get(&path).cloned().ok_or_else(missing)?;
        let plain = Download { url: format!("{directory}/{path}"), size, sha256: sha256.clone() };
        let by_hash = format!("{directory}/main/binary-{}/by-hash/SHA256/{sha256}", crate::ARCHITECTURE);
        let by_hash = Download { url: by_hash, ..plain.clone() };
        // The name by hash stays right while a mirror is being updated; not every mirror has it.
        let file = match release.by_hash.then(|| self.object(&by_hash, &mut |_| ())) {
            Some(Err(Error::Fetch(fetch::Error::Missing { .. } | fetch::Error::Refused { .. }))) | None => {
                self.object(&plain, &mut |_| ())?
            }
            Some(result) => result?,
        };
        let url = &plain.url;
        let opened = File::open(&file).map_err(|source| cache::Error::Io { path: file.clone(), source })?;
        let bytes = deb::unxz(BufReader::with_capacity(64 << 10, opened), INDEX_BYTES_MAX)
            .map_err(|source| Error::Index { url: url.clone(), source })?;
        let packages = String::from_utf8(bytes).map_err(|_| Error::Index {
            url: url.clone(),
            source: deb::Error::Broken("the index is not UTF-8"),
        })?;
        Ok(Suite { base, name, release, packages })
    }

    /// The file in the cache, fetched if it is not there.
    fn object(&self, download: &Download, advanced: &mut dyn FnMut(u64)) -> Result<PathBuf, Error> {
        let Download { url, size, sha256 } = download;
        if let Some(path) = self.cache.object(sha256, *size) {
            advanced(*size);
            return Ok(path);
        }
        let object = self.client.with_retries(|| {
            let mut object =
                self.cache.new_object().map_err(|error| fetch::Error::Local(std::io::Error::other(error)))?;
            self.client.fetch(url, *size, &mut object, advanced)?;
            Ok(object)
        })?;
        object.finish(sha256)?.map_err(|found| Error::Hash {
            url: url.clone(),
            expected: sha256.clone(),
            found,
        })
    }

    /// Gets all files, several at once, and gives their paths in order; `advanced` hears bytes as they come.
    ///
    /// The first failure stops the rest.
    pub fn download(&self, files: &[Download], advanced: &mut dyn FnMut(u64)) -> Result<Vec<PathBuf>, Error> {
        let queue = Mutex::new(files.iter().enumerate().collect::<Vec<_>>().into_iter());
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS.min(files.len()) {
                let (sender, queue) = (sender.clone(), &queue);
                scope.spawn(move || {
                    loop {
                        let next = queue.lock().ok().and_then(|mut queue| queue.next());
                        let Some((number, file)) = next else { return };
                        let result = self.object(file, &mut |bytes| drop(sender.send(Event::Bytes(bytes))));
                        let failed = result.is_err();
                        if sender.send(Event::Done(number, result)).is_err() || failed {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            let mut paths = vec![PathBuf::new(); files.len()];
            let mut failure = None;
            for event in receiver {
                match event {
                    Event::Bytes(bytes) => advanced(bytes),
                    Event::Done(number, Ok(path)) => {
                        if let Some(place) = paths.get_mut(number) {
                            *place = path;
                        }
                    }
                    // What fails after the first failure fails because everything was stopped.
                    Event::Done(_, Err(error)) => {
                        failure.get_or_insert(error);
                        self.client.stop();
                    }
                }
            }
            failure.map_or(Ok(paths), Err)
        })
    }
}

enum Event {
    Bytes(u64),
    Done(usize, Result<PathBuf, Error>),
}
