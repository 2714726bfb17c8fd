//! What is near to what: the tables of a board with NUMA nodes.
//!
//! SRAT says which processors and which memory are a node's (ACPI 6.5, 5.2.16), SLIT how far nodes are from each other (5.2.17),
//! HMAT how fast their memory is (5.2.28). A node's proximity domain is its place in the list.

use super::X2APIC_ONLY;
use super::table::Table;
use crate::board::Node;

/// An entry of HMAT's matrices goes up to here; one more would mean "not reachable", zero "not known".
const ENTRY_MAX: u64 = 0xfffe;
/// Kinds of HMAT's matrices (table 5.146).
const ACCESS_LATENCY: u8 = 0;
const ACCESS_BANDWIDTH: u8 = 3;
const PICOSECONDS: u64 = 1000;

/// The tables that these nodes need.
pub(super) fn tables(nodes: &[Node]) -> Vec<Table> {
    let mut tables = Vec::new();
    if !nodes.is_empty() {
        tables.extend([srat(nodes), slit(nodes)]);
        tables.extend(hmat(nodes));
    }
    tables
}

fn numbered(nodes: &[Node]) -> impl Iterator<Item = (u32, &Node)> {
    (0u32..).zip(nodes)
}

/// System resource affinity table, revision 3.
fn srat(nodes: &[Node]) -> Table {
    let mut t = Table::new(b"SRAT", 3);
    t.u32(1);
    t.zeroes(8);
    for (domain, node) in numbered(nodes) {
        for &id in &node.cpus {
            processor(&mut t, domain, id);
        }
        for &(base, len) in &node.memory {
            t.bytes(&[1, 40]);
            t.u32(domain);
            t.u16(0);
            t.u64(base);
            t.u64(len);
            t.u32(0);
            t.u32(1); // enabled
            t.u64(0);
        }
    }
    t
}

fn processor(t: &mut Table, domain: u32, id: u32) {
    let [low, high @ ..] = domain.to_le_bytes();
    if id < X2APIC_ONLY {
        t.bytes(&[0, 16, low, id as u8]);
        t.u32(1); // enabled
        t.u8(0);
        t.bytes(&high);
    } else {
        t.bytes(&[2, 24, 0, 0]);
        t.u32(domain);
        t.u32(id);
        t.u32(1);
    }
    t.u32(0); // clock domain
    if id >= X2APIC_ONLY {
        t.u32(0);
    }
}

/// System locality information table, revision 1.
fn slit(nodes: &[Node]) -> Table {
    let mut t = Table::new(b"SLIT", 1);
    t.u64(nodes.len() as u64);
    for node in nodes {
        t.bytes(&node.distances);
    }
    t
}

/// Heterogeneous memory attribute table, revision 2; none if nothing is known of any memory.
fn hmat(nodes: &[Node]) -> Option<Table> {
    let latency = nodes.iter().any(|node| node.latency_ns.is_some());
    let bandwidth = nodes.iter().any(|node| node.bandwidth_mb_s.is_some());
    if !latency && !bandwidth {
        return None;
    }
    let mut t = Table::new(b"HMAT", 2);
    t.u32(0);
    let targets = || numbered(nodes).filter(|(_, node)| !node.memory.is_empty());
    for (domain, _) in targets() {
        memory_attributes(&mut t, domain, nearest(nodes, domain).map(|(initiator, _)| initiator));
    }
    if latency {
        let from = |node: &Node, times: u64, by: u64| {
            u64::from(node.latency_ns.unwrap_or(0)).saturating_mul(times).checked_div(by)
        };
        matrix(&mut t, nodes, ACCESS_LATENCY, PICOSECONDS, from);
    }
    if bandwidth {
        let from = |node: &Node, times: u64, by: u64| {
            u64::from(node.bandwidth_mb_s.unwrap_or(0)).saturating_mul(by).checked_div(times)
        };
        matrix(&mut t, nodes, ACCESS_BANDWIDTH, 1, from);
    }
    Some(t)
}

/// The node with processors that is nearest to `target`, and its distance.
fn nearest(nodes: &[Node], target: u32) -> Option<(u32, u8)> {
    let far = |node: &Node| node.distances.get(target as usize).copied();
    let with_processors = numbered(nodes).filter(|(_, node)| !node.cpus.is_empty());
    with_processors.filter_map(|(domain, node)| Some((domain, far(node)?))).min_by_key(|&(_, far)| far)
}

/// Memory proximity domain attributes (5.2.28.3).
fn memory_attributes(t: &mut Table, domain: u32, initiator: Option<u32>) {
    t.u16(0);
    t.u16(0);
    t.u32(40);
    t.u16(initiator.is_some().into()); // the initiator is valid
    t.u16(0);
    t.u32(initiator.unwrap_or(0));
    t.u32(domain);
    t.zeroes(20);
}

/// System locality latency and bandwidth information (5.2.28.4). `value` answers a node's from a distance of so many times that of
/// its nearest processors.
fn matrix(
    t: &mut Table,
    nodes: &[Node],
    kind: u8,
    unit: u64,
    value: impl Fn(&Node, u64, u64) -> Option<u64>,
) {
    let domains = |wanted: fn(&Node) -> bool| -> Vec<u32> {
        numbered(nodes).filter(|(_, node)| wanted(node)).map(|(domain, _)| domain).collect()
    };
    let initiators = domains(|node| !node.cpus.is_empty());
    let targets = domains(|node| !node.memory.is_empty());
    let mut values = Vec::new();
    for from in &initiators {
        for to in &targets {
            let distance = nodes.get(*from as usize).and_then(|node| node.distances.get(*to as usize));
            let (distance, least) =
                (distance.copied().unwrap_or(10), nearest(nodes, *to).map_or(10, |(_, far)| far));
            let node = nodes.get(*to as usize);
            values.push(node.and_then(|node| value(node, distance.into(), least.into())).unwrap_or(0));
        }
    }
    // The smallest power of ten with which all fit.
    let most = values.iter().copied().max().unwrap_or(0);
    let fits = |scale: &u64| most.checked_div(*scale).is_some_and(|most| most <= ENTRY_MAX);
    let scale = (0..20).filter_map(|power| 10u64.checked_pow(power)).find(fits).unwrap_or(u64::MAX);
    let count = |list: &[u32]| u32::try_from(list.len()).unwrap_or(u32::MAX);
    let length = [4, 4, 2].iter().zip([initiators.len(), targets.len(), values.len()]);
    let length = length.fold(32usize, |sum, (each, many)| sum.saturating_add(many.saturating_mul(*each)));
    t.u16(1);
    t.u16(0);
    t.u32(u32::try_from(length).unwrap_or(u32::MAX));
    t.bytes(&[0, kind, 0, 0]); // of memory itself, no transfer size, reserved
    t.u32(count(&initiators));
    t.u32(count(&targets));
    t.u32(0);
    t.u64(unit.saturating_mul(scale));
    for domain in initiators.iter().chain(&targets) {
        t.u32(*domain);
    }
    for value in values {
        t.u16(value.checked_div(scale).and_then(|entry| u16::try_from(entry).ok()).unwrap_or(0));
    }
}
