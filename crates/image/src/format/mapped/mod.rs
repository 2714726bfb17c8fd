//! Formats whose files are a header, a table that says where each block of the disk lies, and the blocks. A format gives
//! its [`Layout`]; everything else, the same for all of them, is here.
//!
//! ```text
//!   request --gate--> Layout::locate (sectors of tables in memory) --> in place | below | zeroes | inflated
//!                          |
//!                    a block's lock: place, fill, write, Layout::store      Tail: where the file ends
//!                          |
//!                        flush: data, barrier, leaves, barrier, roots, barrier     (see `sectors`)
//! ```
//!
//! * A block that has a place keeps it: discards and written zeroes make holes in the file. So requests for blocks that
//!   have a place need no lock, and nothing is ever given to somebody else.
//! * A block gets its place at the end of the file, where everything reads as zeroes. The data is written, and what it does
//!   not cover of its grains, before the table in memory changes.
//! * Tables go to the file in a flush only, behind what they point at. A power cut at any moment leaves a sound image, and
//!   at worst places that nothing points at. No format needs a mark in its header that says "not closed".
//!
//! Lock order: flush, gate, a block's lock, what the layout has, the tail, a shard of the sectors.

mod places;
#[cfg(test)]
pub(crate) mod power_test;
mod sectors;
mod tail;
#[cfg(test)]
pub(crate) mod test;
mod write;

pub use places::{Conflicts, Places, Renames, copy_row, each_piece};
pub use sectors::{Rank, SECTOR, Sectors};
pub use tail::Tail;

use super::Format;
use super::container::{Container, Facts};
use super::findings::{Findings, Repair};
use super::gate::Gate;
use crate::buffers::{Buffers, Part, put_zeroes};
use crate::disk::{Content, Disk, Error, Status, check_range, no_snapshots, read_only_error};
use crate::endian::size;
use crate::storage::Storage;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLockWriteGuard};

/// Where a run of a disk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: the disk below shows, or zeroes.
    Below,
    /// Nowhere: it is zeroes.
    Zero,
    /// At this offset of the file.
    At(u64),
    /// Compressed: see the fields.
    Packed(Packed),
}

/// A stream that inflates to a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// Where in the file it begins.
    pub offset: u64,
    /// Bytes of the stream.
    pub len: u64,
    /// Bytes that it inflates to.
    pub whole: u64,
    /// The first of these that is wanted.
    pub skip: u64,
}

/// Room in the file for a byte of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Where it is.
    pub at: u64,
    /// The block has no place yet: the room was made for it, and all of it reads as zeroes. Where it begins.
    pub new: Option<u64>,
}

