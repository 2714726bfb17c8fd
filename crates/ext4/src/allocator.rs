//! Which blocks are in use. A bitmap exists only for block groups that hold more than their own descriptors' copies, so
//! that a large empty file system costs nothing.

use crate::BLOCK_BYTES;
use crate::layout::{BLOCKS_PER_GROUP, Layout};

const PER_GROUP: u64 = BLOCKS_PER_GROUP as u64;

type Bitmap = Box<[u8; BLOCK_BYTES]>;

/// One block group's share.
struct Group {
    free: u32,
    bitmap: Option<Bitmap>,
}

/// A run of neighbouring blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub start: u64,
    pub length: u32,
}

/// Hands out blocks front to back; when it reaches the end it starts over, for what was freed meanwhile.
pub(crate) struct Allocator {
    layout: Layout,
    groups: Vec<Group>,
    free: u64,
    cursor: (u32, u32),
}

impl Allocator {
    pub fn new(layout: Layout) -> Self {
        let free_in = |group| layout.group_length(group).saturating_sub(layout.metadata_in(group));
        let groups: Vec<Group> =
            (0..layout.groups).map(|group| Group { free: free_in(group), bitmap: None }).collect();
        let free = groups.iter().map(|group| u64::from(group.free)).sum();
        let mut this = Self { layout, groups, free, cursor: (0, 0) };
        for group in 0..this.layout.groups {
            // The kernel can derive a bitmap that covers only the base; anything more must be written. The last
            // group's is written too, as mke2fs does, for its padding.
            let derived = this.layout.metadata_in(group) == this.layout.base_blocks(group);
            if !derived || group == this.layout.groups.saturating_sub(1) {
                this.materialize(group);
            }
        }
        this
    }

    /// Free blocks of the whole file system.
    pub fn free(&self) -> u64 {
        self.free
    }

    pub fn free_in(&self, group: u32) -> u32 {
        self.groups.get(group as usize).map_or(0, |group| group.free)
    }

    /// The bitmap of a group, unless the kernel can derive it.
    pub fn bitmap(&self, group: u32) -> Option<&[u8; BLOCK_BYTES]> {
        self.groups.get(group as usize)?.bitmap.as_deref()
    }

    /// Takes up to `want` neighbouring blocks; `None` when nothing at all is free.
    pub fn take(&mut self, want: u32) -> Option<Run> {
        if self.free == 0 || want == 0 {
            return None;
        }
        let (first, from) = self.cursor;
        // One more than all groups: the first one is searched from the cursor, and at last from its start.
        for step in 0..=self.layout.groups {
            let group = first.wrapping_add(step).checked_rem(self.layout.groups)?;
            if self.free_in(group) == 0 {
                continue;
            }
            if let Some(run) = self.take_in(group, if step == 0 { from } else { 0 }, want) {
                return Some(run);
            }
        }
        None
    }

    /// Takes blocks of one group at or behind the bit `from`.
    fn take_in(&mut self, group: u32, from: u32, want: u32) -> Option<Run> {
        let end = self.layout.group_length(group);
        let start = self.layout.group_start(group);
        let bitmap = self.materialize(group)?;
        let first = next_clear(bitmap, from, end)?;
        let limit = end.min(first.saturating_add(want));
        let last = (first..limit).find(|&bit| is_set(bitmap, bit)).unwrap_or(limit);
        set_range(bitmap, first, last);
        let length = last.saturating_sub(first);
        self.count(group, |free, n| free.saturating_sub(n), length);
        self.free = self.free.saturating_sub(u64::from(length));
        self.cursor = (group, last);
        Some(Run { start: start.saturating_add(u64::from(first)), length })
    }

    /// Gives blocks back that were taken; a run may cross groups.
    pub fn give_back(&mut self, run: Run) {
        for block in (run.start..).take(run.length as usize) {
            let (group, bit) = ((block / PER_GROUP) as u32, (block % PER_GROUP) as u32);
            let Some(bitmap) = self.materialize(group) else { continue };
            debug_assert!(is_set(bitmap, bit), "block {block} is freed twice");
            if let Some(byte) = bitmap.get_mut((bit / 8) as usize) {
                *byte &= !(1 << (bit % 8));
            }
            self.count(group, |free, n| free.saturating_add(n), 1);
            self.free = self.free.saturating_add(1);
        }
    }

    fn count(&mut self, group: u32, change: impl Fn(u32, u32) -> u32, by: u32) {
        if let Some(group) = self.groups.get_mut(group as usize) {
            group.free = change(group.free, by);
        }
    }

    /// Gives a group a bitmap with its metadata, and with the bits behind its end set.
    fn materialize(&mut self, group: u32) -> Option<&mut [u8; BLOCK_BYTES]> {
        let used = self.layout.metadata_in(group);
        let length = self.layout.group_length(group);
        let slot = &mut self.groups.get_mut(group as usize)?.bitmap;
        let bitmap = slot.get_or_insert_with(|| {
            let mut bitmap = Box::new([0; BLOCK_BYTES]);
            set_range(&mut bitmap, 0, used);
            set_range(&mut bitmap, length, BLOCKS_PER_GROUP);
            bitmap
        });
        Some(bitmap)
    }
}

fn is_set(bitmap: &[u8; BLOCK_BYTES], bit: u32) -> bool {
    bitmap.get((bit / 8) as usize).is_none_or(|byte| byte & (1 << (bit % 8)) != 0)
}

/// The first clear bit in `from..end`.
fn next_clear(bitmap: &[u8; BLOCK_BYTES], from: u32, end: u32) -> Option<u32> {
    let mut bit = from;
    while bit < end {
        if bit.is_multiple_of(8) && bitmap.get((bit / 8) as usize) == Some(&0xff) {
            bit = bit.saturating_add(8);
        } else if is_set(bitmap, bit) {
            bit = bit.saturating_add(1);
        } else {
            return Some(bit);
        }
    }
    None
}

/// Sets the bits `from..to`.
pub(crate) fn set_range(bitmap: &mut [u8; BLOCK_BYTES], from: u32, to: u32) {
    let mut bit = from;
    while bit < to {
        let Some(byte) = bitmap.get_mut((bit / 8) as usize) else { return };
        if bit.is_multiple_of(8) && to.saturating_sub(bit) >= 8 {
            *byte = 0xff;
            bit = bit.saturating_add(8);
        } else {
            *byte |= 1 << (bit % 8);
            bit = bit.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_handed_out_once_and_can_come_back() {
        let layout = Layout::new(300 << 20).unwrap();
        let mut allocator = Allocator::new(layout.clone());
        let total = allocator.free();
        let mut seen = std::collections::HashSet::new();
        let mut runs = Vec::new();
        while let Some(run) = allocator.take(999) {
            assert!((run.start..run.start + u64::from(run.length)).all(|block| seen.insert(block)));
            runs.push(run);
        }
        assert_eq!((allocator.free(), seen.len() as u64), (0, total));
        assert!(seen.iter().all(|&block| block < layout.blocks));
        allocator.give_back(runs[3]);
        assert_eq!(allocator.take(5000), Some(runs[3]));
        assert_eq!(allocator.take(1), None);
    }
}
