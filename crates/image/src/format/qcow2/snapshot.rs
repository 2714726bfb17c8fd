//! Internal snapshots: L1 tables of earlier times, which share clusters with the active one.
//!
//! All changes run with the gate closed. What is referenced twice is counted twice, and is nobody's to write in place. The
//! list of snapshots is written anew into other clusters and switched to with one write of the header.
//!
//! Source: docs/interop/qcow2.rst, section "Snapshots".

use super::header::{COMPATIBLE_LAZY, INCOMPATIBLE_DIRTY, SNAPSHOTS_MAX};
use super::table::{COMPRESSED, COPIED, Entry, L1_RESERVED, OFFSET};
use super::{Qcow2, lock, words_at};
use crate::disk::Disk;
use crate::endian::{be16, be32, be64, bytes_be, put, size};
use crate::storage::Storage;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest list of snapshots in bytes.
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Bytes of an entry before its extra data.
const ENTRY: usize = 40;
/// Longest extra data of an entry.
const EXTRA_MAX: usize = 1024;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the machine had run, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of saved machine state.
    pub vm_state: u64,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Instructions that had run, if known.
    pub icount: Option<u64>,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    extra: Vec<u8>,
}

fn damaged(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the list of snapshots is damaged: {what}"))
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("there is no snapshot {name:?}"))
}

/// Reads a list of snapshots; answers its bytes too.
pub fn read_table(
    storage: &dyn Storage,
    offset: u64,
    count: u32,
    size_now: u64,
) -> io::Result<(Vec<Snapshot>, u64)> {
    let most = storage.len().saturating_sub(offset).min(TABLE_BYTES_MAX);
    let mut snapshots = Vec::new();
    let mut at = offset;
    for _ in 0..count.min(SNAPSHOTS_MAX) {
        let left = most.saturating_sub(at.saturating_sub(offset));
        let mut bytes = vec![0; size(left.min((ENTRY + EXTRA_MAX + 2 * 65536) as u64))];
        storage.read_bytes(at, &mut bytes)?;
        let (snapshot, len) = parse(&bytes, size_now)?;
        snapshots.push(snapshot);
        at = at.saturating_add(len);
    }
    Ok((snapshots, at.saturating_sub(offset)))
}

fn parse(bytes: &[u8], size_now: u64) -> io::Result<(Snapshot, u64)> {
    let (id_len, name_len) = (usize::from(be16(bytes, 12)), usize::from(be16(bytes, 14)));
    let extra_len = size(be32(bytes, 36).into());
    if bytes.len() < ENTRY || extra_len > EXTRA_MAX {
        return Err(damaged("an entry is cut off or has too much extra data"));
    }
    let id_at = ENTRY.saturating_add(extra_len);
    let name_at = id_at.saturating_add(id_len);
    let end = name_at.saturating_add(name_len);
    let text = |from: usize, to: usize| {
        let text = bytes.get(from..to).ok_or_else(|| damaged("an entry is cut off"))?;
        Ok::<_, io::Error>(String::from_utf8_lossy(text).into_owned())
    };
    let extra = bytes.get(ENTRY..id_at).unwrap_or_default().to_vec();
    let snapshot = Snapshot {
        id: text(id_at, name_at)?,
        name: text(name_at, end)?,
        date: (be32(bytes, 16), be32(bytes, 20)),
        vm_clock: be64(bytes, 24),
        vm_state: if extra_len >= 8 { be64(&extra, 0) } else { be32(bytes, 32).into() },
        disk_size: if extra_len >= 16 { be64(&extra, 8) } else { size_now },
        icount: (extra_len >= 24).then(|| be64(&extra, 16)).filter(|count| *count != u64::MAX),
        l1_offset: be64(bytes, 0),
        l1_size: be32(bytes, 8),
        extra,
    };
    Ok((snapshot, end.checked_next_multiple_of(8).unwrap_or(end) as u64))
}

