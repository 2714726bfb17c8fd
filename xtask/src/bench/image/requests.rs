//! The block layer alone: `yado image bench` beside `qemu-img bench`.

use super::files::{Files, done, said};
use super::{Case, Pair, Unit, Wanted, rate};
use anyhow::Context;
use std::path::Path;
use std::process::Command;

const PEER: &str = "qemu-img bench";
/// From one request to the next, in a row.
const ROW: u64 = 4096;
/// From one request to the next, all over the disk: 7 MiB and 4 KiB.
const STEP: u64 = (7 << 20) + 4096;
const CLUSTER: u64 = 65536;
/// Images of a long chain.
const CHAIN: usize = 100;

pub const CASES: &[Case] = &[
    rate("raw reads in a row", PEER, 2.2, |files| beside_qemu(files, &files.full_raw()?, "raw", false, ROW)),
    rate("raw writes in a row", PEER, 2.2, |files| beside_qemu(files, &files.full_raw()?, "raw", true, ROW)),
    rate("qcow2 reads in a row", PEER, 2.0, |files| {
        beside_qemu(files, &files.full_qcow2()?, "qcow2", false, ROW)
    }),
    rate("qcow2 writes in a row", PEER, 2.0, |files| {
        beside_qemu(files, &files.full_qcow2()?, "qcow2", true, ROW)
    }),
    rate("raw reads all over", PEER, 2.2, |files| beside_qemu(files, &files.full_raw()?, "raw", false, STEP)),
    rate("raw writes all over", PEER, 2.2, |files| beside_qemu(files, &files.full_raw()?, "raw", true, STEP)),
    rate("qcow2 reads all over", PEER, 2.0, |files| {
        beside_qemu(files, &files.full_qcow2()?, "qcow2", false, STEP)
    }),
    rate("qcow2 writes all over", PEER, 2.0, |files| {
        beside_qemu(files, &files.full_qcow2()?, "qcow2", true, STEP)
    }),
    rate("raw reads, two cores", "one core", 1.8, |files| two_cores(files, &files.full_raw()?, "raw")),
    rate("qcow2 reads, two cores", "one core", 1.8, |files| two_cores(files, &files.full_qcow2()?, "qcow2")),
    rate("qcow2 writes, two cores", "raw, two cores", 0.85, |files| {
        // The kernel lets one write to a file at a time: that is the limit of both.
        let (raw, qcow2) = (files.full_raw()?, files.full_qcow2()?);
        let load =
            |file, format| Load { file, format, writes: true, count: files.options.requests, step: STEP };
        files.pair(|| yado(files, "0,1", &load(&qcow2, "qcow2")), || yado(files, "0,1", &load(&raw, "raw")))
    }),
    rate("writes that allocate 64 KiB in a fresh qcow2", PEER, 7.0, |files| allocating(files, None)),
    rate("writes that copy 64 KiB of a backing file", PEER, 2.5, |files| {
        allocating(files, Some(&files.full_qcow2()?))
    }),
    Case {
        name: "reads through a chain of 100",
        peer: "a chain of one",
        unit: Unit::Rate,
        wanted: Wanted::Times(1.0 / 1.5),
        rounds_max: usize::MAX,
        measure: chains,
    },
];

/// Requests a second; `cpus` as taskset(1) takes them.
fn measured(program: &Path, before: &[&str], cpus: &str, load: &Load<'_>) -> anyhow::Result<f64> {
    let mut command = Command::new("taskset");
    command.args(["-c", cpus]).arg(program).args(before).args(["bench", "-f", load.format]);
    command.args(["-c", &load.count.to_string(), "-d", "64", "-s", "4096", "-S", &load.step.to_string()]);
    if before.is_empty() {
        command.args(["-t", "none", "-i", "native"]);
    }
    if load.writes {
        command.arg("-w");
    }
    let text = said(command.arg(load.file))?;
    Ok(load.count as f64 / seconds(&text).with_context(|| format!("no time in {text:?}"))?)
}

/// What both programs say at their end.
pub fn seconds(text: &str) -> Option<f64> {
    let (_, rest) = text.split_once("Run completed in ")?;
    rest.split(' ').next()?.parse().ok()
}

struct Load<'a> {
    file: &'a Path,
    format: &'a str,
    writes: bool,
    count: u64,
    step: u64,
}

fn yado(files: &Files, cpus: &str, load: &Load<'_>) -> anyhow::Result<f64> {
    measured(&files.yado, &["image"], cpus, load)
}

fn qemu(load: &Load<'_>) -> anyhow::Result<f64> {
    measured(Path::new("qemu-img"), &[], "1", load)
}

fn beside_qemu(files: &Files, file: &Path, format: &str, writes: bool, step: u64) -> anyhow::Result<Pair> {
    let load = Load { file, format, writes, count: files.options.requests, step };
    files.pair(|| yado(files, "1", &load), || qemu(&load))
}

fn two_cores(files: &Files, file: &Path, format: &str) -> anyhow::Result<Pair> {
    let load = Load { file, format, writes: false, count: files.options.requests, step: STEP };
    files.pair(|| yado(files, "0,1", &load), || yado(files, "1", &load))
}

fn create(file: &Path, size: u64, backing: Option<&Path>) -> anyhow::Result<()> {
    let _ = std::fs::remove_file(file);
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command.args(["-F", "qcow2", "-b"]).arg(backing);
    }
    done(command.arg(file).arg(size.to_string()))
}

fn allocating(files: &Files, backing: Option<&Path>) -> anyhow::Result<Pair> {
    let file = files.place("fresh.qcow2");
    let load =
        Load { file: &file, format: "qcow2", writes: true, count: files.size() / CLUSTER, step: CLUSTER };
    let fresh = || create(&file, files.size(), backing);
    let pair =
        files.pair(|| fresh().and_then(|()| yado(files, "1", &load)), || fresh().and_then(|()| qemu(&load)));
    let _ = std::fs::remove_file(&file);
    pair
}

/// All data in the last image of the chain, so that each read looks through all of it.
fn chains(files: &Files) -> anyhow::Result<Pair> {
    let mut below = files.full_qcow2()?;
    let mut tops = Vec::new();
    for number in 1..=CHAIN {
        let file = files.place(&format!("chain-{number}.qcow2"));
        if !file.exists() {
            create(&file, files.size(), Some(&below))?;
        }
        below = file.clone();
        tops.push(file);
    }
    let (Some(one), Some(all)) = (tops.first(), tops.last()) else { return Ok(Pair::default()) };
    let load =
        |file| Load { file, format: "qcow2", writes: false, count: files.options.requests, step: STEP };
    files.pair(|| yado(files, "1", &load(all)), || yado(files, "1", &load(one)))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn times_are_found() {
        assert_eq!(seconds("Sending 5 requests\nRun completed in 0.250 seconds.\n"), Some(0.25));
        assert_eq!(seconds("no"), None);
    }
}
