//! QED: clusters behind two levels of tables, and nothing that counts them. Little-endian.
//!
//! Entries of the L1 table (one, always there) are places of L2 tables, whose entries are places of clusters; 0 is "none", and
//! 1 in an L2 table "zeroes". New tables and clusters are added to the file's end. The format's own mark for "not
//! closed" (`NEED_CHECK`) is understood and never set: nothing is in the file before what it points at (see
//! [`mapped`](super::mapped)).
//!
//! Source: QEMU's docs/interop/qed_spec.txt.

mod check;
mod header;
#[cfg(test)]
mod test;

pub use header::Header;
pub(crate) use header::MAGIC;

use super::Format;
use super::container::{Container, Facts};
use super::findings::{Findings, Repair};
use super::mapped::{Layout, Mapped, Place, Rank, Room, SECTOR, Sectors, Tail, damaged};
use crate::disk::{Disk, Error};
use crate::endian::{le64, size};
use crate::storage::Storage;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An entry that says "zeroes".
const ZERO: u64 = 1;
const ENTRY: u64 = 8;
const NAME_LENGTH: &str = "the name of a QED image's backing file has 1 to 1023 bytes";

/// How a new image is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster, as a power of two: 12 to 26.
    pub cluster_bits: u32,
    /// Clusters of a table: 1, 2, 4, 8 or 16.
    pub table_clusters: u64,
    /// Name of the backing file, and its format.
    pub backing: Option<(String, Format)>,
}

impl CreateOptions {
    /// As usual.
    pub fn new(size: u64) -> Self {
        Self { size, cluster_bits: 16, table_clusters: 4, backing: None }
    }

    /// The header of such an image.
    pub fn header(&self) -> Result<Header, String> {
        let mut header = Header::new(self.cluster_bits, self.table_clusters, self.size);
        if !(12..=26).contains(&self.cluster_bits) {
            return Err("QED clusters have 4 KiB to 64 MiB".into());
        }
        if !self.table_clusters.is_power_of_two() || self.table_clusters > 16 {
            return Err("QED tables have 1, 2, 4, 8 or 16 clusters".into());
        }
        if !self.size.is_multiple_of(512) {
            return Err("the size of a disk is a multiple of 512 bytes".into());
        }
        if self.size > header.capacity_max() {
            return Err("the disk is too large for clusters of this size: use larger clusters".into());
        }
        let backing = self.backing.as_ref().map(|(name, format)| (name.as_str(), *format == Format::Raw));
        if !header.name_backing(backing) {
            return Err(NAME_LENGTH.into());
        }
        Ok(header)
    }
}

/// How a QED image is laid out.
pub struct Layer {
    /// What does not change while the image is open.
    fixed: Header,
    header: Mutex<Header>,
    capacity: AtomicU64,
    /// Held while an L2 table is added.
    tables: Mutex<()>,
    tail: Tail,
}

/// A QED image.
pub type Qed = Mapped<Layer>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qed {
    /// Reads the header of an image.
    pub fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header, Error> {
        super::sound(path, "QED", Header::read(storage))
    }

    /// Opens an image whose header was read. One that another program has not closed in order is checked and repaired
    /// if it may be written.
    pub fn open(
        path: &Path,
        storage: Arc<dyn Storage>,
        header: Header,
        backing: Option<Arc<dyn Disk>>,
    ) -> Result<Self, Error> {
        let repair = header.needs_check() && !storage.read_only();
        let this = Self::open_for_repair(path, storage, header, backing)?;
        if repair {
            let found = this.check(Repair::All)?;
            if found.corruptions > 0 || found.errors > 0 {
                let what =
                    "it was not closed in order, and cannot be repaired without loss: open it read-only"
                        .into();
                return Err(Error::Corrupt { path: path.to_path_buf(), format: "QED", what });
            }
        }
        Ok(this)
    }

    /// Opens an image for a check that repairs, whatever its header says of its state.
    pub fn open_for_repair(
        path: &Path,
        storage: Arc<dyn Storage>,
        header: Header,
        backing: Option<Arc<dyn Disk>>,
    ) -> Result<Self, Error> {
        if header.l1.saturating_add(header.table_bytes()) > storage.len() {
            let what = "its L1 table reaches beyond the end of the file".into();
            return Err(Error::Corrupt { path: path.to_path_buf(), format: "QED", what });
        }
        let layer = Layer {
            capacity: AtomicU64::new(header.capacity),
            header: Mutex::new(header.clone()),
            tables: Mutex::default(),
            tail: Tail::new(storage.len().checked_next_multiple_of(header.cluster()).unwrap_or(u64::MAX)),
            fixed: header,
        };
        Ok(Mapped::new(path, layer, storage, backing))
    }

    /// Writes a new image into empty storage and opens it.
    pub fn create(
        path: &Path,
        storage: Arc<dyn Storage>,
        options: &CreateOptions,
        backing: Option<Arc<dyn Disk>>,
    ) -> Result<Self, Error> {
        let header = options.header().map_err(Error::Options)?;
        if storage.room(u64::MAX) != u64::MAX {
            let what = "QED images grow at their end, which a device or an export cannot: use qcow2".into();
            return Err(Error::Unsupported { path: path.to_path_buf(), what });
        }
        let write = || {
            storage.set_len(header.l1.saturating_add(header.table_bytes()))?;
            // What was never written reads as zeroes, unless this is a device.
            storage.zero_range(header.l1, header.table_bytes())?;
            if let Some((at, name)) = header.name() {
                storage.write_bytes(at, name)?;
            }
            storage.write_bytes(0, &header.encode())?;
            storage.flush()
        };
        write().map_err(|source| Error::io(path, source))?;
        Self::open(path, storage, header, backing)
    }
}

