//! The place of this crate with `unsafe` for guest RAM: an anonymous mapping of the host, and raw copies in and out of it.
//!
//! Guest RAM is shared with running vCPUs, so no Rust reference to it is ever made: all access is by raw
//! pointers, through volatile or atomic operations or `memcpy`, and a racing guest sees the tearing that a
//! racing bus master would show it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// What kind of host memory holds guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// Private anonymous memory: transparent huge pages and the kernel's KSM work on it.
    #[default]
    Private,
    /// A memfd, mapped shared: other processes can be given it (vhost-user, virtio-fs DAX).
    Shared,
}

/// An owned mapping of `len` bytes, page aligned, readable and writable.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Of shared memory.
    file: Option<OwnedFd>,
}

// SAFETY: the mapping is plain memory, owned until drop; all access goes through raw pointers and tolerates races.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of zeroes. Nothing is resident until touched.
    pub(crate) fn new(len: usize, backing: Backing) -> io::Result<Self> {
        const HUGE: usize = 2 << 20;
        let (file, flags) = match backing {
            Backing::Private => (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            Backing::Shared => (Some(memory_file(len)?), libc::MAP_SHARED | libc::MAP_NORESERVE),
        };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // An address aligned to a huge page lets the host back guest RAM with huge pages from the first byte, so
        // reserve a little more, then map at the aligned place inside the reservation.
        let reserved = len.checked_add(HUGE).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous reservation, no memory of ours is touched.
        let area = unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, none, -1, 0) };
        if area == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let aligned = (area as usize).next_multiple_of(HUGE);
        // SAFETY: [aligned, aligned+len) lies inside the reservation made above, which nobody else uses.
        let start = unsafe {
            libc::mmap(
                aligned as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED,
                fd,
                0,
            )
        };
        let error = io::Error::last_os_error();
        let before = aligned.wrapping_sub(area as usize);
        let after = HUGE.wrapping_sub(before);
        // SAFETY: these are the unused head and tail of our own reservation.
        unsafe {
            if before > 0 {
                libc::munmap(area, before);
            }
            if after > 0 {
                libc::munmap(aligned.wrapping_add(len) as *mut libc::c_void, after);
            }
        }
        if start == libc::MAP_FAILED {
            return Err(error);
        }
        // SAFETY: our own mapping; both advices are hints.
        unsafe {
            libc::madvise(start, len, libc::MADV_HUGEPAGE);
            libc::madvise(start, len, libc::MADV_DONTDUMP);
        }
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, len, file }),
            None => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }

    /// The file that is mapped, from its first byte on, if the memory is shared.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    fn at(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: offset <= end <= len, so the pointer stays inside the mapping.
        (end <= self.len).then(|| unsafe { self.start.as_ptr().add(offset) })
    }

    /// Copies out; `None` when the range is not inside the mapping.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `at` checked the range; `into` is a Rust buffer and cannot overlap guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Some(())
    }

    /// Copies in; `None` when the range is not inside the mapping.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        let to = self.at(offset, from.len())?;
        // SAFETY: `at` checked the range; `from` is a Rust buffer and cannot overlap guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Some(())
    }

    /// Sets `len` bytes to `value`.
    pub(crate) fn fill(&self, offset: usize, len: usize, value: u8) -> Option<()> {
        let to = self.at(offset, len)?;
        // SAFETY: `at` checked the range.
        unsafe { std::ptr::write_bytes(to, value, len) };
        Some(())
    }

    /// Fills the range from `file` at `position`; what lies beyond the end of the file becomes zero.
    pub(crate) fn read_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        position: u64,
    ) -> io::Result<()> {
        let done = self.transfer(offset, len, position, |at, left, from| {
            // SAFETY: `transfer` checked that the range is inside the mapping; the kernel writes nothing else.
            unsafe { libc::pread(file.as_raw_fd(), at.cast(), left, from) }
        })?;
        self.fill(offset.wrapping_add(done), len.wrapping_sub(done), 0)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Writes the range to `file` at `position`.
    pub(crate) fn write_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        position: u64,
    ) -> io::Result<()> {
        let done = self.transfer(offset, len, position, |at, left, to| {
            // SAFETY: `transfer` checked that the range is inside the mapping; the kernel only reads it.
            unsafe { libc::pwrite(file.as_raw_fd(), at.cast(), left, to) }
        })?;
        if done == len { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Calls `step` with the address and length of what is left of a range that is inside the mapping, and its place in
    /// the file, until nothing is left or `step` moves no more bytes; answers how many it moved.
    fn transfer(
        &self,
        offset: usize,
        len: usize,
        position: u64,
        step: impl Fn(*mut u8, usize, libc::off_t) -> isize,
    ) -> io::Result<usize> {
        let mut done = 0usize;
        while done < len {
            let left = len.wrapping_sub(done);
            let at = self.at(offset.wrapping_add(done), left).ok_or(io::ErrorKind::InvalidInput)?;
            let place = libc::off_t::try_from(position.saturating_add(done as u64))
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            match step(at, left, place) {
                0 => break,
                count @ 1.. => done = done.wrapping_add(count.unsigned_abs()),
                _ => interrupted_only(io::Error::last_os_error())?,
            }
        }
        Ok(done)
    }

    pub(crate) fn atomic_u16(&self, offset: usize) -> Option<&AtomicU16> {
        let at = self.at(offset, 2)?.cast::<u16>();
        // SAFETY: in range, aligned, and all other access to guest RAM tolerates concurrent atomics.
        at.is_aligned().then(|| unsafe { AtomicU16::from_ptr(at) })
    }

    pub(crate) fn atomic_u32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.at(offset, 4)?.cast::<u32>();
        // SAFETY: as in `atomic_u16`.
        at.is_aligned().then(|| unsafe { AtomicU32::from_ptr(at) })
    }

    pub(crate) fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.at(offset, 8)?.cast::<u64>();
        // SAFETY: as in `atomic_u16`.
        at.is_aligned().then(|| unsafe { AtomicU64::from_ptr(at) })
    }

    /// Gives the pages back to the host; they read as zero afterwards.
    pub(crate) fn discard(&self, offset: usize, len: usize) -> Option<io::Result<()>> {
        let at = self.at(offset, len)?;
        let done = match &self.file {
            // SAFETY: the range is inside our mapping, and guest RAM may change under any reader at any time.
            None => unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) },
            Some(file) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (Ok(from), Ok(len)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len)) else {
                    return None;
                };
                // SAFETY: changes only our file; as above.
                unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) }
            }
        };
        Some(if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) })
    }

    /// Asks the host to hold a range in large pages now, at the cost of a copy.
    pub(crate) fn enlarge(&self, offset: usize, len: usize) -> Option<io::Result<()>> {
        let at = self.at(offset, len)?;
        // SAFETY: the range is inside our mapping; what it holds stays.
        let done = unsafe { libc::madvise(at.cast(), len, libc::MADV_COLLAPSE) };
        Some(if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) })
    }

    /// Keeps the compiler from moving later reads before this point, as a bus master's read barrier does.
    pub(crate) fn acquire() {
        std::sync::atomic::fence(Ordering::Acquire);
    }
}

/// A file in memory of `len` bytes of zeroes.
fn memory_file(len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a NUL-terminated literal; the result is checked.
    let fd = unsafe { libc::memfd_create(c"yado-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fresh and nobody else's.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: fd is open and ours; a length that does not fit is refused by the kernel.
    let sized = unsafe { libc::ftruncate(fd, libc::off_t::try_from(len).unwrap_or(-1)) };
    if sized == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

/// A system call that was interrupted is made again; any other failure stands.
fn interrupted_only(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no pointer to it outlives the `GuestMemory` that owns it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
