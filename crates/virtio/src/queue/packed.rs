//! Packed virtqueues (2.8): one ring in which the driver makes descriptors available, and the device writes used ones over them.
//!
//! Both sides go round the ring and keep a *wrap counter* that flips at its end. A descriptor is available while its AVAIL bit is the
//! driver's wrap counter and its USED bit is not; a used one has both bits as the device's wrap counter. Buffers come back in any
//! order, by ids of the driver's choice; a used descriptor moves the device on by as many places as the buffer's descriptors took.
//!
//! States of a buffer id: *the driver's*; *ours*, from [`Queue::pop`] to [`Queue::push`], with the number of its descriptors in
//! [`Packed::taken`]. Ids that are ours already, or more descriptors than the ring has, break the rules.
//!
//! Ordering: the flags of a buffer's first descriptor are loaded before all else of it, and those of the first of used descriptors
//! are stored (release) after all else; a full fence stands between saying what we want to be told and looking once more (2.8.21).

use super::chain::{self, Chain, DESCRIPTOR_SIZE, Descriptor, INDIRECT, NEXT, Piece, WRITE};
use super::{Queue, RingError};
use memory::GuestMemory;
use serde_json::{Value, json};
use std::sync::atomic::{Ordering, fence};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Where in a descriptor what follows the address is.
const LEN: u64 = 8;
const FLAGS: u64 = 14;

/// What a side wants to be told (2.8.10): all (0), nothing, or when a place of the ring is passed.
mod event {
    pub const DISABLE: u16 = 1;
    pub const AT: u16 = 2;
    /// Where the flags are, behind the place.
    pub const FLAGS: u64 = 2;
    /// The wrap counter of the place.
    pub const WRAP: u16 = 1 << 15;
}

/// A place in the ring, and the wrap counter there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self { index: 0, wrap: true }
    }
}

impl Place {
    /// So many places on, at most `size`.
    fn after(self, count: u16, size: u16) -> Self {
        // Both are at most 32768, and so is the index: nothing overflows.
        let sum = u32::from(self.index).wrapping_add(count.into());
        match sum.checked_sub(size.into()) {
            Some(over) => Self { index: over as u16, wrap: !self.wrap },
            None => Self { index: sum as u16, ..self },
        }
    }

    fn available(self, flags: u16) -> bool {
        (flags & AVAIL != 0) == self.wrap && (flags & USED != 0) != self.wrap
    }

    fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }

    /// As an event structure has it.
    fn encoded(self) -> u16 {
        self.index | if self.wrap { event::WRAP } else { 0 }
    }
}

/// Where a packed queue is.
#[derive(Debug, Clone, Default)]
pub(super) struct Packed {
    available: Place,
    used: Place,
    /// Descriptors of the buffers that are ours, by id; 0: the driver has it.
    taken: Vec<u16>,
    /// Their sum.
    outstanding: u16,
    /// Places that were used since the driver was last told, or decided not to be; at most a round.
    untold: u16,
}

impl Packed {
    pub(super) fn inspect(&self) -> Value {
        json!({ "available": self.available.index, "used": self.used.index, "outstanding": self.outstanding })
    }
}

