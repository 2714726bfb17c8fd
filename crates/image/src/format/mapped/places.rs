//! Which rows of a file are in use, so that a check finds what is used twice. Takes memory for entries that it is given,
//! never for what a file only claims to be.

use super::SECTOR;
use crate::endian::size;
use crate::storage::Storage;
use std::collections::{BTreeMap, HashMap};
use std::io;

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;
/// Entries that are written behind one barrier.
const RENAMES_MAX: usize = 4096;

/// Rows that were met. Starts and lengths are bytes.
#[derive(Default)]
pub struct Places {
    /// Tables and headers: start and end.
    tables: BTreeMap<u64, u64>,
    data: Vec<(u64, u64)>,
}

/// Rows that are used by more than one, by their starts: whether the next one who asks may keep it.
#[derive(Default)]
pub struct Conflicts {
    starts: HashMap<u64, bool>,
    /// Users that cannot keep their row.
    count: u64,
}

fn last_before(rows: &BTreeMap<u64, u64>, end: u64) -> Option<u64> {
    rows.range(..end).next_back().map(|(_, end)| *end)
}

impl Places {
    /// Notes a table. Answers `false`, and notes nothing, where another one is.
    pub fn table(&mut self, start: u64, len: u64) -> bool {
        let end = start.saturating_add(len);
        let free = last_before(&self.tables, end).is_none_or(|other| other <= start);
        if free {
            self.tables.insert(start, end);
        }
        free
    }

    /// Notes a block's place.
    pub fn block(&mut self, start: u64, len: u64) {
        self.data.push((start, start.saturating_add(len)));
    }

    /// Where the last row ends.
    pub fn end(&self) -> u64 {
        let tables = self.tables.values().max().copied().unwrap_or(0);
        self.data.iter().map(|(_, end)| *end).max().unwrap_or(0).max(tables)
    }

    /// Holes between the rows, up to `to`.
    pub fn gaps(&mut self, to: u64) -> Vec<(u64, u64)> {
        let mut rows: Vec<(u64, u64)> = self.tables.iter().map(|(start, end)| (*start, *end)).collect();
        rows.extend_from_slice(&self.data);
        rows.sort_unstable();
        let (mut gaps, mut reached) = (Vec::new(), 0u64);
        for (start, end) in rows {
            if start.min(to) > reached {
                gaps.push((reached, start.min(to)));
            }
            reached = reached.max(end);
        }
        if reached < to {
            gaps.push((reached, to));
        }
        gaps
    }

    /// Blocks that lie where a table or another block is.
    pub fn conflicts(&mut self) -> Conflicts {
        self.data.sort_unstable();
        let mut conflicts = Conflicts::default();
        let mut reached = 0u64;
        for users in self.data.chunk_by(|a, b| a.0 == b.0) {
            let Some((start, end)) = users.last().copied() else { continue };
            let free = start >= reached && last_before(&self.tables, end).is_none_or(|table| table <= start);
            if free {
                reached = end;
            }
            if !free || users.len() > 1 {
                conflicts.starts.insert(start, free);
                let too_many = (users.len() as u64).saturating_sub(u64::from(free));
                conflicts.count = conflicts.count.saturating_add(too_many);
            }
        }
        conflicts
    }
}

impl Conflicts {
    /// Users that must get another row.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether a user of the row may keep it: at most one of all who ask may.
    pub fn claim(&mut self, start: u64) -> bool {
        self.starts.get_mut(&start).is_none_or(std::mem::take)
    }
}

/// Entries that are to name copies, written when those are stable: many at a time, since each barrier takes long.
#[derive(Default)]
pub struct Renames(Vec<(u64, Vec<u8>)>);

impl Renames {
    /// The entry at this place of the file is to be these bytes.
    pub fn push(&mut self, storage: &dyn Storage, at: u64, entry: &[u8]) -> io::Result<()> {
        self.0.push((at, entry.to_vec()));
        if self.0.len() < RENAMES_MAX { Ok(()) } else { self.write(storage) }
    }

    /// Writes all that are left.
    pub fn write(&mut self, storage: &dyn Storage) -> io::Result<()> {
        storage.flush()?;
        std::mem::take(&mut self.0).iter().try_for_each(|(at, entry)| storage.write_bytes(*at, entry))
    }
}

/// Copies a row to where there are zeroes; holes stay holes. Answers how many bytes were moved.
pub fn copy_row(storage: &dyn Storage, from: u64, to: u64, len: u64) -> io::Result<u64> {
    let (mut done, mut moved) = (0u64, 0u64);
    while done < len {
        let at = from.saturating_add(done);
        let extent = storage.extent(at, len.saturating_sub(done))?;
        let part = extent.len.clamp(1, len.saturating_sub(done));
        if extent.hole {
            done = done.saturating_add(part);
            continue;
        }
        let part = part.min(PIECE);
        let mut bytes = vec![0; size(part)];
        storage.read_bytes(at, &mut bytes)?;
        storage.write_bytes(to.saturating_add(done), &bytes)?;
        moved = moved.saturating_add(part);
        done = done.saturating_add(part);
    }
    Ok(moved)
}

/// Calls `with` for each run of a table that is stored, in pieces that begin at a multiple of a sector from its start: their
/// place in the table, and the bytes. Holes, which are zeroes, are left out: a sparse file may claim tables of any size.
pub fn each_piece(
    storage: &dyn Storage,
    table: u64,
    len: u64,
    mut with: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0u64;
    while done < len {
        let at = table.saturating_add(done);
        let extent = storage.extent(at, len.saturating_sub(done))?;
        let part = extent.len.clamp(1, len.saturating_sub(done));
        // Whole sectors, so that no entry is cut.
        let whole = if done.saturating_add(part) == len { part } else { part & !(SECTOR - 1) };
        if extent.hole && whole > 0 {
            done = done.saturating_add(whole);
            continue;
        }
        let part = part.checked_next_multiple_of(SECTOR).unwrap_or(part).min(PIECE);
        let part = part.min(len.saturating_sub(done));
        let mut bytes = vec![0; size(part)];
        storage.read_bytes(at, &mut bytes)?;
        with(done, &bytes)?;
        done = done.saturating_add(part);
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn one_keeps_a_row_and_the_others_do_not(
            tables in prop::collection::vec((0u64..40, 1u64..4), 0..6),
            starts in prop::collection::vec(0u64..60, 0..30),
        ) {
            let mut places = Places::default();
            let mut held = [0u32; 80];
            for (start, len) in tables {
                if places.table(start, len) {
                    held[start as usize..(start + len) as usize].iter_mut().for_each(|users| *users += 1);
                }
            }
            prop_assert!(held.iter().all(|users| *users < 2), "tables do not overlap");
            starts.iter().for_each(|start| places.block(*start, 3));
            let mut conflicts = places.conflicts();
            let mut refused = 0;
            for start in &starts {
                if conflicts.claim(*start) {
                    held[*start as usize..*start as usize + 3].iter_mut().for_each(|users| *users += 1);
                } else {
                    refused += 1;
                }
            }
            prop_assert!(held.iter().all(|users| *users < 2), "{held:?}");
            prop_assert_eq!(refused, conflicts.count());
        }
    }
}
