//! Guest-physical RAM: regions, checked access, and the write gate.

use crate::mapping::{Backing, Mapping};
use crate::page::{PageFlags, PageTable};
use crate::provision::Provision;
use crate::{PAGE_SHIFT, PAGE_SIZE};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The layout is not made of whole, ascending, disjoint pages.
    #[error(
        "the memory layout is wrong: region at {base:#x} of {len:#x} bytes overlaps or is not page aligned"
    )]
    Layout {
        /// Guest-physical start of the offending region.
        base: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The host does not hold it in the way asked for.
    #[error(transparent)]
    Provision(#[from] crate::provision::Error),
    /// The host refused the mapping.
    #[error("the host has no room for {len} bytes of guest RAM: {source}; use a smaller --memory")]
    Map {
        /// Bytes asked for.
        len: u64,
        /// The host's reason.
        source: std::io::Error,
    },
}

/// An access that RAM cannot satisfy: some byte of it is not RAM (or an atomic one is not aligned).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no RAM at guest-physical {address:#x} for {len} bytes")]
pub struct AccessError {
    /// Guest-physical address of the access.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// A contiguous run of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of the first byte.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the first byte in the host mapping.
    offset: u64,
}

/// A page of guest RAM as an engine sees it.
#[derive(Debug, Clone, Copy)]
pub struct HostPage {
    /// Host address of the first byte of the page; valid as long as the [`GuestMemory`] lives.
    pub host: *mut u8,
    /// What is known of the page.
    pub flags: PageFlags,
}

/// Hears of writes, other than an engine's own, to pages that hold translated code.
pub trait CodeWatch: Send + Sync {
    /// `len` bytes at guest-physical `address` are about to be visible; all of them are in one page.
    fn written(&self, address: u64, len: u64);
}

pub(crate) struct Inner {
    pub(crate) mapping: Mapping,
    pub(crate) provision: Provision,
    regions: Vec<Region>,
    pages: PageTable,
    watch: OnceLock<Arc<dyn CodeWatch>>,
}

/// All RAM of one guest; a cheap handle, shared by vCPUs and devices.
#[derive(Clone)]
pub struct GuestMemory(pub(crate) Arc<Inner>);

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.0.regions).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// Makes zeroed RAM. `layout` is a list of (guest-physical base, length), ascending, in whole pages.
    pub fn new(layout: &[(u64, u64)], backing: Backing) -> Result<Self, Error> {
        Self::provided(layout, Provision { backing, ..Provision::default() })
    }

    /// The same, held by the host as asked.
    pub fn provided(layout: &[(u64, u64)], provision: Provision) -> Result<Self, Error> {
        let mut regions = Vec::with_capacity(layout.len());
        let (mut offset, mut next) = (0u64, 0u64);
        for &(base, len) in layout {
            let wrong = Error::Layout { base, len };
            if base < next || len == 0 || !base.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
                return Err(wrong);
            }
            regions.push(Region { base, len, offset });
            match (base.checked_add(len), offset.checked_add(len)) {
                (Some(end), Some(total)) => (next, offset) = (end, total),
                _ => return Err(wrong),
            }
        }
        let map = |source| Error::Map { len: offset, source };
        let size = usize::try_from(offset)
            .map_err(|_| map(std::io::Error::from(std::io::ErrorKind::OutOfMemory)))?;
        if size == 0 {
            return Err(Error::Layout { base: 0, len: 0 });
        }
        provision.check(layout)?;
        let mapping = Mapping::new(size, &provision)
            .map_err(|error| provision.explain(offset, error).map_or_else(map, Error::from))?;
        let pages = PageTable::new(size >> PAGE_SHIFT);
        Ok(Self(Arc::new(Inner { mapping, provision, regions, pages, watch: OnceLock::new() })))
    }

    /// The runs of RAM, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.0.regions
    }

    /// The file that holds all RAM, of [`Backing::Shared`] memory: for processes that are to map parts of it.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.0.mapping.file()
    }

    /// Where in that file the page is that holds `address`; `None` where there is no RAM.
    pub fn file_offset(&self, address: u64) -> Option<u64> {
        self.offset(address & !PAGE_SIZE.wrapping_sub(1), PAGE_SIZE).ok().map(|offset| offset as u64)
    }

    /// Bytes of RAM in all regions.
    pub fn len(&self) -> u64 {
        (self.0.pages.len() as u64) << PAGE_SHIFT
    }

    /// A guest always has RAM.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether every byte of the range is RAM of one region.
    pub fn contains(&self, address: u64, len: u64) -> bool {
        self.offset(address, len).is_ok()
    }

    pub(crate) fn offset(&self, address: u64, len: u64) -> Result<usize, AccessError> {
        let error = AccessError { address, len };
        for region in &self.0.regions {
            let Some(into) = address.checked_sub(region.base) else { break };
            if into < region.len {
                let room = region.len.wrapping_sub(into);
                if len > room {
                    return Err(error);
                }
                return usize::try_from(region.offset.wrapping_add(into)).map_err(|_| error);
            }
        }
        Err(error)
    }

    /// Copies out of RAM.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let len = into.len() as u64;
        let offset = self.offset(address, len)?;
        self.0.mapping.read(offset, into).ok_or(AccessError { address, len })
    }

    /// Copies into RAM, through the gate.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), AccessError> {
        let len = from.len() as u64;
        let offset = self.offset(address, len)?;
        let done = self.0.mapping.write(offset, from).ok_or(AccessError { address, len });
        self.note_write(address, offset, len);
        done
    }

    /// Sets a range to one byte value, through the gate.
    pub fn fill(&self, address: u64, len: u64, value: u8) -> Result<(), AccessError> {
        let error = AccessError { address, len };
        let offset = self.offset(address, len)?;
        let done =
            usize::try_from(len).ok().and_then(|len| self.0.mapping.fill(offset, len, value)).ok_or(error);
        self.note_write(address, offset, len);
        done
    }

    /// Reads a fixed-size array, e.g. to decode a little-endian field.
    pub fn read_array<const N: usize>(&self, address: u64) -> Result<[u8; N], AccessError> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    /// Loads a little-endian u16 in one access when aligned, with acquire ordering.
    pub fn load_u16(&self, address: u64) -> Result<u16, AccessError> {
        let bytes = self.read_array(address)?;
        Mapping::acquire();
        Ok(u16::from_le_bytes(bytes))
    }

    /// Loads a little-endian u32, with acquire ordering.
    pub fn load_u32(&self, address: u64) -> Result<u32, AccessError> {
        let bytes = self.read_array(address)?;
        Mapping::acquire();
        Ok(u32::from_le_bytes(bytes))
    }

    /// Loads a little-endian u64, with acquire ordering.
    pub fn load_u64(&self, address: u64) -> Result<u64, AccessError> {
        let bytes = self.read_array(address)?;
        Mapping::acquire();
        Ok(u64::from_le_bytes(bytes))
    }

    /// Runs `with` on an aligned u16 of RAM as an atomic (a ring index, say), noting a write.
    pub fn atomic_u16<R>(&self, address: u64, with: impl FnOnce(&AtomicU16) -> R) -> Result<R, AccessError> {
        let offset = self.offset(address, 2)?;
        let cell = self.0.mapping.atomic_u16(offset).ok_or(AccessError { address, len: 2 })?;
        let result = with(cell);
        self.note_write(address, offset, 2);
        Ok(result)
    }

    /// Runs `with` on an aligned u32 of RAM as an atomic, noting a write.
    pub fn atomic_u32<R>(&self, address: u64, with: impl FnOnce(&AtomicU32) -> R) -> Result<R, AccessError> {
        let offset = self.offset(address, 4)?;
        let cell = self.0.mapping.atomic_u32(offset).ok_or(AccessError { address, len: 4 })?;
        let result = with(cell);
        self.note_write(address, offset, 4);
        Ok(result)
    }

    /// Runs `with` on an aligned u64 of RAM as an atomic (a page-table entry, say), noting a write.
    pub fn atomic_u64<R>(&self, address: u64, with: impl FnOnce(&AtomicU64) -> R) -> Result<R, AccessError> {
        let offset = self.offset(address, 8)?;
        let cell = self.0.mapping.atomic_u64(offset).ok_or(AccessError { address, len: 8 })?;
        let result = with(cell);
        self.note_write(address, offset, 8);
        Ok(result)
    }

    /// The host's view of the page that holds `address`, for reading and fetching; `None` where there is no RAM.
    pub fn host_page(&self, address: u64) -> Option<HostPage> {
        let page = address & !PAGE_SIZE.wrapping_sub(1);
        let offset = self.offset(page, PAGE_SIZE).ok()?;
        let host = self.0.mapping.as_ptr().wrapping_add(offset);
        Some(HostPage { host, flags: self.0.pages.get(offset >> PAGE_SHIFT) })
    }

    /// As [`Self::host_page`], for an engine that is about to write there: the page is noted as modified.
    ///
    /// The engine tells its own translator of writes to a page flagged [`PageFlags::CODE`].
    pub fn host_page_for_write(&self, address: u64) -> Option<HostPage> {
        let mut page = self.host_page(address)?;
        let offset = self.offset(address, 1).ok()?;
        let before = self.0.pages.set(offset >> PAGE_SHIFT, PageFlags::MODIFIED);
        page.flags = before;
        Some(page)
    }

    /// Fills a range from `file` at `position` without a copy in between; beyond the end of the file there are zeroes.
    pub fn read_file(&self, address: u64, len: u64, file: BorrowedFd<'_>, position: u64) -> io::Result<()> {
        let (offset, bytes) = self.file_range(address, len)?;
        let done = self.0.mapping.read_file(offset, bytes, file, position);
        self.note_write(address, offset, len);
        done
    }

    /// Writes a range to `file` at `position` without a copy in between.
    pub fn write_file(&self, address: u64, len: u64, file: BorrowedFd<'_>, position: u64) -> io::Result<()> {
        let (offset, bytes) = self.file_range(address, len)?;
        self.0.mapping.write_file(offset, bytes, file, position)
    }

    fn file_range(&self, address: u64, len: u64) -> io::Result<(usize, usize)> {
        let error = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = self.offset(address, len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok((offset, usize::try_from(len).map_err(error)?))
    }

    /// Host address range of a whole range of RAM, for engines that map it elsewhere.
    /// With `write` the pages are noted as modified; call [`Self::written`] once the bytes are there.
    pub fn host_range(&self, address: u64, len: u64, write: bool) -> Result<*mut u8, AccessError> {
        let offset = self.offset(address, len)?;
        if write {
            self.note_write(address, offset, len);
        }
        Ok(self.0.mapping.as_ptr().wrapping_add(offset))
    }

    /// Notes that a range was written behind the gate (by the kernel, through [`Self::host_range`]).
    pub fn written(&self, address: u64, len: u64) {
        if let Ok(offset) = self.offset(address, len) {
            self.note_write(address, offset, len);
        }
    }

    fn note_write(&self, address: u64, offset: usize, len: u64) {
        let mut done = 0u64;
        while done < len {
            let at = (offset as u64).wrapping_add(done);
            let room = PAGE_SIZE.wrapping_sub(at & PAGE_SIZE.wrapping_sub(1));
            let part = room.min(len.wrapping_sub(done));
            let before = self.0.pages.set((at >> PAGE_SHIFT) as usize, PageFlags::MODIFIED);
            if before.contains(PageFlags::CODE)
                && let Some(watch) = self.0.watch.get()
            {
                watch.written(address.wrapping_add(done), part);
            }
            done = done.wrapping_add(part);
        }
    }

    /// Names the one listener for writes to code pages; the first call wins.
    pub fn set_code_watch(&self, watch: Arc<dyn CodeWatch>) {
        let _ = self.0.watch.set(watch);
    }

    /// Flags the page that holds `address` as the source of translated code; answers whether it was already.
    pub fn mark_code(&self, address: u64) -> bool {
        match self.offset(address, 1) {
            Ok(offset) => self.0.pages.set(offset >> PAGE_SHIFT, PageFlags::CODE).contains(PageFlags::CODE),
            Err(_) => false,
        }
    }

    /// Takes the code flag from the page that holds `address`: nothing translated from it is left.
    pub fn unmark_code(&self, address: u64) {
        if let Ok(offset) = self.offset(address, 1) {
            self.0.pages.clear(offset >> PAGE_SHIFT, PageFlags::CODE);
        }
    }

    /// Clears the modified bit of the page that holds `address` and answers what it was.
    pub fn take_modified(&self, address: u64) -> bool {
        self.offset(address, 1).is_ok_and(|offset| {
            self.0.pages.clear(offset >> PAGE_SHIFT, PageFlags::MODIFIED).contains(PageFlags::MODIFIED)
        })
    }

    /// Asks the host to hold a range in large pages now, which takes it about a tenth of a millisecond each. Answers whether it does:
    /// hosts before Linux 6.1 cannot be asked.
    pub fn enlarge(&self, address: u64, len: u64) -> bool {
        let Ok(offset) = self.offset(address, len) else { return false };
        let bytes = usize::try_from(len).ok();
        bytes.and_then(|bytes| self.0.mapping.enlarge(offset, bytes)).is_some_and(|done| done.is_ok())
    }

    /// Gives a range of whole pages back to the host; the guest then reads zeroes there.
    pub fn discard(&self, address: u64, len: u64) -> Result<(), AccessError> {
        let error = AccessError { address, len };
        if !address.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(error);
        }
        let offset = self.offset(address, len)?;
        let bytes = usize::try_from(len).map_err(|_| error)?;
        self.note_write(address, offset, len);
        match self.0.mapping.discard(offset, bytes) {
            Some(Ok(())) => Ok(()),
            _ => Err(error),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::Mutex;

    fn ram() -> GuestMemory {
        GuestMemory::new(&[(0, 0x10000), (0x1_0000_0000, 0x4000)], Backing::Private).unwrap()
    }

    #[test]
    fn a_hole_is_not_ram() {
        let ram = ram();
        assert!(ram.write(0xfffe, &[1, 2]).is_ok());
        assert_eq!(ram.write(0xffff, &[1, 2]), Err(AccessError { address: 0xffff, len: 2 }));
        assert!(ram.read(0x1_0000_3fff, &mut [0]).is_ok());
        assert!(ram.read(0x1_0000_4000, &mut [0]).is_err());
        assert!(ram.read(u64::MAX, &mut [0, 0]).is_err());
    }

    #[test]
    fn layouts_that_overlap_are_refused() {
        assert!(GuestMemory::new(&[(0, 0x2000), (0x1000, 0x1000)], Backing::Private).is_err());
        assert!(GuestMemory::new(&[(0, 0x1001)], Backing::Private).is_err());
        assert!(GuestMemory::new(&[(!0xfff, 0x2000)], Backing::Shared).is_err());
    }

    #[test]
    fn both_backings_hold_what_is_written() {
        for backing in [Backing::Private, Backing::Shared] {
            let ram = GuestMemory::new(&[(0x1000, 0x3000)], backing).unwrap();
            ram.write(0x1ffc, b"one gate").unwrap();
            assert_eq!(&ram.read_array::<8>(0x1ffc).unwrap(), b"one gate");
        }
    }

    #[test]
    fn a_write_to_a_code_page_is_heard_page_by_page() {
        struct Heard(Mutex<Vec<(u64, u64)>>);
        impl CodeWatch for Heard {
            fn written(&self, address: u64, len: u64) {
                self.0.lock().unwrap().push((address, len));
            }
        }
        let ram = ram();
        let heard = Arc::new(Heard(Mutex::new(Vec::new())));
        ram.set_code_watch(heard.clone());
        assert!(!ram.mark_code(0x2345));
        assert!(ram.mark_code(0x2345));
        ram.write(0x1ff0, &[0; 0x20]).unwrap();
        ram.unmark_code(0x2000);
        ram.write(0x2000, &[0; 0x20]).unwrap();
        assert_eq!(*heard.0.lock().unwrap(), [(0x2000, 0x10)]);
        assert!(ram.take_modified(0x2000));
        assert!(!ram.take_modified(0x2000));
    }

    #[test]
    fn files_are_read_and_written_without_a_copy() {
        use std::os::fd::AsFd;
        let ram = ram();
        let path = std::env::temp_dir().join(format!("yado-memory-test-{}", std::process::id()));
        let file =
            std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        ram.write(0x2ffe, b"guest").unwrap();
        ram.write_file(0x2ffe, 5, file.as_fd(), 3).unwrap();
        ram.fill(0x5000, 0x100, 0xff).unwrap();
        ram.read_file(0x5000, 12, file.as_fd(), 0).unwrap();
        assert_eq!(&ram.read_array::<13>(0x5000).unwrap(), b"\0\0\0guest\0\0\0\0\xff");
        assert!(ram.read_file(0xffff, 2, file.as_fd(), 0).is_err());
    }

    #[test]
    fn discarded_pages_read_zero() {
        let ram = ram();
        ram.write(0x3000, &[7; 16]).unwrap();
        ram.discard(0x3000, 0x1000).unwrap();
        assert_eq!(ram.read_array::<16>(0x3000).unwrap(), [0; 16]);
        assert!(ram.discard(0x3001, 0x1000).is_err());
    }
}
