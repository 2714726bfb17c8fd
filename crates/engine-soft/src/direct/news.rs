//! What the MMU tells of changes to processes that run user code directly.

use crate::state::SPACES;

/// Single pages that are told of; more are all of them.
const PAGES_MAX: usize = 256;
/// Guest-physical pages that are told of; with more, everything has to be forgotten.
const PHYSICAL_MAX: usize = 4096;

/// What has to be forgotten of one address space.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Somebody listens.
    pub mirrored: bool,
    /// All of it.
    pub all: bool,
    /// These linear pages.
    pub pages: Vec<u64>,
}

/// What has happened since somebody looked. Costs nothing as long as nobody listens.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// By the user's address space.
    pub spaces: [Space; SPACES],
    /// Guest-physical pages that hold translated code from now on: nobody may write there unseen.
    pub protected: Vec<u64>,
    /// Guest-physical pages with code that have been written to, or are not watched any more.
    pub written: Vec<u64>,
    /// There were too many to tell which: what is known of any page is not true any more.
    pub lost: bool,
}

impl News {
    fn heard(&self) -> bool {
        self.spaces.iter().any(|space| space.mirrored)
    }

    /// The translations of an address space are not valid any more.
    pub(crate) fn flushed(&mut self, space: usize) {
        if let Some(space) = self.spaces.get_mut(space).filter(|space| space.mirrored) {
            space.all = true;
            space.pages.clear();
        }
    }

    /// That of one linear page is not, in any address space.
    pub(crate) fn invalidated(&mut self, address: u64) {
        for space in self.spaces.iter_mut().filter(|space| space.mirrored && !space.all) {
            if space.pages.len() == PAGES_MAX {
                space.all = true;
                space.pages.clear();
            } else {
                space.pages.push(address & !0xfff);
            }
        }
    }

    /// A guest-physical page holds translated code.
    pub(crate) fn protected(&mut self, physical: u64) {
        if self.heard() {
            self.lost |= !note(&mut self.protected, physical & !0xfff);
        }
    }

    /// A guest-physical page with code has been written to.
    pub(crate) fn written(&mut self, physical: u64) {
        if self.heard() {
            self.lost |= !note(&mut self.written, physical & !0xfff);
        }
    }
}

/// Answers whether there was room.
fn note(list: &mut Vec<u64>, page: u64) -> bool {
    if list.last() == Some(&page) {
        return true;
    }
    let room = list.len() < PHYSICAL_MAX;
    if room {
        list.push(page);
    }
    room
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn nobody_who_does_not_listen_makes_it_grow() {
        let mut news = News::default();
        news.spaces[0].mirrored = true;
        (0..PHYSICAL_MAX as u64).for_each(|page| news.written(page << 12));
        assert!(!news.lost);
        (0..3 * PHYSICAL_MAX as u64).for_each(|page| news.written(page << 12));
        assert!(news.lost);
        assert_eq!(news.written.len(), PHYSICAL_MAX);
    }
}