impl Layer {
    /// Where the L1 entry for an offset of the disk is.
    fn l1_entry(&self, offset: u64) -> u64 {
        self.fixed.l1.saturating_add((offset >> (self.fixed.span_bits() & 63)).saturating_mul(ENTRY))
    }

    /// The number of the L2 entry for an offset of the disk, in its table.
    fn l2_index(&self, offset: u64) -> u64 {
        offset >> (self.fixed.cluster_bits & 63) & (1u64 << (self.fixed.table_bits() & 63)).wrapping_sub(1)
    }

    /// The L2 table for an offset of the disk.
    fn table(&self, sectors: &Sectors, offset: u64) -> io::Result<Option<u64>> {
        match sectors.word(self.l1_entry(offset))? {
            0 => Ok(None),
            at if self.is_table(at, sectors.storage().len()) => Ok(Some(at)),
            at => Err(damaged(format_args!("the L1 entry for offset {offset:#x} ({at:#x}) names no table"))),
        }
    }

    /// Whether a row of clusters can be at a place of a file of `len` bytes: behind the header, not in the L1 table.
    fn is_place(&self, at: u64, bytes: u64, len: u64) -> bool {
        let end = at.saturating_add(bytes);
        let l1 = self.fixed.l1..self.fixed.l1.saturating_add(self.fixed.table_bytes());
        self.fixed.is_aligned(at)
            && at >= self.fixed.header_bytes()
            && (end <= l1.start || at >= l1.end)
            && end <= len.checked_next_multiple_of(self.fixed.cluster()).unwrap_or(u64::MAX)
    }

    fn is_table(&self, at: u64, len: u64) -> bool {
        self.is_place(at, self.fixed.table_bytes(), len)
    }

    fn is_cluster(&self, at: u64, len: u64) -> bool {
        self.is_place(at, self.fixed.cluster(), len)
    }

    /// The entries of a table from `index` on that lie in one sector.
    fn entries(&self, sectors: &Sectors, table: u64, index: u64) -> io::Result<Vec<u64>> {
        let at = table.saturating_add(index.saturating_mul(ENTRY));
        let bytes = sectors.read(at / SECTOR)?;
        let words = bytes.get(size(at % SECTOR)..).unwrap_or_default().chunks_exact(ENTRY as usize);
        Ok(words.map(|word| le64(word, 0)).collect())
    }

    /// Sets the entries of the clusters that a range touches: to `first`, and for each next cluster `step` more.
    fn set_entries(&self, sectors: &Sectors, offset: u64, len: u64, first: u64, step: u64) -> io::Result<()> {
        let table = self.table(sectors, offset)?.ok_or_else(|| damaged("a table is gone"))?;
        let bits = self.fixed.cluster_bits & 63;
        let last = offset.saturating_add(len.saturating_sub(1)) >> bits;
        let mut value = first;
        for number in offset >> bits..=last {
            let at = table.saturating_add(self.l2_index(number << bits).saturating_mul(ENTRY));
            sectors.set(at, Rank::Leaf, &value.to_le_bytes())?;
            value = value.saturating_add(step);
        }
        Ok(())
    }

    /// The L2 table for an offset, a new one if there is none.
    fn table_or_new(&self, sectors: &Sectors, offset: u64) -> io::Result<u64> {
        if let Some(table) = self.table(sectors, offset)? {
            return Ok(table);
        }
        let _tables = lock(&self.tables);
        if let Some(table) = self.table(sectors, offset)? {
            return Ok(table);
        }
        let cluster = self.fixed.cluster();
        let table = self.tail.append(sectors.storage(), self.fixed.table_bytes(), 0, cluster)?;
        sectors.set(self.l1_entry(offset), Rank::Root, &table.to_le_bytes())?;
        Ok(table)
    }

    fn write_header(
        &self,
        storage: &dyn Storage,
        change: impl FnOnce(&mut Header) -> bool,
    ) -> io::Result<()> {
        let mut held = lock(&self.header);
        let mut header = held.clone();
        if !change(&mut header) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, NAME_LENGTH));
        }
        if header.name() != held.name()
            && let Some((at, name)) = header.name()
        {
            // Where the old name is not, so that one of the two holds at any moment.
            storage.write_bytes(at, name)?;
            storage.flush()?;
        }
        storage.write_bytes(0, &header.encode())?;
        storage.flush()?;
        *held = header;
        Ok(())
    }
}

