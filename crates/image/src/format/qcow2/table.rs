//! L2 tables in memory, and what their entries mean.
//!
//! Reading an entry takes no lock: entries are atomics, and a count that is odd while an entry changes lets readers try
//! again (an extended entry is two words). Whoever changes entries holds the table's lock, and finds out under it whether
//! the table has left the cache meanwhile.
//!
//! Source: docs/interop/qcow2.rst, sections "Cluster mapping" and "Extended L2 Entries".

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Refcount is exactly one: the cluster can be written in place.
pub const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3, without subclusters).
pub const ZERO: u64 = 1;
/// The host offset of a standard entry or of an L1 entry.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// What must be zero in a standard entry; bit 0 is more than that in version 2 and with subclusters.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// What must be zero in an L1 entry.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// How an image divides its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// log2 of bytes in a cluster.
    pub cluster_bits: u32,
    /// Entries have 128 bits and 32 subclusters.
    pub extended: bool,
    /// Bit 0 of standard entries means zeroes.
    pub zero_flag: bool,
    /// Guest data is in a file of its own.
    pub data_file: bool,
}

impl Shape {
    /// Bytes in a cluster.
    pub fn cluster(&self) -> u64 {
        1 << (self.cluster_bits & 63)
    }

    /// log2 of bytes in the unit of mapping: a cluster, or a subcluster.
    pub fn unit_bits(&self) -> u32 {
        self.cluster_bits.saturating_sub(if self.extended { 5 } else { 0 })
    }

    /// Bytes in the unit of mapping.
    pub fn unit(&self) -> u64 {
        1 << (self.unit_bits() & 63)
    }

    /// Entries of an L2 table.
    pub fn entries(&self) -> usize {
        1 << (self.cluster_bits.saturating_sub(if self.extended { 4 } else { 3 }) & 31)
    }

    /// log2 of bytes that an L2 table maps.
    pub fn table_bits(&self) -> u32 {
        self.cluster_bits.saturating_mul(2).saturating_sub(if self.extended { 4 } else { 3 })
    }

    /// Bytes that an L2 table maps.
    pub fn table_span(&self) -> u64 {
        1 << (self.table_bits() & 63)
    }

    /// Where in its cluster an offset is.
    pub fn within(&self, offset: u64) -> u64 {
        offset & self.cluster().wrapping_sub(1)
    }

    /// The L1 entry that maps an offset of the disk.
    pub fn l1_index(&self, offset: u64) -> usize {
        crate::endian::size(offset >> (self.table_bits() & 63))
    }

    /// The L2 entry that maps an offset of the disk.
    pub fn l2_index(&self, offset: u64) -> usize {
        ((offset >> (self.cluster_bits & 63)) as usize) & self.entries().wrapping_sub(1)
    }

    /// The subcluster that an offset is in.
    pub fn sub(&self, offset: u64) -> u32 {
        if self.extended { ((offset >> (self.unit_bits() & 63)) & 31) as u32 } else { 0 }
    }

    /// Where a compressed cluster's bytes are: offset and length in the file (section "Compressed Clusters Descriptor").
    pub fn compressed(&self, descriptor: u64) -> (u64, u64) {
        let x = 62u32.saturating_sub(self.cluster_bits.saturating_sub(8));
        let offset = descriptor & (1u64 << (x & 63)).wrapping_sub(1);
        let sectors = (descriptor & COMPRESSED.wrapping_sub(1)) >> (x & 63);
        let len = sectors.saturating_add(1).saturating_mul(512).saturating_sub(offset & 511);
        (offset, len)
    }

    /// The descriptor of compressed bytes at a place in the file.
    pub fn compressed_entry(&self, offset: u64, len: u64) -> u64 {
        let x = 62u32.saturating_sub(self.cluster_bits.saturating_sub(8));
        let last = offset.saturating_add(len).saturating_sub(1);
        let sectors = (last >> 9).saturating_sub(offset >> 9);
        COMPRESSED | offset | sectors << (x & 63)
    }
}

