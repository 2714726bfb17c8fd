//! Writes: in place where the image owns the cluster alone, else into new clusters.
//!
//! The order for a new cluster: allocate (in memory), write the data and what it does not cover, then change the entry. A
//! failure before the last step gives the cluster back; nobody has seen it.

use super::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, COMPATIBLE_LAZY, INCOMPATIBLE_DIRTY};
use super::table::{COMPRESSED, COPIED, Entry, Mapping, Table};
use super::{Qcow2, lock, refcount};
use crate::buffers::{Buffers, Part, ReadInto};
use crate::disk::Disk;
use crate::endian::size;
use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Most clusters that one step of a write allocates.
const STEP_CLUSTERS_MAX: u64 = 256;

/// Longest memory for a cluster that a thread keeps.
const KEPT_MAX: usize = 256 << 10;

thread_local! {
    /// Memory for a cluster that is written anew.
    static CLUSTER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A bitmap's bits for subclusters `range`.
fn bits(range: Range<u32>) -> u64 {
    let below = |count: u32| (1u64 << count.min(32)).wrapping_sub(1);
    below(range.end) & !below(range.start)
}

impl Qcow2 {
    /// Makes the header say what it must say while the image is written.
    pub fn open_for_change(&self) -> io::Result<()> {
        if self.opened.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut header = lock(&self.header);
        if self.opened.load(Ordering::Acquire) {
            return Ok(());
        }
        if header.version >= 3 {
            // Bitmaps that cannot be kept are given up: nobody must trust them.
            header.bitmaps =
                header.bitmaps.take().filter(|extension| self.begin_recording(extension).is_ok());
            // What is not known here is not kept (section "Autoclear feature bits").
            let raw = if header.has_data_file() { AUTOCLEAR_RAW_DATA } else { 0 };
            let bitmaps = if header.bitmaps.is_some() { AUTOCLEAR_BITMAPS } else { 0 };
            let autoclear = header.autoclear & (raw | bitmaps);
            let lazy = header.compatible & COMPATIBLE_LAZY != 0;
            let incompatible = header.incompatible | if lazy { INCOMPATIBLE_DIRTY } else { 0 };
            if (autoclear, incompatible) != (header.autoclear, header.incompatible) {
                self.storage.write_bytes(72, &incompatible.to_be_bytes())?;
                self.storage.write_bytes(88, &autoclear.to_be_bytes())?;
                self.storage.flush()?;
                (header.autoclear, header.incompatible) = (autoclear, incompatible);
            }
        }
        self.opened.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes the first `len` bytes of `buffers` at `offset`. Inside the gate.
    pub fn write_inside(&self, offset: u64, buffers: &dyn Buffers, len: u64) -> io::Result<()> {
        let mut done = 0u64;
        while done < len {
            let (at, left) = (offset.saturating_add(done), len.saturating_sub(done));
            let run = self.lookup(at, left)?;
            let wrote = match run.mapping {
                Mapping::Data if run.owned => {
                    self.data().write(run.host, buffers, done, run.len)?;
                    run.len
                }
                _ => self.write_new(at, &Part::new(buffers, done, left))?,
            };
            done = done.saturating_add(wrote);
        }
        Ok(())
    }

    /// Writes the beginning of `buffers` at `offset`, where clusters (or subclusters) must be allocated first. Answers how
    /// much.
    fn write_new(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<u64> {
        let shape = &self.shape;
        let span = shape.table_span();
        let most = STEP_CLUSTERS_MAX.saturating_mul(shape.cluster()).saturating_sub(shape.within(offset));
        let len = buffers.len().min(span.saturating_sub(offset & span.wrapping_sub(1))).min(most);
        let number = |at: u64| at >> (shape.cluster_bits & 63);
        let end = offset.saturating_add(len);
        let _clusters = self.lock_clusters(number(offset), number(end.saturating_sub(1)));
        let table = self.writable_table(offset)?;
        let mut plain = 0u64;
        while plain < len && self.is_plain(&table, offset.saturating_add(plain), end) {
            let at = offset.saturating_add(plain);
            plain = plain.saturating_add(shape.cluster().saturating_sub(shape.within(at))).min(len);
        }
        if plain > 0 {
            return self.write_plain(&table, offset, &Part::new(buffers, 0, plain));
        }
        let first = len.min(shape.cluster().saturating_sub(shape.within(offset)));
        let entry = table.entry(shape.l2_index(offset));
        if entry == Entry::BROKEN {
            return Err(self.damage(&format!("the L2 entry for offset {offset:#x} breaks the rules")));
        }
        let run = self.lookup(offset, first)?;
        if run.mapping == Mapping::Data && run.owned {
            // Somebody else was here first.
            self.data().write(run.host, buffers, 0, run.len)?;
            return Ok(run.len);
        }
        self.write_merged(entry, offset, &Part::new(buffers, 0, first))
    }

    /// Whether the write up to `end` can give the cluster at `at` a new cluster of the file without keeping anything of
    /// what is there: it covers the cluster, or the rest reads as zeroes.
    fn is_plain(&self, table: &Table, at: u64, end: u64) -> bool {
        let shape = &self.shape;
        let entry = table.entry(shape.l2_index(at));
        if entry == Entry::BROKEN || entry.owned(shape) {
            return false;
        }
        let start = at.saturating_sub(shape.within(at));
        let whole = at == start && end.saturating_sub(at) >= shape.cluster();
        let zero = entry.word & COMPRESSED == 0 && !entry.has_host(shape) && self.nothing_below(start);
        whole
            || zero
            || (entry.word & COMPRESSED == 0 && !shape.extended && entry.word & super::table::ZERO != 0)
    }

    fn write_plain(&self, table: &Arc<Table>, offset: u64, buffers: &dyn Buffers) -> io::Result<u64> {
        let shape = &self.shape;
        let before = shape.within(offset);
        let start = offset.saturating_sub(before);
        let clusters = before.saturating_add(buffers.len()).div_ceil(shape.cluster());
        let run = self.allocate_data(start, clusters)?;
        let room = run.count.saturating_mul(shape.cluster());
        let len = buffers.len().min(room.saturating_sub(before));
        let fill = || {
            if !run.fresh {
                let behind = room.saturating_sub(before.saturating_add(len));
                self.data().zero_range(run.offset, before)?;
                self.data().zero_range(run.offset.saturating_add(room.saturating_sub(behind)), behind)?;
            }
            self.data().write(run.offset.saturating_add(before), buffers, 0, len)
        };
        if let Err(error) = fill() {
            self.give_back(run);
            return Err(error);
        }
        let mut entries = Vec::with_capacity(size(run.count));
        for cluster in 0..run.count {
            let skip = cluster.saturating_mul(shape.cluster());
            let at = start.saturating_add(skip).max(offset);
            let old = table.entry(shape.l2_index(at));
            let end =
                start.saturating_add(skip).saturating_add(shape.cluster()).min(offset.saturating_add(len));
            let touched = self.units(at, end);
            let entry = Entry {
                word: run.offset.saturating_add(skip) | COPIED,
                bitmap: if shape.extended {
                    bits(touched.clone()) | old.bitmap & !0xffff_ffff & !(bits(touched) << 32)
                } else {
                    0
                },
            };
            entries.push((at, old, entry));
        }
        self.set_entries(offset, &entries)?;
        Ok(len)
    }

    /// The units (subclusters, or the one cluster) that a range inside one cluster touches.
    fn units(&self, from: u64, to: u64) -> Range<u32> {
        let last = self.shape.sub(to.saturating_sub(1));
        self.shape.sub(from)..last.saturating_add(1)
    }

    /// Writes into one cluster whose other content must be kept: in place if the image owns it, else into a new one.
    fn write_merged(&self, old: Entry, offset: u64, buffers: &dyn Buffers) -> io::Result<u64> {
        let shape = &self.shape;
        let len = buffers.len();
        let in_place = old.owned(shape);
        let start = offset.saturating_sub(shape.within(offset));
        let run = if in_place {
            refcount::Run { offset: old.host(), count: 1, fresh: false }
        } else {
            self.allocate_data(start, 1)?
        };
        let within = shape.within(offset);
        let (fills, bitmap) = self.fills(old, in_place, within..within.saturating_add(len));
        let move_bytes = || {
            let total: u64 = fills.iter().map(|fill| fill.end.saturating_sub(fill.start)).sum();
            if !in_place && total.saturating_add(len) == shape.cluster() {
                return self.write_whole(start, run.offset, within, buffers);
            }
            for fill in &fills {
                let mut bytes = vec![0; size(fill.end.saturating_sub(fill.start))];
                let (from, count) = (start.saturating_add(fill.start), bytes.len() as u64);
                self.read_old(from, &mut bytes, count)?;
                self.data().write_bytes(run.offset.saturating_add(fill.start), &bytes)?;
            }
            self.data().write(run.offset.saturating_add(within), buffers, 0, len)
        };
        if let Err(error) = move_bytes() {
            if !in_place {
                self.give_back(run);
            }
            return Err(error);
        }
        let entry = Entry { word: run.offset | COPIED, bitmap };
        self.set_entries(offset, &[(offset, old, entry)])?;
        Ok(len)
    }

    /// The cluster's content as it is, with the write over it, in one piece.
    fn write_whole(&self, start: u64, host: u64, within: u64, buffers: &dyn Buffers) -> io::Result<()> {
        // Memory that is there and touched: to get and clear it costs about as much as to copy a cluster.
        let mut cluster = CLUSTER.take();
        cluster.resize(size(self.shape.cluster()), 0);
        let written = self.merge(start, within, buffers, &mut cluster);
        let written = written.and_then(|()| self.data().write_bytes(host, &cluster));
        if cluster.len() <= KEPT_MAX {
            CLUSTER.set(cluster);
        }
        written
    }

    /// Reads a cluster and lays a write over it.
    fn merge(&self, start: u64, within: u64, buffers: &dyn Buffers, cluster: &mut [u8]) -> io::Result<()> {
        // In one go, with what the write replaces: that is less than another call takes.
        self.read_old(start, cluster, cluster.len() as u64)?;
        let into = size(within)..size(within.saturating_add(buffers.len()));
        buffers.get(0, cluster.get_mut(into).unwrap_or_default())
    }

    /// What the disk holds; zeroes behind its end.
    fn read_old(&self, offset: u64, into: &mut [u8], len: u64) -> io::Result<()> {
        let buffers = ReadInto::new(into);
        self.read_inside(offset, &buffers, 0, len)
    }

    /// What must be copied into a cluster beside a write of `written` (offsets in the cluster), and the bitmap that the
    /// entry gets.
    fn fills(&self, old: Entry, in_place: bool, written: Range<u64>) -> (Vec<Range<u64>>, u64) {
        let shape = &self.shape;
        let unit = shape.unit();
        let units = if shape.extended { 32 } else { 1 };
        let touched = shape.sub(written.start)..shape.sub(written.end.saturating_sub(1)).saturating_add(1);
        let (mut fills, mut allocated): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
        let mut add = |range: Range<u64>| match fills.last_mut() {
            _ if range.start >= range.end => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => fills.push(range),
        };
        for number in 0..units {
            let mapping = old.mapping(shape, number);
            let held = matches!(mapping, Mapping::Data | Mapping::Compressed);
            let is_touched = touched.contains(&number);
            if is_touched || held {
                allocated |= 1 << (number & 31);
            }
            let copies = if in_place { is_touched && !held } else { is_touched || held };
            if copies {
                let start = u64::from(number).saturating_mul(unit);
                let end = start.saturating_add(unit);
                add(start..end.min(written.start).max(start));
                add(start.max(written.end).min(end)..end);
            }
        }
        let zeroes = if old.word & COMPRESSED == 0 { old.bitmap >> 32 << 32 & !(allocated << 32) } else { 0 };
        (fills, if shape.extended { allocated | zeroes } else { 0 })
    }

    /// The table for an offset, fit to be changed.
    pub fn writable_table(&self, offset: u64) -> io::Result<Arc<Table>> {
        let storage = self.storage.as_ref();
        let allocate = || self.refcounts.allocate(storage, 1).map(|run| run.offset);
        self.map
            .writable(storage, self.shape.l1_index(offset), allocate, |shared| self.release_cluster(shared))
    }

    /// Sets entries of one table, and notes that what they held before has a user less. Under the clusters' locks.
    pub fn set_entries(&self, offset: u64, entries: &[(u64, Entry, Entry)]) -> io::Result<()> {
        loop {
            let table = self.writable_table(offset)?;
            // A table that has left the cache meanwhile is read again; nobody else changes these entries.
            let Some(mut change) = table.change() else { continue };
            let mut first = false;
            for (at, _, entry) in entries {
                first |= change.set(self.shape.l2_index(*at), *entry);
            }
            if first {
                // Before anyone else can change the table: who finds it dirty counts on its being listed.
                self.map.note_dirty(&table);
            }
            drop(change);
            break;
        }
        for (_, old, new) in entries {
            self.release_entry(*old, *new);
        }
        Ok(())
    }

    /// Replaces the entry of one cluster. Under its lock.
    pub fn replace_entry(&self, offset: u64, entry: Entry) -> io::Result<()> {
        let table = self.writable_table(offset)?;
        let old = table.entry(self.shape.l2_index(offset));
        if old == Entry::BROKEN {
            return Err(self.damage(&format!("the L2 entry for offset {offset:#x} breaks the rules")));
        }
        self.set_entries(offset, &[(offset, old, entry)])
    }

    /// Clusters for guest data at `start`, up to `count` in a row.
    fn allocate_data(&self, start: u64, count: u64) -> io::Result<refcount::Run> {
        if self.shape.data_file {
            // The data file has the guest's own offsets.
            return Ok(refcount::Run { offset: start, count, fresh: false });
        }
        self.refcounts.allocate(self.storage.as_ref(), count)
    }

    /// Gives clusters back that nobody has seen.
    pub(super) fn give_back(&self, run: refcount::Run) {
        if self.shape.data_file {
            return;
        }
        let first = run.offset >> (self.shape.cluster_bits & 63);
        for cluster in first..first.saturating_add(run.count) {
            // If it fails the cluster is lost until the next check.
            let _ = self.refcounts.add(self.storage.as_ref(), cluster, -1);
        }
    }

    /// Gives a compressed cluster's place back at once: nobody has seen it.
    pub fn release_now(&self, word: u64) -> io::Result<()> {
        self.end_packing();
        let mut clusters = self.compressed_clusters(word);
        clusters.try_for_each(|cluster| self.refcounts.add(self.storage.as_ref(), cluster, -1).map(drop))
    }

    /// Notes that an entry has become another one, so that what it held alone has a user less.
    fn release_entry(&self, old: Entry, new: Entry) {
        if old.word & COMPRESSED != 0 {
            self.compressed_clusters(old.word).for_each(|cluster| self.flush.release(cluster));
        } else if old.has_host(&self.shape) && !self.shape.data_file && old.host() != new_host(new) {
            self.release_cluster(old.host());
        }
    }

    /// Notes that a cluster of the file, by its offset, has a user less.
    pub fn release_cluster(&self, offset: u64) {
        self.flush.release(offset >> (self.shape.cluster_bits & 63));
    }

    /// Keeps what is only in memory within limits.
    pub fn limit_dirty(&self) -> io::Result<()> {
        let tables = self.map.dirty_tables() as u64;
        if tables.saturating_mul(self.shape.cluster()) > DIRTY_BYTES_MAX && tables > 8
            || self.flush.waiting() > RELEASES_MAX
        {
            return self.flush_metadata();
        }
        Ok(())
    }

    /// The size as the guest sees it, in whole clusters.
    pub fn capacity_clusters(&self) -> u64 {
        self.capacity().div_ceil(self.shape.cluster())
    }
}

fn new_host(entry: Entry) -> u64 {
    if entry.word & COMPRESSED != 0 { 0 } else { entry.host() }
}

/// Bytes of L2 tables that may be in memory only.
const DIRTY_BYTES_MAX: u64 = 16 << 20;
/// Clusters that may wait to be free.
const RELEASES_MAX: usize = 1 << 16;
