//! The resize inode: it owns the blocks reserved for more group descriptors, so that a mounted file system can grow
//! (kernel docs: ext4/special_inodes; e2fsprogs `lib/ext2fs/res_gdt.c` defines the mapping).
//!
//! Its double indirect block points to the reserved blocks behind the primary descriptors; each of them, in turn, is an
//! indirect block that points to its own copies in the groups with backups.

use crate::BLOCK_BYTES;
use crate::extent::ROOT_BYTES;
use crate::layout::Layout;
use crate::record::{low32, put};

/// Block numbers in an indirect block.
const POINTERS: u64 = 1024;
/// What twelve direct, one indirect and one double indirect block can map: the size that `e2fsck` expects.
pub(crate) const SIZE: u64 = (12 + POINTERS + POINTERS * POINTERS) * crate::BLOCK_SIZE;
/// `i_block` with a double indirect block.
const DOUBLE_INDIRECT: usize = 13;

/// What the resize inode consists of.
pub(crate) struct Resize {
    /// `i_block`.
    pub block: [u8; ROOT_BYTES],
    /// Blocks that the inode owns.
    pub blocks: u64,
    /// Blocks to be written, by number.
    pub content: Vec<(u64, Vec<u8>)>,
}

impl Resize {
    pub fn new(layout: &Layout, double_indirect: u64) -> Self {
        let mut block = [0; ROOT_BYTES];
        put(&mut block, DOUBLE_INDIRECT * 4, &low32(double_indirect).to_le_bytes());
        let first = u64::from(layout.descriptor_blocks).saturating_add(1);
        let reserved = u64::from(layout.reserved_descriptor_blocks);
        let copies: Vec<u64> = (1..layout.groups)
            .filter(|&group| layout.has_superblock(group))
            .map(|group| layout.group_start(group))
            .collect();
        let mut top = vec![0; BLOCK_BYTES];
        let mut content = Vec::new();
        for number in first..first.saturating_add(reserved) {
            let position = (number.saturating_sub(1) % POINTERS) as usize;
            put(&mut top, position.saturating_mul(4), &low32(number).to_le_bytes());
            let mut pointers: Vec<u8> =
                copies.iter().flat_map(|start| low32(start.saturating_add(number)).to_le_bytes()).collect();
            pointers.resize(BLOCK_BYTES, 0);
            if !copies.is_empty() {
                content.push((number, pointers));
            }
        }
        content.push((double_indirect, top));
        let each = (copies.len() as u64).saturating_add(1);
        Self { block, blocks: reserved.saturating_mul(each).saturating_add(1), content }
    }
}
