//! ELF files: the segments to load, the entry point, and the Xen note that names the PVH entry.
//!
//! Segments are loaded at their physical addresses. A kernel linked for randomisation runs there too, only not
//! randomised: no relocation is applied.

use super::bytes::Bytes;
use super::{Error, Loaded};
use memory::GuestMemory;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// No kernel has more program headers than this.
const PROGRAM_HEADERS_MAX: u16 = 256;

/// One PT_LOAD or PT_NOTE.
#[derive(Debug, Clone, Copy)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// A parsed ELF executable for x86.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    bytes: Bytes<'a>,
    /// ELFCLASS64.
    pub(super) is_64: bool,
    /// e_entry.
    pub(super) entry: u64,
    headers: Vec<ProgramHeader>,
}

/// Whether the file says it is ELF.
pub(super) fn is_elf(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

impl<'a> Elf<'a> {
    /// Reads the headers.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let bytes = Bytes(file);
        let cut = || Error::Truncated { what: "ELF header" };
        let is_64 = match bytes.u8(4).ok_or_else(cut)? {
            1 => false,
            2 => true,
            _ => return Err(Error::Architecture { found: "an ELF file of unknown class".into() }),
        };
        let machine = bytes.u16(18).ok_or_else(cut)?;
        if bytes.u8(5) != Some(1) || !matches!(machine, EM_386 | EM_X86_64) {
            return Err(Error::Architecture { found: machine_name(machine) });
        }
        let word = |offset| if is_64 { bytes.u64(offset) } else { bytes.u32(offset).map(u64::from) };
        let (entry, table, size_at) = if is_64 { (24, 32, 54) } else { (24, 28, 42) };
        let entry = word(entry).ok_or_else(cut)?;
        let table = word(table).ok_or_else(cut)?;
        let size = u64::from(bytes.u16(size_at).ok_or_else(cut)?);
        let count = bytes.u16(size_at.wrapping_add(2)).ok_or_else(cut)?;
        if count == 0 || count > PROGRAM_HEADERS_MAX {
            return Err(Error::Elf { why: "it has no program headers, so it is not an executable" });
        }
        let headers = (0..u64::from(count))
            .map(|index| {
                let at = table.checked_add(index.checked_mul(size)?)?;
                program_header(Bytes(bytes.slice(at, if is_64 { 56 } else { 32 })?), is_64)
            })
            .collect::<Option<Vec<_>>>()
            .ok_or(Error::Truncated { what: "ELF program header table" })?;
        Ok(Self { bytes, is_64, entry, headers })
    }

    /// Copies all segments into RAM; answers what they span.
    pub(super) fn load(&self, memory: &GuestMemory) -> Result<Loaded, Error> {
        let mut span: Option<Loaded> = None;
        for header in self.headers.iter().filter(|header| header.kind == PT_LOAD && header.memory_size > 0) {
            let end = header
                .physical
                .checked_add(header.memory_size)
                .ok_or(Error::Elf { why: "a segment wraps around the address space" })?;
            let file_size = header.file_size.min(header.memory_size);
            let content =
                self.bytes.slice(header.offset, file_size).ok_or(Error::Truncated { what: "ELF segment" })?;
            super::place(memory, header.physical, header.memory_size)?;
            super::copy(memory, header.physical, content)?;
            let rest = header.memory_size.saturating_sub(file_size);
            super::clear(memory, header.physical.saturating_add(file_size), rest)?;
            let before = span.unwrap_or(Loaded { start: header.physical, end });
            span = Some(Loaded { start: before.start.min(header.physical), end: before.end.max(end) });
        }
        span.ok_or(Error::Elf { why: "it has no segment to load" })
    }

    /// The 32-bit entry point that a `XEN_ELFNOTE_PHYS32_ENTRY` note names.
    pub(super) fn pvh_entry(&self) -> Option<u32> {
        self.headers.iter().filter(|header| header.kind == PT_NOTE).find_map(|header| {
            let notes = Bytes(self.bytes.slice(header.offset, header.file_size)?);
            xen_note(notes, if header.align == 8 { 8 } else { 4 })
        })
    }
}

fn program_header(bytes: Bytes<'_>, is_64: bool) -> Option<ProgramHeader> {
    let word = |offset| if is_64 { bytes.u64(offset) } else { bytes.u32(offset).map(u64::from) };
    let [offset, physical, file_size, memory_size, align] =
        if is_64 { [8, 24, 32, 40, 48] } else { [4, 12, 16, 20, 28] };
    Some(ProgramHeader {
        kind: bytes.u32(0)?,
        offset: word(offset)?,
        physical: word(physical)?,
        file_size: word(file_size)?,
        memory_size: word(memory_size)?,
        align: word(align)?,
    })
}

/// Searches a note segment: each note is name size, descriptor size, type, name, descriptor, the last two padded.
fn xen_note(notes: Bytes<'_>, align: u64) -> Option<u32> {
    let mut at = 0u64;
    loop {
        let name_size = u64::from(notes.u32(at)?);
        let desc_size = u64::from(notes.u32(at.checked_add(4)?)?);
        let kind = notes.u32(at.checked_add(8)?)?;
        let name = at.checked_add(12)?;
        let desc = name.checked_add(name_size)?.checked_next_multiple_of(align)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.slice(name, name_size)? == b"Xen\0" {
            return notes.u32(desc);
        }
        at = desc.checked_add(desc_size)?.checked_next_multiple_of(align)?;
    }
}

fn machine_name(machine: u16) -> String {
    match machine {
        8 | 10 => "a MIPS ELF file".into(),
        20 => "a 32-bit PowerPC ELF file".into(),
        21 => "a PowerPC64 ELF file".into(),
        22 => "an s390 ELF file".into(),
        40 => "a 32-bit ARM ELF file".into(),
        183 => "an arm64 ELF file".into(),
        243 => "a RISC-V ELF file".into(),
        258 => "a LoongArch ELF file".into(),
        other => format!("an ELF file for machine number {other}"),
    }
}
