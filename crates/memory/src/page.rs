//! The state of one guest page.

use std::sync::atomic::{AtomicU8, Ordering};

/// What the gate knows of one 4 KiB guest page.
///
/// Sharing, snapshots and migration add their states here; today every RAM page is plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFlags(u8);

impl PageFlags {
    /// Written since the bit was last taken (by [`crate::GuestMemory::take_modified`]).
    pub const MODIFIED: Self = Self(1 << 0);
    /// An engine has translated code from this page and wants to hear of writes to it.
    pub const CODE: Self = Self(1 << 1);

    /// Whether all flags of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The table: one entry for each page of RAM, in RAM order.
#[derive(Debug)]
pub(crate) struct PageTable(Box<[AtomicU8]>);

impl PageTable {
    pub(crate) fn new(pages: usize) -> Self {
        Self((0..pages).map(|_| AtomicU8::new(0)).collect())
    }

    pub(crate) fn get(&self, page: usize) -> PageFlags {
        PageFlags(self.0.get(page).map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    /// Sets flags; answers what was set before.
    pub(crate) fn set(&self, page: usize, flags: PageFlags) -> PageFlags {
        let Some(entry) = self.0.get(page) else { return PageFlags(0) };
        let before = entry.load(Ordering::Acquire);
        if before & flags.0 == flags.0 {
            return PageFlags(before);
        }
        PageFlags(entry.fetch_or(flags.0, Ordering::AcqRel))
    }

    /// Clears flags; answers what was set before.
    pub(crate) fn clear(&self, page: usize, flags: PageFlags) -> PageFlags {
        PageFlags(self.0.get(page).map_or(0, |entry| entry.fetch_and(!flags.0, Ordering::AcqRel)))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
