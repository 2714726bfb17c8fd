//! NUMA nodes of a guest: which vCPUs and which part of its RAM are near to each other, and where on the host that RAM is.
//!
//! What is asked for ([`NumaConfig`]) leaves things open, such as how much memory a node has; [`nodes`] settles them. RAM is
//! given out in the order of nodes, from guest-physical address 0 on, over the hole in which devices are.

use chipset::board::Node;
use memory::{GuestMemory, Placement};
use serde_json::{Value, json};

/// Distance of a node to itself, and to another unless something else is said (ACPI 6.5, 5.2.17).
const LOCAL: u8 = 10;
const REMOTE: u8 = 20;
const MIB: u64 = 1 << 20;

/// Nodes as they are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NumaConfig {
    /// Numbered from 0 on; none: the guest knows nothing of nodes.
    pub nodes: Vec<NodeConfig>,
    /// Distances between two nodes, the same both ways; 20 where nothing is said.
    pub distances: Vec<(u32, u32, u8)>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeConfig {
    /// Its vCPUs. If no node names any, all have about as many, in order; else those that name none have none.
    pub cpus: Vec<u32>,
    /// Bytes of its memory. Nodes that say nothing share what the others leave.
    pub memory: Option<u64>,
    /// Where on the host its memory is: anywhere, unless said.
    pub placement: Option<Placement>,
    /// Nanoseconds that the nearest vCPU waits for its memory.
    pub latency_ns: Option<u32>,
    /// Megabytes (10^6) per second between its memory and the nearest vCPU.
    pub bandwidth_mb_s: Option<u32>,
}

/// Nodes that make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest's NUMA nodes make no sense: {0}")]
pub struct Error(String);

/// The most nodes: what Debian's kernels for small machines know.
pub const NODES_MAX: usize = 64;

impl NumaConfig {
    /// So many nodes that share everything equally.
    pub fn even(count: usize) -> Self {
        Self { nodes: vec![NodeConfig::default(); count], distances: Vec::new() }
    }
}

fn wrong<T>(why: String) -> Result<T, Error> {
    Err(Error(why))
}

/// Settles what is open for a machine of so many vCPUs, whose RAM is in these ranges and in pages of so many bytes.
pub(crate) fn nodes(
    config: &NumaConfig,
    cpus: u32,
    ram: &[(u64, u64)],
    page: u64,
) -> Result<Vec<Node>, Error> {
    let count = config.nodes.len();
    if count > NODES_MAX {
        return wrong(format!("{count} are more than {NODES_MAX}"));
    }
    if count == 0 && config.distances.is_empty() {
        return Ok(Vec::new());
    }
    let distances = distances(config)?;
    speeds(config)?;
    let processors = processors(config, cpus)?;
    let mut memory = shares(config, ram.iter().fold(0, |sum, (_, len)| len.saturating_add(sum)), page)?
        .into_iter()
        .scan(0u64, |from, len| {
            let start = *from;
            *from = start.saturating_add(len);
            Some(pieces(ram, start, len))
        });
    let parts = config.nodes.iter().zip(processors).zip(distances);
    Ok(parts
        .map(|((node, cpus), distances)| Node {
            cpus,
            memory: memory.next().unwrap_or_default(),
            distances,
            latency_ns: node.latency_ns,
            bandwidth_mb_s: node.bandwidth_mb_s,
        })
        .collect())
}

