//! The blocks: by guest-physical address, by page, and how they are chained to each other.
//!
//! A block lives until bytes it was made from change, or the whole cache is flushed; numbers of blocks and links are
//! not used again before that.

use super::block::Range;
use super::cache::CodeCache;
use super::linkage::Linkage;
use super::thunk::{Thunks, reason};
use crate::state::SPACES;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Granule in which a page's translated bytes are tracked.
const GRANULE_SHIFT: u32 = 5;
/// Writes beside translated bytes after which a page is taken for data, and its blocks are dropped.
const SLOW_WRITES_MAX: u32 = 256;

/// A hasher for keys that are numbers already.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        // Multiplication by 2^64 / golden ratio, folded.
        let wide = u128::from(self.0 ^ value) * 0x9e37_79b9_7f4a_7c15;
        self.0 = wide as u64 ^ (wide >> 64) as u64;
    }
}

pub(super) type NumberMap<T> = HashMap<u64, T, BuildHasherDefault<NumberHasher>>;

#[derive(Debug)]
pub(super) struct Block {
    /// Guest-physical address of its page.
    pub page: u64,
    /// Page offset of its first byte.
    pub start: u16,
    pub mode: u8,
    /// Cache offset of the entry for jumps through the jump cache.
    pub entry: usize,
    /// Cache offset of the entry for jumps within the page.
    pub direct: usize,
    /// It holds no instruction: the first is for the single-step tier.
    pub step: bool,
    /// It holds no instruction: the first reaches into the next page, and which that is, is not known here.
    pub crosses: bool,
    /// The page into which its only instruction reaches, and how far.
    pub second: Option<(u64, u16)>,
    /// Its hints: the number of the first, and how many.
    pub hints: (u32, u32),
    ranges: [Range; 3],
    /// Links that jump here.
    incoming: Vec<u32>,
    alive: bool,
}

impl Block {
    /// The byte ranges of a page on which the block depends.
    fn ranges_of(&self, page: u64) -> [Range; 4] {
        let [a, b, c] = if page == self.page { self.ranges } else { [(0, 0); 3] };
        let second = self.second.filter(|second| second.0 == page).map_or(0, |second| second.1);
        [a, b, c, (0, second)]
    }
}

/// A direct jump that can be patched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    /// Cache offset of the displacement.
    pub field: usize,
    /// Cache offset of the stub it goes to while it has no target.
    pub stub: usize,
    /// Page offset of the target.
    pub target: u16,
    /// The block it belongs to.
    pub from: u32,
}

#[derive(Debug, Default)]
struct Page {
    blocks: Vec<u32>,
    /// One bit for each granule that a block depends on.
    granules: u128,
    slow_writes: u32,
}

/// A direct jump to another page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bridge {
    /// Cache offset of the stub that looks for its target.
    pub stub: usize,
    /// Page offset of the target.
    pub target: u16,
}

#[derive(Default)]
pub(super) struct Store {
    pub blocks: Vec<Block>,
    pub links: Vec<Link>,
    pub bridges: Vec<Bridge>,
    /// Bridges that lead somewhere, and the blocks they lead to, for the supervisor and by the user's address space.
    open: [Vec<(u32, u32)>; 1 + SPACES],
    index: NumberMap<u32>,
    /// Blocks whose instruction reaches into a second page, by their and its address and mode.
    crossings: HashMap<(u64, u64, u8), u32>,
    pages: NumberMap<Page>,
}

/// What a write to a page means to the code on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// Nothing on the page is translated.
    Free,
    /// The bytes are not translated ones.
    Beside,
    /// Translated bytes change.
    Code,
}

fn key(address: u64, mode: u8) -> u64 {
    address << 5 | u64::from(mode)
}

fn granules(from: u64, to: u64) -> u128 {
    if from >= to {
        return 0;
    }
    let first = (from >> GRANULE_SHIFT) as u32;
    let last = ((to - 1) >> GRANULE_SHIFT) as u32;
    let count = last.saturating_sub(first) + 1;
    let ones = if count >= 128 { u128::MAX } else { (1u128 << count) - 1 };
    ones.checked_shl(first).unwrap_or(0)
}

impl Store {
    /// The block to which a hint belongs.
    pub(super) fn owner(&self, hint: u32) -> Option<&Block> {
        // Hints are handed out in the order of blocks.
        let after = self.blocks.partition_point(|block| block.hints.0 <= hint);
        let block = self.blocks.get(after.checked_sub(1)?)?;
        (block.alive && hint - block.hints.0 < block.hints.1).then_some(block)
    }

    /// The block that starts at guest-physical `address`.
    pub(super) fn find(&self, address: u64, mode: u8) -> Option<u32> {
        self.index.get(&key(address, mode)).copied()
    }

    /// The block of the instruction that starts at `address` and reaches into the page at `second`.
    pub(super) fn find_crossing(&self, address: u64, second: u64, mode: u8) -> Option<u32> {
        self.crossings.get(&(address, second, mode)).copied()
    }

    pub(super) fn get(&self, number: u32) -> Option<&Block> {
        self.blocks.get(number as usize)
    }

    /// Adds a block; answers its number.
    pub(super) fn add(&mut self, mut block: Block) -> u32 {
        let number = self.blocks.len() as u32;
        block.alive = true;
        let page = self.pages.entry(block.page).or_default();
        page.blocks.push(number);
        for &(from, to) in &block.ranges {
            page.granules |= granules(u64::from(from), u64::from(to));
        }
        let address = block.page | u64::from(block.start);
        match block.second {
            None => {
                self.index.insert(key(address, block.mode), number);
            }
            Some((second, len)) => {
                self.crossings.insert((address, second, block.mode), number);
                let page = self.pages.entry(second).or_default();
                page.blocks.push(number);
                page.granules |= granules(0, u64::from(len));
            }
        }
        self.blocks.push(block);
        number
    }