impl Queue {
    /// Checks size and areas; says what is impossible.
    pub(super) fn enable_packed(&mut self, memory: &GuestMemory) -> Result<(), &'static str> {
        // 2.8.10.1: any size, not powers of two only.
        if self.size == 0 || self.size > self.size_max {
            return Err("a size that is zero or too large");
        }
        if self.descriptors & 15 != 0 || self.available & 3 != 0 || self.used & 3 != 0 {
            return Err("an area that is not aligned (2.8)");
        }
        let ring = u64::from(self.size).wrapping_mul(DESCRIPTOR_SIZE);
        let areas = [(self.descriptors, ring), (self.available, 4), (self.used, 4)];
        if areas.iter().any(|&(at, len)| !memory.contains(at, len)) {
            return Err("an area that is not guest RAM");
        }
        self.packed = Packed { taken: vec![0; usize::from(self.size)], ..Packed::default() };
        // Tell us of everything: whatever was there before was nobody's wish.
        memory.write(self.used, &[0; 4]).map_err(|_| "an area that is not guest RAM")
    }

    fn descriptor_at(&self, index: u16) -> u64 {
        self.descriptors.wrapping_add(u64::from(index).wrapping_mul(DESCRIPTOR_SIZE))
    }

    fn is_available(&self, memory: &GuestMemory) -> Result<bool, RingError> {
        let place = self.packed.available;
        let flags = memory.load_u16(self.descriptor_at(place.index).wrapping_add(FLAGS))?;
        Ok(place.available(flags))
    }

    /// [`Queue::pop`] of a packed queue.
    pub(super) fn pop_packed(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingError> {
        if !self.is_available(memory)? {
            if !self.features.event_index {
                return Ok(None);
            }
            // The place first: with flags of before it is a place of before, and we are told too early at worst.
            let place = self.packed.available.encoded();
            memory.atomic_u16(self.used, |cell| cell.store(place.to_le(), Ordering::Release))?;
            let flags = self.used.wrapping_add(event::FLAGS);
            memory.atomic_u16(flags, |cell| cell.store(event::AT.to_le(), Ordering::Release))?;
            fence(Ordering::SeqCst);
            if !self.is_available(memory)? {
                return Ok(None);
            }
        }
        let (chain, count) = self.parse_packed(memory)?;
        let wrong = |why| RingError::Chain { head: chain.head, why };
        let taken = self.packed.taken.get_mut(usize::from(chain.head));
        let taken = taken.ok_or_else(|| wrong("an id that the queue does not have"))?;
        if *taken != 0 {
            return Err(wrong("an id that is with the device already"));
        }
        let outstanding = self.packed.outstanding.saturating_add(count);
        if outstanding > self.size {
            return Err(RingError::Index { ahead: outstanding, size: self.size });
        }
        *taken = count;
        self.packed.outstanding = outstanding;
        self.packed.available = self.packed.available.after(count, self.size);
        Ok(Some(chain))
    }

    /// The buffer at the next available place, and how many descriptors it takes. Each is read once.
    fn parse_packed(&self, memory: &GuestMemory) -> Result<(Chain, u16), RingError> {
        let mut chain = Chain { head: 0, readable: Piece::default(), writable: Piece::default() };
        let mut place = self.packed.available;
        for count in 1..=self.size {
            let descriptor = self.read_descriptor(memory, self.descriptor_at(place.index))?;
            // The id of the last one counts (2.8.6). Until it is known, errors name the place.
            chain.head = place.index;
            if descriptor.flags & INDIRECT != 0 {
                self.parse_indirect(memory, &descriptor, &mut chain)?;
            } else {
                chain::add(memory, &descriptor, (&mut chain.readable, &mut chain.writable), chain.head)?;
            }
            if descriptor.flags & NEXT == 0 {
                chain.head = descriptor.next;
                return Ok((chain, count));
            }
            place = place.after(1, self.size);
        }
        Err(RingError::Chain { head: chain.head, why: "more descriptors than allowed" })
    }

    /// A table of descriptors, all of which belong to the buffer, one after the other (2.8.8).
    fn parse_indirect(
        &self,
        memory: &GuestMemory,
        table: &Descriptor,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let wrong = |why| RingError::Chain { head: chain.head, why };
        if !self.features.indirect {
            return Err(wrong("an indirect table where none may be"));
        }
        if table.flags & NEXT != 0 {
            return Err(wrong("an indirect table that is not the last"));
        }
        let len = u64::from(table.len);
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(wrong("an indirect table that is not whole descriptors"));
        }
        let entries = len / DESCRIPTOR_SIZE;
        if entries > u64::from(self.size_max) {
            return Err(wrong("more descriptors than allowed"));
        }
        if !memory.contains(table.address, len) {
            return Err(memory::AccessError { address: table.address, len }.into());
        }
        for entry in 0..entries {
            let at = table.address.wrapping_add(entry.wrapping_mul(DESCRIPTOR_SIZE));
            let descriptor = self.read_descriptor(memory, at)?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(wrong("an indirect table where none may be"));
            }
            chain::add(memory, &descriptor, (&mut chain.readable, &mut chain.writable), chain.head)?;
        }
        Ok(())
    }

    fn read_descriptor(&self, memory: &GuestMemory, at: u64) -> Result<Descriptor, RingError> {
        let raw = u128::from_le_bytes(memory.read_array(at)?);
        let (id, flags) = ((raw >> 96) as u16, (raw >> 112) as u16);
        Ok(Descriptor { address: raw as u64, len: (raw >> 64) as u32, flags, next: id })
    }

    /// [`Queue::push_all`] of a packed queue: the first descriptor's flags are written last, so that the driver, which goes through
    /// the ring in order, sees all or none. Ids that are not ours are nobody's.
    pub(super) fn push_packed(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), RingError> {
        let mut first = None;
        for &(id, written) in chains {
            let count = self.packed.taken.get_mut(usize::from(id)).map_or(0, std::mem::take);
            if count == 0 {
                continue;
            }
            let place = self.packed.used;
            let at = self.descriptor_at(place.index);
            let about = u64::from(written) | u64::from(id) << 32;
            let about = about.to_le_bytes();
            memory.write(at.wrapping_add(LEN), about.first_chunk::<6>().unwrap_or(&[0; 6]))?;
            let flags = place.used_flags() | if written > 0 { WRITE } else { 0 };
            match first {
                None => first = Some((at, flags)),
                Some(_) => store_flags(memory, at, flags)?,
            }
            self.packed.used = place.after(count, self.size);
            self.packed.outstanding = self.packed.outstanding.saturating_sub(count);
            self.packed.untold = self.packed.untold.saturating_add(count).min(self.size);
        }
        if let Some((at, flags)) = first {
            store_flags(memory, at, flags)?;
            self.returned = true;
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was used since it was last asked (2.8.10, 2.8.21.3.1).
    pub(super) fn wants_packed(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        let untold = std::mem::take(&mut self.packed.untold);
        let flags = memory.load_u16(self.available.wrapping_add(event::FLAGS))?;
        if flags == event::DISABLE {
            return Ok(false);
        }
        if flags != event::AT || !self.features.event_index {
            return Ok(true);
        }
        let wanted = memory.load_u16(self.available)?;
        let place = wanted & !event::WRAP;
        // Of the round before, if the wrap counters differ.
        let same_round = (wanted & event::WRAP != 0) == self.packed.used.wrap;
        let place = if same_round { place } else { place.wrapping_sub(self.size) };
        Ok(self.packed.used.index.wrapping_sub(place).wrapping_sub(1) < untold)
    }
}

fn store_flags(memory: &GuestMemory, descriptor: u64, flags: u16) -> Result<(), RingError> {
    let at = descriptor.wrapping_add(FLAGS);
    Ok(memory.atomic_u16(at, |cell| cell.store(flags.to_le(), Ordering::Release))?)
}

#[cfg(test)]
mod test;
