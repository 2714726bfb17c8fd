//! How the same guest is started on yado and on QEMU.

use std::path::Path;
use std::process::Command;

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// yado's software engine.
    Yado,
    /// QEMU's TCG.
    Tcg,
}

/// QEMU's options of every measurement.
pub const QEMU_OPTIONS: &[&str] = &[
    "-machine",
    "q35",
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max",
    "-m",
    "512M",
    "-nographic",
    "-nodefaults",
    "-serial",
    "stdio",
    "-no-reboot",
    "-nic",
    "none",
];
/// yado's options of every measurement.
pub const YADO_OPTIONS: &[&str] = &["--engine", "soft", "--memory", "512M", "--quiet"];

impl Peer {
    /// Both, in the order in which they take turns.
    pub const ALL: [Self; 2] = [Self::Yado, Self::Tcg];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Yado => "yado",
            Self::Tcg => "QEMU TCG",
        }
    }

    /// A kernel with an initial RAM disk, and all of the CPU's features that the peer can give.
    pub fn direct(
        self,
        yado: &Path,
        kernel: &Path,
        initrd: &Path,
        command_line: &str,
        cpus: usize,
    ) -> Command {
        let mut command = match self {
            Self::Yado => {
                let mut command = Command::new(yado);
                command.arg("run").args(YADO_OPTIONS).arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
                command.args(["--cpu", "host", "--cpus", &cpus.to_string()]).arg("--cmdline");
                command
            }
            Self::Tcg => {
                let mut command = qemu();
                command.args(["-smp", &cpus.to_string()]);
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).arg("-append");
                command
            }
        };
        command.arg(command_line);
        command
    }

    /// A Debian guest with its console on standard output; the disk stays as it is.
    pub fn debian(self, yado: &Path, image: &crate::guest_files::Image) -> Command {
        match self {
            Self::Yado => {
                let mut command = Command::new(yado);
                command.arg("run").args(YADO_OPTIONS).arg(format!("debian:{}", image.codename));
                command
            }
            Self::Tcg => {
                let mut command = qemu();
                let drive = format!("file={},if=none,id=disk,format=raw,snapshot=on", image.disk.display());
                command.arg("-kernel").arg(&image.kernel).arg("-append").arg(&image.cmdline);
                command.args([
                    "-drive",
                    &drive,
                    "-device",
                    "nvme,drive=disk,serial=1",
                    "-device",
                    "virtio-rng-pci",
                ]);
                command
            }
        }
    }
}

/// How often a guest that QEMU loses is started anew.
const RETRIES: usize = 6;

impl Peer {
    /// Measures; where QEMU's guest panics, again. (QEMU 7.2 now and then corrupts EFLAGS when an interrupt comes after
    /// CMPXCHG16B, and the guest's kernel panics early: that is no measurement.) yado gets no second chance.
    pub fn measure<T>(self, mut once: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let retries = if self == Self::Tcg { RETRIES } else { 0 };
        for _ in 0..retries {
            match once() {
                Err(error) if error.to_string().contains("Kernel panic") => {
                    eprintln!("{}: the guest's kernel panicked; once more", self.name());
                }
                other => return other,
            }
        }
        once()
    }
}

fn qemu() -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(QEMU_OPTIONS);
    command
}
