//! `cargo xtask bench boot`: how long a guest takes to its init, to a finished command and to a login prompt.

use super::console::Console;
use super::memory::Usage;
use super::peer::Peer;
use super::statistics::Sample;
use super::{Scratch, page, release_yado};
use crate::{guest_files, initramfs};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const MARKER: &str = "@@init-runs@@";
const COMMAND_LINE: &str = "console=ttyS0 panic=-1";
/// Bytes of a guest's RAM.
const RAM: u64 = 512 << 20;
const LIMIT: Duration = Duration::from_secs(180);

/// What to measure, and how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Measurements of each
    #[arg(long, short = 'n', default_value_t = 5)]
    pub runs: usize,
    /// Boot this kernel to init (default: the cloud kernels of bookworm and trixie, from yado's cache)
    #[arg(long, value_name = "FILE")]
    pub kernel: Vec<PathBuf>,
    /// Only kernels to init, no Debian guests
    #[arg(long)]
    pub init_only: bool,
    /// Only this peer
    #[arg(long, value_enum)]
    pub only: Option<Only>,
    /// yado's binary (default: a release build made now)
    #[arg(long, value_name = "FILE")]
    pub yado: Option<PathBuf>,
    /// Results as JSON on standard output, the table on standard error
    #[arg(long)]
    pub json: bool,
    /// Write docs/benchmarks/boot.md
    #[arg(long)]
    pub write: bool,
}

/// One of the peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Only {
    /// yado.
    Yado,
    /// QEMU's TCG.
    Tcg,
}

type Results = BTreeMap<(usize, String), BTreeMap<Peer, Sample>>;

struct Bench<'a> {
    options: &'a Options,
    yado: PathBuf,
    results: Results,
    order: Vec<String>,
    /// What each yado at a login prompt took.
    memory: Vec<Usage>,
}

/// Measures, prints, writes.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let yado = match options.only {
        Some(Only::Tcg) => PathBuf::new(),
        _ => release_yado(options.yado.as_deref())?,
    };
    let mut bench = Bench { options, yado, results: Results::new(), order: Vec::new(), memory: Vec::new() };
    let scratch = Scratch::new("boot")?;
    let script = format!("echo {MARKER}\n");
    let initrd = scratch.write("initrd", &initramfs::busybox(&script)?.finish_gzip()?)?;
    for (name, kernel) in bench.kernels()? {
        bench.kernel_to_init(&name, &kernel, &initrd)?;
    }
    if !options.init_only {
        bench.commands()?;
        bench.login_prompts()?;
    }
    bench.report()
}

impl Bench<'_> {
    fn peers(&self) -> Vec<Peer> {
        let wanted = |peer: &Peer| match self.options.only {
            None => true,
            Some(Only::Yado) => *peer == Peer::Yado,
            Some(Only::Tcg) => *peer == Peer::Tcg,
        };
        Peer::ALL.into_iter().filter(wanted).collect()
    }

    fn kernels(&self) -> anyhow::Result<Vec<(String, PathBuf)>> {
        if !self.options.kernel.is_empty() {
            return Ok(self.options.kernel.iter().map(|path| (version(path), path.clone())).collect());
        }
        let mut kernels = Vec::new();
        for codename in ["bookworm", "trixie"] {
            let image = guest_files::image(&self.yado, &guest_files::cache(), codename)?;
            kernels.push((version(&image.kernel), image.kernel));
        }
        Ok(kernels)
    }

    fn note(&mut self, what: &str, peer: Peer, took: Duration) {
        if !self.order.iter().any(|known| known == what) {
            self.order.push(what.to_owned());
        }
        let place = self.order.iter().position(|known| known == what).unwrap_or_default();
        let samples = self.results.entry((place, what.to_owned())).or_default();
        samples.entry(peer).or_default().0.push(took.as_secs_f64());
        eprintln!("{what}, {}: {:.3} s", peer.name(), took.as_secs_f64());
    }

    fn kernel_to_init(&mut self, name: &str, kernel: &Path, initrd: &Path) -> anyhow::Result<()> {
        for _ in 0..self.options.runs {
            for peer in self.peers() {
                let (init, off) = peer.measure(|| {
                    let command = peer.direct(&self.yado, kernel, initrd, COMMAND_LINE, 1);
                    let mut console = Console::start(command)?;
                    Ok((console.wait_for(MARKER, LIMIT)?, console.wait_end(LIMIT)?))
                })?;
                self.note(&format!("{name}: start to init"), peer, init);
                self.note(&format!("{name}: start to power-off"), peer, off);
            }
        }
        Ok(())
    }

    /// `yado run debian -- true`, which has no peer.
    fn commands(&mut self) -> anyhow::Result<()> {
        if self.options.only == Some(Only::Tcg) {
            return Ok(());
        }
        guest_files::image(&self.yado, &guest_files::cache(), "trixie")?;
        for _ in 0..self.options.runs {
            let mut command = Command::new(&self.yado);
            command.args(["run", "--engine", "soft", "--quiet", "debian:trixie", "--", "true"]);
            let took = Console::start(command)?.wait_end(LIMIT)?;
            self.note("`yado run debian -- true`, cached", Peer::Yado, took);
        }
        Ok(())
    }

    fn login_prompts(&mut self) -> anyhow::Result<()> {
        let image = guest_files::image(&self.yado, &guest_files::cache(), "trixie")?;
        for _ in 0..self.options.runs {
            for peer in self.peers() {
                let (took, usage) = peer.measure(|| {
                    let mut console = Console::start(peer.debian(&self.yado, &image))?;
                    let took = console.wait_for("login: ", LIMIT)?;
                    let usage = (peer == Peer::Yado).then(|| Usage::of(console.id(), RAM)).transpose()?;
                    Ok((took, usage))
                })?;
                self.memory.extend(usage);
                self.note("Debian 13 with systemd: start to login prompt", peer, took);
            }
        }
        Ok(())
    }

    fn report(&self) -> anyhow::Result<()> {
        let mut table = table(&self.results);
        let mut memory = self.memory.clone();
        memory.sort_by_key(|usage| usage.overhead());
        if let Some(median) = memory.get(memory.len() / 2) {
            table =
                format!("{table}\nA yado whose guest is at the login prompt (median):\n\n{}", median.table());
        }
        if self.options.json {
            eprintln!("\n{table}");
            println!("{}", serde_json::to_string_pretty(&json(&self.results))?);
        } else {
            println!("\n{table}");
        }
        if self.options.write {
            let yado = (!self.yado.as_os_str().is_empty()).then_some(self.yado.as_path());
            page::write("boot", "Boot time", &explained(&table, self.options.runs), yado)?;
        }
        Ok(())
    }
}

