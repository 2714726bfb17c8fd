//! What every image is, seen from above.

use crate::buffers::Buffers;
use crate::storage::Extent;
use std::io;
use std::path::{Path, PathBuf};

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
    /// The image breaks the rules of its format.
    #[error("{path} is no sound {format} image: {what}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What it should be.
        format: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The image uses something that yado has not.
    #[error("{path} cannot be used: {what}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it uses, and what to do.
        what: String,
    },
    /// Somebody asked for an image that cannot be.
    #[error("{0}")]
    Options(String),
    /// The host failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
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

impl Error {
    pub(crate) fn open(path: &Path, source: io::Error) -> Self {
        Self::Open { path: path.to_path_buf(), source }
    }

    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }
}

/// What a range of a disk is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Bytes for which the rest is true, at least one.
    pub len: u64,
    /// How it reads.
    pub content: Content,
    /// How many images below the top one hold it: 0 is the top itself.
    pub depth: u32,
    /// The image says something about the range (data, or that it is zero); otherwise no image of the chain does, and it
    /// reads as zeroes.
    pub present: bool,
    /// Where the bytes lie in that image's file, if they lie there as they are.
    pub offset: Option<u64>,
    /// The bytes are stored compressed.
    pub compressed: bool,
}

impl Status {
    /// What storage says of a range that lies in it as it is, at the same offset.
    pub(crate) fn of_extent(extent: Extent, offset: u64) -> Self {
        Self {
            len: extent.len,
            content: if extent.hole { Content::Zero } else { Content::Data },
            depth: 0,
            present: true,
            offset: Some(offset),
            compressed: false,
        }
    }
}

/// How a range reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// As what was written there.
    Data,
    /// As zeroes.
    Zero,
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
    /// As [`Self::write_zeroes`], but only if that is quicker than writing them; else `Unsupported`, and nothing is done.
    fn zero_quickly(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// What begins at `offset`, at most `len` bytes of it (at least one, and on the disk).
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status>;
    /// Makes the disk larger (what is new reads as zeroes) or smaller.
    fn resize(&self, capacity: u64) -> io::Result<()>;
    /// Keeps the disk's content of this moment under a name, inside the image. Requests that run meanwhile come wholly
    /// before or wholly after.
    fn snapshot(&self, name: &str) -> io::Result<()>;
}

impl Disk for std::sync::Arc<dyn Disk> {
    fn capacity(&self) -> u64 {
        (**self).capacity()
    }
    fn read_only(&self) -> bool {
        (**self).read_only()
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        (**self).read(offset, buffers)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        (**self).write(offset, buffers)
    }
    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        (**self).write_zeroes(offset, len, unmap)
    }
    fn zero_quickly(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        (**self).zero_quickly(offset, len, unmap)
    }
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        (**self).block_status(offset, len)
    }
    fn resize(&self, capacity: u64) -> io::Result<()> {
        (**self).resize(capacity)
    }
    fn snapshot(&self, name: &str) -> io::Result<()> {
        (**self).snapshot(name)
    }
}

/// What a disk answers that has no place for snapshots of its own.
pub(crate) fn no_snapshots() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "this format keeps no snapshots inside; use qcow2, or an overlay",
    )
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
