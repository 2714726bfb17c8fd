//! A disposable layer over a disk that is never changed.
//!
//! Reads come from the base until a granule (4 KiB, more on huge disks) is written; from then on they come from a
//! private file without a name, which the host removes when the overlay is dropped, however the process ends. So
//! nothing here has to survive a crash: a flush has nothing to make stable.
//!
//! A bit per granule says where its bytes are. Bits are only ever set. Whoever sets one holds the mutex from before
//! the granule's first byte is written until after; who finds it set, or only reads, needs no lock.

use super::SECTOR;
use crate::buffer::{slice, total};
use crate::storage::File;
use crate::{Disk, Error, Source, Target};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The smallest granule, a page of the host's cache.
const GRANULE_MIN: u64 = 4096;
/// The bitmap is at most this many bits (2 MiB), so granules grow with the disk beyond 64 GiB.
const GRANULES_MAX: u64 = 1 << 24;

/// A base disk, and what was written over it.
pub struct Overlay {
    base: Arc<dyn Disk>,
    top: File,
    capacity: u64,
    /// log2 of the bytes of a granule.
    shift: u32,
    allocated: Vec<AtomicU64>,
    allocating: Mutex<()>,
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

/// A run of granules that are all in the same place.
struct Run {
    offset: u64,
    len: u64,
    in_top: bool,
}

impl Overlay {
    /// A layer over `base` that keeps what is written in a nameless file in `directory`. The disk has the capacity
    /// of the base, or `capacity` bytes if that is more; the rest reads as zeroes.
    pub fn new(base: Arc<dyn Disk>, directory: &Path, capacity: u64) -> Result<Self, Error> {
        let capacity = capacity.checked_next_multiple_of(SECTOR).unwrap_or(0).max(base.capacity());
        let top = nameless(directory)
            .and_then(|file| file.set_len(capacity).and_then(|()| File::private(file)))
            .map_err(|e| Error::host("make a private layer over", e))?;
        let mut granule = GRANULE_MIN;
        while capacity / granule >= GRANULES_MAX {
            granule = granule.saturating_mul(2);
        }
        let words = capacity.div_ceil(granule).div_ceil(64);
        let allocated = (0..words).map(|_| AtomicU64::new(0)).collect();
        let shift = granule.trailing_zeros();
        Ok(Self { base, top, capacity, shift, allocated, allocating: Mutex::new(()) })
    }

    fn is_allocated(&self, granule: u64) -> bool {
        let word = usize::try_from(granule >> 6).ok().and_then(|word| self.allocated.get(word));
        word.is_some_and(|word| word.load(Ordering::Acquire) & (1 << (granule & 63)) != 0)
    }

    fn set_allocated(&self, granule: u64) {
        if let Some(word) = usize::try_from(granule >> 6).ok().and_then(|word| self.allocated.get(word)) {
            word.fetch_or(1 << (granule & 63), Ordering::Release);
        }
    }

    fn granule(&self) -> u64 {
        1 << self.shift
    }

    /// The granules that a range touches.
    fn granules(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        if len == 0 {
            return 0..0;
        }
        let end = offset.saturating_add(len);
        offset >> self.shift..end.div_ceil(self.granule())
    }

    /// The longest run from `offset` on, at most `len` bytes.
    fn run(&self, offset: u64, len: u64) -> Run {
        let mut granules = self.granules(offset, len);
        let in_top = granules.next().is_some_and(|first| self.is_allocated(first));
        let end = offset.saturating_add(len);
        let stop = granules.find(|&granule| self.is_allocated(granule) != in_top);
        let stop = stop.map_or(end, |granule| granule << self.shift).min(end);
        Run { offset, len: stop.saturating_sub(offset), in_top }
    }

    /// Reads from the base; what it does not reach is zeroes.
    fn read_base(&self, offset: u64, into: &[Target<'_>]) -> Result<(), Error> {
        let len = total(into);
        let from_base = self.base.capacity().saturating_sub(offset).min(len);
        if from_base > 0 {
            self.base.read_at(offset, &slice(into, 0, from_base))?;
        }
        slice(into, from_base, len.saturating_sub(from_base)).iter().for_each(Target::zero);
        Ok(())
    }

    /// Copies one granule from the base to the top, all but its bit.
    fn copy_up(&self, granule: u64) -> Result<(), Error> {
        let offset = granule << self.shift;
        let len = self.granule().min(self.capacity.saturating_sub(offset));
        let mut bytes = vec![0u8; usize::try_from(len).unwrap_or(0)];
        self.read_base(offset, &[Target::new(&mut bytes)])?;
        self.top.write_at(offset, &[Source::new(&bytes)], false)
    }

    /// Changes a range of the top with `change`. Granules that were not in the top, and of which it does not change
    /// every byte, are copied there first.
    fn change(&self, offset: u64, len: u64, change: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        self.check(offset, len)?;
        let granules = self.granules(offset, len);
        if granules.clone().all(|granule| self.is_allocated(granule)) {
            return change();
        }
        let _allocating = self.allocating.lock().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(len);
        for granule in [granules.start, granules.end.saturating_sub(1)] {
            let start = granule << self.shift;
            let whole = start >= offset && start.saturating_add(self.granule()).min(self.capacity) <= end;
            if !whole && !self.is_allocated(granule) {
                self.copy_up(granule)?;
                self.set_allocated(granule);
            }
        }
        change()?;
        granules.for_each(|granule| self.set_allocated(granule));
        Ok(())
    }
}

impl Disk for Overlay {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, into: &[Target<'_>]) -> Result<(), Error> {
        let len = total(into);
        self.check(offset, len)?;
        let mut done = 0u64;
        while done < len {
            let run = self.run(offset.saturating_add(done), len.wrapping_sub(done));
            let pieces = slice(into, done, run.len);
            if run.in_top {
                self.top.read_at(run.offset, &pieces)?;
            } else {
                self.read_base(run.offset, &pieces)?;
            }
            done = done.saturating_add(run.len);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[Source<'_>], _durable: bool) -> Result<(), Error> {
        self.change(offset, total(from), || self.top.write_at(offset, from, false))
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<(), Error> {
        self.change(offset, len, || match self.top.punch_hole(offset, len) {
            Err(Error::Unsupported(_)) => self.top.zero_range(offset, len),
            done => done,
        })
    }
}

/// A file in `directory` that has no name, or had one for a moment.
fn nameless(directory: &Path) -> std::io::Result<std::fs::File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(directory) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {
            let path = directory.join(format!(".yado-layer-{}", std::process::id()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        opened => opened,
    }
}