fn processors(config: &NumaConfig, cpus: u32) -> Result<Vec<Vec<u32>>, Error> {
    let mut of_node: Vec<Vec<u32>> = config.nodes.iter().map(|node| node.cpus.clone()).collect();
    if of_node.iter().all(Vec::is_empty) {
        let count = of_node.len() as u64;
        for cpu in 0..cpus {
            // In runs: the first nodes have the first vCPUs.
            let node = u64::from(cpu).saturating_mul(count).checked_div(cpus.into()).unwrap_or(0);
            if let Some(list) = of_node.get_mut(node as usize) {
                list.push(cpu);
            }
        }
        return Ok(of_node);
    }
    for cpu in 0..cpus {
        match of_node.iter().flatten().filter(|&&of| of == cpu).count() {
            1 => {}
            0 => return wrong(format!("vCPU {cpu} is of none of them; name all in cpus=, or none")),
            _ => return wrong(format!("vCPU {cpu} is of more than one")),
        }
    }
    match of_node.iter().flatten().find(|&&of| of >= cpus) {
        Some(none) => wrong(format!("there is no vCPU {none}; the last is {}", cpus.saturating_sub(1))),
        None => Ok(of_node),
    }
}

/// Bytes of each node.
fn shares(config: &NumaConfig, total: u64, page: u64) -> Result<Vec<u64>, Error> {
    let unit = page.max(MIB);
    let named = config.nodes.iter().filter_map(|node| node.memory).try_fold(0u64, u64::checked_add);
    let Some(rest) = named.and_then(|named| total.checked_sub(named)) else {
        return wrong(format!("they have more memory than the guest's {} MiB", total >> 20));
    };
    if let Some(odd) =
        config.nodes.iter().filter_map(|node| node.memory).find(|bytes| !bytes.is_multiple_of(unit))
    {
        return wrong(format!("a node's memory of {odd} bytes is not made of whole {} MiB", unit >> 20));
    }
    let open = config.nodes.iter().filter(|node| node.memory.is_none()).count() as u64;
    let Some(each) =
        rest.checked_div(open).map(|each| each.checked_div(unit).unwrap_or(0).saturating_mul(unit))
    else {
        return match rest {
            0 => Ok(config.nodes.iter().filter_map(|node| node.memory).collect()),
            _ => wrong(format!("{} MiB of the guest's memory are of none of them", rest >> 20)),
        };
    };
    let (mut left, mut after) = (rest, open);
    let share = |node: &NodeConfig| {
        node.memory.unwrap_or_else(|| {
            after = after.saturating_sub(1);
            // The last one has what is left over.
            let bytes = if after == 0 { left } else { each };
            left = left.saturating_sub(bytes);
            bytes
        })
    };
    Ok(config.nodes.iter().map(share).collect())
}

/// Where the bytes of RAM from the `start`th on are.
fn pieces(ram: &[(u64, u64)], start: u64, len: u64) -> Vec<(u64, u64)> {
    let end = start.saturating_add(len);
    let (mut found, mut before) = (Vec::new(), 0u64);
    for &(base, bytes) in ram {
        let after = before.saturating_add(bytes);
        let (from, to) = (start.max(before), end.min(after));
        if from < to {
            found.push((base.saturating_add(from.saturating_sub(before)), to.saturating_sub(from)));
        }
        before = after;
    }
    found
}

fn distances(config: &NumaConfig) -> Result<Vec<Vec<u8>>, Error> {
    let count = config.nodes.len();
    let mut all = vec![vec![REMOTE; count]; count];
    for (node, row) in all.iter_mut().enumerate() {
        if let Some(own) = row.get_mut(node) {
            *own = LOCAL;
        }
    }
    for &(a, b, distance) in &config.distances {
        if a == b || distance <= LOCAL {
            return wrong(format!(
                "from {a} to {b} it is not {distance}: {LOCAL} is here, and others are farther"
            ));
        }
        for (from, to) in [(a, b), (b, a)] {
            let place = all.get_mut(from as usize).and_then(|row| row.get_mut(to as usize));
            let Some(place) = place else {
                return wrong(format!("a distance is said of nodes {a} and {b}, but there are {count}"));
            };
            *place = distance;
        }
    }
    Ok(all)
}

