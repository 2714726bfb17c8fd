//! A build from request to image; the crate's documentation has the steps.

use crate::cache::{self, Cache, Kind, KnownRequest, key_of};
use crate::fetch::Client;
use crate::image::ImageTree;
use crate::index::{self, Catalogue};
use crate::repository::{self, CONNECTIONS, Download, Reader, Suite};
use crate::setup::{self, AptSource, Content, GuestFile, Settings};
use crate::signature::Keyring;
use crate::tree::{self, Root};
use crate::unpack::{self, Job};
use crate::{dpkg, resolve, signature, sources};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// Changes whenever the same packages would give another image: a digest of the sources that decide about it.
const BUILDER_VERSION: u64 = digest_of(&[
    include_bytes!("accounts.rs"),
    include_bytes!("archive.rs"),
    include_bytes!("build.rs"),
    include_bytes!("dpkg.rs"),
    include_bytes!("initramfs.rs"),
    include_bytes!("modules.rs"),
    include_bytes!("setup.rs"),
    include_bytes!("tree.rs"),
]);

/// FNV-1a, made while compiling.
const fn digest_of(mut sources: &[&[u8]]) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    while let [source, rest @ ..] = sources {
        let mut source: &[u8] = source;
        while let [byte, after @ ..] = source {
            digest = (digest ^ *byte as u64).wrapping_mul(0x0100_0000_01b3);
            source = after;
        }
        sources = rest;
    }
    digest
}

/// What every guest has besides the essential packages and the kernel.
const PACKAGES: [&str; 20] = [
    "apt",
    "ca-certificates",
    "dbus",
    "debian-archive-keyring",
    "init-system-helpers",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "login",
    "netbase",
    "openssh-server",
    "passwd",
    "procps",
    "systemd",
    "systemd-sysv",
    "tzdata",
    "udev",
    "vim-tiny",
    "whiptail",
];
/// Longest host name (hostname(7)).
const HOSTNAME_BYTES_MAX: usize = 63;

/// Which of Debian's kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelFlavour {
    /// For virtual machines: smallest.
    #[default]
    Cloud,
    /// For any machine.
    Generic,
    /// For any machine, with the real-time patches.
    RealTime,
}

impl KernelFlavour {
    fn package(self) -> &'static str {
        match self {
            KernelFlavour::Cloud => "linux-image-cloud-amd64",
            KernelFlavour::Generic => "linux-image-amd64",
            KernelFlavour::RealTime => "linux-image-rt-amd64",
        }
    }
}

/// What guest to build, from where, and where to keep it.
#[derive(Clone, Debug)]
pub struct Request {
    /// Suite or code name; `None` is the current stable release.
    pub suite: Option<String>,
    /// Mirrors' addresses; empty: those of the host's APT configuration.
    pub mirrors: Vec<String>,
    /// Cache directory; made if missing.
    pub cache: PathBuf,
    /// Bytes of the image (sparse).
    pub disk_size: u64,
    /// Packages to add to the usual ones.
    pub extra_packages: Vec<String>,
    /// Which kernel.
    pub kernel_flavour: KernelFlavour,
    /// The guest's host name.
    pub hostname: String,
    /// Files to add to the guest, such as an agent with its unit.
    pub files: Vec<GuestFile>,
    /// The program that is `/init` of kernels that need an initial RAM disk: it loads the modules in `/modules`, mounts the `root=`
    /// of the kernel command line and starts the init there.
    pub init: Cow<'static, [u8]>,
    /// Further OpenPGP keyrings to trust, for mirrors that sign themselves.
    pub keyrings: Vec<PathBuf>,
    /// How long an image is used without asking the mirror for newer packages. Zero asks each time.
    pub index_age_max: Duration,
    /// Accepts a Release file past its `Valid-Until`, as frozen archives have it.
    pub accept_stale: bool,
}

impl Request {
    /// The current stable release with the usual packages, from the host's APT sources, checked once a day.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Request {
            suite: None,
            mirrors: Vec::new(),
            cache: cache.into(),
            disk_size: 8 << 30,
            extra_packages: Vec::new(),
            kernel_flavour: KernelFlavour::default(),
            hostname: "debian".to_owned(),
            files: Vec::new(),
            init: Cow::Borrowed(&[]),
            keyrings: Vec::new(),
            index_age_max: Duration::from_secs(24 * 3600),
            accept_stale: false,
        }
    }

    /// Hash of all that decides about the image apart from the archive's contents.
    fn key(&self) -> String {
        let mut parts: Vec<Vec<u8>> = vec![
            BUILDER_VERSION.to_string().into(),
            self.suite.clone().unwrap_or_default().into(),
            self.mirrors.join(" ").into(),
            self.disk_size.to_string().into(),
            self.extra_packages.join(" ").into(),
            self.kernel_flavour.package().into(),
            self.hostname.clone().into(),
            self.init.to_vec(),
        ];
        for file in &self.files {
            parts.push(file.path.clone().into());
            parts.push(match &file.content {
                Content::File(mode, bytes) => [mode.to_string().as_bytes(), b" ", bytes].concat(),
                Content::Link(target) => [b"link ", target.as_bytes()].concat(),
            });
        }
        key_of(parts.iter().map(Vec::as_slice))
    }
}

