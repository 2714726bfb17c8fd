//! Refcounts: how many references each cluster of the file has, and which clusters are free.
//!
//! All of it is behind one lock that is held for a few counts at a time and never while data moves. Changes are made in
//! memory and written by the flush in an order that a power cut cannot hurt: see the module `flush`.
//!
//! A new refcount block is put into the first cluster that it counts itself, so it needs no other block; those that
//! a row of clusters needs are put at its beginning. When the table of blocks is full, a larger one is written
//! elsewhere, with the blocks that count it, and the header is switched to it.
//!
//! Source: docs/interop/qcow2.rst, section "Host cluster management".

use super::header::{Header, REFTABLE_BYTES_MAX};
use crate::endian::{be16, be32, be64, bytes_be, put, size, words_be};
use crate::storage::Storage;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of refcount blocks kept in memory, as long as they are in the file too.
const CACHE_BYTES_MAX: u64 = 16 << 20;
/// Host offsets have 56 bits.
const FILE_BITS_MAX: u32 = 56;

/// Clusters in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Offset of the first in the file.
    pub offset: u64,
    /// How many.
    pub count: u64,
    /// Nothing was ever written there: they read as zeroes.
    pub fresh: bool,
}

/// See the module.
pub struct Refcounts {
    cluster_bits: u32,
    order: u32,
    state: Mutex<State>,
}

struct State {
    /// Offset of each block; zero where there is none.
    table: Vec<u64>,
    table_offset: u64,
    /// Table entries that the file does not know.
    table_dirty: BTreeSet<usize>,
    blocks: HashMap<usize, Block>,
    /// No cluster below is free.
    hint: u64,
    /// From this cluster on nothing was ever written.
    fresh: u64,
    /// Clusters of tables that were replaced.
    retired: Vec<u64>,
    /// One beyond the last cluster in use that this process knows of.
    end: u64,
}

struct Block {
    bytes: Vec<u8>,
    dirty: bool,
    /// A flush has taken it, and it is not in the file yet.
    writing: bool,
    used: bool,
}

/// What the file does not know of the refcounts.
#[derive(Default)]
pub struct Dirty {
    /// Blocks: offset and bytes.
    pub blocks: Vec<(u64, Vec<u8>)>,
    /// Table entries; to be written when the blocks are stable.
    pub table: Vec<(u64, Vec<u8>)>,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what}: the image is damaged; `yado image check` says more"),
    )
}

/// Why storage has no room up to `end`, as it says itself: a guest waits for space on a device, and in vain for an export's.
pub fn full(storage: &dyn Storage, end: u64) -> io::Error {
    storage.set_len(end).err().unwrap_or_else(|| io::ErrorKind::StorageFull.into())
}

/// A refcount in a block (widths below a byte: the lowest bits come first).
pub fn read_count(bytes: &[u8], index: usize, order: u32) -> u64 {
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    match order {
        0 => u64::from(byte(index / 8) >> (index % 8) & 1),
        1 => u64::from(byte(index / 4) >> ((index & 3) << 1) & 3),
        2 => u64::from(byte(index / 2) >> ((index & 1) << 2) & 15),
        3 => byte(index).into(),
        4 => be16(bytes, index.saturating_mul(2)).into(),
        5 => be32(bytes, index.saturating_mul(4)).into(),
        _ => be64(bytes, index.saturating_mul(8)),
    }
}

/// Sets a refcount in a block.
pub fn write_count(bytes: &mut [u8], index: usize, order: u32, count: u64) {
    let mut bits = |at: usize, shift: usize, mask: u8| {
        if let Some(byte) = bytes.get_mut(at) {
            *byte = *byte & !(mask << shift) | (count as u8 & mask) << shift;
        }
    };
    match order {
        0 => bits(index / 8, index % 8, 1),
        1 => bits(index / 4, (index & 3) << 1, 3),
        2 => bits(index / 2, (index & 1) << 2, 15),
        3 => bits(index, 0, 255),
        4 => put(bytes, index.saturating_mul(2), &(count as u16).to_be_bytes()),
        5 => put(bytes, index.saturating_mul(4), &(count as u32).to_be_bytes()),
        _ => put(bytes, index.saturating_mul(8), &count.to_be_bytes()),
    }
}

/// The largest refcount of a width.
pub fn count_max(order: u32) -> u64 {
    u64::MAX >> 64u32.saturating_sub(1 << (order & 7)).min(63)
}

