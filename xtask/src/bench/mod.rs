//! `cargo xtask bench AREA`: yado and its peers in turn in one run, so that a busy moment of the host hits all alike.

pub mod boot;
pub mod console;
pub mod cpu;
pub mod engine;
pub mod idle;
pub mod image;
pub mod memory;
pub mod nbd;
pub mod page;
pub mod peer;
pub mod statistics;
pub mod switch;

use crate::target_directory;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub enum Area {
    /// From start to init, to a finished command, and to a login prompt
    Boot(boot::Options),
    /// Programs inside a guest against the same programs on the bare host
    Cpu(cpu::Options),
    /// The switch beside OVS-DPDK, driven by DPDK's testpmd
    Switch(switch::Options),
    /// The NBD server beside qemu-nbd
    Nbd(nbd::Options),
    /// The block layer and `yado image` beside qemu-img and fio, a guest's disk beside QEMU's
    Image(image::Options),
    /// How soon guests run, and what exits, kicks and interrupts cost, on each engine of this host
    Engine(engine::Options),
    /// What guests cost that have nothing to do
    Idle(idle::Options),
}

/// Measures, prints, and writes the page if asked.
pub fn run(area: &Area) -> anyhow::Result<()> {
    match area {
        Area::Boot(options) => boot::run(options),
        Area::Cpu(options) => cpu::run(options),
        Area::Switch(options) => switch::run(options),
        Area::Image(options) => image::run(options),
        Area::Engine(options) => engine::run(options),
        Area::Idle(options) => idle::run(options),
        Area::Nbd(options) => nbd::run(options),
    }
}

/// yado's release binary, built now unless one is given.
pub fn release_yado(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(given) = given {
        anyhow::ensure!(given.is_file(), "{}: there is no such file", given.display());
        return Ok(given.to_path_buf());
    }
    build(&["build", "--quiet", "--release", "--package", "yado"])?;
    Ok(target_directory().join("release/yado"))
}

/// The workloads, linked statically so that they run as the only file of a guest.
pub fn workloads() -> anyhow::Result<PathBuf> {
    let line = ["rustc", "--quiet", "--release", "--package", "xtask", "--bin", "workloads", "--"];
    build(
        &[line.as_slice(), &["-C", "target-feature=+crt-static", "-C", "relocation-model=static"]].concat(),
    )?;
    Ok(target_directory().join("release/workloads"))
}

fn build(arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("cargo").args(arguments).current_dir(crate::tidy::root()).status()?;
    anyhow::ensure!(status.success(), "cargo {} failed ({status})", arguments.join(" "));
    Ok(())
}

/// A file that lives as long as the measurement.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new directory below the system's temporary one.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("yado-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Writes a file and answers its path.
    pub fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::write(&path, content)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
