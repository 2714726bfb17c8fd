//! `cargo xtask bench image`: the block layer and `yado image` beside qemu-img and fio, and a guest's disk beside QEMU's.
//!
//! Each case is a pair of numbers measured one right after the other, several rounds of all cases; the table has the median
//! of the pairs' ratios. Images are in memory (`--directory`), but for those of the real disk (`--disk`).

mod copy;
mod disk;
mod files;
mod guest;
mod metadata;
mod requests;

use super::statistics::Sample;
use super::{page, release_yado};
use files::Files;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

/// What to measure, and how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Rounds; each has every case once
    #[arg(long, short = 'n', default_value_t = 5)]
    pub rounds: usize,
    /// Only cases whose name has this in it; repeatable
    #[arg(long, value_name = "TEXT")]
    pub case: Vec<String>,
    /// Say which cases there are
    #[arg(long)]
    pub list: bool,
    /// Requests of each measurement that counts them
    #[arg(long, default_value_t = 300_000)]
    pub requests: u64,
    /// MiB of the images
    #[arg(long, default_value_t = 1024)]
    pub size: u64,
    /// Where images in memory are
    #[arg(long, value_name = "DIRECTORY", default_value = "/dev/shm")]
    pub directory: PathBuf,
    /// A directory on a real disk (default: that of the build)
    #[arg(long, value_name = "DIRECTORY")]
    pub disk: Option<PathBuf>,
    /// The guest's kernel (default: the cloud kernel of trixie, from yado's cache)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The guest's module virtio_blk (default: that of its image in yado's cache)
    #[arg(long, value_name = "FILE")]
    pub module: Option<PathBuf>,
    /// yado's binary (default: a release build made now)
    #[arg(long, value_name = "FILE")]
    pub yado: Option<PathBuf>,
    /// Write docs/benchmarks/image.md
    #[arg(long)]
    pub write: bool,
}

/// What a case's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Requests a second: more is better.
    Rate,
    /// Seconds: less is better.
    Seconds,
}

/// What issue and peers ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wanted {
    /// So many times better than the peer, at least.
    Times(f64),
    /// Seconds at most.
    AtMost(f64),
}

/// A row of the table.
struct Case {
    name: &'static str,
    /// What yado is compared with.
    peer: &'static str,
    unit: Unit,
    wanted: Wanted,
    /// Rounds that suffice where each takes long.
    rounds_max: usize,
    measure: fn(&Files) -> anyhow::Result<Pair>,
}

/// yado's number and the peer's, and something worth a note.
#[derive(Debug, Clone, Default)]
struct Pair {
    yado: f64,
    peer: f64,
    note: String,
}

impl Pair {
    fn new(yado: f64, peer: f64) -> Self {
        Self { yado, peer, note: String::new() }
    }
}

const fn rate(
    name: &'static str,
    peer: &'static str,
    times: f64,
    measure: fn(&Files) -> anyhow::Result<Pair>,
) -> Case {
    Case { name, peer, unit: Unit::Rate, wanted: Wanted::Times(times), rounds_max: usize::MAX, measure }
}

const fn seconds(
    name: &'static str,
    peer: &'static str,
    wanted: Wanted,
    measure: fn(&Files) -> anyhow::Result<Pair>,
) -> Case {
    Case { name, peer, unit: Unit::Seconds, wanted, rounds_max: usize::MAX, measure }
}

/// What was measured of a case.
#[derive(Default)]
struct Measured {
    yado: Sample,
    peer: Sample,
    ratios: Sample,
    note: String,
    /// Why it cannot be measured here.
    failed: Option<String>,
}

fn cases() -> Vec<&'static Case> {
    [requests::CASES, copy::CASES, metadata::CASES, disk::CASES, guest::CASES].into_iter().flatten().collect()
}

/// Measures, prints, writes.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let wanted = |case: &&Case| {
        options.case.is_empty() || options.case.iter().any(|text| case.name.contains(text.as_str()))
    };
    let cases: Vec<&Case> = cases().into_iter().filter(wanted).collect();
    anyhow::ensure!(!cases.is_empty(), "there is no such case: see --list");
    if options.list {
        cases.iter().for_each(|case| println!("{} (beside {})", case.name, case.peer));
        return Ok(());
    }
    let yado = release_yado(options.yado.as_deref())?;
    let files = Files::new(options, &yado)?;
    let mut rows: Vec<Measured> = cases.iter().map(|_| Measured::default()).collect();
    let began = Instant::now();
    for round in 0..options.rounds {
        for (case, row) in cases.iter().zip(&mut rows).filter(|(case, _)| round < case.rounds_max) {
            if row.failed.is_some() {
                continue;
            }
            let pair = match (case.measure)(&files) {
                Ok(pair) => pair,
                Err(error) => {
                    eprintln!("{}: not measured: {error:#}", case.name);
                    row.failed = Some(format!("{:#}", error.root_cause()));
                    continue;
                }
            };
            let better = ratio(case.unit, &pair);
            eprintln!(
                "round {} of {}, {}: {} and {} ({better:.2}x) {}",
                round + 1,
                options.rounds,
                case.name,
                shown(case.unit, pair.yado),
                shown(case.unit, pair.peer),
                pair.note
            );
            row.yado.0.push(pair.yado);
            row.peer.0.push(pair.peer);
            row.ratios.0.push(better);
            row.note = pair.note;
        }
    }
    eprintln!("measured in {:.0} s", began.elapsed().as_secs_f64());
    let text = table(&cases, &rows);
    println!("{text}");
    if options.write {
        page::write("image", "Disk images", &format!("{text}\n{}", notes(options)), Some(&yado))?;
    }
    Ok(())
}

