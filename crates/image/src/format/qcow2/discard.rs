//! Discards and written zeroes.
//!
//! Whole units (clusters, or subclusters where the image has them) change their mapping; what lies at the edges is left
//! alone by a discard and written as zeroes by a write of zeroes.

use super::Qcow2;
use super::table::{COMPRESSED, COPIED, Entry, Mapping, ZERO};
use crate::buffers::WriteFrom;
use crate::disk::Disk;
use crate::endian::size;
use std::io;

/// Most clusters between two looks at the locks.
const STEP_CLUSTERS_MAX: u64 = 1024;

/// What is to become of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// They may read as zeroes.
    Discard,
    /// They read as zeroes and take no space.
    Unmap,
    /// They read as zeroes and keep their space.
    Keep,
}

impl Qcow2 {
    /// Forgets all that the image holds itself: it shows what is below it.
    pub fn empty(&self) -> io::Result<()> {
        self.check_write(0, 0)?;
        self.open_for_change()?;
        {
            let _quiet = self.quiesce()?;
            self.open_for_change()?;
            self.live.mark(0, self.capacity());
            let old = self.map.l1().words();
            self.each_reference(&old, &mut |_| Ok(()))?;
            self.switch_l1(vec![0; old.len()], None)?;
            self.each_reference(&old, &mut |cluster| {
                self.flush.release(cluster);
                Ok(())
            })?;
            self.flush_quiet()?;
        }
        self.flush_all()
    }

    /// Inside the gate.
    pub fn discard_inside(&self, offset: u64, len: u64) -> io::Result<()> {
        let unit = self.shape.unit();
        let end = offset.saturating_add(len);
        let start = offset.checked_next_multiple_of(unit).unwrap_or(end);
        // The last unit of the disk may end early.
        let stop = if end == self.capacity() { end } else { end & !unit.wrapping_sub(1) };
        if start < stop { self.unmap(start, stop, How::Discard) } else { Ok(()) }
    }

    /// Inside the gate.
    pub fn zero_inside(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let unit = self.shape.unit();
        let end = offset.saturating_add(len);
        let start = offset.checked_next_multiple_of(unit).unwrap_or(end).min(end);
        let stop = if end == self.capacity() { end } else { end & !unit.wrapping_sub(1) };
        if start >= stop {
            return self.write_zero_bytes(offset, end);
        }
        self.write_zero_bytes(offset, start)?;
        self.write_zero_bytes(stop, end)?;
        self.unmap_or_write(start, stop, unmap)
    }

    /// Zeroes for parts of units: nothing is done where zeroes are.
    fn write_zero_bytes(&self, from: u64, to: u64) -> io::Result<()> {
        static ZEROES: [u8; 65536] = [0; 65536];
        let mut at = from;
        while at < to {
            let run = self.lookup(at, to.saturating_sub(at))?;
            let zero = match run.mapping {
                Mapping::Zero => true,
                Mapping::Unallocated => self.nothing_below(at),
                _ => false,
            };
            let part = if zero { run.len } else { run.len.min(ZEROES.len() as u64) };
            if !zero {
                let bytes = ZEROES.get(..size(part)).unwrap_or_default();
                self.write_inside(at, &WriteFrom(bytes), part)?;
            }
            at = at.saturating_add(part);
        }
        Ok(())
    }

    fn unmap_or_write(&self, start: u64, stop: u64, unmap: bool) -> io::Result<()> {
        if self.shape.data_file {
            return self.zero_data_file(start, stop, unmap);
        }
        let can_unmap = unmap && self.backing.is_none();
        if !self.shape.zero_flag && !can_unmap {
            // Version 2 has no way to say zero: over a backing file they must be written.
            return self.write_zero_bytes(start, stop);
        }
        self.unmap(start, stop, if unmap { How::Unmap } else { How::Keep })
    }