fn encode(snapshot: &Snapshot, into: &mut Vec<u8>) {
    let mut extra = snapshot.extra.clone();
    extra.resize(extra.len().max(24), 0);
    put(&mut extra, 0, &snapshot.vm_state.to_be_bytes());
    put(&mut extra, 8, &snapshot.disk_size.to_be_bytes());
    put(&mut extra, 16, &snapshot.icount.unwrap_or(u64::MAX).to_be_bytes());
    let mut entry = [0; ENTRY];
    put(&mut entry, 0, &snapshot.l1_offset.to_be_bytes());
    put(&mut entry, 8, &snapshot.l1_size.to_be_bytes());
    put(&mut entry, 12, &(snapshot.id.len() as u16).to_be_bytes());
    put(&mut entry, 14, &(snapshot.name.len() as u16).to_be_bytes());
    put(&mut entry, 16, &snapshot.date.0.to_be_bytes());
    put(&mut entry, 20, &snapshot.date.1.to_be_bytes());
    put(&mut entry, 24, &snapshot.vm_clock.to_be_bytes());
    put(&mut entry, 32, &u32::try_from(snapshot.vm_state).unwrap_or(0).to_be_bytes());
    put(&mut entry, 36, &(extra.len() as u32).to_be_bytes());
    for part in [&entry[..], &extra, snapshot.id.as_bytes(), snapshot.name.as_bytes()] {
        into.extend_from_slice(part);
    }
    into.resize(into.len().next_multiple_of(8), 0);
}

