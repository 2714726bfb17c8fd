//! `cargo xtask bench cpu`: the workloads of `src/bin/workloads` on the bare host, on yado and on QEMU's TCG.

use super::console::Console;
use super::peer::Peer;
use super::statistics::{Sample, geometric_mean};
use super::{Scratch, page, release_yado, workloads};
use crate::guest_files;
use crate::initramfs::Initramfs;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The group of workloads that want two CPUs, and its members.
const PARALLEL: &str = "parallel";
const PARALLEL_NAMES: [&str; 6] =
    ["one_thread", "two_threads", "pipe_two_cpus", "futex_two_cpus", "locked_line", "shootdown"];
const LIMIT: Duration = Duration::from_secs(900);

/// What to measure, and how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Rounds of native, yado and TCG
    #[arg(long, short = 'n', default_value_t = 3)]
    pub runs: usize,
    /// Only these workloads or groups
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Leave this peer out
    #[arg(long, value_enum)]
    pub without: Vec<Where>,
    /// The guest's kernel (default: the cloud kernel of trixie, from yado's cache)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// yado's binary (default: a release build made now)
    #[arg(long, value_name = "FILE")]
    pub yado: Option<PathBuf>,
    /// Results as JSON on standard output, the table on standard error
    #[arg(long)]
    pub json: bool,
    /// Write docs/benchmarks/cpu.md
    #[arg(long)]
    pub write: bool,
}

/// Where the workloads run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Where {
    /// The bare host.
    Native,
    /// A guest on yado.
    Yado,
    /// A guest on QEMU's TCG.
    Tcg,
}

impl Where {
    const ALL: [Self; 3] = [Self::Native, Self::Yado, Self::Tcg];

    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Yado => "yado",
            Self::Tcg => "QEMU TCG",
        }
    }
}

/// One line of the program's output.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    group: String,
    name: String,
    nanoseconds: f64,
    check: String,
}

fn parse(text: &str) -> Vec<Line> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.trim().strip_prefix("@@ ")?.split(' ');
        let (group, name) = (words.next()?.to_owned(), words.next()?.to_owned());
        let nanoseconds = words.next()?.parse().ok()?;
        Some(Line { group, name, nanoseconds, check: words.next()?.to_owned() })
    });
    lines.collect()
}

/// One workload's row.
#[derive(Debug, Clone, Default)]
struct Row {
    group: String,
    name: String,
    check: String,
    times: BTreeMap<Where, Sample>,
}

impl Row {
    fn ratio(&self, place: Where) -> Option<f64> {
        let median = |place| self.times.get(&place).and_then(Sample::median);
        Some(median(place)? / median(Where::Native)?)
    }
}

/// Measures, prints, writes.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let places: Vec<_> = Where::ALL.into_iter().filter(|place| !options.without.contains(place)).collect();
    let yado = match places.contains(&Where::Yado) || options.kernel.is_none() {
        true => release_yado(options.yado.as_deref())?,
        false => PathBuf::new(),
    };
    let kernel = match &options.kernel {
        Some(kernel) => kernel.clone(),
        None => guest_files::image(&yado, &guest_files::cache(), "trixie")?.kernel,
    };
    let program = workloads()?;
    let scratch = Scratch::new("cpu")?;
    let mut tree = Initramfs::new();
    for directory in ["dev", "proc", "tmp"] {
        tree = tree.directory(directory);
    }
    let tree = tree.device("dev/console", 5, 1).file("init", 0o755, &std::fs::read(&program)?);
    let initrd = scratch.write("initrd", &tree.finish())?;
    let mut rows: Vec<Row> = Vec::new();
    for round in 0..options.runs {
        for place in &places {
            let text = match place {
                Where::Native => native(&program, &options.only)?,
                Where::Yado => guests(Peer::Yado, &yado, &kernel, &initrd, &options.only)?,
                Where::Tcg => guests(Peer::Tcg, &yado, &kernel, &initrd, &options.only)?,
            };
            eprintln!("round {} of {}: {} done", round + 1, options.runs, place.name());
            add(&mut rows, *place, parse(&text))?;
        }
    }
    report(options, &rows, Some(&yado))
}