/// How a format lays a disk out in its file. Numbers are bytes. Errors of the kind [`io::ErrorKind::InvalidData`] say
/// that the file breaks the rules; then nothing is written any more.
pub trait Layout: Send + Sync + 'static {
    /// The format's name.
    fn name(&self) -> &'static str;
    /// Bytes of the disk.
    fn capacity(&self) -> u64;
    /// What gets a place as one: a power of two.
    fn block(&self) -> u64;
    /// What is there or not as one: a power of two, at most a block.
    fn grain(&self) -> u64;
    /// Where the byte at `offset` lies, and how many of at most `len` (not zero) lie so and behind each other.
    fn locate(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<(Place, u64)>;
    /// What the header says.
    fn facts(&self) -> Facts;
    /// Looks at all of the file, with nothing dirty and the gate closed; with `repair`, mends it. Changes the file itself:
    /// the sectors are forgotten afterwards.
    fn check(&self, sectors: &Sectors, repair: Repair) -> io::Result<Findings>;

    // What follows is for formats that are written.

    /// Images are only read.
    fn is_read_only(&self) -> bool {
        false
    }
    /// Room for the byte at `offset`, whose grain is not there. Under the block's lock.
    fn room(&self, _sectors: &Sectors, _offset: u64) -> io::Result<Room> {
        Err(read_only_error())
    }
    /// Takes back room that was made for a block and is not used. Under the block's lock.
    fn give_back(&self, _sectors: &Sectors, _new: u64) {}
    /// The grains that a range touches, all in one block, are in the room of its first byte now. Under the block's lock.
    fn store(&self, _sectors: &Sectors, _offset: u64, _len: u64, _room: Room) -> io::Result<()> {
        Err(read_only_error())
    }
    /// Notes that whole grains which are not there read as zeroes, if the format can say so; answers whether it can.
    /// Under the block's lock.
    fn set_zero(&self, _sectors: &Sectors, _offset: u64, _len: u64) -> io::Result<bool> {
        Ok(false)
    }
    /// The image is about to be written for the first time.
    fn begin(&self, _storage: &dyn Storage) -> io::Result<()> {
        Ok(())
    }
    /// A flush ends: what is last in the file.
    fn seal(&self, _storage: &dyn Storage) -> io::Result<()> {
        Ok(())
    }

    // For these the gate is closed, and nothing is dirty.

    /// Whether the disk can have another size; if not, why not.
    fn can_resize(&self, _capacity: u64) -> Result<(), String> {
        Err("images of this format keep their size".into())
    }
    /// Gives the disk another size. What is cut off reads as zeroes already.
    fn resize(&self, _sectors: &Sectors, _capacity: u64) -> io::Result<()> {
        Err(read_only_error())
    }
    /// Names another image to build on.
    fn set_backing(&self, _sectors: &Sectors, _backing: Option<(&str, Format)>) -> io::Result<()> {
        Err(read_only_error())
    }
    /// Makes the tables empty and cuts the file. As for a check, the sectors are forgotten afterwards.
    fn empty(&self, _storage: &dyn Storage) -> io::Result<()> {
        Err(read_only_error())
    }
}

/// The check of a format that is only read: all entries are looked up.
pub fn look_up_all(layout: &dyn Layout, sectors: &Sectors) -> Findings {
    let (block, capacity) = (layout.block().max(1), layout.capacity());
    let mut found = Findings { total_clusters: capacity.div_ceil(block), ..Findings::default() };
    look_up(layout, sectors, 0..capacity, &mut 0, &mut found);
    found
}

/// As [`look_up_all`], of a part of the disk; `next` is where the part before ends in the file.
pub fn look_up(
    layout: &dyn Layout,
    sectors: &Sectors,
    part: Range<u64>,
    next: &mut u64,
    found: &mut Findings,
) {
    let block = layout.block().max(1);
    let mut at = part.start;
    while at < part.end {
        let end = |run: u64| at.saturating_add(run.max(1));
        let (place, run) = match layout.locate(sectors, at, part.end.saturating_sub(at)) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                found.corrupt(|| error.to_string());
                (Place::Zero, block)
            }
            Err(error) => {
                found.errors = found.errors.saturating_add(1);
                found.say(|| error.to_string());
                (Place::Zero, block)
            }
        };
        let blocks = run.div_ceil(block);
        let begins = match place {
            Place::At(offset) => Some((offset, run)),
            Place::Packed(packed) => {
                found.compressed_clusters = found.compressed_clusters.saturating_add(blocks);
                Some((packed.offset, packed.len))
            }
            Place::Below | Place::Zero => None,
        };
        if let Some((offset, len)) = begins {
            found.allocated_clusters = found.allocated_clusters.saturating_add(blocks);
            let gap = if matches!(place, Place::At(_)) { 0 } else { SECTOR.saturating_mul(2) };
            if *next != 0 && !(*next..=next.saturating_add(gap)).contains(&offset) {
                found.fragmented_clusters = found.fragmented_clusters.saturating_add(1);
            }
            *next = offset.saturating_add(len);
            found.image_end_offset = found.image_end_offset.max(*next);
        }
        at = end(run);
    }
}

