//! The images that cases work on, made when the first case asks for them, and how programs are run on them.

use super::{Options, Pair};
use anyhow::{Context, ensure};
use std::cell::Cell;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// Bytes of a numbered block.
const BLOCK: usize = 4096;
/// Bytes of noise, text or zeroes in a row.
const STRIPE: usize = 16 << 20;

/// See the module.
pub struct Files {
    pub options: Options,
    pub yado: PathBuf,
    memory: PathBuf,
    disk: PathBuf,
    turn: Cell<bool>,
}

impl Files {
    /// Makes the directories.
    pub fn new(options: &Options, yado: &Path) -> anyhow::Result<Self> {
        let name = format!("yado-bench-image-{}", std::process::id());
        let disk = options.disk.clone().unwrap_or_else(crate::target_directory);
        let this = Self {
            options: options.clone(),
            yado: yado.to_path_buf(),
            memory: options.directory.join(&name),
            disk: disk.join(&name),
            turn: Cell::new(false),
        };
        for directory in [&this.memory, &this.disk] {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        Ok(this)
    }

    /// A place in memory.
    pub fn place(&self, name: &str) -> PathBuf {
        self.memory.join(name)
    }

    /// A place on the disk.
    pub fn place_on_disk(&self, name: &str) -> PathBuf {
        self.disk.join(name)
    }

    /// Bytes of an image.
    pub fn size(&self) -> u64 {
        self.options.size << 20
    }

    fn made(&self, name: &str, make: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
        let path = self.place(name);
        if !path.exists() {
            make(&path).with_context(|| format!("cannot make {name}"))?;
        }
        Ok(path)
    }

    /// A raw image in which each block begins with its number, for cases that write nothing.
    pub fn numbered_raw(&self) -> anyhow::Result<PathBuf> {
        self.made("numbered.raw", |path| numbered(path, self.size()))
    }

    /// A raw image without holes.
    pub fn full_raw(&self) -> anyhow::Result<PathBuf> {
        self.made("full.raw", |path| numbered(path, self.size()))
    }

    /// The same as qcow2.
    pub fn full_qcow2(&self) -> anyhow::Result<PathBuf> {
        let raw = self.full_raw()?;
        self.made("full.qcow2", |path| {
            done(Command::new("qemu-img").args(["convert", "-S", "0", "-O", "qcow2"]).args([&raw, path]))
        })
    }

    /// A raw image on the disk, written, not in memory.
    pub fn on_disk(&self) -> anyhow::Result<PathBuf> {
        let path = self.place_on_disk("disk.raw");
        if !path.exists() {
            numbered(&path, self.size())?;
            File::open(&path)?.sync_all()?;
        }
        Ok(path)
    }

    /// A raw image of noise, text and zeroes.
    pub fn mixed_raw(&self) -> anyhow::Result<PathBuf> {
        self.made("mixed.raw", |path| mixed(path, self.size()))
    }

    /// The same in other ways, as qemu-img makes them.
    pub fn mixed(&self, name: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
        let raw = self.mixed_raw()?;
        self.made(name, |path| {
            let mut command = Command::new("qemu-img");
            done(command.args(["convert", "-O", "qcow2", "-W"]).args(options).args([&raw, path]))
        })
    }

    /// yado's image commands.
    pub fn yado(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.yado);
        command.arg("image").args(arguments);
        command
    }

    /// Measures both, the one that was second last time first.
    pub fn pair(
        &self,
        yado: impl FnOnce() -> anyhow::Result<f64>,
        peer: impl FnOnce() -> anyhow::Result<f64>,
    ) -> anyhow::Result<Pair> {
        let first = self.turn.replace(!self.turn.get());
        if first {
            let peer = peer()?;
            return Ok(Pair::new(yado()?, peer));
        }
        let yado = yado()?;
        Ok(Pair::new(yado, peer()?))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.memory);
        let _ = std::fs::remove_dir_all(&self.disk);
    }
}

/// Runs a program to its end; answers what it printed.
pub fn said(command: &mut Command) -> anyhow::Result<String> {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}\n{}", String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Runs a program to its end.
pub fn done(command: &mut Command) -> anyhow::Result<()> {
    said(command).map(drop)
}

/// Seconds that a program takes, from its start to its end.
pub fn timed(command: &mut Command) -> anyhow::Result<f64> {
    let began = Instant::now();
    done(command)?;
    Ok(began.elapsed().as_secs_f64())
}

fn numbered(path: &Path, size: u64) -> anyhow::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for number in 0..size / BLOCK as u64 {
        let mut block = [0x5a; BLOCK];
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block)?;
    }
    Ok(file.flush()?)
}

/// Words of texts and logs; what they are compresses about as programs' sources do.
const WORDS: [&str; 24] = [
    "the", "of", "image", "cluster", "table", "entry", "return", "error", "offset", "length", "value",
    "struct", "if", "while", "kernel", "device", "0x", "read", "write", "page", "queue", "request", "static",
    "const",
];

fn mixed(path: &Path, size: u64) -> anyhow::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut draw = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut stripe = Vec::with_capacity(STRIPE + 64);
    for number in 0..size / STRIPE as u64 {
        stripe.clear();
        while stripe.len() < STRIPE {
            match number % 4 {
                1 => {
                    let pick = draw();
                    let word = WORDS.get((pick % 24) as usize).copied().unwrap_or_default();
                    let rest = match pick >> 60 {
                        0..3 => format!("{:x} ", pick as u16),
                        3 => format!("{};\n\t", pick as u8),
                        _ => " ".to_owned(),
                    };
                    stripe.extend_from_slice(word.as_bytes());
                    stripe.extend_from_slice(rest.as_bytes());
                }
                3 => stripe.resize(STRIPE, 0),
                _ => stripe.extend_from_slice(&draw().to_le_bytes()),
            }
        }
        stripe.truncate(STRIPE);
        file.write_all(&stripe)?;
    }
    Ok(file.flush()?)
}
