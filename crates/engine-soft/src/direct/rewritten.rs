//! Pages that a program writes and runs in turn, as compilers at run time do.
//!
//! Each turn costs several stops as long as a page is either written to or run. One that has had a few turns becomes *open*:
//! written to and run at once, as on the host. What the program then writes there is looked through only now and then, so the
//! first of its CPUIDs may be answered by the host's CPU where that cannot be made to stop at them
//! ([`super::process::Process::stop_at_more`]). Where something seems to ask the host, a breakpoint is set: half-written code and
//! data between functions often look so. With more of them than the CPU has breakpoints, the page is closed for twice as many
//! turns as before.

use std::collections::HashMap;

/// Turns after which a page is open, at first and at most.
const TURNS: (u16, u16) = (8, 1 << 12);
/// And in an address space that has so many open pages already.
const PROVEN: (usize, u16) = (4, 2);
/// Pages that are remembered; others never open.
const PAGES_MAX: usize = 1 << 14;
/// Seconds between two looks, and pages that are looked through at each.
const PERIOD: f64 = 0.005;
const LOOKS: usize = 16;

/// What is known of a page.
#[derive(Debug, Clone, Copy)]
struct Page {
    turns: u16,
    /// Turns after which it opens.
    opens: u16,
    open: bool,
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
        if self.pages.len() >= PAGES_MAX && !self.pages.contains_key(&page) {
            return;
        }
        let proven = self.open.len() >= PROVEN.0;
        let new = Page { turns: 0, opens: if proven { PROVEN.1 } else { TURNS.0 }, open: false };
        let known = self.pages.entry(page).or_insert(new);
        known.turns = known.turns.saturating_add(1);
        if known.turns >= known.opens && !known.open {
            known.open = true;
            self.open.push(page);
        }
    }

    pub(super) fn is_open(&self, page: u64) -> bool {
        !self.open.is_empty() && self.pages.get(&page).is_some_and(|page| page.open)
    }

    /// More in the page asks the host than can be watched.
    pub(super) fn close(&mut self, page: u64) {
        if let Some(known) = self.pages.get_mut(&page) {
            *known = Page { turns: 0, opens: (known.opens * 2).min(TURNS.1), open: false };
        }
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
    fn a_page_opens_after_some_turns_and_later_each_time_it_was_closed() {
        let mut pages = Rewritten::default();
        for page in 0..PROVEN.0 as u64 {
            for _ in 0..TURNS.0 {
                assert!(!pages.is_open(page));
                pages.turned(page);
            }
            assert!(pages.is_open(page));
        }
        for _ in 0..PROVEN.1 {
            assert!(!pages.is_open(99));
            pages.turned(99);
        }
        for closed in 1..20 {
            assert!(pages.is_open(99));
            pages.close(99);
            for _ in 0..(PROVEN.1 << closed.min(11)).min(TURNS.1) {
                assert!(!pages.is_open(99));
                pages.turned(99);
            }
        }
    }

    #[test]
    fn all_open_pages_are_looked_through_in_turn() {
        let mut pages = Rewritten::default();
        for page in 0..40 {
            (0..TURNS.0).for_each(|_| pages.turned(page));
        }
        assert_eq!(pages.due(PERIOD / 2.0), []);
        let mut seen: Vec<_> = (1..=3).flat_map(|turn| pages.due(f64::from(turn) * 2.0 * PERIOD)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (0..40).collect::<Vec<_>>());
        assert_eq!(pages.due(6.5 * PERIOD), []);
    }
}
