//! The check: counts every reference from the header, tables, snapshots and bitmaps, and compares that with the refcounts.
//!
//! It reads the file only, with the gate closed and nothing dirty. A repair changes as little as it can: leaks lower
//! counts in place; anything worse writes all refcounts anew into other clusters and switches to them with one write of
//! the header, so that a cut in the middle leaves what was there. Those are behind the end of the file, or of what is used
//! of a device.
//!
//! Source: docs/interop/qcow2.rst, sections "Refcounts" and "Cluster mapping".

use super::header::{AUTOCLEAR_BITMAPS, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY};
use super::refcount::{block_bits, count_max, read_count, write_count};
use super::snapshot::read_table;
use super::table::{COMPRESSED, COPIED, Entry, L1_RESERVED, OFFSET};
use super::{Qcow2, lock, read_l1, words_at};
use crate::disk::Error;
use crate::endian::{be32, be64, bytes_be, put, size};
use crate::format::findings::{Findings, Repair};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::Ordering;

/// Clusters of a file that can be checked: their counts take four bytes each.
const CLUSTERS_MAX: u64 = 1 << 29;
/// References counted so far.
struct Counts {
    counts: Vec<u32>,
    bits: u32,
}

impl Counts {
    /// Counts a reference to a range of the file; answers whether it is inside.
    fn add(&mut self, offset: u64, len: u64) -> bool {
        self.add_times(offset, len, 1)
    }

    /// Counts as many references.
    fn add_times(&mut self, offset: u64, len: u64, times: u32) -> bool {
        let first = offset >> self.bits;
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.bits;
        if last >= self.counts.len() as u64 || len == 0 {
            return len == 0;
        }
        for count in self.counts.get_mut(size(first)..=size(last)).unwrap_or_default() {
            *count = count.saturating_add(times);
        }
        true
    }

    /// Whether nothing that was counted lies in a range.
    fn is_free(&self, offset: u64, len: u64) -> bool {
        let first = offset >> self.bits;
        let last = offset.saturating_add(len.saturating_sub(1)) >> self.bits;
        let counts = self.counts.get(size(first)..=size(last)).unwrap_or_default();
        len == 0 || counts.iter().all(|count| *count == 0)
    }

    fn get(&self, offset: u64) -> u32 {
        self.counts.get(size(offset >> self.bits)).copied().unwrap_or(0)
    }
}

/// Clusters in a row for refcounts: the blocks, then their table.
#[derive(Debug, Clone, Copy)]
struct Place {
    start: u64,
    blocks: u64,
    table: u64,
}

impl Place {
    /// Room for the counts of all before `start` and of itself.
    fn behind(start: u64, per_block: u64, cluster: u64) -> Self {
        let mut place = Self { start, blocks: 0, table: 0 };
        loop {
            let blocks = place.end().div_ceil(per_block);
            let table = blocks.saturating_mul(8).div_ceil(cluster).max(1);
            if (blocks, table) == (place.blocks, place.table) {
                return place;
            }
            (place.blocks, place.table) = (blocks, table);
        }
    }

    fn end(self) -> u64 {
        self.start.saturating_add(self.blocks).saturating_add(self.table)
    }
}

/// Entries that a repair empties. A hostile file is full of them.
#[derive(Default)]
struct Cures {
    /// Places of L1 entries.
    tables: Vec<u64>,
    /// For an L2 table at its place a bit for each entry.
    clusters: HashMap<u64, Vec<u64>>,
}

impl Cures {
    fn is_empty(&self) -> bool {
        self.tables.is_empty() && self.clusters.is_empty()
    }

    fn add(&mut self, table: u64, index: usize, entries: usize) {
        let bits = self.clusters.entry(table).or_insert_with(|| vec![0; entries.div_ceil(64)]);
        if let Some(word) = bits.get_mut(index / 64) {
            *word |= 1 << (index & 63);
        }
    }

    fn has(&self, table: u64, index: usize) -> bool {
        self.clusters.get(&table).is_some_and(|bits| bit(bits, index))
    }
}