    /// Makes whole units read as zeroes.
    fn unmap(&self, start: u64, stop: u64, how: How) -> io::Result<()> {
        let keep = how == How::Keep;
        if self.shape.data_file {
            return self.zero_data_file(start, stop, true);
        }
        if !self.shape.zero_flag && self.backing.is_some() {
            // Version 2: what is below would show again.
            return Ok(());
        }
        let cluster = self.shape.cluster();
        let mut at = start;
        while at < stop {
            let run = self.lookup(at, stop.saturating_sub(at))?;
            let nothing = match run.mapping {
                Mapping::Unallocated => self.nothing_below(at),
                // What is preallocated gives its space back.
                Mapping::Zero => keep,
                _ => false,
            };
            if nothing {
                at = at.saturating_add(run.len);
                continue;
            }
            let most = STEP_CLUSTERS_MAX.saturating_mul(cluster).saturating_sub(self.shape.within(at));
            let end = at.saturating_add(run.len.min(most)).min(stop);
            let part = self.shape.within(at) != 0 || (self.shape.within(end) != 0 && end != self.capacity());
            if run.mapping == Mapping::Compressed && part {
                // A part of a compressed cluster cannot be taken out.
                if how != How::Discard {
                    self.write_zero_bytes(at, end)?;
                }
            } else {
                self.unmap_run(at, end, keep)?;
            }
            at = end;
        }
        Ok(())
    }

    /// One run within a table.
    fn unmap_run(&self, start: u64, stop: u64, keep: bool) -> io::Result<()> {
        let shape = &self.shape;
        let number = |at: u64| at >> (shape.cluster_bits & 63);
        let _clusters = self.lock_clusters(number(start), number(stop.saturating_sub(1)));
        let table = self.writable_table(start)?;
        let mut entries = Vec::new();
        let mut at = start;
        while at < stop {
            let end = at.saturating_sub(shape.within(at)).saturating_add(shape.cluster()).min(stop);
            let old = table.entry(shape.l2_index(at));
            if old == Entry::BROKEN {
                return Err(self.damage(&format!("the L2 entry for offset {at:#x} breaks the rules")));
            }
            if let Some(new) = self.zeroed(old, at, end, keep) {
                entries.push((at, old, new));
            }
            at = end;
        }
        self.set_entries(start, &entries)
    }

    /// What an entry becomes when the units from `at` to `end` of its cluster are to read as zeroes; `None` if it is to stay.
    fn zeroed(&self, old: Entry, at: u64, end: u64, keep: bool) -> Option<Entry> {
        let shape = &self.shape;
        let start = at.saturating_sub(shape.within(at));
        let reaches_end = end == self.capacity();
        let whole = at == start && (end == start.saturating_add(shape.cluster()) || reaches_end);
        let below = !self.nothing_below(start);
        let kept = keep && old.owned(shape);
        let new = match (shape.extended, whole) {
            (false, _) => {
                let mark = if below || kept || !whole { ZERO } else { 0 };
                Entry {
                    word: if kept {
                        old.host() | COPIED | ZERO
                    } else if shape.zero_flag {
                        mark
                    } else {
                        0
                    },
                    bitmap: 0,
                }
            }
            (true, true) => {
                let zeroes = if below || kept { 0xffff_ffff << 32 } else { 0 };
                Entry { word: if kept { old.host() | COPIED } else { 0 }, bitmap: zeroes }
            }
            // Somebody else has compressed it meanwhile: as if that had come later.
            (true, false) if old.word & COMPRESSED != 0 => return None,
            (true, false) => {
                let last = shape.sub(end.saturating_sub(1));
                let units = (shape.sub(at)..=last).fold(0u64, |bits, unit| bits | 1 << (unit & 31));
                Entry { word: old.word, bitmap: old.bitmap & !units | units << 32 }
            }
        };
        (new != old).then_some(new)
    }

    /// With an external data file the zeroes are in that file too, so that it can be read as a raw image.
    fn zero_data_file(&self, start: u64, stop: u64, unmap: bool) -> io::Result<()> {
        let mut at = start;
        while at < stop {
            let run = self.lookup(at, stop.saturating_sub(at))?;
            match run.mapping {
                Mapping::Data if run.owned => {
                    let punched = unmap && self.data().punch_hole(run.host, run.len).is_ok();
                    if !punched {
                        self.data().zero_range(run.host, run.len)?;
                    }
                }
                Mapping::Zero => {}
                Mapping::Unallocated if self.nothing_below(at) => {}
                _ => self.write_zero_bytes(at, at.saturating_add(run.len))?,
            }
            at = at.saturating_add(run.len);
        }
        Ok(())
    }
}
