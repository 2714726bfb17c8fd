//! The one place that talks to the kernel: `/dev/kvm`, its descriptors, and their mappings, behind the trait [`Host`] so
//! that a double can answer in its stead.
//!
//! Unsafe, because ioctls take addresses and `kvm_run` is a page that the kernel writes. What keeps it sound: safe
//! callers reach only requests whose structure has no addresses in it, with a buffer of at least the size that the
//! request's number names; the few with addresses are unsafe to call and say who keeps what they point at.
#![allow(unsafe_code)]

use crate::ioctl::{self, Request};
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// What a kernel answers. All methods are called with descriptors that this host gave out and that are still open.
pub(crate) trait Host: Send + Sync {
    /// Opens the device.
    fn open(&self) -> io::Result<RawFd>;
    /// An ioctl whose argument is a number.
    fn number(&self, fd: RawFd, request: Request, value: u64) -> io::Result<u32>;
    /// An ioctl whose argument is a structure.
    ///
    /// # Safety
    /// `buffer` has as many bytes as the kernel reads or writes, and what addresses in it point at fits the request.
    unsafe fn structure(&self, fd: RawFd, request: Request, buffer: &mut [u8]) -> io::Result<u32>;
    /// Maps the first `len` bytes of a descriptor at `offset`, shared, for reading and writing.
    fn map(&self, fd: RawFd, offset: u64, len: usize) -> io::Result<NonNull<u8>>;
    /// Reads from a descriptor at an offset.
    fn read_at(&self, fd: RawFd, offset: u64, into: &mut [u8]) -> io::Result<usize>;
    /// # Safety
    /// The range came from [`Self::map`] and nobody uses it any more.
    unsafe fn unmap(&self, at: NonNull<u8>, len: usize);
    /// The descriptor is not used any more.
    fn close(&self, fd: RawFd);
}

/// The kernel we run on.
pub(crate) struct Linux;

fn result(code: libc::c_int) -> io::Result<u32> {
    u32::try_from(code).map_err(|_| io::Error::last_os_error())
}

impl Host for Linux {
    fn open(&self) -> io::Result<RawFd> {
        // SAFETY: the path is a NUL-terminated literal.
        let fd = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        result(fd).map(|_| fd)
    }

    fn number(&self, fd: RawFd, request: Request, value: u64) -> io::Result<u32> {
        if request.size() != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: this request takes a number, not an address.
        result(unsafe { libc::ioctl(fd, request.number.into(), value) })
    }

    unsafe fn structure(&self, fd: RawFd, request: Request, buffer: &mut [u8]) -> io::Result<u32> {
        // SAFETY: the caller answers for the buffer's size and content.
        result(unsafe { libc::ioctl(fd, request.number.into(), buffer.as_mut_ptr()) })
    }

    fn map(&self, fd: RawFd, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping; no memory of ours is touched.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn read_at(&self, fd: RawFd, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the kernel writes no more than the buffer's length.
        let count = unsafe { libc::pread(fd, into.as_mut_ptr().cast(), into.len(), offset) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    unsafe fn unmap(&self, at: NonNull<u8>, len: usize) {
        // SAFETY: the caller owns the range.
        unsafe { libc::munmap(at.as_ptr().cast(), len) };
    }

    fn close(&self, fd: RawFd) {
        // SAFETY: the descriptor is ours and not used any more.
        unsafe { libc::close(fd) };
    }
}

/// Structures of the kernel's: any bytes are a value of them.
///
/// # Safety
/// `#[repr(C)]`, integers only, and no padding between or after them where the structure is given to the kernel.
pub(crate) unsafe trait Plain: Copy {
    /// All zero.
    fn zeroed() -> Self {
        // SAFETY: zeroes are a value of any such structure.
        unsafe { std::mem::zeroed() }
    }
}

macro_rules! plain {
    ($($structure:ident),* $(,)?) => {
        // SAFETY: structures of integers, generated from the kernel's header.
        $(unsafe impl Plain for kvm_bindings::$structure {})*
    };
}

plain!(
    kvm_clear_dirty_log,
    kvm_clock_data,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_device_attr,
    kvm_dirty_gfn,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_guest_debug,
    kvm_ioeventfd,
    kvm_irq_routing_entry,
    kvm_irqfd,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_msi,
    kvm_msr_entry,
    kvm_regs,
    kvm_run__bindgen_ty_1__bindgen_ty_1,
    kvm_run__bindgen_ty_1__bindgen_ty_13,
    kvm_run__bindgen_ty_1__bindgen_ty_14,
    kvm_run__bindgen_ty_1__bindgen_ty_19,
    kvm_run__bindgen_ty_1__bindgen_ty_2,
    kvm_run__bindgen_ty_1__bindgen_ty_21,
    kvm_run__bindgen_ty_1__bindgen_ty_23,
    kvm_run__bindgen_ty_1__bindgen_ty_27,
    kvm_run__bindgen_ty_1__bindgen_ty_4,
    kvm_run__bindgen_ty_1__bindgen_ty_6,
    kvm_run__bindgen_ty_1__bindgen_ty_8,
    kvm_sregs,
    kvm_stats_header,
    kvm_translation,
    kvm_userspace_memory_region,
    kvm_vcpu_events,
    kvm_xcrs,
);
/// `struct kvm_msr_filter`, whose padding has a name here so that all of its bytes are set.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MsrFilter {
    pub(crate) flags: u32,
    pub(crate) padding: u32,
    pub(crate) ranges: [MsrFilterRange; kvm_bindings::KVM_MSR_FILTER_MAX_RANGES as usize],
}

/// `struct kvm_msr_filter_range`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct MsrFilterRange {
    pub(crate) flags: u32,
    pub(crate) nmsrs: u32,
    pub(crate) base: u32,
    pub(crate) padding: u32,
    /// An address.
    pub(crate) bitmap: u64,
}

// SAFETY: integers, without padding.
unsafe impl Plain for MsrFilter {}
// SAFETY: integers.
unsafe impl Plain for u8 {}
// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}

/// The bytes of a structure.
pub(crate) fn bytes_of<T: Plain>(value: &mut T) -> &mut [u8] {
    // SAFETY: any bytes are a value of it, and it is borrowed mutably for as long as its bytes are.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(value).cast(), size_of::<T>()) }
}

/// A descriptor of KVM's: the device, a VM, a vCPU, or statistics. Closed when dropped.
pub(crate) struct Handle {
    host: Arc<dyn Host>,
    fd: RawFd,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.host.close(self.fd);
    }
}

