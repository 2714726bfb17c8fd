//! At which linear addresses the pages with code run.
//!
//! Blocks are known by guest-physical address, and a jump to another page is bridged to the block that it led to first. Where one
//! page is at two addresses of one address space, what lies behind it may not be the same at both: there jumps are looked up each
//! time. Programs that have a file mapped twice are few.

use super::store::NumberMap;
use crate::state::SPACES;

/// For the supervisor and by the user's address space.
#[derive(Debug, Default)]
pub(super) struct Ways {
    arrays: [Way; 1 + SPACES],
}

#[derive(Debug, Default)]
struct Way {
    /// Linear pages by guest-physical page.
    linear: NumberMap<u64>,
    several: bool,
}

impl Ways {
    /// A page of guest-physical memory is entered at a linear page. Answers whether this is the first that was entered at
    /// another one before: bridges are not right any more.
    pub(super) fn seen(&mut self, array: usize, physical: u64, linear: u64) -> bool {
        let Some(way) = self.arrays.get_mut(array).filter(|way| !way.several) else { return false };
        way.several = *way.linear.entry(physical).or_insert(linear) != linear;
        way.several
    }

    /// Whether there is a page that was entered at several.
    pub(super) fn several(&self, array: usize) -> bool {
        self.arrays.get(array).is_some_and(|way| way.several)
    }

    /// The page tables have changed.
    pub(super) fn forget(&mut self, array: usize) {
        if let Some(way) = self.arrays.get_mut(array) {
            way.linear.clear();
            way.several = false;
        }
    }
}
