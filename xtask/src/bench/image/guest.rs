//! A guest's disk: random reads through virtio-blk in the same guest on yado's software engine and on QEMU's TCG.

use super::files::Files;
use super::{Case, Pair, Unit, Wanted};
use crate::bench::console::Console;
use crate::bench::peer::Peer;
use crate::bench::{Scratch, workloads};
use crate::guest_files;
use crate::initramfs::Initramfs;
use anyhow::Context;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

const fn reads(name: &'static str, measure: fn(&Files) -> anyhow::Result<Pair>) -> Case {
    Case { name, peer: "QEMU TCG", unit: Unit::Rate, wanted: Wanted::Times(3.0), rounds_max: 3, measure }
}

pub const CASES: &[Case] = &[
    reads("guest's random reads, depth 32", |files| measured(files, "random_reads_32")),
    reads("guest's random reads, depth 1", |files| measured(files, "random_reads_1")),
];

/// Kernel and initial RAM disk.
struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    _scratch: Scratch,
}

impl Guest {
    fn new(files: &Files) -> anyhow::Result<Self> {
        let options = &files.options;
        let image = match (&options.kernel, &options.module) {
            (Some(_), Some(_)) => None,
            _ => Some(guest_files::image(&files.yado, &guest_files::cache(), "trixie")?),
        };
        let kernel = options.kernel.clone().or_else(|| Some(image.as_ref()?.kernel.clone()));
        let kernel = kernel.context("no kernel")?;
        let module = match &options.module {
            Some(module) => std::fs::read(module)?,
            None => module_of(&image.context("no image")?.disk, &kernel)?,
        };
        let program = std::fs::read(workloads()?)?;
        let mut tree = Initramfs::new();
        for directory in ["dev", "proc", "tmp"] {
            tree = tree.directory(directory);
        }
        let tree = tree.device("dev/console", 5, 1).file("init", 0o755, &program);
        let scratch = Scratch::new("image-guest")?;
        let initrd = scratch.write("initrd", &tree.file("virtio_blk.ko", 0o644, &module).finish())?;
        Ok(Self { kernel, initrd, _scratch: scratch })
    }
}

/// The module virtio_blk out of a guest's file system.
fn module_of(disk: &Path, kernel: &Path) -> anyhow::Result<Vec<u8>> {
    let release = guest_files::release(kernel).context("the kernel does not say its release")?;
    let debugfs = crate::setup::find("debugfs").context("debugfs is missing: `cargo xtask setup`")?;
    for name in ["virtio_blk.ko.xz", "virtio_blk.ko"] {
        let cat = format!("cat /usr/lib/modules/{release}/kernel/drivers/block/{name}");
        let output = Command::new(&debugfs).args(["-R", &cat]).arg(disk).output()?;
        if output.status.success() && !output.stdout.is_empty() {
            return Ok(output.stdout);
        }
    }
    anyhow::bail!("{} has no module virtio_blk of {release}", disk.display())
}

/// Nanoseconds of one read are what the program in the guest says.
fn rate(files: &Files, guest: &Guest, peer: Peer, name: &str) -> anyhow::Result<f64> {
    let disk = files.numbered_raw()?;
    let line = format!("console=ttyS0 quiet panic=-1 workloads={name}");
    let mut command = peer.direct(&files.yado, &guest.kernel, &guest.initrd, &line, 1);
    match peer {
        Peer::Yado => command.arg("--disk").arg(format!("{},format=raw,readonly,bus=virtio", disk.display())),
        Peer::Tcg => {
            let drive = format!(
                "file={},if=none,id=disk,format=raw,readonly=on,cache=none,aio=io_uring",
                disk.display()
            );
            command.args(["-object", "iothread,id=io", "-drive", &drive]);
            command.args(["-device", "virtio-blk-pci,drive=disk,iothread=io"])
        }
    };
    let mut console = Console::start(command)?;
    console.wait_for("@@end", LIMIT)?;
    let text = String::from_utf8_lossy(&console.printed).into_owned();
    let begin = format!("@@ disk {name} ");
    let said = text.lines().find_map(|line| line.trim().strip_prefix(&begin)?.split_once(' '));
    let (nanoseconds, wrong) = said.with_context(|| format!("nothing was measured: {}", console.tail()))?;
    anyhow::ensure!(wrong == "0", "{}: blocks with the content of others", peer.name());
    console.wait_end(LIMIT)?;
    Ok(1e9 / nanoseconds.parse::<f64>()?)
}

fn measured(files: &Files, name: &str) -> anyhow::Result<Pair> {
    let guest = Guest::new(files)?;
    files.pair(
        || Peer::Yado.measure(|| rate(files, &guest, Peer::Yado, name)),
        || Peer::Tcg.measure(|| rate(files, &guest, Peer::Tcg, name)),
    )
}
