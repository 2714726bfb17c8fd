//! Guest RAM, behind one gate.
//!
//! What lives here: the mapping of guest-physical RAM into this process ([`GuestMemory`]), the per-guest table of
//! 4 KiB page states ([`PageFlags`]), and the accessors through which everything but a vCPU's own translated
//! stores writes RAM. Engines ask the gate for a host address page by page
//! ([`GuestMemory::host_page`], [`GuestMemory::host_page_for_write`]), and the gate notes the write first. How the host holds it
//! all is in [`provision`].
//!
//! What may enter: nothing of yado. This crate knows no CPU, no device and no file format.
//!
//! Lock order: none are held across calls. The page table is atomics; the code watcher is a [`std::sync::OnceLock`].
#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod heap;
mod mapping;
mod page;
pub mod provision;
mod ram;

pub use heap::keep_heap_small;
pub use mapping::Backing;
pub use page::PageFlags;
pub use provision::{Lock, Pages, Placement, Policy, Provision};
pub use ram::{AccessError, CodeWatch, Error, GuestMemory, HostPage, Region};

/// log2 of the size of a guest page.
pub const PAGE_SHIFT: u32 = 12;
/// The size in bytes of a guest page, the unit of the page-state table.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