/// An L2 entry; the second word is the subclusters' bitmap, zero without subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    pub word: u64,
    pub bitmap: u64,
}

/// How a unit (cluster or subcluster) is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Not in this image.
    Unallocated,
    /// Zeroes.
    Zero,
    /// In the file at the cluster's place.
    Data,
    /// Compressed, with the whole cluster.
    Compressed,
    /// The entry breaks the rules.
    Broken,
}

impl Entry {
    /// What an entry that breaks the rules is replaced by in memory.
    pub const BROKEN: Self = Self { word: u64::MAX, bitmap: u64::MAX };

    /// How a unit of the cluster is stored.
    pub fn mapping(&self, shape: &Shape, sub: u32) -> Mapping {
        if *self == Self::BROKEN {
            Mapping::Broken
        } else if self.word & COMPRESSED != 0 {
            Mapping::Compressed
        } else if shape.extended {
            match (self.bitmap >> (sub & 31) & 1, self.bitmap >> (sub & 31) >> 32 & 1) {
                (0, 0) => Mapping::Unallocated,
                (1, _) => Mapping::Data,
                _ => Mapping::Zero,
            }
        } else if self.word & ZERO != 0 {
            Mapping::Zero
        } else if self.has_host(shape) {
            Mapping::Data
        } else {
            Mapping::Unallocated
        }
    }

    /// Whether a cluster of the file (or of the data file) belongs to the entry.
    pub fn has_host(&self, shape: &Shape) -> bool {
        self.word & COMPRESSED == 0
            && (self.word & OFFSET != 0 || (shape.data_file && self.word & COPIED != 0))
    }

    /// The cluster's place in the file.
    pub fn host(&self) -> u64 {
        self.word & OFFSET
    }

    /// Whether the entry's own cluster can be written in place.
    pub fn owned(&self, shape: &Shape) -> bool {
        self.word & COPIED != 0 && self.has_host(shape)
    }

    /// Whether the entry keeps the format's own rules.
    pub fn is_sound(&self, shape: &Shape) -> bool {
        if self.word & COMPRESSED != 0 {
            return self.bitmap == 0 && !shape.data_file;
        }
        let reserved = if shape.zero_flag && !shape.extended { RESERVED } else { RESERVED | ZERO };
        let aligned = self.host() & shape.cluster().wrapping_sub(1) == 0;
        let allocated = self.bitmap & 0xffff_ffff;
        let (both, homeless) = (allocated & self.bitmap >> 32, allocated != 0 && !self.has_host(shape));
        let hostless_copied = self.host() == 0 && self.word & COPIED != 0 && !shape.data_file;
        self.word & reserved == 0 && aligned && both == 0 && !homeless && !hostless_copied
    }
}

/// An L2 table in memory.
pub struct Table {
    shape: Shape,
    /// Its number in the L1 table.
    pub index: usize,
    /// Its place in the file.
    pub host: u64,
    /// Words of entries that break the rules, as the file has them, by their place; readers see [`Entry::BROKEN`].
    broken: Vec<(usize, u64)>,
    words: Box<[AtomicU64]>,
    /// Odd while an entry changes.
    changes: AtomicU64,
    /// Pieces (64 of the table) that the file does not know yet.
    dirty: AtomicU64,
    /// A flush has taken pieces that are not in the file yet.
    pub writing: AtomicBool,
    /// Somebody has used the table since the cache last looked.
    pub used: AtomicBool,
    /// Held to change entries. True once the table has left the cache: it must not be changed any more.
    gone: Mutex<bool>,
}

/// The right to change a table's entries.
pub struct Change<'a> {
    table: &'a Table,
    gone: MutexGuard<'a, bool>,
}