/// Locks for blocks that get a place.
const BLOCK_LOCKS: usize = 64;

/// A stream that was inflated last: where it is, and what it holds.
type Inflated = Option<(u64, Arc<Vec<u8>>)>;

/// A disk laid out so.
pub struct Mapped<L: Layout> {
    path: PathBuf,
    layout: L,
    storage: Arc<dyn Storage>,
    sectors: Sectors,
    backing: Option<Arc<dyn Disk>>,
    read_only: bool,
    /// The file breaks the rules: nothing is written any more.
    damaged: AtomicBool,
    begun: AtomicBool,
    beginning: Mutex<()>,
    gate: Gate,
    blocks: [Mutex<()>; BLOCK_LOCKS],
    flush: Flush,
    inflated: Mutex<Inflated>,
}

/// A flush that begins while another one runs waits for it, and for one more that serves all who wait.
#[derive(Default)]
struct Flush {
    running: Mutex<()>,
    /// How many have begun, and the number of the last that has succeeded.
    begun: AtomicU64,
    done: AtomicU64,
}

/// No request is inside, and no flush runs.
struct Quiet<'a> {
    _closed: Vec<RwLockWriteGuard<'a, ()>>,
    _running: MutexGuard<'a, ()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a damaged file gets.
pub fn damaged(what: impl std::fmt::Display) -> io::Error {
    let text = format!("{what}: the image is damaged; `yado image check` says more");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl<L: Layout> Mapped<L> {
    /// The disk in `storage`, over another one.
    pub fn new(path: &Path, layout: L, storage: Arc<dyn Storage>, backing: Option<Arc<dyn Disk>>) -> Self {
        Self {
            path: path.to_path_buf(),
            read_only: storage.read_only() || layout.is_read_only(),
            layout,
            sectors: Sectors::new(storage.clone()),
            storage,
            backing,
            damaged: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            beginning: Mutex::default(),
            gate: Gate::default(),
            blocks: std::array::from_fn(|_| Mutex::default()),
            flush: Flush::default(),
            inflated: Mutex::default(),
        }
    }

    /// The file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn locate(&self, offset: u64, len: u64) -> io::Result<(Place, u64)> {
        let found = self.layout.locate(&self.sectors, offset, len);
        let (place, run) = found.inspect_err(|error| {
            if error.kind() == io::ErrorKind::InvalidData {
                self.damaged.store(true, Ordering::Release);
            }
        })?;
        Ok((place, run.clamp(1, len.max(1))))
    }

    /// Whether nothing below has anything at or after `offset`.
    fn nothing_below(&self, offset: u64) -> bool {
        self.backing.as_ref().is_none_or(|backing| backing.capacity() <= offset)
    }

    /// Reads from the disk below; beyond its end there are zeroes.
    fn read_below(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let Some(backing) = &self.backing else { return put_zeroes(buffers, at, len) };
        let there = backing.capacity().saturating_sub(offset).min(len);
        if there > 0 {
            backing.read(offset, &Part::new(buffers, at, there))?;
        }
        put_zeroes(buffers, at.saturating_add(there), len.saturating_sub(there))
    }

    fn read_inside(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        let len = buffers.len();
        let mut done = 0u64;
        while done < len {
            let from = offset.saturating_add(done);
            let (place, run) = self.locate(from, len.saturating_sub(done))?;
            match place {
                Place::Below => self.read_below(from, buffers, done, run)?,
                Place::Zero => put_zeroes(buffers, done, run)?,
                Place::At(at) => self.storage.read(at, buffers, done, run)?,
                Place::Packed(packed) => {
                    let bytes = self.inflate(packed)?;
                    let start = size(packed.skip);
                    let piece = bytes.get(start..start.saturating_add(size(run)));
                    buffers.put(done, piece.ok_or_else(|| damaged("a compressed grain is too short"))?)?;
                }
            }
            done = done.saturating_add(run);
        }
        Ok(())
    }

    fn inflate(&self, packed: Packed) -> io::Result<Arc<Vec<u8>>> {
        let kept = lock(&self.inflated).as_ref().filter(|(at, _)| *at == packed.offset).cloned();
        if let Some((_, bytes)) = kept {
            return Ok(bytes);
        }
        let mut from = vec![0; size(packed.len)];
        self.storage.read_bytes(packed.offset, &mut from)?;
        let mut bytes = vec![0; size(packed.whole)];
        let mut inflater = flate2::Decompress::new(true);
        let done = inflater.decompress(&from, &mut bytes, flate2::FlushDecompress::Finish);
        if !matches!(done, Ok(flate2::Status::StreamEnd)) {
            return Err(damaged("a compressed grain cannot be inflated"));
        }
        let bytes = Arc::new(bytes);
        *lock(&self.inflated) = Some((packed.offset, bytes.clone()));
        Ok(bytes)
    }

    /// What begins at `offset`, and how long it goes on, in this image and those below.
    fn status_inside(&self, offset: u64, len: u64) -> io::Result<Status> {
        let (place, run) = self.locate(offset, len)?;
        let here = |content, offset, compressed| Status {
            len: run,
            content,
            depth: 0,
            present: true,
            offset,
            compressed,
        };
        Ok(match place {
            Place::At(at) => here(Content::Data, Some(at), false),
            Place::Packed(_) => here(Content::Data, None, true),
            Place::Zero => here(Content::Zero, None, false),
            Place::Below => match self.backing.as_ref().filter(|backing| backing.capacity() > offset) {
                Some(backing) => {
                    let there = backing.capacity().saturating_sub(offset).min(run);
                    let below = backing.block_status(offset, there)?;
                    Status { depth: below.depth.saturating_add(1), ..below }
                }
                None => {
                    let len = self.run_of_nothing(offset, run, len)?;
                    Status { len, present: false, ..here(Content::Zero, None, false) }
                }
            },
        })
    }

    /// How far nothing goes on: runs end with each table, and a sparse disk of many TiB has many.
    fn run_of_nothing(&self, offset: u64, first: u64, len: u64) -> io::Result<u64> {
        let mut run = first;
        while run < len {
            let (place, more) = self.locate(offset.saturating_add(run), len.saturating_sub(run))?;
            if place != Place::Below {
                break;
            }
            run = run.saturating_add(more);
        }
        Ok(run)
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.capacity())?;
        if self.read_only || self.damaged.load(Ordering::Acquire) { Err(read_only_error()) } else { Ok(()) }
    }

    /// Makes the header say what it must say while the image is written.
    fn begin(&self) -> io::Result<()> {
        if self.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = lock(&self.beginning);
        if !self.begun.load(Ordering::Acquire) {
            self.layout.begin(self.storage.as_ref())?;
            self.begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn flush_now(&self) -> io::Result<()> {
        let number = self.flush.begun.fetch_add(1, Ordering::AcqRel).saturating_add(1);
        self.sectors.write_back(|| self.layout.seal(self.storage.as_ref()))?;
        self.flush.done.store(number, Ordering::Release);
        Ok(())
    }

    /// Returns when everything written before is stable. Outside the gate.
    fn flush_all(&self) -> io::Result<()> {
        let wanted = self.flush.begun.load(Ordering::Acquire).saturating_add(1);
        let _running = lock(&self.flush.running);
        // One that began after this was called has served us too.
        if self.flush.done.load(Ordering::Acquire) >= wanted { Ok(()) } else { self.flush_now() }
    }

    /// Returns when no request is inside and all that they have done is in the file; none enters and no flush runs as
    /// long as the result lives.
    fn quiesce(&self) -> io::Result<Quiet<'_>> {
        if self.read_only {
            return Ok(Quiet { _running: lock(&self.flush.running), _closed: self.gate.close() });
        }
        // Most of the work is done while requests still run.
        self.flush_all()?;
        let running = lock(&self.flush.running);
        let closed = self.gate.close();
        self.flush_now()?;
        Ok(Quiet { _closed: closed, _running: running })
    }

    fn limit_dirty(&self) -> io::Result<()> {
        if self.sectors.is_full() { self.flush_all() } else { Ok(()) }
    }
}

