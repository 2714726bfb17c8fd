//! Compressed clusters: read, and written side by side into clusters of the file.

use super::codec::{self, Deflater};
use super::table::{COMPRESSED, Entry};
use super::{Qcow2, lock};
use crate::disk::Disk;
use crate::endian::size;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

/// Inflated clusters that are kept, in each of [`SHARDS`] places.
const KEPT: usize = 4;
const SHARDS: usize = 4;

/// Inflated clusters that were read last, by their descriptors.
#[derive(Default)]
pub struct Inflated([Mutex<Kept>; SHARDS]);

/// Descriptors with their clusters, the oldest first.
type Kept = VecDeque<(u64, Arc<Vec<u8>>)>;

impl Inflated {
    fn shard(&self, descriptor: u64) -> &Mutex<Kept> {
        let [first, ..] = &self.0;
        self.0.get((descriptor >> 9) as usize % SHARDS).unwrap_or(first)
    }

    /// Forgets everything: places in the file get new owners.
    pub fn clear(&self) {
        self.0.iter().for_each(|shard| lock(shard).clear());
    }
}

/// Where the next compressed cluster goes.
#[derive(Default)]
pub struct Packing {
    next: u64,
    end: u64,
}

impl Qcow2 {
    /// A compressed cluster by the word of its entry.
    pub fn inflate(&self, descriptor: u64) -> io::Result<Arc<Vec<u8>>> {
        let shard = self.inflated.shard(descriptor);
        if let Some((_, cluster)) = lock(shard).iter().find(|(kept, _)| *kept == descriptor) {
            return Ok(cluster.clone());
        }
        let (offset, len) = self.shape.compressed(descriptor);
        let mut from = vec![0; size(len)];
        self.storage.read_bytes(offset, &mut from)?;
        let mut cluster = vec![0; size(self.shape.cluster())];
        let compression = lock(&self.header).compression;
        codec::inflate(compression, &from, &mut cluster)?;
        let cluster = Arc::new(cluster);
        let mut kept = lock(shard);
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back((descriptor, cluster.clone()));
        Ok(cluster)
    }

    /// A deflater for this image.
    pub fn deflater(&self) -> io::Result<Deflater> {
        Deflater::new(lock(&self.header).compression)
    }

    /// Writes a whole cluster compressed, or as it is if that is not shorter. `offset` is a cluster's; the last cluster of
    /// the disk is given whole, with zeroes behind the disk's end.
    pub fn write_compressed(&self, offset: u64, cluster: &[u8], deflater: &mut Deflater) -> io::Result<()> {
        let on_disk = self.capacity().saturating_sub(offset).min(self.shape.cluster());
        self.check_write(offset, on_disk)?;
        if self.shape.within(offset) != 0 || cluster.len() as u64 != self.shape.cluster() || on_disk == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "only whole clusters can be compressed"));
        }
        let deflated = if self.shape.data_file { None } else { deflater.deflate(cluster) };
        let Some(deflated) = deflated else {
            let bytes = cluster.get(..size(on_disk)).unwrap_or_default();
            return self.write(offset, &crate::WriteFrom(bytes));
        };
        {
            let _pass = self.gate.pass();
            self.open_for_change()?;
            self.live.mark(offset, on_disk);
            let number = offset >> (self.shape.cluster_bits & 63);
            let _cluster = self.lock_clusters(number, number);
            let at = self.pack(deflated.len() as u64)?;
            let word = self.shape.compressed_entry(at, deflated.len() as u64);
            if let Err(error) = self.storage.write_bytes(at, &deflated) {
                self.release_now(word)?;
                return Err(error);
            }
            self.replace_entry(offset, Entry { word, bitmap: 0 })?;
        }
        self.limit_dirty()
    }

    /// A place for `len` bytes, at most a cluster; each cluster of the file that it touches has one user more.
    fn pack(&self, len: u64) -> io::Result<u64> {
        let storage = self.storage.as_ref();
        let bits = self.shape.cluster_bits & 63;
        let mut packing = lock(&self.packing);
        let count_up = |from: u64, to: u64| {
            let clusters = (from >> bits)..=(to.saturating_sub(1) >> bits);
            clusters.into_iter().try_for_each(|cluster| self.refcounts.add(storage, cluster, 1).map(drop))
        };
        let fits = packing.next.saturating_add(len) <= packing.end;
        if packing.next < packing.end {
            let full = self.refcounts.get(storage, packing.next >> bits)? >= self.refcounts.max();
            if fits && !full {
                let at = packing.next;
                count_up(at, at.saturating_add(len))?;
                packing.next = at.saturating_add(len);
                return Ok(at);
            }
            if full {
                *packing = Packing::default();
            }
        }
        let run = self.refcounts.allocate(storage, 1)?;
        let (old, at) = (packing.next, if run.offset == packing.end { packing.next } else { run.offset });
        let end = run.offset.saturating_add(self.shape.cluster());
        if at == old && old < packing.end {
            // The first part of it lies in the cluster before.
            count_up(at, packing.end)?;
        }
        *packing = Packing { next: at.saturating_add(len), end };
        Ok(at)
    }

    /// Stops packing into the current cluster: what is written later must not share it.
    pub fn end_packing(&self) {
        *lock(&self.packing) = Packing::default();
    }

    /// The clusters of the file that a compressed entry uses.
    pub fn compressed_clusters(&self, word: u64) -> std::ops::RangeInclusive<u64> {
        let (offset, len) = self.shape.compressed(word & !COMPRESSED);
        let bits = self.shape.cluster_bits & 63;
        (offset >> bits)..=(offset.saturating_add(len.saturating_sub(1)) >> bits)
    }
}
