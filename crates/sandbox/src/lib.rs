//! The sandbox: what yado's process gives up, for good, before the guest's first instruction.
//!
//! A guest that breaks out of its engine or of a device ends up inside this process, with its rights. So the process opens
//! all that the guest needs first, and then can open nothing more. Four walls stand behind one another, and where a host's
//! kernel lacks one the others remain:
//!
//! * [`privileges`]: no new ones by executing a file, no capabilities, namespaces of its own where the host allows.
//! * [`files`]: no file, no socket in the file system, no process outside can be reached but what was granted (Landlock).
//! * [`calls`]: which system calls there are (seccomp), for the process and for each kind of thread. What no running guest
//!   ever needs ends the process; all else that is not on the list fails with EPERM.
//!
//! States: *off*; *on*, once [`put_on`] has returned, for as long as the process lives. It is put on while the process has one
//! thread: a wall that another thread does not have is none, since they share their memory. Threads that are started later
//! are inside from their first instruction, and [`narrow`] themselves to what their kind does.
//!
//! What may enter: nothing of yado's.
#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod calls;
pub mod files;
pub mod privileges;
mod sockets;

use serde::Serialize;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

pub use calls::Role;

/// What a running guest needs of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The CPU engine writes code and runs it, and has processes of its own in which the guest's programs run.
    pub makes_code: bool,
    /// Something talks to the network with sockets of this host.
    pub internet: bool,
    /// Something connects to sockets in the file system again when the other side comes back; these are granted.
    pub local_sockets: bool,
    /// Some of those have names of the network's namespace instead of paths.
    pub abstract_sockets: bool,
    /// vCPUs choose their CPUs and priorities when they start.
    pub schedules: bool,
    /// What may be reached by path.
    pub grants: Vec<Grant>,
}

/// One thing that may be reached by its path. One that does not exist is not granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// A file, or a directory with all below it.
    pub path: PathBuf,
    /// What may be done.
    pub may: May,
}

/// What may be done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum May {
    /// Read files.
    Read,
    /// List a directory and remove files in it.
    Clear,
    /// Remove directories in it (which must be empty).
    RemoveEmpty,
    /// Connect to a socket.
    Connect,
}

/// How the sandbox stands, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Nothing that it executes has more rights than it has. Always.
    pub no_new_privileges: bool,
    /// What files, sockets and processes it can reach.
    pub files: String,
    /// What system calls it can make.
    pub system_calls: String,
    /// Namespaces of its own, or why there are none.
    pub namespaces: String,
    /// Capabilities: none.
    pub capabilities: String,
}

/// Why the sandbox cannot be put on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are other threads.
    #[error("the sandbox cannot be put on while this process has {0} threads: --sandbox off runs without it")]
    Threads(usize),
    /// The kernel refuses.
    #[error(
        "the sandbox cannot be put on, for this host refuses {what} ({source}); --sandbox off runs without it"
    )]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A list of system calls that cannot be compiled: a mistake in this crate.
    #[error("the sandbox's list of system calls is wrong: {0}")]
    Calls(String),
}

static STATE: OnceLock<(Report, calls::Programs)> = OnceLock::new();

/// Puts the sandbox on. A second time does nothing.
pub fn put_on(plan: &Plan) -> Result<Report, Error> {
    if let Some((report, _)) = STATE.get() {
        return Ok(report.clone());
    }
    let threads = privileges::threads_left();
    if threads != 1 {
        return Err(Error::Threads(threads));
    }
    // First what can fail without a trace.
    let programs = calls::Programs::new(plan)?;
    privileges::forbid_new()?;
    let namespaces = privileges::enter_namespaces(plan);
    let files = files::confine(plan)?;
    let capabilities = privileges::drop_capabilities()?;
    programs.apply()?;
    let report =
        Report { no_new_privileges: true, files, system_calls: programs.about(), namespaces, capabilities };
    Ok(STATE.get_or_init(|| (report, programs)).0.clone())
}

/// The calling thread gives up what its kind does not need. Does nothing while the sandbox is off. It cannot fail where
/// [`put_on`] has not.
pub fn narrow(role: Role) {
    if let Some((_, programs)) = STATE.get() {
        programs.narrow(role);
    }
}

/// How the sandbox stands; `None` while it is off.
pub fn report() -> Option<&'static Report> {
    STATE.get().map(|(report, _)| report)
}
