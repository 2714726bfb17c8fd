//! The L1 table and the cache of L2 tables.
//!
//! A lookup takes no lock: it loads two pointers. A table that is not there is read under one of a few locks by its
//! number, so that it is in memory at most once; it leaves when the cache is full and it was not used since the last
//! round, and never while the file lacks some of it.
//!
//! Lock order: a loading lock, then the cache's list, then a table's own lock, then the lists of what is dirty; none is held
//! while data moves.

use super::table::{COPIED, Entry, L1_RESERVED, OFFSET, Shape, Table};
use crate::endian::{size, words_be};
use crate::storage::Storage;
use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Bytes of L2 tables kept in memory.
const CACHE_BYTES_MAX: u64 = 32 << 20;
const LOADING: usize = 16;

/// An entry of the active L1 table.
pub struct Slot {
    /// As it stands, or is to stand, in the file.
    pub word: AtomicU64,
    table: ArcSwapOption<Table>,
}

/// The active L1 table.
pub struct L1 {
    pub slots: Box<[Slot]>,
    /// Its place in the file.
    pub offset: u64,
}

/// Clusters that hold metadata: no guest data may be there. A bit for each, in words by the rest of its number: those of a
/// hostile image are far from each other.
#[derive(Default)]
pub struct Metadata(HashMap<u64, u64>);

impl Metadata {
    /// Adds a cluster by its number.
    pub fn insert(&mut self, cluster: u64) {
        *self.0.entry(cluster >> 6).or_default() |= 1 << (cluster & 63);
    }

    /// Removes a cluster.
    pub fn remove(&mut self, cluster: u64) {
        if let Some(word) = self.0.get_mut(&(cluster >> 6)) {
            *word &= !(1 << (cluster & 63));
        }
    }

    /// Words in memory.
    #[cfg(test)]
    pub fn words(&self) -> usize {
        self.0.len()
    }

    /// Whether the cluster holds metadata.
    pub fn contains(&self, cluster: u64) -> bool {
        let word = self.0.get(&(cluster >> 6));
        word.is_some_and(|word| word >> (cluster & 63) & 1 != 0)
    }
}

/// See the module.
pub struct Map {
    shape: Shape,
    l1: ArcSwap<L1>,
    loading: [Mutex<()>; LOADING],
    /// Numbers of the tables in memory, in the order in which the cache looks at them.
    cached: Mutex<VecDeque<usize>>,
    /// Numbers of tables of which the file lacks something.
    dirty: Mutex<BTreeSet<usize>>,
    /// How many: every write asks.
    dirty_count: AtomicUsize,
    /// Numbers of L1 entries that the file does not know.
    l1_dirty: Mutex<BTreeSet<usize>>,
    pub metadata: RwLock<Metadata>,
    /// What a test does at the moment before a table is listed.
    #[cfg(test)]
    pub before_listing: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl L1 {
    /// A table of these words.
    pub fn new(words: impl IntoIterator<Item = u64>, offset: u64) -> Self {
        let slots = words.into_iter();
        let slots = slots.map(|word| Slot { word: AtomicU64::new(word), table: ArcSwapOption::empty() });
        Self { slots: slots.collect(), offset }
    }

    /// All words.
    pub fn words(&self) -> Vec<u64> {
        self.slots.iter().map(|slot| slot.word.load(Ordering::Acquire)).collect()
    }
}

impl Map {
    /// The map of an image with this L1 table.
    pub fn new(shape: Shape, l1: L1, metadata: Metadata) -> Self {
        Self {
            shape,
            l1: ArcSwap::from_pointee(l1),
            loading: Default::default(),
            cached: Mutex::default(),
            dirty: Mutex::default(),
            dirty_count: AtomicUsize::new(0),
            l1_dirty: Mutex::default(),
            metadata: RwLock::new(metadata),
            #[cfg(test)]
            before_listing: Mutex::default(),
        }
    }

    #[cfg(test)]
    fn pause(&self) {
        let pause = lock(&self.before_listing).take();
        if let Some(pause) = pause {
            pause();
        }
    }

    #[cfg(not(test))]
    fn pause(&self) {}

    /// The L1 table.
    pub fn l1(&self) -> Arc<L1> {
        self.l1.load_full()
    }

    /// Puts another L1 table in place; nothing is in memory of its tables. Only while the gate is closed and nothing is
    /// dirty.
    pub fn replace(&self, l1: L1) {
        lock(&self.cached).clear();
        self.l1.store(Arc::new(l1));
    }

