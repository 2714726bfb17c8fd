//! Another size for the disk, and larger L1 tables.

use super::header::Header;
use super::map::L1;
use super::refcount::Run;
use super::table::OFFSET;
use super::{Qcow2, header, lock};
use crate::disk::Disk;
use crate::endian::{bytes_be, put, size};
use std::io;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// See [`Disk::resize`]. Outside the gate.
    pub fn resize_to(&self, capacity: u64) -> io::Result<()> {
        let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text.to_owned());
        if !capacity.is_multiple_of(512) {
            return Err(invalid("the size of a disk is a multiple of 512 bytes"));
        }
        let (entries, snapshots) = {
            let header = lock(&self.header);
            (header.l1_entries_for(capacity), header.snapshots > 0 && header.version < 3)
        };
        if snapshots {
            return Err(invalid("a version 2 image with snapshots cannot change its size"));
        }
        if entries.saturating_mul(8) > header::L1_BYTES_MAX {
            return Err(invalid("the disk would be too large for clusters of this size"));
        }
        {
            let _quiet = self.quiesce()?;
            self.open_for_change()?;
            self.check_resize_recording()?;
            if entries > self.map.l1().slots.len() as u64 {
                self.grow_l1(entries)?;
            }
            self.resize_quiet(capacity)?;
        }
        self.flush_metadata()
    }

    /// The L1 table is large enough.
    fn resize_quiet(&self, capacity: u64) -> io::Result<()> {
        let old = self.capacity();
        // What is cut off must not be there when the disk grows again, and what the disk did not show of the one below
        // must not show now. The header comes last, so that this is so at every moment.
        let below = self.backing.as_ref().map_or(0, |backing| backing.capacity()).min(capacity);
        let cluster = self.shape.cluster();
        let (from, to) = match capacity < old {
            true => (capacity, old),
            false => (old, below.checked_next_multiple_of(cluster).unwrap_or(below)),
        };
        if from < to {
            self.zero_inside(from, to.saturating_sub(from), true)?;
            self.flush_quiet()?;
        }
        if let Some(data) = &self.data {
            data.set_len(capacity)?;
        }
        self.storage.write_bytes(24, &capacity.to_be_bytes())?;
        self.storage.flush()?;
        lock(&self.header).size = capacity;
        self.capacity.store(capacity, Ordering::Release);
        self.resized_recording(old, capacity);
        Ok(())
    }

    /// Names another backing file, or none, in the header. What the disk shows is the caller's to keep.
    pub fn set_backing(&self, backing: Option<(String, String)>) -> io::Result<()> {
        self.check_write(0, 0)?;
        self.open_for_change()?;
        let _quiet = self.quiesce()?;
        let mut header = self.header();
        (header.backing, header.backing_format) = match backing {
            Some((name, format)) => (Some(name), Some(format)),
            None => (None, None),
        };
        self.switch_header(header)
    }

    /// Writes a header whose extensions or names have changed. The image is quiet. A disk writes a sector whole: the name of
    /// the backing file goes where the old header has nothing, and then one sector makes it the new one's.
    pub(super) fn switch_header(&self, header: Header) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let mut old = vec![0; size(self.shape.cluster())];
        storage.read_bytes(0, &mut old)?;
        match header.encode_beside(&old) {
            Some(switch) => {
                if let Some((at, name)) = switch.name {
                    storage.write_bytes(at, &name)?;
                    storage.flush()?;
                }
                storage.write_bytes(0, &switch.sector)?;
            }
            None if header.is_short() => {
                let text = "the backing file's name does not fit into the first cluster, beside the old one: use a shorter one";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            // Somebody else's extensions are longer than any sector.
            None => {
                let text = "the names do not fit into the first cluster";
                let bytes = header.encode();
                let bytes = bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, text))?;
                storage.write_bytes(0, &bytes)?;
            }
        }
        storage.flush()?;
        *lock(&self.header) = header;
        Ok(())
    }

    fn grow_l1(&self, entries: u64) -> io::Result<()> {
        let mut words = self.map.l1().words();
        words.resize(size(entries), 0);
        self.switch_l1(words, None)
    }

    /// Writes an L1 table into new clusters and makes it the active one, with another size of the disk if one is given.
    /// The gate is closed, and nothing is dirty.
    pub fn switch_l1(&self, words: Vec<u64>, capacity: Option<u64>) -> io::Result<()> {
        let run = self.new_l1(&words)?;
        self.switch_l1_to(run, words, capacity)
    }

    /// Writes an L1 table into new clusters, which are nobody's yet.
    pub fn new_l1(&self, words: &[u64]) -> io::Result<Run> {
        let cluster = self.shape.cluster();
        let clusters = (words.len() as u64).saturating_mul(8).div_ceil(cluster).max(1);
        let run = self.refcounts.allocate_row(self.storage.as_ref(), clusters)?;
        let mut bytes = bytes_be(words.iter().copied());
        bytes.resize(size(clusters.saturating_mul(cluster)), 0);
        let written = self.storage.write_bytes(run.offset, &bytes);
        written.inspect_err(|_| self.give_back(run))?;
        Ok(run)
    }

    /// Makes the L1 table the active one that lies at `run`. As [`Self::switch_l1`] otherwise.
    pub fn switch_l1_to(&self, run: Run, words: Vec<u64>, capacity: Option<u64>) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let cluster = self.shape.cluster();
        let (bits, clusters) = (self.shape.cluster_bits & 63, run.count);
        self.flush_quiet()?;
        let (old_offset, old_entries) = {
            let mut header = lock(&self.header);
            let old = (header.l1_offset, header.l1_size);
            header.l1_size = words.len() as u32;
            header.l1_offset = run.offset;
            header.size = capacity.unwrap_or(header.size);
            // Size, (no) encryption, entries and offset lie side by side in the first sector: one write.
            let mut field = [0; 24];
            put(&mut field, 0, &header.size.to_be_bytes());
            put(&mut field, 12, &header.l1_size.to_be_bytes());
            put(&mut field, 16, &header.l1_offset.to_be_bytes());
            storage.write_bytes(24, &field)?;
            old
        };
        storage.flush()?;
        if let Some(capacity) = capacity {
            self.capacity.store(capacity, Ordering::Release);
        }
        let mut metadata = self.map.metadata.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let first = run.offset >> bits;
        (first..first.saturating_add(clusters)).for_each(|at| metadata.insert(at));
        words
            .iter()
            .filter(|word| *word & OFFSET != 0)
            .for_each(|word| metadata.insert((word & OFFSET) >> bits));
        let old_clusters = u64::from(old_entries).saturating_mul(8).div_ceil(cluster);
        for at in 0..old_clusters {
            let at = (old_offset >> bits).saturating_add(at);
            metadata.remove(at);
            self.flush.release(at);
        }
        drop(metadata);
        self.map.replace(L1::new(words, run.offset));
        Ok(())
    }
}