fn native(program: &Path, only: &[String]) -> anyhow::Result<String> {
    let output = Command::new(program).args(only).output()?;
    anyhow::ensure!(output.status.success(), "the workloads failed on the bare host ({})", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A guest with one CPU, and one with two for what wants two.
fn guests(peer: Peer, yado: &Path, kernel: &Path, initrd: &Path, only: &[String]) -> anyhow::Result<String> {
    let is_parallel = |name: &&String| *name == PARALLEL || PARALLEL_NAMES.contains(&name.as_str());
    let (parallel, single): (Vec<_>, Vec<_>) = only.iter().partition(|name| is_parallel(name));
    let mut text = String::new();
    if only.is_empty() || !single.is_empty() {
        text += &guest(peer, yado, kernel, initrd, &single, 1)?;
    }
    // With one CPU the host itself leaves these out.
    let two = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1);
    if two && (only.is_empty() || !parallel.is_empty()) {
        let all = [PARALLEL.to_owned()];
        let wanted = if parallel.is_empty() { all.iter().collect() } else { parallel };
        text += &guest(peer, yado, kernel, initrd, &wanted, 2)?;
    }
    Ok(text)
}

/// The guest's own clock measures; a test of `yado` compares that clock with the host's.
fn guest(
    peer: Peer,
    yado: &Path,
    kernel: &Path,
    initrd: &Path,
    only: &[&String],
    cpus: usize,
) -> anyhow::Result<String> {
    let mut line = "console=ttyS0 quiet panic=-1".to_owned();
    if !only.is_empty() {
        let _ = write!(
            line,
            " workloads={}",
            only.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(",")
        );
    }
    peer.measure(|| {
        let mut console = Console::start(peer.direct(yado, kernel, initrd, &line, cpus))?;
        console.wait_for("@@end", LIMIT)?;
        console.wait_end(LIMIT)?;
        Ok(String::from_utf8_lossy(&console.printed).into_owned())
    })
}

fn add(rows: &mut Vec<Row>, place: Where, lines: Vec<Line>) -> anyhow::Result<()> {
    anyhow::ensure!(!lines.is_empty(), "no results from {}", place.name());
    for line in lines {
        let at = rows.iter().position(|row| row.name == line.name).unwrap_or_else(|| {
            rows.push(Row {
                group: line.group,
                name: line.name.clone(),
                check: line.check.clone(),
                ..Row::default()
            });
            rows.len() - 1
        });
        let Some(row) = rows.get_mut(at) else { continue };
        anyhow::ensure!(
            row.check == line.check,
            "{} computed {} on {}, but {} before: the engine is wrong",
            line.name,
            line.check,
            place.name(),
            row.check
        );
        row.times.entry(place).or_default().0.push(line.nanoseconds);
    }
    Ok(())
}

fn report(options: &Options, rows: &[Row], yado: Option<&Path>) -> anyhow::Result<()> {
    let tables = format!("{}\n{}{}", group_table(rows), row_table(rows), scaling(rows));
    if options.json {
        eprintln!("\n{tables}");
        println!("{}", serde_json::to_string_pretty(&json(rows))?);
    } else {
        println!("\n{tables}");
    }
    if options.write {
        let body = format!(
            "{tables}\nSlowdown is time in the guest over time on the bare host, medians of {} rounds in turn; the range is that of \
             yado's or TCG's times over the native median. One vCPU (the group `parallel`: \
             two), 512 MiB; every workload's checksum was the same everywhere. The \
             programs are in `xtask/src/bin/workloads`.\n\nQEMU: `qemu-system-x86_64 {}`; yado: `yado run {} --cpu host`.\n",
            options.runs,
            super::peer::QEMU_OPTIONS.join(" "),
            super::peer::YADO_OPTIONS.join(" ")
        );
        page::write("cpu", "CPU: slowdown against native code", &body, yado)?;
    }
    Ok(())
}

fn group_table(rows: &[Row]) -> String {
    let mut groups: Vec<&str> = Vec::new();
    for row in rows {
        if !groups.contains(&row.group.as_str()) {
            groups.push(&row.group);
        }
    }
    let mean = |place, group: &str| {
        let rows = rows.iter().filter(|row| group.is_empty() || row.group == group);
        let ratios: Vec<f64> = rows.filter_map(|row| row.ratio(place)).collect();
        geometric_mean(&ratios).map_or_else(|| "-".into(), |mean| format!("{mean:.2}x"))
    };
    let mut text = String::from("| group (geometric mean) | yado | QEMU TCG |\n|---|---|---|\n");
    for group in groups {
        let _ = writeln!(text, "| {group} | {} | {} |", mean(Where::Yado, group), mean(Where::Tcg, group));
    }
    let _ = writeln!(text, "| **all** | {} | {} |", mean(Where::Yado, ""), mean(Where::Tcg, ""));
    text
}

/// How much more two CPUs get done than one, where that was measured.
fn scaling(rows: &[Row]) -> String {
    let of = |place| {
        let median = |name| rows.iter().find(|row| row.name == name)?.times.get(&place)?.median();
        Some(format!("{} {:.2}", Where::name(place), median("one_thread")? / median("two_threads")?))
    };
    let places: Vec<String> = Where::ALL.into_iter().filter_map(of).collect();
    if places.is_empty() {
        return String::new();
    }
    format!("\nThroughput of two CPUs over that of one: {}.\n", places.join(", "))
}

fn row_table(rows: &[Row]) -> String {
    let mut text = String::from("| workload | native | yado | QEMU TCG |\n|---|---|---|---|\n");
    for row in rows {
        let native = row.times.get(&Where::Native).and_then(Sample::median);
        let cell = |place| {
            let sample = row.times.get(&place)?;
            let (low, high) = sample.range()?;
            Some(format!("{:.2}x ({:.2} to {:.2})", row.ratio(place)?, low / native?, high / native?))
        };
        let cell = |place| cell(place).unwrap_or_else(|| "-".into());
        let time = native.map_or_else(|| "-".into(), human);
        let _ = writeln!(text, "| {} | {time} | {} | {} |", row.name, cell(Where::Yado), cell(Where::Tcg));
    }
    text
}

fn human(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 1e3 => format!("{ns:.1} ns"),
        ns if ns < 1e6 => format!("{:.1} us", ns / 1e3),
        ns => format!("{:.1} ms", ns / 1e6),
    }
}

fn json(rows: &[Row]) -> serde_json::Value {
    let rows = rows.iter().map(|row| {
        let times: BTreeMap<_, _> =
            row.times.iter().map(|(place, sample)| (place.name(), &sample.0)).collect();
        serde_json::json!({ "group": row.group, "name": row.name, "nanoseconds": times })
    });
    rows.collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn results_are_found_among_other_lines() {
        let lines = parse("[ 0.1] boot\n@@begin\r\n@@ integer loop 12.5 ff\r\n@@ broken\n@@end\n");
        let line =
            Line { group: "integer".into(), name: "loop".into(), nanoseconds: 12.5, check: "ff".into() };
        assert_eq!(lines, [line]);
    }

    #[test]
    fn a_wrong_result_is_not_measured() {
        let mut rows = Vec::new();
        add(&mut rows, Where::Native, parse("@@ integer loop 1.0 ff")).unwrap();
        assert!(add(&mut rows, Where::Yado, parse("@@ integer loop 1.0 fe")).is_err());
        add(&mut rows, Where::Tcg, parse("@@ integer loop 4.0 ff")).unwrap();
        assert_eq!(rows[0].ratio(Where::Tcg), Some(4.0));
    }
}
