//! A regular file or block device of the host.

use super::{Extent, Storage};
use crate::Error;
use crate::buffers::Buffers;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fdatasync};
use rustix::io::Errno;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An open file, locked: one writer, or any number of readers.
#[derive(Debug)]
pub struct StorageFile {
    file: File,
    /// Bytes: what the file had when it was opened, and what this process has written beyond. A device that has grown since
    /// is seen to have when more is wanted.
    len: AtomicU64,
    read_only: bool,
    device: bool,
    /// The data that was found last: to find where data ends takes some file systems (tmpfs) as long as there is data, and
    /// who goes over a file asks again and again. Where a hole was made since it still reads as zeroes.
    data: Mutex<Range<u64>>,
    /// A flush has failed: the kernel has thrown away what it could not write, and the next flush would know nothing of it.
    lost: AtomicBool,
}

/// Does a system call until no signal comes in between.
fn patiently<T>(call: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// How often a file is opened that loses its name meanwhile.
const TRIES: usize = 3;

/// Whether a file has this name. To be asked once it is locked: before, another one may take its place.
pub fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: &Metadata, b: &Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((file.metadata(), std::fs::metadata(path)), (Ok(own), Ok(named)) if same(&own, &named))
}

impl StorageFile {
    /// Opens and locks the file.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        let this = Self::open_locked(OpenOptions::new().read(true).write(!read_only), path, read_only)?;
        if this.is_empty() {
            return Err(Error::NotAnImage { path: path.to_path_buf(), what: "empty" });
        }
        Ok(this)
    }

    /// Opens the file though others may use it.
    pub fn open_shared(path: &Path, read_only: bool) -> Result<Self, Error> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path);
        Self::unlocked(file.map_err(|source| Error::open(path, source))?, path, read_only)
    }

    /// Makes a new, empty file for an image and locks it; with `replace` a regular file that is there is emptied, once it
    /// is known that nobody uses it.
    pub fn create(path: &Path, replace: bool) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let options = if replace { options.create(true).truncate(false) } else { options.create_new(true) };
        let this = Self::open_locked(options, path, false)?;
        if !this.device {
            this.set_len(0).map_err(|source| Error::open(path, source))?;
        }
        Ok(this)
    }

    /// Opens and locks what the name means at that moment: who replaces an image holds the old one's lock until the new one
    /// has the name, and what is locked after that is nobody's.
    fn open_locked(options: &OpenOptions, path: &Path, read_only: bool) -> Result<Self, Error> {
        for _ in 0..TRIES {
            let file = options.open(path).map_err(|source| Error::open(path, source))?;
            let this = Self::wrap(file, path, read_only)?;
            if is_at(&this.file, path) {
                return Ok(this);
            }
        }
        Err(Error::InUse { path: path.to_path_buf() })
    }

    fn wrap(file: File, path: &Path, read_only: bool) -> Result<Self, Error> {
        let this = Self::unlocked(file, path, read_only)?;
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&this.file, lock) {
            // A file system without locks (some network ones) protects nobody.
            Err(Errno::WOULDBLOCK) => Err(Error::InUse { path: path.to_path_buf() }),
            _ => Ok(this),
        }
    }

    fn unlocked(mut file: File, path: &Path, read_only: bool) -> Result<Self, Error> {
        let open = |source| Error::open(path, source);
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
        Ok(Self {
            file,
            len: AtomicU64::new(len),
            read_only,
            device: kind.is_block_device(),
            data: Mutex::default(),
            lost: AtomicBool::new(false),
        })
    }

    /// Wraps a file made by this process for itself.
    pub fn private(file: File, len: u64) -> Self {
        Self {
            file,
            len: AtomicU64::new(len),
            read_only: false,
            device: false,
            data: Mutex::default(),
            lost: AtomicBool::new(false),
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

    fn data(&self) -> MutexGuard<'_, Range<u64>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        *self.data() = 0..0;
        match patiently(|| fallocate(&self.file, how, offset, len)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                Err(io::Error::from(io::ErrorKind::Unsupported))
            }
            // A block device wants whole blocks of its own size.
            Err(Errno::INVAL) if self.device => Err(io::Error::from(io::ErrorKind::Unsupported)),
            other => Ok(other?),
        }
    }

    /// The open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether another open file is the same one.
    pub(super) fn is_file(&self, other: &File) -> io::Result<bool> {
        let (own, other) = (self.file.metadata()?, other.metadata()?);
        Ok((own.dev(), own.ino(), own.rdev()) == (other.dev(), other.ino(), other.rdev()))
    }

    /// Notes that the file reaches `end` at least.
    pub(super) fn reaches(&self, end: u64) {
        if self.len.load(Ordering::Relaxed) < end {
            self.len.fetch_max(end, Ordering::Relaxed);
        }
    }
}