/// The kernel's release, which a bzImage tells at the offset that its header names.
fn version(path: &Path) -> String {
    let fallback =
        path.file_name().map_or_else(|| "kernel".into(), |name| name.to_string_lossy().into_owned());
    let Ok(bytes) = std::fs::read(path) else { return fallback };
    let offset = bytes.get(0x20e..0x210).map(|two| usize::from(two[0]) | usize::from(two[1]) << 8);
    let text = offset.and_then(|offset| bytes.get(offset + 0x200..offset + 0x280));
    let release = text.and_then(|text| text.split(|byte| *byte == b' ' || *byte == 0).next());
    match release.map(String::from_utf8_lossy) {
        Some(release) if release.starts_with(|first: char| first.is_ascii_digit()) => {
            format!("Linux {release}")
        }
        _ => fallback,
    }
}

fn table(results: &Results) -> String {
    let mut text = String::from("| | yado | QEMU TCG | yado / TCG |\n|---|---|---|---|\n");
    for ((_, what), samples) in results {
        let cell = |peer| match samples.get(&peer).and_then(|s: &Sample| Some((s.median()?, s.range()?))) {
            Some((median, (low, high))) => format!("{median:.2} s ({low:.2} to {high:.2})"),
            None => "-".into(),
        };
        let median = |peer| samples.get(&peer).and_then(Sample::median);
        let ratio = match (median(Peer::Yado), median(Peer::Tcg)) {
            (Some(yado), Some(tcg)) => format!("{:.2}", yado / tcg),
            _ => "-".into(),
        };
        let _ = writeln!(text, "| {what} | {} | {} | {ratio} |", cell(Peer::Yado), cell(Peer::Tcg));
    }
    text
}

fn json(results: &Results) -> serde_json::Value {
    let rows = results.iter().map(|((_, what), samples)| {
        let peers: BTreeMap<_, _> = samples.iter().map(|(peer, sample)| (peer.name(), &sample.0)).collect();
        serde_json::json!({ "what": what, "seconds": peers })
    });
    rows.collect()
}

fn explained(table: &str, runs: usize) -> String {
    format!(
        "{table}\nMedians of {runs} (smallest to largest), yado and QEMU in turn, one vCPU, 512 MiB, times of the whole process \
         from its start. *Init*: the kernel with a busybox initramfs whose init prints a line, then powers off; the command line \
         is `{COMMAND_LINE}`. *Login prompt*: the same disk image on both, on NVMe, writes thrown away.\n\n\
         QEMU: `qemu-system-x86_64 {}`.\n",
        super::peer::QEMU_OPTIONS.join(" ")
    )
}