/// log2 of counts in a block.
pub fn block_bits(cluster_bits: u32, order: u32) -> u32 {
    cluster_bits.saturating_add(3).saturating_sub(order)
}

impl Refcounts {
    /// Reads the table of an image.
    pub fn load(storage: &dyn Storage, header: &Header) -> io::Result<Self> {
        let bytes = u64::from(header.reftable_clusters).saturating_mul(header.cluster_size());
        let mut table = vec![0; size(bytes.min(REFTABLE_BYTES_MAX))];
        if header.reftable_offset < storage.len() {
            storage.read_bytes(header.reftable_offset, &mut table)?;
        }
        let fresh = storage.len().div_ceil(header.cluster_size());
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            state: Mutex::new(State {
                table: words_be(&table).collect(),
                table_offset: header.reftable_offset,
                table_dirty: BTreeSet::new(),
                blocks: HashMap::new(),
                hint: 1,
                fresh,
                retired: Vec::new(),
                end: 0,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cluster(&self) -> u64 {
        1 << (self.cluster_bits & 63)
    }

    fn block_bits(&self) -> u32 {
        block_bits(self.cluster_bits, self.order)
    }

    fn place(&self, cluster: u64) -> (usize, usize) {
        let bits = self.block_bits() & 63;
        (size(cluster >> bits), size(cluster & (1u64 << bits).wrapping_sub(1)))
    }

    /// Largest count.
    pub fn max(&self) -> u64 {
        count_max(self.order)
    }

    /// Offsets of all blocks.
    pub fn blocks(&self) -> Vec<u64> {
        self.state().table.iter().copied().filter(|offset| *offset != 0).collect()
    }

    /// Makes the file as long as all that was allocated since it was opened needs. Nobody can allocate, and so write,
    /// beyond that end meanwhile: the file is never cut.
    pub fn extend(&self, storage: &dyn Storage) -> io::Result<()> {
        let state = self.state();
        let reach = state.end << (self.cluster_bits & 63);
        if storage.len() < reach { storage.set_len(reach) } else { Ok(()) }
    }

    /// The count of a cluster.
    pub fn get(&self, storage: &dyn Storage, cluster: u64) -> io::Result<u64> {
        let (number, index) = self.place(cluster);
        let mut state = self.state();
        let block = self.block(&mut state, storage, number)?;
        Ok(block.map_or(0, |block| read_count(&block.bytes, index, self.order)))
    }

    /// A block, from the file if it must be; `None` where there is none.
    fn block<'a>(
        &self,
        state: &'a mut State,
        storage: &dyn Storage,
        number: usize,
    ) -> io::Result<Option<&'a mut Block>> {
        let offset = state.table.get(number).copied().unwrap_or(0);
        if offset == 0 {
            return Ok(None);
        }
        if !state.blocks.contains_key(&number) {
            if offset & self.cluster().wrapping_sub(1) != 0 || offset >> FILE_BITS_MAX != 0 {
                return Err(damaged("a refcount block is at no cluster"));
            }
            let mut bytes = vec![0; size(self.cluster())];
            storage.read_bytes(offset, &mut bytes)?;
            self.make_room(state);
            state.blocks.insert(number, Block { bytes, dirty: false, writing: false, used: true });
        }
        let mut block = state.blocks.get_mut(&number);
        if let Some(block) = &mut block {
            block.used = true;
        }
        Ok(block)
    }

    fn make_room(&self, state: &mut State) {
        let most = size(CACHE_BYTES_MAX >> (self.cluster_bits & 63)).max(4);
        if state.blocks.len() < most {
            return;
        }
        state.blocks.retain(|_, block| block.dirty || block.writing || std::mem::take(&mut block.used));
        if state.blocks.len() >= most {
            state.blocks.retain(|_, block| block.dirty || block.writing);
        }
    }

    /// Adds to the count of a cluster, which must have a block unless the count is to stay zero.
    pub fn add(&self, storage: &dyn Storage, cluster: u64, change: i64) -> io::Result<u64> {
        let (number, index) = self.place(cluster);
        let mut state = self.state();
        let max = self.max();
        let Some(block) = self.block(&mut state, storage, number)? else {
            return Err(damaged("a cluster in use has no refcount"));
        };
        let before = read_count(&block.bytes, index, self.order);
        let after =
            before.checked_add_signed(change).ok_or_else(|| damaged("a refcount falls below zero"))?;
        if after > max {
            let text = format!(
                "a cluster would have {after} users, and this image counts to {max}: make the image with wider refcounts"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        write_count(&mut block.bytes, index, self.order, after);
        block.dirty = true;
        if after == 0 {
            state.hint = state.hint.min(cluster);
        }
        Ok(after)
    }

    /// Makes a block count nothing.
    pub fn forget(&self, storage: &dyn Storage, number: usize) -> io::Result<()> {
        let mut state = self.state();
        if let Some(block) = self.block(&mut state, storage, number)? {
            block.bytes.fill(0);
            block.dirty = true;
        }
        Ok(())
    }

    /// Whether the cluster is free, and if its block is missing.
    fn is_free(&self, state: &mut State, storage: &dyn Storage, cluster: u64) -> io::Result<bool> {
        let (number, index) = self.place(cluster);
        let block = self.block(state, storage, number)?;
        Ok(block.is_none_or(|block| read_count(&block.bytes, index, self.order) == 0))
    }

    /// Allocates up to `count` clusters in a row, at least one.
    pub fn allocate(&self, storage: &dyn Storage, count: u64) -> io::Result<Run> {
        let mut state = self.state();
        loop {
            let first = self.next_free(&mut state, storage)?;
            if self.add_block(&mut state, storage, first)? {
                continue;
            }
            let (number, index) = self.place(first);
            let order = self.order;
            let per_block = 1u64 << (self.block_bits() & 63);
            let most = count.min(per_block.saturating_sub(index as u64));
            let most = most.min(self.room(storage, first, most)?);
            let fresh = first >= state.fresh;
            let Some(block) = self.block(&mut state, storage, number)? else { continue };
            let mut got = 0u64;
            while got < most {
                let at = index.saturating_add(size(got));
                if read_count(&block.bytes, at, order) != 0 {
                    break;
                }
                write_count(&mut block.bytes, at, order, 1);
                got = got.saturating_add(1);
            }
            block.dirty = true;
            self.taken(&mut state, first, got);
            state.hint = first.saturating_add(got);
            return Ok(Run { offset: first << (self.cluster_bits & 63), count: got, fresh });
        }
    }

    /// Allocates exactly `count` clusters in a row.
    pub fn allocate_row(&self, storage: &dyn Storage, count: u64) -> io::Result<Run> {
        let mut state = self.state();
        let mut first = self.next_free(&mut state, storage)?;
        let mut at = first;
        // Blocks that are not there yet take the beginning of the row together: each in a cluster that it counts would
        // cut every row longer than what a block counts.
        let mut missing: Vec<usize> = Vec::new();
        while at.saturating_sub(first) < count.saturating_add(missing.len() as u64) {
            self.within_reach(at)?;
            let (number, _) = self.place(at);
            if number >= state.table.len() {
                self.grow_table(&mut state, storage, at)?;
                (first, missing) = (at, Vec::new());
                continue;
            }
            if !self.is_free(&mut state, storage, at)? {
                (first, missing) = (at.saturating_add(1), Vec::new());
            } else if state.table.get(number) == Some(&0) && missing.last() != Some(&number) {
                missing.push(number);
            }
            at = at.saturating_add(1);
        }
        self.all_fit(storage, first, at.saturating_sub(first))?;
        let fresh = first >= state.fresh;
        let row = first.saturating_add(missing.len() as u64);
        for (number, cluster) in missing.into_iter().zip(first..) {
            self.put_block(&mut state, number, cluster);
        }
        for cluster in first..at {
            let (number, index) = self.place(cluster);
            let order = self.order;
            if let Some(block) = self.block(&mut state, storage, number)? {
                write_count(&mut block.bytes, index, order, 1);
                block.dirty = true;
            }
        }
        self.taken(&mut state, first, at.saturating_sub(first));
        if state.hint == first {
            state.hint = at;
        }
        Ok(Run { offset: row << (self.cluster_bits & 63), count, fresh })
    }

    /// How many of `count` clusters from `first` on the storage has room for, at least one. What it has none for is given
    /// to nobody: no flush could write it.
    fn room(&self, storage: &dyn Storage, first: u64, count: u64) -> io::Result<u64> {
        let bits = self.cluster_bits & 63;
        let end = storage.room(first.saturating_add(count) << bits) >> bits;
        let room = end.saturating_sub(first).min(count);
        if room == 0 { Err(full(storage, first.saturating_add(1) << bits)) } else { Ok(room) }
    }

    /// Fails unless the storage has room for all of `count` clusters from `first` on.
    fn all_fit(&self, storage: &dyn Storage, first: u64, count: u64) -> io::Result<()> {
        let room = self.room(storage, first, count)?;
        let end = first.saturating_add(count) << (self.cluster_bits & 63);
        if room < count { Err(full(storage, end)) } else { Ok(()) }
    }

    fn taken(&self, state: &mut State, first: u64, count: u64) {
        let end = first.saturating_add(count);
        state.fresh = state.fresh.max(end);
        state.end = state.end.max(end);
    }

    fn within_reach(&self, cluster: u64) -> io::Result<()> {
        if cluster >> (FILE_BITS_MAX.saturating_sub(self.cluster_bits) & 63) != 0 {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the image file cannot grow any more"));
        }
        Ok(())
    }

    fn next_free(&self, state: &mut State, storage: &dyn Storage) -> io::Result<u64> {
        let mut cluster = state.hint.max(1);
        let order = self.order;
        let counts = size(1 << (self.block_bits() & 63));
        loop {
            self.within_reach(cluster)?;
            let (number, index) = self.place(cluster);
            let Some(block) = self.block(state, storage, number)? else { break };
            match (index..counts).find(|at| read_count(&block.bytes, *at, order) == 0) {
                Some(at) => {
                    cluster = cluster.saturating_add((at as u64).saturating_sub(index as u64));
                    break;
                }
                None => cluster = cluster.saturating_add((counts as u64).saturating_sub(index as u64)),
            }
        }
        state.hint = cluster;
        Ok(cluster)
    }

    /// Makes the block that counts a free cluster, if there is none, in that very cluster. Answers whether anything was
    /// done, so that the cluster may not be free any more.
    fn add_block(&self, state: &mut State, storage: &dyn Storage, cluster: u64) -> io::Result<bool> {
        let (number, index) = self.place(cluster);
        if number >= state.table.len() {
            self.grow_table(state, storage, cluster)?;
            return Ok(true);
        }
        if state.table.get(number) != Some(&0) {
            return Ok(false);
        }
        self.all_fit(storage, cluster, 1)?;
        let block = self.put_block(state, number, cluster);
        write_count(&mut block.bytes, index, self.order, 1);
        self.taken(state, cluster, 1);
        Ok(true)
    }

    /// Puts a block that counts nothing yet into a cluster, which is the caller's to count.
    fn put_block<'a>(&self, state: &'a mut State, number: usize, cluster: u64) -> &'a mut Block {
        if let Some(entry) = state.table.get_mut(number) {
            *entry = cluster << (self.cluster_bits & 63);
        }
        state.table_dirty.insert(number);
        let block = Block { bytes: vec![0; size(self.cluster())], dirty: true, writing: false, used: true };
        let place = state.blocks.entry(number).insert_entry(block);
        place.into_mut()
    }

    /// Writes a larger table of blocks, and the blocks that count it, from `first` on, which no block counts yet.
    fn grow_table(&self, state: &mut State, storage: &dyn Storage, first: u64) -> io::Result<()> {
        let (bits, counts) = (self.cluster_bits & 63, 1u64 << (self.block_bits() & 63));
        let number = size(first >> (self.block_bits() & 63));
        // Clusters of the new table and number of new blocks: each depends on the other.
        let (mut table_clusters, mut blocks) = (0u64, 0u64);
        loop {
            let last = first.saturating_add(table_clusters).saturating_add(blocks);
            let need = (last >> (self.block_bits() & 63)).saturating_add(1);
            let roomy = need.saturating_add(need / 2).max(state.table.len() as u64);
            let new_table = roomy.saturating_mul(8).div_ceil(1 << bits);
            let new_blocks = need.saturating_sub(number as u64);
            if new_table <= table_clusters && new_blocks <= blocks {
                break;
            }
            (table_clusters, blocks) = (new_table.max(table_clusters), new_blocks.max(blocks));
        }
        let bytes = table_clusters << bits;
        if bytes > REFTABLE_BYTES_MAX {
            let text = "the refcount table cannot grow any more: use larger clusters";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let total = blocks.saturating_add(table_clusters);
        self.within_reach(first.saturating_add(total))?;
        self.all_fit(storage, first, total)?;
        let mut table = state.table.clone();
        table.resize(size(bytes / 8), 0);
        for block in 0..blocks {
            let at = number.saturating_add(size(block));
            if let Some(entry) = table.get_mut(at) {
                *entry = first.saturating_add(block) << bits;
            }
            let base = (at as u64).saturating_mul(counts);
            let mut content = vec![0; size(self.cluster())];
            for cluster in first..first.saturating_add(total) {
                if let Some(index) = cluster.checked_sub(base).filter(|index| *index < counts) {
                    write_count(&mut content, size(index), self.order, 1);
                }
            }
            storage.write_bytes(first.saturating_add(block) << bits, &content)?;
            state.blocks.insert(at, Block { bytes: content, dirty: false, writing: false, used: true });
        }
        // Blocks that the old table does not know on the disk yet must be there before the new one names them.
        // They stay dirty: a flush that runs meanwhile may hold an older copy and write it after this.
        for (at, block) in &mut state.blocks {
            if let Some(offset) = table.get(*at).filter(|offset| **offset != 0) {
                storage.write_bytes(*offset, &block.bytes)?;
                block.dirty = true;
            }
        }
        let offset = first.saturating_add(blocks) << bits;
        storage.write_bytes(offset, &bytes_be(table.iter().copied()))?;
        storage.flush()?;
        let mut field = [0; 12];
        put(&mut field, 0, &offset.to_be_bytes());
        put(&mut field, 8, &(table_clusters as u32).to_be_bytes());
        storage.write_bytes(48, &field)?;
        storage.flush()?;
        let (old_offset, old_clusters) =
            (state.table_offset, (state.table.len() as u64).saturating_mul(8) >> bits);
        state.table = table;
        state.table_offset = offset;
        state.table_dirty.clear();
        self.taken(state, first, total);
        // A flush that runs meanwhile may still write into the old table.
        state.retired.extend((0..old_clusters).map(|cluster| (old_offset >> bits).saturating_add(cluster)));
        Ok(())
    }

    /// All that was taken is in the file: it may leave memory. Answers the clusters of tables that were replaced, which
    /// nobody uses now.
    pub fn written(&self) -> Vec<u64> {
        let mut state = self.state();
        state.blocks.values_mut().for_each(|block| block.writing = false);
        std::mem::take(&mut state.retired)
    }

    /// Forgets everything and goes on with what `header` says.
    pub fn reload(&self, storage: &dyn Storage, header: &Header) -> io::Result<()> {
        let new = Self::load(storage, header)?.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.state() = new;
        Ok(())
    }

    /// Where the table is: its offset and clusters.
    pub fn table(&self) -> (u64, u32) {
        let state = self.state();
        let clusters = (state.table.len() as u64).saturating_mul(8) >> (self.cluster_bits & 63);
        (state.table_offset, clusters as u32)
    }

    /// Takes what the file does not know.
    pub fn take_dirty(&self) -> Dirty {
        let mut state = self.state();
        let State { table, table_offset, table_dirty, blocks, .. } = &mut *state;
        let mut dirty = Dirty::default();
        for (number, block) in blocks.iter_mut().filter(|(_, block)| block.dirty) {
            block.dirty = false;
            block.writing = true;
            dirty.blocks.push((table.get(*number).copied().unwrap_or(0), block.bytes.clone()));
        }
        for number in std::mem::take(table_dirty) {
            let entry = table.get(number).copied().unwrap_or(0);
            let place = table_offset.saturating_add((number as u64).saturating_mul(8));
            dirty.table.push((place, entry.to_be_bytes().to_vec()));
        }
        dirty
    }

    /// Nothing that was taken is known to be in the file.
    pub fn all_dirty(&self) {
        let mut state = self.state();
        let State { blocks, table, table_dirty, .. } = &mut *state;
        blocks.values_mut().for_each(|block| (block.dirty, block.writing) = (true, false));
        table_dirty.extend(blocks.keys().filter(|number| **number < table.len()));
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_of_all_widths_are_kept(order in 0u32..=6, counts in prop::collection::vec(any::<u64>(), 64)) {
            let mut block = vec![0; 512];
            let masked: Vec<u64> = counts.iter().map(|count| count & count_max(order)).collect();
            for (index, count) in masked.iter().enumerate() {
                write_count(&mut block, index, order, *count);
            }
            let read: Vec<u64> = (0..64).map(|index| read_count(&block, index, order)).collect();
            prop_assert_eq!(read, masked);
        }
    }

    #[test]
    fn widths_count_so_far() {
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(count_max), [1, 3, 15, 255, 65535, 0xffff_ffff, u64::MAX]);
    }
}
