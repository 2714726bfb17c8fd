//! A control group for each guest: how much CPU time, memory and I/O its process may use.
//!
//! Linux has two kinds, and a host may have controllers of both: version 2, one tree for all controllers
//! (`Documentation/admin-guide/cgroup-v2.rst`), and version 1, a tree for each (`Documentation/admin-guide/cgroup-v1/`). The
//! guest's group is made below the group that yado is in, or below one that the user names, in each tree that has a controller
//! which is needed, and nowhere else.
//!
//! States: *entered*, from [`Groups::enter`] on; *left behind*, when the process has ended. An empty group is only a directory:
//! whoever has outlived the process [removes](remove) it.

mod host;
mod limits;

pub use limits::{IoLimits, Limits};

use host::{Host, Tree, Version};
use limits::{Controller, Setting};
use serde::Serialize;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// All groups of guests are called so, and nothing else is ever removed.
const PREFIX: &str = "yado-";
const REMOVE_TURN: Duration = Duration::from_millis(5);

/// Why a guest has no group.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No tree has the controller.
    #[error(
        "this host has no control groups for {what}: --limit {what}... needs the {controller} controller of its kernel{hint}"
    )]
    Missing {
        /// What was to be limited.
        what: &'static str,
        /// The controller's name.
        controller: &'static str,
        /// What may help.
        hint: String,
    },
    /// The parent has processes, and such a group cannot pass controllers on (version 2).
    #[error(
        "the control group {} has other processes in it, so it can have no limited groups below it ({source}): start yado in one of its \
         own (systemd-run --user --scope -p Delegate=yes yado run ...), or name a parent with --cgroup",
        parent.display()
    )]
    Occupied {
        /// The parent.
        parent: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A right is missing.
    #[error(
        "the control group {} cannot be {what} ({source}): it must be this user's (systemd-run --user --scope -p Delegate=yes yado run ..., or \
         as root chown it), or name another with --cgroup",
        path.display()
    )]
    Refused {
        /// Made, entered...
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A limit that the kernel does not take.
    #[error("the host does not take the limit {value:?} for {} ({source})", path.display())]
    Limit {
        /// The control file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// The host's answer.
        source: io::Error,
    },
    /// A file on no block device, whose I/O cannot be limited.
    #[error("the I/O of {} cannot be limited: it is on no block device of its own", .0.display())]
    NoDevice(PathBuf),
}

/// The groups that a process is in, one in each tree that was needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Groups {
    /// Their directories.
    pub directories: Vec<PathBuf>,
    /// Their limits: control file and what was written.
    pub limits: Vec<(String, String)>,
}

impl Groups {
    /// Puts the calling process into groups of its own, called after `name`, below `parent` (a path inside a tree; by default the
    /// group that it is in). Without limits and parent it stays where it is. `announce` hears of each group before it is made, to
    /// have it removed when the process has ended, and that too if this fails: the process may be in some of them by then.
    ///
    /// A group of version 2 that passes controllers on has no processes of its own. `companions` are processes of the caller's that may be
    /// beside it: where they would be in the way they get a group of their own, without limits, that is not announced, since they may
    /// outlive the one that hears.
    pub fn enter(
        name: &str,
        limits: &Limits,
        parent: Option<&Path>,
        companions: &[u32],
        announce: impl FnMut(&Path) -> io::Result<()>,
    ) -> Result<Self, Error> {
        Self::enter_on(&Host::this(), name, limits, parent, companions, announce)
    }

    fn enter_on(
        host: &Host,
        name: &str,
        limits: &Limits,
        parent: Option<&Path>,
        companions: &[u32],
        mut announce: impl FnMut(&Path) -> io::Result<()>,
    ) -> Result<Self, Error> {
        let mut groups = Self::default();
        let name = format!("{PREFIX}{name}.{}", std::process::id());
        let mut wanted = limits.settings()?;
        if wanted.is_empty() && parent.is_some() {
            // Only to be there: in the tree of CPU time.
            wanted.push((Controller::Cpu, Vec::new()));
        }
        for (controller, settings) in wanted {
            let tree = host.tree(controller, parent)?;
            let group = tree.parent.join(&name);
            if !groups.directories.contains(&group) {
                announce(&group).and_then(|()| fs::create_dir(&group)).map_err(refused("made", &group))?;
                groups.directories.push(group.clone());
                enter(&group)?;
            }
            if tree.version == Version::Two && !tree.passes_on(controller) {
                groups.part(&tree, &name, companions)?;
                delegate(&tree, controller)?;
            }
            groups.set(&group, &tree, settings)?;
        }
        Ok(groups)
    }

    /// Puts those of `companions` that are in the parent's group into one of their own.
    fn part(&mut self, tree: &Tree, name: &str, companions: &[u32]) -> Result<(), Error> {
        let there = fs::read_to_string(tree.parent.join("cgroup.procs")).unwrap_or_default();
        let is_there = |pid: &&u32| there.lines().any(|line| line.parse() == Ok(**pid));
        let group = tree.parent.join(format!("{name}.keeper"));
        for pid in companions.iter().filter(is_there) {
            if !self.directories.contains(&group) {
                fs::create_dir(&group).map_err(refused("made", &group))?;
                self.directories.push(group.clone());
            }
            // One at a time, which in a file of a tree is not what was written before.
            let procs = fs::OpenOptions::new().append(true).create(true).open(group.join("cgroup.procs"));
            procs
                .and_then(|mut procs| procs.write_all(format!("{pid}\n").as_bytes()))
                .map_err(refused("entered", &group))?;
        }
        Ok(())
    }

    fn set(&mut self, group: &Path, tree: &Tree, settings: Vec<Setting>) -> Result<(), Error> {
        for setting in settings {
            for (file, value) in setting.lines(tree.version) {
                let path = group.join(file);
                fs::write(&path, &value).map_err(|source| Error::Limit {
                    path,
                    value: value.clone(),
                    source,
                })?;
                self.limits.push((file.to_owned(), value));
            }
        }
        Ok(())
    }
}

fn refused(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Refused { what, path, source }
}

/// The whole process: 0 is whoever writes it.
fn enter(group: &Path) -> Result<(), Error> {
    fs::write(group.join("cgroup.procs"), "0").map_err(refused("entered", group))
}

/// A group of version 2 has the controllers that its parent passes on.
fn delegate(tree: &Tree, controller: Controller) -> Result<(), Error> {
    let path = tree.parent.join("cgroup.subtree_control");
    fs::write(&path, format!("+{}", controller.name(Version::Two))).map_err(|source| {
        if source.kind() == ErrorKind::ResourceBusy {
            Error::Occupied { parent: tree.parent.clone(), source }
        } else {
            Error::Refused { what: "used", path, source }
        }
    })
}

/// Removes groups of a process that has ended; answers whether none is left. Other directories than guests' groups are left alone, and
/// groups in which something still runs after so long: processes that have been killed take a moment to be gone.
pub fn remove(directories: &[PathBuf], wait: Duration) -> bool {
    let until = Instant::now().checked_add(wait);
    directories.iter().filter(|directory| !remove_one(directory, until)).count() == 0
}

fn remove_one(directory: &Path, until: Option<Instant>) -> bool {
    let ours =
        directory.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PREFIX));
    if !ours {
        return false;
    }
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return true,
            Err(error) if error.kind() == ErrorKind::NotFound => return true,
            Err(error)
                if error.kind() == ErrorKind::ResourceBusy
                    && until.is_some_and(|until| Instant::now() < until) =>
            {
                std::thread::sleep(REMOVE_TURN);
            }
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod test;
