//! VHD (Virtual PC, Hyper-V, Xen): fixed, dynamic and differencing disks. Big-endian.
//!
//! A dynamic disk has a table of places of blocks (2 MiB usually); before each block's data stands a bitmap with a bit for
//! each sector: clear ones were never written, and in a differencing disk show the parent. Blocks are added to the end;
//! the footer, which must be last in the file, is written behind them by a flush, and its copy in front holds meanwhile.
//! What changes the header writes a new one and switches to it with one write of the footer's copy.
//!
//! Source: Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0.

mod check;
mod header;
#[cfg(test)]
mod test;

pub(crate) use header::COOKIE;
pub use header::{Blocks, Header, Kind, Parent, seconds, with_whole_cylinders};

use super::Format;
use super::container::Facts;
use super::findings::{Findings, Repair};
use super::mapped::{Layout, Mapped, Place, Rank, Room, SECTOR, Sectors, Tail, damaged};
use crate::disk::{Disk, Error};
use crate::endian::{be32, size};
use crate::storage::Storage;
use header::{CAPACITY_MAX, FOOTER, footer, resized};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A table entry of a block that is not there.
const UNUSED: u32 = u32::MAX;
const ENTRY: u64 = 4;
/// Where the data of new blocks is aligned, so that a host's pages and holes fit.
const ALIGN: u64 = 4096;
/// What sectors of the bitmap are compared in at once.
const SECTOR_BITS: u64 = SECTOR * 8;

/// How a new image is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk.
    pub size: u64,
    /// All bytes in a row.
    pub fixed: bool,
    /// Bytes of a block, as a power of two: 12 to 30.
    pub block_bits: u32,
    /// The disk that it differs from.
    pub parent: Option<Parent>,
    /// Where the image will be, for the parent's absolute name.
    pub directory: Option<PathBuf>,
}

impl CreateOptions {
    /// As usual: dynamic, blocks of 2 MiB.
    pub fn new(size: u64) -> Self {
        Self { size, fixed: false, block_bits: 21, parent: None, directory: None }
    }

    fn kind(&self) -> Kind {
        match (&self.parent, self.fixed) {
            (Some(_), _) => Kind::Differencing,
            (None, true) => Kind::Fixed,
            (None, false) => Kind::Dynamic,
        }
    }

    /// Says what cannot be.
    pub fn check(&self) -> Result<(), String> {
        if !self.size.is_multiple_of(SECTOR) {
            return Err("the size of a disk is a multiple of 512 bytes".into());
        }
        if self.size > CAPACITY_MAX {
            return Err("a VHD has at most 2040 GiB: use qcow2".into());
        }
        if !(12..=30).contains(&self.block_bits) || self.size >> (self.block_bits & 63) >= 1 << 23 {
            return Err("VHD blocks have 4 KiB to 1 GiB, and there are at most 8 million".into());
        }
        if self.fixed && self.parent.is_some() {
            return Err("a fixed VHD cannot build on another".into());
        }
        Ok(())
    }

    /// Where tables end, and bytes of the file for so many blocks.
    fn layout(&self) -> Result<(Blocks, Vec<u8>, u64), String> {
        self.check()?;
        let mut blocks = Blocks {
            at: FOOTER,
            table: 0,
            entries: self.size.div_ceil(1 << (self.block_bits & 63)).max(1),
            block_bits: self.block_bits,
            parent: self.parent.clone(),
            names_end: 0,
        };
        let names = blocks.encode(self.directory.as_deref())?.len() as u64;
        blocks.table = FOOTER.saturating_add(names);
        blocks.names_end = blocks.table;
        let end = blocks.table.saturating_add(table_bytes(blocks.entries));
        Ok((blocks.clone(), blocks.encode(self.directory.as_deref())?, end))
    }

    /// Bytes of the file with so many blocks in it.
    pub fn file_bytes(&self, count: u64) -> Result<u64, String> {
        if self.kind() == Kind::Fixed {
            return Ok(self.size.saturating_add(FOOTER));
        }
        let (blocks, _, end) = self.layout()?;
        let row = blocks.bitmap().saturating_add(blocks.block());
        let first = end.saturating_add(blocks.bitmap()).next_multiple_of(ALIGN);
        let last = first.saturating_add(count.saturating_sub(1).saturating_mul(row.next_multiple_of(ALIGN)));
        let blocks = if count == 0 { end } else { last.saturating_add(blocks.block()) };
        Ok(blocks.saturating_add(FOOTER))
    }
}