/// A finished guest image. Its files lie in the cache and never change: run copies or overlays of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Sparse raw image: an ext4 file system without partitions.
    pub disk: PathBuf,
    /// The kernel (bzImage).
    pub kernel: PathBuf,
    /// The initial RAM disk; Debian's cloud kernels mount an NVMe root without one.
    pub initrd: Option<PathBuf>,
    /// Kernel command line that boots the image as the first NVMe disk with the console on the first serial port.
    pub cmdline: String,
    /// `Suite` of the release, such as `stable`.
    pub suite: String,
    /// Code name of the release, such as `trixie`.
    pub codename: String,
    /// Version of the release, such as `13.7`.
    pub version: String,
    /// Date of the suite's Release file.
    pub release_date: String,
    /// Number of packages.
    pub packages: usize,
    /// True if nothing had to be built.
    #[serde(skip)]
    pub cached: bool,
    /// True if the mirror could not be reached and the image may be out of date.
    #[serde(skip)]
    pub offline: bool,
}

/// A step of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Another process builds in the same cache.
    Waiting,
    /// Indices are fetched and verified.
    Indexing,
    /// Packages are downloaded; counted in bytes.
    Downloading,
    /// Packages are unpacked; counted in bytes of package files.
    Unpacking,
    /// The file system is completed.
    Finishing,
}

/// Hears how a build gets on; called from the caller's thread only.
pub trait Progress {
    /// A phase begins; `total` is the number of bytes it will count, zero if it counts none.
    fn started(&mut self, phase: Phase, total: u64);
    /// Bytes more are done.
    fn advanced(&mut self, bytes: u64);
    /// The phase is over.
    fn finished(&mut self);
}

