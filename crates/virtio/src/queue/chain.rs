//! Descriptor chains (2.7.5): parsed and checked as a whole, then used.

use super::{RingError, total};
use device::block::Segment;
use memory::GuestMemory;

pub(super) const DESCRIPTOR_SIZE: u64 = 16;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// One half of a chain: what the device reads, or what it writes. Every segment is RAM and not empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Piece {
    segments: Vec<Segment>,
}

/// A buffer that the driver has handed to the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its first descriptor, or the id of a packed queue's buffer, for [`super::Queue::push`].
    pub head: u16,
    /// What the device reads.
    pub readable: Piece,
    /// What the device writes.
    pub writable: Piece,
}

impl Piece {
    /// Bytes.
    pub fn len(&self) -> u64 {
        total(&self.segments)
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The segments of the `len` bytes from byte `from` on, as far as they exist.
    pub fn slice(&self, from: u64, len: u64) -> Vec<Segment> {
        let (mut skip, mut left) = (from, len);
        let mut part = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let size = u64::from(segment.len);
            if skip >= size {
                skip = skip.wrapping_sub(size);
                continue;
            }
            let take = size.wrapping_sub(skip).min(left);
            if take == 0 {
                break;
            }
            // `take` is at most a segment's length, so it fits.
            let len = u32::try_from(take).unwrap_or(u32::MAX);
            part.push(Segment { address: segment.address.wrapping_add(skip), len });
            left = left.wrapping_sub(take);
            skip = 0;
        }
        part
    }

    /// Copies bytes from byte `from` on out of RAM; answers how many there were.
    pub fn read(&self, memory: &GuestMemory, from: u64, into: &mut [u8]) -> Result<usize, RingError> {
        let mut done = 0usize;
        for segment in self.slice(from, into.len() as u64) {
            let end = done.saturating_add(segment.len as usize);
            let Some(part) = into.get_mut(done..end) else { break };
            memory.read(segment.address, part)?;
            done = end;
        }
        Ok(done)
    }

    /// Copies bytes into RAM from byte `from` of the piece on; answers how many had room.
    pub fn write(&self, memory: &GuestMemory, from: u64, bytes: &[u8]) -> Result<usize, RingError> {
        let mut done = 0usize;
        for segment in self.slice(from, bytes.len() as u64) {
            let end = done.saturating_add(segment.len as usize);
            let Some(part) = bytes.get(done..end) else { break };
            memory.write(segment.address, part)?;
            done = end;
        }
        Ok(done)
    }
}

/// A descriptor table: the queue's own or an indirect one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub address: u64,
    pub len: u16,
    /// The most descriptors a chain may have. For direct chains the table is the tighter bound (2.7.5.3.1); indirect
    /// ones get the largest size of the queue, whatever size the driver chose.
    pub size_max: u16,
}

pub(super) struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    /// The next one of the chain; in packed rings the buffer's id stands in front of the flags instead.
    pub next: u16,
}

impl Table {
    fn get(&self, memory: &GuestMemory, index: u16) -> Result<Option<Descriptor>, RingError> {
        if index >= self.len {
            return Ok(None);
        }
        let at = self.address.wrapping_add(u64::from(index).wrapping_mul(DESCRIPTOR_SIZE));
        let raw = u128::from_le_bytes(memory.read_array(at)?);
        Ok(Some(Descriptor {
            address: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        }))
    }
}

/// Adds what a descriptor describes to the piece that it belongs to.
pub(super) fn add(
    memory: &GuestMemory,
    descriptor: &Descriptor,
    (readable, writable): (&mut Piece, &mut Piece),
    head: u16,
) -> Result<(), RingError> {
    let write = descriptor.flags & WRITE != 0;
    if descriptor.len > 0 {
        let len = u64::from(descriptor.len);
        if !memory.contains(descriptor.address, len) {
            return Err(memory::AccessError { address: descriptor.address, len }.into());
        }
        let segment = Segment { address: descriptor.address, len: descriptor.len };
        if write { &mut *writable } else { readable }.segments.push(segment);
    }
    if !write && !writable.is_empty() {
        return Err(RingError::Chain { head, why: "a readable piece after a writable one" });
    }
    Ok(())
}

/// Walks the chain from `head`. Each descriptor is read once, so a driver that changes it meanwhile gains nothing.
pub(super) fn parse(
    memory: &GuestMemory,
    mut table: Table,
    head: u16,
    indirect_agreed: bool,
) -> Result<Chain, RingError> {
    let wrong = |why| RingError::Chain { head, why };
    let (mut readable, mut writable) = (Piece::default(), Piece::default());
    let (mut index, mut indirect) = (head, false);
    let mut room = table.len;
    loop {
        let Some(next_room) = room.checked_sub(1) else { return Err(wrong("more descriptors than allowed")) };
        room = next_room;
        let descriptor =
            table.get(memory, index)?.ok_or_else(|| wrong("an index outside the descriptor table"))?;
        if descriptor.flags & INDIRECT != 0 {
            if indirect || !indirect_agreed {
                return Err(wrong("an indirect table where none may be"));
            }
            if descriptor.flags & NEXT != 0 {
                return Err(wrong("an indirect table that is not the last"));
            }
            let len = u64::from(descriptor.len);
            if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
                return Err(wrong("an indirect table that is not whole descriptors"));
            }
            let entries = u16::try_from(len / DESCRIPTOR_SIZE).unwrap_or(u16::MAX);
            indirect = true;
            index = 0;
            room = table.size_max;
            table = Table { address: descriptor.address, len: entries, ..table };
            continue;
        }
        add(memory, &descriptor, (&mut readable, &mut writable), head)?;
        if descriptor.flags & NEXT == 0 {
            return Ok(Chain { head, readable, writable });
        }
        index = descriptor.next;
    }
}
