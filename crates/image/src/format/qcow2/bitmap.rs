//! Persistent dirty bitmaps: which parts of the disk were written since a bitmap was made or cleared.
//!
//! A directory lists the bitmaps; each has a table whose entries are zeroes (0), ones (1) or a cluster of bits. While the
//! image is written, those that record (`auto`) are in memory and marked `in-use` in the file; closing the image writes
//! them to new clusters, and then the header names a new directory. So after a crash a bitmap says that it cannot be
//! trusted; it never says too little.
//!
//! Source: docs/interop/qcow2.rst, section "Bitmaps".

use super::header::{AUTOCLEAR_BITMAPS, BitmapsExtension, L1_BYTES_MAX};
use super::table::OFFSET;
use super::{Qcow2, words_at};
use crate::disk::Disk;
use crate::endian::{be16, be32, be64, bytes_be, put, size};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

/// The bitmap was not written back: it cannot be trusted.
const IN_USE: u32 = 1 << 0;
/// Writes are recorded.
const AUTO: u32 = 1 << 1;
/// The only kind of bitmap that there is.
const DIRTY: u8 = 1;
/// Bytes of a directory entry before its extra data.
const ENTRY: usize = 24;
pub const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// Most bitmaps that QEMU accepts, and their longest name.
pub const COUNT_MAX: usize = 65535;
const NAME_MAX: usize = 1023;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Bytes of bits that one bitmap, or all that record, have at most.
const BITS_BYTES_MAX: u64 = 512 << 20;
/// What one that records takes beside its bits: no more than a thousand of them do.
const LIVE_BYTES: u64 = 512 << 10;
/// A table entry of a cluster that is all ones.
const ONES: u64 = 1;

/// What the directory says of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// log2 of the bytes that a bit stands for.
    pub granularity_bits: u8,
    flags: u32,
    kind: u8,
    table: u64,
    entries: u32,
    extra: Vec<u8>,
}

impl Bitmap {
    /// Writes are recorded.
    pub fn records(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// It was not written back: it cannot be trusted.
    pub fn is_stale(&self) -> bool {
        self.flags & IN_USE != 0
    }

    fn tracks(&self) -> bool {
        self.flags & (AUTO | IN_USE) == AUTO && self.kind == DIRTY && self.extra.is_empty()
    }

    fn encode(&self, into: &mut Vec<u8>) {
        let mut entry = [0; ENTRY];
        put(&mut entry, 0, &self.table.to_be_bytes());
        put(&mut entry, 8, &self.entries.to_be_bytes());
        put(&mut entry, 12, &self.flags.to_be_bytes());
        put(&mut entry, 16, &[self.kind, self.granularity_bits]);
        put(&mut entry, 18, &(self.name.len() as u16).to_be_bytes());
        put(&mut entry, 20, &(self.extra.len() as u32).to_be_bytes());
        for part in [&entry[..], &self.extra, self.name.as_bytes()] {
            into.extend_from_slice(part);
        }
        into.resize(into.len().next_multiple_of(8), 0);
    }
}

/// The bits of a bitmap in memory: one for each granule of the disk, the lowest first.
#[derive(Debug)]
pub struct Bits {
    /// Bytes of the disk.
    capacity: u64,
    granularity_bits: u8,
    words: Box<[AtomicU64]>,
    count: u64,
}

impl Bits {
    fn new(capacity: u64, granularity_bits: u8) -> io::Result<Self> {
        let count = capacity.div_ceil(1 << (granularity_bits & 63));
        if count.div_ceil(8) > BITS_BYTES_MAX {
            return Err(invalid("the bitmap would be too large: use a larger granularity"));
        }
        let words = (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { capacity, granularity_bits, words, count })
    }

