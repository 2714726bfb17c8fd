//! The sectors of a file that hold its tables, kept in memory and written back by a flush.
//!
//! A sector (512 bytes) is what a disk writes whole or not at all, so it is the unit here: read when it is first looked at,
//! changed in memory, written in the order that [`Sectors::write_back`] gives. Other bytes of the file, the guest's data, never
//! come here.
//!
//! A sector is clean (as in the file), dirty, or being written; only clean ones may be forgotten. Locks: a shard's, held
//! for a lookup, for one read of the file, or to take what is dirty.

use crate::endian::{le64, put, size};
use crate::storage::Storage;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
const SHARDS: usize = 16;
/// Sectors of a shard that may be in memory before the clean ones are forgotten: 32 MiB in all.
const SHARD_MAX: usize = 4096;
/// Sectors that may be dirty.
const DIRTY_MAX: usize = 32_768;
/// Bytes that one write of neighbouring sectors has at most.
const WRITE_MAX: usize = 1 << 20;

/// The bytes of one.
pub type Bytes = [u8; SECTOR as usize];

/// What a sector's entries may point at, which says when it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// Data: written when the data is stable.
    Leaf,
    /// Leaves: written when those are stable.
    Root,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Clean,
    Dirty,
    Writing,
}

struct Sector {
    bytes: Box<Bytes>,
    state: State,
}

#[derive(Default)]
struct Shard {
    sectors: HashMap<u64, Sector>,
    leaves: BTreeSet<u64>,
    roots: BTreeSet<u64>,
}

impl Shard {
    fn dirty(&mut self, rank: Rank) -> &mut BTreeSet<u64> {
        if rank == Rank::Leaf { &mut self.leaves } else { &mut self.roots }
    }
}

/// See the module.
pub struct Sectors {
    storage: Arc<dyn Storage>,
    shards: [RwLock<Shard>; SHARDS],
    dirty: AtomicUsize,
}

/// Sectors taken for writing, in order, with what they held then.
type Taken = Vec<(u64, Bytes)>;

