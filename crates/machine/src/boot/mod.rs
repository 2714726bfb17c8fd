//! Kernel loading: from the bytes of a file to RAM and the registers of the first vCPU.
//!
//! Four kinds of kernels, told apart by their first bytes: [`bzimage`] (64-bit Linux), [`multiboot`] 1, ELF with a
//! PVH note ([`pvh`]) and ELF entered in 64-bit mode as Linux is ([`linux`]). Nothing here trusts the file: every
//! field is checked, and whatever is wrong with it is one sentence for the user.

mod bytes;
pub(crate) use bytes::put;
mod bzimage;
mod decompress;
mod elf;
mod entry;
pub mod layout;
mod linux;
mod multiboot;
mod pvh;
#[cfg(test)]
mod test;

use cpu::Registers;
use memory::{AccessError, GuestMemory};

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file ends too early.
    #[error("the kernel file is cut off in its {what}; copy or download it again")]
    Truncated {
        /// Which part is incomplete.
        what: &'static str,
    },
    /// Not a kernel at all.
    #[error("the file is no kernel that yado knows: expected a bzImage, an ELF or a multiboot 1 image{hint}")]
    Unknown {
        /// What it might be, or nothing.
        hint: &'static str,
    },
    /// A kernel for another machine.
    #[error("the kernel is {found}, but yado runs 64-bit x86 guests; use an amd64 kernel")]
    Architecture {
        /// What the file is.
        found: String,
    },
    /// Boot protocol before 2.12.
    #[error("the kernel speaks boot protocol {major}.{minor:02}, older than 2.12; use Linux 3.8 or later")]
    OldKernel {
        /// Major protocol version.
        major: u8,
        /// Minor protocol version.
        minor: u8,
    },
    /// The payload does not decompress.
    #[error("the kernel's {compression} payload does not decompress: {why}; copy or download it again")]
    Payload {
        /// The format.
        compression: &'static str,
        /// The decoder's reason.
        why: String,
    },
    /// An ELF file that cannot be loaded.
    #[error("the ELF file cannot be loaded: {why}")]
    Elf {
        /// Why not.
        why: &'static str,
    },
    /// A multiboot image that cannot be loaded.
    #[error("the multiboot image cannot be loaded: {why}")]
    Multiboot {
        /// Why not.
        why: &'static str,
    },
    /// The kernel does not fit.
    #[error("the kernel needs memory up to {} MiB, the guest has {} MiB; use a larger --memory", mib_up(.needed), mib_up(.memory))]
    KernelTooLarge {
        /// Guest-physical end of the kernel, in bytes.
        needed: u64,
        /// Guest RAM in bytes.
        memory: u64,
    },
    /// A kernel that wants to be where RAM is not, or where the loader is.
    #[error("the kernel wants {len} bytes at guest address {address:#x}, where it cannot be loaded")]
    NoRoom {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// The initrd does not fit.
    #[error("the initrd has {} MiB, beside the kernel there is room for {} MiB; use a larger --memory or a smaller initrd", mib_up(.len), .room >> 20)]
    InitrdTooLarge {
        /// Its size in bytes.
        len: u64,
        /// Free bytes.
        room: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes, this kernel takes {max}; shorten --cmdline")]
    CommandLine {
        /// Its length.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// RAM is too small even for the loader.
    #[error("the guest's memory is too small to load a kernel ({0}); use a larger --memory")]
    Memory(#[from] AccessError),
}

fn mib_up(bytes: &u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// A file handed to the kernel: the initrd of Linux, a module of multiboot.
#[derive(Debug, Clone, Copy)]
pub struct Module<'a> {
    /// Its name and arguments, as multiboot tells them.
    pub name: &'a str,
    /// Content.
    pub bytes: &'a [u8],
}

/// What to boot.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Content of the kernel file.
    pub kernel: &'a [u8],
    /// Its name (multiboot's command line begins with it).
    pub kernel_name: &'a str,
    /// The initrd, or the modules.
    pub modules: &'a [Module<'a>],
    /// Command line, without NUL.
    pub command_line: &'a str,
    /// Guest-physical address of the ACPI root pointer.
    pub rsdp: u64,
    /// Ranges outside RAM that the memory map shows as reserved: (base, length).
    pub reserved: &'a [(u64, u64)],
    /// Entropy for the kernel's first random numbers.
    pub seed: [u8; 32],
}

/// Guest-physical range that a kernel occupies.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    start: u64,
    end: u64,
}

/// Loads a kernel; answers the registers with which the first vCPU starts.
pub fn load(memory: &GuestMemory, request: &Request<'_>) -> Result<Registers, Error> {
    if bzimage::is_bzimage(request.kernel) {
        return bzimage::load(memory, request);
    }
    if let Some(header) = multiboot::find(request.kernel) {
        return multiboot::load(memory, request, header);
    }
    if elf::is_elf(request.kernel) {
        return load_elf(memory, request);
    }
    Err(unknown(request.kernel))
}

