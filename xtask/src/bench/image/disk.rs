//! A real disk, past the page cache: `yado image bench` beside fio on the same file; and what decides how yado asks the
//! disk: fio's threads, each waiting for one request, beside fio's io_uring.

use super::files::{Files, said};
use super::{Case, Pair, rate};
use anyhow::Context;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const PEER: &str = "fio, io_uring";
/// How long fio measures; yado gets as many requests as fio did.
const TIME: Duration = Duration::from_secs(1);

pub const CASES: &[Case] = &[
    rate("O_DIRECT reads, depth 32", PEER, 0.95, |files| beside_fio(files, 32, false)),
    rate("O_DIRECT reads, depth 1", PEER, 0.95, |files| beside_fio(files, 1, false)),
    rate("O_DIRECT writes, depth 32", PEER, 0.95, |files| beside_fio(files, 32, true)),
    rate("O_DIRECT reads by fio itself, 8 threads", PEER, 0.95, |files| threads(files, 8)),
    rate("O_DIRECT reads by fio itself, 32 threads", PEER, 0.95, |files| threads(files, 32)),
];

/// How fio asks the disk.
#[derive(Debug, Clone, Copy)]
enum How {
    /// One thread with a ring.
    Ring(usize),
    /// So many threads that wait.
    Threads(usize),
}

fn fio(file: &Path, how: How, writes: bool) -> anyhow::Result<f64> {
    let mut command = Command::new("fio");
    match how {
        How::Ring(depth) => command.args(["--ioengine=io_uring", &format!("--iodepth={depth}")]),
        How::Threads(count) => {
            command.args(["--ioengine=psync", "--thread", "--group_reporting", &format!("--numjobs={count}")])
        }
    };
    command.args(["--name=x", "--direct=1", "--bs=4k", "--output-format=json"]);
    command.args(["--time_based", "--norandommap", &format!("--runtime={}", TIME.as_secs())]);
    command.arg(format!("--rw={}", if writes { "randwrite" } else { "randread" }));
    command.arg(format!("--filename={}", file.display()));
    let report: serde_json::Value = serde_json::from_str(&said(&mut command)?).context("what fio says")?;
    let place = if writes { "/jobs/0/write/iops" } else { "/jobs/0/read/iops" };
    report.pointer(place).and_then(serde_json::Value::as_f64).context("fio has measured nothing")
}

fn threads(files: &Files, count: usize) -> anyhow::Result<Pair> {
    let file = files.on_disk()?;
    files.pair(|| fio(&file, How::Threads(count), false), || fio(&file, How::Ring(count), false))
}

fn beside_fio(files: &Files, depth: usize, writes: bool) -> anyhow::Result<Pair> {
    let file = files.on_disk()?;
    // fio tells how many requests fill the time.
    let before = fio(&file, How::Ring(depth), writes)?;
    let count = (before * TIME.as_secs_f64()) as u64 + 1;
    let mut command = files.yado(&["bench", "-f", "raw", "-t", "none", "-s", "4096"]);
    command.args(["-c", &count.to_string(), "-d", &depth.to_string()]);
    // An odd number of blocks far away: as good as a random place.
    command.args(["-S", &(((333 << 20) + 4096) as u64).to_string()]);
    if writes {
        command.arg("-w");
    }
    let text = said(command.arg(&file))?;
    let took = super::requests::seconds(&text).with_context(|| format!("no time in {text:?}"))?;
    let after = fio(&file, How::Ring(depth), writes)?;
    Ok(Pair::new(count as f64 / took, (before + after) / 2.0))
}