/// Bytes of a table, in whole sectors.
fn table_bytes(entries: u64) -> u64 {
    entries.saturating_mul(ENTRY).next_multiple_of(SECTOR)
}

/// A random identity (version 4 of RFC 9562).
fn new_uuid() -> [u8; 16] {
    let mut uuid = [0; 16];
    // The host's random bytes come without fail once it has booted; what there is of them is unique enough.
    let _ = rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty());
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// How a VHD is laid out.
pub struct Layer {
    kind: Kind,
    block_bits: u32,
    /// Bytes of the bitmap before a block's data.
    bitmap: u64,
    /// Place of the header.
    header_at: AtomicU64,
    /// Place and entries of the table.
    table: AtomicU64,
    entries: AtomicU64,
    capacity: AtomicU64,
    header: Mutex<Header>,
    tail: Tail,
}

/// A VHD.
pub type Vhd = Mapped<Layer>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vhd {
    /// Reads footer and header of an image.
    pub fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header, Error> {
        super::sound(path, "VHD", Header::read(storage).map(|read| read.map_err(super::Refusal::Corrupt)))
    }

    /// Opens an image whose header was read.
    pub fn open(
        path: &Path,
        storage: Arc<dyn Storage>,
        header: Header,
        parent: Option<Arc<dyn Disk>>,
    ) -> Result<Self, Error> {
        let layer = Layer::new(storage.as_ref(), header).map_err(|source| Error::io(path, source))?;
        Ok(Mapped::new(path, layer, storage, parent))
    }

    /// Writes a new image into empty storage and opens it.
    pub fn create(
        path: &Path,
        storage: Arc<dyn Storage>,
        options: &CreateOptions,
        parent: Option<Arc<dyn Disk>>,
    ) -> Result<Self, Error> {
        options.check().map_err(Error::Options)?;
        write_new(storage.as_ref(), options)?.map_err(|source| Error::io(path, source))?;
        let header = Self::read_header(path, storage.as_ref())?;
        Self::open(path, storage, header, parent)
    }
}

/// Writes a new image: the first error is the options', the second the host's.
fn write_new(storage: &dyn Storage, options: &CreateOptions) -> Result<io::Result<()>, Error> {
    let (kind, uuid) = (options.kind(), new_uuid());
    if kind == Kind::Fixed {
        let footer = footer(options.size, kind, uuid, u64::MAX);
        let write = || {
            storage.set_len(options.size)?;
            storage.write_bytes(options.size, &footer)?;
            storage.flush()
        };
        return Ok(write());
    }
    let (blocks, header, end) = options.layout().map_err(Error::Options)?;
    let footer = footer(options.size, kind, uuid, blocks.at);
    let write = || {
        write_table(storage, blocks.table, blocks.entries)?;
        storage.write_bytes(blocks.at, &header)?;
        storage.write_bytes(end, &footer)?;
        storage.write_bytes(0, &footer)?;
        storage.flush()
    };
    Ok(write())
}

/// A table in which no block is there.
fn write_table(storage: &dyn Storage, at: u64, entries: u64) -> io::Result<()> {
    storage.write_bytes(at, &vec![0xff; size(table_bytes(entries))])
}

impl Layer {
    fn new(storage: &dyn Storage, header: Header) -> io::Result<Self> {
        let blocks = header.blocks.as_ref();
        let (table, entries) = blocks.map_or((0, 0), |blocks| (blocks.table, blocks.entries));
        let header_at = blocks.map_or(0, |blocks| blocks.at);
        let this = Self {
            kind: header.kind,
            block_bits: blocks.map_or(30, |blocks| blocks.block_bits),
            bitmap: blocks.map_or(0, Blocks::bitmap),
            header_at: AtomicU64::new(header_at),
            table: AtomicU64::new(table),
            entries: AtomicU64::new(entries),
            capacity: AtomicU64::new(header.capacity),
            tail: Tail::new(0),
            header: Mutex::new(header),
        };
        let sealed = this.sealed();
        this.tail.reset(this.end_of_use(storage)?);
        if sealed {
            this.tail.set_sealed();
        }
        Ok(this)
    }

    fn sealed(&self) -> bool {
        lock(&self.header).sealed
    }

