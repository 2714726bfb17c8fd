//! Where things are: block groups, their backups, bitmaps and inode tables (kernel docs: ext4/blockgroup).
//!
//! Sixteen block groups form a flexible group, whose bitmaps and inode tables lie together in its first group, behind
//! the superblock copy, the descriptors and the blocks reserved for more descriptors if that group has these. All
//! numbers are block numbers below 2^32, so sums in `u64` cannot overflow.

use crate::BLOCK_SIZE;
use crate::error::{Error, Result};

pub(crate) const BLOCKS_PER_GROUP: u32 = 32768;
/// One inode for this many bytes, as `mke2fs` does by default.
const BYTES_PER_INODE: u64 = 16384;
pub(crate) const INODE_SIZE: u32 = 256;
const INODES_PER_BLOCK: u32 = 16;
pub(crate) const DESCRIPTOR_SIZE: usize = 64;
const DESCRIPTORS_PER_BLOCK: u32 = 64;
/// log2 of the groups in a flexible group.
pub(crate) const LOG_GROUPS_PER_FLEX: u8 = 4;
const GROUPS_PER_FLEX: u32 = 1 << LOG_GROUPS_PER_FLEX;
/// Descriptor blocks are reserved for growing this many times before the kernel must turn to `meta_bg`.
const GROWTH: u64 = 64;
/// What one double indirect block can point to.
const RESERVED_DESCRIPTOR_BLOCKS_MAX: u64 = 1024;
/// A last group with less free space than this is left out, as `mke2fs` does.
const USEFUL_BLOCKS: u32 = 50;
pub(crate) const SIZE_MAX: u64 = (u32::MAX as u64) * BLOCK_SIZE;
/// Certainly enough for an empty file system.
pub(crate) const SIZE_SURE: u64 = 1 << 20;
/// A larger journal would only delay replay for a guest's root disk.
const JOURNAL_BLOCKS_MAX: u32 = 16384;

/// The geometry of one file system.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub blocks: u64,
    pub groups: u32,
    pub descriptor_blocks: u32,
    pub reserved_descriptor_blocks: u32,
    pub inodes_per_group: u32,
}

impl Layout {
    pub fn new(size: u64) -> Result<Self> {
        if size > SIZE_MAX {
            return Err(Error::TooLarge { size, most: SIZE_MAX });
        }
        let mut blocks = size / BLOCK_SIZE;
        loop {
            let layout = Self::with_blocks(blocks);
            let Some(last) = layout.groups.checked_sub(1) else {
                return Err(Error::TooSmall { size, least: SIZE_SURE });
            };
            let needed = layout.metadata_in(last).saturating_add(USEFUL_BLOCKS);
            if layout.group_length(last) >= needed {
                return Ok(layout);
            }
            blocks = layout.group_start(last);
        }
    }

    fn with_blocks(blocks: u64) -> Self {
        let per_group = u64::from(BLOCKS_PER_GROUP);
        let groups = blocks.div_ceil(per_group) as u32;
        let descriptor_blocks = groups.div_ceil(DESCRIPTORS_PER_BLOCK);
        let grown = blocks.saturating_mul(GROWTH).min(u64::from(u32::MAX));
        let reserved = grown
            .div_ceil(per_group)
            .div_ceil(u64::from(DESCRIPTORS_PER_BLOCK))
            .saturating_sub(u64::from(descriptor_blocks))
            .clamp(1, RESERVED_DESCRIPTOR_BLOCKS_MAX);
        let inodes = (blocks.saturating_mul(BLOCK_SIZE) / BYTES_PER_INODE) as u32;
        let inodes_per_group = inodes.div_ceil(groups.max(1)).max(1).next_multiple_of(INODES_PER_BLOCK);
        Self {
            blocks,
            groups,
            descriptor_blocks,
            reserved_descriptor_blocks: reserved as u32,
            inodes_per_group,
        }
    }

    pub fn inodes(&self) -> u32 {
        self.groups.saturating_mul(self.inodes_per_group)
    }

    /// Blocks of one group's inode table.
    pub fn inode_table_blocks(&self) -> u32 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    pub fn group_start(&self, group: u32) -> u64 {
        u64::from(group).saturating_mul(u64::from(BLOCKS_PER_GROUP))
    }