impl<L: Layout> Drop for Mapped<L> {
    fn drop(&mut self) {
        // Nobody is left to tell; what a flush has promised is in the file already.
        let _ = self.close();
    }
}

impl<L: Layout> Disk for Mapped<L> {
    fn capacity(&self) -> u64 {
        self.layout.capacity()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        let _pass = self.gate.pass();
        check_range(offset, buffers.len(), self.capacity())?;
        self.read_inside(offset, buffers)
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        {
            let _pass = self.gate.pass();
            self.check_write(offset, buffers.len())?;
            self.begin()?;
            self.write_inside(offset, write::Source::Bytes(buffers))?;
        }
        self.limit_dirty()
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.flush_all() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _pass = self.gate.pass();
        self.check_write(offset, len)?;
        self.begin()?;
        self.discard_inside(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        {
            let _pass = self.gate.pass();
            self.check_write(offset, len)?;
            self.begin()?;
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
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
        self.check_write(0, 0)?;
        if !capacity.is_multiple_of(SECTOR) {
            return Err(invalid("the size of a disk is a multiple of 512 bytes".into()));
        }
        self.layout.can_resize(capacity).map_err(invalid)?;
        {
            let _quiet = self.quiesce()?;
            self.begin()?;
            let old = self.capacity();
            // What is cut off must not be there when the disk grows again, and what the disk did not show of the one
            // below must not show now. First of all, and whole grains, which can be noted.
            let below = self.backing.as_ref().map_or(0, |backing| backing.capacity()).min(capacity);
            let grain = self.layout.grain();
            let end = below.checked_next_multiple_of(grain).unwrap_or(below);
            let zeroes =
                if capacity < old { capacity..old } else { old..if below > old { end } else { old } };
            if !zeroes.is_empty() {
                self.zero_inside(zeroes.start, zeroes.end.saturating_sub(zeroes.start), true)?;
                self.flush_now()?;
            }
            self.layout.resize(&self.sectors, capacity)?;
        }
        self.flush_all()
    }

    fn snapshot(&self, _name: &str) -> io::Result<()> {
        Err(no_snapshots())
    }
}

impl<L: Layout> Container for Mapped<L> {
    fn facts(&self) -> Facts {
        self.layout.facts()
    }

    fn check(&self, repair: Repair) -> Result<Findings, Error> {
        let failed = |source| Error::io(&self.path, source);
        if repair != Repair::Nothing && self.read_only {
            return Err(failed(read_only_error()));
        }
        let _quiet = self.quiesce().map_err(failed)?;
        let found = self.layout.check(&self.sectors, repair).map_err(failed)?;
        self.sectors.forget();
        if repair == Repair::All && found.corruptions == 0 && found.errors == 0 {
            self.damaged.store(false, Ordering::Release);
        }
        Ok(found)
    }

    fn close(&self) -> io::Result<()> {
        if self.read_only || !self.begun.load(Ordering::Acquire) { Ok(()) } else { self.flush_all() }
    }

    fn set_backing(&self, backing: Option<(&str, Format)>) -> io::Result<()> {
        self.check_write(0, 0)?;
        let _quiet = self.quiesce()?;
        self.begin()?;
        self.layout.set_backing(&self.sectors, backing)
    }

    fn empty(&self) -> io::Result<()> {
        self.check_write(0, 0)?;
        let _quiet = self.quiesce()?;
        self.begin()?;
        self.layout.empty(self.storage.as_ref())?;
        self.sectors.forget_all();
        self.storage.flush()
    }
}
