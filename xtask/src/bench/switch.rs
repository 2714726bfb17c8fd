//! The switch between two vhost-user ports beside OVS-DPDK, driven by DPDK's testpmd as two virtio-user cards: frames go round and round
//! in both directions, one CPU for the switch, the other for testpmd.
//!
//! OVS-DPDK wants 2 MiB pages (`nr_hugepages`) and root; where it does not run, the page says so. yado and testpmd want neither.

use super::statistics::Sample;
use super::{Scratch, page};
use crate::setup::OVS_DPDK;
use crate::target_directory;
use anyhow::{Context, ensure};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Options of `cargo xtask bench switch`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Pairs of runs
    #[arg(short = 'n', long, default_value_t = 5)]
    runs: usize,
    /// Seconds of each run
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Write docs/benchmarks/switch.md
    #[arg(long)]
    write: bool,
}

/// Lengths of frames with their checksum, as testpmd's users say them.
const SIZES: [u32; 2] = [64, 1500];
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const HUGE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const HUGE_PAGES: u64 = 640;

/// A process that ends with the measurement.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

fn wait_for(path: &Path) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    while !path.exists() {
        ensure!(Instant::now() < until, "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// yado's switch, stopped or not; its ports' sockets.
fn start_yado(place: &Path) -> anyhow::Result<(Running, [PathBuf; 2])> {
    let program = target_directory().join("release/examples/switch");
    let mut command = Command::new("taskset");
    command.args(["-c", "0"]).arg(program).arg(place).arg("2");
    let running = Running(quiet(&mut command).spawn().context("cannot start the switch")?);
    let sockets = ["p0.sock", "p1.sock"].map(|name| place.join(name));
    sockets.iter().try_for_each(|socket| wait_for(socket))?;
    Ok((running, sockets))
}

/// OVS-DPDK as its documentation sets it up: a bridge with two vhost-user ports, which connect to testpmd's sockets.
fn start_ovs(place: &Path) -> anyhow::Result<(Running, Running, [PathBuf; 2])> {
    ensure!(
        Path::new(OVS_DPDK).exists(),
        "Open vSwitch with DPDK is not installed: `cargo xtask setup --bench`"
    );
    std::fs::write(HUGE, HUGE_PAGES.to_string()).context("no large pages: are you root?")?;
    let got: u64 = std::fs::read_to_string(HUGE)?.trim().parse()?;
    ensure!(got >= HUGE_PAGES, "the host has only {got} large pages");
    let database = place.join("conf.db");
    let done = quiet(Command::new("ovsdb-tool").arg("create").arg(&database).arg(SCHEMA)).status()?;
    ensure!(done.success(), "ovsdb-tool failed");
    let socket = place.join("db.sock");
    let with = |program: &str| {
        let mut command = Command::new(program);
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"] {
            command.env(variable, place);
        }
        command
    };
    let remote = format!("--remote=punix:{}", socket.display());
    let server = Running(quiet(with("ovsdb-server").arg(&database).arg(remote)).spawn()?);
    wait_for(&socket)?;
    let control = |words: &[&str]| -> anyhow::Result<()> {
        let mut command = with("ovs-vsctl");
        command.arg(format!("--db=unix:{}", socket.display())).arg("--timeout=30").args(words);
        ensure!(quiet(&mut command).status()?.success(), "ovs-vsctl {} failed", words.join(" "));
        Ok(())
    };
    control(&["--no-wait", "init"])?;
    let config = ["dpdk-init=true", "dpdk-socket-mem=512", "pmd-cpu-mask=0x1", "dpdk-lcore-mask=0x2"];
    for option in config {
        control(&["--no-wait", "set", "Open_vSwitch", ".", &format!("other_config:{option}")])?;
    }
    let address = format!("unix:{}", socket.display());
    let daemon = Running(quiet(with(OVS_DPDK).arg(address)).spawn()?);
    control(&["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"])?;
    let sockets = ["v0.sock", "v1.sock"].map(|name| place.join(name));
    for (name, socket) in ["v0", "v1"].iter().zip(&sockets) {
        let path = format!("options:vhost-server-path={}", socket.display());
        let set = ["--", "set", "Interface", name, "type=dpdkvhostuserclient", &path];
        control(&[["add-port", "br0", name].as_slice(), set.as_slice()].concat())?;
    }
    Ok((server, daemon, sockets))
}

/// Millions of frames each second through a switch, by testpmd's own counts.
fn measure(sockets: &[PathBuf; 2], serve: bool, size: u32, seconds: u64) -> anyhow::Result<f64> {
    let mut command = Command::new("timeout");
    command.args([
        "60",
        "taskset",
        "-c",
        "1",
        "dpdk-testpmd",
        "--lcores",
        "0@1,1@1",
        "--no-huge",
        "-m",
        "1024",
    ]);
    command.args([
        "--no-pci",
        "--file-prefix",
        &format!("yado{}", std::process::id()),
        "--single-file-segments",
    ]);
    for (number, socket) in sockets.iter().enumerate() {
        let server = if serve { ",server=1" } else { "" };
        let card = format!(
            "net_virtio_user{number},mac=02:00:00:00:00:0{},path={},queues=1,in_order=1,mrg_rxbuf=1,queue_size=1024{server}",
            number + 1,
            socket.display()
        );
        command.args(["--vdev", &card]);
    }
    command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384", "--no-mlockall"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child =
        command.spawn().context("cannot run dpdk-testpmd: `cargo xtask setup --bench` installs it")?;
    let mut input = child.stdin.take().context("testpmd has no input")?;
    let say = std::thread::spawn(move || -> std::io::Result<()> {
        std::thread::sleep(Duration::from_secs(3));
        writeln!(input, "set txpkts {}", size - 4)?;
        writeln!(input, "set eth-peer 0 02:00:00:00:00:02\nset eth-peer 1 02:00:00:00:00:01")?;
        writeln!(input, "set fwd io\nstart tx_first 16")?;
        std::thread::sleep(Duration::from_secs(1));
        writeln!(input, "show port stats all")?;
        std::thread::sleep(Duration::from_secs(seconds));
        writeln!(input, "show port stats all\nstop\nquit")
    });
    let output = child.wait_with_output()?;
    say.join().map_err(|_| anyhow::anyhow!("nobody spoke to testpmd"))??;
    let text = String::from_utf8_lossy(&output.stdout);
    let rates = text.lines().filter_map(|line| line.trim().strip_prefix("Rx-pps:"));
    let rates: Vec<f64> = rates.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect();
    let [.., first, second] = rates.as_slice() else { anyhow::bail!("testpmd says no rates:\n{text}") };
    Ok((first + second) / 1e6)
}

/// A rate. On a busy host testpmd may begin so late that it has nothing to tell: then it runs again.
fn measured(mut once: impl FnMut() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    for _ in 0..3 {
        let rate = once()?;
        if rate > 0.0 {
            return Ok(rate);
        }
    }
    anyhow::bail!("no frame came through in three runs")
}

fn row(samples: &[Sample], name: &str) -> String {
    let mut row = format!("| {name} |");
    for sample in samples {
        let (low, high) = sample.range().unwrap_or_default();
        let _ = write!(row, " {:.2} ({low:.2}-{high:.2}) |", sample.median().unwrap_or_default());
    }
    row
}

/// Measures, prints, and writes the page if asked.
pub fn run(options: &Options) -> anyhow::Result<()> {
    super::build(&[
        "build",
        "--quiet",
        "--release",
        "--package",
        "net",
        "--example",
        "switch",
        "--example",
        "forward",
    ])?;
    let forward = Command::new(target_directory().join("release/examples/forward")).output()?;
    let forward = String::from_utf8_lossy(&forward.stdout).into_owned();
    print!("{forward}");
    let scratch = Scratch::new("switch")?;
    let place = scratch.write("config", b"")?.parent().context("a place")?.to_path_buf();
    let before = std::fs::read_to_string(HUGE).unwrap_or_default();
    let mut yado = vec![Sample::default(); SIZES.len()];
    let mut ovs = yado.clone();
    let mut why = String::new();
    for run in 0..options.runs {
        for (column, size) in SIZES.into_iter().enumerate() {
            // Never both at once: OVS polls, and takes its CPU whether frames come or not.
            if why.is_empty() {
                let rate = measured(|| {
                    let ovs = start_ovs(&fresh(&place, "ovs")?)?;
                    measure(&ovs.2, true, size, options.seconds)
                });
                match rate {
                    Ok(rate) => ovs[column].0.push(rate),
                    Err(error) => why = error.to_string(),
                }
            }
            yado[column].0.push(measured(|| {
                let (_running, sockets) = start_yado(&fresh(&place, "yado")?)?;
                measure(&sockets, false, size, options.seconds)
            })?);
            let last = |samples: &[Sample]| samples[column].0.last().copied().unwrap_or_default();
            println!(
                "run {run}, {size} bytes: yado {:.2}, OVS-DPDK {:.2} M frames/s",
                last(&yado),
                last(&ovs)
            );
        }
    }
    if let Ok(mut file) = File::create(HUGE) {
        let _ = file.write_all(before.as_bytes());
    }
    let mut body = "Two vhost-user ports, frames in both directions, one CPU for the switch and one for testpmd (two virtio-user cards, \
                    `--no-huge`); millions of frames each second, median and range. Learning table, VLANs, guards and counters are on.\n\n\
                    | switch | 64 bytes | 1500 bytes |\n|---|---|---|\n"
        .to_owned();
    let _ = writeln!(body, "{}", row(&yado, "yado"));
    if why.is_empty() {
        let _ = writeln!(body, "{}", row(&ovs, "OVS-DPDK, NORMAL"));
        let ratios = yado.iter().zip(&ovs).map(|(yado, ovs)| {
            let pairs = yado.0.iter().zip(&ovs.0).map(|(yado, ovs)| yado / ovs);
            Sample(pairs.collect())
        });
        let _ = writeln!(body, "{}", row(&ratios.collect::<Vec<_>>(), "ratio of pairs"));
    } else {
        let _ = writeln!(body, "\nOVS-DPDK did not run here: {why}.");
    }
    let _ = write!(
        body,
        "\nThe forwarding core alone, in one thread with its drivers, only its own turns timed:\n\n```\n{forward}```\n"
    );
    println!("\n{body}");
    if options.write {
        page::write("switch", "Benchmarks of the switch", &body, None)?;
    }
    Ok(())
}

/// An empty directory.
fn fresh(place: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = place.join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path)?;
    Ok(path)
}