/// Whether the kernel is one that takes any number of modules: a multiboot image.
pub fn takes_modules(kernel: &[u8]) -> bool {
    !bzimage::is_bzimage(kernel) && multiboot::find(kernel).is_some()
}

/// Whether the kernel is Linux, as a bzImage or an ELF file: one that takes Linux's parameters.
pub fn is_linux(kernel: &[u8]) -> bool {
    // The beginning of `linux_banner` (Linux `init/version.c`).
    const BANNER: &[u8] = b"Linux version ";
    if bzimage::is_bzimage(kernel) {
        return true;
    }
    let Some(&first) = BANNER.first() else { return false };
    let begins = |(at, &byte): (usize, &u8)| {
        byte == first && kernel.get(at..).is_some_and(|rest| rest.starts_with(BANNER))
    };
    elf::is_elf(kernel) && multiboot::find(kernel).is_none() && kernel.iter().enumerate().any(begins)
}

fn load_elf(memory: &GuestMemory, request: &Request<'_>) -> Result<Registers, Error> {
    let elf = elf::Elf::parse(request.kernel)?;
    let loaded = elf.load(memory)?;
    match elf.pvh_entry() {
        Some(entry) => pvh::start(memory, request, loaded, entry),
        None if elf.is_64 => linux::start(memory, request, &[], loaded, elf.entry),
        None => Err(Error::Elf { why: "it is a 32-bit file with neither a PVH note nor a multiboot header" }),
    }
}

/// Says what a file is that is no kernel, where its first bytes give it away.
fn unknown(file: &[u8]) -> Error {
    let bytes = bytes::Bytes(file);
    if bytes.slice(56, 4) == Some(b"ARM\x64") {
        return Error::Architecture { found: "an arm64 Linux kernel".into() };
    }
    if bytes.slice(48, 5) == Some(b"RISCV") {
        return Error::Architecture { found: "a RISC-V Linux kernel".into() };
    }
    let hint = match file {
        [] => "; it is empty",
        [0x1f, 0x8b, ..] => "; it is a gzip file, unpack it first",
        [b'Q', b'F', b'I', 0xfb, ..] => "; it is a qcow2 disk image",
        [b'M', b'Z', ..] => "; it is an EFI program without a Linux setup header",
        [b'!', b'<', b'a', b'r', b'c', b'h', b'>', ..] => "; it is a Debian package",
        _ if file.len() < 1024 => "; it is too short for one",
        _ => "",
    };
    Error::Unknown { hint }
}

/// Checks that a kernel may occupy a range: RAM, and not the loader's own.
fn place(memory: &GuestMemory, address: u64, len: u64) -> Result<(), Error> {
    if address < layout::LOADER_END && len > 0 {
        return Err(Error::NoRoom { address, len });
    }
    if memory.contains(address, len) {
        return Ok(());
    }
    let needed = address.saturating_add(len);
    if needed <= memory.len() || address >= 1 << 32 {
        return Err(Error::NoRoom { address, len });
    }
    Err(Error::KernelTooLarge { needed, memory: memory.len() })
}

/// Copies into RAM; an empty copy touches nothing.
fn copy(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), Error> {
    if bytes.is_empty() { Ok(()) } else { Ok(memory.write(address, bytes)?) }
}

/// Clears RAM; an empty range touches nothing.
fn clear(memory: &GuestMemory, address: u64, len: u64) -> Result<(), Error> {
    if len == 0 { Ok(()) } else { Ok(memory.fill(address, len, 0)?) }
}

/// Copies a module as high as it may go in RAM below 2 GiB, clear of the kernel.
fn place_high(memory: &GuestMemory, kernel: Loaded, module: &[u8]) -> Result<Loaded, Error> {
    place_below(memory, kernel, module, 1 << 31)
}

fn place_below(memory: &GuestMemory, kernel: Loaded, module: &[u8], limit: u64) -> Result<Loaded, Error> {
    let len = module.len() as u64;
    let low_end = memory.regions().first().map_or(0, |region| region.base.saturating_add(region.len));
    let end = low_end.min(limit);
    let too_large = || Error::InitrdTooLarge { len, room: end.saturating_sub(kernel.end) };
    let start = end.checked_sub(len).map(|start| start & !0xfff).ok_or_else(too_large)?;
    if start < kernel.end {
        return Err(too_large());
    }
    copy(memory, start, module)?;
    Ok(Loaded { start, end: start.saturating_add(len) })
}

/// For fuzzing: loads anything into a small guest. Must return for all inputs.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Ok(memory) = GuestMemory::new(&[(0, 64 << 20)], memory::Backing::Private) else { return };
    let initrd = Module { name: "initrd", bytes: data.get(..16.min(data.len())).unwrap_or_default() };
    let request = Request {
        kernel: data,
        kernel_name: "kernel",
        modules: &[initrd],
        command_line: "console=ttyS0",
        rsdp: layout::FIRMWARE,
        reserved: &[],
        seed: [0; 32],
    };
    let _ = load(&memory, &request);
}
