//! Guest memory by linear address: a walk of the guest's page tables (Intel SDM 3, 5.5) that changes nothing.

use memory::GuestMemory;
use std::collections::HashMap;
use std::ops::Range;

/// Bits 12 to 51 of an entry: the physical address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1 << 0;
const LARGE: u64 = 1 << 7;
/// Pages of 4 KiB that are told apart: more than a kernel's image has.
const PLACES_MAX: usize = 1 << 16;

/// One address space of a guest in 64-bit mode.
pub(crate) struct Space<'a> {
    memory: &'a GuestMemory,
    cr3: u64,
    levels: u32,
}

impl<'a> Space<'a> {
    /// The space of a vCPU with these registers; `None` if it has no long-mode paging.
    pub(crate) fn of(memory: &'a GuestMemory, registers: &cpu::Registers) -> Option<Self> {
        let on = registers.cr0 & cpu::cr0::PG != 0 && registers.efer & cpu::efer::LMA != 0;
        let levels = if registers.cr4 & cpu::cr4::LA57 != 0 { 5 } else { 4 };
        on.then_some(Self { memory, cr3: registers.cr3 & ADDRESS, levels })
    }

    /// The physical address of a linear one, and how many bytes follow in the same page. Where nothing is mapped: how
    /// many bytes the gap has from there on, at least.
    fn translate(&self, linear: u64) -> Result<(u64, u64), u64> {
        let mut table = self.cr3;
        for level in (0..self.levels).rev() {
            let shift = level.wrapping_mul(9).wrapping_add(12);
            let size = 1u64.wrapping_shl(shift);
            let offset = linear & size.wrapping_sub(1);
            let left = size.wrapping_sub(offset);
            let index = linear.wrapping_shr(shift) & 0x1ff;
            let entry = self.memory.load_u64(table | index.wrapping_mul(8)).map_err(|_| left)?;
            if entry & PRESENT == 0 {
                return Err(left);
            }
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let page = entry & ADDRESS & !size.wrapping_sub(1);
                return Ok((page | offset, left));
            }
            table = entry & ADDRESS;
        }
        Err(0x1000)
    }

    /// Copies what is mapped at `linear`; `None` if some of it is not.
    pub(crate) fn read(&self, linear: u64, mut into: &mut [u8]) -> Option<()> {
        let mut at = linear;
        while !into.is_empty() {
            let (physical, left) = self.translate(at).ok()?;
            let part = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let (now, rest) = into.split_at_mut_checked(part)?;
            self.memory.read(physical, now).ok()?;
            at = at.wrapping_add(part as u64);
            into = rest;
        }
        Some(())
    }

    /// Eight bytes at `linear`.
    pub(crate) fn load_u64(&self, linear: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(linear, &mut bytes)?;
        Some(u64::from_le_bytes(bytes))
    }

    /// Where in a range guest-physical pages of 4 KiB are mapped: linear addresses by guest-physical ones.
    pub(crate) fn places(&self, range: Range<u64>) -> HashMap<u64, u64> {
        let mut places = HashMap::new();
        let mut at = range.start;
        while at < range.end && places.len() < PLACES_MAX {
            let (physical, left) = match self.translate(at) {
                Err(gap) => (None, gap),
                Ok((physical, left)) => (Some(physical), left),
            };
            for offset in (0..left.min(range.end.saturating_sub(at))).step_by(0x1000) {
                if let Some(physical) = physical {
                    places.entry(physical.saturating_add(offset)).or_insert(at.saturating_add(offset));
                }
            }
            let Some(next) = at.checked_add(left.max(0x1000)) else { break };
            at = next;
        }
        places
    }

    /// What is mapped in a range, from its first mapped page on, gaps as zeroes, at most `limit` bytes: the address of the
    /// first byte, and the bytes.
    pub(crate) fn image(&self, range: Range<u64>, limit: u64) -> Option<(u64, Vec<u8>)> {
        let mut image = Vec::new();
        let (mut base, mut at) = (None, range.start);
        while at < range.end && base.is_none_or(|base| at.wrapping_sub(base) < limit) {
            let left = match self.translate(at) {
                Err(gap) => gap,
                Ok((physical, left)) => {
                    let start = *base.get_or_insert(at);
                    let left = left.min(limit.saturating_sub(at.wrapping_sub(start)));
                    let from = usize::try_from(at.wrapping_sub(start)).ok()?;
                    image.resize(from.checked_add(usize::try_from(left).ok()?)?, 0);
                    // Where there is no RAM the image has zeroes.
                    let _ = self.memory.read(physical, image.get_mut(from..)?);
                    left
                }
            };
            at = at.checked_add(left.max(0x1000))?;
        }
        Some((base?, image))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use memory::Backing;

    /// The last 2 GiB: one page of 4 KiB at their start, a gap, one of 2 MiB.
    fn registers(memory: &GuestMemory) -> cpu::Registers {
        let put = |at: u64, value: u64| memory.write(at, &value.to_le_bytes()).unwrap();
        put(0x1000 + 511 * 8, 0x2003);
        put(0x2000 + 510 * 8, 0x3003);
        put(0x3000, 0x4003);
        put(0x3008, 0x20_0083);
        put(0x4000, 0x5003);
        memory.write(0x5000, b"first").unwrap();
        memory.write(0x20_0000, b"second").unwrap();
        cpu::Registers { cr0: cpu::cr0::PG, efer: cpu::efer::LMA, cr3: 0x1000, ..cpu::Registers::default() }
    }

    #[test]
    fn pages_of_both_sizes_are_read_and_gaps_are_zero() {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Private).unwrap();
        let registers = registers(&memory);
        let space = Space::of(&memory, &registers).unwrap();
        let start = 0xffff_ffff_8000_0000;
        let (base, image) = space.image(start..start + (1 << 30), 64 << 20).unwrap();
        assert_eq!((base, image.len()), (start, 4 << 20));
        assert_eq!(&image[..6], b"first\0");
        assert_eq!(&image[2 << 20..(2 << 20) + 6], b"second");
        let (_, image) = space.image(start..start + (1 << 30), 0x20_1000).unwrap();
        assert_eq!(image.len(), 0x20_1000);
        assert_eq!(space.load_u64(start + 0x1000), None);
        assert_eq!(space.load_u64(start + 0xffc), None, "half of it is not mapped");
        let unpaged = cpu::Registers { cr0: 0, ..registers };
        assert!(Space::of(&memory, &unpaged).is_none());
    }

    #[test]
    fn tables_that_point_nowhere_or_at_themselves_end() {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Private).unwrap();
        let registers = registers(&memory);
        for index in 0..512 {
            memory.write(0x1000 + index * 8, &0x1003u64.to_le_bytes()).unwrap();
        }
        let space = Space::of(&memory, &registers).unwrap();
        let start = 0xffff_ffff_8000_0000;
        assert_eq!(space.image(start..start + (1 << 30), 1 << 20).unwrap().1.len(), 1 << 20);
        let registers = cpu::Registers { cr3: 1 << 40, ..registers };
        assert!(Space::of(&memory, &registers).unwrap().image(start..start + (1 << 30), 1 << 20).is_none());
    }
}
