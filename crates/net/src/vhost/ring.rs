//! Split virtqueues in another process's memory, the device's side, many chains at a time (Virtual I/O Device 1.2, 2.7).
//!
//! Chains are *looked at* in the order in which the driver made them available ([`Ring::available`], [`Ring::chain`]), then *taken*
//! ([`Ring::take`]) or left for later, and given back in the same order ([`Ring::give`]); the driver sees what was given when it is
//! [published](Ring::publish). A driver that breaks the rules stops its ring, and nothing else.

use super::memory::{Area, Memory, Span, barrier};

/// The largest ring (2.7).
pub const SIZE_MAX: u16 = 32768;
/// The most descriptors of a chain. Frames of 64 KiB in pages need 18; drivers that want more waste their own time.
const CHAIN_MAX: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// In the available ring's flags: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: the device wants no notifications.
const NO_NOTIFY: u16 = 1;

/// How a driver broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More chains than entries.
    #[error("the available index is {ahead} ahead in a ring of {size}")]
    Index {
        /// How far ahead.
        ahead: u16,
        /// Entries.
        size: u16,
    },
    /// A chain that is none (2.7.5).
    #[error("a descriptor chain has {0}")]
    Chain(&'static str),
    /// Memory that the front end has not given.
    #[error("a descriptor points outside the guest's memory")]
    Memory,
    /// A ring that cannot be.
    #[error("a ring has {0}")]
    Setup(&'static str),
    /// Who tells the driver something is made to wait.
    #[error("its event counter makes others wait")]
    Call,
}

/// Many of them cost much and carry nothing.
const EMPTY: Error = Error::Chain("a piece without bytes");

/// Where a ring's parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Entries: a power of two, at most [`SIZE_MAX`].
    pub size: u16,
    /// Descriptor table, used and available ring, in the front end's own address space.
    pub descriptors: u64,
    /// See above.
    pub used: u64,
    /// See above.
    pub available: u64,
}

/// A piece of a chain in the guest's memory, found to be inside it when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes, not 0.
    pub len: u32,
}

/// A ring that runs.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    descriptors: Area,
    available: Area,
    used: Area,
    event_index: bool,
    indirect: bool,
    /// The next chain that is to be taken.
    next_available: u16,
    /// The driver's index when it was loaded last.
    loaded: u16,
    /// Where the next chain is given back.
    next_used: u16,
    /// What the driver sees of that.
    published: u16,
    /// `published` when the driver was last told, or decided not to be.
    told: u16,
    /// The driver was told that notifications would be wasted.
    quiet: bool,
}

fn slot(index: u16, size: u16) -> usize {
    usize::from(index & size.wrapping_sub(1))
}

impl Ring {
    /// Finds a ring in memory and starts it at the chain `base`.
    pub fn new(memory: &Memory, places: Places, base: u16, features: u64) -> Result<Self, Error> {
        let Places { size, descriptors, used, available } = places;
        if !size.is_power_of_two() || size > SIZE_MAX {
            return Err(Error::Setup("a size that is no power of two or too large"));
        }
        let entries = usize::from(size);
        let area = |at, each: usize, more: usize| {
            memory.area(at, entries.saturating_mul(each).saturating_add(more)).ok_or(Error::Memory)
        };
        // Each with its trailing event index.
        let (descriptors, used, available) =
            (area(descriptors, 16, 0)?, area(used, 8, 6)?, area(available, 2, 6)?);
        if !descriptors.aligned(16) || !used.aligned(4) || !available.aligned(2) {
            return Err(Error::Setup("a part that is not aligned (2.7)"));
        }
        let next_used = used.load(2);
        Ok(Self {
            size,
            descriptors,
            available,
            used,
            event_index: features & super::feature::EVENT_IDX != 0,
            indirect: features & super::feature::INDIRECT_DESC != 0,
            next_available: base,
            loaded: base,
            next_used,
            published: next_used,
            told: next_used,
            quiet: false,
        })
    }

