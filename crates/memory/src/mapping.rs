//! The place of this crate with `unsafe` for guest RAM: an anonymous mapping of the host, and raw copies in and out of it.
//!
//! Guest RAM is shared with running vCPUs, so no Rust reference to it is ever made: all access is by raw
//! pointers, through volatile or atomic operations or `memcpy`, and a racing guest sees the tearing that a
//! racing bus master would show it.
#![allow(unsafe_code)]

use crate::provision::{Lock, Pages, Placement, Provision};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

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
    pages: Pages,
}

// SAFETY: the mapping is plain memory, owned until drop; all access goes through raw pointers and tolerates races.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of zeroes. Nothing is resident until touched. Huge pages of the host's pool are shared memory, and
    /// are set aside for this mapping now, so that no touch of it fails for want of one.
    pub(crate) fn new(len: usize, provision: &Provision) -> io::Result<Self> {
        const LEAST_ALIGNMENT: usize = 2 << 20;
        let Provision { backing, pages, mergeable } = *provision;
        let (file, flags) = match (pages.of_pool(), backing) {
            (Some(size), _) => (Some(memory_file(len, Some(size))?), libc::MAP_SHARED),
            (None, Backing::Private) => (None, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            (None, Backing::Shared) => {
                (Some(memory_file(len, None)?), libc::MAP_SHARED | libc::MAP_NORESERVE)
            }
        };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // An address aligned to a huge page lets the host back guest RAM with huge pages from the first byte, so
        // reserve a little more, then map at the aligned place inside the reservation.
        let alignment = usize::try_from(pages.size()).unwrap_or(0).max(LEAST_ALIGNMENT);
        let reserved =
            len.checked_add(alignment).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous reservation, no memory of ours is touched.
        let area = unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, none, -1, 0) };
        if area == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let aligned = (area as usize).next_multiple_of(alignment);
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
        let after = alignment.wrapping_sub(before);
        // SAFETY: these are the unused head and tail of our own reservation.
        unsafe {
            if before > 0 {
                libc::munmap(area, before);
            }
            if after > 0 {
                libc::munmap(aligned.wrapping_add(len) as *mut libc::c_void, after);
            }
        }
        let mapped = if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) };
        let mapping = Self { start: mapped.ok_or(error)?, len, file, pages };
        match pages {
            Pages::Small => mapping.advise(libc::MADV_NOHUGEPAGE),
            Pages::Transparent => mapping.advise(libc::MADV_HUGEPAGE),
            Pages::Huge2M | Pages::Huge1G => Ok(()),
        }
        // A host without transparent huge pages does without.
        .or_else(|error| if error.kind() == io::ErrorKind::InvalidInput { Ok(()) } else { Err(error) })?;
        // What a core dump leaves out is of no consequence for the guest.
        let _ = mapping.advise(libc::MADV_DONTDUMP);
        if mergeable {
            mapping.advise(libc::MADV_MERGEABLE)?;
        }
        Ok(mapping)
    }

    /// Tells the kernel about all of the mapping; only advice that keeps its content.
    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: our own mapping, and nothing in it changes.
        done(unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) })
    }

    /// Has the host find memory for a range now, as if each page were written.
    pub(crate) fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        let at = self.at(offset, len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is inside our mapping; what it holds stays.
        let populated = done(unsafe { libc::madvise(at.cast(), len, libc::MADV_POPULATE_WRITE) });
        let old = matches!(&populated, Err(error) if error.raw_os_error() == Some(libc::EINVAL));
        // Before Linux 5.14: by touching. One that fails would end the process, so not of the pool.
        if old && self.pages.of_pool().is_none() { self.touch(offset, len) } else { populated }
    }

    /// Writes to each page what it holds.
    pub(crate) fn touch(&self, offset: usize, len: usize) -> io::Result<()> {
        for page in (0..len).step_by(crate::PAGE_SIZE as usize) {
            let at = self.at(offset.wrapping_add(page), 1).ok_or(io::ErrorKind::InvalidInput)?;
            // SAFETY: inside the mapping, and all other access to guest RAM tolerates concurrent atomics.
            let byte = unsafe { AtomicU8::from_ptr(at) };
            // Whether it succeeds or not, the processor writes. (The compiler makes a read of adding nothing.)
            let held = byte.load(Ordering::Relaxed);
            let _ = byte.compare_exchange(held, held, Ordering::Relaxed, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Keeps what is resident, and what will be, from being paged out.
    pub(crate) fn lock(&self, lock: Lock) -> io::Result<()> {
        let flags = match lock {
            Lock::Off => return Ok(()),
            Lock::OnFault => libc::MLOCK_ONFAULT,
            Lock::On => 0,
        };
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: two calls with a structure of ours. As much as the user may lock; a refusal shows in the next call.
        unsafe {
            if libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) == 0 {
                limit.rlim_cur = limit.rlim_max;
                libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit);
            }
        }
        // SAFETY: our own mapping; what it holds stays.
        done(unsafe { libc::mlock2(self.start.as_ptr().cast(), self.len, flags) })
    }

    /// Says from which of the host's nodes the pages of a range come that are not there yet (mbind(2)).
    pub(crate) fn place(&self, offset: usize, len: usize, placement: &Placement) -> io::Result<()> {
        let at = self.at(offset, len).ok_or(io::ErrorKind::InvalidInput)?;
        let mask = placement.mask();
        // The kernel looks at one bit less than it is told.
        let bits = (mask.len() as u64).wrapping_mul(64).wrapping_add(1);
        let mode = placement.mode();
        // SAFETY: the range is inside our mapping and the mask is as long as said; the call only reads it.
        done(unsafe { libc::syscall(libc::SYS_mbind, at, len, mode, mask.as_ptr(), bits, 0) as libc::c_int })
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
        if self.pages.of_pool().is_some() {
            // A page that went back to the pool could be somebody else's when the guest touches it again.
            return self.fill(offset, len, 0).map(Ok);
        }
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

/// A file in memory of `len` bytes of zeroes, in pages of the pool of that size if one is named.
fn memory_file(len: usize, pool: Option<u64>) -> io::Result<OwnedFd> {
    // memfd_create(2): the logarithm of the size of a huge page is in the flags.
    let huge = pool.map_or(0, |size| libc::MFD_HUGETLB | size.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    // SAFETY: the name is a NUL-terminated literal; the result is checked.
    let fd = unsafe { libc::memfd_create(c"yado-ram".as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fresh and nobody else's.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: fd is open and ours; a length that does not fit is refused by the kernel.
    let sized = unsafe { libc::ftruncate(fd, libc::off_t::try_from(len).unwrap_or(-1)) };
    if sized == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

/// The outcome of a system call that answers 0 or -1.
fn done(answer: libc::c_int) -> io::Result<()> {
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
