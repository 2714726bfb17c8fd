//! The blocks: by guest-physical address, by page, and how they are chained to each other.
//!
//! A block lives until bytes it was made from change, or the whole cache is flushed; numbers of blocks and links are
//! not used again before that.

use super::block::Mode;
use super::block::Range;
use super::cache::CodeCache;
use super::linkage::Linkage;
use super::thunk::{Thunks, reason};
use crate::state::SPACES;
use hashbrown::HashTable;
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

fn hash(number: u64) -> u64 {
    let mut hasher = NumberHasher::default();
    hasher.write_u64(number);
    hasher.finish()
}

pub(super) type NumberMap<T> = HashMap<u64, T, BuildHasherDefault<NumberHasher>>;

/// A block. There are hundreds of thousands, so it is small.
#[derive(Debug)]
pub(super) struct Block {
    /// Number of its guest-physical page.
    page: u32,
    /// Cache offset of the entry for jumps through the jump cache.
    entry: u32,
    /// Bytes from there to the entry for jumps within the page.
    prologue: u16,
    /// Page offset of its first byte.
    start: u16,
    /// Number of its first hint.
    first_hint: u32,
    /// The last link that was made to jump here, or [`NONE`].
    incoming: u32,
    /// Page offset of the end of what it depends on from its start.
    end: u16,
    /// Two more ranges of bytes on which it depends: where they start, and how long they are.
    ahead: [u16; 2],
    ahead_len: [u8; 2],
    /// How many hints it has.
    hints: u16,
    pub mode: u8,
    /// What else there is to know of it: bits of [`about`].
    about: u8,
}

/// Bits of [`Block::about`].
mod about {
    /// It holds no instruction: the first is for the single-step tier.
    pub(super) const STEP: u8 = 1 << 0;
    /// It holds no instruction: the first reaches into the next page, and which that is, is not known here.
    pub(super) const CROSSES: u8 = 1 << 1;
    /// It holds one instruction, which reaches into a page of [`super::Store::seconds`].
    pub(super) const TWO_PAGES: u8 = 1 << 2;
    /// Bytes that it was made from have changed.
    pub(super) const DEAD: u8 = 1 << 3;
}

const _: () = assert!(size_of::<Block>() == 32);

/// No link.
const NONE: u32 = u32::MAX;

/// What is known of a block before it is added.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewBlock {
    /// Guest-physical address.
    pub address: u64,
    pub mode: u8,
    /// Cache offsets of the entries for jumps through the jump cache, and for jumps within the page.
    pub entries: [usize; 2],
    pub step: bool,
    pub crosses: bool,
    /// The page into which its only instruction reaches, and how far.
    pub second: Option<(u64, u16)>,
    /// Its hints: the number of the first, and how many.
    pub hints: (u32, u32),
    /// Bytes of its page on which it depends.
    pub ranges: [Range; 3],
}

impl Block {
    fn page(&self) -> u64 {
        u64::from(self.page) << 12
    }

    fn is(&self, bits: u8) -> bool {
        self.about & bits != 0
    }

    fn alive(&self) -> bool {
        !self.is(about::DEAD)
    }

    /// It holds no instruction: the first is for the single-step tier.
    pub(super) fn step(&self) -> bool {
        self.is(about::STEP)
    }

    /// It holds no instruction: the first reaches into the next page, and which that is, is not known here.
    pub(super) fn crosses(&self) -> bool {
        self.is(about::CROSSES)
    }

    /// Bytes of its page on which it depends.
    fn ranges(&self) -> [Range; 3] {
        let ahead = |i: usize| (self.ahead[i], self.ahead[i].saturating_add(u16::from(self.ahead_len[i])));
        [(self.start, self.end), ahead(0), ahead(1)]
    }

    /// Guest-physical address.
    pub(super) fn address(&self) -> u64 {
        self.page() | u64::from(self.start)
    }

    /// Cache offset of the entry for jumps through the jump cache.
    pub(super) fn entry(&self) -> usize {
        self.entry as usize
    }

    /// Cache offset of the entry for jumps within the page, and over bridges.
    pub(super) fn direct(&self) -> usize {
        self.entry as usize + usize::from(self.prologue)
    }

    /// Number of its first hint.
    pub(super) fn first_hint(&self) -> u32 {
        self.first_hint
    }
}

/// What stands before the stub of a direct jump, in the code cache: most jumps never run, and cost nothing else.
#[derive(Debug, Clone, Copy)]
pub(super) struct Note {
    /// Cache offset of what is patched: a link's displacement, the whole jump of a bridge.
    pub at: u32,
    /// Number of the link or bridge, or [`NONE`] if it has not run.
    pub number: u32,
    /// Page offset of the target.
    pub target: u16,
}

impl Note {
    /// Bytes in the cache.
    pub(super) const LEN: usize = 10;

