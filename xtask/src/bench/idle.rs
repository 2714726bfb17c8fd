//! `cargo xtask bench idle`: what Debian guests that nobody wants anything of cost, one alone and many together.
//!
//! All begin with copy-on-write clones of one disk whose first start, which configures its packages, is over.

use super::console::Console;
use super::peer::{Peer, QEMU_OPTIONS};
use super::statistics::Sample;
use super::{Scratch, page, release_yado};
use crate::guest_files::{self, Image};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Each guest's RAM: QEMU's options have another, which counts only once.
const MEMORY: &str = "256M";
const LIMIT: Duration = Duration::from_secs(600);
/// Guests that start at a time: more would only wait for each other.
const TOGETHER: usize = 4;
/// A guest is idle once it takes less than this share of a core over [`LOOK`].
const CALM: f64 = 0.03;
const LOOK: Duration = Duration::from_secs(10);

/// What to measure, and how long.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Guests together
    #[arg(long, default_value_t = 20)]
    pub guests: usize,
    /// Measurements of each
    #[arg(long, short = 'n', default_value_t = 3)]
    pub runs: usize,
    /// How long each measurement takes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub seconds: u64,
    /// yado's binary (default: a release build made now)
    #[arg(long, value_name = "FILE")]
    pub yado: Option<PathBuf>,
    /// Write docs/benchmarks/idle.md
    #[arg(long)]
    pub write: bool,
}

/// Measures, prints, writes.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let yado = release_yado(options.yado.as_deref())?;
    let image = guest_files::image(&yado, &guest_files::cache(), "trixie")?;
    let scratch = Scratch::new("idle")?;
    let bench = Bench { options, image, base: scratch.0.join("base.raw"), scratch: &scratch, yado };
    bench.prepare()?;
    let mut rows = Vec::new();
    for (peer, guests) in [(Peer::Yado, 1), (Peer::Tcg, 1), (Peer::Yado, options.guests)] {
        let sample = bench.idle(peer, guests)?;
        rows.push((peer, guests, sample));
    }
    let table = table(&rows);
    println!("\n{table}");
    if options.write {
        page::write("idle", "Idle guests", &explained(&table, options), Some(&bench.yado))?;
    }
    Ok(())
}

struct Bench<'a> {
    options: &'a Options,
    yado: PathBuf,
    image: Image,
    /// The disk that all guests' disks are clones of.
    base: PathBuf,
    scratch: &'a Scratch,
}

impl Bench<'_> {
    /// Lets a guest configure its packages, and keeps its disk.
    fn prepare(&self) -> anyhow::Result<()> {
        eprintln!("a guest configures its packages");
        std::fs::copy(&self.image.disk, &self.base)?;
        let mut command = self.boot(&self.base, "raw");
        command.args(["--cpus", "2"]);
        let mut console = Console::start(command)?;
        console.wait_for("login: ", LIMIT)?;
        calm(&[console.id()])?;
        // yado takes it for the power button, and the guest writes what it has to write.
        let ended = Command::new("kill").arg(console.id().to_string()).status()?;
        anyhow::ensure!(ended.success(), "kill failed ({ended})");
        console.wait_end(LIMIT)?;
        Ok(())
    }

    fn boot(&self, disk: &Path, format: &str) -> Command {
        let mut command = Command::new(&self.yado);
        command.args(["run", "--engine", "soft", "--quiet", "--memory", MEMORY]);
        command.arg("--disk").arg(format!("file={},format={format},bus=nvme", disk.display()));
        command.arg("--kernel").arg(&self.image.kernel).arg("--cmdline").arg(&self.image.cmdline);
        command
    }

    fn guest(&self, peer: Peer, number: usize) -> anyhow::Result<Console> {
        let disk = self.scratch.0.join(format!("{number}.qcow2"));
        let _ = std::fs::remove_file(&disk);
        let mut clone = Command::new(&self.yado);
        clone.args(["image", "clone", "--quiet", "-f", "raw"]).arg(&self.base).arg(&disk);
        anyhow::ensure!(clone.status()?.success(), "yado image clone failed");
        let command = match peer {
            Peer::Yado => self.boot(&disk, "qcow2"),
            Peer::Tcg => {
                let mut command = Command::new("qemu-system-x86_64");
                command.args(QEMU_OPTIONS).args(["-m", MEMORY]);
                command.arg("-kernel").arg(&self.image.kernel).arg("-append").arg(&self.image.cmdline);
                command.arg("-drive").arg(format!("file={},if=none,id=disk,format=qcow2", disk.display()));
                command.args(["-device", "nvme,drive=disk,serial=1", "-device", "virtio-rng-pci"]);
                command
            }
        };
        Console::start(command)
    }

    /// Shares of a core that this many guests take together.
    fn idle(&self, peer: Peer, count: usize) -> anyhow::Result<Sample> {
        peer.measure(|| {
            let mut guests: Vec<Console> = Vec::with_capacity(count);
            while guests.len() < count {
                let first = guests.len();
                for number in first..count.min(first + TOGETHER) {
                    guests.push(self.guest(peer, number)?);
                }
                for guest in guests.iter_mut().skip(first) {
                    guest.wait_for("login: ", LIMIT)?;
                }
            }
            let processes: Vec<u32> = guests.iter().map(Console::id).collect();
            calm(&processes)?;
            let mut sample = Sample::default();
            for _ in 0..self.options.runs {
                let share = share(&processes, Duration::from_secs(self.options.seconds))?;
                eprintln!("{count} on {}: {:.2} % of a core", peer.name(), share * 100.0);
                sample.0.push(share);
            }
            Ok(sample)
        })
    }
}