    /// Where the last block, table or name ends.
    fn end_of_use(&self, storage: &dyn Storage) -> io::Result<u64> {
        let header = lock(&self.header);
        let Some(blocks) = &header.blocks else { return Ok(header.capacity) };
        let table_end = blocks.table.saturating_add(table_bytes(blocks.entries));
        let header_end = blocks.at.saturating_add(header::HEADER);
        let mut end = table_end.max(header_end).max(blocks.names_end).max(FOOTER);
        check::each_entry(storage, blocks.table, blocks.entries, |_, sector| {
            // What is outside the file is damage, and met where it is looked up.
            let at = u64::from(sector).saturating_mul(SECTOR);
            if at < storage.len() {
                end = end.max(at.saturating_add(self.row()));
            }
            Ok(())
        })?;
        Ok(end)
    }

    fn block_bytes(&self) -> u64 {
        1 << (self.block_bits & 63)
    }

    /// Bytes of a block with its bitmap.
    fn row(&self) -> u64 {
        self.bitmap.saturating_add(self.block_bytes())
    }

    /// Whether a block can be at a place of a file of `len` bytes: behind the footer's copy, not on header or table.
    fn is_place(&self, at: u64, len: u64) -> bool {
        let (header, table) = (self.header_at.load(Ordering::Acquire), self.table.load(Ordering::Acquire));
        let bytes = table_bytes(self.entries.load(Ordering::Acquire));
        let row_end = at.saturating_add(self.row());
        let beside = |start: u64, bytes: u64| row_end <= start || at >= start.saturating_add(bytes);
        let free = beside(header, header::HEADER) && beside(table, bytes);
        at >= FOOTER && free && at.saturating_add(self.bitmap) < len
    }

    /// Place of the table's entry for an offset of the disk.
    fn entry_at(&self, offset: u64) -> u64 {
        let index = offset >> (self.block_bits & 63);
        self.table.load(Ordering::Acquire).saturating_add(index.saturating_mul(ENTRY))
    }

    /// The block for an offset of the disk: where its bitmap is.
    fn block_at(&self, sectors: &Sectors, offset: u64) -> io::Result<Option<u64>> {
        let at = self.entry_at(offset);
        match be32(&sectors.read(at / SECTOR)?, size(at % SECTOR)) {
            UNUSED => Ok(None),
            sector => {
                let place = u64::from(sector).saturating_mul(SECTOR);
                if self.is_place(place, sectors.storage().len()) {
                    return Ok(Some(place));
                }
                let text =
                    format_args!("the table entry for offset {offset:#x} ({sector:#x}) names no block");
                Err(damaged(text))
            }
        }
    }

    /// How far no block is there from `offset` on.
    fn unused(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<u64> {
        let block = self.block_bytes();
        let mut run = block.saturating_sub(offset & block.wrapping_sub(1));
        while run < len {
            let at = self.entry_at(offset.saturating_add(run));
            let bytes = sectors.read(at / SECTOR)?;
            for entry in bytes.get(size(at % SECTOR)..).unwrap_or_default().chunks_exact(ENTRY as usize) {
                if be32(entry, 0) != UNUSED {
                    return Ok(run);
                }
                run = run.saturating_add(block);
            }
        }
        Ok(run)
    }

    /// Whether the sector of a block (its number there) was written, and for how many sectors up to `end` the same is true.
    fn written(&self, sectors: &Sectors, place: u64, first: u64, end: u64) -> io::Result<(bool, u64)> {
        let mut kind = None;
        let mut number = first;
        while number < end {
            let bits = sectors.read((place / SECTOR).saturating_add(number / SECTOR_BITS))?;
            let stop = (number / SECTOR_BITS).saturating_add(1).saturating_mul(SECTOR_BITS).min(end);
            while number < stop {
                let byte = bits.get(size(number % SECTOR_BITS / 8)).copied().unwrap_or(0);
                let set = byte & (0x80 >> (number % 8)) != 0;
                match kind {
                    Some(kind) if kind != set => return Ok((kind, number.saturating_sub(first))),
                    _ => kind = Some(set),
                }
                // Eight at once where they are alike.
                let alike = number.is_multiple_of(8)
                    && number.saturating_add(8) <= stop
                    && (byte == 0 || byte == 0xff);
                number = number.saturating_add(if alike { 8 } else { 1 });
            }
        }
        Ok((kind.unwrap_or(false), end.saturating_sub(first)))
    }
}

impl Layout for Layer {
    fn name(&self) -> &'static str {
        "VHD"
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn block(&self) -> u64 {
        self.block_bytes()
    }

