//! The code cache: shared memory mapped twice, writable here and executable there, never both at one address. It has no
//! file, as those who look for code of a compiler (`perf`) expect.
//!
//! The only place that makes executable memory, and, with [`super::thunk`], the only `unsafe` of the translator.
//! Code is appended; nothing is freed until the whole cache is flushed. What is seldom run stands in a part of its own,
//! so that pages and cache lines of the other part are full of what is run.
#![allow(unsafe_code)]

use cpu::Error;
use std::ptr::NonNull;

/// Size of a chunk of code that is seldom run.
const COLD_CHUNK: usize = 512 << 10;

pub(super) struct CodeCache {
    write: NonNull<u8>,
    execute: NonNull<u8>,
    size: usize,
    /// Where the next code goes. It grows upwards from the start.
    used: usize,
    /// Code that is seldom run stands in chunks from the end downwards: where the lowest starts, where in it the next code
    /// goes, and where it ends.
    cold: usize,
    cold_used: usize,
    cold_end: usize,
    /// Bytes in all chunks.
    cold_bytes: usize,
    /// What stays over a flush: the thunks.
    kept: usize,
}

// SAFETY: both mappings are owned by this value and only reached through it.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// A cache of `size` bytes; memory is taken as it fills.
    pub(super) fn new(size: usize) -> Result<Self, Error> {
        let fail = |what| Error::Host { what, source: std::io::Error::last_os_error() };
        let size = size.next_multiple_of(4096);
        let given = |at: *mut libc::c_void| {
            if at == libc::MAP_FAILED { None } else { NonNull::new(at.cast::<u8>()) }
        };
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: fresh memory of our own.
        let write = given(unsafe { libc::mmap(std::ptr::null_mut(), size, rights, flags, -1, 0) });
        let execute = write.and_then(|write| {
            // SAFETY: a length of zero makes a second mapping of shared memory that is ours (mremap(2)).
            let second =
                given(unsafe { libc::mremap(write.as_ptr().cast(), 0, size, libc::MREMAP_MAYMOVE) })?;
            let place = second.as_ptr().cast();
            // SAFETY: our own mapping; if it may not be executable, nothing has changed, and it goes.
            let allowed = unsafe { libc::mprotect(place, size, libc::PROT_READ | libc::PROT_EXEC) } == 0;
            if !allowed {
                // SAFETY: as above, and not used again.
                unsafe { libc::munmap(place, size) };
            }
            allowed.then_some(second)
        });
        let error = fail("mapping memory for translated code (is executable memory forbidden here?)");
        match (write, execute) {
            (Some(write), Some(execute)) => {
                // Helps where the host lets shared memory have large pages; where not, nothing is lost.
                // SAFETY: our own mapping; the advice changes nothing but speed.
                unsafe { libc::madvise(execute.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
                Ok(Self {
                    write,
                    execute,
                    size,
                    used: 0,
                    cold: size,
                    cold_used: size,
                    cold_end: size,
                    cold_bytes: 0,
                    kept: 0,
                })
            }
            (Some(write), None) => {
                // SAFETY: our own mapping, not used again.
                unsafe { libc::munmap(write.as_ptr().cast(), size) };
                Err(error)
            }
            _ => Err(error),
        }
    }

    /// Offset at which the next code will stand.
    pub(super) fn next(&self) -> usize {
        self.used
    }

    /// Offset at which the next code that is seldom run will stand.
    pub(super) fn next_cold(&self) -> usize {
        self.cold_used
    }

    pub(super) fn used(&self) -> usize {
        self.used + self.cold_bytes
    }

    /// Makes room for `len` bytes in both parts; `false` if there is none.
    pub(super) fn reserve(&mut self, len: usize) -> bool {
        if self.cold_end - self.cold_used < len {
            let chunk = COLD_CHUNK.min(self.size / 4).max(len);
            match self.cold.checked_sub(chunk).filter(|&start| start >= self.used + len) {
                Some(start) => (self.cold, self.cold_used, self.cold_end) = (start, start, start + chunk),
                None => return false,
            }
        }
        self.cold - self.used >= len
    }

    /// Appends code and code that is seldom run, aligning the ends; `false` if they do not fit.
    pub(super) fn append(&mut self, code: &[u8], cold: &[u8]) -> bool {
        if code.len() > self.cold - self.used || cold.len() > self.cold_end - self.cold_used {
            return false;
        }
        for (at, bytes) in [(self.used, code), (self.cold_used, cold)] {
            // SAFETY: the range [at, at + len) was checked to be inside its part of the writable mapping.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.as_ptr().add(at), bytes.len())
            };
        }
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.cold);
        self.cold_used += cold.len();
        self.cold_bytes += cold.len();
        true
    }

    /// Everything so far stays over [`Self::flush`].
    pub(super) fn keep(&mut self) {
        self.kept = self.used;
    }

    /// Frees all code but what is kept.
    pub(super) fn flush(&mut self) {
        self.used = self.kept;
        (self.cold, self.cold_used, self.cold_end, self.cold_bytes) = (self.size, self.size, self.size, 0);
    }

    /// Overwrites `bytes` of existing code. No thread runs this cache's code meanwhile.
    pub(super) fn patch(&mut self, offset: usize, bytes: &[u8]) {
        if offset.checked_add(bytes.len()).is_some_and(|end| end <= self.size) {
            // SAFETY: the range was checked to be inside the writable mapping.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.as_ptr().add(offset), bytes.len())
            };
        }
    }

    /// Bytes of existing code, or zeroes beyond it.
    pub(super) fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if offset.checked_add(N).is_some_and(|end| end <= self.size) {
            // SAFETY: the range was checked to be inside the writable mapping.
            unsafe { std::ptr::copy_nonoverlapping(self.write.as_ptr().add(offset), bytes.as_mut_ptr(), N) };
        }
        bytes
    }

    /// Lets the 32-bit relative jump whose displacement is at `field` go to `target`.
    pub(super) fn patch_jump(&mut self, field: usize, target: usize) {
        let distance = (target as u32).wrapping_sub(field as u32 + 4);
        self.patch(field, &distance.to_le_bytes());
    }

    /// Host address at which the code at `offset` runs.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.execute.as_ptr() as u64 + offset as u64
    }

    /// Host addresses of all code, now and later.
    pub(super) fn range(&self) -> std::ops::Range<u64> {
        self.address(0)..self.address(self.size)
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours and no code of them runs any more: the translator is being dropped.
        unsafe {
            libc::munmap(self.write.as_ptr().cast(), self.size);
            libc::munmap(self.execute.as_ptr().cast(), self.size);
        }
    }
}
