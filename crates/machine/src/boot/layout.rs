//! Where the loader puts things in the guest's first mebibyte, and the map of memory it tells the kernel.
//!
//! Everything here is the loader's own; a kernel is never loaded below 1 MiB of its own accord except by a
//! multiboot image that asks for it, which is refused where it would overwrite these.

use memory::GuestMemory;

/// Global descriptor table for the first instructions.
pub const GDT: u64 = 0x1000;
/// PVH's `hvm_start_info`, its module list and memory map; multiboot's information structure.
pub const START_INFO: u64 = 0x2000;
/// Linux `boot_params`, the "zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// Linux `setup_data`.
pub const SETUP_DATA: u64 = 0x8000;
/// Page tables that map the first 4 GiB to themselves: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its NUL, in bytes: to the end of the room below [`LOADER_END`].
pub const COMMAND_LINE_MAX: usize = 0x1_0000;
/// End of what the loader uses.
pub const LOADER_END: u64 = 0x3_0000;
/// End of conventional memory; the extended BIOS data area of a PC would begin here.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables and firmware: from here to 1 MiB is reserved.
pub const FIRMWARE: u64 = 0xe_0000;
/// The first mebibyte ends.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Kinds of memory, numbered as ACPI 6.5 table 15.14 does (so do e820, multiboot and PVH).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Free for the guest.
    Usable = 1,
    /// Not for the guest.
    Reserved = 2,
}

/// A piece of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical start.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: Kind,
}

/// The memory map: RAM but for the holes of a PC's first mebibyte, and what the board `reserved` outside RAM.
pub fn memory_map(memory: &GuestMemory, reserved: &[(u64, u64)]) -> Vec<Range> {
    let mut map = Vec::new();
    for region in memory.regions() {
        let end = region.base.saturating_add(region.len);
        if region.base > 0 {
            map.push(Range { base: region.base, len: region.len, kind: Kind::Usable });
            continue;
        }
        let low = CONVENTIONAL_END.min(end);
        map.push(Range { base: 0, len: low, kind: Kind::Usable });
        map.push(Range {
            base: CONVENTIONAL_END,
            len: 0xa_0000u64.wrapping_sub(CONVENTIONAL_END),
            kind: Kind::Reserved,
        });
        map.push(Range { base: FIRMWARE, len: HIGH_MEMORY.wrapping_sub(FIRMWARE), kind: Kind::Reserved });
        if end > HIGH_MEMORY {
            map.push(Range { base: HIGH_MEMORY, len: end.wrapping_sub(HIGH_MEMORY), kind: Kind::Usable });
        }
    }
    map.extend(reserved.iter().map(|&(base, len)| Range { base, len, kind: Kind::Reserved }));
    map.sort_by_key(|range| range.base);
    map
}
