//! Where an image goes, and the buffer that turns many small neighbouring writes into few large ones.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::BLOCK_SIZE;
use crate::error::{Error, Result};

/// Something an image can be written to, at any position.
pub trait Target {
    /// Forgets what was there: from now on the target reads as `length` zero bytes.
    fn set_len(&mut self, length: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset` bytes from the start.
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl Target for File {
    fn set_len(&mut self, length: u64) -> io::Result<()> {
        File::set_len(self, 0)?;
        File::set_len(self, length)
    }

    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }
}

impl<T: Target + ?Sized> Target for &mut T {
    fn set_len(&mut self, length: u64) -> io::Result<()> {
        (**self).set_len(length)
    }

    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_all_at(bytes, offset)
    }
}

/// Bytes gathered before they are written.
const GATHER_BYTES: usize = 1 << 20;

/// A target with one gathering buffer. Writes reach the target in the order they were made.
pub(crate) struct Gather<T> {
    target: T,
    start: u64,
    bytes: Vec<u8>,
}

impl<T: Target> Gather<T> {
    pub fn new(mut target: T, length: u64) -> Result<Self> {
        target.set_len(length).map_err(|source| Error::Target { offset: 0, source })?;
        Ok(Self { target, start: 0, bytes: Vec::with_capacity(GATHER_BYTES) })
    }

    /// Writes whole blocks at `block`.
    pub fn blocks(&mut self, block: u64, bytes: &[u8]) -> Result<()> {
        self.at(block.saturating_mul(BLOCK_SIZE), bytes)
    }

    /// Writes at a byte offset.
    pub fn at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = self.start.saturating_add(self.bytes.len() as u64);
        if end != offset || self.bytes.len().saturating_add(bytes.len()) > GATHER_BYTES {
            self.flush()?;
            self.start = offset;
        }
        if bytes.len() > GATHER_BYTES / 2 && self.bytes.is_empty() {
            self.start = offset.saturating_add(bytes.len() as u64);
            return write(&mut self.target, bytes, offset);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    pub fn flush(&mut self) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let done = write(&mut self.target, &self.bytes, self.start);
        self.bytes.clear();
        done
    }
}

fn write<T: Target>(target: &mut T, bytes: &[u8], offset: u64) -> Result<()> {
    target.write_all_at(bytes, offset).map_err(|source| Error::Target { offset, source })
}
