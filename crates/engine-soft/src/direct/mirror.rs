//! What of an address space of the guest is mapped in its process.
//!
//! A mirror is to the process what a TLB is to a CPU: it holds translations that the guest's page tables allowed when they were
//! looked up, until the guest, or somebody who must see accesses, has them forgotten. Only pages that are plain RAM are in it.

use super::process::{self, Command, Process};
use super::rewritten::Rewritten;
use super::scan::SITES_MAX;
use crate::mmu::Seen;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;

/// What code may do with a page: PROT_* bits.
pub(super) type Rights = libc::c_int;
pub(super) const READ: Rights = libc::PROT_READ;
pub(super) const WRITE: Rights = libc::PROT_WRITE;
pub(super) const EXECUTE: Rights = libc::PROT_EXEC;

const PAGE: u64 = 4096;
/// Mappings that a process may have (vm.max_map_count), with some to spare.
const MAPPINGS_MAX: usize = 48 << 10;
/// Linear pages of a mirror, at least.
const PAGES_MIN: usize = 1 << 18;

/// Pages that are looked up again when the guest forgets all of an address space: that takes a fraction of what it takes to
/// bring one in.
const CHECKED_MAX: usize = 16 << 10;
/// Pages that are unmapped one by one.
const GONE_MAX: usize = 64;

/// A page that shall be in the mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Linear address.
    pub linear: u64,
    /// Guest-physical address.
    pub physical: u64,
    /// Where it is in the file of the guest's RAM.
    pub offset: u64,
    pub rights: Rights,
    /// Log2 of the size of the guest's page that it is, or is part of.
    pub shift: u32,
}

/// The mirror of one address space.
pub(super) struct Mirror {
    pub process: Process,
    /// Where the page tables are that it is made from.
    tables: u64,
    /// Rights and guest-physical address by linear address.
    pages: HashMap<u64, (Rights, u64)>,
    /// Large pages of which parts are there: first address and log2 of the size.
    large: HashSet<(u64, u32)>,
    /// Pages that can be written or executed, by guest-physical and linear address.
    watched: BTreeSet<(u64, u64)>,
    /// System calls to be made before guest code runs again.
    due: Vec<Command>,
    /// Mappings made since there were none.
    mappings: usize,
    /// Linear pages after which the mirror begins again with none: a hostile guest has few pages in many places.
    pages_max: usize,
    /// Breakpoints, 0 if free, and whether the process does not know yet.
    breakpoints: [u64; SITES_MAX],
    breakpoints_due: bool,
    /// The vector registers that the process has.
    pub vectors: Vec<u8>,
    /// Pages that are written and run in turn.
    pub rewritten: Rewritten,
    /// EFLAGS.ID of the process: programs change it, but the host's kernel does not set it for anybody.
    pub id: u64,
}

impl Mirror {
    /// `ram` is the guest's, in pages.
    pub(super) fn new(process: Process, ram: usize) -> Self {
        let vectors = vec![0; process.xsave_len()];
        Self {
            process,
            tables: 0,
            pages: HashMap::new(),
            large: HashSet::new(),
            watched: BTreeSet::new(),
            due: vec![],
            mappings: 0,
            pages_max: ram.saturating_mul(2).max(PAGES_MIN),
            breakpoints: [0; SITES_MAX],
            breakpoints_due: false,
            vectors,
            rewritten: Rewritten::default(),
            id: 0,
        }
    }

    /// What is mapped at a linear page; nothing is 0.
    pub(super) fn rights(&self, linear: u64) -> Rights {
        self.pages.get(&linear).map_or(0, |page| page.0)
    }

    /// Where a guest-physical page can be executed.
    pub(super) fn places(&self, physical: u64) -> Vec<u64> {
        let places = self.watched.range((physical, 0)..=(physical, u64::MAX)).map(|&(_, linear)| linear);
        places.filter(|&linear| self.rights(linear) & EXECUTE != 0).collect()
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        if self.pages.is_empty() {
            return;
        }
        self.pages.clear();
        self.large.clear();
        self.watched.clear();
        self.unwatch(|_| true);
        self.due.clear();
        self.due.extend(self.process.unmap_all());
        self.mappings = 0;
    }

    /// Forgets what is not as `now` says: what is at a linear address, and the rights to it, for the page tables at `tables`.
    pub(super) fn check(&mut self, tables: u64, now: impl Fn(u64) -> Option<(Seen, Rights)>) {
        if std::mem::replace(&mut self.tables, tables) != tables {
            // Another program.
            self.rewritten = Rewritten::default();
            return self.clear();
        }
        if self.pages.len() > CHECKED_MAX {
            return self.clear();
        }
        let mut gone = vec![];
        for (&linear, &(rights, physical)) in &self.pages {
            match now(linear) {
                Some((seen, allowed)) if seen.physical == physical && rights & !allowed == 0 => {
                    note_large(&mut self.large, linear, seen.shift);
                }
                _ => gone.push(linear),
            }
        }
        if gone.len() > GONE_MAX {
            return self.clear();
        }
        for linear in gone {
            self.forget(linear);
        }
    }

