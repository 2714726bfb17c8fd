//! Writes, zeroes and discards.
//!
//! The order for a grain that is not there: room at the end of the file, what the write does not cover, the data, and
//! then the table. A failure before the last step leaves the disk as it was.

use super::{BLOCK_LOCKS, Layout, Mapped, Place, Room, lock};
use crate::buffers::{Buffers, ReadInto};
use crate::endian::size;
use crate::storage::Storage;
use std::io;

/// What is written.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// These bytes.
    Bytes(&'a dyn Buffers),
    /// As many zeroes; their place may be a hole.
    Zeroes(u64, bool),
}

impl Source<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(buffers) => buffers.len(),
            Self::Zeroes(len, _) => *len,
        }
    }

    /// Writes `len` bytes from `at` on to a place in the file.
    fn write(&self, at: u64, len: u64, storage: &dyn Storage, to: u64) -> io::Result<()> {
        match self {
            Self::Bytes(buffers) => storage.write(to, *buffers, at, len),
            Self::Zeroes(_, unmap) if *unmap && storage.punch_hole(to, len).is_ok() => Ok(()),
            Self::Zeroes(..) => storage.zero_range(to, len),
        }
    }
}

impl<L: Layout> Mapped<L> {
    fn block_lock(&self, offset: u64) -> std::sync::MutexGuard<'_, ()> {
        let number = offset >> (self.layout.block().trailing_zeros() & 63);
        let [first, ..] = &self.blocks;
        lock(self.blocks.get(size(number) % BLOCK_LOCKS).unwrap_or(first))
    }

    /// Writes all of `source` at `offset`. Inside the gate.
    pub(super) fn write_inside(&self, offset: u64, source: Source<'_>) -> io::Result<()> {
        let len = source.len();
        let mut done = 0u64;
        while done < len {
            let (at, left) = (offset.saturating_add(done), len.saturating_sub(done));
            let (place, run) = self.locate(at, left)?;
            let wrote = match place {
                Place::At(host) => {
                    source.write(done, run, self.storage.as_ref(), host)?;
                    run
                }
                _ => self.write_new(at, source, done, left)?,
            };
            done = done.saturating_add(wrote);
        }
        Ok(())
    }

    /// Writes the beginning of `source` from its byte `from` on, of which `left` are left, where grains are not there yet.
    /// Answers how much.
    fn write_new(&self, offset: u64, source: Source<'_>, from: u64, left: u64) -> io::Result<u64> {
        let block = self.layout.block();
        let most = left.min(block.saturating_sub(offset & block.wrapping_sub(1)));
        let _block = self.block_lock(offset);
        let (place, len) = self.locate(offset, most)?;
        if let Place::At(host) = place {
            // Somebody else was here first.
            source.write(from, len, self.storage.as_ref(), host)?;
            return Ok(len);
        }
        let room = self.layout.room(&self.sectors, offset)?;
        let written = self.fill(offset, len, place, room).and_then(|()| match source {
            Source::Zeroes(..) if room.new.is_some() => Ok(()),
            source => source.write(from, len, self.storage.as_ref(), room.at),
        });
        let stored = written.and_then(|()| self.layout.store(&self.sectors, offset, len, room));
        if let Err(error) = stored {
            if let Some(new) = room.new {
                self.layout.give_back(&self.sectors, new);
            }
            return Err(error);
        }
        Ok(len)
    }

    /// Writes what a write does not cover of the grains that it touches, as they are.
    fn fill(&self, offset: u64, len: u64, place: Place, room: Room) -> io::Result<()> {
        let grain = self.layout.grain();
        let within = offset & grain.wrapping_sub(1);
        let end = offset.saturating_add(len);
        let behind = end.checked_next_multiple_of(grain).unwrap_or(end).saturating_sub(end);
        self.fill_part(offset.saturating_sub(within), within, room.at.saturating_sub(within), place, room)?;
        self.fill_part(end, behind, room.at.saturating_add(len), place, room)
    }

    fn fill_part(&self, offset: u64, len: u64, to: u64, place: Place, room: Room) -> io::Result<()> {
        // Beyond the disk's end there are zeroes.
        let there = self.layout.capacity().saturating_sub(offset).min(len);
        let zero = place == Place::Zero || (place == Place::Below && self.nothing_below(offset));
        match (zero, room.new) {
            _ if len == 0 => Ok(()),
            (true, Some(_)) => Ok(()),
            (true, None) => self.storage.zero_range(to, len),
            (false, _) => {
                let mut bytes = vec![0; size(len)];
                let piece = bytes.get_mut(..size(there)).unwrap_or_default();
                self.read_inside(offset, &ReadInto::new(piece))?;
                self.storage.write_bytes(to, &bytes)
            }
        }
    }

    /// Inside the gate.
    pub(super) fn discard_inside(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0u64;
        while done < len {
            let at = offset.saturating_add(done);
            let (place, run) = self.locate(at, len.saturating_sub(done))?;
            if let Place::At(host) = place {
                match self.storage.punch_hole(host, run) {
                    // A hint that cannot be followed is no failure.
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                    other => other?,
                }
            }
            done = done.saturating_add(run);
        }
        Ok(())
    }

    /// Inside the gate.
    pub(super) fn zero_inside(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mut done = 0u64;
        while done < len {
            let (at, left) = (offset.saturating_add(done), len.saturating_sub(done));
            let (place, run) = self.locate(at, left)?;
            let nothing = place == Place::Zero || (place == Place::Below && self.nothing_below(at));
            let wrote = if nothing {
                run
            } else if let Place::At(host) = place {
                Source::Zeroes(run, unmap).write(0, run, self.storage.as_ref(), host)?;
                run
            } else {
                self.zero_new(at, run, unmap)?
            };
            done = done.saturating_add(wrote);
        }
        Ok(())
    }

    /// Zeroes over what is below: whole grains are noted, parts are written. Answers how much.
    fn zero_new(&self, offset: u64, len: u64, unmap: bool) -> io::Result<u64> {
        let (grain, block) = (self.layout.grain(), self.layout.block());
        let within = offset & grain.wrapping_sub(1);
        let end = offset.saturating_add(len);
        // The disk's last grain may end early.
        let whole_end = if end == self.layout.capacity() { end } else { end & !grain.wrapping_sub(1) };
        if within == 0 && whole_end > offset {
            let block_left = block.saturating_sub(offset & block.wrapping_sub(1));
            let most = whole_end.saturating_sub(offset).min(block_left);
            let _block = self.block_lock(offset);
            let (place, run) = self.locate(offset, most)?;
            if place != Place::Below {
                // Somebody else was here first: looked at again.
                return Ok(0);
            }
            if self.layout.set_zero(&self.sectors, offset, run)? {
                return Ok(run);
            }
        }
        let head = if within == 0 { len } else { len.min(grain.saturating_sub(within)) };
        self.write_new(offset, Source::Zeroes(head, unmap), 0, head)
    }
}