/// Waits until none has anything to do.
fn calm(processes: &[u32]) -> anyhow::Result<()> {
    let began = Instant::now();
    while share(processes, LOOK)? > CALM * processes.len() as f64 {
        anyhow::ensure!(began.elapsed() < LIMIT, "the guests are still busy after {LIMIT:?}");
    }
    Ok(())
}

/// Cores that processes and their children are on, over some time.
fn share(processes: &[u32], over: Duration) -> anyhow::Result<f64> {
    let before = threads(processes);
    let began = Instant::now();
    std::thread::sleep(over);
    let took = began.elapsed();
    let after = threads(processes);
    let spent =
        after.iter().map(|(thread, time)| time.saturating_sub(before.get(thread).copied().unwrap_or(0)));
    anyhow::ensure!(!after.is_empty(), "the guests have ended");
    Ok(spent.sum::<u64>() as f64 / took.as_nanos() as f64)
}

/// Nanoseconds that each thread of the processes and of their children has been on a CPU: the first number of `schedstat`.
fn threads(processes: &[u32]) -> BTreeMap<String, u64> {
    let mut times = BTreeMap::new();
    let mut processes: Vec<String> = processes.iter().map(u32::to_string).collect();
    while let Some(process) = processes.pop() {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{process}/task")) else { continue };
        for entry in entries.flatten() {
            let read = |name| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            let time = read("schedstat").split(' ').next().and_then(|number| number.parse().ok());
            times.insert(entry.file_name().to_string_lossy().into_owned(), time.unwrap_or(0));
            processes.extend(read("children").split_whitespace().map(str::to_owned));
        }
    }
    times
}

fn table(rows: &[(Peer, usize, Sample)]) -> String {
    let mut text = String::from("| guests | on | of a core | each |\n|---|---|---|---|\n");
    for (peer, guests, sample) in rows {
        let (median, range) = (sample.median().unwrap_or(0.0), sample.range().unwrap_or_default());
        let percent = |share: f64| format!("{:.2} %", share * 100.0);
        let each = percent(median / *guests as f64);
        let (low, high) = (percent(range.0), percent(range.1));
        let _ =
            writeln!(text, "| {guests} | {} | {} ({low} to {high}) | {each} |", peer.name(), percent(median));
    }
    text
}

fn explained(table: &str, options: &Options) -> String {
    format!(
        "CPU time of all threads and child processes of Debian 13 guests with one vCPU and {MEMORY} each, at their login \
         prompts, over {} seconds; median and range of {}. All guests' disks are clones of one whose packages are \
         configured. An idle guest wakes some twelve times a second, for its kernel's own timers; how much each time \
         costs depends on what the host's CPU still has in its caches, so on a host that does nothing else each guest \
         costs more than on a busy one, or than one of many.\n\n{table}",
        options.seconds, options.runs
    )
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_time_of_threads_and_children_is_counted() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done & wait"]).spawn().unwrap();
        let busy = share(&[std::process::id()], Duration::from_millis(300));
        let _ = Command::new("pkill").args(["-P", &child.id().to_string()]).status();
        let _ = child.wait();
        assert!(busy.unwrap() > 0.05);
        assert!(share(&[u32::MAX], Duration::from_millis(1)).is_err());
    }
}
