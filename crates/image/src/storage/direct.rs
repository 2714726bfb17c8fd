//! A file past the host's page cache (O_DIRECT).
//!
//! Whole pages go to the disk directly, through aligned memory of our own; parts of pages, at the edges of a request, go
//! through the page cache as ever. The kernel keeps both views of a file alike; no page is reached both ways at once
//! but by requests that overlap, whose order nobody may rely on anyway. A flush makes both stable.

use super::{Extent, Storage, StorageFile};
use crate::Error;
use crate::buffers::{Buffers, write_file_from};
use crate::endian::size;
use rustix::fs::OFlags;
use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What is moved directly: as large as any disk's block, and as a page.
const PAGE: u64 = 4096;
/// Bytes of aligned memory, for each thread.
const BOUNCE: usize = 1 << 20;

thread_local! {
    static MEMORY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// An open file with a second, direct way to it.
pub struct DirectFile {
    file: StorageFile,
    direct: File,
}

/// Calls with `len` bytes of memory that begins at a page.
fn with_memory<T>(len: usize, work: impl FnOnce(&mut [u8]) -> io::Result<T>) -> io::Result<T> {
    MEMORY.with_borrow_mut(|memory| {
        memory.resize(BOUNCE.saturating_add(size(PAGE)), 0);
        let start = memory.as_ptr().align_offset(size(PAGE));
        let bytes = memory.get_mut(start..start.saturating_add(len)).ok_or(io::ErrorKind::OutOfMemory)?;
        work(bytes)
    })
}

/// A request's edges and its whole pages: head, pages, tail, as lengths.
fn split(offset: u64, len: u64) -> (u64, u64, u64) {
    let head = offset.wrapping_neg().checked_rem(PAGE).unwrap_or(0).min(len);
    let rest = len.saturating_sub(head);
    let tail = rest.checked_rem(PAGE).unwrap_or(0);
    (head, rest.saturating_sub(tail), tail)
}

impl DirectFile {
    /// Opens the direct way to a file that is open.
    pub fn new(file: StorageFile, path: &Path) -> Result<Self, Error> {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let open = OpenOptions::new().read(true).write(!file.read_only()).custom_flags(flags).open(path);
        let direct = open.map_err(|source| match source.raw_os_error() {
            Some(22) => Error::Unsupported {
                path: path.to_path_buf(),
                what: "its file system cannot pass the page cache by (O_DIRECT): use cache=writeback".into(),
            },
            _ => Error::Open { path: path.to_path_buf(), source },
        })?;
        let same = file.is_file(&direct).map_err(|source| Error::open(path, source))?;
        // Names can come to mean another file meanwhile.
        same.then_some(Self { file, direct }).ok_or_else(|| Error::InUse { path: path.to_path_buf() })
    }

    /// Reads whole pages; answers how many bytes came before the end of the file.
    fn read_pages(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::pread(&self.direct, &mut *bytes, offset) {
                Ok(count) => return Ok(count),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Storage for DirectFile {
    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read_only(&self) -> bool {
        self.file.read_only()
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let (head, pages, tail) = split(offset, len);
        if head > 0 {
            self.file.read(offset, buffers, at, head)?;
        }
        let mut done = head;
        let end = head.saturating_add(pages);
        while done < end {
            let part = end.saturating_sub(done).min(BOUNCE as u64);
            let from = offset.saturating_add(done);
            let count = with_memory(size(part), |bytes| {
                // What is beyond the file's end, or a short read leaves out, comes the other way.
                let count = self.read_pages(from, bytes)?;
                let whole = (count as u64).saturating_sub((count as u64).checked_rem(PAGE).unwrap_or(0));
                buffers.put(at.saturating_add(done), bytes.get(..size(whole)).unwrap_or_default())?;
                Ok(whole)
            })?;
            if count < part {
                let rest = part.saturating_sub(count);
                let (from, to) = (from.saturating_add(count), at.saturating_add(done).saturating_add(count));
                self.file.read(from, buffers, to, rest)?;
            }
            done = done.saturating_add(part);
        }
        if tail > 0 {
            self.file.read(offset.saturating_add(end), buffers, at.saturating_add(end), tail)?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let (head, pages, tail) = split(offset, len);
        if head > 0 {
            self.file.write(offset, buffers, at, head)?;
        }
        let mut done = head;
        let end = head.saturating_add(pages);
        while done < end {
            let part = end.saturating_sub(done).min(BOUNCE as u64);
            let to = offset.saturating_add(done);
            with_memory(size(part), |bytes| {
                buffers.get(at.saturating_add(done), bytes)?;
                write_file_from(self.direct.as_fd(), to, bytes)
            })?;
            self.file.reaches(to.saturating_add(part));
            done = done.saturating_add(part);
        }
        if tail > 0 {
            self.file.write(offset.saturating_add(end), buffers, at.saturating_add(end), tail)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn room(&self, wanted: u64) -> u64 {
        self.file.room(wanted)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch_hole(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.zero_range(offset, len)
    }

    fn zero_range_quickly(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.zero_range_quickly(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.reserve(offset, len)
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.file.extent(offset, len)
    }

    fn allocated(&self) -> Option<u64> {
        self.file.allocated()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::storage::{CacheMode, open};
    use proptest::prelude::*;

    /// The build's directory is on a disk; the temporary one may be in memory, where O_DIRECT means nothing.
    fn file(len: usize) -> tempfile::NamedTempFile {
        let place = option_env!("CARGO_MANIFEST_DIR").filter(|place| Path::new(place).exists());
        let file = place.and_then(|place| tempfile::NamedTempFile::new_in(place).ok());
        let file = file.unwrap_or_else(|| tempfile::NamedTempFile::new().unwrap());
        file.as_file().set_len(len as u64).unwrap();
        file
    }

    #[test]
    fn requests_are_cut_at_pages() {
        assert_eq!(split(0, 8192), (0, 8192, 0));
        assert_eq!(split(1, 8192), (4095, 4096, 1));
        assert_eq!(split(5, 7), (7, 0, 0));
        assert_eq!(split(4095, 2), (1, 0, 1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn a_direct_file_is_a_file(
            steps in proptest::collection::vec((0usize..40_000, 0usize..30_000, any::<u8>()), 1..20),
            len in 1usize..50_000,
        ) {
            let file = file(len);
            let storage = open(file.path(), false, false, CacheMode::None).unwrap();
            let mut model = vec![0; len];
            for (at, count, value) in steps {
                if value & 1 == 0 {
                    storage.write_bytes(at as u64, &vec![value; count]).unwrap();
                    model.resize(model.len().max(at + count).max(1), 0);
                    model[at..at + count].fill(value);
                } else {
                    let mut bytes = vec![0xee; count];
                    storage.read_bytes(at as u64, &mut bytes).unwrap();
                    let told: Vec<u8> = (at..at + count).map(|at| model.get(at).copied().unwrap_or(0)).collect();
                    prop_assert!(bytes == told, "{} bytes at {}", count, at);
                }
            }
            storage.flush().unwrap();
            // A write of nothing beyond the end changes nothing.
            let written = std::fs::read(file.path()).unwrap();
            prop_assert!(written.len() <= model.len() && model.starts_with(&written));
            prop_assert!(model[written.len()..].iter().all(|byte| *byte == 0));
        }
    }
}
