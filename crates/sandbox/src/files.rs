//! What can be reached by path, and which processes (Linux `Documentation/userspace-api/landlock.rst`).
//!
//! Unsafe for one system call: which version there is, which the crate tells only those that it confines.
#![allow(unsafe_code)]

use crate::{Error, Grant, May, Plan};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

/// The newest version whose rights have been thought about here. A kernel that knows less gives what it has.
const VERSION: ABI = ABI::V9;

fn rights(may: May) -> BitFlags<AccessFs> {
    match may {
        May::Read => AccessFs::ReadFile.into(),
        May::Clear => AccessFs::ReadDir | AccessFs::RemoveFile,
        May::RemoveEmpty => AccessFs::RemoveDir.into(),
        May::Connect => AccessFs::ResolveUnix.into(),
    }
}

/// TCP and UDP: none, or all but to wait for others at a port.
fn network(plan: &Plan) -> BitFlags<AccessNet> {
    if plan.internet { AccessNet::BindTcp.into() } else { AccessNet::from_all(VERSION) }
}

/// Signals, and sockets by names of the network's namespace, unless one of those is in use.
fn scopes(plan: &Plan) -> BitFlags<Scope> {
    if plan.abstract_sockets { Scope::Signal.into() } else { Scope::from_all(VERSION) }
}

/// Confines the calling thread; answers how, for people.
pub(crate) fn confine(plan: &Plan) -> Result<String, Error> {
    let refused = |error: landlock::RulesetError| Error::Host {
        what: "Landlock",
        source: std::io::Error::other(error),
    };
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(VERSION))
        .and_then(|rules| rules.handle_access(network(plan)))
        .and_then(|rules| rules.scope(scopes(plan)))
        .and_then(Ruleset::create)
        .map_err(refused)?;
    for Grant { path, may } in &plan.grants {
        // What is not there needs no grant.
        if let Ok(path) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(path, rights(*may))).map_err(refused)?;
        }
    }
    let status = rules.restrict_self().map_err(refused)?;
    let version = match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => kernel_abi.unwrap_or(effective_abi as i32),
        _ => 0,
    };
    Ok(match status.ruleset {
        RulesetStatus::NotEnforced => "not confined: this kernel has no Landlock".to_owned(),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => {
            format!("none but what was granted (Landlock {version}){}", lacking(version))
        }
    })
}

/// What an older version cannot keep from the process; the system calls' list may.
fn lacking(version: i32) -> &'static str {
    match version {
        ..=3 => "; this version minds neither ports of TCP nor signals",
        4..=5 => "; this version does not mind signals",
        _ => "",
    }
}

/// Landlock's version on this kernel; `None` without it.
pub fn version() -> Option<i32> {
    const VERSION: libc::c_uint = 1;
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no structure and only answers a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION) };
    i32::try_from(version).ok().filter(|&version| version > 0)
}
