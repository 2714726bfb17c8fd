//! Where guests are kept, and which of them run.
//!
//! Each guest has a directory `vms/NAME` under yado's state directory: `guest.json` (what it is), `disk.raw` (named
//! Debian guests), `console.log`, `vmm.log`, and `lock`, on which the process that runs it holds an exclusive lock
//! for as long as it lives. Its control socket is `NAME.vm/control` in the runtime directory. Nothing needs a daemon.

use anyhow::{Context, bail, ensure};
use net::gateway::Meeting;
use resources::cgroup;
use rustix::fs::{FlockOperation, flock};
use sandbox::{Grant, May};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The longest name, so that a socket's path fits.
const NAME_MAX: usize = 48;

/// What is remembered of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// What it was made from, for people: `debian:trixie`.
    pub source: String,
    /// Forgotten with its directory when it stops.
    pub ephemeral: bool,
    /// Seconds since 1970 of its last start.
    pub started: u64,
    /// Process that ran it last.
    pub pid: u32,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// `soft` or `kvm`.
    pub engine: String,
    /// Control groups of its process, which whoever finds it dead removes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<PathBuf>,
    /// How a kept Debian guest boots again.
    #[serde(default)]
    pub boot: Option<Boot>,
}

/// A kept guest's way to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

/// A guest's place; the running process holds the lock in it.
#[derive(Debug)]
pub struct Place {
    pub name: String,
    pub directory: PathBuf,
    lock: Option<File>,
}

fn directory_from(variable: &str, home: &str) -> anyhow::Result<PathBuf> {
    if let Some(set) = std::env::var_os(variable).filter(|value| Path::new(value).is_absolute()) {
        return Ok(PathBuf::from(set).join("yado"));
    }
    let user = std::env::var_os("HOME").filter(|home| !home.is_empty());
    let user = user.with_context(|| {
        format!("neither {variable} nor HOME is set: set one, so that guests have a place")
    })?;
    Ok(PathBuf::from(user).join(home).join("yado"))
}

/// Where guests' records and disks are.
pub fn state_directory() -> anyhow::Result<PathBuf> {
    directory_from("XDG_STATE_HOME", ".local/state")
}

/// Where downloads and built images are.
pub fn cache_directory() -> anyhow::Result<PathBuf> {
    directory_from("XDG_CACHE_HOME", ".cache")
}

/// Where sockets are: private to the user.
pub fn runtime_directory() -> anyhow::Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_dir());
    let path = match base {
        Some(base) => base.join("yado"),
        None => std::env::temp_dir().join(format!("yado-{uid}")),
    };
    make_private(&path)?;
    let owner = fs::symlink_metadata(&path)?;
    ensure!(
        owner.is_dir() && owner.uid() == uid && owner.mode() & 0o077 == 0,
        "{} is not a private directory of this user: remove it, or set XDG_RUNTIME_DIR",
        path.display()
    );
    Ok(path)
}

fn make_private(path: &Path) -> anyhow::Result<()> {
    // A process in the sandbox makes no directories, and needs none.
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// The directory of a guest's control socket: one for each, so that the guest's process can be let to remove its own
/// socket and no other.
fn socket_directory(name: &str) -> anyhow::Result<PathBuf> {
    Ok(runtime_directory()?.join(format!("{name}.vm")))
}

/// The control socket of a guest.
pub fn socket(name: &str) -> anyhow::Result<PathBuf> {
    Ok(socket_directory(name)?.join("control"))
}

/// Where the guest called `name` meets the user's other guests.
pub fn meeting(name: &str) -> anyhow::Result<Meeting> {
    make_private(&socket_directory(name)?)?;
    Ok(Meeting { directory: runtime_directory()?, suffix: ".vm/net".to_owned(), name: name.to_owned() })
}

/// Refuses names that are no file names or do not read well in a table.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let sound = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        !name.is_empty()
            && name.len() <= NAME_MAX
            && name.chars().all(sound)
            && !name.starts_with(['.', '-']),
        "{name:?} cannot be a guest's name: use up to {NAME_MAX} letters, digits, '-', '_' and '.'"
    );
    Ok(())
}

