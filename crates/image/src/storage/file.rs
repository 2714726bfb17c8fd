//! A regular file or block device of the host.

use crate::Error;
use crate::buffers::Buffers;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fdatasync};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

/// An open file, locked: one writer, or any number of readers.
#[derive(Debug)]
pub struct StorageFile {
    file: File,
    len: u64,
    read_only: bool,
}

impl StorageFile {
    /// Opens and locks the file.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        let open = |source| Error::Open { path: path.to_path_buf(), source };
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(open)?;
        let kind = file.metadata().map_err(open)?.file_type();
        let not = |what| Err(Error::NotAnImage { path: path.to_path_buf(), what });
        if kind.is_dir() {
            return not("a directory");
        }
        if !kind.is_file() && !kind.is_block_device() {
            return not("a pipe, socket or character device");
        }
        // The end of a block device, too, is found by seeking.
        let len = file.seek(SeekFrom::End(0)).map_err(open)?;
        if len == 0 {
            return not("empty");
        }
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&file, lock) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::InUse { path: path.to_path_buf() }),
            // A file system without locks (some network ones) protects nobody.
            Err(_) => {}
        }
        Ok(Self { file, len, read_only })
    }

    /// Wraps a file made by this process for itself.
    pub fn private(file: File, len: u64) -> Self {
        Self { file, len, read_only: false }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: empty files are refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Opened without the right to write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Reads `len` bytes at `offset` into `buffers` at `at`.
    pub fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        buffers.read_file(at, len, self.file.as_fd(), offset)
    }

    /// Writes `len` bytes of `buffers` from `at` to `offset`.
    pub fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        buffers.write_file(at, len, self.file.as_fd(), offset)
    }

    /// Reads plain bytes; beyond the end of the file there are zeroes.
    pub fn read_bytes(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0usize;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(done as u64)) {
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(count) => done = done.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes plain bytes.
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Returns when everything written before is on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Gives the range's space back to the host; it reads as zeroes afterwards. `Unsupported` where the host cannot.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Makes the range read as zeroes, its space kept. Written out where the host has no quicker way.
    pub fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, len),
            other => other,
        }
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0; usize::try_from(len.min(1 << 20)).unwrap_or(0)];
        let mut done = 0u64;
        while done < len {
            let part = len.saturating_sub(done).min(zeroes.len() as u64);
            let piece = zeroes.get(..usize::try_from(part).unwrap_or(0)).unwrap_or_default();
            self.write_bytes(offset.saturating_add(done), piece)?;
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match fallocate(&self.file, how, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::NODEV) => {
                Err(io::Error::from(io::ErrorKind::Unsupported))
            }
            other => Ok(other?),
        }
    }
}