/// How many times better yado is.
fn ratio(unit: Unit, pair: &Pair) -> f64 {
    match unit {
        Unit::Rate => pair.yado / pair.peer,
        Unit::Seconds => pair.peer / pair.yado,
    }
}

fn shown(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Rate => format!("{:.1} k/s", value / 1e3),
        Unit::Seconds if value < 0.1 => format!("{:.1} ms", value * 1e3),
        Unit::Seconds => format!("{value:.2} s"),
    }
}

fn table(cases: &[&Case], rows: &[Measured]) -> String {
    let mut text =
        String::from("| | yado | beside | | ratio (range) | wanted | |\n|---|---|---|---|---|---|---|\n");
    for (case, row) in cases.iter().zip(rows) {
        if let Some(why) = &row.failed {
            let why = why.lines().next().unwrap_or_default();
            let _ = writeln!(text, "| {} | not measured: {why} | {} | | | | |", case.name, case.peer);
            continue;
        }
        let medians = row.yado.median().zip(row.peer.median()).zip(row.ratios.median());
        let Some(((yado, peer), better)) = medians else { continue };
        let (low, high) = row.ratios.range().unwrap_or_default();
        let (wanted, met) = match case.wanted {
            Wanted::Times(times) => (format!("{times:.2}x"), better >= times),
            Wanted::AtMost(limit) => (format!("at most {}", shown(Unit::Seconds, limit)), yado <= limit),
        };
        let note = if row.note.is_empty() { String::new() } else { format!(" ({})", row.note) };
        let _ = writeln!(
            text,
            "| {}{note} | {} | {} | {} | **{better:.2}x** ({low:.2}-{high:.2}) | {wanted} | {} |",
            case.name,
            shown(case.unit, yado),
            case.peer,
            shown(case.unit, peer),
            if met { "yes" } else { "no" }
        );
    }
    text
}

fn notes(options: &Options) -> String {
    format!(
        "Medians of {} rounds (of the guest, which boots anew each time, fewer); in each round yado and its peer run one right after \
         the other, in changing order. The ratio is that of a round's pair, 2x is twice as good.\n\n\
         Images of {} MiB in memory (tmpfs). Requests: 4 KiB, 64 at a time, {} of them, in a row or \
         each 7 MiB and 4 KiB behind the last, around and around; `yado image bench` beside `qemu-img bench -t none -i native`, the \
         fastest way here, each on one CPU unless two are said. Copies: stripes of 16 MiB of noise, text, noise, zeroes. \
         qemu-img compresses with `-W -m 16`. The disk: a file past the page cache (`-t none`) beside fio with io_uring on the same \
         file, 32 at a time. The guest: one vCPU, O_DIRECT, io_uring in the guest (`xtask/src/bin/workloads/disk.rs`), every block's \
         content checked; QEMU with TCG, virtio-blk in an I/O thread, `aio=io_uring,cache=none`.\n",
        options.rounds, options.size, options.requests
    )
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn more_requests_and_less_time_are_better() {
        assert_eq!(ratio(Unit::Rate, &Pair::new(6.0, 2.0)), 3.0);
        assert_eq!(ratio(Unit::Seconds, &Pair::new(2.0, 6.0)), 3.0);
    }

    #[test]
    fn names_differ_and_what_is_missed_is_said() {
        let cases = cases();
        let names: std::collections::BTreeSet<_> = cases.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), cases.len());
        let case = rate("reads", "a peer", 2.0, |_| Ok(Pair::default()));
        let row = |better: f64| Measured {
            yado: Sample(vec![1e3 * better]),
            peer: Sample(vec![1e3]),
            ratios: Sample(vec![better]),
            note: "a note".into(),
            failed: None,
        };
        let said = |better| table(&[&case], &[row(better)]);
        assert!(said(2.5).contains(
            "| reads (a note) | 2.5 k/s | a peer | 1.0 k/s | **2.50x** (2.50-2.50) | 2.00x | yes |"
        ));
        assert!(said(1.5).contains("| no |"));
        let failed = Measured { failed: Some("no such program\nmore".into()), ..row(1.0) };
        assert!(table(&[&case], &[failed]).contains("| reads | not measured: no such program | a peer |"));
    }
}