impl Layout for Layer {
    fn name(&self) -> &'static str {
        "QED"
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn block(&self) -> u64 {
        self.fixed.cluster()
    }

    fn grain(&self) -> u64 {
        self.fixed.cluster()
    }

    fn locate(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<(Place, u64)> {
        let (cluster, span) = (self.fixed.cluster(), 1u64 << (self.fixed.span_bits() & 63));
        let len = len.min(span.saturating_sub(offset & span.wrapping_sub(1)));
        let Some(table) = self.table(sectors, offset)? else { return Ok((Place::Below, len)) };
        let within = offset & cluster.wrapping_sub(1);
        let mut index = self.l2_index(offset);
        // The file's length of after the entry was read: another thread may just have made it longer, for this very cluster.
        let is_cluster = |at| self.is_cluster(at, sectors.storage().len());
        let mut place = None;
        let (mut run, mut expected) = (0u64, 0u64);
        while run < len {
            for word in self.entries(sectors, table, index)? {
                match place {
                    None => {
                        place = Some(match word {
                            0 => Place::Below,
                            ZERO => Place::Zero,
                            at if is_cluster(at) => Place::At(at.saturating_add(within)),
                            at => {
                                return Err(damaged(format_args!(
                                    "the L2 entry for offset {offset:#x} ({at:#x}) names no cluster"
                                )));
                            }
                        });
                        run = cluster.saturating_sub(within);
                    }
                    // A broken entry ends the run, and is met by the next look-up.
                    Some(_) if word != expected || (word > ZERO && !is_cluster(word)) => {
                        return Ok((place.unwrap_or(Place::Below), run.min(len)));
                    }
                    Some(_) => run = run.saturating_add(cluster),
                }
                expected = if word > ZERO { word.saturating_add(cluster) } else { word };
                index = index.saturating_add(1);
                if run >= len {
                    break;
                }
            }
        }
        Ok((place.unwrap_or(Place::Below), run.min(len)))
    }

    fn room(&self, sectors: &Sectors, offset: u64) -> io::Result<Room> {
        let cluster = self.fixed.cluster();
        self.table_or_new(sectors, offset)?;
        let new = self.tail.append(sectors.storage(), cluster, 0, cluster)?;
        Ok(Room { at: new.saturating_add(offset & cluster.wrapping_sub(1)), new: Some(new) })
    }

    fn give_back(&self, sectors: &Sectors, new: u64) {
        self.tail.give_back(sectors.storage(), new, self.fixed.cluster());
    }

    fn store(&self, sectors: &Sectors, offset: u64, len: u64, room: Room) -> io::Result<()> {
        self.set_entries(sectors, offset, len, room.new.unwrap_or(0), 0)
    }

    fn set_zero(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<bool> {
        self.table_or_new(sectors, offset)?;
        self.set_entries(sectors, offset, len, ZERO, 0)?;
        Ok(true)
    }

    fn begin(&self, storage: &dyn Storage) -> io::Result<()> {
        if lock(&self.header).autoclear == 0 {
            Ok(())
        } else {
            self.write_header(storage, |header| {
                header.autoclear = 0;
                true
            })
        }
    }

    fn facts(&self) -> Facts {
        let header = lock(&self.header);
        let format = header.backing_is_raw().then(|| Format::Raw.to_string());
        Facts {
            cluster_size: Some(header.cluster()),
            dirty: header.needs_check(),
            backing: header.backing.clone().map(|name| (name, format)),
            details: Vec::new(),
        }
    }

    fn can_resize(&self, capacity: u64) -> Result<(), String> {
        if capacity <= self.fixed.capacity_max() {
            return Ok(());
        }
        Err("the disk would be too large for clusters of this size".into())
    }

    fn resize(&self, sectors: &Sectors, capacity: u64) -> io::Result<()> {
        self.write_header(sectors.storage(), |header| {
            header.capacity = capacity;
            true
        })?;
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }

    fn check(&self, sectors: &Sectors, repair: Repair) -> io::Result<Findings> {
        check::check(self, sectors.storage(), repair)
    }

    fn set_backing(&self, sectors: &Sectors, backing: Option<(&str, Format)>) -> io::Result<()> {
        let backing = backing.map(|(name, format)| (name, format == Format::Raw));
        self.write_header(sectors.storage(), |header| header.name_backing(backing))
    }

    fn empty(&self, storage: &dyn Storage) -> io::Result<()> {
        let end = self.fixed.l1.saturating_add(self.fixed.table_bytes());
        storage.zero_range(self.fixed.l1, self.fixed.table_bytes())?;
        storage.flush()?;
        self.tail.reset(end);
        storage.set_len(end)
    }
}
