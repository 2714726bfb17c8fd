//! What every image is, seen from above.

use crate::buffers::Buffers;
use std::io;
use std::path::PathBuf;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened.
    #[error("cannot open the disk image {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Another process uses the image.
    #[error(
        "the disk image {path} is in use by another process: stop that guest first, or add `readonly` to share it"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is not something a disk can be made of.
    #[error("{path} is not a disk image: it is {what}")]
    NotAnImage {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// The image cannot be copied.
    #[error("cannot copy {from} to {to}: {source}")]
    Copy {
        /// The original.
        from: PathBuf,
        /// The copy.
        to: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
}

/// A disk: `capacity` bytes that can be read, written and flushed, from any thread. Offsets and lengths are bytes and
/// need no alignment; a request that leaves the disk fails with [`io::ErrorKind::InvalidInput`].
pub trait Disk: Send + Sync {
    /// Bytes.
    fn capacity(&self) -> u64;
    /// Writes fail.
    fn read_only(&self) -> bool;
    /// Reads `buffers.len()` bytes from `offset`.
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()>;
    /// Writes all of `buffers` at `offset`.
    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()>;
    /// Returns when everything written before is on stable storage.
    fn flush(&self) -> io::Result<()>;
    /// The range's content is no longer needed.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The range reads as zeroes afterwards; with `unmap` it may take no space.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// Fails unless the range is on a disk of `capacity` bytes.
pub(crate) fn check_range(offset: u64, len: u64, capacity: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= capacity => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the range is not on the disk")),
    }
}

/// What a write to a read-only disk gets.
pub(crate) fn read_only_error() -> io::Error {
    io::Error::from(io::ErrorKind::ReadOnlyFilesystem)
}