    /// Notes that a range is written.
    pub fn mark(&self, offset: u64, len: u64) {
        let shift = self.granularity_bits & 63;
        let (first, end) = (offset >> shift, offset.saturating_add(len).div_ceil(1 << shift).min(self.count));
        let mut at = first;
        while at < end {
            let stop = (at | 63).saturating_add(1).min(end);
            let ones = u64::MAX >> 64u64.saturating_sub(stop.saturating_sub(at)).min(63);
            if let Some(word) = self.words.get(size(at >> 6)) {
                let mask = ones << (at & 63);
                if word.load(Ordering::Relaxed) & mask != mask {
                    word.fetch_or(mask, Ordering::Relaxed);
                }
            }
            at = stop;
        }
    }

    /// Whether the byte at an offset is in a part that was written.
    pub fn contains(&self, offset: u64) -> bool {
        let bit = offset >> (self.granularity_bits & 63);
        self.words.get(size(bit >> 6)).is_some_and(|word| word.load(Ordering::Relaxed) >> (bit & 63) & 1 != 0)
    }

    fn to_bytes(&self) -> Vec<u8> {
        let bytes = self.words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes());
        bytes.take(size(self.count.div_ceil(8))).collect()
    }

    fn set_bytes(&self, at: u64, bytes: &[u8]) {
        for (place, byte) in (at..).zip(bytes) {
            if let Some(word) = self.words.get(size(place >> 3)) {
                word.fetch_or(u64::from(*byte) << ((place & 7) << 3), Ordering::Relaxed);
            }
        }
    }

    /// Forgets bits beyond the disk's end.
    fn trim(&self) {
        if let Some(last) = self.words.last().filter(|_| self.count & 63 != 0) {
            last.fetch_and((1u64 << (self.count & 63)).wrapping_sub(1), Ordering::Relaxed);
        }
    }

    /// Marks what another one has marked, whatever its granularity.
    fn merge(&self, other: &Self) {
        let shift = other.granularity_bits & 63;
        for (number, word) in (0u64..).zip(&other.words) {
            let word = word.load(Ordering::Relaxed);
            for bit in (0..64u64).filter(|bit| word >> bit & 1 != 0) {
                self.mark(number.saturating_mul(64).saturating_add(bit) << shift, 1 << shift);
            }
        }
    }
}

/// Bitmaps that record while the image is open for writing.
#[derive(Default)]
pub struct Live {
    any: AtomicBool,
    bitmaps: RwLock<Vec<(String, Bits)>>,
}

impl Live {
    /// Notes that a range is written.
    pub fn mark(&self, offset: u64, len: u64) {
        if self.any.load(Ordering::Acquire) {
            let bitmaps = self.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
            bitmaps.iter().for_each(|(_, bits)| bits.mark(offset, len));
        }
    }

    fn set(&self, bitmaps: Vec<(String, Bits)>) {
        let any = !bitmaps.is_empty();
        *self.bitmaps.write().unwrap_or_else(PoisonError::into_inner) = bitmaps;
        self.any.store(any, Ordering::Release);
    }

