//! Disposable writes over an image that must not change.
//!
//! Blocks that were written lie in a private sparse file at their own offsets; a bitmap says which. Nothing of it
//! outlives the process, so flush has nothing to make stable.

use crate::buffers::{Buffers, Part};
use crate::disk::{Disk, Status, check_range, no_snapshots};
use crate::format::Raw;
use crate::storage::{Storage, StorageFile};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

/// Bytes per block, the unit in which the overlay owns the disk.
const BLOCK: u64 = 4096;

/// Largest disk: a sparse file may claim any size, and the map of what is owned takes a bit for each block.
const CAPACITY_MAX: u64 = 8 << 40;

/// A disk whose writes go to a private file.
pub struct Overlay {
    bottom: Raw,
    top: StorageFile,
    owned: RwLock<Bitmap>,
    capacity: u64,
}

struct Bitmap(Vec<u64>);

impl Bitmap {
    fn get(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.0.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    fn set(&mut self, block: u64) {
        if let Some(word) = usize::try_from(block / 64).ok().and_then(|word| self.0.get_mut(word)) {
            *word |= 1 << (block % 64);
        }
    }
}

impl Overlay {
    /// Lays a private file, made in `directory` and unlinked at once, over `bottom`.
    pub fn new(bottom: Raw, directory: &Path) -> io::Result<Self> {
        let capacity = bottom.capacity();
        if capacity > CAPACITY_MAX {
            let (tib, most) = (capacity >> 40, CAPACITY_MAX >> 40);
            let why = format!(
                "an image of {tib} TiB is too large for writes that are thrown away: use one of at most {most} TiB, or \
                 write to the image itself"
            );
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        let top = private_file(directory)?;
        let len = capacity.checked_next_multiple_of(BLOCK).unwrap_or(capacity);
        top.set_len(len)?;
        let words = usize::try_from(len.div_ceil(BLOCK).div_ceil(64)).unwrap_or(usize::MAX);
        let owned = RwLock::new(Bitmap(vec![0; words]));
        Ok(Self { bottom, top: StorageFile::private(top, len), owned, capacity })
    }

    /// Bytes that the overlay owns.
    pub fn owned_bytes(&self) -> u64 {
        let owned = self.owned.read().unwrap_or_else(PoisonError::into_inner);
        owned.0.iter().map(|word| u64::from(word.count_ones())).sum::<u64>().saturating_mul(BLOCK)
    }

    /// Makes the overlay own the block, its content unchanged.
    fn take(&self, owned: &mut Bitmap, block: u64) -> io::Result<()> {
        if !owned.get(block) {
            let mut bytes = [0; BLOCK as usize];
            let offset = block.saturating_mul(BLOCK);
            self.bottom_bytes(offset, &mut bytes)?;
            self.top.write_bytes(offset, &bytes)?;
            owned.set(block);
        }
        Ok(())
    }

    fn bottom_bytes(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let len = self.capacity.saturating_sub(offset).min(into.len() as u64);
        let buffers = crate::buffers::VecBuffers::new(vec![0; usize::try_from(len).unwrap_or(0)]);
        self.bottom.read(offset, &buffers)?;
        for (to, from) in into.iter_mut().zip(buffers.into_inner()) {
            *to = from;
        }
        Ok(())
    }

    /// Takes the blocks that a write covers only in part, writes, and owns all of them.
    fn write_with(&self, offset: u64, len: u64, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        check_range(offset, len, self.capacity)?;
        let Some(last) = len.checked_sub(1).map(|last| offset.saturating_add(last)) else { return Ok(()) };
        let mut owned = self.owned.write().unwrap_or_else(PoisonError::into_inner);
        if !offset.is_multiple_of(BLOCK) {
            self.take(&mut owned, offset / BLOCK)?;
        }
        if !last.wrapping_add(1).is_multiple_of(BLOCK) {
            self.take(&mut owned, last / BLOCK)?;
        }
        write()?;
        for block in offset / BLOCK..=last / BLOCK {
            owned.set(block);
        }
        Ok(())
    }
}

/// A file without a name: it vanishes with the last descriptor, whatever happens to the process.
fn private_file(directory: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    match open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        // A file system without nameless files.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::NOENT) => {
            let path = directory.join(format!(".yado-overlay-{}", std::process::id()));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}

impl Disk for Overlay {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        let len = buffers.len();
        check_range(offset, len, self.capacity)?;
        let owned = self.owned.read().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0u64;
        while done < len {
            // A run of blocks with one owner.
            let at = offset.saturating_add(done);
            let ours = owned.get(at / BLOCK);
            let mut end = (at / BLOCK).saturating_add(1);
            while end.saturating_mul(BLOCK) < offset.saturating_add(len) && owned.get(end) == ours {
                end = end.saturating_add(1);
            }
            let part = end.saturating_mul(BLOCK).saturating_sub(at).min(len.saturating_sub(done));
            if ours {
                self.top.read(at, buffers, done, part)?;
            } else {
                self.bottom.read(at, &Part::new(buffers, done, part))?;
            }
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.write_with(offset, buffers.len(), || self.top.write(offset, buffers, 0, buffers.len()))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Whole blocks read as zeroes afterwards and take no space.
        let start = offset.checked_next_multiple_of(BLOCK).unwrap_or(offset);
        let end = (offset.saturating_add(len) / BLOCK).saturating_mul(BLOCK);
        check_range(offset, len, self.capacity)?;
        if start < end { self.write_zeroes(start, end.saturating_sub(start), true) } else { Ok(()) }
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.write_with(offset, len, || match self.top.punch_hole(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.top.zero_range(offset, len),
            other => other,
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        check_range(offset, len, self.capacity)?;
        let owned = self.owned.read().unwrap_or_else(PoisonError::into_inner);
        let ours = owned.get(offset / BLOCK);
        let mut end = (offset / BLOCK).saturating_add(1);
        while end.saturating_mul(BLOCK) < offset.saturating_add(len) && owned.get(end) == ours {
            end = end.saturating_add(1);
        }
        let part = end.saturating_mul(BLOCK).saturating_sub(offset).min(len);
        if !ours {
            let below = self.bottom.block_status(offset, part)?;
            return Ok(Status { depth: below.depth.saturating_add(1), ..below });
        }
        Ok(Status::of_extent(self.top.extent(offset, part)?, offset))
    }

    fn resize(&self, _capacity: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a disk with disposable writes keeps its size"))
    }

    fn snapshot(&self, _name: &str) -> io::Result<()> {
        Err(no_snapshots())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::buffers::VecBuffers;
    use proptest::prelude::*;
    use std::io::Write;

    const SIZE: usize = 64 * 1024 + 512;

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, usize, u8),
        Zero(usize, usize),
        Discard(usize, usize),
        Read(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..SIZE, 0..20_000usize).prop_map(|(at, len)| (at, len.min(SIZE - at)));
        (range, any::<u8>(), 0..4).prop_map(|((at, len), value, kind)| match kind {
            0 => Step::Write(at, len, value),
            1 => Step::Zero(at, len),
            2 => Step::Discard(at, len),
            _ => Step::Read(at, len),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_overlay_is_a_disk_and_its_base_never_changes(steps in prop::collection::vec(step(), 1..40)) {
            let directory = tempfile::tempdir().unwrap();
            let base: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
            let mut file = tempfile::NamedTempFile::new_in(&directory).unwrap();
            file.write_all(&base).unwrap();
            let overlay = Overlay::new(Raw::open(file.path(), true).unwrap(), directory.path()).unwrap();
            let mut model = base.clone();
            for step in steps {
                match step {
                    Step::Write(at, len, value) => {
                        overlay.write(at as u64, &VecBuffers::new(vec![value; len])).unwrap();
                        model[at..at + len].fill(value);
                    }
                    Step::Zero(at, len) => {
                        overlay.write_zeroes(at as u64, len as u64, false).unwrap();
                        model[at..at + len].fill(0);
                    }
                    Step::Discard(at, len) => {
                        overlay.discard(at as u64, len as u64).unwrap();
                        let (start, end) = (at.next_multiple_of(4096), (at + len) / 4096 * 4096);
                        if start < end {
                            model[start..end].fill(0);
                        }
                    }
                    Step::Read(at, len) => {
                        let buffers = VecBuffers::new(vec![0xee; len]);
                        overlay.read(at as u64, &buffers).unwrap();
                        prop_assert_eq!(&buffers.into_inner(), &model[at..at + len]);
                    }
                }
            }
            let buffers = VecBuffers::new(vec![0; SIZE]);
            overlay.read(0, &buffers).unwrap();
            prop_assert_eq!(buffers.into_inner(), model);
            prop_assert_eq!(std::fs::read(file.path()).unwrap(), base);
        }
    }

    #[test]
    fn a_sparse_image_of_any_size_is_refused_or_cheap() {
        let (file, directory) = (tempfile::NamedTempFile::new().unwrap(), tempfile::tempdir().unwrap());
        for (capacity, fits) in [(CAPACITY_MAX, true), (CAPACITY_MAX + 512, false)] {
            file.as_file().set_len(capacity).unwrap();
            let overlay = Overlay::new(Raw::open(file.path(), true).unwrap(), directory.path());
            assert_eq!(overlay.is_ok(), fits);
        }
    }
}
