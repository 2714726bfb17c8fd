//! How metadata goes to the file, so that a power cut at any moment leaves an image all of whose references are counted and
//! whose every table was written before something points at it:
//!
//! 1. what is new of L1 and L2 tables is copied, and what has become free is listed: later changes wait for the next flush;
//! 2. refcounts, which count at least what the copies refer to; if there are new refcount blocks, a barrier, then the
//!    entries of their table;
//! 3. a barrier: guest data and refcounts are stable;
//! 4. L2 tables; if there are new ones, a barrier, then L1 entries;
//! 5. a barrier: all of it is stable;
//! 6. what nothing refers to any more is given a grace (see `gate`), punched out of the file and uncounted in memory.
//!
//! A cut before step 5 leaves clusters that are counted and not used; nothing else. With lazy refcounts step 2 is left to
//! the closing of the image, under a mark in the header that makes the next one count anew.
//!
//! A flush that begins while another one runs waits for it, and for one more that serves all who wait.

use super::header::COMPATIBLE_LAZY;
use super::{Qcow2, lock};
use crate::endian::size;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLockWriteGuard};

/// What the flush needs to know.
#[derive(Default)]
pub struct State {
    /// Held while one runs: how many were begun.
    running: Mutex<()>,
    begun: AtomicU64,
    /// The number of the last that succeeded, counted by when it began.
    done: AtomicU64,
    /// Clusters that have a user less.
    released: Mutex<Vec<u64>>,
    waiting: AtomicUsize,
}

/// No request is inside, and no flush runs: see [`Qcow2::quiesce`].
#[must_use = "requests enter again when this is dropped"]
pub struct Quiet<'a> {
    _closed: Vec<RwLockWriteGuard<'a, ()>>,
    _running: MutexGuard<'a, ()>,
}

impl State {
    /// A cluster of the file has a user less.
    pub fn release(&self, cluster: u64) {
        lock(&self.released).push(cluster);
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// How many clusters wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn take(&self) -> Vec<u64> {
        let released = std::mem::take(&mut *lock(&self.released));
        self.waiting.fetch_sub(released.len(), Ordering::Relaxed);
        released
    }
}

impl Qcow2 {
    /// Returns when everything written before is stable. Outside the gate.
    pub fn flush_metadata(&self) -> io::Result<()> {
        let lazy = lock(&self.header).compatible & COMPATIBLE_LAZY != 0;
        let wanted = self.flush.begun.load(Ordering::Acquire).saturating_add(1);
        let _running = lock(&self.flush.running);
        if self.flush.done.load(Ordering::Acquire) >= wanted {
            // One that began after this was called has served us too.
            return Ok(());
        }
        self.flush_now(!lazy, false)
    }

    /// As [`Self::flush_metadata`], refcounts included in any case.
    pub fn flush_all(&self) -> io::Result<()> {
        let _running = lock(&self.flush.running);
        self.flush_now(true, false)
    }

