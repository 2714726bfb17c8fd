//! Where a request's bytes are, above the image.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
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

/// Reads whole pieces of `file` into `bytes`; what lies beyond its end reads as zeroes.
pub(crate) fn read_file_into(file: BorrowedFd<'_>, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0usize;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(file, &mut *rest, offset.saturating_add(done as u64)) {
            Ok(0) => {
                rest.fill(0);
                return Ok(());
            }
            Ok(count) => done = done.saturating_add(count),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes all of `bytes` to `file`.
pub(crate) fn write_file_from(file: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0usize;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pwrite(file, rest, offset.saturating_add(done as u64)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done = done.saturating_add(count),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the range is not in the request's memory")
}

fn span(at: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(at).map_err(|_| outside())?;
    let end = at.checked_add(len).and_then(|end| usize::try_from(end).ok()).ok_or_else(outside)?;
    Ok(start..end)
}

/// Memory to write from: a slice.
#[derive(Debug, Clone, Copy)]
pub struct WriteFrom<'a>(pub &'a [u8]);

impl Buffers for WriteFrom<'_> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_file(&self, _: u64, _: u64, _: BorrowedFd<'_>, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        write_file_from(file, offset, self.0.get(span(at, len)?).ok_or_else(outside)?)
    }

    fn put(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(self.0.get(span(at, into.len() as u64)?).ok_or_else(outside)?);
        Ok(())
    }
}

/// Memory to read into: a slice.
#[derive(Debug)]
pub struct ReadInto<'a>(RefCell<&'a mut [u8]>);

impl<'a> ReadInto<'a> {
    /// Reads go into `bytes`.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self(RefCell::new(bytes))
    }

    pub(crate) fn with(
        &self,
        at: u64,
        len: u64,
        f: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut bytes = self.0.try_borrow_mut().map_err(|_| outside())?;
        f(bytes.get_mut(span(at, len)?).ok_or_else(outside)?)
    }
}

impl Buffers for ReadInto<'_> {
    fn len(&self) -> u64 {
        self.0.borrow().len() as u64
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.with(at, len, |bytes| read_file_into(file, offset, bytes))
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.with(at, len, |bytes| write_file_from(file, offset, bytes))
    }

    fn put(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.with(at, from.len() as u64, |bytes| {
            bytes.copy_from_slice(from);
            Ok(())
        })
    }

    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(at, into.len() as u64, |bytes| {
            into.copy_from_slice(bytes);
            Ok(())
        })
    }
}

/// A part of other buffers.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    of: &'a dyn Buffers,
    at: u64,
    len: u64,
}

impl<'a> Part<'a> {
    /// `len` bytes of `of` from `at` on.
    pub fn new(of: &'a dyn Buffers, at: u64, len: u64) -> Self {
        Self { of, at, len }
    }
}

impl Buffers for Part<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.of.read_file(self.at.saturating_add(at), len, file, offset)
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.of.write_file(self.at.saturating_add(at), len, file, offset)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.of.put(self.at.saturating_add(at), bytes)
    }

    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.of.get(self.at.saturating_add(at), into)
    }
}

/// Fills a range of buffers with zeroes.
pub(crate) fn put_zeroes(buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
    static ZEROES: [u8; 65536] = [0; 65536];
    let mut done = 0u64;
    while done < len {
        let part = len.saturating_sub(done).min(ZEROES.len() as u64);
        let piece = ZEROES.get(..usize::try_from(part).unwrap_or(0)).unwrap_or_default();
        buffers.put(at.saturating_add(done), piece)?;
        done = done.saturating_add(part);
    }
    Ok(())
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
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        with(bytes.get_mut(span(at, len)?).ok_or_else(outside)?)
    }
}

impl Buffers for VecBuffers {
    fn len(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.range(at, len, |bytes| read_file_into(file, offset, bytes))
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.range(at, len, |bytes| write_file_from(file, offset, bytes))
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
