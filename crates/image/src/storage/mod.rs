//! What lies below a format: bytes at offsets that can grow.

mod cache;
mod direct;
mod file;
#[cfg(test)]
pub(crate) mod power;
mod sharing;

pub use cache::{CacheMode, WriteThrough};
pub use direct::DirectFile;
pub use file::{StorageFile, is_at};
pub use sharing::{Placed, Shared};

use crate::Error;
use crate::buffers::{Buffers, ReadInto, WriteFrom};
use crate::nbd::{NbdStorage, Uri};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Opens what a name means: an NBD export where it is a URI of one, else a file or block device of the host. With
/// `shared` others may use the file meanwhile.
pub fn open(name: &Path, read_only: bool, shared: bool, cache: CacheMode) -> Result<Arc<dyn Storage>, Error> {
    match name.to_str().filter(|text| Uri::looks_like(text)) {
        Some(_) if cache.is_direct() || !cache.flushes() => {
            let what = format!("cache={cache} is for files of this host; a server has its own");
            Err(Error::Unsupported { path: name.to_path_buf(), what })
        }
        Some(text) => {
            let uri = text.parse::<Uri>().map_err(|error| Error::Options(error.to_string()))?;
            Ok(Arc::new(NbdStorage::connect(&uri, read_only)?))
        }
        None => {
            let open = if shared { StorageFile::open_shared } else { StorageFile::open };
            let file = open(name, read_only)?;
            Ok(if cache.is_direct() {
                Arc::new(DirectFile::new(file, name)?)
            } else if cache.flushes() {
                Arc::new(file)
            } else {
                Arc::new(cache::Careless(file))
            })
        }
    }
}

/// What a range of storage is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, at least one.
    pub len: u64,
    /// Nothing is stored there; it reads as zeroes.
    pub hole: bool,
}

/// Bytes at offsets: a file, a block device, a connection. Any thread may call anything at any time. Reads beyond the
/// end give zeroes, writes beyond it make the storage longer.
pub trait Storage: Send + Sync {
    /// Bytes.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Writes fail.
    fn read_only(&self) -> bool;
    /// Reads `len` bytes at `offset` into `buffers` at `at`.
    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()>;
    /// Writes `len` bytes of `buffers` from `at` to `offset`.
    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()>;
    /// Returns when everything written before is stable.
    fn flush(&self) -> io::Result<()>;
    /// Cuts or grows the storage; what is new reads as zeroes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// How far the storage reaches or can be made to reach, `wanted` at most: devices and exports cannot grow.
    fn room(&self, wanted: u64) -> u64 {
        wanted
    }
    /// Gives the range's space back; it reads as zeroes afterwards. `Unsupported` where that cannot be.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes the range read as zeroes, its space kept.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()>;
    /// As [`Self::zero_range`], but only if that is quicker than writing zeroes; else `Unsupported`, and nothing is done.
    fn zero_range_quickly(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Reserves space for the range, its content unchanged. `Unsupported` where that cannot be.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// What begins at `offset`, at most `len` bytes of it.
    fn extent(&self, offset: u64, len: u64) -> io::Result<Extent>;
    /// Bytes that the storage takes, where that is known.
    fn allocated(&self) -> Option<u64>;

    /// Reads plain bytes.
    fn read_bytes(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let len = into.len() as u64;
        self.read(offset, &ReadInto::new(into), 0, len)
    }
    /// Writes plain bytes.
    fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(offset, &WriteFrom(bytes), 0, bytes.len() as u64)
    }
}
