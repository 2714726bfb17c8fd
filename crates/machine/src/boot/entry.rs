//! The processor's state at a kernel's first instruction: 64-bit with identity paging, or 32-bit flat.

use super::layout::{GDT, PAGE_TABLES};
use cpu::{DescriptorTable, Registers, Segment, attr, cr0, cr4, efer, rflags};
use memory::{AccessError, GuestMemory};

/// Indices into [`Registers::gpr`], in encoding order.
pub(super) const RAX: usize = 0;
pub(super) const RBX: usize = 3;
pub(super) const RSP: usize = 4;
pub(super) const RSI: usize = 6;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = 0x1000;
/// Page directories: one for each GiB mapped.
const DIRECTORIES: u64 = 4;

/// Descriptors in the order Linux wants them: `__BOOT_CS` is 0x10, `__BOOT_DS` is 0x18 (Linux `boot.rst`, 64-bit
/// boot protocol). 0x08 is 32-bit code, 0x20 the TSS.
fn table(code: u16) -> [u64; 5] {
    [0, descriptor(attr::CODE32), descriptor(code), descriptor(attr::DATA), 0x0000_8b00_0000_0067]
}

/// A flat 4 GiB descriptor with these attributes.
fn descriptor(attributes: u16) -> u64 {
    0x000f_0000_0000_ffff | (u64::from(attributes) << 40)
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attr: attributes }
}

fn flat(code: u16) -> Registers {
    let data = segment(0x18, attr::DATA);
    Registers {
        rflags: rflags::FIXED,
        segments: [data, segment(0x10, code), data, data, data, data],
        tr: Segment { base: 0, limit: 0x67, selector: 0x20, attr: attr::TSS_BUSY },
        gdtr: DescriptorTable { base: GDT, limit: 39 },
        // As after power-up (Intel SDM 3, table 10-1): an empty table is a guest's own doing.
        idtr: DescriptorTable { base: 0, limit: 0xffff },
        cr0: cr0::PE | cr0::ET,
        ..Registers::default()
    }
}

fn write_table(memory: &GuestMemory, code: u16) -> Result<(), AccessError> {
    let bytes: Vec<u8> = table(code).iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write(GDT, &bytes)
}

/// 32-bit protected mode, paging off, flat segments (PVH and multiboot 1).
pub(super) fn protected_mode(memory: &GuestMemory, entry: u32) -> Result<Registers, AccessError> {
    write_table(memory, attr::CODE32)?;
    Ok(Registers { rip: entry.into(), ..flat(attr::CODE32) })
}

/// 64-bit mode with the first 4 GiB mapped to themselves.
pub(super) fn long_mode(memory: &GuestMemory, entry: u64) -> Result<Registers, AccessError> {
    write_table(memory, attr::CODE64)?;
    let pdpt = PAGE_TABLES.wrapping_add(PAGE);
    let directories = pdpt.wrapping_add(PAGE);
    memory.fill(PAGE_TABLES, PAGE.wrapping_mul(2), 0)?;
    memory.write(PAGE_TABLES, &(pdpt | PRESENT_WRITABLE).to_le_bytes())?;
    for index in 0..DIRECTORIES {
        let directory = directories.wrapping_add(index.wrapping_mul(PAGE));
        let slot = pdpt.wrapping_add(index.wrapping_mul(8));
        memory.write(slot, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
        let first = index << 30;
        let bytes: Vec<u8> = (0..512u64)
            .flat_map(|entry| (first | (entry << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes())
            .collect();
        memory.write(directory, &bytes)?;
    }
    let flat = flat(attr::CODE64);
    Ok(Registers {
        rip: entry,
        cr0: flat.cr0 | cr0::PG | cr0::NE | cr0::MP,
        cr3: PAGE_TABLES,
        cr4: cr4::PAE,
        efer: efer::LME | efer::LMA,
        ..flat
    })
}
