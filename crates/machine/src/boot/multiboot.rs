//! Multiboot 1, as bare test kernels of the field use it (GNU Multiboot Specification 0.6.96).
//!
//! The image is either a 32-bit ELF file or a flat one whose header says where it goes ("a.out kludge"). It is
//! entered in 32-bit protected mode with its modules, memory map and command line in an information structure.

use super::bytes::{Bytes, put};
use super::elf::{Elf, is_elf};
use super::layout::{CONVENTIONAL_END, HIGH_MEMORY, Kind, LOADER_END, START_INFO, memory_map};
use super::{Error, Loaded, Request, entry, linux};
use cpu::Registers;
use memory::GuestMemory;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies in the first 8 KiB, 4-byte aligned.
const SEARCH: u64 = 8192;
/// The image fills in its load addresses.
const ADDRESSES: u32 = 1 << 16;
/// Required features that a loader may know: aligned modules, memory map, video mode (which text consoles ignore).
const KNOWN_REQUIRED: u32 = 0b111;

const MODULE_LIST: u64 = START_INFO + 0x100;
const MODULES_MAX: usize = 64;
const MAP: u64 = START_INFO + 0x800;
const NAME: u64 = START_INFO + 0xf00;
const STRINGS: u64 = START_INFO + 0x1000;

/// What a BIOS leaves behind, which kernels look up without asking: the interrupt vectors, and in its data area (segment 40h) the
/// first serial port, the segment of the extended data area and the conventional memory in KiB.
const VECTORS: usize = 256;
const BIOS_SERIAL: u64 = 0x400;
const BIOS_EXTENDED: u64 = 0x40e;
const BIOS_MEMORY: u64 = 0x413;
const LOWER_KIB: u16 = (CONVENTIONAL_END >> 10) as u16;
/// In the data area's room for applications (4f0h): `push bp; mov bp, sp; or byte [bp+6], 1; pop bp; iret`. It sets the caller's
/// carry flag, by which every BIOS service says that it is not there.
const NO_SERVICE: u16 = 0x4f0;
const NO_SERVICE_CODE: [u8; 9] = [0x55, 0x89, 0xe5, 0x80, 0x4e, 0x06, 0x01, 0x5d, 0xcf];

/// The header: its offset in the file and its flags.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    at: u64,
    flags: u32,
}

/// Searches for the header.
pub(super) fn find(file: &[u8]) -> Option<Header> {
    let bytes = Bytes(file);
    (0..SEARCH).step_by(4).find_map(|at| {
        let magic = bytes.u32(at)?;
        let flags = bytes.u32(at.checked_add(4)?)?;
        let checksum = bytes.u32(at.checked_add(8)?)?;
        (magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0)
            .then_some(Header { at, flags })
    })
}

/// Loads a multiboot kernel.
pub(super) fn load(memory: &GuestMemory, request: &Request<'_>, header: Header) -> Result<Registers, Error> {
    if header.flags & 0xffff & !KNOWN_REQUIRED != 0 {
        return Err(Error::Multiboot { why: "it requires a feature that no loader has" });
    }
    let (kernel, entry) = load_image(memory, request.kernel, header)?;
    if request.modules.len() > MODULES_MAX {
        return Err(Error::Multiboot { why: "it is given more than 64 modules" });
    }
    let mut strings = Strings { memory, next: STRINGS };
    let mut info = [0u8; 0x60];
    // Memory sizes, boot device, command line, modules, memory map, loader name.
    put(&mut info, 0, &0x24fu32.to_le_bytes());
    let upper = memory.regions().first().map_or(0, |region| region.len.saturating_sub(HIGH_MEMORY));
    put(&mut info, 4, &u32::from(LOWER_KIB).to_le_bytes());
    put(&mut info, 8, &u32::try_from(upper >> 10).unwrap_or(u32::MAX).to_le_bytes());
    put(&mut info, 12, &0x8000_ffffu32.to_le_bytes());
    let line = strings.push(&format!("{} {}", request.kernel_name, request.command_line))?;
    put(&mut info, 16, &line.to_le_bytes());
    place_modules(memory, request, kernel, &mut strings, &mut info)?;
    put_memory_map(memory, request, &mut info)?;
    linux::write_string(memory, NAME, "yado")?;
    put(&mut info, 64, &(NAME as u32).to_le_bytes());
    memory.write(START_INFO, &info)?;
    put_bios_data(memory)?;
    let mut registers = entry::protected_mode(memory, entry)?;
    for (register, value) in [(entry::RAX, LOADER_MAGIC), (entry::RBX, START_INFO)] {
        if let Some(slot) = registers.gpr.get_mut(register) {
            *slot = value;
        }
    }
    Ok(registers)
}

