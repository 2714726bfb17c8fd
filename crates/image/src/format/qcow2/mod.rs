//! qcow2, versions 2 and 3: clusters of a file mapped by two levels of tables, counted by refcounts.
//!
//! ```text
//!   request --gate--> map (L1, cached L2 tables: no lock) --> data: in place, from the backing file, inflated
//!                          |                                        |
//!                 cluster locks: whoever changes a mapping     refcounts (one lock, held for a few counts)
//!                          |                                        |
//!                          +--------------- flush ------------------+   metadata goes to the file here only
//! ```
//!
//! * Reads, and writes to clusters that the image owns alone, take no lock of the image.
//! * A write that needs a new cluster holds one of 64 locks by the cluster's number: it allocates, writes the data, fills
//!   what it does not cover, and then changes the entry. Until then readers see the old cluster.
//! * Metadata is changed in memory. [`Qcow2::flush_metadata`] writes it in an order in which a power cut at any moment leaves an
//!   image whose references are all counted (see `flush`).
//! * A cluster that lost its last reference is given to nobody before that is stable and every request that could still
//!   use it is over (see `gate`).
//!
//! Lock order: flush, gate, cluster locks (ascending), loading lock of a table, the cache's list, a table, the lists of what is dirty,
//! refcounts.
//!
//! Source: QEMU's docs/interop/qcow2.rst.

mod bitmap;
mod check;
mod codec;
mod compressed;
mod create;
mod data;
mod discard;
mod flush;
pub mod header;
#[cfg(test)]
mod hostile_test;
mod map;
mod noise;
#[cfg(test)]
mod power_test;
mod refcount;
mod resize;
#[cfg(test)]
mod room_test;
mod share;
mod snapshot;
mod table;
#[cfg(test)]
mod test;
mod write;

pub use bitmap::{Bitmap, Bits, Change};
pub use create::{CreateOptions, Preallocation};
pub use header::{Compression, Header};
pub use snapshot::Snapshot;

use crate::disk::{Content, Disk, Error, Status, check_range, read_only_error};
use crate::endian::{be64, size, words_be};
use crate::format::Format;
use crate::format::container::{Container, Fact, Facts};
use crate::format::findings::{Findings, Repair};
use crate::format::gate::Gate;
use crate::storage::Storage;
use header::{INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY};
use map::{L1, Map, Metadata};
use refcount::Refcounts;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use table::{OFFSET, Shape};

/// Locks for clusters whose mapping changes.
const CLUSTER_LOCKS: usize = 64;
const CLUSTER_LOCKS_MASK: u64 = CLUSTER_LOCKS as u64 - 1;

/// A qcow2 image.
pub struct Qcow2 {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    data: Option<Arc<dyn Storage>>,
    backing: Option<Arc<dyn Disk>>,
    shape: Shape,
    header: Mutex<Header>,
    capacity: AtomicU64,
    read_only: bool,
    /// Something in the file breaks the format's rules: nothing is written any more.
    damaged: AtomicBool,
    /// The header says what it must say while the image is written.
    opened: AtomicBool,
    gate: Gate,
    clusters: [Mutex<()>; CLUSTER_LOCKS],
    map: Map,
    refcounts: Refcounts,
    flush: flush::State,
    packing: Mutex<compressed::Packing>,
    inflated: compressed::Inflated,
    live: bitmap::Live,
}

