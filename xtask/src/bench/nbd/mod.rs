//! `cargo xtask bench nbd`: `yado image serve` beside qemu-nbd (and nbdkit, where it is installed), on Unix sockets, images
//! in memory.

mod client;

use super::statistics::Sample;
use super::{page, release_yado};
use crate::setup;
use anyhow::{Context, ensure};
use client::{BLOCK, Client, Load};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What to measure, and how often.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Rounds; the servers take turns in each
    #[arg(long, short = 'n', default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// MiB of each image
    #[arg(long, default_value_t = 1024)]
    pub size: u64,
    /// Where the images are
    #[arg(long, value_name = "DIRECTORY", default_value = "/dev/shm")]
    pub directory: PathBuf,
    /// Only servers whose name has this in it; repeatable
    #[arg(long, value_name = "TEXT")]
    pub only: Vec<String>,
    /// Only measurements whose name has this in it; repeatable
    #[arg(long, value_name = "TEXT")]
    pub case: Vec<String>,
    /// yado's binary (default: a release build made now)
    #[arg(long, value_name = "FILE")]
    pub yado: Option<PathBuf>,
    /// Through fio's engine nbd, and so libnbd, too
    #[arg(long)]
    pub fio: bool,
    /// Write docs/benchmarks/nbd.md
    #[arg(long)]
    pub write: bool,
}

/// A row of the table.
struct Case {
    name: &'static str,
    load: Load,
    connections: usize,
}

const fn case(name: &'static str, writes: bool, bytes: usize, depth: usize, connections: usize) -> Case {
    Case { name, load: Load { writes, bytes, depth }, connections }
}

const CASES: &[Case] = &[
    case("4 KiB reads, depth 1", false, 4096, 1, 1),
    case("4 KiB reads, depth 32", false, 4096, 32, 1),
    case("4 KiB reads, depth 32, two connections", false, 4096, 32, 2),
    case("4 KiB writes, depth 32", true, 4096, 32, 1),
    case("1 MiB reads, depth 8", false, 1 << 20, 8, 1),
    case("1 MiB writes, depth 8", true, 1 << 20, 8, 1),
];

/// A server of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    YadoRaw,
    QemuRaw,
    YadoQcow2,
    QemuQcow2,
    NbdkitRaw,
}

impl Peer {
    const ALL: [Self; 5] = [Self::YadoRaw, Self::QemuRaw, Self::YadoQcow2, Self::QemuQcow2, Self::NbdkitRaw];

    fn name(self) -> &'static str {
        match self {
            Self::YadoRaw => "yado raw",
            Self::QemuRaw => "qemu-nbd raw",
            Self::YadoQcow2 => "yado qcow2",
            Self::QemuQcow2 => "qemu-nbd qcow2",
            Self::NbdkitRaw => "nbdkit file",
        }
    }

    fn command(self, files: &Files, yado: &Path) -> Command {
        let (file, format) = match self {
            Self::YadoQcow2 | Self::QemuQcow2 => (&files.qcow2, "qcow2"),
            _ => (&files.raw, "raw"),
        };
        let mut command = Command::new(match self {
            Self::YadoRaw | Self::YadoQcow2 => yado,
            Self::QemuRaw | Self::QemuQcow2 => Path::new("qemu-nbd"),
            Self::NbdkitRaw => Path::new("nbdkit"),
        });
        match self {
            Self::YadoRaw | Self::YadoQcow2 => command
                .args(["image", "serve", "--quiet", "-f", format, "--socket"])
                .arg(&files.socket)
                .arg(file),
            Self::QemuRaw | Self::QemuQcow2 => {
                command.args(["-t", "-e", "8", "-f", format, "-k"]).arg(&files.socket).arg(file)
            }
            Self::NbdkitRaw => command.args(["-f", "-U"]).arg(&files.socket).arg("file").arg(file),
        };
        command
    }
}

struct Files {
    raw: PathBuf,
    qcow2: PathBuf,
    socket: PathBuf,
    directory: PathBuf,
}

