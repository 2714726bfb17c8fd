//! `--sandbox`: what the guest's process keeps.

use crate::registry::Place;
use crate::signals;
use machine::{EngineKind, MachineConfig, NetworkKind};
use sandbox::{Grant, May, Plan};
use std::path::{Path, PathBuf};

/// What a machine needs of the host once it runs, as far as its configuration tells.
pub fn plan(config: &MachineConfig) -> Plan {
    let to_network = |kind: &NetworkKind| matches!(kind, NetworkKind::User(_));
    let meetings = config.networks.iter().filter_map(|card| match &card.kind {
        NetworkKind::User(user) => user.peers.as_ref(),
        _ => None,
    });
    Plan {
        // By datagram: the system calls' list has no other sockets of this kind.
        grants: meetings
            .map(|meeting| Grant { path: meeting.directory.clone(), may: May::Connect })
            .collect(),
        makes_code: config.engine == EngineKind::Soft,
        schedules: !config.scheduling.is_default(),
        internet: config.networks.iter().any(|card| to_network(&card.kind)),
        ..Plan::default()
    }
}

/// Puts the sandbox on. Everything that the guest needs is open; its threads have not started.
pub fn put_on(mut plan: Plan, place: &Place, ephemeral: bool) -> anyhow::Result<()> {
    plan.add_open_sockets();
    plan.grants.extend(place.grants(ephemeral)?);
    if plan.makes_code {
        // The accounts that the host keeps of a vCPU's thread, from which the guest hears of stolen time.
        plan.grants.push(Grant { path: "/proc/self/task".into(), may: May::Read });
    }
    if plan.internet {
        plan.grants.extend(resolvers(Path::new("/etc/resolv.conf")));
    }
    signals::aside(|| sandbox::put_on(&plan))??;
    Ok(())
}

/// Where the host says who resolves names, and says it anew: a file, or the directory of one that is replaced, unless that holds
/// more than such files.
fn resolvers(file: &Path) -> Option<Grant> {
    let path = file.canonicalize().ok()?;
    let own = path.parent().filter(|directory| *directory != Path::new("/etc")).map(PathBuf::from);
    Some(Grant { path: own.unwrap_or(path), may: May::Read })
}