/// What an image is opened with.
#[derive(Default)]
pub struct Parts {
    /// The disk below, if the header names a backing file.
    pub backing: Option<Arc<dyn Disk>>,
    /// The external data file, if the header names one.
    pub data: Option<Arc<dyn Storage>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qcow2 {
    /// Reads the header of an image.
    pub fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header, Error> {
        let mut start = vec![0; size(storage.len().min(1 << 21))];
        let read = storage.read_bytes(0, &mut start);
        crate::format::sound(path, "qcow2", read.map(|()| Header::parse(&start)))
    }

    /// Opens an image whose header was read. An image that was not closed in order is repaired if it may be written.
    pub fn open(path: &Path, storage: Arc<dyn Storage>, header: Header, parts: Parts) -> Result<Self, Error> {
        let read_only = storage.read_only();
        let writable_and = |bit: u64| !read_only && header.incompatible & bit != 0;
        if writable_and(INCOMPATIBLE_CORRUPT) {
            return Err(Error::Corrupt {
                path: path.to_path_buf(),
                format: "qcow2",
                what: "it is marked as damaged: run `yado image check --repair`, or open it read-only".into(),
            });
        }
        let repair = writable_and(INCOMPATIBLE_DIRTY);
        let this = Self::open_for_repair(path, storage, header, parts)?;
        if repair {
            this.check(Repair::All)?;
        }
        Ok(this)
    }

    /// Opens an image for a check that repairs, whatever its header says of its state. Nothing else may be written.
    pub fn open_for_repair(
        path: &Path,
        storage: Arc<dyn Storage>,
        header: Header,
        parts: Parts,
    ) -> Result<Self, Error> {
        if header.has_data_file() && parts.data.is_none() {
            let what = "it keeps its data in another file, which was not given".into();
            return Err(Error::Unsupported { path: path.to_path_buf(), what });
        }
        Self::assemble(path, storage, header, parts).map_err(|source| Error::io(path, source))
    }

    fn assemble(path: &Path, storage: Arc<dyn Storage>, header: Header, parts: Parts) -> io::Result<Self> {
        let shape = Shape {
            cluster_bits: header.cluster_bits,
            extended: header.extended_l2(),
            zero_flag: header.version >= 3,
            data_file: header.has_data_file(),
        };
        let l1 = read_l1(storage.as_ref(), header.l1_offset, header.l1_size)?;
        let refcounts = Refcounts::load(storage.as_ref(), &header)?;
        let metadata = metadata_of(&shape, &header, &l1, &refcounts, storage.len());
        let read_only = storage.read_only();
        Ok(Self {
            path: path.to_path_buf(),
            data: parts.data,
            backing: parts.backing,
            shape,
            capacity: AtomicU64::new(header.size),
            read_only,
            damaged: AtomicBool::new(false),
            opened: AtomicBool::new(false),
            gate: Gate::default(),
            clusters: std::array::from_fn(|_| Mutex::default()),
            map: Map::new(shape, l1, metadata),
            refcounts,
            flush: flush::State::default(),
            packing: Mutex::default(),
            inflated: compressed::Inflated::default(),
            live: bitmap::Live::default(),
            header: Mutex::new(header),
            storage,
        })
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        let mut header = lock(&self.header).clone();
        // The table of refcounts moves when it must grow.
        (header.reftable_offset, header.reftable_clusters) = self.refcounts.table();
        header
    }

    /// The file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The disk below.
    pub fn backing(&self) -> Option<&Arc<dyn Disk>> {
        self.backing.as_ref()
    }

    /// Where guest data lies.
    fn data(&self) -> &dyn Storage {
        self.data.as_deref().unwrap_or(self.storage.as_ref())
    }

    /// Notes that the file breaks the format's rules.
    fn damage(&self, what: &str) -> io::Error {
        if !self.damaged.swap(true, Ordering::AcqRel) && !self.read_only {
            let mut header = lock(&self.header);
            if header.version >= 3 {
                header.incompatible |= INCOMPATIBLE_CORRUPT;
                // Best effort: the next one to open it should know.
                let _ = self.storage.write_bytes(72, &header.incompatible.to_be_bytes());
            }
        }
        let text = format!("{what}: the image is damaged; `yado image check` says more");
        io::Error::new(io::ErrorKind::InvalidData, text)
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.capacity())?;
        if self.read_only || self.damaged.load(Ordering::Acquire) { Err(read_only_error()) } else { Ok(()) }
    }

    /// The locks of clusters from `first` to `last` (guest cluster numbers), in their order.
    fn lock_clusters(&self, first: u64, last: u64) -> Vec<MutexGuard<'_, ()>> {
        let count = last.saturating_sub(first).saturating_add(1);
        let ours = |number: u64| {
            let ahead = number.wrapping_sub(first) & CLUSTER_LOCKS_MASK;
            ahead < count
        };
        let numbered = (0u64..).zip(&self.clusters);
        numbered.filter(|(number, _)| ours(*number)).map(|(_, mutex)| lock(mutex)).collect()
    }

    /// Writes all that is only in memory and says in the header that the image was closed in order. The image can be
    /// used on.
    pub fn close(&self) -> io::Result<()> {
        if self.read_only || !self.opened.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.damaged.load(Ordering::Acquire) {
            return self.flush_metadata();
        }
        // What requests do must not come between what is written here and the mark that says that all is written.
        let _quiet = self.quiesce()?;
        self.end_recording()?;
        // The last one freed clusters; this writes that they are free.
        self.flush_quiet()?;
        let mut header = lock(&self.header);
        if header.incompatible & INCOMPATIBLE_DIRTY != 0 {
            header.incompatible &= !INCOMPATIBLE_DIRTY;
            self.storage.write_bytes(72, &header.incompatible.to_be_bytes())?;
            self.storage.flush()?;
        }
        self.opened.store(false, Ordering::Release);
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // Nobody is left to tell; what a flush has promised is in the file already.
        let _ = self.close();
    }
}

/// Reads an L1 table.
fn read_l1(storage: &dyn Storage, offset: u64, entries: u32) -> io::Result<L1> {
    let mut bytes = vec![0; size(u64::from(entries).saturating_mul(8).min(header::L1_BYTES_MAX))];
    storage.read_bytes(offset, &mut bytes)?;
    Ok(L1::new(words_be(&bytes), offset))
}