impl Qcow2 {
    /// All internal snapshots.
    pub fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        let header = self.header();
        Ok(read_table(self.storage.as_ref(), header.snapshots_offset, header.snapshots, header.size)?.0)
    }

    fn find_snapshot(list: &[Snapshot], name: &str) -> io::Result<usize> {
        let by_id = list.iter().position(|snapshot| snapshot.id == name);
        by_id.or_else(|| list.iter().position(|snapshot| snapshot.name == name)).ok_or_else(|| missing(name))
    }

    /// Keeps the disk as it is now under a name. `vm_clock` is in nanoseconds.
    pub fn create_snapshot(&self, name: &str, vm_clock: u64, vm_state: u64) -> io::Result<Snapshot> {
        let invalid = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text.to_owned()));
        if self.shape.data_file {
            return invalid("an image with an external data file keeps no snapshots inside");
        }
        if name.is_empty() || name.len() > 65535 {
            return invalid("a snapshot needs a name of at most 65535 bytes");
        }
        self.open_for_change()?;
        let _quiet = self.quiesce()?;
        let mut list = self.snapshots()?;
        if list.iter().any(|snapshot| snapshot.name == name) {
            return invalid("there is a snapshot with this name already");
        }
        if list.len() >= size(SNAPSHOTS_MAX.into()) {
            return invalid("the image has as many snapshots as the format allows");
        }
        let storage = self.storage.as_ref();
        let words = self.map.l1().words();
        let clusters = (words.len() as u64).saturating_mul(8).div_ceil(self.shape.cluster()).max(1);
        // First of all: nothing is changed if one of them cannot be done.
        let copy = self.refcounts.allocate_row(storage, clusters)?;
        let mut bytes = bytes_be(words.iter().map(|word| word & !COPIED));
        bytes.resize(size(clusters.saturating_mul(self.shape.cluster())), 0);
        let ready = storage.write_bytes(copy.offset, &bytes).and_then(|()| self.count_tree(&words));
        ready.inspect_err(|_| self.give_back(copy))?;
        self.set_unfinished(true)?;
        self.mark_owned()?;
        self.flush_quiet()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let number = list.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok()).max().unwrap_or(0);
        let snapshot = Snapshot {
            id: number.saturating_add(1).to_string(),
            name: name.to_owned(),
            date: (now.as_secs() as u32, now.subsec_nanos()),
            vm_clock,
            vm_state,
            disk_size: self.capacity(),
            icount: None,
            l1_offset: copy.offset,
            l1_size: words.len() as u32,
            extra: Vec::new(),
        };
        list.push(snapshot.clone());
        self.write_snapshots(&list)?;
        self.set_unfinished(false)?;
        Ok(snapshot)
    }

    /// Says in the header that counts and flags may not fit each other, or that they do again: whoever opens the image
    /// after a cut in between, to write it, counts anew. Version 2 has no such mark.
    fn set_unfinished(&self, is: bool) -> io::Result<()> {
        let mut header = lock(&self.header);
        if header.version < 3 || header.compatible & COMPATIBLE_LAZY != 0 {
            return Ok(());
        }
        let rest = header.incompatible & !INCOMPATIBLE_DIRTY;
        let incompatible = rest | if is { INCOMPATIBLE_DIRTY } else { 0 };
        self.storage.write_bytes(72, &incompatible.to_be_bytes())?;
        self.storage.flush()?;
        header.incompatible = incompatible;
        Ok(())
    }

    /// Forgets a snapshot, by its number or name.
    pub fn delete_snapshot(&self, name: &str) -> io::Result<()> {
        self.open_for_change()?;
        {
            let _quiet = self.quiesce()?;
            let mut list = self.snapshots()?;
            let snapshot = list.remove(Self::find_snapshot(&list, name)?);
            let words = self.snapshot_l1(&snapshot)?;
            // Everything must be readable before anything is changed.
            self.each_reference(&words, &mut |_| Ok(()))?;
            self.set_unfinished(true)?;
            self.write_snapshots(&list)?;
            self.drop_tree(&words, snapshot.l1_offset, snapshot.l1_size)?;
            self.set_unfinished(false)?;
        }
        self.flush_all()
    }

    /// Makes the disk what it was. What it is now is lost.
    pub fn apply_snapshot(&self, name: &str) -> io::Result<()> {
        self.open_for_change()?;
        {
            let _quiet = self.quiesce()?;
            let list = self.snapshots()?;
            let snapshot = list.get(Self::find_snapshot(&list, name)?).ok_or_else(|| missing(name))?;
            self.open_for_change()?;
            let old = self.map.l1().words();
            let mut words = self.snapshot_l1(snapshot)?;
            let entries = lock(&self.header).l1_entries_for(snapshot.disk_size);
            if entries.saturating_mul(8) > super::header::L1_BYTES_MAX
                || !snapshot.disk_size.is_multiple_of(512)
            {
                return Err(damaged("a disk of that size cannot be"));
            }
            words.resize(words.len().max(size(entries)), 0);
            self.each_reference(&old, &mut |_| Ok(()))?;
            let size_now = self.capacity();
            if snapshot.disk_size != size_now {
                self.check_resize_recording()?;
            }
            // Nothing is changed if one of them cannot be done.
            let active: Vec<u64> = words.iter().map(|word| word & !COPIED).collect();
            let place = self.new_l1(&active)?;
            self.count_tree(&words).inspect_err(|_| self.give_back(place))?;
            self.set_unfinished(true)?;
            self.switch_l1_to(place, active, Some(snapshot.disk_size))?;
            if snapshot.disk_size != size_now {
                self.resized_recording(size_now, snapshot.disk_size);
            }
            self.live.mark(0, snapshot.disk_size);
            self.each_reference(&old, &mut |cluster| {
                self.flush.release(cluster);
                Ok(())
            })?;
            self.flush_quiet()?;
            self.mark_owned()?;
            self.flush_quiet()?;
            self.set_unfinished(false)?;
        }
        self.flush_all()
    }

    /// The disk as it was when a snapshot was made, for reading. The image itself must be open for reading only.
    pub fn at_snapshot(&self, name: &str) -> Result<Self, crate::Error> {
        let io = |source| crate::Error::io(&self.path, source);
        if !self.read_only {
            return Err(crate::Error::Options("a snapshot is read where nothing is written".into()));
        }
        let list = self.snapshots().map_err(io)?;
        let snapshot = Self::find_snapshot(&list, name)
            .ok()
            .and_then(|at| list.get(at))
            .ok_or_else(|| io(missing(name)))?;
        self.snapshot_l1(snapshot).map_err(io)?;
        let mut header = self.header();
        header.l1_offset = snapshot.l1_offset;
        header.l1_size = snapshot.l1_size;
        header.size = snapshot.disk_size;
        if header.l1_entries_for(header.size) > u64::from(header.l1_size) {
            return Err(io(damaged("a snapshot's L1 table is too small for its disk")));
        }
        let parts = super::Parts { backing: self.backing.clone(), data: self.data.clone() };
        Self::open(&self.path, self.storage.clone(), header, parts)
    }

    /// Counts all references of an L1 table once more; if one cannot be, none is.
    fn count_tree(&self, words: &[u64]) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let mut counted = 0u64;
        let done = self.each_reference(words, &mut |cluster| {
            self.refcounts.add(storage, cluster, 1)?;
            counted = counted.saturating_add(1);
            Ok(())
        });
        if done.is_err() {
            self.each_reference(words, &mut |cluster| {
                if counted > 0 {
                    counted = counted.saturating_sub(1);
                    self.refcounts.add(storage, cluster, -1)?;
                }
                Ok(())
            })?;
        }
        done
    }

    /// Takes away all references of an L1 table and its clusters, and marks what the active one owns alone now.
    fn drop_tree(&self, words: &[u64], offset: u64, entries: u32) -> io::Result<()> {
        self.each_reference(words, &mut |cluster| {
            self.flush.release(cluster);
            Ok(())
        })?;
        let clusters = u64::from(entries).saturating_mul(8).div_ceil(self.shape.cluster());
        (0..clusters).for_each(|at| {
            self.release_cluster(offset.saturating_add(at << (self.shape.cluster_bits & 63)));
        });
        self.flush_quiet()?;
        self.mark_owned()?;
        self.flush_quiet()
    }

    fn snapshot_l1(&self, snapshot: &Snapshot) -> io::Result<Vec<u64>> {
        let bytes = u64::from(snapshot.l1_size).saturating_mul(8);
        let end = snapshot.l1_offset.saturating_add(bytes);
        if bytes > super::header::L1_BYTES_MAX
            || self.shape.within(snapshot.l1_offset) != 0
            || end > self.storage.len()
        {
            return Err(damaged("a snapshot's L1 table is at no place that can be"));
        }
        words_at(self.storage.as_ref(), snapshot.l1_offset, snapshot.l1_size.into())
    }

    /// Writes the list into new clusters and switches the header to it.
    fn write_snapshots(&self, list: &[Snapshot]) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let bits = self.shape.cluster_bits & 63;
        let (old_offset, old_count, size_now) = {
            let header = lock(&self.header);
            (header.snapshots_offset, header.snapshots, header.size)
        };
        let (_, old_len) = read_table(storage, old_offset, old_count, size_now)?;
        let mut bytes = Vec::new();
        list.iter().for_each(|snapshot| encode(snapshot, &mut bytes));
        let mut offset = 0;
        if !bytes.is_empty() {
            let clusters = (bytes.len() as u64).div_ceil(self.shape.cluster());
            offset = self.refcounts.allocate_row(storage, clusters)?.offset;
            bytes.resize(size(clusters << bits), 0);
            storage.write_bytes(offset, &bytes)?;
            self.flush_quiet()?;
        }
        let mut field = [0; 12];
        put(&mut field, 0, &(list.len() as u32).to_be_bytes());
        put(&mut field, 4, &offset.to_be_bytes());
        storage.write_bytes(60, &field)?;
        storage.flush()?;
        {
            let mut header = lock(&self.header);
            header.snapshots = list.len() as u32;
            header.snapshots_offset = offset;
        }
        if old_offset != 0 {
            for at in 0..old_len.div_ceil(self.shape.cluster()) {
                self.release_cluster(old_offset.saturating_add(at << bits));
            }
        }
        self.flush_quiet()
    }

    /// Calls `with` for each cluster that an L1 table refers to, once for each reference: L2 tables and guest data. The
    /// tables are read from the file, which must know all.
    pub fn each_reference(&self, l1: &[u64], with: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<()> {
        let bits = self.shape.cluster_bits & 63;
        let end = self.storage.len();
        let inside = |offset: u64| {
            let good = offset < end && offset >= self.shape.cluster();
            if good { Ok(offset >> bits) } else { Err(damaged("a table points outside the file")) }
        };
        for word in l1.iter().filter(|word| *word & OFFSET != 0) {
            let host = word & OFFSET;
            if word & L1_RESERVED != 0 || self.shape.within(host) != 0 {
                return Err(damaged("an L1 entry breaks the rules"));
            }
            with(inside(host)?)?;
            let words = words_at(self.storage.as_ref(), host, self.shape.cluster() / 8)?;
            for pair in words.chunks(if self.shape.extended { 2 } else { 1 }) {
                let entry = Entry {
                    word: pair.first().copied().unwrap_or(0),
                    bitmap: pair.get(1).copied().unwrap_or(0),
                };
                if !entry.is_sound(&self.shape) {
                    return Err(damaged("an L2 entry breaks the rules"));
                }
                if entry.word & COMPRESSED != 0 {
                    inside(self.shape.compressed(entry.word).0)?;
                    self.compressed_clusters(entry.word).try_for_each(&mut *with)?;
                } else if entry.has_host(&self.shape) && !self.shape.data_file {
                    with(inside(entry.host())?)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the COPIED flags of the active tables say whose refcount is one. The gate is closed.
    pub fn mark_owned(&self) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let bits = self.shape.cluster_bits & 63;
        let l1 = self.map.l1();
        let owned = |offset: u64| Ok::<_, io::Error>(self.refcounts.get(storage, offset >> bits)? == 1);
        for (index, word) in l1.words().into_iter().enumerate().filter(|(_, word)| word & OFFSET != 0) {
            let host = word & OFFSET;
            let alone = owned(host)?;
            // A table that a snapshot shares is changed in place all the same: only its flags are.
            let table = self.map.mark_slot(storage, index, alone)?;
            let Some(table) = table else { continue };
            let Some(mut change) = table.change() else { continue };
            let mut first = false;
            for at in 0..self.shape.entries() {
                let entry = table.entry(at);
                if entry == Entry::BROKEN || !entry.has_host(&self.shape) {
                    continue;
                }
                let mark = self.shape.data_file || owned(entry.host())?;
                let word = if mark { entry.word | COPIED } else { entry.word & !COPIED };
                if word != entry.word {
                    first |= change.set(at, Entry { word, ..entry });
                }
            }
            drop(change);
            if first {
                self.map.note_dirty(&table);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn entries_come_back(name in "\\PC{1,40}", id in 1u64.., date: (u32, u32), vm_state: u64, icount: Option<u64>) {
            let snapshot = Snapshot {
                id: id.to_string(), name, date, vm_clock: 7, vm_state, disk_size: 512,
                icount: icount.filter(|count| *count != u64::MAX), l1_offset: 1 << 20, l1_size: 3, extra: vec![0; 24],
            };
            let mut bytes = Vec::new();
            encode(&snapshot, &mut bytes);
            let (back, len) = parse(&bytes, 0).unwrap();
            prop_assert_eq!(len, bytes.len() as u64);
            prop_assert_eq!(Snapshot { extra: vec![0; 24], ..back }, snapshot);
        }

        #[test]
        fn hostile_entries_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes, 0);
        }
    }
}