impl Storage for StorageFile {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        buffers.read_file(at, len, self.file.as_fd(), offset)
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        buffers.write_file(at, len, self.file.as_fd(), offset)?;
        self.reaches(offset.saturating_add(len));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            let why = "an earlier flush has failed, and the host has thrown away what it could not write: reopen the image";
            return Err(io::Error::other(why));
        }
        patiently(|| fdatasync(&self.file)).map_err(|error| {
            self.lost.store(true, Ordering::Relaxed);
            error.into()
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.device {
            return if self.room(len) == len { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) };
        }
        *self.data() = 0..0;
        self.file.set_len(len)?;
        self.len.store(len, Ordering::Relaxed);
        Ok(())
    }

    fn room(&self, wanted: u64) -> u64 {
        if !self.device {
            return wanted;
        }
        if wanted > self.len() {
            // Somebody may have made it larger since; a device that does not tell has not grown.
            self.reaches((&self.file).seek(SeekFrom::End(0)).unwrap_or(0));
        }
        wanted.min(self.len())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.zero_range_quickly(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, len),
            other => other,
        }
    }

    fn zero_range_quickly(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::ZERO_RANGE, offset, len)?;
        self.reaches(offset.saturating_add(len));
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::empty(), offset, len)?;
        self.reaches(offset.saturating_add(len));
        Ok(())
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let end = self.len();
        if offset >= end {
            return Ok(Extent { len, hole: true });
        }
        let within = len.min(end.saturating_sub(offset));
        let until = |to: u64| to.saturating_sub(offset).clamp(1, within);
        if let Some(known) = Some(self.data()).filter(|data| data.contains(&offset)) {
            return Ok(Extent { len: until(known.end), hole: false });
        }
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok(Extent { len: until(data), hole: true }),
            Ok(_) => {
                let hole = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(offset)).unwrap_or(end);
                *self.data() = offset..hole;
                Ok(Extent { len: until(hole), hole: false })
            }
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => Ok(Extent { len: within, hole: true }),
            // A file system that knows no holes has data everywhere.
            Err(_) => Ok(Extent { len: within, hole: false }),
        }
    }

    fn allocated(&self) -> Option<u64> {
        let metadata = self.file.metadata().ok()?;
        Some(metadata.blocks().saturating_mul(512))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_was_found_is_forgotten_once_it_is_cut() {
        let file = StorageFile::private(tempfile::tempfile().unwrap(), 0);
        file.write_bytes(0, &[7; 1 << 20]).unwrap();
        let of = |offset| file.extent(offset, 1 << 20).unwrap();
        assert_eq!(of(4096), Extent { len: (1 << 20) - 4096, hole: false });
        assert_eq!(of(8192), Extent { len: (1 << 20) - 8192, hole: false });
        if file.punch_hole(1 << 16, 1 << 16).is_ok() {
            assert_eq!(of(8192), Extent { len: (1 << 16) - 8192, hole: false });
            assert_eq!(of(1 << 16), Extent { len: 1 << 16, hole: true });
        }
        file.set_len(1 << 15).unwrap();
        assert_eq!(of(8192), Extent { len: (1 << 15) - 8192, hole: false });
        file.write_bytes(1 << 15, &[1; 4096]).unwrap();
        assert_eq!(of((1 << 15) + 5).len, 4091);
    }

    #[test]
    fn a_device_may_grow() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let device = StorageFile { device: true, ..StorageFile::private(file.try_clone().unwrap(), 4096) };
        device.set_len(4096).unwrap();
        assert_eq!((device.room(4096), device.room(8192)), (4096, 4096));
        assert_eq!(device.set_len(8192).unwrap_err().kind(), io::ErrorKind::StorageFull);
        file.set_len(16384).unwrap();
        assert_eq!(device.room(8192), 8192);
        device.set_len(8192).unwrap();
        assert_eq!(device.len(), 16384);
    }

    #[test]
    fn a_file_that_lost_its_name_while_it_was_opened_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let (path, new) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&path, "old").unwrap();
        // Somebody replaces the image until it is opened anew.
        let old = StorageFile::open(&path, true).unwrap();
        let opened = File::open(&path).unwrap();
        assert!(is_at(&opened, &path));
        std::fs::write(&new, "newer").unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert!(!is_at(&old.file, &path) && !is_at(&opened, &path));
        assert_eq!(StorageFile::open(&path, false).unwrap().len(), 5);
        std::fs::remove_file(&path).unwrap();
        assert!(!is_at(&old.file, &path));
    }

    #[test]
    fn who_opens_while_images_are_replaced_gets_the_one_with_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let (path, new) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&path, "image").unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // As they do who replace images: the old one's lock is held until the new one has the name.
                    let Ok(_held) = StorageFile::open(&path, false) else { continue };
                    std::fs::write(&new, "image").unwrap();
                    std::fs::rename(&new, &path).unwrap();
                }
            });
            let mut opened = 0;
            while opened < 200 {
                if let Ok(file) = StorageFile::open(&path, false) {
                    assert!(is_at(&file.file, &path), "after {opened}");
                    opened += 1;
                }
                std::thread::yield_now();
            }
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_failed_flush_is_not_forgotten() {
        // A pipe cannot be made stable.
        let (_reader, writer) = std::io::pipe().unwrap();
        let file = StorageFile::private(File::from(std::os::fd::OwnedFd::from(writer)), 0);
        let first = file.flush().unwrap_err();
        assert_eq!(first.raw_os_error(), Some(22));
        let second = file.flush().unwrap_err().to_string();
        assert!(second.contains("reopen"), "{second}");
    }
}
