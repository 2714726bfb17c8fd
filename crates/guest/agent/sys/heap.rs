//! The allocator: blocks of powers of two with free lists, carved from chunks of anonymous memory; large ones mapped alone.
//!
//! Unsafe because an allocator is. One thread only: the agent never makes another.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

const SMALLEST: u32 = 4;
const LARGEST: u32 = 15;
const CHUNK: usize = 256 * 1024;
const CLASSES: usize = (LARGEST - SMALLEST + 1) as usize;

struct State {
    free: [*mut u8; CLASSES],
    next: usize,
    end: usize,
}

struct Heap(UnsafeCell<State>);

// SAFETY: the agent has one thread and no signal handlers, so nobody shares.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(State { free: [null_mut(); CLASSES], next: 0, end: 0 }));

/// The class of a layout, or `None` for one that is mapped alone.
fn class_of(layout: Layout) -> Option<usize> {
    let size = layout.size().max(layout.align()).max(1 << SMALLEST).next_power_of_two();
    let shift = size.trailing_zeros();
    (shift <= LARGEST).then(|| (shift - SMALLEST) as usize)
}

// SAFETY: blocks are at least as large as asked and aligned to their size (pages, for those mapped alone); a block is on a
// free list or with the caller, never both.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = class_of(layout) else { return super::map_anonymous(layout.size()) };
        // SAFETY: one thread, and nothing below allocates.
        let state = unsafe { &mut *self.0.get() };
        let head = state.free[class];
        if !head.is_null() {
            // SAFETY: blocks on the free list hold the pointer to the next one in their first word.
            state.free[class] = unsafe { head.cast::<*mut u8>().read() };
            return head;
        }
        let size = 1usize << (class as u32 + SMALLEST);
        let mut start = state.next.next_multiple_of(size);
        if start + size > state.end {
            let chunk = super::map_anonymous(CHUNK);
            if chunk.is_null() {
                return chunk;
            }
            state.end = chunk as usize + CHUNK;
            start = (chunk as usize).next_multiple_of(size);
        }
        state.next = start + size;
        start as *mut u8
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(class) = class_of(layout) else { return super::unmap(block, layout.size()) };
        // SAFETY: one thread.
        let state = unsafe { &mut *self.0.get() };
        // SAFETY: the caller gives the block back; it holds at least 16 bytes and is aligned to its size.
        unsafe { block.cast::<*mut u8>().write(state.free[class]) };
        state.free[class] = block;
    }
}