    fn take(&self) -> Vec<(String, Bits)> {
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut *self.bitmaps.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A change of an image's bitmaps.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// A new one that records, with the bytes that a bit stands for.
    Add(Option<u64>),
    /// It is gone.
    Remove,
    /// Nothing was written.
    Clear,
    /// It records, or does not.
    Record(bool),
    /// Marks what another bitmap has marked.
    Merge(&'a Bits),
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the bitmaps are damaged: {what}"))
}

impl Qcow2 {
    /// All persistent bitmaps.
    pub fn bitmaps(&self) -> io::Result<Vec<Bitmap>> {
        let header = self.header();
        header.bitmaps.as_ref().map_or(Ok(Vec::new()), |extension| self.read_directory(extension))
    }

    fn read_directory(&self, extension: &BitmapsExtension) -> io::Result<Vec<Bitmap>> {
        let (at, len) = (extension.directory_offset, extension.directory_len);
        let aligned = at >= self.shape.cluster() && self.shape.within(at) == 0;
        if !aligned || len > DIRECTORY_BYTES_MAX || at.saturating_add(len) > self.storage.len() {
            return Err(damaged("their directory is at no place that can be"));
        }
        if extension.count as usize > COUNT_MAX {
            return Err(damaged("there are more than the format allows"));
        }
        let mut bytes = vec![0; size(len)];
        self.storage.read_bytes(at, &mut bytes)?;
        let (mut rest, mut bitmaps) = (&bytes[..], Vec::new());
        for _ in 0..extension.count {
            let cut = || damaged("their directory is cut off");
            let (name, extra) = (usize::from(be16(rest, 18)), size(be32(rest, 20).into()));
            let name_at = ENTRY.saturating_add(extra);
            let end = name_at.saturating_add(name);
            let text = rest.get(name_at..end).ok_or_else(cut)?;
            let name = std::str::from_utf8(text).map_err(|_| damaged("a name is no text"))?.to_owned();
            let [kind, granularity_bits] = be16(rest, 16).to_be_bytes();
            if !GRANULARITY_BITS.contains(&granularity_bits) {
                return Err(damaged("a granularity cannot be"));
            }
            let extra = rest.get(ENTRY..name_at).ok_or_else(cut)?.to_vec();
            let (table, entries, flags) = (be64(rest, 0), be32(rest, 8), be32(rest, 12));
            bitmaps.push(Bitmap { name, granularity_bits, flags, kind, table, entries, extra });
            rest = rest.get(end.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(bitmaps)
    }

    /// The bits of a bitmap, as the file has them.
    fn read_bits(&self, bitmap: &Bitmap) -> io::Result<Bits> {
        let bits = Bits::new(self.capacity(), bitmap.granularity_bits)?;
        let cluster = self.shape.cluster();
        let bytes = bits.count.div_ceil(8);
        let (entries, end) = (u64::from(bitmap.entries), self.storage.len());
        if entries.saturating_mul(8) > L1_BYTES_MAX
            || entries < bytes.div_ceil(cluster)
            || self.shape.within(bitmap.table) != 0
            || bitmap.table.saturating_add(entries.saturating_mul(8)) > end
        {
            return Err(damaged("a table is at no place that can be, or too small"));
        }
        let words = words_at(self.storage.as_ref(), bitmap.table, entries)?;
        for (number, word) in (0u64..).zip(words) {
            let at = number.saturating_mul(cluster);
            let part = bytes.saturating_sub(at).min(cluster);
            let host = word & OFFSET;
            match word {
                _ if part == 0 => break,
                0 => {}
                ONES => bits.set_bytes(at, &vec![0xff; size(part)]),
                _ if self.shape.within(host) == 0 && host == word && host < end => {
                    let mut piece = vec![0; size(part)];
                    self.storage.read_bytes(host, &mut piece)?;
                    bits.set_bytes(at, &piece);
                }
                _ => return Err(damaged("a table names no cluster")),
            }
        }
        Ok(bits)
    }

    /// The bits of the bitmap of a name. One that was not written back is refused.
    pub fn bitmap_bits(&self, name: &str) -> io::Result<Bits> {
        let bitmaps = self.bitmaps()?;
        let bitmap = bitmaps.iter().find(|bitmap| bitmap.name == name).ok_or_else(|| missing(name))?;
        if bitmap.is_stale() {
            return Err(invalid(format!(
                "the bitmap {name:?} was not written back and cannot be trusted: remove it"
            )));
        }
        self.read_bits(bitmap)
    }

    /// Bytes that the image's bitmaps would take in one with clusters of that size, if all of their bits were stored.
    pub fn bitmap_bytes(&self, cluster: u64) -> io::Result<u64> {
        let bitmaps = self.bitmaps()?;
        let up = |bytes: u64, to: u64| bytes.checked_next_multiple_of(to).unwrap_or(bytes);
        let one = |bitmap: &Bitmap| {
            let bits = self.capacity().div_ceil(1 << (bitmap.granularity_bits & 63));
            let clusters = bits.div_ceil(8).div_ceil(cluster);
            clusters.saturating_mul(cluster).saturating_add(up(clusters.saturating_mul(8), cluster))
        };
        let directory: u64 =
            bitmaps.iter().map(|bitmap| up(bitmap.name.len() as u64, 8).saturating_add(24)).sum();
        Ok(bitmaps.iter().map(one).sum::<u64>().saturating_add(up(directory, cluster)))
    }

    /// Whether all bitmaps can follow the disk to another size: those that do not record would have a wrong one.
    pub(super) fn check_resize_recording(&self) -> io::Result<()> {
        if self.bitmaps()?.iter().any(|bitmap| !bitmap.is_stale() && !bitmap.records()) {
            return Err(invalid(
                "a bitmap that does not record keeps the disk's size: enable or remove it first",
            ));
        }
        Ok(())
    }

    /// The disk has got another size: what is new is marked. A bitmap that would become too large is given up: in the
    /// file it is in use, and stays so.
    pub(super) fn resized_recording(&self, old: u64, capacity: u64) {
        let mut live = self.live.take();
        live.retain_mut(|(_, bits)| {
            let Ok(new) = Bits::new(capacity, bits.granularity_bits) else { return false };
            new.set_bytes(0, &bits.to_bytes());
            new.trim();
            new.mark(old, capacity.saturating_sub(old));
            *bits = new;
            true
        });
        self.live.set(live);
    }

    /// Takes the bitmaps that record into memory, and says in the file that they are in use. Called before the first
    /// change of the image, with the header's lock held; `extension` is the header's.
    pub(super) fn begin_recording(&self, extension: &BitmapsExtension) -> io::Result<()> {
        if self.live.any.load(Ordering::Acquire) {
            return Ok(());
        }
        let (mut live, mut flags) = (Vec::new(), Vec::new());
        let mut at = extension.directory_offset;
        let mut total = 0u64;
        for bitmap in self.read_directory(extension)? {
            let mut entry = Vec::new();
            bitmap.encode(&mut entry);
            if bitmap.tracks() {
                let bits = self.capacity() >> (bitmap.granularity_bits & 63);
                // A table is read whole, and every write goes to all of them, however small they are.
                let table = u64::from(bitmap.entries).saturating_mul(8);
                total = total.saturating_add(bits / 8).saturating_add(table).saturating_add(LIVE_BYTES);
                if total > BITS_BYTES_MAX {
                    return Err(invalid("the bitmaps would take too much memory"));
                }
                live.push((bitmap.name.clone(), self.read_bits(&bitmap)?));
            }
            if bitmap.records() && !bitmap.is_stale() {
                flags.push((at.saturating_add(12), bitmap.flags | IN_USE));
            }
            at = at.saturating_add(entry.len() as u64);
        }
        for (at, flags) in &flags {
            self.storage.write_bytes(*at, &flags.to_be_bytes())?;
        }
        if !flags.is_empty() {
            self.storage.flush()?;
        }
        self.live.set(live);
        Ok(())
    }

    /// Writes the bitmaps that record back. Nothing else runs: the image is quiet.
    pub(super) fn end_recording(&self) -> io::Result<()> {
        let live = self.live.take();
        if live.is_empty() {
            return Ok(());
        }
        self.write_back(live).inspect_err(|_| {
            // Perhaps the file trusts them already: whoever writes next must look.
            self.opened.store(false, Ordering::Release);
        })
    }

    fn write_back(&self, live: Vec<(String, Bits)>) -> io::Result<()> {
        let mut list: Vec<(Bitmap, Option<Bits>)> =
            self.bitmaps()?.into_iter().map(|bitmap| (bitmap, None)).collect();
        for (name, bits) in live {
            if let Some((bitmap, new)) = list.iter_mut().find(|(bitmap, _)| bitmap.name == name) {
                bitmap.flags &= !IN_USE;
                *new = Some(bits);
            }
        }
        self.write_bitmaps(list)
    }

    /// Changes a bitmap.
    pub fn change_bitmap(&self, name: &str, change: Change<'_>) -> io::Result<()> {
        self.check_write(0, 0)?;
        if self.header().version < 3 {
            return Err(invalid("version 2 images have no bitmaps: make it compat=1.1"));
        }
        let _quiet = self.quiesce()?;
        // What others record is written first; whether the change succeeds or not, recording begins anew after it.
        let opened = self.opened.load(Ordering::Acquire);
        self.end_recording()?;
        self.opened.store(false, Ordering::Release);
        let changed = self.change_written(name, change);
        if opened { changed.and(self.open_for_change()) } else { changed }
    }

    /// Changes a bitmap while all of them are in the file.
    fn change_written(&self, name: &str, change: Change<'_>) -> io::Result<()> {
        let mut list: Vec<(Bitmap, Option<Bits>)> =
            self.bitmaps()?.into_iter().map(|bitmap| (bitmap, None)).collect();
        let place = list.iter().position(|(bitmap, _)| bitmap.name == name);
        let found = place.and_then(|at| list.get_mut(at));
        match (change, found) {
            (Change::Add(_), Some(_)) => return Err(invalid(format!("Bitmap already exists: {name}"))),
            (Change::Add(granularity), None) => list.push(self.new_bitmap(name, granularity, list.len())?),
            (_, None) => return Err(missing(name)),
            (Change::Remove, Some(_)) => drop(place.map(|at| list.remove(at))),
            (_, Some((bitmap, _))) if bitmap.is_stale() => {
                let text = format!("the bitmap {name:?} was not written back: it can only be removed");
                return Err(invalid(text));
            }
            (Change::Clear, Some((bitmap, bits))) => {
                *bits = Some(Bits::new(self.capacity(), bitmap.granularity_bits)?);
            }
            (Change::Record(true), Some((bitmap, _))) => bitmap.flags |= AUTO,
            (Change::Record(false), Some((bitmap, _))) => bitmap.flags &= !AUTO,
            (Change::Merge(other), Some((bitmap, bits))) => {
                let own = self.read_bits(bitmap)?;
                if own.capacity != other.capacity {
                    let (own, other) = (own.capacity, other.capacity);
                    let text = format!(
                        "Bitmaps are of different sizes (destination size is {own}, source size is {other}) and can't be \
                         merged"
                    );
                    return Err(invalid(text));
                }
                own.merge(other);
                *bits = Some(own);
            }
        }
        self.write_bitmaps(list)
    }

    fn new_bitmap(
        &self,
        name: &str,
        granularity: Option<u64>,
        count: usize,
    ) -> io::Result<(Bitmap, Option<Bits>)> {
        if name.is_empty() || name.len() > NAME_MAX || count >= COUNT_MAX {
            return Err(invalid(
                "a bitmap has a name of 1 to 1023 bytes, and an image at most 65535 of them",
            ));
        }
        let granularity = granularity.unwrap_or(self.shape.cluster().clamp(4096, 65536));
        let granularity_bits = granularity.trailing_zeros() as u8;
        if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&granularity_bits) {
            return Err(invalid("a bitmap's granularity is a power of two from 512 bytes to 2 GiB"));
        }
        let bits = Bits::new(self.capacity(), granularity_bits)?;
        let name = name.to_owned();
        let bitmap = Bitmap {
            name,
            granularity_bits,
            flags: AUTO,
            kind: DIRTY,
            table: 0,
            entries: 0,
            extra: Vec::new(),
        };
        Ok((bitmap, Some(bits)))
    }

    /// Writes the bits that are given, and a directory of all, to new clusters, and switches the header to it. The image
    /// is quiet.
    fn write_bitmaps(&self, list: Vec<(Bitmap, Option<Bits>)>) -> io::Result<()> {
        let old = self.header().bitmaps;
        if !list.is_empty() && !self.header().has_room_for_bitmaps() {
            return Err(invalid("the header has no room for bitmaps: use larger clusters"));
        }
        let before = old.as_ref().map_or(Ok(Vec::new()), |extension| self.read_directory(extension))?;
        let mut kept = std::collections::HashSet::new();
        let mut directory = Vec::new();
        let count = list.len();
        for (mut bitmap, bits) in list {
            match bits {
                Some(bits) => (bitmap.table, bitmap.entries) = self.write_bits(&bits)?,
                None => drop(kept.insert(bitmap.table)),
            }
            bitmap.encode(&mut directory);
        }
        let extension = if count == 0 { None } else { Some(self.write_row(&directory)?) };
        let extension = extension.map(|directory_offset| BitmapsExtension {
            count: count as u32,
            directory_len: directory.len() as u64,
            directory_offset,
        });
        // Everything that the header is to name is counted and stable.
        self.flush_quiet()?;
        let mut header = self.header();
        header.bitmaps = extension;
        header.autoclear =
            header.autoclear & !AUTOCLEAR_BITMAPS | if count == 0 { 0 } else { AUTOCLEAR_BITMAPS };
        self.switch_header(header)?;
        for bitmap in before.iter().filter(|bitmap| !kept.contains(&bitmap.table)) {
            self.release_bitmap(bitmap)?;
        }
        if let Some(old) = old {
            self.release_row(old.directory_offset, old.directory_len);
        }
        // The first gives the clusters back, the second writes that they are free.
        self.flush_quiet()?;
        self.flush_quiet()
    }

    /// Writes bits to new clusters: place and entries of their table.
    fn write_bits(&self, bits: &Bits) -> io::Result<(u64, u32)> {
        let bytes = bits.to_bytes();
        let mut table = Vec::new();
        for piece in bytes.chunks(size(self.shape.cluster())) {
            table.push(if piece.iter().all(|byte| *byte == 0) {
                0
            } else if piece.iter().all(|byte| *byte == 0xff) {
                ONES
            } else {
                self.write_row(piece)?
            });
        }
        let place = self.write_row(&bytes_be(table.iter().copied()))?;
        Ok((place, table.len() as u32))
    }

    /// Writes bytes to new clusters in a row, zeroes behind them.
    fn write_row(&self, bytes: &[u8]) -> io::Result<u64> {
        let storage = self.storage.as_ref();
        let cluster = self.shape.cluster();
        let run = self.refcounts.allocate_row(storage, (bytes.len() as u64).div_ceil(cluster).max(1))?;
        let mut whole = bytes.to_vec();
        whole.resize(size(run.count.saturating_mul(cluster)), 0);
        storage.write_bytes(run.offset, &whole)?;
        Ok(run.offset)
    }

    fn release_row(&self, at: u64, len: u64) {
        for cluster in 0..len.div_ceil(self.shape.cluster()).max(1) {
            self.release_cluster(at.saturating_add(cluster << (self.shape.cluster_bits & 63)));
        }
    }

    fn release_bitmap(&self, bitmap: &Bitmap) -> io::Result<()> {
        let bytes = u64::from(bitmap.entries).saturating_mul(8);
        if bytes > L1_BYTES_MAX || self.shape.within(bitmap.table) != 0 {
            return Err(damaged("a table is at no place that can be"));
        }
        for word in words_at(self.storage.as_ref(), bitmap.table, bitmap.entries.into())? {
            if word & OFFSET != 0 && self.shape.within(word & OFFSET) == 0 {
                self.release_cluster(word & OFFSET);
            }
        }
        self.release_row(bitmap.table, bytes);
        Ok(())
    }
}

fn missing(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("Dirty bitmap '{name}' not found"))
}