impl Table {
    /// A table of these words; entries that break the format's rules, or that `sound` does not accept, are broken.
    pub fn new(
        shape: Shape,
        index: usize,
        host: u64,
        mut words: Vec<u64>,
        sound: impl Fn(&Entry) -> bool,
    ) -> Self {
        let mut broken = Vec::new();
        for (number, pair) in words.chunks_mut(if shape.extended { 2 } else { 1 }).enumerate() {
            let (word, bitmap) = match *pair {
                [word, bitmap] => (word, bitmap),
                [word] => (word, 0),
                _ => continue,
            };
            let entry = Entry { word, bitmap };
            if !entry.is_sound(&shape) || !sound(&entry) {
                for (place, word) in pair.iter_mut().enumerate() {
                    let first = number.saturating_mul(if shape.extended { 2 } else { 1 });
                    broken.push((first.saturating_add(place), std::mem::replace(word, u64::MAX)));
                }
            }
        }
        Self {
            shape,
            index,
            host,
            broken,
            words: words.into_iter().map(AtomicU64::new).collect(),
            changes: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            writing: AtomicBool::new(false),
            used: AtomicBool::new(true),
            gone: Mutex::new(false),
        }
    }

    fn word(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// The entry at `index`.
    pub fn entry(&self, index: usize) -> Entry {
        if !self.shape.extended {
            let word = self.words.get(index).map_or(0, |word| word.load(Ordering::Acquire));
            return if word == u64::MAX { Entry::BROKEN } else { Entry { word, bitmap: 0 } };
        }
        loop {
            let before = self.changes.load(Ordering::Acquire);
            let at = index.saturating_mul(2);
            let entry = Entry { word: self.word(at), bitmap: self.word(at.saturating_add(1)) };
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.changes.load(Ordering::Relaxed) == before {
                return entry;
            }
            std::hint::spin_loop();
        }
    }

    /// Whether an entry breaks the rules.
    pub fn is_broken(&self) -> bool {
        !self.broken.is_empty()
    }

    /// A word as the file is to have it.
    fn stored(&self, index: usize) -> u64 {
        let kept = self.broken.binary_search_by_key(&index, |(place, _)| *place).ok();
        kept.and_then(|at| self.broken.get(at)).map_or_else(|| self.word(index), |(_, word)| *word)
    }

    /// Begins to change entries; `None` if the table has left the cache.
    pub fn change(&self) -> Option<Change<'_>> {
        let gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        if *gone { None } else { Some(Change { table: self, gone }) }
    }

    /// Whether the file does not know some of it yet.
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire) != 0
    }

    /// Bytes of a piece.
    fn piece(&self) -> usize {
        (self.words.len().saturating_mul(8) / 64).max(512)
    }

    /// Takes what the file does not know: runs of bytes with their place in the table.
    pub fn take_dirty(&self) -> Vec<(u64, Vec<u8>)> {
        // No entry may be half changed in what is taken.
        let _change = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        self.writing.store(true, Ordering::Release);
        let dirty = self.dirty.swap(0, Ordering::AcqRel);
        let words = self.piece() / 8;
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut previous = false;
        for number in 0..self.words.len().div_ceil(words.max(1)) {
            let ours = dirty >> (number & 63) & 1 != 0;
            if ours {
                let first = number.saturating_mul(words);
                let last = first.saturating_add(words).min(self.words.len());
                let bytes = (first..last).flat_map(|at| self.stored(at).to_be_bytes());
                match runs.last_mut() {
                    Some((_, run)) if previous => run.extend(bytes),
                    _ => runs.push((number.saturating_mul(self.piece()) as u64, bytes.collect())),
                }
            }
            previous = ours;
        }
        runs
    }

    /// Marks the whole table as unknown to the file.
    pub fn all_dirty(&self) {
        self.dirty.store(u64::MAX, Ordering::Release);
    }

    /// All words, for copies of the table.
    pub fn words(&self) -> Vec<u64> {
        let _change = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        (0..self.words.len()).map(|at| self.stored(at)).collect()
    }
}

