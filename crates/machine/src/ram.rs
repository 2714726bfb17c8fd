//! The guest's RAM: where it is in the guest's address space, and how the host holds it.

use crate::config::{EngineKind, MachineConfig, MemoryPolicy};
use crate::machine::Error;
use crate::numa;
use chipset::board::{LOW_RAM_END, Node};
use memory::{Backing, GuestMemory, Lock, Pages, Provision};
use serde_json::{Value, json};

const HIGH_MEMORY_BASE: u64 = 4 << 30;
const MIB: u64 = 1 << 20;

/// RAM, and its nodes if the guest knows of any.
pub(crate) struct Ram {
    pub(crate) memory: GuestMemory,
    pub(crate) nodes: Vec<Node>,
}

/// Makes it. If the host is to find all of it now, `progress` hears how many bytes of how many are there.
pub(crate) fn make(config: &MachineConfig, mut progress: impl FnMut(u64, u64)) -> Result<Ram, Error> {
    let MemoryPolicy { pages, populate, lock, mergeable } = config.memory_policy;
    let pool = matches!(pages, Pages::Huge2M | Pages::Huge1G);
    if pool && config.engine == EngineKind::Soft {
        return Err(Error::HugePagesOfPool);
    }
    let layout = layout(config.memory)?;
    let nodes = numa::nodes(&config.numa, config.cpus, &layout, pages.size())?;
    let provision = Provision { backing: backing(config), pages, mergeable };
    let memory = GuestMemory::provided(&layout, provision)?;
    numa::place(&config.numa, &nodes, &memory)?;
    // A page that its node's pool does not have would end this process when the guest touches it.
    let placed = config.numa.nodes.iter().any(|node| node.placement.is_some());
    if let Some(threads) = populate.or((pool && placed).then_some(1)) {
        let (mut done, all) = (0u64, memory.len());
        let told = |bytes| {
            done = done.saturating_add(bytes);
            progress(done, all);
        };
        memory.populate(threads, told).map_err(memory::Error::from)?;
    }
    memory.lock(lock).map_err(memory::Error::from)?;
    Ok(Ram { memory, nodes })
}

/// The software engine runs user code in processes that share the guest's RAM.
fn backing(config: &MachineConfig) -> Backing {
    match config.engine {
        EngineKind::Soft => Backing::Shared,
        EngineKind::Kvm if config.shares_memory() => Backing::Shared,
        EngineKind::Kvm => Backing::Private,
    }
}

/// Where so many bytes of RAM are: below the hole in which devices are, and from 4 GiB on.
fn layout(bytes: u64) -> Result<Vec<(u64, u64)>, Error> {
    let bytes = bytes.max(1).checked_next_multiple_of(MIB).unwrap_or(u64::MAX);
    let host = host_memory();
    if host.is_some_and(|host| bytes > host) {
        return Err(Error::TooMuchMemory { wanted: bytes, host: host.unwrap_or(0) });
    }
    let low = bytes.min(LOW_RAM_END);
    let mut layout = vec![(0, low)];
    if bytes > low {
        layout.push((HIGH_MEMORY_BASE, bytes.saturating_sub(low)));
    }
    Ok(layout)
}

/// Bytes of RAM and swap of this host.
fn host_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    };
    field("MemTotal:")?.checked_add(field("SwapTotal:").unwrap_or(0))
}

/// For people.
pub(crate) fn inspect(config: &MachineConfig, memory: &GuestMemory, nodes: &[Node]) -> Value {
    let Provision { backing, pages, mergeable } = memory.provision();
    let MemoryPolicy { populate, lock, .. } = config.memory_policy;
    let ranges: Vec<_> =
        memory.regions().iter().map(|region| json!({"base": region.base, "bytes": region.len})).collect();
    json!({
        "bytes": memory.len(),
        "ranges": ranges,
        "private": backing == Backing::Private && memory.file().is_none(),
        "pages": pages.name(),
        "populated_by_threads": populate,
        "locked": lock.name(),
        "may_be_paged_out": lock != Lock::On && !matches!(pages, Pages::Huge2M | Pages::Huge1G),
        "mergeable": mergeable,
        "nodes": numa::inspect(&config.numa, nodes),
    })
}