    fn grain(&self) -> u64 {
        SECTOR
    }

    fn locate(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<(Place, u64)> {
        if self.kind == Kind::Fixed {
            return Ok((Place::At(offset), len));
        }
        let nothing = if self.kind == Kind::Differencing { Place::Below } else { Place::Zero };
        let Some(place) = self.block_at(sectors, offset)? else {
            return Ok((Place::Below, self.unused(sectors, offset, len)?.min(len)));
        };
        let within = offset & self.block_bytes().wrapping_sub(1);
        let len = len.min(self.block_bytes().saturating_sub(within));
        let end = within.saturating_add(len).div_ceil(SECTOR);
        let (written, count) = self.written(sectors, place, within / SECTOR, end)?;
        let run = (within / SECTOR).saturating_add(count).saturating_mul(SECTOR).saturating_sub(within);
        let at = place.saturating_add(self.bitmap).saturating_add(within);
        Ok((if written { Place::At(at) } else { nothing }, run.min(len)))
    }

    fn room(&self, sectors: &Sectors, offset: u64) -> io::Result<Room> {
        let within = offset & self.block_bytes().wrapping_sub(1);
        let data = self.bitmap.saturating_add(within);
        if let Some(place) = self.block_at(sectors, offset)? {
            return Ok(Room { at: place.saturating_add(data), new: None });
        }
        let new = self.tail.append(sectors.storage(), self.row(), self.bitmap, ALIGN)?;
        if new / SECTOR >= UNUSED.into() {
            self.give_back(sectors, new);
            let text = "a VHD's file cannot be larger than 2 TiB: convert the image to qcow2";
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        Ok(Room { at: new.saturating_add(data), new: Some(new) })
    }

    fn give_back(&self, sectors: &Sectors, new: u64) {
        self.tail.give_back(sectors.storage(), new, self.row());
    }

    fn store(&self, sectors: &Sectors, offset: u64, len: u64, room: Room) -> io::Result<()> {
        let within = offset & self.block_bytes().wrapping_sub(1);
        let place = room.at.saturating_sub(within).saturating_sub(self.bitmap);
        // What can fail comes first: bits for a block that is given back would be another one's.
        sectors.read(self.entry_at(offset) / SECTOR)?;
        // In a dynamic disk the rest of a new block is zeroes, and as well written.
        let whole = room.new.is_some() && self.kind == Kind::Dynamic;
        let (mut number, end) = match whole {
            true => (0, self.block_bytes() / SECTOR),
            false => (within / SECTOR, within.saturating_add(len).div_ceil(SECTOR)),
        };
        while number < end {
            let stop = (number / SECTOR_BITS).saturating_add(1).saturating_mul(SECTOR_BITS).min(end);
            sectors.change((place / SECTOR).saturating_add(number / SECTOR_BITS), Rank::Leaf, |bits| {
                for bit in number..stop {
                    if let Some(byte) = bits.get_mut(size(bit % SECTOR_BITS / 8)) {
                        *byte |= 0x80 >> (bit % 8);
                    }
                }
            })?;
            number = stop;
        }
        if room.new.is_some() {
            let sector = (place / SECTOR) as u32;
            sectors.set(self.entry_at(offset), Rank::Root, &sector.to_be_bytes())?;
        }
        Ok(())
    }

    fn seal(&self, storage: &dyn Storage) -> io::Result<()> {
        let footer = lock(&self.header).footer;
        self.seal_with(storage, &footer)
    }

    fn facts(&self) -> Facts {
        let header = lock(&self.header);
        let blocks = header.blocks.as_ref();
        let parent = blocks.and_then(|blocks| blocks.parent.as_ref());
        Facts {
            cluster_size: blocks.map(Blocks::block),
            backing: parent.map(|parent| (parent.name.clone(), Some(Format::Vhd.to_string()))),
            ..Facts::default()
        }
    }

    fn can_resize(&self, capacity: u64) -> Result<(), String> {
        if self.kind == Kind::Differencing {
            return Err("a differencing VHD has the size of its parent: convert it to another size".into());
        }
        let entries = capacity.div_ceil(self.block_bytes());
        if capacity > CAPACITY_MAX || (self.kind == Kind::Dynamic && entries > 1 << 23) {
            return Err("a VHD has at most 2040 GiB: convert it to qcow2".into());
        }
        Ok(())
    }

    fn resize(&self, sectors: &Sectors, capacity: u64) -> io::Result<()> {
        let storage = sectors.storage();
        if self.kind == Kind::Fixed {
            return self.resize_fixed(storage, capacity);
        }
        let mut header = lock(&self.header).clone();
        let Some(blocks) = header.blocks.as_mut() else { return Ok(()) };
        let entries = capacity.div_ceil(self.block_bytes());
        if entries > blocks.entries {
            // A larger table, with a header of its own before it.
            let (old, old_entries) = (blocks.table, blocks.entries);
            let bytes = header::HEADER.saturating_add(table_bytes(entries));
            blocks.at = self.tail.append(storage, bytes, 0, SECTOR)?;
            blocks.table = blocks.at.saturating_add(header::HEADER);
            blocks.entries = entries;
            let encoded = blocks.encode(None).map_err(io::Error::other)?;
            write_table(storage, blocks.table, entries)?;
            copy_table(storage, old, blocks.table, old_entries)?;
            storage.write_bytes(blocks.at, &encoded)?;
            storage.flush()?;
        }
        header.capacity = capacity;
        self.switch(storage, header)
    }

    fn check(&self, sectors: &Sectors, repair: Repair) -> io::Result<Findings> {
        check::check(self, sectors.storage(), repair)
    }

    fn set_backing(&self, sectors: &Sectors, backing: Option<(&str, Format)>) -> io::Result<()> {
        let _ = (sectors, backing);
        let text =
            "a VHD names its parent by an identity: make a differencing VHD with `yado image create -b`";
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }

    fn empty(&self, storage: &dyn Storage) -> io::Result<()> {
        let header = lock(&self.header).clone();
        let Some(blocks) = &header.blocks else {
            let text = "a fixed VHD holds all of its disk";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        };
        write_table(storage, blocks.table, blocks.entries)?;
        storage.flush()?;
        self.tail.reset(self.end_of_use(storage)?);
        storage.set_len(self.tail.end())
    }
}

/// Copies the entries of a table.
fn copy_table(storage: &dyn Storage, from: u64, to: u64, entries: u64) -> io::Result<()> {
    let mut bytes = vec![0; size(entries.saturating_mul(ENTRY))];
    storage.read_bytes(from, &mut bytes)?;
    storage.write_bytes(to, &bytes)
}

impl Layer {
    /// Writes the footer behind the last block. A fixed disk has its own where it must be.
    fn seal_with(&self, storage: &dyn Storage, footer: &[u8]) -> io::Result<()> {
        if self.kind == Kind::Fixed { Ok(()) } else { self.tail.seal(storage, footer) }
    }

    /// Makes another header the image's, by one write of the footer's copy. Nothing is dirty, and the gate closed.
    fn switch(&self, storage: &dyn Storage, mut header: Header) -> io::Result<()> {
        let at = header.blocks.as_ref().map_or(u64::MAX, |blocks| blocks.at);
        header.footer = resized(&header.footer, header.capacity, at);
        storage.write_bytes(0, &header.footer)?;
        storage.flush()?;
        self.tail.unseal();
        self.capacity.store(header.capacity, Ordering::Release);
        if let Some(blocks) = &header.blocks {
            self.header_at.store(blocks.at, Ordering::Release);
            self.table.store(blocks.table, Ordering::Release);
            self.entries.store(blocks.entries, Ordering::Release);
        }
        *lock(&self.header) = header;
        Ok(())
    }

    /// Writes the footer at the new end before the old one is gone.
    fn resize_fixed(&self, storage: &dyn Storage, capacity: u64) -> io::Result<()> {
        let mut header = lock(&self.header);
        let old = header.capacity;
        let footer = resized(&header.footer, capacity, u64::MAX);
        storage.write_bytes(capacity, &footer)?;
        storage.flush()?;
        if capacity < old {
            storage.set_len(capacity.saturating_add(FOOTER))?;
        } else {
            storage.zero_range(old, FOOTER.min(capacity.saturating_sub(old)))?;
        }
        storage.flush()?;
        (header.capacity, header.footer) = (capacity, footer);
        self.capacity.store(capacity, Ordering::Release);
        Ok(())
    }
}