/// A [`Progress`] that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn started(&mut self, _: Phase, _: u64) {}
    fn advanced(&mut self, _: u64) {}
    fn finished(&mut self) {}
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
    /// There is nowhere to get packages from.
    #[error(transparent)]
    Sources(#[from] sources::Error),
    /// A keyring cannot be read.
    #[error(transparent)]
    Keyring(#[from] signature::Error),
    /// The mirror failed or was caught lying.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// An index entry is unusable.
    #[error(transparent)]
    Index(#[from] index::Error),
    /// The packages do not fit together.
    #[error(transparent)]
    Resolve(#[from] resolve::Error),
    /// A package could not be unpacked.
    #[error(transparent)]
    Unpack(#[from] unpack::Error),
    /// A file has no place.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// What the builder adds could not be made.
    #[error(transparent)]
    Setup(#[from] setup::Error),
    /// The file system could not be made.
    #[error("cannot make the guest's file system: {0}")]
    FileSystem(#[from] ext4::Error),
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] cache::Error),
    /// The kernel package has no kernel.
    #[error("package {0} brought no kernel; choose another kernel flavour")]
    NoKernel(String),
}

impl Error {
    /// True if the build ended because the caller asked it to.
    pub fn is_stopped(&self) -> bool {
        match self {
            Error::Repository(error) => error.is_stopped(),
            Error::Unpack(unpack::Error::Stopped) | Error::Cache(cache::Error::Stopped) => true,
            _ => false,
        }
    }
}

/// Builds the image, or finds it in the cache. Setting `stop` ends a build within moments and leaves no trace but finished downloads.
pub fn build(request: &Request, progress: &mut dyn Progress, stop: &AtomicBool) -> Result<Image, Error> {
    check(request)?;
    let cache = Cache::open(&request.cache)?;
    let key = request.key();
    if let Some(image) = known_image(&cache, &key, request.index_age_max) {
        return Ok(image);
    }
    let mut waited = false;
    let lock = cache.lock(stop, &mut || {
        waited = true;
        progress.started(Phase::Waiting, 0);
    })?;
    if waited {
        progress.finished();
        // Whoever held the lock may have built just this.
        if let Some(image) = known_image(&cache, &key, request.index_age_max) {
            return Ok(image);
        }
    }
    let client = Client::new(CONNECTIONS);
    let result = with_watch(stop, &client, || build_locked(request, &cache, &client, progress, stop, &key));
    drop(lock);
    match result {
        // An image of yesterday is better than none.
        Err(Error::Repository(error)) if error.is_offline() => {
            let known = known_image(&cache, &key, Duration::MAX);
            known.map(|image| Image { offline: true, ..image }).ok_or(Error::Repository(error))
        }
        result => result,
    }
}

fn check(request: &Request) -> Result<(), Error> {
    let hostname = &request.hostname;
    let plain = hostname.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !hostname.starts_with('-');
    if hostname.is_empty() || hostname.len() > HOSTNAME_BYTES_MAX || !plain {
        return Err(Error::Request(format!(
            "{hostname:?} is no host name; use up to {HOSTNAME_BYTES_MAX} letters, digits and hyphens"
        )));
    }
    match &request.suite {
        Some(suite) if !crate::release::is_suite_name(suite) => Err(Error::Request(format!(
            "{suite:?} is no name of a Debian release; use one like stable, or a code name"
        ))),
        _ => Ok(()),
    }
}

/// Runs `work` while another thread waits for `stop`, to break transfers that hang.
fn with_watch<T>(stop: &AtomicBool, client: &Client, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if stop.load(Ordering::SeqCst) {
                    client.stop();
                    return;
                }
                std::thread::park_timeout(Duration::from_millis(20));
            }
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        watch.thread().unpark();
        result
    })
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The image that this request led to last, if it is still there and was checked at most `age_max` ago.
fn known_image(cache: &Cache, key: &str, age_max: Duration) -> Option<Image> {
    let known: KnownRequest = cache.read(Kind::Request, key)?;
    // Offline any age will do, even one by a clock that was ahead.
    let age = now().checked_sub(known.checked).or((age_max == Duration::MAX).then_some(0))?;
    if age > age_max.as_secs() || age_max.is_zero() {
        return None;
    }
    finished_image(cache, &known.image)
}

/// The finished image with this key.
fn finished_image(cache: &Cache, key: &str) -> Option<Image> {
    let directory = cache.image(key);
    let image: Image = serde_json::from_slice(&fs::read(directory.join("image.json")).ok()?).ok()?;
    // The cache may have been moved since.
    let image = Image {
        disk: directory.join("disk.img"),
        kernel: directory.join("vmlinuz"),
        initrd: image.initrd.map(|_| directory.join("initrd")),
        cached: true,
        ..image
    };
    let there = |file: &PathBuf| file.is_file();
    let complete = there(&image.disk) && there(&image.kernel) && image.initrd.as_ref().is_none_or(there);
    complete.then_some(image)
}

fn build_locked(
    request: &Request,
    cache: &Cache,
    client: &Client,
    progress: &mut dyn Progress,
    stop: &AtomicBool,
    request_key: &str,
) -> Result<Image, Error> {
    let mut keyring = Keyring::embedded();
    keyring.add_host();
    for path in &request.keyrings {
        keyring.add_file(path)?;
    }
    let bases = match request.mirrors.as_slice() {
        [] => sources::from_host(Path::new("/"))?,
        mirrors => sources::from_mirrors(mirrors)?,
    };
    let reader = Reader { client, cache, keyring: &keyring, accept_stale: request.accept_stale };
    progress.started(Phase::Indexing, 0);
    let suites = reader.suites(&bases, request.suite.as_deref().unwrap_or("stable"))?;
    let plan = Plan::new(request, &suites)?;
    progress.finished();
    let key = plan.key(request_key);
    let image = match finished_image(cache, &key) {
        Some(image) => image,
        None => {
            progress.started(Phase::Downloading, plan.bytes());
            let paths = reader.download(&plan.downloads, &mut |bytes| progress.advanced(bytes))?;
            progress.finished();
            make_image(request, &plan, &paths, &key, cache, progress, stop)?
        }
    };
    cache.write(Kind::Request, request_key, &KnownRequest { checked: now(), image: key })?;
    Ok(image)
}

/// What will be in the image.
struct Plan {
    names: Vec<String>,
    downloads: Vec<Download>,
    yields: Vec<Vec<usize>>,
    sources: Vec<AptSource>,
    wanted: HashSet<String>,
    suite: String,
    codename: String,
    version: String,
    date: String,
    /// Time of the newest suite in seconds since 1970: the time of the builder's own files.
    time: i64,
}

impl Plan {
    fn new(request: &Request, suites: &[Suite]) -> Result<Self, Error> {
        let catalogue = Catalogue::new(suites.iter().map(|suite| suite.packages.as_str()));
        let known = |name: &&str| !catalogue.versions(name).is_empty();
        let mut wanted: Vec<String> = vec![request.kernel_flavour.package().to_owned()];
        wanted.extend(PACKAGES.iter().copied().filter(known).map(str::to_owned));
        wanted.extend(request.extra_packages.iter().cloned());
        let places = resolve::resolve(&catalogue, &wanted, &dpkg::OWN_PROVIDES)?;
        let mut packages: Vec<_> = places.iter().filter_map(|place| catalogue.get(*place)).collect();
        // Whoever replaces files of another is unpacked before it, so that its files stay (Debian Policy 7.6).
        let replaces: Vec<Vec<&str>> = packages
            .iter()
            .map(|package| {
                package.relations("Replaces").into_iter().flatten().map(|atom| atom.name).collect()
            })
            .collect();
        let replaced_by = |name: &str| replaces.iter().filter(|names| names.contains(&name)).count();
        let ranks: Vec<usize> = packages.iter().map(|package| replaced_by(package.name)).collect();
        let mut order: Vec<usize> = (0..packages.len()).collect();
        order.sort_by_key(|place| {
            let first = packages.get(*place).is_none_or(|package| package.name != "base-files");
            (first, ranks.get(*place).copied())
        });
        packages = order.iter().filter_map(|place| packages.get(*place).copied()).collect();
        let mut downloads = Vec::new();
        for package in &packages {
            let location = package.location()?;
            let base = suites.get(package.archive).map_or("", |suite| suite.base.as_str());
            downloads.push(Download {
                url: format!("{base}/{}", location.filename),
                size: location.size,
                sha256: location.sha256,
            });
        }
        let replaces: Vec<Vec<&str>> =
            order.iter().map(|place| replaces.get(*place).cloned().unwrap_or_default()).collect();
        let related = |left: usize, right: usize| {
            let name = packages.get(right).map(|package| package.name);
            name.is_some_and(|name| replaces.get(left).is_some_and(|names| names.contains(&name)))
        };
        let all = 0..packages.len();
        let related_to =
            |one: usize| all.clone().filter(|other| related(one, *other) || related(*other, one)).collect();
        let yields = all.clone().map(related_to).collect();
        let main = suites.first();
        Ok(Plan {
            names: packages.iter().map(|package| package.name.to_owned()).collect(),
            downloads,
            yields,
            sources: apt_sources(suites),
            wanted: wanted.into_iter().collect(),
            suite: main.map(|suite| suite.release.suite.clone()).unwrap_or_default(),
            codename: main.map(|suite| suite.name.clone()).unwrap_or_default(),
            version: main.map(|suite| suite.release.version.clone()).unwrap_or_default(),
            date: main.map(|suite| suite.release.date.clone()).unwrap_or_default(),
            time: suites.iter().filter_map(|suite| seconds(suite.release.time)).max().unwrap_or(0),
        })
    }

    fn bytes(&self) -> u64 {
        self.downloads.iter().fold(0, |sum, download| sum.saturating_add(download.size))
    }

    /// Names the image: all that goes into it, and the times of its files.
    fn key(&self, request_key: &str) -> String {
        let hashes = self.downloads.iter().map(|download| download.sha256.as_bytes());
        let sources = self.sources.iter().flat_map(|source| {
            [source.base.as_bytes()].into_iter().chain(source.suites.iter().map(String::as_bytes))
        });
        key_of([request_key.as_bytes(), self.codename.as_bytes()].into_iter().chain(sources).chain(hashes))
    }
}

fn seconds(time: SystemTime) -> Option<i64> {
    i64::try_from(time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs()).ok()
}

fn apt_sources(suites: &[Suite]) -> Vec<AptSource> {
    let mut sources: Vec<AptSource> = Vec::new();
    for suite in suites {
        match sources.iter_mut().find(|source| source.base == suite.base) {
            Some(source) => source.suites.push(suite.name.clone()),
            None => sources.push(AptSource { base: suite.base.clone(), suites: vec![suite.name.clone()] }),
        }
    }
    sources
}

fn make_image(
    request: &Request,
    plan: &Plan,
    paths: &[PathBuf],
    key: &str,
    cache: &Cache,
    progress: &mut dyn Progress,
    stop: &AtomicBool,
) -> Result<Image, Error> {
    let io_error = |source| cache::Error::Io { path: cache.partial(), source };
    let directory = tempfile::tempdir_in(cache.partial()).map_err(io_error)?;
    let file = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(directory.path().join("disk.img"))
        .map_err(io_error)?;
    let mut options = ext4::Options::new(request.disk_size);
    options.label = "yado-root".to_owned();
    options.uuid = uuid_of(key);
    options.hash_seed = uuid_of(&key_of([key.as_bytes(), b"hash seed"]));
    options.timestamp = plan.time;
    let disk = file.try_clone().map_err(io_error)?;
    let mut tree = ImageTree(ext4::Writer::new(file, &options)?);
    let Boot { kernel, initrd } = fill_tree(&mut tree, request, plan, paths, progress, stop)?;
    progress.started(Phase::Finishing, 0);
    tree.0.finish()?;
    // On stable storage before it gets its name, so that a crash of the host cannot leave a broken image in the cache.
    disk.sync_data().map_err(io_error)?;
    // Before the image gets its name: a power cut must leave none with a short kernel.
    let put = |name: &str, bytes: &[u8]| {
        let mut file = fs::File::create(directory.path().join(name))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    put("vmlinuz", &kernel).map_err(io_error)?;
    if let Some(initrd) = &initrd {
        put("initrd", initrd).map_err(io_error)?;
    }
    let place = cache.image(key);
    let image = Image {
        disk: place.join("disk.img"),
        kernel: place.join("vmlinuz"),
        initrd: initrd.map(|_| place.join("initrd")),
        cmdline: "root=/dev/nvme0n1 rootfstype=ext4 rw console=ttyS0 quiet".to_owned(),
        suite: plan.suite.clone(),
        codename: plan.codename.clone(),
        version: plan.version.clone(),
        release_date: plan.date.clone(),
        packages: plan.names.len(),
        cached: false,
        offline: false,
    };
    let json = serde_json::to_vec_pretty(&image).map_err(|error| io_error(error.into()))?;
    put("image.json", &json).map_err(io_error)?;
    let _ = fs::remove_dir_all(&place);
    fs::rename(directory.path(), &place).map_err(io_error)?;
    progress.finished();
    Ok(image)
}

/// Sixteen bytes out of a hexadecimal key, marked as a random UUID (RFC 9562 section 5.4).
fn uuid_of(key: &str) -> [u8; 16] {
    let mut uuid = [0u8; 16];
    for (place, byte) in uuid.iter_mut().enumerate() {
        let start = place.saturating_mul(2);
        *byte = key
            .get(start..start.saturating_add(2))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .unwrap_or(0);
    }
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut uuid;
    *version = (*version & 0x0f) | 0x40;
    *variant = (*variant & 0x3f) | 0x80;
    uuid
}

/// What boots an image.
struct Boot {
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
}

/// Puts all packages and all files of the builder into the tree.
fn fill_tree(
    tree: &mut dyn tree::Tree,
    request: &Request,
    plan: &Plan,
    paths: &[PathBuf],
    progress: &mut dyn Progress,
    stop: &AtomicBool,
) -> Result<Boot, Error> {
    let mut root = Root::new(tree, setup::KEEP, plan.time)?;
    let jobs: Vec<Job> = plan
        .names
        .iter()
        .zip(paths)
        .zip(&plan.yields)
        .map(|((name, path), yields)| Job { name: name.clone(), path: path.clone(), yields: yields.clone() })
        .collect();
    progress.started(Phase::Unpacking, plan.bytes());
    let unpacked = unpack::unpack(&mut root, &jobs, stop, &mut |number| {
        progress.advanced(plan.downloads.get(number).map_or(0, |download| download.size));
    })?;
    let settings = Settings {
        init: &request.init,
        hostname: &request.hostname,
        sources: &plan.sources,
        files: &request.files,
        time: plan.time,
    };
    let setup::Installed { own, initrd } = setup::install(&mut root, &plan.names, &settings)?;
    let automatic = |name: &str| !plan.wanted.contains(name);
    let records = dpkg::database(&unpacked, &root.digests, &own, env!("CARGO_PKG_VERSION"), automatic);
    setup::install_records(&mut root, &records, plan.time)?;
    progress.finished();
    let newest = root.kept.keys().filter(|path| path.starts_with("boot/vmlinuz-")).max().cloned();
    let kernel = newest.and_then(|path| root.kept.remove(&path));
    let kernel = kernel.ok_or_else(|| Error::NoKernel(request.kernel_flavour.package().to_owned()))?;
    Ok(Boot { kernel, initrd })
}
