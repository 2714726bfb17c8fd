//! Blocks of files that are one on the disk: made so, and found.
//!
//! Two requests to the kernel that no crate has as safe functions: FIDEDUPERANGE (ioctl_fideduperange(2)), by which a file
//! system makes two ranges one after having compared them itself, and FS_IOC_FIEMAP (the kernel's
//! Documentation/filesystems/fiemap.rst), which tells where a file's bytes lie. Both take a structure of fixed layout, which is
//! all that is unsafe here.
#![allow(unsafe_code)]

use super::StorageFile;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `struct file_dedupe_range` with one target.
#[repr(C)]
struct DedupeRange {
    source_offset: u64,
    source_len: u64,
    targets: u16,
    reserved: [u16; 3],
    target: i64,
    target_offset: u64,
    done: u64,
    status: i32,
    reserved_at_the_end: u32,
}

/// The size in the number counts no targets.
const FIDEDUPERANGE: Opcode = opcode::read_write::<[u8; 24]>(0x94, 54);
/// The ranges are not the same.
const DIFFERS: i32 = 1;

/// What became of a request to make two ranges one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// So many bytes from the beginning are one now.
    Bytes(u64),
    /// They do not hold the same.
    Differs,
}

/// Extents that one request tells of.
const EXTENTS: usize = 256;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MapExtent {
    logical: u64,
    physical: u64,
    len: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// `struct fiemap`.
#[repr(C)]
struct Map {
    start: u64,
    len: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [MapExtent; EXTENTS],
}

const FIEMAP: Opcode = opcode::read_write::<[u8; 32]>(b'f', 11);
/// What is still in memory only is written first.
const SYNC: u32 = 1;
const LAST: u32 = 1;
/// Flags of extents whose place says nothing: unknown, not yet there, encoded, encrypted, not aligned, inside metadata.
const NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400;

/// Bytes of a file that lie in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Offset in the file.
    pub offset: u64,
    /// Offset on the disk below the file system.
    pub place: u64,
    /// Bytes.
    pub len: u64,
}

fn named(error: Errno) -> io::Error {
    match error {
        Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => io::ErrorKind::Unsupported.into(),
        other => other.into(),
    }
}

fn deduplicate(file: BorrowedFd<'_>, range: &mut DedupeRange) -> io::Result<()> {
    // SAFETY: the opcode takes the header of this structure and, behind it, as many targets as `targets` says: one.
    unsafe { ioctl(file, Updater::<FIDEDUPERANGE, DedupeRange>::new(range)) }.map_err(named)
}

fn map_extents(file: BorrowedFd<'_>, map: &mut Map) -> io::Result<()> {
    // SAFETY: the opcode takes the header of this structure, and writes at most `count` extents behind it: as many as it has.
    unsafe { ioctl(file, Updater::<FIEMAP, Map>::new(map)) }.map_err(named)
}

impl StorageFile {
    /// Makes a range one with a range of another file, or of this one, if both hold the same: the file system looks for itself.
    /// May do less than all of it. `Unsupported` where the file system cannot.
    pub fn share_from(&self, offset: u64, source: &Self, from: u64, len: u64) -> io::Result<Shared> {
        let mut range = DedupeRange {
            source_offset: from,
            source_len: len,
            targets: 1,
            reserved: [0; 3],
            target: self.file().as_raw_fd().into(),
            target_offset: offset,
            done: 0,
            status: 0,
            reserved_at_the_end: 0,
        };
        deduplicate(source.file().as_fd(), &mut range)?;
        match range.status {
            DIFFERS => Ok(Shared::Differs),
            0 => Ok(Shared::Bytes(range.done.min(len))),
            error => Err(named(Errno::from_raw_os_error(error.wrapping_neg()))),
        }
    }

    /// Where the file's bytes lie, in their order; `Unsupported` where the file system does not tell. Holes, and what has no place
    /// of its own, are left out.
    pub fn places(&self) -> io::Result<Vec<Placed>> {
        let mut placed: Vec<Placed> = Vec::new();
        let mut start = 0u64;
        let mut map = Box::new(Map {
            start: 0,
            len: 0,
            flags: SYNC,
            mapped: 0,
            count: EXTENTS as u32,
            reserved: 0,
            extents: [MapExtent::default(); EXTENTS],
        });
        loop {
            (map.start, map.len, map.mapped) = (start, u64::MAX.saturating_sub(start), 0);
            map_extents(self.file().as_fd(), &mut map)?;
            let found = map.extents.get(..map.mapped as usize).unwrap_or_default();
            let Some(last) = found.last() else { return Ok(placed) };
            for extent in found.iter().filter(|extent| extent.flags & NO_PLACE == 0) {
                let MapExtent { logical: offset, physical: place, len, .. } = *extent;
                match placed.last_mut() {
                    Some(last)
                        if last.offset.checked_add(last.len) == Some(offset)
                            && last.place.checked_add(last.len) == Some(place) =>
                    {
                        last.len = last.len.saturating_add(len);
                    }
                    _ => placed.push(Placed { offset, place, len }),
                }
            }
            let end = last.logical.saturating_add(last.len);
            if last.flags & LAST != 0 || end <= start {
                return Ok(placed);
            }
            start = end;
        }
    }
}