/// Kernels compare them: either all are known or none.
fn speeds(config: &NumaConfig) -> Result<(), Error> {
    let uneven = |known: fn(&NodeConfig) -> bool| {
        let count = config.nodes.iter().filter(|node| known(node)).count();
        count != 0 && count != config.nodes.len()
    };
    if uneven(|node| node.latency_ns.is_some()) {
        return wrong("latency= is said of some and not of others".to_owned());
    }
    if uneven(|node| node.bandwidth_mb_s.is_some()) {
        return wrong("bandwidth= is said of some and not of others".to_owned());
    }
    Ok(())
}

/// How many vCPUs a package has: no package is in two nodes, for kernels take the caches of one to be shared. Their ids tell packages
/// apart, so with nodes it is a power of two.
pub(crate) fn package(nodes: &[Node], cpus: u32) -> u32 {
    let node_of = |cpu: u32| nodes.iter().position(|node| node.cpus.contains(&cpu));
    let whole = |size: &u32| (0..cpus).all(|cpu| node_of(cpu) == node_of(cpu & !size.wrapping_sub(1)));
    if nodes.is_empty() {
        cpus
    } else {
        (0..u32::BITS).rev().map(|power| 1 << power).find(whole).unwrap_or(1).min(cpus)
    }
}

/// Has each node's memory come from where it is wanted.
pub(crate) fn place(config: &NumaConfig, nodes: &[Node], memory: &GuestMemory) -> Result<(), memory::Error> {
    for (wanted, node) in config.nodes.iter().zip(nodes) {
        let Some(placement) = &wanted.placement else { continue };
        for &(base, len) in &node.memory {
            memory.place(base, len, placement)?;
        }
    }
    Ok(())
}

