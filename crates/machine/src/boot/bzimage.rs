//! bzImage: a setup header, and a payload that is a compressed ELF kernel (Linux `boot.rst`, protocol 2.12).
//!
//! The payload is decompressed here and entered at its `startup_64`, so the guest never runs its own decompressor
//! (a quarter of a boot). A payload in a format that yado cannot decompress is left to the kernel: the protected-mode
//! part is entered at its 64-bit entry, 0x200 behind its start.

use super::bytes::Bytes;
use super::decompress::{Compression, decompress};
use super::elf::Elf;
use super::{Error, Loaded, Request, linux};
use cpu::Registers;
use memory::GuestMemory;

/// 64-bit kernel with the entry point at 0x200 (`xloadflags`).
const XLF_KERNEL_64: u16 = 1;
/// The oldest protocol with `xloadflags`.
const PROTOCOL_MIN: u16 = 0x20c;

/// What the setup header says.
#[derive(Debug)]
struct Image<'a> {
    header: &'a [u8],
    /// Everything after the real-mode part.
    kernel: &'a [u8],
    payload: &'a [u8],
    pref_address: u64,
    init_size: u64,
}

/// Whether the file has a Linux setup header.
pub(super) fn is_bzimage(file: &[u8]) -> bool {
    Bytes(file).slice(0x202, 4) == Some(b"HdrS")
}

fn parse(file: &[u8]) -> Result<Image<'_>, Error> {
    let bytes = Bytes(file);
    let cut = || Error::Truncated { what: "setup header" };
    let version = bytes.u16(0x206).ok_or_else(cut)?;
    if version < PROTOCOL_MIN {
        return Err(Error::OldKernel { major: (version >> 8) as u8, minor: version as u8 });
    }
    if bytes.u16(0x236).ok_or_else(cut)? & XLF_KERNEL_64 == 0 {
        return Err(Error::Architecture { found: "a 32-bit Linux kernel".into() });
    }
    // The header ends where the jump at 0x200 goes.
    let end = 0x202u64.wrapping_add(bytes.u8(0x201).ok_or_else(cut)?.into());
    let len = end.saturating_sub(linux::SETUP_HEADER as u64);
    let header = bytes.slice(linux::SETUP_HEADER as u64, len).ok_or_else(cut)?;
    let sectors = match bytes.u8(0x1f1).ok_or_else(cut)? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let kernel_at = sectors.wrapping_add(1).wrapping_mul(512);
    let truncated = || Error::Truncated { what: "kernel image" };
    let size = u64::from(bytes.u32(0x1f4).ok_or_else(cut)?).wrapping_mul(16);
    // The size is given in paragraphs of 16 bytes, and a file may end within its last one.
    let there = (file.len() as u64).saturating_sub(kernel_at);
    let size = if size.saturating_sub(there) < 16 { size.min(there) } else { size };
    let kernel = bytes.slice(kernel_at, size).ok_or_else(truncated)?;
    let offset = u64::from(bytes.u32(0x248).ok_or_else(cut)?);
    let payload_len = u64::from(bytes.u32(0x24c).ok_or_else(cut)?);
    let payload = Bytes(kernel).slice(offset, payload_len).ok_or_else(truncated)?;
    Ok(Image {
        header,
        kernel,
        payload,
        pref_address: bytes.u64(0x258).ok_or_else(cut)?,
        init_size: bytes.u32(0x260).ok_or_else(cut)?.into(),
    })
}

/// Loads a bzImage with its initrd and command line.
pub(super) fn load(memory: &GuestMemory, request: &Request<'_>) -> Result<Registers, Error> {
    let image = parse(request.kernel)?;
    let compression = Compression::detect(image.payload);
    if compression == Compression::Other {
        return load_compressed(memory, request, &image);
    }
    let max = memory.len();
    let vmlinux = decompress(image.payload, compression, max)?;
    if vmlinux.len() as u64 > max {
        return Err(Error::KernelTooLarge { needed: vmlinux.len() as u64, memory: max });
    }
    let elf = Elf::parse(&vmlinux)?;
    let mut loaded = elf.load(memory)?;
    loaded.end = loaded.end.max(loaded.start.saturating_add(image.init_size));
    linux::start(memory, request, image.header, loaded, elf.entry)
}

/// Leaves decompression to the kernel.
fn load_compressed(
    memory: &GuestMemory,
    request: &Request<'_>,
    image: &Image<'_>,
) -> Result<Registers, Error> {
    let start = image.pref_address;
    let room = image.init_size.max(image.kernel.len() as u64);
    super::place(memory, start, room)?;
    super::copy(memory, start, image.kernel)?;
    let end = start.saturating_add(room);
    linux::start(memory, request, image.header, Loaded { start, end }, start.saturating_add(0x200))
}