    pub(super) fn bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.at.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..].copy_from_slice(&self.target.to_le_bytes());
        bytes
    }

    /// The note at a cache offset.
    pub(super) fn read(cache: &CodeCache, offset: u32) -> Self {
        let [a, b, c, d, e, f, g, h, i, j] = cache.read(offset as usize);
        Self {
            at: u32::from_le_bytes([a, b, c, d]),
            number: u32::from_le_bytes([e, f, g, h]),
            target: u16::from_le_bytes([i, j]),
        }
    }

    fn write(self, cache: &mut CodeCache, offset: u32) {
        cache.patch(offset as usize, &self.bytes());
    }

    /// Cache offset of the stub after the note at `offset`.
    fn stub(offset: u32) -> usize {
        offset as usize + Self::LEN
    }
}

/// A direct jump within a page that has run.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// Cache offset of its note.
    note: u32,
    /// The next link of those that jump to the same block, or [`NONE`].
    next: u32,
}

#[derive(Debug, Default)]
struct Page {
    blocks: Vec<u32>,
    /// One bit for each granule that a block depends on.
    granules: u128,
    slow_writes: u32,
}

#[derive(Default)]
pub(super) struct Store {
    pub blocks: Vec<Block>,
    links: Vec<Link>,
    /// Cache offsets of the notes of direct jumps to other pages that have run; numbered apart by privilege class.
    bridges: [Vec<u32>; 2],
    /// Bridges that lead somewhere, and the blocks they lead to, for the supervisor and by the user's address space.
    open: [Vec<(u32, u32)>; 1 + SPACES],
    /// Blocks that live and do not reach into a second page, by address and mode.
    index: HashTable<u32>,
    /// Into which page, and how far, the instructions of such blocks reach, by block.
    seconds: NumberMap<(u64, u16)>,
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
    address << Mode::BITS | u64::from(mode)
}