/// For people.
pub(crate) fn inspect(config: &NumaConfig, nodes: &[Node]) -> Vec<Value> {
    let one = |(wanted, node): (&NodeConfig, &Node)| {
        let memory: Vec<_> =
            node.memory.iter().map(|(base, len)| json!({"base": base, "bytes": len})).collect();
        json!({
            "cpus": node.cpus,
            "memory": memory,
            "distances": node.distances,
            "latency_ns": node.latency_ns,
            "bandwidth_mb_s": node.bandwidth_mb_s,
            "comes_from": wanted.placement.as_ref().map(ToString::to_string),
        })
    };
    config.nodes.iter().zip(nodes).map(one).collect()
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const RAM: [(u64, u64); 2] = [(0, 3 << 30), (4 << 30, 1 << 30)];

    fn node(cpus: &[u32], memory: Option<u64>) -> NodeConfig {
        NodeConfig { cpus: cpus.to_vec(), memory, ..NodeConfig::default() }
    }

    fn of(list: Vec<NodeConfig>) -> NumaConfig {
        NumaConfig { nodes: list, distances: Vec::new() }
    }

    #[test]
    fn a_node_may_lie_on_both_sides_of_the_hole() {
        let config = of(vec![node(&[0], Some(2 << 30)), node(&[1, 2], None), node(&[], Some(512 << 20))]);
        let nodes = nodes(&config, 3, &RAM, 4096).unwrap();
        let memory: Vec<_> = nodes.iter().map(|node| node.memory.clone()).collect();
        assert_eq!(memory[0], [(0, 2 << 30)]);
        assert_eq!(memory[1], [(2 << 30, 1 << 30), (4 << 30, 512 << 20)]);
        assert_eq!(memory[2], [((4 << 30) + (512 << 20), 512 << 20)]);
        assert_eq!(nodes[1].cpus, [1, 2]);
        assert_eq!(nodes[0].distances, [10, 20, 20]);
    }

    #[test]
    fn no_package_is_in_two_nodes() {
        let of = |cpus: u32, lists: &[&[u32]]| {
            let node = |list: &&[u32]| Node { cpus: list.to_vec(), ..Node::default() };
            package(&lists.iter().map(node).collect::<Vec<_>>(), cpus)
        };
        assert_eq!(of(6, &[]), 6, "all are one package");
        assert_eq!(of(4, &[&[0, 1], &[2, 3]]), 2);
        assert_eq!(of(8, &[&[0, 1, 2, 3, 4, 5, 6, 7], &[]]), 8);
        assert_eq!(of(3, &[&[0, 2], &[1]]), 1);
        assert_eq!(of(6, &[&[0, 1, 2], &[3, 4, 5]]), 1);
        assert_eq!(of(6, &[&[0, 1, 2, 3], &[4, 5]]), 4);
        assert_eq!(of(3, &[&[0, 1, 2]]), 3);
    }

    #[test]
    fn distances_hold_both_ways() {
        let config = NumaConfig { distances: vec![(0, 1, 21), (2, 1, 40)], ..NumaConfig::even(3) };
        let nodes = nodes(&config, 1, &RAM, 4096).unwrap();
        let rows: Vec<_> = nodes.iter().map(|node| node.distances.clone()).collect();
        assert_eq!(rows, [[10, 21, 20], [21, 10, 40], [20, 40, 10]]);
    }

    #[test]
    fn nonsense_is_refused_with_what_is_wrong() {
        let speed = NodeConfig { latency_ns: Some(80), ..NodeConfig::default() };
        for (config, cpus, why) in [
            (of(vec![node(&[0], None), node(&[1], None)]), 3, "vCPU 2 is of none"),
            (of(vec![node(&[0, 1], None), node(&[1], None)]), 2, "vCPU 1 is of more than one"),
            (of(vec![node(&[0, 7], None)]), 1, "no vCPU 7; the last is 0"),
            (of(vec![node(&[], Some(5 << 30))]), 1, "more memory than the guest's 4096 MiB"),
            (of(vec![node(&[], Some(1 << 30))]), 1, "3072 MiB of the guest's memory are of none"),
            (of(vec![node(&[], Some(1 << 12)), node(&[], None)]), 1, "whole 1 MiB"),
            (of(vec![speed, node(&[], None)]), 1, "latency= is said of some"),
            (NumaConfig { distances: vec![(0, 2, 30)], ..NumaConfig::even(2) }, 1, "there are 2"),
            (NumaConfig { distances: vec![(0, 1, 10)], ..NumaConfig::even(2) }, 1, "not 10"),
            (NumaConfig { distances: vec![(0, 1, 30)], ..NumaConfig::default() }, 1, "there are 0"),
            (NumaConfig::even(65), 1, "65 are more than 64"),
        ] {
            let error = nodes(&config, cpus, &RAM, 4096).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn everything_is_of_exactly_one_node(
            count in 1usize..=64, cpus in 1u32..300, mib in 64u64..10_000, page in prop::sample::select(vec![12, 21])
        ) {
            let page = 1 << page;
            let total = (mib << 20) / page * page;
            let low = total.min(3 << 30);
            let ram: Vec<_> = [(0, low), (4 << 30, total - low)].into_iter().filter(|(_, len)| *len > 0).collect();
            let nodes = nodes(&NumaConfig::even(count), cpus, &ram, page).unwrap();
            let all: Vec<_> = nodes.iter().flat_map(|node| node.cpus.clone()).collect();
            prop_assert_eq!(all, (0..cpus).collect::<Vec<_>>(), "in order");
            let mut next = 0;
            for &(base, len) in nodes.iter().flat_map(|node| &node.memory) {
                prop_assert!(base == next || (next == 3 << 30 && base == 4 << 30));
                prop_assert!(base % page == 0 && len % page == 0);
                next = base + len;
            }
            prop_assert_eq!(next, if total > low { (4u64 << 30) + total - low } else { total });
            let most = nodes.iter().map(|node| node.cpus.len()).max().unwrap();
            let least = nodes.iter().map(|node| node.cpus.len()).min().unwrap();
            prop_assert!(most - least <= 1);
        }
    }
}