fn bit(bits: &[u64], index: usize) -> bool {
    bits.get(index / 64).is_some_and(|word| word >> (index & 63) & 1 != 0)
}

/// Clusters of the file that are stored as having one user: a bit for each.
struct Alone(Vec<u64>);

impl Alone {
    fn note(&mut self, cluster: u64) {
        if let Some(word) = self.0.get_mut(size(cluster >> 6)) {
            *word |= 1 << (cluster & 63);
        }
    }

    fn has(&self, cluster: u64) -> bool {
        bit(&self.0, size(cluster))
    }
}

/// What is stored otherwise than it was counted.
enum Wrong {
    /// Of a cluster: the stored count, and the counted one.
    Count { cluster: u64, stored: u64, counted: u64 },
    /// A whole block, by its number, counts what is behind the end of the file.
    Behind(usize),
}

struct Walk<'a> {
    image: &'a Qcow2,
    counts: Counts,
    findings: Findings,
    cures: Cures,
    next: u64,
}

impl Qcow2 {
    /// Checks the image, and repairs it if it may be written. Requests wait meanwhile.
    pub fn check(&self, repair: Repair) -> Result<Findings, Error> {
        self.check_inside(repair).map_err(|source| Error::io(&self.path, source))
    }

    fn check_inside(&self, repair: Repair) -> io::Result<Findings> {
        if repair != Repair::Nothing && self.read_only {
            return Err(crate::disk::read_only_error());
        }
        let _quiet = if self.read_only { None } else { Some(self.quiesce()?) };
        if !self.read_only {
            // The first freed clusters; this writes that they are free.
            self.flush_quiet()?;
        }
        let header = self.header();
        let dirty = header.incompatible & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT) != 0;
        let mut found = self.look()?;
        if repair == Repair::All && found.findings.corruptions > 0 {
            self.repair_all(&mut found)?;
        } else if repair != Repair::Nothing && found.findings.leaks > 0 {
            self.repair_leaks(&found)?;
            if found.findings.errors == 0 && found.cures.is_empty() {
                // Flags follow counts: a cluster whose count was two is the image's own now.
                self.mark_owned()?;
                self.flush_quiet()?;
            }
            found.findings = self.look()?.findings.after_repair_of(&found.findings);
        }
        let clean = found.findings.corruptions == 0 && found.findings.errors == 0;
        if repair == Repair::All && dirty && clean {
            let mut header = lock(&self.header);
            header.incompatible &= !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
            self.storage.flush()?;
            self.storage.write_bytes(72, &header.incompatible.to_be_bytes())?;
            self.storage.flush()?;
            self.opened.store(false, Ordering::Release);
            self.damaged.store(false, Ordering::Release);
        }
        Ok(found.findings)
    }

    /// One walk over everything.
    fn look(&self) -> io::Result<Found> {
        let bits = self.shape.cluster_bits & 63;
        let clusters = self.storage.len().div_ceil(self.shape.cluster());
        if clusters > CLUSTERS_MAX {
            let text = format!("the file has {clusters} clusters, more than can be checked ({CLUSTERS_MAX})");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let mut walk = Walk {
            image: self,
            counts: Counts { counts: vec![0; size(clusters)], bits },
            findings: Findings { total_clusters: self.capacity_clusters(), ..Findings::default() },
            cures: Cures::default(),
            next: 0,
        };
        let header = self.header();
        walk.row(0, 1, "header");
        let l1 = words_at(self.storage.as_ref(), header.l1_offset, header.l1_size.into())?;
        walk.row(header.l1_offset, (l1.len() as u64).saturating_mul(8), "active L1 table");
        walk.active_tree(&l1, header.l1_offset)?;
        walk.snapshots()?;
        walk.bitmaps()?;
        walk.refcounts()?;
        let highest =
            walk.counts.counts.iter().rposition(|count| *count > 0).map_or(0, |last| last.saturating_add(1));
        walk.findings.image_end_offset = (highest as u64) << bits;
        let alone = walk.compare()?;
        walk.owned_flags(&l1, &alone)?;
        let Walk { counts, findings, cures, .. } = walk;
        Ok(Found { counts, findings, cures })
    }

    /// Calls `with` with every cluster that is stored otherwise than counted, and answers those that are stored as having
    /// one user. There may be more than there is memory for: nothing of them is kept.
    fn each_wrong(
        &self,
        counts: &Counts,
        with: &mut dyn FnMut(Wrong) -> io::Result<()>,
    ) -> io::Result<Alone> {
        let order = lock(&self.header).refcount_order;
        let storage = self.storage.as_ref();
        let cluster = self.shape.cluster();
        let per_block = 1u64 << (block_bits(self.shape.cluster_bits, order) & 63);
        let (offset, clusters) = self.refcounts.table();
        let table = words_at(storage, offset, u64::from(clusters).saturating_mul(cluster) / 8)?;
        let mut seen = std::collections::HashSet::new();
        let mut bytes = vec![0; size(cluster)];
        let total = counts.counts.len() as u64;
        let mut alone = Alone(vec![0; size(total.div_ceil(64))]);
        let blocks = total
            .div_ceil(per_block)
            .max(table.iter().rposition(|at| *at != 0).map_or(0, |at| (at as u64).saturating_add(1)));
        for number in 0..blocks {
            let place = table.get(size(number)).copied().unwrap_or(0);
            let base = number.saturating_mul(per_block);
            // A block that is nowhere, or that another entry has, counts nothing.
            let good =
                place != 0 && self.shape.within(place) == 0 && place < storage.len() && seen.insert(place);
            if base >= total {
                let extent = if good { Some(storage.extent(place, cluster)?) } else { None };
                if extent.is_some_and(|extent| !extent.hole || extent.len < cluster) {
                    storage.read_bytes(place, &mut bytes)?;
                    if !crate::job::is_zero(&bytes) {
                        with(Wrong::Behind(size(number)))?;
                    }
                }
                continue;
            }
            match good {
                true => storage.read_bytes(place, &mut bytes)?,
                false => bytes.fill(0),
            }
            for index in 0..if good { per_block } else { per_block.min(total.saturating_sub(base)) } {
                let cluster = base.saturating_add(index);
                let counted = u64::from(counts.counts.get(size(cluster)).copied().unwrap_or(0));
                let stored = read_count(&bytes, size(index), order);
                if stored == 1 {
                    alone.note(cluster);
                }
                if stored != counted {
                    with(Wrong::Count { cluster, stored, counted })?;
                }
            }
        }
        Ok(alone)
    }

    fn repair_leaks(&self, found: &Found) -> io::Result<()> {
        self.open_for_change()?;
        let storage = self.storage.as_ref();
        self.each_wrong(&found.counts, &mut |wrong| {
            match wrong {
                Wrong::Count { cluster, stored, counted } => {
                    // Counts of 64 bits are more than one step can take away.
                    let mut excess = stored.saturating_sub(counted);
                    while excess > 0 {
                        let step = i64::try_from(excess).unwrap_or(i64::MAX);
                        self.refcounts.add(storage, cluster, step.saturating_neg())?;
                        excess = excess.saturating_sub(step.unsigned_abs());
                    }
                }
                Wrong::Behind(number) => self.refcounts.forget(storage, number)?,
            }
            Ok(())
        })?;
        self.flush_quiet()
    }

    /// Empties entries that break the rules, counts again, and writes all refcounts anew.
    fn repair_all(&self, found: &mut Found) -> io::Result<()> {
        let storage = self.storage.as_ref();
        // Nothing is emptied if the rest cannot be done.
        self.refcounts_place(&found.counts)?;
        for place in &found.cures.tables {
            storage.write_bytes(*place, &[0; 8])?;
        }
        for (table, broken) in &found.cures.clusters {
            let words = words_at(storage, *table, self.shape.cluster() / 8)?;
            let step = if self.shape.extended { 2 } else { 1 };
            let cured = words.chunks(step).enumerate().flat_map(|(index, entry)| {
                let kept = !bit(broken, index);
                entry.iter().map(move |word| if kept { *word } else { 0 })
            });
            storage.write_bytes(*table, &bytes_be(cured))?;
        }
        storage.flush()?;
        // What is gone is not counted any more; flags are judged by the new counts afterwards.
        let again = self.look()?;
        self.write_refcounts(&again.counts)?;
        self.reload()?;
        self.mark_owned()?;
        self.flush_quiet()?;
        let mut last = self.look()?;
        if last.findings.leaks > 0 {
            self.repair_leaks(&last)?;
            last = self.look()?;
        }
        found.findings = last.findings.after_repair_of(&found.findings);
        Ok(())
    }

    /// Reads header and tables again.
    fn reload(&self) -> io::Result<()> {
        // Not as `self.header` has it: the refcounts still have the place of the old table.
        let header = lock(&self.header).clone();
        let storage = self.storage.as_ref();
        self.refcounts.reload(storage, &header)?;
        let l1 = read_l1(storage, header.l1_offset, header.l1_size)?;
        let metadata = super::metadata_of(&self.shape, &header, &l1, &self.refcounts, storage.len());
        *self.map.metadata.write().unwrap_or_else(std::sync::PoisonError::into_inner) = metadata;
        self.map.replace(l1);
        Ok(())
    }

    /// Where all refcounts can be written anew: behind the end of the file, or, where that cannot grow, behind all that is
    /// used of it.
    fn refcounts_place(&self, counts: &Counts) -> io::Result<Place> {
        let order = lock(&self.header).refcount_order;
        let per_block = 1u64 << (block_bits(self.shape.cluster_bits, order) & 63);
        let used =
            counts.counts.iter().rposition(|count| *count > 0).map_or(0, |last| last.saturating_add(1));
        let mut end = 0;
        for start in [counts.counts.len() as u64, used as u64] {
            let place = Place::behind(start, per_block, self.shape.cluster());
            if place.table << counts.bits > super::header::REFTABLE_BYTES_MAX {
                let text = "the file is too large for its refcounts";
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
            }
            end = place.end() << counts.bits;
            if self.storage.room(end) == end {
                return Ok(place);
            }
        }
        Err(super::refcount::full(self.storage.as_ref(), end))
    }

    /// Writes all refcounts into other clusters and switches to them.
    fn write_refcounts(&self, counts: &Counts) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let (bits, order) = (self.shape.cluster_bits & 63, lock(&self.header).refcount_order);
        let cluster = self.shape.cluster();
        let per_block = 1u64 << (block_bits(self.shape.cluster_bits, order) & 63);
        let old_table = self.refcounts.table();
        let place = self.refcounts_place(counts)?;
        let (Place { start, blocks, table }, total) = (place, place.end());
        let old: std::collections::BTreeSet<u64> =
            self.refcounts.blocks().into_iter().map(|offset| offset >> bits).collect();
        let old_rows = (old_table.0 >> bits)..(old_table.0 >> bits).saturating_add(old_table.1.into());
        let max = count_max(order);
        if storage.len() < total << bits {
            storage.set_len(total << bits)?;
        }
        for block in 0..blocks {
            let mut bytes = vec![0; size(cluster)];
            let base = block.saturating_mul(per_block);
            for index in 0..per_block.min(total.saturating_sub(base)) {
                let at = base.saturating_add(index);
                let mut count: u64 = counts.counts.get(size(at)).copied().unwrap_or(0).into();
                // The old blocks and table count themselves no more.
                if old.contains(&at) || old_rows.contains(&at) {
                    count = count.saturating_sub(1);
                }
                if at >= start {
                    count = 1;
                }
                write_count(&mut bytes, size(index), order, count.min(max));
            }
            storage.write_bytes(start.saturating_add(block) << bits, &bytes)?;
        }
        let entries = (0..blocks).map(|block| start.saturating_add(block) << bits);
        let mut bytes = bytes_be(entries);
        bytes.resize(size(table << bits), 0);
        let offset = start.saturating_add(blocks) << bits;
        storage.write_bytes(offset, &bytes)?;
        storage.flush()?;
        let mut field = [0; 12];
        put(&mut field, 0, &offset.to_be_bytes());
        put(&mut field, 8, &(table as u32).to_be_bytes());
        storage.write_bytes(48, &field)?;
        storage.flush()?;
        let mut header = lock(&self.header);
        (header.reftable_offset, header.reftable_clusters) = (offset, table as u32);
        Ok(())
    }
}

