//! The files a machine boots from: opened once, read at every start of the guest.
//!
//! They stay open, so that a guest restarts even when somebody has deleted them since. Their content is not kept:
//! it would cost as much memory as the guest's kernel and initrd together.

use crate::boot::{self, Module, Request};
use crate::config::MachineConfig;
use crate::machine::Error;
use crate::{board, functions};
use cpu::Registers;
use memory::GuestMemory;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// One of the files.
#[derive(Debug)]
struct Source {
    what: &'static str,
    path: PathBuf,
    content: Content,
    /// The guest's memory in bytes: what is larger cannot be loaded, and some files never end.
    size_max: u64,
}

#[derive(Debug)]
enum Content {
    File(File),
    /// What came through a pipe, which can be read only once.
    Kept(Vec<u8>),
}

impl Source {
    fn open(what: &'static str, path: &Path, size_max: u64) -> Result<Self, Error> {
        let open = || -> io::Result<Content> {
            let file = File::open(path)?;
            if !file.metadata()?.file_type().is_fifo() {
                return Ok(Content::File(file));
            }
            Ok(Content::Kept(read_all(&file, size_max)?))
        };
        let content = open().map_err(|source| Error::Read { what, path: path.to_owned(), source })?;
        Ok(Self { what, path: path.to_owned(), content, size_max })
    }

    fn read(&self) -> Result<Cow<'_, [u8]>, Error> {
        let mut file = match &self.content {
            Content::File(file) => file,
            Content::Kept(bytes) => return Ok(Cow::Borrowed(bytes)),
        };
        let bytes = file.seek(SeekFrom::Start(0)).and_then(|_| read_all(file, self.size_max));
        let failed = |source| Error::Read { what: self.what, path: self.path.clone(), source };
        bytes.map(Cow::Owned).map_err(failed)
    }
}

/// Reads a file of at most `size_max` bytes to its end.
fn read_all(file: &File, size_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(size_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > size_max {
        let why = format!(
            "it is larger than the guest's memory of {} MiB: use a larger --memory, if it is the right file",
            size_max >> 20
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

/// Kernel, initrd or modules, and command line of a machine.
#[derive(Debug)]
pub(crate) struct Kernel {
    kernel: Source,
    /// With their names and arguments, as a multiboot kernel is told them.
    modules: Vec<(String, Source)>,
    command_line: String,
}

impl Kernel {
    /// Opens the files that `config` names.
    pub(crate) fn open(config: &MachineConfig) -> Result<Self, Error> {
        let kernel = Source::open("kernel", &config.kernel, config.memory)?;
        let mut modules = Vec::new();
        if let Some(initrd) = &config.initrd {
            if boot::takes_modules(&kernel.read()?) {
                for module in initrd.to_string_lossy().split(',') {
                    let path = module.split_whitespace().next().unwrap_or_default();
                    modules.push((module.to_owned(), Source::open("module", path.as_ref(), config.memory)?));
                }
            } else {
                modules.push((String::new(), Source::open("initrd", initrd, config.memory)?));
            }
        }
        Ok(Self { kernel, modules, command_line: config.command_line.clone() })
    }

    /// Loads everything; answers the registers with which the first vCPU starts. `rsdp` is the address of the ACPI root
    /// pointer.
    pub(crate) fn load(&self, memory: &GuestMemory, rsdp: u64) -> Result<Registers, Error> {
        let kernel = self.kernel.read()?;
        let mut contents = Vec::with_capacity(self.modules.len());
        for (name, source) in &self.modules {
            contents.push((name, source.read()?));
        }
        let modules: Vec<_> = contents.iter().map(|(name, bytes)| Module { name, bytes }).collect();
        let mut seed = [0; 32];
        functions::fill_random(&mut seed);
        let request = Request {
            kernel: &kernel,
            kernel_name: &self.kernel.path.to_string_lossy(),
            modules: &modules,
            command_line: &self.command_line,
            rsdp,
            reserved: &board::RESERVED,
            seed,
        };
        boot::load(memory, &request).map_err(|source| Error::Boot { path: self.kernel.path.clone(), source })
    }
}
