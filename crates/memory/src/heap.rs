//! This process's own heap.
//!
//! `unsafe` because the C library's knobs are foreign functions.
#![allow(unsafe_code)]

/// Blocks from this size on are mapped by themselves, and their memory goes back when they are freed.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 256 << 10;

/// Keeps the heap small: the GNU C library raises the size from which blocks are mapped by themselves with every such
/// block that is freed, up to 32 MiB, and after a kernel was decompressed, tables that grow leave holes that nobody
/// uses. Call once, before there is a second thread.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}