struct Found {
    counts: Counts,
    findings: Findings,
    cures: Cures,
}

impl Walk<'_> {
    fn row(&mut self, offset: u64, len: u64, what: &str) {
        if !self.counts.add(offset, len) {
            self.findings.corrupt(|| format!("the {what} at {offset:#x} reaches beyond the end of the file"));
        }
    }

    /// Counts the table that an L1 entry refers to, and answers its place. `place` is that of an L1 table that can be cured.
    fn l1_entry(&mut self, index: usize, word: u64, place: Option<u64>) -> Option<u64> {
        let shape = &self.image.shape;
        let host = word & OFFSET;
        let bad = word & L1_RESERVED != 0 || shape.within(host) != 0 || (host == 0 && word & COPIED != 0);
        if host == 0 && !bad {
            return None;
        }
        if bad || host < shape.cluster() || !self.counts.add(host, shape.cluster()) {
            self.findings.corrupt(|| format!("the L1 entry {index} ({word:#x}) points at no table"));
            if let Some(place) = place {
                self.cures.tables.push(place.saturating_add((index as u64).saturating_mul(8)));
            }
            return None;
        }
        Some(host)
    }

    /// The active L1 table and all below.
    fn active_tree(&mut self, l1: &[u64], place: u64) -> io::Result<()> {
        let mut order = Vec::new();
        let mut users: BTreeMap<u64, u32> = BTreeMap::new();
        for (index, word) in l1.iter().enumerate() {
            if let Some(host) = self.l1_entry(index, *word, Some(place)) {
                let users = users.entry(host).or_insert_with(|| {
                    order.push(host);
                    0
                });
                *users = users.saturating_add(1);
            }
        }
        order.into_iter().try_for_each(|host| self.table(host, users.get(&host).copied().unwrap_or(1), true))
    }

    /// A table that so many L1 tables refer to.
    fn table(&mut self, host: u64, users: u32, active: bool) -> io::Result<()> {
        let shape = self.image.shape;
        let words = words_at(self.image.storage.as_ref(), host, shape.cluster() / 8)?;
        let step = if shape.extended { 2 } else { 1 };
        for (index, pair) in words.chunks(step).enumerate() {
            let entry =
                Entry { word: pair.first().copied().unwrap_or(0), bitmap: pair.get(1).copied().unwrap_or(0) };
            if entry == Entry::default() {
                continue;
            }
            let sound = entry.is_sound(&shape) && self.count(&entry, users, active);
            if !sound {
                let word = entry.word;
                self.findings.corrupt(|| {
                    format!("the L2 entry {index} of the table at {host:#x} ({word:#x}) breaks the rules")
                });
                self.cures.add(host, index, shape.entries());
            }
        }
        Ok(())
    }

    /// Counts what an entry refers to; answers whether all of it is in the file.
    fn count(&mut self, entry: &Entry, users: u32, active: bool) -> bool {
        let shape = self.image.shape;
        if entry.word & COMPRESSED != 0 {
            let (offset, len) = shape.compressed(entry.word);
            if offset < shape.cluster() || !self.counts.add_times(offset, len, users) {
                return false;
            }
            if active {
                self.findings.allocated_clusters = self.findings.allocated_clusters.saturating_add(1);
                self.findings.compressed_clusters = self.findings.compressed_clusters.saturating_add(1);
                self.findings.fragmented_clusters = self.findings.fragmented_clusters.saturating_add(1);
            }
            return true;
        }
        if !entry.has_host(&shape) {
            return true;
        }
        let host = entry.host();
        let inside = shape.data_file
            || (host >= shape.cluster() && self.counts.add_times(host, shape.cluster(), users));
        if !inside {
            return false;
        }
        if active {
            self.findings.allocated_clusters = self.findings.allocated_clusters.saturating_add(1);
            if self.next != 0 && host != self.next {
                self.findings.fragmented_clusters = self.findings.fragmented_clusters.saturating_add(1);
            }
            self.next = host.saturating_add(shape.cluster());
        }
        true
    }

    fn snapshots(&mut self) -> io::Result<()> {
        let header = self.image.header();
        let storage = self.image.storage.as_ref();
        if header.snapshots == 0 {
            return Ok(());
        }
        let (list, len) = match read_table(storage, header.snapshots_offset, header.snapshots, header.size) {
            Ok(read) => read,
            Err(error) => {
                self.findings.corrupt(|| error.to_string());
                return Ok(());
            }
        };
        self.row(header.snapshots_offset, len, "list of snapshots");
        // Snapshots share most of their tables: each is walked once.
        let mut tables: BTreeMap<u64, u32> = BTreeMap::new();
        for snapshot in list {
            let bytes = u64::from(snapshot.l1_size).saturating_mul(8);
            let bad = bytes > super::header::L1_BYTES_MAX
                || self.image.shape.within(snapshot.l1_offset) != 0
                // What lies over something else is not walked: a hostile list would name one table all the time.
                || !self.counts.is_free(snapshot.l1_offset, bytes);
            if bad || !self.counts.add(snapshot.l1_offset, bytes) {
                let name = snapshot.name.clone();
                self.findings
                    .corrupt(|| format!("the L1 table of the snapshot {name:?} is at no place that can be"));
                continue;
            }
            let l1 = words_at(storage, snapshot.l1_offset, snapshot.l1_size.into())?;
            for (index, word) in l1.into_iter().enumerate() {
                if let Some(host) = self.l1_entry(index, word, None) {
                    let users = tables.entry(host).or_default();
                    *users = users.saturating_add(1);
                }
            }
        }
        tables.into_iter().try_for_each(|(host, users)| self.table(host, users, false))
    }

    /// The directory of bitmaps, their tables and bits (section "Bitmaps extension").
    fn bitmaps(&mut self) -> io::Result<()> {
        let header = self.image.header();
        let Some(extension) = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
            return Ok(());
        };
        let storage = self.image.storage.as_ref();
        let len = extension.directory_len;
        if extension.count as usize > super::bitmap::COUNT_MAX
            || len > super::bitmap::DIRECTORY_BYTES_MAX
            || !self.counts.add(extension.directory_offset, len)
        {
            self.findings.corrupt(|| "the directory of bitmaps is at no place that can be".to_owned());
            return Ok(());
        }
        let mut directory = vec![0; size(len)];
        storage.read_bytes(extension.directory_offset, &mut directory)?;
        let mut at = 0usize;
        for _ in 0..extension.count {
            let Some(entry) = directory.get(at..).filter(|entry| entry.len() >= 24) else {
                self.findings.corrupt(|| "the directory of bitmaps is cut off".to_owned());
                return Ok(());
            };
            let (table, entries) = (be64(entry, 0), be32(entry, 8));
            let name = usize::from(crate::endian::be16(entry, 18));
            let extra = size(be32(entry, 20).into());
            self.bitmap(table, entries)?;
            let len = 24usize.saturating_add(name).saturating_add(extra);
            at = at.saturating_add(len.checked_next_multiple_of(8).unwrap_or(usize::MAX));
        }
        Ok(())
    }

    fn bitmap(&mut self, table: u64, entries: u32) -> io::Result<()> {
        let bytes = u64::from(entries).saturating_mul(8);
        if bytes > super::header::L1_BYTES_MAX
            || self.image.shape.within(table) != 0
            || !self.counts.is_free(table, bytes)
            || !self.counts.add(table, bytes)
        {
            self.findings
                .corrupt(|| format!("the table of a bitmap at {table:#x} is at no place that can be"));
            return Ok(());
        }
        for word in words_at(self.image.storage.as_ref(), table, entries.into())? {
            let host = word & OFFSET;
            if host != 0
                && (self.image.shape.within(host) != 0 || !self.counts.add(host, self.image.shape.cluster()))
            {
                self.findings.corrupt(|| format!("a bitmap's cluster {host:#x} is at no place that can be"));
            }
        }
        Ok(())
    }

    fn refcounts(&mut self) -> io::Result<()> {
        let (offset, clusters) = self.image.refcounts.table();
        let cluster = self.image.shape.cluster();
        self.row(offset, u64::from(clusters).saturating_mul(cluster), "refcount table");
        for block in self.image.refcounts.blocks() {
            let good =
                self.image.shape.within(block) == 0 && block >= cluster && self.counts.add(block, cluster);
            if !good || self.counts.get(block) != 1 {
                self.findings
                    .corrupt(|| format!("the refcount block at {block:#x} is at no place that can be"));
            }
        }
        Ok(())
    }

    /// Stored against counted references.
    fn compare(&mut self) -> io::Result<Alone> {
        let (findings, bits) = (&mut self.findings, self.counts.bits);
        self.image.each_wrong(&self.counts, &mut |wrong| {
            match wrong {
                Wrong::Count { cluster, stored, counted } if stored > counted => {
                    findings.leaks = findings.leaks.saturating_add(1);
                    findings.say(|| {
                        format!(
                            "leaked: cluster {cluster} is counted {stored} times and used {counted} times"
                        )
                    });
                    // What is counted and not used is in the file, too.
                    let end = cluster.saturating_add(1) << bits;
                    findings.image_end_offset = findings.image_end_offset.max(end);
                }
                Wrong::Count { cluster, stored, counted } => findings.corrupt(|| {
                    format!("cluster {cluster} is counted {stored} times and used {counted} times")
                }),
                Wrong::Behind(number) => {
                    findings.leaks = findings.leaks.saturating_add(1);
                    findings.say(|| {
                        format!(
                            "leaked: the refcount block {number} counts what is behind the end of the file"
                        )
                    });
                }
            }
            Ok(())
        })
    }

    /// COPIED flags of the active tables against the counts as they are stored.
    fn owned_flags(&mut self, l1: &[u64], alone: &Alone) -> io::Result<()> {
        let shape = self.image.shape;
        let bits = shape.cluster_bits & 63;
        let mut seen = std::collections::HashSet::new();
        for word in l1.iter().filter(|word| **word & OFFSET != 0) {
            let host = word & OFFSET;
            if !seen.insert(host)
                || shape.within(host) != 0
                || host >= self.image.storage.len()
                || word & L1_RESERVED != 0
            {
                continue;
            }
            if alone.has(host >> bits) != (word & COPIED != 0) {
                self.findings
                    .corrupt(|| format!("the flag of the L2 table at {host:#x} does not fit its users"));
            }
            let words = words_at(self.image.storage.as_ref(), host, shape.cluster() / 8)?;
            let step = if shape.extended { 2 } else { 1 };
            for (index, pair) in words.chunks(step).enumerate() {
                let word = pair.first().copied().unwrap_or(0);
                let entry = Entry { word, bitmap: 0 };
                if !entry.has_host(&shape) || self.cures.has(host, index) {
                    continue;
                }
                let alone = shape.data_file || alone.has(entry.host() >> bits);
                if alone != (word & COPIED != 0) {
                    self.findings.corrupt(|| {
                        format!("the flag of the cluster at {:#x} does not fit its users", entry.host())
                    });
                }
            }
        }
        Ok(())
    }
}
