//! `--memory` and `--numa`: how much RAM a guest has, how the host holds it, and what is near to what.

use crate::numbers;
use crate::size::Size;
use machine::{MemoryPolicy, NodeConfig, NumaConfig};
use memory::{Lock, Pages, Placement, Policy};
use std::str::FromStr;

/// `--memory`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub size: Size,
    pub policy: MemoryPolicy,
}

/// The most threads that find memory at once: more only wait for each other.
const POPULATE_MAX: usize = 64;

/// As many as the host has CPUs for.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(POPULATE_MAX)
}

fn named<T: Copy>(all: &[T], name: fn(T) -> &'static str, wanted: &str) -> Result<T, String> {
    let found = all.iter().copied().find(|&one| name(one) == wanted);
    let names: Vec<_> = all.iter().map(|&one| name(one)).collect();
    found.ok_or_else(|| format!("{wanted:?} is none of {}", names.join(", ")))
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let size = parts.next().unwrap_or_default().parse()?;
        let mut policy = MemoryPolicy::default();
        for option in parts {
            match option.split_once('=').unwrap_or((option, "")) {
                ("hugepages", name) => {
                    policy.pages =
                        named(&Pages::ALL, Pages::name, name).map_err(|why| format!("hugepages: {why}"))?;
                }
                ("prealloc", "" | "on") => policy.populate = Some(threads()),
                ("prealloc", "off") => policy.populate = None,
                ("prealloc", count) => {
                    let count = count.parse().ok().filter(|count| (1..=POPULATE_MAX).contains(count));
                    policy.populate = Some(
                        count.ok_or_else(|| format!("prealloc: on, off, or 1 to {POPULATE_MAX} threads"))?,
                    );
                }
                ("lock", "") => policy.lock = Lock::On,
                ("lock", name) => {
                    let all = [Lock::On, Lock::OnFault, Lock::Off];
                    policy.lock = named(&all, Lock::name, name).map_err(|why| format!("lock: {why}"))?;
                }
                ("mergeable", "" | "on") => policy.mergeable = true,
                ("mergeable", "off") => policy.mergeable = false,
                (other, _) => {
                    return Err(format!(
                        "{other:?} is no option of memory; there are hugepages=, prealloc, lock and mergeable"
                    ));
                }
            }
        }
        Ok(Self { size, policy })
    }
}

/// `--numa`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Numa {
    Node(NodeConfig),
    Fake(usize),
    Distance(u32, u32, u8),
}

impl FromStr for Numa {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("fake", count)) => {
                let count = count.parse().ok().filter(|count| (1..=machine::numa::NODES_MAX).contains(count));
                let most = machine::numa::NODES_MAX;
                count.map(Self::Fake).ok_or_else(|| format!("fake: how many nodes, 1 to {most}?"))
            }
            Some(("distance", triple)) => {
                let numbers: Vec<u32> = triple.split(':').filter_map(|number| number.parse().ok()).collect();
                match numbers.as_slice() {
                    &[a, b, far @ 0..=254] => Ok(Self::Distance(a, b, far as u8)),
                    _ => Err(format!("distance={triple}: write NODE:NODE:DISTANCE, as in 0:1:21")),
                }
            }
            _ => node(text).map(Self::Node),
        }
    }
}

fn node(text: &str) -> Result<NodeConfig, String> {
    let mut node = NodeConfig::default();
    let (mut host, mut policy) = (None, Policy::default());
    let number = |name: &str, value: &str| {
        let number = value.parse().ok().filter(|&number: &u32| number > 0);
        number.ok_or_else(|| format!("{name}={value}: a number above 0"))
    };
    // The word may stand for a node of which nothing is said.
    for option in text.strip_prefix("node").unwrap_or(text).split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=').unwrap_or((option, "")) {
            ("cpus", list) => node.cpus = numbers::list(list).map_err(|why| format!("cpus: {why}"))?,
            ("memory", size) => node.memory = Some(size.parse::<Size>()?.0),
            ("host", list) => {
                let list = numbers::list(list).map_err(|why| format!("host: {why}"))?;
                if list.iter().any(|&node| node >= Placement::NODES_MAX) {
                    return Err(format!("host: no host has {} nodes", Placement::NODES_MAX));
                }
                host = Some(list);
            }
            ("policy", name) => {
                policy = named(&Policy::ALL, Policy::name, name).map_err(|why| format!("policy: {why}"))?;
            }
            ("latency", value) => node.latency_ns = Some(number("latency", value)?),
            ("bandwidth", value) => node.bandwidth_mb_s = Some(number("bandwidth", value)?),
            (other, _) => {
                return Err(format!(
                    "{other:?} is no option of a node; there are cpus=, memory=, host=, policy=, latency= and bandwidth="
                ));
            }
        }
    }
    if policy == Policy::Preferred && host.as_ref().is_some_and(|nodes: &Vec<u32>| nodes.len() > 1) {
        return Err("policy=preferred takes one host node".to_owned());
    }
    if policy != Policy::default() && host.is_none() {
        return Err(format!("policy={} wants host=NODES", policy.name()));
    }
    node.placement = host.map(|nodes| Placement { policy, nodes });
    Ok(node)
}

