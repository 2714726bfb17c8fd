//! Raw: the disk's bytes are the file's bytes. A file whose size is no multiple of 512 reads as if zeroes followed, and gets
//! whole sectors when its last one is written.

use crate::buffers::Buffers;
use crate::disk::{Disk, Error, Status, check_range, no_snapshots, read_only_error};
use crate::storage::{Storage, StorageFile};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const SECTOR: u64 = 512;

/// A raw image.
pub struct Raw {
    storage: Arc<dyn Storage>,
    capacity: AtomicU64,
}

impl Raw {
    /// Opens a raw image.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        Ok(Self::new(Arc::new(StorageFile::open(path, read_only)?)))
    }

    /// A raw image in open storage.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { capacity: AtomicU64::new(whole_sectors(storage.len())), storage }
    }

    /// The storage.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.capacity())?;
        if self.storage.read_only() { Err(read_only_error()) } else { Ok(()) }
    }
}

fn whole_sectors(len: u64) -> u64 {
    len.checked_next_multiple_of(SECTOR).unwrap_or(len)
}

impl Disk for Raw {
    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        check_range(offset, buffers.len(), self.capacity())?;
        self.storage.read(offset, buffers, 0, buffers.len())
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.check_write(offset, buffers.len())?;
        self.storage.write(offset, buffers, 0, buffers.len())
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write(offset, len)?;
        match self.storage.punch_hole(offset, len) {
            // A hint that cannot be followed is no failure.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_write(offset, len)?;
        if unmap && self.storage.punch_hole(offset, len).is_ok() {
            return Ok(());
        }
        self.storage.zero_range(offset, len)
    }

    fn zero_quickly(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_write(offset, len)?;
        if unmap && self.storage.punch_hole(offset, len).is_ok() {
            return Ok(());
        }
        self.storage.zero_range_quickly(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        check_range(offset, len, self.capacity())?;
        Ok(Status::of_extent(self.storage.extent(offset, len)?, offset))
    }

    fn resize(&self, capacity: u64) -> io::Result<()> {
        if self.read_only() {
            return Err(read_only_error());
        }
        self.storage.set_len(capacity)?;
        self.capacity.store(whole_sectors(capacity), Ordering::Release);
        Ok(())
    }

    fn snapshot(&self, _name: &str) -> io::Result<()> {
        Err(no_snapshots())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::buffers::VecBuffers;

    fn image(len: u64) -> (tempfile::NamedTempFile, Raw) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let raw = Raw::open(file.path(), false).unwrap();
        (file, raw)
    }

    fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
        let buffers = VecBuffers::new(vec![0xee; len]);
        disk.read(offset, &buffers).unwrap();
        buffers.into_inner()
    }

    #[test]
    fn what_is_written_is_read_and_zeroed() {
        let (_file, raw) = image(1 << 20);
        raw.write(5000, &VecBuffers::new(vec![7; 9000])).unwrap();
        assert_eq!(read(&raw, 4999, 9002), [&[0][..], &[7; 9000], &[0]].concat());
        raw.write_zeroes(6000, 100, false).unwrap();
        raw.discard(8192, 4096).unwrap();
        assert_eq!(read(&raw, 5999, 102), [&[7][..], &[0; 100], &[7]].concat());
        assert_eq!(read(&raw, 8191, 3), [7, 0, 0]);
        raw.flush().unwrap();
    }

    #[test]
    fn ranges_off_the_disk_are_refused() {
        let (_file, raw) = image(1 << 20);
        assert!(raw.read(1 << 20, &VecBuffers::new(vec![0])).is_err());
        assert!(raw.write(u64::MAX, &VecBuffers::new(vec![0; 2])).is_err());
        assert!(raw.discard(1, 1 << 20).is_err());
    }

    #[test]
    fn a_partial_sector_is_padded_and_whole_once_it_is_written() {
        let (file, raw) = image(1000);
        assert_eq!(raw.capacity(), 1024);
        raw.write(0, &VecBuffers::new(vec![9; 700])).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 1000);
        assert_eq!(read(&raw, 699, 325), [&[9][..], &[0; 324]].concat());
        raw.write(512, &VecBuffers::new(vec![8; 512])).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), 1024);
        assert_eq!(read(&raw, 512, 512), [8; 512]);
    }

    #[test]
    fn one_writer_or_many_readers() {
        let (file, raw) = image(4096);
        assert!(matches!(Raw::open(file.path(), true), Err(Error::InUse { .. })));
        drop(raw);
        let first = Raw::open(file.path(), true).unwrap();
        let _second = Raw::open(file.path(), true).unwrap();
        assert!(matches!(Raw::open(file.path(), false), Err(Error::InUse { .. })));
        assert!(first.write(0, &VecBuffers::new(vec![1])).is_err());
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        assert!(matches!(
            Raw::open(Path::new("/"), true),
            Err(Error::NotAnImage { what: "a directory", .. })
        ));
        assert!(matches!(Raw::open(Path::new("/nonexistent"), true), Err(Error::Open { .. })));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Raw::open(empty.path(), true), Err(Error::NotAnImage { what: "empty", .. })));
    }
}
