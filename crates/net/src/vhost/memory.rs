//! Memory of another process, which may do anything with it at any time: change it while it is read, or take it away.
//!
//! Unsafe code is here because the memory is a mapping of a file that the other process has too. No Rust reference to it is ever
//! made: all access is by copies through raw pointers, and by atomics, so that a race shows what it would show a bus master.
//! All accesses are checked against the mapping's length.
//!
//! A process that cuts the file short would kill whoever touches what is gone (SIGBUS). So the first such touch lays fresh memory over
//! the whole mapping and marks it [lost](Mapping::lost): its owner is cut off, and nobody else notices.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU16, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Once};

pub use super::quota::Quota;
use super::quota::Taken;

/// The most mappings of a process at a time: those that everybody may have, and as many in common.
const GUARDED_MAX: usize = 8192;

/// From linux/magic.h.
const TMPFS: libc::__fsword_t = 0x0102_1994;
const HUGETLBFS: libc::__fsword_t = 0x9584_58f6;

/// A mapping that the signal handler knows.
struct Guard {
    /// 0: free.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

static GUARDS: [Guard; GUARDED_MAX] =
    [const { Guard { start: AtomicUsize::new(0), len: AtomicUsize::new(0), lost: AtomicBool::new(false) } };
        GUARDED_MAX];

/// What happens at SIGBUS. Only atomics and system calls: it may come at any instruction.
extern "C" fn on_bus_error(signal: i32, about: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a `siginfo_t` of this signal, which has an address.
    let address = unsafe { (*about).si_addr() } as usize;
    for guard in &GUARDS {
        let (start, len) = (guard.start.load(Ordering::Acquire), guard.len.load(Ordering::Acquire));
        if start == 0 || address < start || address.wrapping_sub(start) >= len {
            continue;
        }
        if lay_zeroes(start, len) || lay_spare(start, len) {
            guard.lost.store(true, Ordering::Release);
            return;
        }
    }
    // Not ours: what would have happened without us happens when the instruction is tried again.
    // SAFETY: sets a disposition; no memory is involved.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Lays fresh memory over a mapping; answers whether the host had some.
fn lay_zeroes(start: usize, len: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: replaces exactly one of our own mappings, of which there are no references.
    let fresh = unsafe { libc::mmap(start as *mut libc::c_void, len, protection, flags, -1, 0) };
    fresh != libc::MAP_FAILED
}

/// An endless file without blocks, for hosts that count private memory before it is used (vm.overcommit_memory=2): shared memory
/// is counted page by page, as it is used.
static SPARE: AtomicI32 = AtomicI32::new(-1);
/// Its length: all addresses that there are.
const SPARE_LEN: u64 = 1 << 47;

/// The same out of [`SPARE`], at the offset that the mapping has as its address: no two have the same part of the file.
fn lay_spare(start: usize, len: usize) -> bool {
    let file = SPARE.load(Ordering::Acquire);
    let (Ok(offset), Ok(bytes)) = (libc::off_t::try_from(start), libc::off_t::try_from(len)) else {
        return false;
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: system calls on a file of ours, which first forgets what was at this address before; as above.
    unsafe {
        libc::fallocate(file, punch, offset, bytes);
        libc::mmap(start as *mut libc::c_void, len, protection, flags, file, offset) != libc::MAP_FAILED
    }
}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        use std::os::fd::IntoRawFd;
        // For as long as the process lives. Without it, such hosts do what they did before.
        if let Ok(file) = memfd_create("yado-spare", MemfdFlags::CLOEXEC)
            && ftruncate(&file, SPARE_LEN).is_ok()
        {
            SPARE.store(file.into_raw_fd(), Ordering::Release);
        }
        // SAFETY: all zeroes are a valid `sigaction`; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_bus_error as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        }
    });
}

/// A file mapped from its first byte on, readable and writable.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    /// Bytes that may be used.
    len: usize,
    /// Bytes of address space.
    mapped: usize,
    guard: usize,
    /// Its part of what its owner may have.
    _taken: Taken,
}