    /// The next chain that is to be taken: where another device would go on.
    pub fn base(&self) -> u16 {
        self.next_available
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether the memory that it is in was taken away.
    pub fn lost(&self) -> bool {
        self.descriptors.lost() || self.available.lost() || self.used.lost()
    }

    /// How many chains can be looked at, at least `want` if there are so many. Loads the driver's index only if fewer were known.
    #[inline]
    pub fn available(&mut self, want: u16) -> Result<u16, Error> {
        let known = self.loaded.wrapping_sub(self.next_available);
        if known >= want {
            return Ok(known);
        }
        let loaded = self.available.load(2);
        let ahead = loaded.wrapping_sub(self.next_available);
        if ahead > self.size {
            return Err(Error::Index { ahead, size: self.size });
        }
        self.loaded = loaded;
        Ok(ahead)
    }

    /// Chains that the driver had shown when it was looked at last.
    #[inline]
    pub fn known(&self) -> u16 {
        self.loaded.wrapping_sub(self.next_available)
    }

    /// The first descriptor of the chain that is `ahead` of the next one. Its descriptor is asked for.
    #[inline]
    pub fn head(&self, ahead: u16) -> u16 {
        let at = slot(self.next_available.wrapping_add(ahead), self.size);
        let head = self.available.load(at.wrapping_mul(2).wrapping_add(4));
        self.descriptors.prefetch(usize::from(head).wrapping_mul(16));
        head
    }

    /// Appends a chain's pieces to `segments`, all of which are for the device to write, or all to read; answers how many bytes they
    /// are. Each descriptor is read once.
    #[inline]
    pub fn chain(
        &self,
        memory: &Memory,
        head: u16,
        writable: bool,
        segments: &mut Vec<Segment>,
    ) -> Result<u32, Error> {
        let [address, rest] = self.descriptors.read_pair(usize::from(head).wrapping_mul(16));
        let flags = (rest >> 32) as u16;
        let one = if writable { WRITE } else { 0 };
        // Nearly all chains: one descriptor.
        if flags == one && head < self.size {
            let len = rest as u32;
            if len == 0 {
                return Err(EMPTY);
            }
            let span = memory.span(address, len).ok_or(Error::Memory)?;
            if writable {
                span.prefetch_to_write();
            } else {
                span.prefetch();
            }
            segments.push(Segment { address, len });
            return Ok(len);
        }
        self.long_chain(memory, head, writable, segments)
    }

    /// A table of descriptors somewhere in the guest's memory (2.7.5.3), and how many it has.
    fn table<'a>(&self, memory: &'a Memory, address: u64, len: u32) -> Result<(Span<'a>, usize), Error> {
        let entries = len as usize / 16;
        if len == 0 || !len.is_multiple_of(16) || entries > CHAIN_MAX {
            return Err(Error::Chain("an indirect table of a size that cannot be"));
        }
        Ok((memory.span(address, len).ok_or(Error::Memory)?, entries))
    }

    fn long_chain(
        &self,
        memory: &Memory,
        head: u16,
        writable: bool,
        segments: &mut Vec<Segment>,
    ) -> Result<u32, Error> {
        let mut indirect: Option<(Span<'_>, usize)> = None;
        let (mut index, mut total) = (usize::from(head), 0u32);
        for _ in 0..CHAIN_MAX {
            let entry = match &indirect {
                Some((table, entries)) if index < *entries => {
                    let mut entry = [0; 16];
                    table.skip(index.wrapping_mul(16)).read(&mut entry);
                    let entry = u128::from_le_bytes(entry);
                    Some([entry as u64, (entry >> 64) as u64])
                }
                Some(_) => None,
                None if index < usize::from(self.size) => {
                    Some(self.descriptors.read_pair(index.wrapping_mul(16)))
                }
                None => None,
            };
            let [address, rest] = entry.ok_or(Error::Chain("an index outside its table"))?;
            let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & INDIRECT != 0 {
                if indirect.is_some() || !self.indirect || flags & NEXT != 0 {
                    return Err(Error::Chain("an indirect table where none may be"));
                }
                indirect = Some(self.table(memory, address, len)?);
                index = 0;
                continue;
            }
            if (flags & WRITE != 0) != writable {
                return Err(Error::Chain("a piece for the wrong direction"));
            }
            if len == 0 {
                return Err(EMPTY);
            }
            memory.span(address, len).ok_or(Error::Memory)?;
            segments.push(Segment { address, len });
            total = total.checked_add(len).ok_or(Error::Chain("more than 4 GiB"))?;
            if flags & NEXT == 0 {
                return Ok(total);
            }
            index = next.into();
        }
        Err(Error::Chain("more descriptors than a device looks at"))
    }

    /// Takes `count` chains that were looked at.
    #[inline]
    pub fn take(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_add(count);
    }

    /// Gives a chain back with so many bytes written.
    #[inline]
    pub fn give(&mut self, head: u16, written: u32) {
        let at = slot(self.next_used, self.size).wrapping_mul(8).wrapping_add(4);
        self.used.write_u64(at, u64::from(head) | u64::from(written) << 32);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver what was given back; answers whether it wants to be told.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        self.used.store(2, self.next_used);
        self.published = self.next_used;
        barrier();
        let old = std::mem::replace(&mut self.told, self.next_used);
        if !self.event_index {
            return self.available.load(0) & NO_INTERRUPT == 0;
        }
        let event = self.available.load(usize::from(self.size).wrapping_mul(2).wrapping_add(4));
        // 2.7.7.2: has the index passed `event` since the driver was last told?
        self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(old)
    }

    /// The device looks by itself: notifications would be wasted.
    pub fn quiet(&mut self) {
        // Said once: the driver reads the same cache line all the time.
        if !self.event_index && !std::mem::replace(&mut self.quiet, true) {
            self.used.store(0, NO_NOTIFY);
        }
        // With event indices the driver notifies only at the index that was asked for last, which is passed.
    }

    /// Asks to be notified of the next chain after the `seen` that are already there; answers whether it came meanwhile.
    pub fn listen(&mut self, seen: u16) -> Result<bool, Error> {
        self.quiet = false;
        if self.event_index {
            let event = self.next_available.wrapping_add(seen);
            self.used.store(usize::from(self.size).wrapping_mul(8).wrapping_add(4), event);
        } else {
            self.used.store(0, 0);
        }
        barrier();
        Ok(self.available(self.size.max(1))? > seen)
    }
}

#[cfg(test)]
mod test;