impl Handle {
    /// The device itself.
    pub(crate) fn open(host: Arc<dyn Host>) -> io::Result<Self> {
        let fd = host.open()?;
        Ok(Self { host, fd })
    }

    /// A request that takes a number.
    pub(crate) fn number(&self, request: Request, value: u64) -> io::Result<u32> {
        self.host.number(self.fd, request, value)
    }

    /// A request that makes a descriptor.
    pub(crate) fn make(&self, request: Request, value: u64) -> io::Result<Self> {
        let fd = self.number(request, value)?;
        let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok(Self { host: self.host.clone(), fd })
    }

    fn fits<T: Plain>(request: Request) -> io::Result<()> {
        match request.size() == size_of::<T>() {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// A request with a structure that has no addresses in it.
    pub(crate) fn set<T: Plain>(&self, request: Request, mut value: T) -> io::Result<u32> {
        Self::fits::<T>(request)?;
        if request.pointers {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the structure is of the size that the number names, and has no addresses.
        unsafe { self.host.structure(self.fd, request, bytes_of(&mut value)) }
    }

    /// A request that answers with a structure.
    pub(crate) fn get<T: Plain>(&self, request: Request) -> io::Result<T> {
        self.exchange(request, T::zeroed())
    }

    /// A request with a structure that the kernel completes.
    pub(crate) fn exchange<T: Plain>(&self, request: Request, mut value: T) -> io::Result<T> {
        Self::fits::<T>(request)?;
        if request.pointers {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: as in `set`.
        unsafe { self.host.structure(self.fd, request, bytes_of(&mut value))? };
        Ok(value)
    }

    /// A request whose structure has addresses in it.
    ///
    /// # Safety
    /// What the addresses point at is as large as the request says, and lives as long as the kernel uses it.
    pub(crate) unsafe fn follow<T: Plain>(&self, request: Request, mut value: T) -> io::Result<u32> {
        Self::fits::<T>(request)?;
        // SAFETY: the size is right, and the caller answers for the addresses.
        unsafe { self.host.structure(self.fd, request, bytes_of(&mut value)) }
    }

    /// A request with a header of a count and another word, and that many entries. The kernel may answer fewer entries,
    /// and another result; answers both.
    pub(crate) fn list<T: Plain>(&self, request: Request, entries: &[T]) -> io::Result<(Vec<T>, u32)> {
        const HEADER: usize = 8;
        if request.size() != HEADER || request.pointers {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let count = u32::try_from(entries.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = Vec::with_capacity(HEADER.saturating_add(size_of_val(entries)));
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for mut entry in entries.iter().copied() {
            bytes.extend_from_slice(bytes_of(&mut entry));
        }
        // SAFETY: the buffer has as many entries as its header says, and the kernel writes no more.
        let result = unsafe { self.host.structure(self.fd, request, &mut bytes)? };
        let count = bytes.first_chunk().map_or(0, |count| u32::from_le_bytes(*count)) as usize;
        let told = bytes.get(HEADER..).unwrap_or_default().chunks_exact(size_of::<T>()).take(count);
        let entries = told.map(|bytes| {
            let mut entry = T::zeroed();
            bytes_of(&mut entry).copy_from_slice(bytes);
            entry
        });
        Ok((entries.collect(), result))
    }

    /// KVM_GET_MSR_INDEX_LIST: a count and that many numbers.
    pub(crate) fn msr_indices(&self) -> io::Result<Vec<u32>> {
        let mut room = 512usize;
        loop {
            let mut bytes = vec![0; room.saturating_add(1).saturating_mul(4)];
            let count = u32::try_from(room).map_err(|_| io::ErrorKind::InvalidInput)?;
            bytes.get_mut(..4).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(&count.to_le_bytes());
            // SAFETY: there is room for as many numbers as the header says.
            let done = unsafe { self.host.structure(self.fd, ioctl::GET_MSR_INDEX_LIST, &mut bytes) };
            let told = bytes.first_chunk().map_or(0, |count| u32::from_le_bytes(*count)) as usize;
            match done {
                Err(error) if error.raw_os_error() == Some(libc::E2BIG) && told > room && told < 1 << 16 => {
                    room = told;
                }
                Err(error) => return Err(error),
                Ok(_) => {
                    let words = bytes.chunks_exact(4).skip(1).take(told);
                    return Ok(words
                        .map(|word| word.first_chunk().map_or(0, |word| u32::from_le_bytes(*word)))
                        .collect());
                }
            }
        }
    }

    /// The XSAVE area, in `buffer`, which has `len` of KVM_CAP_XSAVE2 bytes or 4096.
    pub(crate) fn xsave(&self, request: Request, buffer: &mut [u8]) -> io::Result<u32> {
        if buffer.len() < request.size() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: of both requests the kernel touches no more than 4096 bytes unless the guest has components that must be
        // asked for (AMX), which yado never does.
        unsafe { self.host.structure(self.fd, request, buffer) }
    }

    /// Maps pages of the descriptor.
    pub(crate) fn map(&self, offset: u64, len: usize) -> io::Result<Mapping> {
        let at = self.host.map(self.fd, offset, len)?;
        Ok(Mapping { host: self.host.clone(), at, len })
    }

    /// Reads from the descriptor at an offset; answers how much.
    pub(crate) fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.host.read_at(self.fd, offset, into)
    }
}

/// Memory shared with the kernel. Nothing in it is ever borrowed: it changes under our feet.
pub(crate) struct Mapping {
    host: Arc<dyn Host>,
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory, owned until drop, used only through volatile and atomic accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and no borrow of it outlives this.
        unsafe { self.host.unmap(self.at, self.len) };
    }
}

impl Mapping {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn place<T: Plain>(&self, offset: usize) -> Option<*mut T> {
        let end = offset.checked_add(size_of::<T>())?;
        // SAFETY: offset < end <= len.
        let at = (end <= self.len).then(|| unsafe { self.at.as_ptr().add(offset) }.cast::<T>())?;
        Some(at)
    }

    /// A structure, or zeroes where the mapping ends.
    pub(crate) fn get<T: Plain>(&self, offset: usize) -> T {
        match self.place::<T>(offset) {
            // SAFETY: in range; any bytes are a value; the kernel writes here only while the vCPU is in KVM_RUN.
            Some(at) => unsafe { at.read_unaligned() },
            None => T::zeroed(),
        }
    }

    /// Stores a structure; nothing where the mapping ends.
    pub(crate) fn put<T: Plain>(&self, offset: usize, value: T) {
        if let Some(at) = self.place::<T>(offset) {
            // SAFETY: in range.
            unsafe { at.write_unaligned(value) };
        }
    }

    /// A byte that other threads write.
    pub(crate) fn atomic_u8(&self, offset: usize) -> Option<&std::sync::atomic::AtomicU8> {
        let at = self.place::<u8>(offset)?;
        // SAFETY: in range, and all of our accesses to such a byte are atomic.
        Some(unsafe { std::sync::atomic::AtomicU8::from_ptr(at) })
    }

    /// A word that the kernel writes while we run.
    pub(crate) fn atomic_u32(&self, offset: usize) -> Option<&std::sync::atomic::AtomicU32> {
        let at = self.place::<u32>(offset)?;
        // SAFETY: in range, aligned, and all of our accesses to such a word are atomic.
        at.is_aligned().then(|| unsafe { std::sync::atomic::AtomicU32::from_ptr(at) })
    }
}
