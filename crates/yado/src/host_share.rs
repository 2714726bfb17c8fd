//! What a guest's process takes of the host: `--pin`, `--priority`, `--limit` and `--cgroup`; and who clears its control groups away.
//!
//! A process cannot remove the group that it is in, and one that was killed removes nothing. So a guest with groups has a *keeper*:
//! this program once more, outside the groups, which does nothing until the guest's process is gone, however it went, and then removes
//! them. Should the keeper be killed too, the guest's record names its groups, and whoever comes by next removes them.

use crate::numbers;
use crate::registry::Place;
use crate::size::Size;
use anyhow::Context;
use resources::{Groups, IoLimits, Limits, Priority, Scheduling, cgroup};
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

/// How long the keeper waits for groups to be empty: the memory of a large guest takes its time to go.
const KEEPER_TIME: Duration = Duration::from_secs(60);
/// How the keeper is called.
pub const KEEPER: &str = "cgroup-keeper";

/// Whose threads an option is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    All,
    Vcpus,
    Others,
    These(Vec<u32>),
}

impl FromStr for Who {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "vcpus" => Ok(Self::Vcpus),
            "others" => Ok(Self::Others),
            list => numbers::list(list)
                .map(Self::These)
                .map_err(|_| format!("{text:?}: all, vcpus, others, or numbers of vCPUs such as 0-3")),
        }
    }
}

/// `--pin`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    who: Who,
    cpus: Vec<u32>,
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (who, cpus) = text.split_once('=').ok_or("write WHO=CPUS, as in 0=2 or vcpus=4-7")?;
        Ok(Self { who: who.parse()?, cpus: numbers::list(cpus)? })
    }
}

/// `--priority`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urgency {
    who: Who,
    priority: Priority,
}

impl FromStr for Urgency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (who, priority) = text.split_once('=').unwrap_or(("all", text));
        let who = who.parse()?;
        if matches!(who, Who::These(_)) {
            return Err(format!("{text}: all vCPUs have one priority; write vcpus=PRIORITY"));
        }
        Ok(Self { who, priority: priority.parse()? })
    }
}

/// All pins and priorities together.
pub fn scheduling(pins: &[Pin], urgencies: &[Urgency]) -> Scheduling {
    let mut all = Scheduling::default();
    for Pin { who, cpus } in pins {
        match who {
            Who::All => (all.vcpus.cpus, all.others.cpus) = (cpus.clone(), cpus.clone()),
            Who::Vcpus => all.vcpus.cpus.clone_from(cpus),
            Who::Others => all.others.cpus.clone_from(cpus),
            Who::These(vcpus) => all.pinned.extend(vcpus.iter().map(|&vcpu| (vcpu, cpus.clone()))),
        }
    }
    for &Urgency { ref who, priority } in urgencies {
        let priority = Some(priority);
        match who {
            Who::Vcpus => all.vcpus.priority = priority,
            Who::Others => all.others.priority = priority,
            _ => (all.vcpus.priority, all.others.priority) = (priority, priority),
        }
    }
    all
}

/// `--limit`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limit(Limits);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut limits = Limits::default();
        for option in text.split(',') {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let size =
                || value.parse::<Size>().map(|size| Some(size.0)).map_err(|why| format!("{name}: {why}"));
            let number = |most: u64| {
                let number = value.parse().ok().filter(|number| (1..=most).contains(number));
                number.map(Some).ok_or_else(|| format!("{option}: a number from 1 to {most}"))
            };
            match name {
                "cpu" => limits.cpu_thousandths = Some(cpus(value)?),
                "cpu-weight" => limits.cpu_weight = number(10_000)?,
                "memory" => limits.memory_bytes = size()?,
                "io-read" => limits.io.read_bytes = size()?,
                "io-write" => limits.io.write_bytes = size()?,
                "io-reads" => limits.io.reads = number(u32::MAX.into())?,
                "io-writes" => limits.io.writes = number(u32::MAX.into())?,
                _ => {
                    return Err(format!(
                        "{name:?} is no limit; there are cpu=, cpu-weight=, memory=, io-read=, io-write=, io-reads= and io-writes="
                    ));
                }
            }
        }
        Ok(Self(limits))
    }
}