// SAFETY: plain memory, owned until drop; all access is by copies and atomics that tolerate races.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a file, which must have them, for somebody who may have so much.
    pub fn new(file: impl AsFd, len: u64, quota: &Arc<Quota>) -> io::Result<Self> {
        install_handler();
        let about = rustix::fs::fstat(&file)?;
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let has = u64::try_from(about.st_size).map_err(|_| invalid())?;
        // Files of other file systems (FUSE, say) could make whoever touches them wait for ever.
        let kind = rustix::fs::fstatfs(&file)?.f_type;
        if len == 0 || len > has || !matches!(kind, TMPFS | HUGETLBFS) {
            return Err(invalid());
        }
        // Files of huge pages are mapped and unmapped in whole pages.
        let page = u64::try_from(about.st_blksize).unwrap_or(4096).clamp(4096, 1 << 30).next_power_of_two();
        let mapped = len.checked_next_multiple_of(page).and_then(|len| usize::try_from(len).ok());
        let mapped = mapped.ok_or_else(invalid)?;
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let taken = Quota::take(quota, mapped).ok_or(io::ErrorKind::OutOfMemory)?;
        let free = GUARDS.iter().position(|guard| {
            // The length is 0 until there is an address, so that no signal finds half of it.
            guard.start.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        let Some(number) = free else { return Err(io::ErrorKind::OutOfMemory.into()) };
        let guard = guard(number);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: a new mapping where the kernel finds room; the result is checked.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), mapped, protection, flags, fd, 0) };
        let error = io::Error::last_os_error();
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => {
                guard.lost.store(false, Ordering::Release);
                guard.start.store(start.as_ptr() as usize, Ordering::Release);
                guard.len.store(mapped, Ordering::Release);
                Ok(Self { start, len, mapped, guard: number, _taken: taken })
            }
            _ => {
                guard.start.store(0, Ordering::Release);
                Err(error)
            }
        }
    }

    /// Whether the other process has taken memory away that was in use here.
    pub fn lost(&self) -> bool {
        guard(self.guard).lost.load(Ordering::Acquire)
    }

    fn at(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: offset <= end <= len, so the pointer stays inside the mapping.
        (end <= self.len).then(|| unsafe { self.start.as_ptr().add(offset) })
    }
}

fn guard(number: usize) -> &'static Guard {
    // Masked so that there is no way to fail: `number` is always below the power of two.
    GUARDS.get(number % GUARDED_MAX).unwrap_or(&GUARDS[0])
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let guard = guard(self.guard);
        guard.len.store(0, Ordering::Release);
        // SAFETY: ours, and no pointer into it outlives its owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.mapped) };
        guard.start.store(0, Ordering::Release);
    }
}

/// An anonymous file of `len` bytes of zeroes, for memory that is to be given away.
pub fn memory_file(len: u64) -> io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let file = memfd_create("yado-rings", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, len)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Part of a mapping that is used for long: a ring's.
#[derive(Debug, Clone)]
pub struct Area {
    at: NonNull<u8>,
    len: usize,
    keep: Arc<Mapping>,
}

// SAFETY: as for `Mapping`, which it keeps alive.
unsafe impl Send for Area {}

impl Area {
    /// `len` bytes from byte `offset` of a mapping on; `None` if they are not all inside.
    pub fn new(mapping: &Arc<Mapping>, offset: usize, len: usize) -> Option<Self> {
        let at = NonNull::new(mapping.at(offset, len)?)?;
        Some(Self { at, len, keep: mapping.clone() })
    }

    /// Whether byte 0 is at a multiple of `alignment`.
    pub fn aligned(&self, alignment: usize) -> bool {
        (self.at.as_ptr() as usize).is_multiple_of(alignment)
    }

    /// Whether the memory is gone.
    pub fn lost(&self) -> bool {
        self.keep.lost()
    }