    pub fn group_length(&self, group: u32) -> u32 {
        self.blocks.saturating_sub(self.group_start(group)).min(u64::from(BLOCKS_PER_GROUP)) as u32
    }

    /// Whether a group starts with a copy of the superblock and descriptors (`sparse_super`).
    pub fn has_superblock(&self, group: u32) -> bool {
        let power_of = |base: u32| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        group <= 1 || power_of(3) || power_of(5) || power_of(7)
    }

    /// Blocks of a group's superblock copy, descriptors and reserved descriptor blocks.
    pub fn base_blocks(&self, group: u32) -> u32 {
        if !self.has_superblock(group) {
            return 0;
        }
        self.descriptor_blocks.saturating_add(self.reserved_descriptor_blocks).saturating_add(1)
    }

    /// Blocks at the start of a group that hold metadata: its own base and, in the first group of a flexible group,
    /// the bitmaps and inode tables of all.
    pub fn metadata_in(&self, group: u32) -> u32 {
        let base = self.base_blocks(group);
        if !group.is_multiple_of(GROUPS_PER_FLEX) {
            return base;
        }
        let each = self.inode_table_blocks().saturating_add(2);
        base.saturating_add(each.saturating_mul(self.groups_in_flex(group)))
    }

    pub fn block_bitmap(&self, group: u32) -> u64 {
        self.flex_start(group).saturating_add(u64::from(group % GROUPS_PER_FLEX))
    }

    pub fn inode_bitmap(&self, group: u32) -> u64 {
        self.block_bitmap(group).saturating_add(u64::from(self.groups_in_flex(group)))
    }

    pub fn inode_table(&self, group: u32) -> u64 {
        let tables = u64::from(self.groups_in_flex(group)).saturating_mul(2);
        let before = u64::from(group % GROUPS_PER_FLEX).saturating_mul(u64::from(self.inode_table_blocks()));
        self.flex_start(group).saturating_add(tables).saturating_add(before)
    }

    fn flex_first(&self, group: u32) -> u32 {
        group.saturating_sub(group % GROUPS_PER_FLEX)
    }

    fn groups_in_flex(&self, group: u32) -> u32 {
        self.groups.saturating_sub(self.flex_first(group)).min(GROUPS_PER_FLEX)
    }

    /// First block behind the base of the flexible group's first group.
    fn flex_start(&self, group: u32) -> u64 {
        let first = self.flex_first(group);
        self.group_start(first).saturating_add(u64::from(self.base_blocks(first)))
    }

    /// Blocks of the journal: the steps of `mke2fs`, up to 64 MiB; 0 where a journal would not fit.
    pub fn journal_blocks(&self) -> u32 {
        match self.blocks {
            0..2048 => 0,
            2048..32768 => 1024,
            32768..262_144 => 4096,
            262_144..524_288 => 8192,
            _ => JOURNAL_BLOCKS_MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_are_where_sparse_super_puts_them() {
        let layout = Layout::new(64 << 30).unwrap();
        let backups: Vec<u32> = (0..130).filter(|&group| layout.has_superblock(group)).collect();
        assert_eq!(backups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn a_useless_last_group_is_left_out() {
        let layout = Layout::new((512 << 20) + 20 * BLOCK_SIZE).unwrap();
        assert_eq!((layout.groups, layout.blocks), (4, 131_072));
        assert!(matches!(Layout::new(40 * BLOCK_SIZE), Err(Error::TooSmall { .. })));
        assert!(Layout::new(SIZE_SURE).is_ok());
    }

    #[test]
    fn metadata_never_overlaps_and_stays_inside() {
        for size in [SIZE_SURE, 100 << 20, 512 << 20, 5 << 30, (2 << 30) + (3 << 20), SIZE_MAX] {
            let layout = Layout::new(size).unwrap();
            for group in (0..layout.groups).take(40) {
                assert!(layout.metadata_in(group) <= layout.group_length(group), "{size} {group}");
                let end = layout.inode_table(group) + u64::from(layout.inode_table_blocks());
                let first = layout.flex_first(group);
                assert!(end <= layout.group_start(first) + u64::from(layout.metadata_in(first)));
                assert!(layout.inode_bitmap(group) < layout.inode_table(first));
            }
        }
    }
}