/// All of them together.
pub fn numa(options: &[Numa]) -> Result<NumaConfig, String> {
    let mut config = NumaConfig::default();
    let mut fake = None;
    for option in options {
        match option {
            Numa::Node(node) => config.nodes.push(node.clone()),
            Numa::Fake(count) => fake = Some(*count),
            &Numa::Distance(a, b, far) => config.distances.push((a, b, far)),
        }
    }
    match fake {
        Some(_) if !config.nodes.is_empty() => {
            Err("--numa fake=N makes all nodes; describe none beside it".to_owned())
        }
        Some(count) => Ok(NumaConfig { distances: config.distances, ..NumaConfig::even(count) }),
        None => Ok(config),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn memory_is_a_size_and_how_it_is_held() {
        let memory = |text: &str| text.parse::<Memory>().unwrap();
        assert_eq!(memory("1G"), Memory { size: Size(1 << 30), policy: MemoryPolicy::default() });
        let all = memory("2G,hugepages=1G,prealloc=3,lock=onfault,mergeable");
        let policy =
            MemoryPolicy { pages: Pages::Huge1G, populate: Some(3), lock: Lock::OnFault, mergeable: true };
        assert_eq!(all.policy, policy);
        assert_eq!(memory("2G,lock,prealloc,hugepages=off").policy.lock, Lock::On);
        for (text, why) in [
            ("4X", "not a size"),
            ("1G,hugepages=4M", "none of off, thp, 2M, 1G"),
            ("1G,prealloc=0", "1 to 64 threads"),
            ("1G,lock=yes", "none of on, onfault, off"),
            ("1G,fast", "no option of memory"),
        ] {
            let said = text.parse::<Memory>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn nodes_are_described_one_by_one() {
        let node = |text: &str| match text.parse() {
            Ok(Numa::Node(node)) => node,
            other => panic!("{text}: {other:?}"),
        };
        let placement = Placement { policy: Policy::Interleave, nodes: vec![0, 1] };
        assert_eq!(
            node("cpus=0-1+4,memory=2G,host=0-1,policy=interleave,latency=90,bandwidth=25600"),
            NodeConfig {
                cpus: vec![0, 1, 4],
                memory: Some(2 << 30),
                placement: Some(placement),
                latency_ns: Some(90),
                bandwidth_mb_s: Some(25600),
            }
        );
        assert_eq!(node("node"), NodeConfig::default());
        assert_eq!(node("node,memory=1G").memory, Some(1 << 30));
        for (text, why) in [
            ("cpus=x", "no list of numbers"),
            ("latency=0", "above 0"),
            ("policy=bind,host=0,what=1", "no option of a node"),
            ("policy=interleave", "wants host="),
            ("host=0+1,policy=preferred", "one host node"),
            ("host=1024", "no host has"),
            ("fake=0", "how many"),
            ("fake=65", "1 to 64"),
            ("distance=0:1", "0:1:21"),
            ("distance=0:1:300", "0:1:21"),
        ] {
            let said = text.parse::<Numa>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn fake_nodes_stand_alone() {
        let all = |texts: &[&str]| numa(&texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>());
        let fake = all(&["fake=3", "distance=0:2:40"]).unwrap();
        assert_eq!((fake.nodes.len(), fake.distances), (3, vec![(0, 2, 40)]));
        assert!(all(&["fake=2", "node"]).unwrap_err().contains("none beside it"));
        assert_eq!(all(&[]).unwrap(), NumaConfig::default());
    }
}