    #[inline]
    fn part(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: inside the area, which is inside a mapping that lives as long.
        (end <= self.len).then(|| unsafe { self.at.as_ptr().add(offset) })
    }

    /// The little-endian `u16` at an even offset as an atomic.
    #[inline]
    fn atomic(&self, offset: usize) -> Option<&AtomicU16> {
        let at = self.part(offset, 2)?.cast::<u16>();
        // SAFETY: in range, aligned, and every other access here tolerates atomics.
        at.is_aligned().then(|| unsafe { AtomicU16::from_ptr(at) })
    }

    /// Loads a `u16` before everything that is loaded later.
    #[inline]
    pub fn load(&self, offset: usize) -> u16 {
        self.atomic(offset).map_or(0, |cell| u16::from_le(cell.load(Ordering::Acquire)))
    }

    /// Stores a `u16` after everything that was stored before.
    #[inline]
    pub fn store(&self, offset: usize, value: u16) {
        if let Some(cell) = self.atomic(offset) {
            cell.store(value.to_le(), Ordering::Release);
        }
    }

    /// Two little-endian `u64`, each read once; zeroes beyond the end.
    #[inline]
    pub fn read_pair(&self, offset: usize) -> [u64; 2] {
        let Some(at) = self.part(offset, 16).map(<*mut u8>::cast::<u64>) else { return [0; 2] };
        if at.is_aligned() {
            // SAFETY: in range and aligned; volatile so that each half is read once whatever the other process does meanwhile.
            unsafe { [at.read_volatile(), at.add(1).read_volatile()].map(u64::from_le) }
        } else {
            [0; 2]
        }
    }

    /// Writes a little-endian `u64` at a multiple of 4.
    #[inline]
    pub fn write_u64(&self, offset: usize, value: u64) {
        if let Some(at) = self.part(offset, 8) {
            // SAFETY: in range; alignment is not asked for.
            unsafe { at.cast::<u64>().write_unaligned(value.to_le()) };
        }
    }

    /// Writes a little-endian `u128`.
    #[inline]
    pub fn write_u128(&self, offset: usize, value: u128) {
        if let Some(at) = self.part(offset, 16) {
            // SAFETY: as above.
            unsafe { at.cast::<u128>().write_unaligned(value.to_le()) };
        }
    }

    /// Reads a little-endian `u64` at a multiple of 4.
    #[inline]
    pub fn read_u64(&self, offset: usize) -> u64 {
        match self.part(offset, 8) {
            // SAFETY: as above.
            Some(at) => u64::from_le(unsafe { at.cast::<u64>().read_unaligned() }),
            None => 0,
        }
    }

    /// Asks for the cache line of a byte.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        if let Some(at) = self.part(offset, 1) {
            prefetch(at);
        }
    }
}

/// A full barrier: stores before it are seen by the other side before loads after it are made.
#[inline]
pub fn barrier() {
    fence(Ordering::SeqCst);
}