    /// Calls `with` with the table that maps the disk from the L1 entry `index` on, or with `None` if there is none.
    pub fn with<R>(
        &self,
        storage: &dyn Storage,
        index: usize,
        with: impl FnOnce(Option<&Table>) -> R,
    ) -> io::Result<R> {
        let l1 = self.l1.load();
        let Some(slot) = l1.slots.get(index) else { return Ok(with(None)) };
        let table: Guard<Option<Arc<Table>>> = slot.table.load();
        if let Some(table) = table.as_deref() {
            if !table.used.load(Ordering::Relaxed) {
                table.used.store(true, Ordering::Relaxed);
            }
            return Ok(with(Some(table)));
        }
        if slot.word.load(Ordering::Acquire) & OFFSET == 0 {
            return Ok(with(None));
        }
        let _loading = self.loading(index);
        Ok(with(self.load(storage, &l1, index)?.as_deref()))
    }

    fn loading(&self, index: usize) -> MutexGuard<'_, ()> {
        let [first, ..] = &self.loading;
        lock(self.loading.get(index % LOADING).unwrap_or(first))
    }

    /// The table, from memory or the file. Under the loading lock.
    fn load(&self, storage: &dyn Storage, l1: &L1, index: usize) -> io::Result<Option<Arc<Table>>> {
        let Some(slot) = l1.slots.get(index) else { return Ok(None) };
        if let Some(table) = slot.table.load_full() {
            return Ok(Some(table));
        }
        let word = slot.word.load(Ordering::Acquire);
        let host = word & OFFSET;
        if host == 0 {
            return Ok(None);
        }
        let bad = word & L1_RESERVED != 0 || self.shape.within(host) != 0 || host >= storage.len();
        if bad || self.is_header(host) {
            let text = format!(
                "the L1 entry {index} points nowhere: the image is damaged; `yado image check` says more"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut bytes = vec![0; size(self.shape.cluster())];
        storage.read_bytes(host, &mut bytes)?;
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        let end = storage.len();
        let sound = |entry: &Entry| self.points_at_data(entry, &metadata, end);
        let table = Arc::new(Table::new(self.shape, index, host, words_be(&bytes).collect(), sound));
        drop(metadata);
        self.keep(l1, &table);
        slot.table.store(Some(table.clone()));
        Ok(Some(table))
    }

    fn is_header(&self, host: u64) -> bool {
        host < self.shape.cluster()
    }

    /// Whether an entry's data is inside the file and not where metadata is.
    fn points_at_data(&self, entry: &Entry, metadata: &Metadata, end: u64) -> bool {
        let cluster = |offset: u64| offset >> (self.shape.cluster_bits & 63);
        if entry.word & super::table::COMPRESSED != 0 {
            let (offset, len) = self.shape.compressed(entry.word);
            let last = offset.saturating_add(len.saturating_sub(1));
            return offset < end
                && !self.is_header(offset)
                && (cluster(offset)..=cluster(last)).all(|at| !metadata.contains(at));
        }
        let host = entry.host();
        self.shape.data_file || host == 0 || (host < end && !metadata.contains(cluster(host)))
    }

    /// Notes that a table is in memory, and lets others go when there are too many.
    fn keep(&self, l1: &L1, table: &Table) {
        let most = size(CACHE_BYTES_MAX >> (self.shape.cluster_bits & 63)).max(8);
        let mut cached = lock(&self.cached);
        cached.push_back(table.index);
        // Two rounds: the first takes the marks of use away.
        let mut tries = cached.len().saturating_mul(2).min(64);
        while cached.len() > most && tries > 0 {
            tries = tries.saturating_sub(1);
            let Some(index) = cached.pop_front() else { break };
            let Some(slot) = l1.slots.get(index) else { continue };
            let Some(old) = slot.table.load_full() else { continue };
            let recent = old.used.swap(false, Ordering::Relaxed) || index == table.index;
            if recent || !old.change().is_none_or(super::table::Change::leave) {
                cached.push_back(index);
            } else {
                slot.table.store(None);
            }
        }
    }

    /// The table for the L1 entry `index`, fit to be changed: made if there is none, copied if a snapshot shares it.
    /// `allocate` gives the offset of a new cluster; `share` hears of the cluster of a table that was shared.
    pub fn writable(
        &self,
        storage: &dyn Storage,
        index: usize,
        allocate: impl FnOnce() -> io::Result<u64>,
        share: impl FnOnce(u64),
    ) -> io::Result<Arc<Table>> {
        let l1 = self.l1.load();
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "the disk is larger than its L1 table");
        let slot = l1.slots.get(index).ok_or_else(outside)?;
        if slot.word.load(Ordering::Acquire) & COPIED != 0
            && let Some(table) = slot.table.load_full()
        {
            return Ok(table);
        }
        let _loading = self.loading(index);
        let old = self.load(storage, &l1, index)?;
        let word = slot.word.load(Ordering::Acquire);
        if let Some(table) = old.as_ref().filter(|_| word & COPIED != 0) {
            return Ok(table.clone());
        }
        let host = allocate()?;
        let words = old.as_ref().map_or_else(|| vec![0; self.words()], |table| table.words());
        // What was broken stays so.
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        let end = storage.len();
        let table = Table::new(self.shape, index, host, words, |entry| {
            old.is_none() || self.points_at_data(entry, &metadata, end)
        });
        drop(metadata);
        let table = Arc::new(table);
        table.all_dirty();
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(host >> (self.shape.cluster_bits & 63));
        if let Some(change) = old.as_ref().and_then(|old| old.change()) {
            change.replaced();
        } else {
            self.keep(&l1, &table);
        }
        {
            // Both lists are held: who finds the table, which is dirty from the start, counts on its being listed.
            let (mut dirty, mut l1_dirty) = (lock(&self.dirty), lock(&self.l1_dirty));
            slot.word.store(host | COPIED, Ordering::Release);
            slot.table.store(Some(table.clone()));
            self.pause();
            dirty.insert(index);
            self.dirty_count.store(dirty.len(), Ordering::Relaxed);
            l1_dirty.insert(index);
        }
        if word & OFFSET != 0 {
            share(word & OFFSET);
        }
        Ok(table)
    }

    /// Says in the L1 entry `index` whether the image has the table alone, and answers the table. Only while the gate is
    /// closed.
    pub fn mark_slot(
        &self,
        storage: &dyn Storage,
        index: usize,
        alone: bool,
    ) -> io::Result<Option<Arc<Table>>> {
        let l1 = self.l1.load();
        let Some(slot) = l1.slots.get(index) else { return Ok(None) };
        let word = slot.word.load(Ordering::Acquire);
        let marked = if alone { word | COPIED } else { word & !COPIED };
        if marked != word {
            slot.word.store(marked, Ordering::Release);
            lock(&self.l1_dirty).insert(index);
        }
        let _loading = self.loading(index);
        self.load(storage, &l1, index)
    }

    /// Words of a table.
    pub fn words(&self) -> usize {
        size(self.shape.cluster() / 8)
    }

    /// Notes that the file lacks something of a table.
    pub fn note_dirty(&self, table: &Table) {
        self.pause();
        let mut dirty = lock(&self.dirty);
        dirty.insert(table.index);
        self.dirty_count.store(dirty.len(), Ordering::Relaxed);
    }

    /// How many tables the file lacks something of.
    pub fn dirty_tables(&self) -> usize {
        self.dirty_count.load(Ordering::Relaxed)
    }

    /// L1 entries that the file does not know: number and word. To be taken before the tables.
    pub fn take_l1_dirty(&self) -> Vec<(usize, u64)> {
        let numbers = std::mem::take(&mut *lock(&self.l1_dirty));
        let l1 = self.l1.load();
        let word = |index: usize| l1.slots.get(index).map_or(0, |slot| slot.word.load(Ordering::Acquire));
        numbers.into_iter().map(|index| (index, word(index))).collect()
    }

    /// Tables that the file does not wholly know.
    pub fn take_dirty(&self) -> Vec<Arc<Table>> {
        let numbers = {
            let mut dirty = lock(&self.dirty);
            self.dirty_count.store(0, Ordering::Relaxed);
            std::mem::take(&mut *dirty)
        };
        let l1 = self.l1.load();
        numbers.into_iter().filter_map(|index| l1.slots.get(index)?.table.load_full()).collect()
    }

    /// Puts back what could not be written.
    pub fn dirty_again(&self, l1: &[(usize, u64)], tables: &[Arc<Table>]) {
        lock(&self.l1_dirty).extend(l1.iter().map(|(index, _)| *index));
        for table in tables {
            table.all_dirty();
            self.note_dirty(table);
        }
    }
}