/// The clusters that hold metadata, of a file that ends at `end`.
fn metadata_of(shape: &Shape, header: &Header, l1: &L1, refcounts: &Refcounts, end: u64) -> Metadata {
    let mut metadata = Metadata::default();
    let bits = shape.cluster_bits & 63;
    // What is named behind the end of the file is used by nobody: it is refused when it is.
    let clusters = end.div_ceil(shape.cluster());
    let mut row = |offset: u64, bytes: u64| {
        let first = offset >> bits;
        let count = bytes.div_ceil(shape.cluster());
        (first..first.saturating_add(count).min(clusters)).for_each(|cluster| metadata.insert(cluster));
    };
    row(0, 1);
    row(header.l1_offset, u64::from(header.l1_size).saturating_mul(8));
    row(header.reftable_offset, u64::from(header.reftable_clusters).saturating_mul(shape.cluster()));
    refcounts.blocks().into_iter().for_each(|offset| row(offset, 1));
    for word in l1.words() {
        if word & OFFSET != 0 {
            row(word & OFFSET, 1);
        }
    }
    metadata
}

impl Qcow2 {
    /// What the header says, and the bitmaps.
    fn details(&self, header: &Header) -> Vec<(&'static str, Fact)> {
        let mut details = header.details();
        // Damage is what a check tells of.
        let bitmaps = self.bitmaps().unwrap_or_default();
        if !bitmaps.is_empty() {
            let row = |bitmap: Bitmap| {
                let flags = [(bitmap.is_stale(), "in-use"), (bitmap.records(), "auto")];
                let flags =
                    flags.into_iter().filter(|(is, _)| *is).map(|(_, name)| Fact::Text(name.to_owned()));
                Fact::Row(vec![
                    ("flags", Fact::List(flags.collect())),
                    ("granularity", Fact::Number(1 << (bitmap.granularity_bits & 63))),
                    ("name", Fact::Text(bitmap.name)),
                ])
            };
            details.push(("bitmaps", Fact::List(bitmaps.into_iter().map(row).collect())));
        }
        details
    }
}

impl Disk for Qcow2 {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffers: &dyn crate::Buffers) -> io::Result<()> {
        let _pass = self.gate.pass();
        check_range(offset, buffers.len(), self.capacity())?;
        self.read_inside(offset, buffers, 0, buffers.len())
    }

    fn write(&self, offset: u64, buffers: &dyn crate::Buffers) -> io::Result<()> {
        {
            let _pass = self.gate.pass();
            self.check_write(offset, buffers.len())?;
            self.open_for_change()?;
            self.live.mark(offset, buffers.len());
            self.write_inside(offset, buffers, buffers.len())?;
        }
        self.limit_dirty()
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.flush_metadata() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        {
            let _pass = self.gate.pass();
            self.check_write(offset, len)?;
            self.open_for_change()?;
            self.live.mark(offset, len);
            self.discard_inside(offset, len)?;
        }
        self.limit_dirty()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        {
            let _pass = self.gate.pass();
            self.check_write(offset, len)?;
            self.open_for_change()?;
            self.live.mark(offset, len);
            self.zero_inside(offset, len, unmap)?;
        }
        self.limit_dirty()
    }

    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        let _pass = self.gate.pass();
        check_range(offset, len, self.capacity())?;
        self.status_inside(offset, len)
    }

    fn resize(&self, capacity: u64) -> io::Result<()> {
        self.check_write(0, 0)?;
        self.open_for_change()?;
        self.resize_to(capacity)
    }

    fn snapshot(&self, name: &str) -> io::Result<()> {
        self.check_write(0, 0)?;
        self.open_for_change()?;
        self.create_snapshot(name, 0, 0).map(drop)
    }
}

impl Container for Qcow2 {
    fn facts(&self) -> Facts {
        let header = self.header();
        Facts {
            cluster_size: Some(header.cluster_size()),
            dirty: header.incompatible & INCOMPATIBLE_DIRTY != 0,
            details: self.details(&header),
            backing: header.backing.map(|name| (name, header.backing_format)),
        }
    }

    fn check(&self, repair: Repair) -> Result<Findings, Error> {
        self.check(repair)
    }

    fn close(&self) -> io::Result<()> {
        self.close()
    }

    fn set_backing(&self, backing: Option<(&str, Format)>) -> io::Result<()> {
        self.set_backing(backing.map(|(name, format)| (name.to_owned(), format.to_string())))
    }

    fn empty(&self) -> io::Result<()> {
        self.empty()
    }
}

/// What is stored in an L1 or reference table of another place: its words.
fn words_at(storage: &dyn Storage, offset: u64, count: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; size(count.saturating_mul(8).min(header::L1_BYTES_MAX))];
    storage.read_bytes(offset, &mut bytes)?;
    Ok(bytes.chunks_exact(8).map(|word| be64(word, 0)).collect())
}

/// A status for a range that reads as zeroes because nothing says otherwise.
fn absent(len: u64) -> Status {
    Status { len, content: Content::Zero, depth: 0, present: false, offset: None, compressed: false }
}