/// How often, and how far apart, a lock is tried that others may hold for a moment.
const LOCK_TRIES: u32 = 20;
const LOCK_WAIT: Duration = Duration::from_millis(10);

impl Place {
    fn at(name: &str) -> anyhow::Result<Self> {
        check_name(name)?;
        Ok(Self { name: name.to_owned(), directory: state_directory()?.join("vms").join(name), lock: None })
    }

    /// Takes the place `name`, making it if need be; fails if the guest runs.
    pub fn take(name: &str) -> anyhow::Result<Self> {
        let mut place = Self::at(name)?;
        let path = place.directory.join("lock");
        for _ in 0..LOCK_TRIES {
            make_private(&place.directory)?;
            let file = match File::options().create(true).append(true).open(&path) {
                Ok(file) => file,
                // Somebody has just removed the directory.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
            };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                // Who has removed the guest meanwhile has removed this file: it locks nothing.
                let held = file.metadata()?;
                let same = |now: fs::Metadata| (held.dev(), held.ino()) == (now.dev(), now.ino());
                if fs::metadata(&path).is_ok_and(same) {
                    place.lock = Some(file);
                    return Ok(place);
                }
            }
            // Others hold it for a moment to see whether the guest runs.
            std::thread::sleep(LOCK_WAIT);
        }
        bail!(
            "the guest {name} is running: attach with `yado console {name}`, or stop it with `yado stop {name}`"
        );
    }

    /// Takes a place for a guest without a name.
    pub fn take_new(stem: &str) -> anyhow::Result<Self> {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
        for attempt in 0..1000u64 {
            let number = (seed ^ u64::from(std::process::id()).wrapping_mul(0x9e37))
                .wrapping_add(attempt.wrapping_mul(0x9e37_79b9))
                & 0xffff;
            let name = format!("{stem}-{number:04x}");
            if !Self::at(&name)?.directory.exists() {
                return Self::take(&name);
            }
        }
        bail!("all names for new guests are taken: remove some with `yado rm`")
    }

    /// Where a kept guest's own disk is.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.raw")
    }

    /// The record, if the guest was ever started.
    pub fn record(&self) -> anyhow::Result<Option<Record>> {
        let path = self.directory.join("guest.json");
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(
                serde_json::from_slice(&bytes)
                    .with_context(|| format!("{} is damaged: remove the guest", path.display()))?,
            )),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes the record.
    pub fn set_record(&self, record: &Record) -> anyhow::Result<()> {
        let path = self.directory.join("guest.json");
        let temporary = self.directory.join("guest.json.new");
        let bytes = serde_json::to_vec_pretty(record)?;
        // That of a guest that is kept must outlive a power cut as its disk does.
        let write = |mut file: File| {
            file.write_all(&bytes)?;
            if record.ephemeral { Ok(()) } else { file.sync_all() }
        };
        File::create(&temporary)
            .and_then(write)
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Makes room for the guest's control socket; answers where it will be.
    pub fn socket(&self) -> anyhow::Result<PathBuf> {
        make_private(&socket_directory(&self.name)?)?;
        socket(&self.name)
    }

    /// What a process must be able to do here later, when the guest has stopped.
    pub fn grants(&self, ephemeral: bool) -> anyhow::Result<Vec<Grant>> {
        let grant = |path, may| Grant { path, may };
        let sockets = socket_directory(&self.name)?;
        let mut grants = vec![grant(runtime_directory()?, May::RemoveEmpty), grant(sockets, May::Clear)];
        if ephemeral {
            grants.push(grant(state_directory()?.join("vms"), May::RemoveEmpty));
            grants.push(grant(self.directory.clone(), May::Clear));
        }
        Ok(grants)
    }

    /// The guest has stopped: nobody answers at its socket any more.
    pub fn leave(&self) -> anyhow::Result<()> {
        let _ = fs::remove_file(socket(&self.name)?);
        let _ = fs::remove_file(socket_directory(&self.name)?.join("net"));
        let _ = fs::remove_dir(socket_directory(&self.name)?);
        Ok(())
    }

    /// Nothing is here but what a guest's first start makes before there is a record: its process was killed.
    fn is_begun_only(&self) -> bool {
        let made = |name: &std::ffi::OsStr| {
            let name = name.to_string_lossy();
            ["lock", "disk.partial", "guest.json.new"].contains(&&*name)
                || name.starts_with("vmlinuz")
                || name.starts_with("initrd")
        };
        let mut entries = fs::read_dir(&self.directory).into_iter().flatten();
        self.lock.is_some() && entries.all(|entry| entry.is_ok_and(|entry| made(&entry.file_name())))
    }

    /// Removes the guest with all it has.
    pub fn remove(self) -> anyhow::Result<()> {
        self.leave()?;
        fs::remove_dir_all(&self.directory)
            .with_context(|| format!("cannot remove {}", self.directory.display()))
    }
}

