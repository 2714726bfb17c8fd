//! Pages that a program writes and runs in turn, as compilers at run time do.
//!
//! Each turn costs several stops as long as a page is either written to or run. One that has had a few turns, and in which
//! nothing asks the host, becomes *open*: written to and run at once, as on the host. What the program then writes there is
//! looked through only now and then, so the first of its CPUIDs may be answered by the host's CPU where that cannot be made to
//! stop at them ([`super::process::Process::stop_at_more`]). A page where one is found is never open again.

use std::collections::HashMap;

/// Turns after which a page is open.
const TURNS: u8 = 8;
/// And in an address space that has so many open pages already.
const PROVEN: (usize, u8) = (4, 2);
/// Pages that are remembered.
const PAGES_MAX: usize = 1 << 14;
/// Seconds between two looks, and pages that are looked through at each.
const PERIOD: f64 = 0.005;
const LOOKS: usize = 16;

/// What is known of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    /// So many turns.
    Turned(u8),
    Open,
    /// Something in it asks the host.
    Closed,
}

/// Those of one address space, by guest-physical address.
#[derive(Debug, Default)]
pub(super) struct Rewritten {
    pages: HashMap<u64, Page>,
    /// The open ones, in the order in which they are looked through.
    open: Vec<u64>,
    next: usize,
    looked: f64,
}

impl Rewritten {
    /// A page that was run has been written to.
    pub(super) fn turned(&mut self, page: u64) {
        if self.pages.len() >= PAGES_MAX {
            self.pages.clear();
            self.open.clear();
        }
        let turns = if self.open.len() >= PROVEN.0 { PROVEN.1 } else { TURNS };
        let known = self.pages.entry(page).or_insert(Page::Turned(0));
        match *known {
            Page::Turned(before) if before + 1 >= turns => {
                *known = Page::Open;
                self.open.push(page);
            }
            Page::Turned(before) => *known = Page::Turned(before + 1),
            Page::Open | Page::Closed => {}
        }
    }

    pub(super) fn is_open(&self, page: u64) -> bool {
        !self.open.is_empty() && self.pages.get(&page) == Some(&Page::Open)
    }

    /// Something in the page asks the host, so that its code is the translator's.
    pub(super) fn is_closed(&self, page: u64) -> bool {
        self.pages.get(&page) == Some(&Page::Closed)
    }

    /// Something in the page asks the host.
    pub(super) fn close(&mut self, page: u64) {
        self.pages.insert(page, Page::Closed);
        self.open.retain(|&open| open != page);
    }

    /// The pages that are to be looked through now.
    pub(super) fn due(&mut self, now: f64) -> Vec<u64> {
        if self.open.is_empty() || now - self.looked < PERIOD {
            return vec![];
        }
        self.looked = now;
        let count = self.open.len().min(LOOKS);
        let due = self.open.iter().cycle().skip(self.next % self.open.len()).take(count).copied().collect();
        self.next = (self.next + count) % self.open.len();
        due
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_page_opens_after_some_turns_and_others_follow_sooner() {
        let mut pages = Rewritten::default();
        for page in 0..PROVEN.0 as u64 {
            for _ in 0..TURNS {
                assert!(!pages.is_open(page));
                pages.turned(page);
            }
            assert!(pages.is_open(page));
        }
        for _ in 0..PROVEN.1 {
            assert!(!pages.is_open(99));
            pages.turned(99);
        }
        assert!(pages.is_open(99));
        pages.close(99);
        (0..100).for_each(|_| pages.turned(99));
        assert!(!pages.is_open(99));
    }

    #[test]
    fn all_open_pages_are_looked_through_in_turn() {
        let mut pages = Rewritten::default();
        for page in 0..40 {
            (0..TURNS).for_each(|_| pages.turned(page));
        }
        assert_eq!(pages.due(PERIOD / 2.0), []);
        let mut seen: Vec<_> = (1..=3).flat_map(|turn| pages.due(f64::from(turn) * 2.0 * PERIOD)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (0..40).collect::<Vec<_>>());
        assert_eq!(pages.due(6.5 * PERIOD), []);
    }
}