#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, harmless for any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Asks for a cache line that will be written: shared first and owned later would be two journeys.
#[inline]
fn prefetch_to_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, harmless for any address; processors that do not know it take it for a no-operation.
    unsafe {
        std::arch::asm!("prefetchw [{at}]", at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// One region of a guest's memory.
#[derive(Debug, Clone)]
struct Region {
    guest: u64,
    len: u64,
    /// Its first byte; `len` bytes from there on are in the mapping.
    at: NonNull<u8>,
    user: u64,
    /// Of its first byte in the mapping.
    offset: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: as for `Mapping`, which it keeps alive.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// A region as the front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionAbout {
    /// Guest-physical address of its first byte.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// Address of its first byte in the front end's own address space.
    pub user: u64,
    /// Of its first byte in the file.
    pub offset: u64,
}

/// The memory of a guest, as far as its front end has given it.
#[derive(Debug, Default)]
pub struct Memory {
    regions: Vec<Region>,
    quota: Arc<Quota>,
}

/// A range of a guest's memory, known to be inside.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    at: *mut u8,
    len: usize,
    memory: PhantomData<&'a Memory>,
}

impl Memory {
    /// Adds a region.
    pub fn add(&mut self, about: RegionAbout, file: impl AsFd) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = about.offset.checked_add(about.len).ok_or_else(invalid)?;
        about.guest.checked_add(about.len).ok_or_else(invalid)?;
        about.user.checked_add(about.len).ok_or_else(invalid)?;
        if about.len == 0 {
            return Err(invalid());
        }
        let mapping = Arc::new(Mapping::new(file, end, &self.quota)?);
        let offset = usize::try_from(about.offset).map_err(|_| invalid())?;
        let len = usize::try_from(about.len).map_err(|_| invalid())?;
        let at = mapping.at(offset, len).and_then(NonNull::new).ok_or_else(invalid)?;
        self.regions.push(Region {
            guest: about.guest,
            len: about.len,
            at,
            user: about.user,
            offset,
            mapping,
        });
        Ok(())
    }

    /// Removes the region that is at these places; answers whether there was one.
    pub fn remove(&mut self, guest: u64, user: u64, len: u64) -> bool {
        let before = self.regions.len();
        self.regions.retain(|region| (region.guest, region.user, region.len) != (guest, user, len));
        self.regions.len() < before
    }

    /// The same regions again, for a change: others may still use the old list.
    pub fn copy(&self) -> Self {
        Self { regions: self.regions.clone(), quota: self.quota.clone() }
    }

    /// No regions, of the same owner.
    pub fn emptied(&self) -> Self {
        Self { regions: Vec::new(), quota: self.quota.clone() }
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether some of it is gone.
    pub fn lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.lost())
    }

    /// A range by guest-physical address; `None` if it is not all in one region.
    #[inline]
    pub fn span(&self, guest: u64, len: u32) -> Option<Span<'_>> {
        for region in &self.regions {
            let into = guest.wrapping_sub(region.guest);
            if into < region.len && region.len.wrapping_sub(into) >= u64::from(len) {
                // SAFETY: `into` and `len` bytes behind it are inside the region, all of which is mapped.
                let at = unsafe { region.at.as_ptr().add(into as usize) };
                return Some(Span { at, len: len as usize, memory: PhantomData });
            }
        }
        None
    }

    /// A range by the front end's own address.
    pub fn area(&self, user: u64, len: usize) -> Option<Area> {
        for region in &self.regions {
            let into = user.wrapping_sub(region.user);
            if into < region.len && region.len.wrapping_sub(into) >= len as u64 {
                let offset = region.offset.checked_add(usize::try_from(into).ok()?)?;
                return Area::new(&region.mapping, offset, len);
            }
        }
        None
    }
}

impl<'a> Span<'a> {
    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Without its first bytes.
    #[inline]
    pub fn skip(self, bytes: usize) -> Self {
        let bytes = bytes.min(self.len);
        // SAFETY: at most at the end of the range.
        Self { at: unsafe { self.at.add(bytes) }, len: self.len.wrapping_sub(bytes), ..self }
    }

    /// Only its first bytes.
    #[inline]
    pub fn first(self, bytes: usize) -> Self {
        Self { len: self.len.min(bytes), ..self }
    }