impl Files {
    fn make(options: &Options) -> anyhow::Result<Self> {
        let directory = options.directory.join(format!("yado-bench-nbd-{}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        let place = |name: &str| directory.join(name);
        let this = Self { raw: place("raw"), qcow2: place("qcow2"), socket: place("socket"), directory };
        let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(&this.raw)?);
        for number in 0..options.size << 20 >> 12 {
            let mut block = [0x5a; BLOCK];
            block[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all(&block)?;
        }
        file.flush()?;
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&this.raw).arg(&this.qcow2);
        ensure!(convert.status()?.success(), "qemu-img convert failed");
        Ok(this)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A running server.
struct Server(Child);

impl Server {
    fn start(peer: Peer, files: &Files, yado: &Path) -> anyhow::Result<Self> {
        let _ = std::fs::remove_file(&files.socket);
        let mut command = peer.command(files, yado);
        let child =
            command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {}", peer.name()))?;
        let server = Self(child);
        let until = Instant::now() + Duration::from_secs(10);
        while Client::connect(&files.socket, 0).is_err() {
            ensure!(Instant::now() < until, "{} does not serve", peer.name());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// Seconds of CPU that all threads have used.
    fn cpu(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
        let numbers: Vec<f64> = fields.into_iter().flatten().filter_map(|word| word.parse().ok()).collect();
        // User and system time are the 14th and 15th fields; the state after the name is no number.
        let ticks = numbers.get(10).zip(numbers.get(11)).map(|(user, system)| user + system);
        Ok(ticks.context("no times in /proc")? / 100.0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// Requests a second, and microseconds of the server's CPU for each.
type Cell = (Sample, Sample);

/// Measures, prints, writes.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let yado = release_yado(options.yado.as_deref())?;
    let files = Files::make(options)?;
    let known = |peer: &Peer| {
        let wanted =
            options.only.is_empty() || options.only.iter().any(|text| peer.name().contains(text.as_str()));
        wanted && (*peer != Peer::NbdkitRaw || setup::find("nbdkit").is_some())
    };
    let peers: Vec<Peer> = Peer::ALL.into_iter().filter(known).collect();
    let mut cells: BTreeMap<(usize, Peer), Cell> = BTreeMap::new();
    let mut fio: BTreeMap<Peer, Sample> = BTreeMap::new();
    for round in 0..options.rounds {
        for peer in &peers {
            let server = Server::start(*peer, &files, &yado)?;
            let wanted = |case: &Case| {
                options.case.is_empty() || options.case.iter().any(|text| case.name.contains(text.as_str()))
            };
            for (number, case) in CASES.iter().enumerate().filter(|(_, case)| wanted(case)) {
                let (rate, cpu) = measure(&server, &files, case, options)?;
                eprintln!(
                    "round {round}: {}, {}: {:.1} k/s, {cpu:.2} us",
                    peer.name(),
                    case.name,
                    rate / 1000.0
                );
                let cell = cells.entry((number, *peer)).or_default();
                cell.0.0.push(rate);
                cell.1.0.push(cpu);
            }
            if options.fio {
                fio.entry(*peer).or_default().0.push(through_fio(&files, options)?);
            }
        }
    }
    let text = table(&peers, &cells, &fio)?;
    println!("{text}");
    if options.write {
        page::write("nbd", "The NBD server", &format!("{text}\n{}", notes(options)), Some(&yado))?;
    }
    Ok(())
}

fn measure(server: &Server, files: &Files, case: &Case, options: &Options) -> anyhow::Result<(f64, f64)> {
    let time = Duration::from_secs_f64(options.seconds);
    let clients = (0..case.connections).map(|number| Client::connect(&files.socket, number as u64 * 77 + 5));
    let clients = clients.collect::<anyhow::Result<Vec<_>>>()?;
    let before = server.cpu()?;
    let done = std::thread::scope(|scope| -> anyhow::Result<(u64, f64)> {
        let threads: Vec<_> =
            clients.into_iter().map(|mut client| scope.spawn(move || client.run(case.load, time))).collect();
        let mut sum = (0, 0.0f64);
        for thread in threads {
            let (count, took) = thread.join().map_err(|_| anyhow::anyhow!("a client has failed"))??;
            sum = (sum.0 + count, sum.1.max(took.as_secs_f64()));
        }
        Ok(sum)
    })?;
    let cpu = server.cpu()? - before;
    Ok((done.0 as f64 / done.1, cpu / done.0 as f64 * 1e6))
}

/// Random reads of 4 KiB at depth 32 through libnbd, a second.
fn through_fio(files: &Files, options: &Options) -> anyhow::Result<f64> {
    let uri = format!("--uri=nbd+unix:///?socket={}", files.socket.display());
    let time = format!("--runtime={}", options.seconds.max(1.0));
    let line = [
        "--name=x",
        "--ioengine=nbd",
        "--rw=randread",
        "--bs=4k",
        "--iodepth=32",
        "--time_based",
        "--output-format=json",
    ];
    let output = Command::new("fio").args(line).args([&uri, &time]).output().context("fio")?;
    // The engine prints notes before the report.
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text.find('{').and_then(|at| text.get(at..)).context("fio has said nothing")?;
    let report: serde_json::Value = serde_json::from_str(report).context("what fio says")?;
    report
        .pointer("/jobs/0/read/iops")
        .and_then(serde_json::Value::as_f64)
        .context("fio has measured nothing")
}

fn table(
    peers: &[Peer],
    cells: &BTreeMap<(usize, Peer), Cell>,
    fio: &BTreeMap<Peer, Sample>,
) -> anyhow::Result<String> {
    let mut text = String::from("| |");
    for peer in peers {
        write!(text, " {} |", peer.name())?;
    }
    text.push_str("\n|---|");
    peers.iter().for_each(|_| text.push_str("---|"));
    let rate_of = |number: usize, peer: Peer| cells.get(&(number, peer)).and_then(|cell| cell.0.median());
    let measured = |number: usize| cells.keys().any(|(other, _)| *other == number);
    for (number, case) in CASES.iter().enumerate().filter(|(number, _)| measured(*number)) {
        write!(text, "\n| {} |", case.name)?;
        for peer in peers {
            let Some((rates, cpu)) = cells.get(&(number, *peer)) else { continue };
            let (rate, (low, high)) = rates.median().zip(rates.range()).context("nothing was measured")?;
            let ratio = rate_of(number, Peer::QemuRaw)
                .map_or(String::new(), |qemu| format!(", **{:.1}x**", rate / qemu));
            write!(
                text,
                " {:.1} k/s ({:.1}-{:.1}){ratio}, {:.2} us |",
                rate / 1e3,
                low / 1e3,
                high / 1e3,
                cpu.median().unwrap_or_default()
            )?;
        }
    }
    if !fio.is_empty() {
        text.push_str("\n| 4 KiB reads, depth 32, fio |");
        let qemu = fio.get(&Peer::QemuRaw).and_then(Sample::median);
        for peer in peers {
            let rate = fio.get(peer).and_then(Sample::median).context("fio has measured nothing")?;
            let ratio = qemu.map_or(String::new(), |qemu| format!(", **{:.1}x**", rate / qemu));
            write!(text, " {:.1} k/s{ratio} |", rate / 1e3)?;
        }
    }
    text.push('\n');
    Ok(text)
}

fn notes(options: &Options) -> String {
    format!(
        "Requests a second: median of {} rounds (smallest to largest), the ratio to qemu-nbd with the raw image, and \
         microseconds of the server's CPU (all threads, user and system) for each request. The servers take turns; an image \
         of {} MiB in memory, random places, one Unix socket. The client is `xtask/src/bench/nbd/client.rs`: simple replies, all \
         that may be sent in one call, all that has come taken in one call, the content of every block checked. fio goes \
         through libnbd, which costs more than the server.\n",
        options.rounds, options.size
    )
}