/// Bytes of a range; `None` if there are too many.
fn span((from, to): Range) -> Option<u8> {
    u8::try_from(to.saturating_sub(from)).ok()
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
        let after = self.blocks.partition_point(|block| block.first_hint <= hint);
        let block = self.blocks.get(after.checked_sub(1)?)?;
        (block.alive() && hint - block.first_hint < u32::from(block.hints)).then_some(block)
    }

    /// The block that starts at guest-physical `address`.
    pub(super) fn find(&self, address: u64, mode: u8) -> Option<u32> {
        let wanted = key(address, mode);
        self.index.find(hash(wanted), |&number| self.key(number) == wanted).copied()
    }

    /// What a block is found by.
    fn key(&self, number: u32) -> u64 {
        self.blocks.get(number as usize).map_or(u64::MAX, |block| key(block.address(), block.mode))
    }

    /// The block whose code is at a cache offset.
    fn at(&self, offset: u32) -> Option<&Block> {
        // Code is appended in the order of blocks.
        let after = self.blocks.partition_point(|block| block.entry <= offset);
        self.blocks.get(after.checked_sub(1)?)
    }

    /// The block of the instruction that starts at `address` and reaches into the page at `second`.
    pub(super) fn find_crossing(&self, address: u64, second: u64, mode: u8) -> Option<u32> {
        self.crossings.get(&(address, second, mode)).copied()
    }

    pub(super) fn get(&self, number: u32) -> Option<&Block> {
        self.blocks.get(number as usize)
    }

    /// Adds a block; answers its number. `None` if it is beyond what can be.
    pub(super) fn add(&mut self, new: NewBlock) -> Option<u32> {
        let [entry, direct] = new.entries;
        let number = u32::try_from(self.blocks.len()).ok()?;
        let block = Block {
            page: u32::try_from(new.address >> 12).ok()?,
            entry: u32::try_from(entry).ok()?,
            prologue: u16::try_from(direct.checked_sub(entry)?).ok()?,
            start: (new.address & 0xfff) as u16,
            first_hint: new.hints.0,
            incoming: NONE,
            end: new.ranges[0].1,
            ahead: [new.ranges[1].0, new.ranges[2].0],
            ahead_len: [span(new.ranges[1])?, span(new.ranges[2])?],
            hints: u16::try_from(new.hints.1).ok()?,
            mode: new.mode,
            about: [
                (new.step, about::STEP),
                (new.crosses, about::CROSSES),
                (new.second.is_some(), about::TWO_PAGES),
            ]
            .into_iter()
            .filter(|known| known.0)
            .fold(0, |bits, known| bits | known.1),
        };
        let page = self.pages.entry(block.page()).or_default();
        page.blocks.push(number);
        for (from, to) in block.ranges() {
            page.granules |= granules(u64::from(from), u64::from(to));
        }
        let wanted = key(new.address, block.mode);
        self.blocks.push(block);
        match new.second {
            None => {
                let blocks = &self.blocks;
                self.index.insert_unique(hash(wanted), number, |&number| {
                    let block = blocks.get(number as usize);
                    hash(block.map_or(u64::MAX, |block| key(block.address(), block.mode)))
                });
            }
            Some((second, len)) => {
                self.crossings.insert((new.address, second, new.mode), number);
                self.seconds.insert(u64::from(number), (second, len));
                let page = self.pages.entry(second).or_default();
                page.blocks.push(number);
                page.granules |= granules(0, u64::from(len));
            }
        }
        Some(number)
    }

    /// Lets the link with a note at a cache offset go to block `to`, if that is on the same page.
    pub(super) fn connect(&mut self, cache: &mut CodeCache, offset: u32, to: u32) {
        let mut note = Note::read(cache, offset);
        let from = self.at(note.at).map(|block| (block.page, block.alive()));
        let Some(block) = self.blocks.get_mut(to as usize) else { return };
        if !block.alive() || from != Some((block.page, true)) {
            return;
        }
        if note.number == NONE {
            note.number = self.links.len() as u32;
            note.write(cache, offset);
            self.links.push(Link { note: offset, next: NONE });
        }
        let Some(link) = self.links.get_mut(note.number as usize) else { return };
        link.next = std::mem::replace(&mut block.incoming, note.number);
        cache.patch_jump(note.at as usize, block.direct());
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
            if !block.alive() {
                // It died of a write to its other page.
                return false;
            }
            let second =
                if block.is(about::TWO_PAGES) { self.seconds.get(&u64::from(number)).copied() } else { None };
            let [a, b, c] = if block.page() == base { block.ranges() } else { [(0, 0); 3] };
            let reached = second.filter(|second| second.0 == base).map_or(0, |second| second.1);
            let ranges = [a, b, c, (0, reached)];
            let hit = ranges.iter().any(|r| u64::from(r.0) < to && u64::from(r.1) > from && r.0 < r.1);
            if !hit {
                for &(from, to) in &ranges {
                    page.granules |= granules(u64::from(from), u64::from(to));
                }
                return true;
            }
            killed += 1;
            block.about |= about::DEAD;
            match second {
                None => {
                    let hash = hash(key(block.address(), block.mode));
                    if let Ok(entry) = self.index.find_entry(hash, |&other| other == number) {
                        entry.remove();
                    }
                }
                Some((second, _)) => drop(self.crossings.remove(&(block.address(), second, block.mode))),
            }
            let mut incoming = std::mem::replace(&mut block.incoming, NONE);
            while let Some(link) = self.links.get_mut(incoming as usize) {
                cache.patch_jump(Note::read(cache, link.note).at as usize, Note::stub(link.note));
                incoming = std::mem::replace(&mut link.next, NONE);
            }
            // The jump cache may still lead here: look the address up again.
            cache.patch(block.entry(), &[0xe9]);
            cache.patch_jump(block.entry() + 1, thunks.exit(reason::LOOKUP));
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
        for (set, (array, open)) in linkage.bridges.iter_mut().zip(&mut self.open).enumerate() {
            let bridges = &self.bridges[usize::from(set > 0)];
            open.retain(|&(number, to)| {
                let alive = self.blocks.get(to as usize).is_some_and(|block| block.alive());
                if !alive {
                    close(bridges, number, cache, array);
                }
                alive
            });
        }
    }

    /// Takes all bridges of the supervisor, or of an address space, away: their pages may be others now.
    pub(super) fn close(&mut self, set: usize, cache: &CodeCache, linkage: &mut Linkage) {
        let (Some(open), Some(array)) = (self.open.get_mut(set), linkage.bridges.get_mut(set)) else {
            return;
        };
        for (number, _) in open.drain(..) {
            close(&self.bridges[usize::from(set > 0)], number, cache, array);
        }
    }

    /// How many bridges of a privilege class there are.
    pub(super) fn bridges(&self, class: usize) -> usize {
        self.bridges.get(class).map_or(0, Vec::len)
    }

    /// Lets a jump of a privilege class, with a note at a cache offset, be a bridge from now on, by the code that
    /// `jump` makes for its number; answers that. `None` if there are too many.
    pub(super) fn bridge(
        &mut self,
        class: usize,
        offset: u32,
        cache: &mut CodeCache,
        linkage: &mut Linkage,
        jump: impl FnOnce(usize) -> Vec<u8>,
    ) -> Option<u32> {
        let mut note = Note::read(cache, offset);
        if note.number != NONE {
            return Some(note.number);
        }
        let bridges = self.bridges.get_mut(class)?;
        let number = bridges.len();
        let arrays = if class == 0 { 0..1 } else { 1..1 + SPACES };
        for array in linkage.bridges.get_mut(arrays)? {
            *array.get_mut(number)? = cache.address(Note::stub(offset));
        }
        bridges.push(offset);
        note.number = number as u32;
        note.write(cache, offset);
        cache.patch(note.at as usize, &jump(number));
        Some(note.number)
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
        if let Some(block) = self.blocks.get(to as usize).filter(|block| block.alive() && !block.step())
            && let Some(open) = self.open.get_mut(array)
            && let Some(host) =
                linkage.bridges.get_mut(array).and_then(|array| array.get_mut(number as usize))
        {
            *host = cache.address(block.direct());
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
        self.bridges = Default::default();
        self.open = Default::default();
        self.index.clear();
        self.crossings.clear();
        self.seconds.clear();
        self.pages.clear();
    }
}

fn close(bridges: &[u32], number: u32, cache: &CodeCache, array: &mut [u64]) {
    if let Some(&note) = bridges.get(number as usize)
        && let Some(host) = array.get_mut(number as usize)
    {
        *host = cache.address(Note::stub(note));
    }
}
