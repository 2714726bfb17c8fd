//! Translation hints: what the last access of an instruction found in the TLB, kept beside the instruction.
//!
//! Translated code compares the linear address with its hint's page and takes the host address from the hint; only if
//! that fails does it go to a stub that looks into the TLB and renews the hint. Accesses of one block that use the same
//! base register share a hint, and all accesses through RSP of one privilege class share one: the stack page.
//!
//! A hint may be used as long as the TLB entry it was made from would have been valid. So every invalidation also
//! ends hints, by a log of those filled since the last time, one per privilege class: nothing is paid for hints that
//! were not filled, and each filling is undone at most once. Hints of the supervisor are filled from global
//! translations only, which lets them survive a load of CR3.
//!
//! Some accesses go to another page nearly each time, and a hint that is wrong costs a mispredicted jump and its
//! renewal. They are found in the log when it is full, and their blocks are made again with a TLB lookup in their place.

use crate::state::{CpuState, PAGE_MASK};
use std::mem::{offset_of, size_of};

/// How many hints there are: more than accesses fit into the code cache's usual blocks.
pub const HINTS: usize = 1 << 18;
/// Fillings that the log of a class remembers; one more leaves translated code, and ends them all.
pub const LOG_ENTRIES: usize = 8192;
/// Up to so many fillings an invalidation of one page looks for that page instead of ending them all.
const SEARCH_MAX: usize = 256;
/// A linear page that no address of 48 or 57 bits is in, before its random bits.
const NOWHERE: u64 = 1 << 62;

/// One hint.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Hint {
    /// The linear address of the page, negated: adding an address gives its offset in the page, or more than 4095.
    pub negative_page: u64,
    /// Host address less linear address, wrapping.
    pub addend: u64,
}

/// A page of host memory that belongs to nobody, where an empty hint leads.
///
/// There is no page number that a 64-bit address cannot have, so an empty hint stands for a random non-canonical
/// page. A guest that guesses 50 bits reads what it wrote there instead of taking #GP.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Nowhere(pub [u8; 4096]);

/// All hints of a vCPU, and what is filled.
#[repr(C)]
pub struct Hints {
    /// Entries of each log.
    pub filled: [u32; 2],
    /// Offsets in [`CpuState`] of the hints filled since they were last ended, by privilege class.
    pub logs: [[u32; LOG_ENTRIES]; 2],
    nowhere: Nowhere,
    /// The page of empty hints, negated.
    negative_nowhere: u64,
    /// Hints in use.
    used: u32,
    entries: [Hint; HINTS],
}

/// The hint of all accesses through the stack pointer, by privilege class. It is for writes, and so for reads too.
pub(super) const STACK: [u32; 2] = [0, 1];
const FIRST: u32 = 2;

/// Offset of a hint in the state.
pub(super) fn offset(number: u32) -> usize {
    offset_of!(CpuState, hints) + offset_of!(Hints, entries) + number as usize * size_of::<Hint>()
}

impl Hints {
    /// Sets up hints that are all zero: `random` chooses the page of empty hints.
    pub(crate) fn start(&mut self, random: u64) {
        let page = NOWHERE | random & (NOWHERE - 1) & PAGE_MASK;
        self.negative_nowhere = page.wrapping_neg();
        self.used = 0;
        self.take(FIRST);
    }

    fn empty(&self) -> Hint {
        let addend = (&raw const self.nowhere as u64).wrapping_add(self.negative_nowhere);
        Hint { negative_page: self.negative_nowhere, addend }
    }

    /// The number of the next free hint.
    pub(super) fn next(&self) -> u32 {
        self.used
    }

    /// Whether `count` more hints are free.
    pub(super) fn room(&self, count: usize) -> bool {
        HINTS - self.used as usize >= count
    }

    /// Takes `count` hints into use, empty.
    pub(super) fn take(&mut self, count: u32) {
        let empty = self.empty();
        let end = (self.used + count).min(HINTS as u32);
        for hint in self.entries.iter_mut().take(end as usize).skip(self.used as usize) {
            *hint = empty;
        }
        self.used = end;
    }

    /// Gives all hints back: the code that used them is gone.
    pub(super) fn reset(&mut self) {
        self.filled = [0; 2];
        self.used = 0;
        self.take(FIRST);
    }

    /// Empties all hints of a privilege class.
    pub(crate) fn end(&mut self, class: usize) {
        self.end_if(class, |_| true);
        self.filled[class] = 0;
    }

    /// Empties the hints of a page.
    pub(crate) fn end_page(&mut self, class: usize, address: u64) {
        if self.filled[class] as usize > SEARCH_MAX {
            return self.end(class);
        }
        let negative_page = (address & PAGE_MASK).wrapping_neg();
        self.end_if(class, |hint| hint.negative_page == negative_page);
    }

    /// Empties the hints that lead to a page of host memory.
    pub(crate) fn end_host(&mut self, host: u64) {
        for class in 0..2 {
            self.end_if(class, |hint| hint.addend.wrapping_sub(hint.negative_page) == host);
        }
    }

    fn end_if(&mut self, class: usize, which: impl Fn(&Hint) -> bool) {
        let empty = self.empty();
        let count = (self.filled[class] as usize).min(LOG_ENTRIES);
        let first = offset(0);
        for &at in self.logs[class].iter().take(count) {
            let number = (at as usize).wrapping_sub(first) / size_of::<Hint>();
            if let Some(hint) = self.entries.get_mut(number)
                && which(hint)
            {
                *hint = empty;
            }
        }
    }

    /// The hints of the last fillings of a class, newest last.
    pub(super) fn last(&self, class: usize, count: usize) -> impl Iterator<Item = u32> + '_ {
        let filled = (self.filled[class] as usize).min(LOG_ENTRIES);
        let first = offset(0);
        let log = self.logs[class].get(filled.saturating_sub(count)..filled).unwrap_or_default();
        log.iter().map(move |&at| ((at as usize).wrapping_sub(first) / size_of::<Hint>()) as u32)
    }

    /// Whether the log of a class has no room left.
    pub(super) fn full(&self, class: usize) -> bool {
        self.filled[class] as usize >= LOG_ENTRIES
    }
}

/// Offset in the state of a field of [`Hints`].
macro_rules! hinted {
    ($($field:tt)+) => {
        std::mem::offset_of!($crate::state::CpuState, hints)
            + std::mem::offset_of!($crate::translate::hints::Hints, $($field)+)
    };
}
pub(super) use hinted;

// The state is addressed with 32-bit displacements.
const _: () = assert!(size_of::<CpuState>() < i32::MAX as usize);