fn put_bios_data(memory: &GuestMemory) -> Result<(), Error> {
    let [low, high] = NO_SERVICE.to_le_bytes();
    memory.write(0, &[low, high, 0, 0].repeat(VECTORS))?;
    memory.write(u64::from(NO_SERVICE), &NO_SERVICE_CODE)?;
    memory.write(BIOS_SERIAL, &0x3f8u16.to_le_bytes())?;
    // The extended data area is the last KiB below 640 KiB.
    memory.write(BIOS_EXTENDED, &(LOWER_KIB << 6).to_le_bytes())?;
    Ok(memory.write(BIOS_MEMORY, &LOWER_KIB.to_le_bytes())?)
}

fn load_image(memory: &GuestMemory, file: &[u8], header: Header) -> Result<(Loaded, u32), Error> {
    if header.flags & ADDRESSES != 0 {
        return load_flat(memory, file, header);
    }
    if !is_elf(file) {
        return Err(Error::Multiboot { why: "it is neither ELF nor says where to load it" });
    }
    let elf = Elf::parse(file)?;
    if elf.is_64 {
        return Err(Error::Multiboot {
            why: "multiboot 1 images are 32-bit ELF, this one is 64-bit (objcopy -O elf32-i386 makes one)",
        });
    }
    let loaded = elf.load(memory)?;
    let entry = u32::try_from(elf.entry).map_err(|_| Error::Elf { why: "its entry is above 4 GiB" })?;
    Ok((loaded, entry))
}

fn load_flat(memory: &GuestMemory, file: &[u8], header: Header) -> Result<(Loaded, u32), Error> {
    let bytes = Bytes(file);
    let field = |index: u64| {
        bytes.u32(header.at.wrapping_add(index)).ok_or(Error::Truncated { what: "multiboot header" })
    };
    let [header_address, load, load_end, bss_end, entry] =
        [field(12)?, field(16)?, field(20)?, field(24)?, field(28)?];
    let before = header_address
        .checked_sub(load)
        .ok_or(Error::Multiboot { why: "its header lies before its load address" })?;
    let offset = header
        .at
        .checked_sub(before.into())
        .ok_or(Error::Multiboot { why: "its load address lies before the file's first byte" })?;
    let rest = (file.len() as u64).saturating_sub(offset);
    let len = match load_end {
        0 => rest,
        end => u64::from(end.checked_sub(load).ok_or(Error::Multiboot { why: "it ends before it begins" })?),
    };
    let content = bytes.slice(offset, len).ok_or(Error::Truncated { what: "multiboot image" })?;
    let start = u64::from(load);
    let end = start.saturating_add(len).max(bss_end.into());
    super::place(memory, start, end.saturating_sub(start))?;
    super::copy(memory, start, content)?;
    let loaded_end = start.saturating_add(len);
    super::clear(memory, loaded_end, end.saturating_sub(loaded_end))?;
    Ok((Loaded { start, end }, entry))
}

/// Strings for the information structure, one after another below the loader's end.
struct Strings<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Strings<'_> {
    fn push(&mut self, text: &str) -> Result<u32, Error> {
        let at = self.next;
        let end = at.saturating_add(text.len() as u64).saturating_add(1);
        if end > LOADER_END {
            let max = LOADER_END.wrapping_sub(STRINGS) as usize;
            return Err(Error::CommandLine { len: text.len(), max });
        }
        linux::write_string(self.memory, at, text)?;
        self.next = end;
        Ok(at as u32)
    }
}

/// Modules follow the kernel, each on a page of its own.
fn place_modules(
    memory: &GuestMemory,
    request: &Request<'_>,
    kernel: Loaded,
    strings: &mut Strings<'_>,
    info: &mut [u8],
) -> Result<(), Error> {
    let mut next = kernel.end.max(HIGH_MEMORY);
    let mut list = Vec::new();
    for module in request.modules {
        let start = next.checked_next_multiple_of(0x1000).unwrap_or(u64::MAX);
        let len = module.bytes.len() as u64;
        let end = start.saturating_add(len);
        if !memory.contains(start, len) || end > u64::from(u32::MAX) {
            let low = memory.regions().first().map_or(0, |region| region.len);
            return Err(Error::InitrdTooLarge { len, room: low.saturating_sub(start) });
        }
        super::copy(memory, start, module.bytes)?;
        let name = strings.push(module.name)?;
        for value in [start as u32, end as u32, name, 0] {
            list.extend_from_slice(&value.to_le_bytes());
        }
        next = end;
    }
    memory.write(MODULE_LIST, &list)?;
    put(info, 20, &u32::try_from(request.modules.len()).unwrap_or(0).to_le_bytes());
    put(info, 24, &(MODULE_LIST as u32).to_le_bytes());
    Ok(())
}

fn put_memory_map(memory: &GuestMemory, request: &Request<'_>, info: &mut [u8]) -> Result<(), Error> {
    let mut map = Vec::new();
    for range in memory_map(memory, request.reserved) {
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&range.base.to_le_bytes());
        map.extend_from_slice(&range.len.to_le_bytes());
        let kind = if range.kind == Kind::Usable { 1u32 } else { 2 };
        map.extend_from_slice(&kind.to_le_bytes());
    }
    memory.write(MAP, &map)?;
    put(info, 44, &u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    put(info, 48, &(MAP as u32).to_le_bytes());
    Ok(())
}