    /// Returns when no request is inside and all that they have done is in the file; none enters and no flush runs as
    /// long as the result lives.
    pub fn quiesce(&self) -> io::Result<Quiet<'_>> {
        // Most of the work is done while requests still run.
        self.flush_all()?;
        let running = lock(&self.flush.running);
        let closed = self.gate.close();
        self.flush_now(true, true)?;
        Ok(Quiet { _closed: closed, _running: running })
    }

    /// As [`Self::flush_all`], while the image is quiet.
    pub fn flush_quiet(&self) -> io::Result<()> {
        self.flush_now(true, true)
    }

    fn flush_now(&self, refcounts: bool, closed: bool) -> io::Result<()> {
        let number = self.flush.begun.fetch_add(1, Ordering::AcqRel).saturating_add(1);
        let released = self.flush.take();
        let l1 = self.map.take_l1_dirty();
        let tables = self.map.take_dirty();
        let done = self.write_metadata(refcounts, &l1, &tables);
        for table in &tables {
            table.writing.store(false, Ordering::Release);
        }
        if let Err(error) = done {
            self.map.dirty_again(&l1, &tables);
            if refcounts {
                self.refcounts.all_dirty();
            }
            released.into_iter().for_each(|cluster| self.flush.release(cluster));
            return Err(error);
        }
        self.flush.done.store(number, Ordering::Release);
        self.free(released, closed)
    }

    fn write_metadata(
        &self,
        refcounts: bool,
        l1: &[(usize, u64)],
        tables: &[std::sync::Arc<super::table::Table>],
    ) -> io::Result<()> {
        let storage = self.storage.as_ref();
        let pieces: Vec<_> = tables.iter().map(|table| (table.host, table.take_dirty())).collect();
        self.refcounts.extend(storage)?;
        if refcounts {
            let dirty = self.refcounts.take_dirty();
            for (offset, bytes) in &dirty.blocks {
                storage.write_bytes(*offset, bytes)?;
            }
            if !dirty.table.is_empty() {
                storage.flush()?;
            }
            for (offset, bytes) in &dirty.table {
                storage.write_bytes(*offset, bytes)?;
            }
            self.refcounts.written().into_iter().for_each(|cluster| self.flush.release(cluster));
        }
        if let Some(data) = &self.data {
            data.flush()?;
        }
        storage.flush()?;
        if pieces.is_empty() && l1.is_empty() {
            return Ok(());
        }
        for (host, runs) in &pieces {
            for (at, bytes) in runs {
                storage.write_bytes(host.saturating_add(*at), bytes)?;
            }
        }
        if !l1.is_empty() {
            storage.flush()?;
            let offset = self.map.l1().offset;
            for (index, word) in l1 {
                let at = offset.saturating_add((*index as u64).saturating_mul(8));
                storage.write_bytes(at, &word.to_be_bytes())?;
            }
        }
        storage.flush()
    }

    /// Takes a user from each of the clusters, and their space from those that have none left.
    fn free(&self, mut clusters: Vec<u64>, closed: bool) -> io::Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        if !closed {
            self.gate.grace();
        }
        self.end_packing();
        self.inflated.clear();
        clusters.sort_unstable();
        let storage = self.storage.as_ref();
        let bits = self.shape.cluster_bits & 63;
        let mut holes: Vec<(u64, u64)> = Vec::new();
        let mut last: Vec<u64> = Vec::new();
        let mut failed: io::Result<()> = Ok(());
        // What could not be done is tried again by the next flush, unless the file's damage will stand in its way then, too.
        let mut fail = |error: io::Error, rest: &[u64]| {
            if error.kind() != io::ErrorKind::InvalidData {
                rest.iter().for_each(|cluster| self.flush.release(*cluster));
            }
            failed = Err(error);
        };
        // Clusters are given a new owner only after their holes are punched: their last user goes at the end.
        for same in clusters.chunk_by(|a, b| a == b) {
            let Some(cluster) = same.first().copied() else { continue };
            let is_free = self.all_but_last(cluster, same.len() as u64).unwrap_or_else(|error| {
                fail(error, same);
                false
            });
            if is_free {
                last.push(cluster);
                match holes.last_mut() {
                    Some((start, count)) if start.saturating_add(*count) == cluster => {
                        *count = count.saturating_add(1)
                    }
                    _ => holes.push((cluster, 1)),
                }
            }
        }
        for (start, count) in holes {
            // Space that cannot be given back is used again later.
            let _ = storage.punch_hole(start << bits, count << bits);
        }
        {
            let mut metadata = self.map.metadata.write().unwrap_or_else(PoisonError::into_inner);
            last.iter().for_each(|cluster| metadata.remove(*cluster));
        }
        for cluster in last {
            if let Err(error) = self.refcounts.add(storage, cluster, -1) {
                fail(error, &[cluster]);
            }
        }
        failed
    }

    /// Takes so many users from a cluster, but not its last one; answers whether that is to go, too.
    fn all_but_last(&self, cluster: u64, count: u64) -> io::Result<bool> {
        let storage = self.storage.as_ref();
        let users = self.refcounts.get(storage, cluster)?;
        let all = count >= users;
        let now = size(count.min(users).saturating_sub(u64::from(all)));
        if now > 0 {
            self.refcounts.add(storage, cluster, (now as i64).saturating_neg())?;
        }
        Ok(all && users > 0)
    }
}
