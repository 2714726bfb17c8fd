//! Two pages of guest RAM side by side, for a locked access that reaches from one into the other: only the host's CPU can make it
//! atomic, and only where both parts are one operand.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

const PAGE: usize = 4096;

/// A mapping of its own of two pages of a file.
pub(super) struct Window(*mut libc::c_void);

impl Window {
    /// The pages at these offsets. `None` if the host does not give the mapping.
    pub(super) fn new(file: BorrowedFd<'_>, offsets: [u64; 2]) -> Option<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: fresh address space of our own.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                2 * PAGE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return None;
        }
        let window = Self(at);
        for (number, offset) in offsets.into_iter().enumerate() {
            let offset = libc::off_t::try_from(offset).ok()?;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: over a page of that address space, which nobody else knows.
            let page = unsafe {
                libc::mmap(at.byte_add(number * PAGE), PAGE, rights, flags, file.as_raw_fd(), offset)
            };
            if page == libc::MAP_FAILED {
                return None;
            }
        }
        Some(window)
    }

    /// Host address of the byte at an offset of the first page.
    pub(super) fn at(&self, offset: usize) -> u64 {
        (self.0 as usize + offset) as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0, 2 * PAGE) };
    }
}