/// `1.5` or `150%`, in thousandths of a CPU.
fn cpus(text: &str) -> Result<u64, String> {
    let wrong = || format!("cpu={text}: so many CPUs, as in 1.5 or 150%");
    let (number, of_one) = match text.strip_suffix('%') {
        Some(percent) => (percent, 10),
        None => (text, 1000),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 3 || !fraction.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let thousandths: u64 = format!("{fraction:0<3}").parse().map_err(|_| wrong())?;
    let all = whole.checked_mul(of_one).ok_or_else(wrong)? + thousandths * of_one / 1000;
    if (1..=1_000_000_000).contains(&all) { Ok(all) } else { Err(wrong()) }
}

/// All limits together; the last word counts.
pub fn limits(options: &[Limit]) -> Limits {
    let mut all = Limits::default();
    for Limit(limit) in options {
        let IoLimits { read_bytes, write_bytes, reads, writes } = limit.io;
        let io = &mut all.io;
        for (to, from) in [
            (&mut all.cpu_thousandths, limit.cpu_thousandths),
            (&mut all.cpu_weight, limit.cpu_weight),
            (&mut all.memory_bytes, limit.memory_bytes),
            (&mut io.read_bytes, read_bytes),
            (&mut io.write_bytes, write_bytes),
            (&mut io.reads, reads),
            (&mut io.writes, writes),
        ] {
            *to = from.or(*to);
        }
    }
    all
}

/// The groups of a running guest's process. While this lives, the keeper waits.
#[derive(Debug, Default)]
pub struct Share {
    /// What it is in.
    pub groups: Groups,
    _keeper: Option<ChildStdin>,
}

impl Share {
    /// Puts this process into groups of its own, if anything is limited or a parent is named.
    pub fn take(place: &Place, limits: &Limits, parent: Option<&Path>) -> anyhow::Result<Self> {
        let nothing = Limits { files: Vec::new(), ..limits.clone() } == Limits::default();
        if nothing && parent.is_none() {
            return Ok(Self::default());
        }
        let (keeper_id, mut keeper) = keeper()?;
        // The process that started this one in the background waits until the guest runs.
        let parent_id = crate::run::is_background().then(rustix::process::getppid).flatten();
        let parent_id = parent_id.and_then(|id| u32::try_from(id.as_raw_nonzero().get()).ok());
        let companions: Vec<u32> = [keeper_id].into_iter().chain(parent_id).collect();
        // The keeper knows of each group before there is one.
        let told = |directory: &Path| {
            let mut line = directory.as_os_str().as_encoded_bytes().to_vec();
            line.push(b'\n');
            keeper.write_all(&line)
        };
        let groups = Groups::enter(&place.name, limits, parent, &companions, told)?;
        if let Some(mut record) = place.record()? {
            record.cgroups.clone_from(&groups.directories);
            place.set_record(&record)?;
        }
        Ok(Self { groups, _keeper: Some(keeper) })
    }
}

/// Starts the keeper; when the input that this answers is closed, by whatever end of this process, it begins.
fn keeper() -> anyhow::Result<(u32, ChildStdin)> {
    let program = std::env::current_exe().context("cannot find yado's own program file")?;
    let child = Command::new(program)
        .arg(KEEPER)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C is for the guest.
        .process_group(0)
        .spawn()
        .context("cannot start the keeper of control groups")?;
    let id = child.id();
    Ok((id, child.stdin.context("the keeper of control groups has no input")?))
}

/// The keeper's own life.
pub fn keep() -> anyhow::Result<()> {
    let input = std::io::stdin().lock();
    let directories: Vec<PathBuf> = input.lines().map_while(Result::ok).map(PathBuf::from).collect();
    anyhow::ensure!(
        cgroup::remove(&directories, KEEPER_TIME),
        "some control groups are left of {directories:?}"
    );
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn pins_and_priorities_add_up() {
        let pins: Vec<Pin> =
            ["vcpus=4-7", "others=0", "1=5", "2-3=6+7"].iter().map(|text| text.parse().unwrap()).collect();
        let urgencies: Vec<Urgency> =
            ["nice:5", "vcpus=fifo:2"].iter().map(|text| text.parse().unwrap()).collect();
        let all = scheduling(&pins, &urgencies);
        assert_eq!((all.vcpus.cpus, all.others.cpus), (vec![4, 5, 6, 7], vec![0]));
        assert_eq!(all.pinned, BTreeMap::from([(1, vec![5]), (2, vec![6, 7]), (3, vec![6, 7])]));
        assert_eq!(all.vcpus.priority, Some(Priority::Fifo(2)));
        assert_eq!(all.others.priority, Some(Priority::Nice(5)));
        assert!("4".parse::<Pin>().unwrap_err().contains("WHO=CPUS"));
        assert!("io=4".parse::<Pin>().unwrap_err().contains("others"));
        assert!("0=fifo:1".parse::<Urgency>().unwrap_err().contains("vcpus=PRIORITY"));
        assert!("vcpus=soon".parse::<Urgency>().unwrap_err().contains("no priority"));
    }

    #[test]
    fn limits_are_read_and_the_last_word_counts() {
        let all = ["cpu=150%,memory=2G", "cpu=0.5,cpu-weight=200", "io-read=10M,io-writes=7"];
        let all = limits(&all.map(|text| text.parse().unwrap()));
        assert_eq!(
            (all.cpu_thousandths, all.cpu_weight, all.memory_bytes),
            (Some(500), Some(200), Some(2 << 30))
        );
        assert_eq!((all.io.read_bytes, all.io.writes, all.io.reads), (Some(10 << 20), Some(7), None));
        for (text, thousandths) in [("2", 2000), ("12.5%", 125), ("0.001", 1), ("1.25", 1250)] {
            assert_eq!(cpus(text), Ok(thousandths), "{text}");
        }
        for text in ["", "0", "-1", "1.2345", "x", "1.+5", "99999999999999999999"] {
            assert!(cpus(text).is_err(), "{text}");
        }
        assert!("cpu-weight=0".parse::<Limit>().unwrap_err().contains("1 to 10000"));
        assert!("disk=1".parse::<Limit>().unwrap_err().contains("no limit"));
    }
}
