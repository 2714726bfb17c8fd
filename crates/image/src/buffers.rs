//! Where a request's bytes are, above the image.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

/// The memory of one request: a run of bytes, wherever they lie. Positions count from the run's start.
pub trait Buffers {
    /// Bytes in all.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `len` bytes at `at` from `file`, beginning at `offset`. Bytes beyond the end of the file read as zeroes.
    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()>;
    /// Writes `len` bytes at `at` to `file`, beginning at `offset`.
    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()>;
    /// Copies bytes into the memory.
    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()>;
    /// Copies bytes out of the memory.
    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Ordinary memory of this process, for tools and tests.
#[derive(Debug, Default)]
pub struct VecBuffers(Mutex<Vec<u8>>);

impl VecBuffers {
    /// The bytes to write, or as many to read into.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }

    /// The bytes.
    pub fn into_inner(self) -> Vec<u8> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, at: u64, len: u64, with: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let start = usize::try_from(at).map_err(|_| outside())?;
        let end = usize::try_from(at.checked_add(len).ok_or_else(outside)?).map_err(|_| outside())?;
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        with(bytes.get_mut(start..end).ok_or_else(outside)?)
    }
}

impl Buffers for VecBuffers {
    fn len(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.range(at, len, |mut bytes| {
            let file = std::fs::File::from(file.try_clone_to_owned()?);
            let mut offset = offset;
            while !bytes.is_empty() {
                match file.read_at(bytes, offset)? {
                    0 => {
                        bytes.fill(0);
                        return Ok(());
                    }
                    count => {
                        bytes = bytes.get_mut(count..).unwrap_or_default();
                        offset = offset.saturating_add(count as u64);
                    }
                }
            }
            Ok(())
        })
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.range(at, len, |bytes| {
            std::fs::File::from(file.try_clone_to_owned()?).write_all_at(bytes, offset)
        })
    }

    fn put(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.range(at, from.len() as u64, |bytes| {
            bytes.copy_from_slice(from);
            Ok(())
        })
    }

    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.range(at, into.len() as u64, |bytes| {
            into.copy_from_slice(bytes);
            Ok(())
        })
    }
}