    /// The guest has invalidated what is known of a linear address: if it is in a large page, that is all of the page (Intel SDM
    /// 3, 4.10.4.1).
    pub(super) fn invalidate(&mut self, linear: u64) {
        for shift in [21, 30] {
            let first = linear >> shift << shift;
            if self.large.remove(&(first, shift)) {
                let parts = self.pages.keys().copied().filter(|page| page >> shift << shift == first);
                for page in parts.collect::<Vec<_>>() {
                    self.forget(page);
                }
            }
        }
        self.forget(linear);
    }

    /// Forgets a linear page of 4 KiB.
    pub(super) fn forget(&mut self, linear: u64) {
        if let Some((_, physical)) = self.pages.remove(&linear) {
            self.watched.remove(&(physical, linear));
            self.unwatch(|page| page == linear);
            self.due.push(process::unmap(linear, PAGE));
            self.mappings += 1;
        }
    }

    /// Forgets a guest-physical page wherever it can be accessed with `rights`; answers whether it could.
    pub(super) fn forget_physical(&mut self, physical: u64, rights: Rights) -> bool {
        let found: Vec<u64> = self
            .watched
            .range((physical, 0)..=(physical, u64::MAX))
            .map(|&(_, linear)| linear)
            .filter(|&linear| self.rights(linear) & rights != 0)
            .collect();
        for &linear in &found {
            self.forget(linear);
        }
        !found.is_empty()
    }

    /// Begins again with none if there is no room for so many pages more. Before it is looked at what is there.
    pub(super) fn make_room(&mut self, count: u64) {
        if self.mappings > MAPPINGS_MAX || self.pages.len() + count as usize > self.pages_max {
            self.clear();
        }
    }

    /// Maps pages, ascending by linear address, as few mappings as they allow.
    pub(super) fn map(&mut self, wanted: &[Wanted]) {
        let goes_on = |a: &Wanted, b: &Wanted| {
            a.linear + PAGE == b.linear && a.offset + PAGE == b.offset && a.rights == b.rights
        };
        for run in wanted.chunk_by(goes_on) {
            let Some(first) = run.first() else { continue };
            self.due.push(process::map(first.linear, run.len() as u64 * PAGE, first.rights, first.offset));
            self.mappings += 1;
        }
        for page in wanted {
            note_large(&mut self.large, page.linear, page.shift);
            if let Some((_, old)) = self.pages.insert(page.linear, (page.rights, page.physical)) {
                self.watched.remove(&(old, page.linear));
            }
            if page.rights & (WRITE | EXECUTE) != 0 {
                self.watched.insert((page.physical, page.linear));
            }
        }
    }

    /// Linear pages that are there.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    /// The guest-physical page at a linear address, if the process can run it.
    pub(super) fn runs(&self, linear: u64) -> Option<u64> {
        self.pages.get(&linear).and_then(|&(rights, physical)| (rights & EXECUTE != 0).then_some(physical))
    }

    /// Has the process stop before the instructions at these offsets of a page, which is going to be executable, and at no other
    /// there. If there are not enough breakpoints, other pages that need some are not executable any more.
    pub(super) fn stop_at(&mut self, page: u64, offsets: &[u16]) {
        let has = self.breakpoints.iter().filter(|&&address| address & !(PAGE - 1) == page);
        let addresses = offsets.iter().map(|&offset| page + u64::from(offset));
        if has.copied().eq(addresses.clone()) {
            return;
        }
        self.unwatch(|other| other == page);
        let wanted = addresses.len().min(SITES_MAX);
        for i in 0..SITES_MAX {
            let free = self.breakpoints.iter().filter(|&&address| address == 0).count();
            let address = self.breakpoints[i];
            if free < wanted && address != 0 {
                let other = address & !(PAGE - 1);
                self.forget(other);
                self.unwatch(|page| page == other);
            }
        }
        let free = self.breakpoints.iter_mut().filter(|address| **address == 0);
        free.zip(addresses).for_each(|(place, address)| *place = address);
        self.breakpoints_due = true;
    }

    /// No breakpoints in these pages.
    fn unwatch(&mut self, of: impl Fn(u64) -> bool) {
        for breakpoint in self.breakpoints.iter_mut().filter(|at| **at != 0 && of(**at & !(PAGE - 1))) {
            *breakpoint = 0;
            self.breakpoints_due = true;
        }
    }

    /// Makes the process what the mirror says. Its registers are lost if there was something to do.
    pub(super) fn settle(&mut self) -> io::Result<bool> {
        if std::mem::take(&mut self.breakpoints_due) {
            self.process.set_breakpoints(&self.breakpoints)?;
        }
        if self.due.is_empty() {
            return Ok(false);
        }
        let due = std::mem::take(&mut self.due);
        if let Err(error) = self.process.run_commands(&due) {
            // Too many mappings, or no memory for them: begin again with none.
            self.pages.clear();
            self.large.clear();
            self.watched.clear();
            self.unwatch(|_| true);
            self.mappings = 0;
            self.process.run_commands(&self.process.unmap_all())?;
            if error.kind() != io::ErrorKind::OutOfMemory {
                return Err(error);
            }
        }
        Ok(true)
    }
}

fn note_large(large: &mut HashSet<(u64, u32)>, linear: u64, shift: u32) {
    if shift > 12 {
        large.insert((linear >> shift << shift, shift));
    }
}