    pub(super) fn new_block(page: u64, start: u16, mode: u8, ranges: [Range; 3]) -> Block {
        let (entry, direct) = (0, 0);
        Block {
            page,
            start,
            mode,
            entry,
            direct,
            step: false,
            crosses: false,
            second: None,
            hints: (0, 0),
            ranges,
            incoming: Vec::new(),
            alive: true,
        }
    }

    /// Lets link `number` go to block `to`, if that is on the same page.
    pub(super) fn connect(&mut self, cache: &mut CodeCache, number: u32, to: u32) {
        let Some(link) = self.links.get(number as usize).copied() else { return };
        let from = self.blocks.get(link.from as usize).map(|b| (b.page, b.alive));
        let Some(block) = self.blocks.get_mut(to as usize) else { return };
        if block.alive && from == Some((block.page, true)) {
            block.incoming.push(number);
            cache.patch_jump(link.field, block.direct);
        }
    }

    /// What a write of `len` bytes at guest-physical `address` (within a page) would do.
    pub(super) fn classify(&self, address: u64, len: u64) -> Write {
        match self.pages.get(&(address & !0xfff)) {
            None => Write::Free,
            Some(page) => {
                let at = address & 0xfff;
                if page.granules & granules(at, at + len) != 0 { Write::Code } else { Write::Beside }
            }
        }
    }

    /// Counts a write beside code; `true` if the page should rather be taken for data now.
    pub(super) fn slow_write(&mut self, address: u64) -> bool {
        self.pages.get_mut(&(address & !0xfff)).is_none_or(|page| {
            page.slow_writes += 1;
            page.slow_writes > SLOW_WRITES_MAX
        })
    }

    /// Kills the blocks that depend on any of `len` bytes at `address` (within a page). Answers how many died, and
    /// whether nothing translated is left on the page.
    pub(super) fn invalidate(
        &mut self,
        cache: &mut CodeCache,
        thunks: &Thunks,
        linkage: &mut Linkage,
        (address, len): (u64, u64),
    ) -> (usize, bool) {
        let base = address & !0xfff;
        let Some(mut page) = self.pages.remove(&base) else { return (0, true) };
        let (from, to) = (address & 0xfff, (address & 0xfff).saturating_add(len));
        let mut killed = 0;
        page.granules = 0;
        page.blocks.retain(|&number| {
            let Some(block) = self.blocks.get_mut(number as usize) else { return false };
            if !block.alive {
                // It died of a write to its other page.
                return false;
            }
            let ranges = block.ranges_of(base);
            let hit = ranges.iter().any(|r| u64::from(r.0) < to && u64::from(r.1) > from && r.0 < r.1);
            if !hit {
                for &(from, to) in &ranges {
                    page.granules |= granules(u64::from(from), u64::from(to));
                }
                return true;
            }
            killed += 1;
            block.alive = false;
            let address = block.page | u64::from(block.start);
            match block.second {
                None => drop(self.index.remove(&key(address, block.mode))),
                Some((second, _)) => drop(self.crossings.remove(&(address, second, block.mode))),
            }
            for number in std::mem::take(&mut block.incoming) {
                if let Some(link) = self.links.get(number as usize) {
                    cache.patch_jump(link.field, link.stub);
                }
            }
            // The jump cache may still lead here: look the address up again.
            cache.patch(block.entry, &[0xe9]);
            cache.patch_jump(block.entry + 1, thunks.exit(reason::LOOKUP));
            false
        });
        if killed > 0 {
            self.close_dead(cache, linkage);
        }
        if page.blocks.is_empty() {
            return (killed, true);
        }
        self.pages.insert(base, page);
        (killed, false)
    }

    /// Takes the bridges to dead blocks away.
    fn close_dead(&mut self, cache: &CodeCache, linkage: &mut Linkage) {
        for (array, open) in linkage.bridges.iter_mut().zip(&mut self.open) {
            open.retain(|&(number, to)| {
                let alive = self.blocks.get(to as usize).is_some_and(|block| block.alive);
                if !alive {
                    close(&self.bridges, number, cache, array);
                }
                alive
            });
        }
    }

    /// Takes all bridges of the supervisor, or of an address space, away: their pages may be others now.
    pub(super) fn close(&mut self, array: usize, cache: &CodeCache, linkage: &mut Linkage) {
        let (Some(open), Some(array)) = (self.open.get_mut(array), linkage.bridges.get_mut(array)) else {
            return;
        };
        for (number, _) in open.drain(..) {
            close(&self.bridges, number, cache, array);
        }
    }

    /// Lets a bridge lead to a block.
    pub(super) fn span(
        &mut self,
        array: usize,
        number: u32,
        to: u32,
        cache: &CodeCache,
        linkage: &mut Linkage,
    ) {
        if let Some(block) = self.blocks.get(to as usize).filter(|block| block.alive && !block.step)
            && let Some(open) = self.open.get_mut(array)
            && let Some(host) =
                linkage.bridges.get_mut(array).and_then(|array| array.get_mut(number as usize))
        {
            *host = cache.address(block.direct);
            open.push((number, to));
        }
    }

    /// Guest-physical addresses of all pages with blocks.
    pub(super) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.links.clear();
        self.bridges.clear();
        self.open = Default::default();
        self.index.clear();
        self.crossings.clear();
        self.pages.clear();
    }
}

fn close(bridges: &[Bridge], number: u32, cache: &CodeCache, array: &mut [u64]) {
    if let Some(bridge) = bridges.get(number as usize)
        && let Some(host) = array.get_mut(number as usize)
    {
        *host = cache.address(bridge.stub);
    }
}