impl Sectors {
    /// None yet.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, shards: std::array::from_fn(|_| RwLock::default()), dirty: AtomicUsize::new(0) }
    }

    /// The file.
    pub fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    fn shard(&self, number: u64) -> &RwLock<Shard> {
        let [first, ..] = &self.shards;
        // Neighbours in different shards would make each table a user of all locks: eight in a row share one.
        self.shards.get(size(number >> 3) % SHARDS).unwrap_or(first)
    }

    fn reading(&self, number: u64) -> RwLockReadGuard<'_, Shard> {
        self.shard(number).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self, number: u64) -> RwLockWriteGuard<'_, Shard> {
        self.shard(number).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sector with this number (the file's first is 0); what is beyond the file's end reads as zeroes.
    pub fn read(&self, number: u64) -> io::Result<Bytes> {
        if let Some(sector) = self.reading(number).sectors.get(&number) {
            return Ok(*sector.bytes);
        }
        let mut shard = self.changing(number);
        Ok(*self.load(&mut shard, number)?.bytes)
    }

    fn load<'a>(&self, shard: &'a mut Shard, number: u64) -> io::Result<&'a mut Sector> {
        if !shard.sectors.contains_key(&number) && shard.sectors.len() >= SHARD_MAX {
            shard.sectors.retain(|_, sector| sector.state != State::Clean);
        }
        match shard.sectors.entry(number) {
            std::collections::hash_map::Entry::Occupied(sector) => Ok(sector.into_mut()),
            std::collections::hash_map::Entry::Vacant(place) => {
                let mut bytes = Box::new([0; SECTOR as usize]);
                self.storage.read_bytes(number.saturating_mul(SECTOR), &mut bytes[..])?;
                Ok(place.insert(Sector { bytes, state: State::Clean }))
            }
        }
    }

    /// Changes a sector.
    pub fn change(&self, number: u64, rank: Rank, with: impl FnOnce(&mut Bytes)) -> io::Result<()> {
        let mut shard = self.changing(number);
        let sector = self.load(&mut shard, number)?;
        with(&mut sector.bytes);
        sector.state = State::Dirty;
        if shard.dirty(rank).insert(number) {
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The little-endian word at an offset that is a multiple of eight.
    pub fn word(&self, at: u64) -> io::Result<u64> {
        Ok(le64(&self.read(at / SECTOR)?, size(at % SECTOR)))
    }

    /// Changes the bytes at an offset; they lie in one sector.
    pub fn set(&self, at: u64, rank: Rank, bytes: &[u8]) -> io::Result<()> {
        self.change(at / SECTOR, rank, |sector| put(sector, size(at % SECTOR), bytes))
    }

    /// More is in memory only than should be.
    pub fn is_full(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) > DIRTY_MAX
    }

    /// Forgets all that is clean: somebody has changed the file.
    pub fn forget(&self) {
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            shard.sectors.retain(|_, sector| sector.state != State::Clean);
        }
    }

    /// Forgets everything, also what was changed.
    pub fn forget_all(&self) {
        for shard in &self.shards {
            *shard.write().unwrap_or_else(PoisonError::into_inner) = Shard::default();
        }
        self.dirty.store(0, Ordering::Relaxed);
    }

    /// Writes what is dirty, so that at no moment anything in the file points at what is not there yet: data, a barrier,
    /// leaves, a barrier, roots, a barrier. `seal` may write more before the last one. One at a time.
    pub fn write_back(&self, seal: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // A leaf is changed before the root that points at it: roots taken first never point at leaves that are missing.
        let roots = self.take(Rank::Root);
        let leaves = self.take(Rank::Leaf);
        let done = self.write_ordered(&roots, &leaves, seal);
        self.settle(Rank::Root, &roots, done.is_ok());
        self.settle(Rank::Leaf, &leaves, done.is_ok());
        done
    }

    fn write_ordered(
        &self,
        roots: &Taken,
        leaves: &Taken,
        seal: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if !leaves.is_empty() || !roots.is_empty() {
            self.storage.flush()?;
        }
        self.write(leaves)?;
        if !leaves.is_empty() && !roots.is_empty() {
            self.storage.flush()?;
        }
        self.write(roots)?;
        seal()?;
        self.storage.flush()
    }

    fn take(&self, rank: Rank) -> Taken {
        let mut taken = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            let numbers = std::mem::take(shard.dirty(rank));
            self.dirty.fetch_sub(numbers.len(), Ordering::Relaxed);
            for number in numbers {
                if let Some(sector) = shard.sectors.get_mut(&number) {
                    sector.state = State::Writing;
                    taken.push((number, *sector.bytes));
                }
            }
        }
        taken.sort_unstable_by_key(|(number, _)| *number);
        taken
    }

    fn settle(&self, rank: Rank, taken: &Taken, written: bool) {
        for (number, _) in taken {
            let mut shard = self.changing(*number);
            let Some(sector) = shard.sectors.get_mut(number).filter(|one| one.state == State::Writing) else {
                continue;
            };
            sector.state = if written { State::Clean } else { State::Dirty };
            if !written && shard.dirty(rank).insert(*number) {
                self.dirty.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn write(&self, sectors: &Taken) -> io::Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut next = 0u64;
        let out = |run: &mut Vec<u8>, next: u64| {
            let start = next.saturating_mul(SECTOR).saturating_sub(run.len() as u64);
            let done = if run.is_empty() { Ok(()) } else { self.storage.write_bytes(start, run) };
            run.clear();
            done
        };
        for (number, bytes) in sectors {
            if *number != next || run.len() >= WRITE_MAX {
                out(&mut run, next)?;
            }
            run.extend_from_slice(bytes);
            next = number.saturating_add(1);
        }
        out(&mut run, next)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::storage::power::Power;

    #[test]
    fn what_is_changed_is_seen_at_once_and_written_in_order() {
        let power = Arc::new(Power::new(vec![7; 64 * 512]));
        let sectors = Sectors::new(power.clone());
        sectors.set(8, Rank::Root, &[1; 8]).unwrap();
        sectors.set(5 * 512, Rank::Leaf, &[2; 8]).unwrap();
        assert_eq!(sectors.word(8).unwrap(), u64::from_le_bytes([1; 8]));
        assert_eq!(sectors.word(0).unwrap(), u64::from_le_bytes([7; 8]));
        assert_eq!(power.moment(), 0, "nothing is written before a flush");
        sectors.write_back(|| Ok(())).unwrap();
        let mut byte = [0];
        // At no moment is the root there and the leaf not.
        for moment in 0..=power.moment() {
            let mut all = || 0;
            let bytes = power.cut(&[7; 64 * 512], moment, &mut all);
            assert!(bytes[8] == 7 || bytes[5 * 512] == 2);
        }
        power.read_bytes(8, &mut byte).unwrap();
        assert_eq!(byte, [1]);
        // The last one is written without a barrier before it where nothing else was changed.
        sectors.write_back(|| Ok(())).unwrap();
        assert!(!sectors.is_full());
    }

    #[test]
    fn clean_sectors_are_forgotten_and_changed_ones_are_not() {
        let power = Arc::new(Power::new(Vec::new()));
        let sectors = Sectors::new(power);
        sectors.set(0, Rank::Leaf, &[9]).unwrap();
        for number in 0..(SHARDS * SHARD_MAX * 2) as u64 {
            sectors.read(number).unwrap();
        }
        let kept: usize = sectors.shards.iter().map(|shard| shard.read().unwrap().sectors.len()).sum();
        assert!(kept <= SHARDS * SHARD_MAX);
        assert_eq!(sectors.read(0).unwrap()[0], 9);
    }
}