/// A guest as others see it.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    #[serde(flatten)]
    pub record: Record,
    /// Its process holds the lock.
    pub running: bool,
}

/// All guests, by name. Places that dead processes left of guests without a name are cleaned up on the way.
pub fn list() -> anyhow::Result<Vec<Listed>> {
    let path = state_directory()?.join("vms");
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut guests = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Ok(mut place) = Place::at(&name) else { continue };
        // A record that cannot be read must not hide the others.
        let Ok(record) = place.record() else { continue };
        let running = is_running(&mut place);
        let Some(record) = record else {
            if !running && place.is_begun_only() {
                let _ = place.remove();
            }
            continue;
        };
        if !running {
            // Its keeper has done so, unless it was killed.
            cgroup::remove(&record.cgroups, Duration::ZERO);
        }
        if record.ephemeral && !running {
            // Another guest may have taken the name before the lock was looked at.
            if place.record().is_ok_and(|now| now.is_none_or(|now| now.ephemeral)) {
                let _ = place.remove();
            }
        } else {
            guests.push(Listed { record, running });
        }
    }
    guests.sort_by(|a, b| a.record.name.cmp(&b.record.name));
    Ok(guests)
}

/// Whether a process holds the place; if not, `place` holds it now.
fn is_running(place: &mut Place) -> bool {
    let Ok(file) = File::options().append(true).open(place.directory.join("lock")) else { return false };
    let running = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
    if !running {
        place.lock = Some(file);
    }
    running
}

/// Whether there is anything of a guest called `name`.
pub fn is_there(name: &str) -> bool {
    Place::at(name).is_ok_and(|place| place.directory.exists())
}

/// The guest called `name`.
pub fn find(name: &str) -> anyhow::Result<Listed> {
    check_name(name)?;
    let guests = list()?;
    let Some(found) = guests.iter().find(|guest| guest.record.name == name) else {
        let near = guests
            .iter()
            .map(|guest| guest.record.name.as_str())
            .filter(|other| other.contains(name) || name.contains(other));
        let near: Vec<&str> = near.collect();
        match near.as_slice() {
            [] => bail!("there is no guest called {name}; `yado ps --all` lists them"),
            near => bail!("there is no guest called {name}; did you mean {}?", near.join(" or ")),
        }
    };
    Ok(found.clone())
}

/// The running guest called `name`.
pub fn find_running(name: &str) -> anyhow::Result<Listed> {
    let guest = find(name)?;
    if !guest.running {
        let how = match guest.record.source.as_str() {
            source if source.starts_with("debian:") => {
                format!("`yado run {source} --name {name}`, with the options it had")
            }
            _ => "with the command that you started it with".to_owned(),
        };
        bail!("the guest {name} is not running: start it again ({how})");
    }
    Ok(guest)
}

/// Waits until `name` no longer runs; `false` if it still does after `timeout`.
pub fn wait_stopped(name: &str, timeout: Duration) -> anyhow::Result<bool> {
    let until = Instant::now() + timeout;
    loop {
        let mut place = Place::at(name)?;
        if !place.directory.exists() || !is_running(&mut place) {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_are_file_names() {
        for good in ["a", "debian-1f", "My_guest.2"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "-f", "a/b", "a b", "é", &"x".repeat(NAME_MAX + 1)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