    /// Copies the first bytes out; answers how many there were.
    #[inline]
    pub fn read(&self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.len);
        // SAFETY: the range is inside a mapping that lives as long; a Rust buffer cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(self.at, into.as_mut_ptr(), len) };
        len
    }

    /// Copies into the first bytes; answers how many had room.
    #[inline]
    pub fn write(&self, from: &[u8]) -> usize {
        let len = from.len().min(self.len);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at, len) };
        len
    }

    /// Copies from another guest's memory, or another place of the same one's; answers how many bytes both have.
    #[inline]
    pub fn copy_from(&self, from: &Span<'_>) -> usize {
        let len = from.len.min(self.len);
        // SAFETY: both ranges are inside mappings that live as long; `copy` allows that they overlap.
        unsafe { std::ptr::copy(from.at, self.at, len) };
        len
    }

    /// Asks for the first two cache lines, which a frame's header and its first bytes are in, to be read.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(self.at);
        prefetch(self.at.wrapping_add(64));
    }

    /// The same to be written: nobody else keeps a copy of them.
    #[inline]
    pub fn prefetch_to_write(&self) {
        prefetch_to_write(self.at);
        prefetch_to_write(self.at.wrapping_add(64));
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn memory(len: u64) -> (Memory, OwnedFd) {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        let mut memory = Memory::default();
        let about = RegionAbout { guest: 0x10000, len: len - 4096, user: 0x7000_0000, offset: 4096 };
        memory.add(about, &file).unwrap();
        (memory, file)
    }

    #[test]
    fn ranges_are_inside_or_refused() {
        let (memory, _file) = memory(8192);
        assert!(memory.span(0x10000, 4096).is_some());
        assert!(memory.span(0x10001, 4096).is_none());
        assert!(memory.span(0xffff, 1).is_none());
        assert!(memory.span(u64::MAX, 2).is_none());
        assert!(memory.area(0x7000_0ff0, 16).is_some());
        assert!(memory.area(0x7000_0ff1, 16).is_none());
        let span = memory.span(0x10ffe, 2).unwrap();
        assert_eq!(span.write(b"abc"), 2);
        let mut read = [0; 4];
        assert_eq!(memory.span(0x10ffc, 4).unwrap().read(&mut read), 4);
        assert_eq!(&read, b"\0\0ab");
        assert_eq!(span.skip(5).len(), 0);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        assert!(Mapping::new(&file, 4097, &Arc::default()).is_err());
        assert!(Mapping::new(&file, 0, &Arc::default()).is_err());
        let mut memory = Memory::default();
        let about = RegionAbout { guest: 0, len: 4096, user: 0, offset: u64::MAX };
        assert!(memory.add(about, &file).is_err());
    }

    #[test]
    fn nobody_takes_all_addresses() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 1 << 50).unwrap();
        let hostile = Arc::default();
        let list: Vec<Mapping> = (0..40).map_while(|_| Mapping::new(&file, 1 << 40, &hostile).ok()).collect();
        assert!((4..=8).contains(&list.len()), "{}", list.len());
        let other = Arc::default();
        assert!(Mapping::new(&file, 1 << 40, &other).is_ok(), "others have theirs");
        drop(list);
        assert!(Mapping::new(&file, 4 << 40, &hostile).is_ok(), "they come back");
    }

    #[test]
    fn where_private_memory_is_counted_the_spare_file_takes_its_place() {
        let (memory, _file) = memory(16384);
        let bytes = |text: &mut [u8; 4]| memory.span(0x10000, 4).unwrap().read(text);
        let mut read = [1; 4];
        for _ in 0..2 {
            memory.span(0x10000, 4).unwrap().write(b"last");
            let mapping = &memory.regions[0].mapping;
            assert!(lay_spare(mapping.start.as_ptr() as usize, mapping.mapped));
            bytes(&mut read);
            assert_eq!(read, [0; 4], "also the second time at the same address");
        }
    }

    #[test]
    fn memory_that_is_taken_away_hurts_only_its_owner() {
        let (memory, file) = memory(16384);
        let (other, _other_file) = self::memory(16384);
        other.span(0x10000, 4).unwrap().write(b"kept");
        assert!(!memory.lost());
        rustix::fs::ftruncate(&file, 0).unwrap();
        let mut read = [1; 8];
        memory.span(0x10000, 8).unwrap().read(&mut read);
        assert_eq!(read, [0; 8]);
        assert!(memory.lost() && !other.lost());
        other.span(0x10000, 4).unwrap().read(&mut read[..4]);
        assert_eq!(&read[..4], b"kept");
    }
}