impl Change<'_> {
    /// Sets the entry at `index`; answers whether the table was wholly known to the file before.
    #[must_use = "a table that becomes dirty must be listed"]
    pub fn set(&mut self, index: usize, entry: Entry) -> bool {
        let table = self.table;
        let at = if table.shape.extended { index.saturating_mul(2) } else { index };
        let store = |at: usize, value: u64| {
            if let Some(word) = table.words.get(at) {
                word.store(value, if table.shape.extended { Ordering::Relaxed } else { Ordering::Release });
            }
        };
        let before = table.changes.load(Ordering::Relaxed);
        table.changes.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        store(at, entry.word);
        if table.shape.extended {
            store(at.saturating_add(1), entry.bitmap);
        }
        table.changes.store(before.wrapping_add(2), Ordering::Release);
        let piece = at.saturating_mul(8).checked_div(table.piece()).unwrap_or(0);
        let bit = 1u64 << (piece & 63);
        let dirty = table.dirty.load(Ordering::Relaxed);
        if dirty & bit == 0 {
            table.dirty.fetch_or(bit, Ordering::AcqRel);
        }
        dirty == 0
    }

    /// Notes that another table has taken this one's place.
    pub fn replaced(mut self) {
        *self.gone = true;
    }

    /// Notes that the table leaves the cache, unless the file lacks some of it.
    pub fn leave(mut self) -> bool {
        let leaves = !self.table.is_dirty() && !self.table.writing.load(Ordering::Acquire);
        *self.gone = leaves;
        leaves
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape { cluster_bits: 16, extended: false, zero_flag: true, data_file: false };

    #[test]
    fn entries_mean_what_the_format_says() {
        let entry = |word| Entry { word, bitmap: 0 };
        assert_eq!(entry(0).mapping(&SHAPE, 0), Mapping::Unallocated);
        assert_eq!(entry(0x10000).mapping(&SHAPE, 0), Mapping::Data);
        assert_eq!(entry(0x10001).mapping(&SHAPE, 0), Mapping::Zero);
        assert_eq!(entry(COMPRESSED | 77).mapping(&SHAPE, 0), Mapping::Compressed);
        assert!(!entry(0x10200).is_sound(&SHAPE));
        assert!(!entry(1 << 60).is_sound(&SHAPE));
        assert!(!entry(1).is_sound(&Shape { zero_flag: false, ..SHAPE }));
        let extended = Shape { extended: true, ..SHAPE };
        let entry = Entry { word: COPIED | 0x10000, bitmap: 1 << 37 | 1 << 3 };
        assert!(entry.is_sound(&extended));
        assert_eq!(
            [3, 4, 5].map(|sub| entry.mapping(&extended, sub)),
            [Mapping::Data, Mapping::Unallocated, Mapping::Zero]
        );
        assert!(!Entry { bitmap: 1 << 35 | 1 << 3, ..entry }.is_sound(&extended));
        assert!(!Entry { word: 0, bitmap: 1 }.is_sound(&extended));
    }

    #[test]
    fn dirty_pieces_are_taken_once() {
        let table = Table::new(SHAPE, 0, 0x20000, vec![0; SHAPE.entries()], |_| true);
        let mut change = table.change().unwrap();
        for index in [0, 127, 128, 8191] {
            let _ = change.set(index, Entry { word: COPIED | 0x30000, bitmap: 0 });
        }
        drop(change);
        let taken = table.take_dirty();
        assert_eq!(
            taken.iter().map(|(at, run)| (*at, run.len())).collect::<Vec<_>>(),
            [(0, 2048), (64512, 1024)]
        );
        assert!(table.take_dirty().is_empty());
        assert!(!table.change().unwrap().leave());
        table.writing.store(false, Ordering::Release);
        assert!(table.change().unwrap().leave());
        assert!(table.change().is_none());
    }

    proptest! {
        #[test]
        fn compressed_places_are_kept(bits in 9u32..=21, offset in 0u64..1 << 40, len in 1u64..1 << 21) {
            let shape = Shape { cluster_bits: bits, ..SHAPE };
            let len = len.min(shape.cluster());
            let (at, most) = shape.compressed(shape.compressed_entry(offset, len));
            prop_assert_eq!(at, offset);
            prop_assert!(most >= len && most < len + 512);
        }
    }
}
