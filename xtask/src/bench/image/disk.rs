//! A real disk, past the page cache: `yado image bench` beside fio on the same file.

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
];

fn fio(file: &Path, depth: usize, writes: bool) -> anyhow::Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=x", "--ioengine=io_uring", "--direct=1", "--bs=4k", "--output-format=json"]);
    command.args(["--time_based", "--norandommap", &format!("--runtime={}", TIME.as_secs())]);
    command.arg(format!("--rw={}", if writes { "randwrite" } else { "randread" }));
    command.arg(format!("--iodepth={depth}")).arg(format!("--filename={}", file.display()));
    let report: serde_json::Value = serde_json::from_str(&said(&mut command)?).context("what fio says")?;
    let place = if writes { "/jobs/0/write/iops" } else { "/jobs/0/read/iops" };
    report.pointer(place).and_then(serde_json::Value::as_f64).context("fio has measured nothing")
}

fn beside_fio(files: &Files, depth: usize, writes: bool) -> anyhow::Result<Pair> {
    let file = files.on_disk()?;
    // fio tells how many requests fill the time.
    let before = fio(&file, depth, writes)?;
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
    let after = fio(&file, depth, writes)?;
    Ok(Pair::new(count as f64 / took, (before + after) / 2.0))
}
