//! The superblock and the group descriptors (kernel docs: ext4/super, ext4/group_descr).

use crate::checksum::Checksum;
use crate::extent::ROOT_BYTES;
use crate::inode;
use crate::layout::{BLOCKS_PER_GROUP, DESCRIPTOR_SIZE, INODE_SIZE, LOG_GROUPS_PER_FLEX, Layout};
use crate::record::{Record, high16, high32, low16, low32, put};
use crate::writer::Options;

pub(crate) const SUPERBLOCK_BYTES: usize = 1024;
const CHECKSUM: usize = 1020;

/// `s_feature_compat`: ext_attr, resize_inode, dir_index.
const COMPATIBLE: u32 = 0x8 | 0x10 | 0x20;
const HAS_JOURNAL: u32 = 0x4;
/// `s_feature_incompat`: filetype, extents, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// `s_feature_ro_compat`: sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;
const STATE_CLEAN: u16 = 1;
const ERRORS_CONTINUE: u16 = 1;
/// user_xattr and acl.
const DEFAULT_MOUNT_OPTIONS: u32 = 0xc;
const HASH_HALF_MD4: u8 = 1;
const FLAG_SIGNED_HASH: u32 = 1;
const CHECKSUM_CRC32C: u8 = 1;

/// What a superblock says beside the geometry.
pub(crate) struct Superblock<'a> {
    pub layout: &'a Layout,
    pub options: &'a Options,
    pub blocks_free: u64,
    pub inodes_free: u32,
    /// `i_block` and size of the journal's inode, if there is a journal.
    pub journal: Option<([u8; ROOT_BYTES], u64)>,
}

impl Superblock<'_> {
    /// The superblock as it stands in `group`.
    pub fn encode(&self, group: u32) -> Vec<u8> {
        let mut record = Record::new();
        self.counts(&mut record);
        self.identity(&mut record, group);
        self.journal_copy(&mut record);
        self.wide_fields(&mut record);
        let mut bytes = record.take(SUPERBLOCK_BYTES);
        let checksum = Checksum::start().add(bytes.get(..CHECKSUM).unwrap_or_default()).value();
        put(&mut bytes, CHECKSUM, &checksum.to_le_bytes());
        bytes
    }

    fn now(&self) -> u32 {
        self.options.timestamp.clamp(0, i64::from(u32::MAX)) as u32
    }

    fn counts(&self, record: &mut Record) {
        let layout = self.layout;
        let now = self.now();
        // No blocks are reserved for root; the first data block of 4 KiB blocks is 0.
        record.u32(layout.inodes()).u32(low32(layout.blocks)).u32(0).u32(low32(self.blocks_free));
        record.u32(self.inodes_free).u32(0);
        // Sizes of blocks and clusters: 1024 << 2.
        record.u32(2).u32(2).u32(BLOCKS_PER_GROUP).u32(BLOCKS_PER_GROUP).u32(layout.inodes_per_group);
        // Never mounted, last written now, and no check by number of mounts.
        record.u32(0).u32(now).u16(0).u16(0xffff);
        record.u16(0xef53).u16(STATE_CLEAN).u16(ERRORS_CONTINUE).u16(0);
        record.u32(now).u32(0).u32(0).u32(1);
    }

    fn identity(&self, record: &mut Record, group: u32) {
        let compatible = COMPATIBLE | if self.journal.is_some() { HAS_JOURNAL } else { 0 };
        record.at(0x50).u16(0).u16(0).u32(inode::FIRST).u16(INODE_SIZE as u16).u16(low16(group));
        record.u32(compatible).u32(INCOMPATIBLE).u32(READ_ONLY_COMPATIBLE);
        record.bytes(&self.options.uuid).bytes(self.options.label.as_bytes());
        record.at(0xce).u16(low16(self.layout.reserved_descriptor_blocks));
    }

    fn journal_copy(&self, record: &mut Record) {
        let now = self.now();
        record.at(0xe0).u32(if self.journal.is_some() { inode::JOURNAL } else { 0 });
        record.at(0xec).bytes(&self.options.hash_seed).u8(HASH_HALF_MD4);
        record.u8(u8::from(self.journal.is_some())).u16(DESCRIPTOR_SIZE as u16);
        record.u32(DEFAULT_MOUNT_OPTIONS).u32(0).u32(now);
        if let Some((block, size)) = &self.journal {
            record.bytes(block).u32(high32(*size)).u32(low32(*size));
        }
    }

    fn wide_fields(&self, record: &mut Record) {
        record.at(0x150).u32(high32(self.layout.blocks)).u32(0).u32(high32(self.blocks_free));
        // Fixed fields that all inodes have, and that new ones shall have.
        record.u16(32).u16(32).u32(FLAG_SIGNED_HASH);
        record.at(0x174).u8(LOG_GROUPS_PER_FLEX).u8(CHECKSUM_CRC32C);
    }
}

/// `bg_flags`: the inode bitmap is not written, all of the group's inodes are free.
pub(crate) const INODE_UNINIT: u16 = 1;
/// `bg_flags`: the block bitmap is not written, only the group's metadata is in use.
pub(crate) const BLOCK_UNINIT: u16 = 2;
/// `bg_flags`: the inode table is zero where it is unused, so the kernel need not wipe it.
pub(crate) const INODE_ZEROED: u16 = 4;

/// One group's counts and checksums; the rest of its descriptor follows from the layout.
#[derive(Default)]
pub(crate) struct Descriptor {
    pub blocks_free: u32,
    pub inodes_free: u32,
    /// Inodes at the end of the table that were never used.
    pub inodes_unused: u32,
    pub directories: u32,
    pub flags: u16,
    pub block_bitmap_checksum: u32,
    pub inode_bitmap_checksum: u32,
}

impl Descriptor {
    pub fn encode(&self, layout: &Layout, group: u32, seed: Checksum) -> Vec<u8> {
        let (blocks, inodes) = (layout.block_bitmap(group), layout.inode_bitmap(group));
        let table = layout.inode_table(group);
        let mut record = Record::new();
        record.u32(low32(blocks)).u32(low32(inodes)).u32(low32(table));
        record.u16(low16(self.blocks_free)).u16(low16(self.inodes_free)).u16(low16(self.directories));
        record.u16(self.flags).u32(0);
        record.u16(low16(self.block_bitmap_checksum)).u16(low16(self.inode_bitmap_checksum));
        record.u16(low16(self.inodes_unused)).u16(0);
        record.u32(high32(blocks)).u32(high32(inodes)).u32(high32(table));
        record.u16(high16(self.blocks_free)).u16(high16(self.inodes_free)).u16(high16(self.directories));
        record.u16(high16(self.inodes_unused)).u32(0);
        record.u16(high16(self.block_bitmap_checksum)).u16(high16(self.inode_bitmap_checksum));
        let mut bytes = record.take(DESCRIPTOR_SIZE);
        let checksum = seed.add(&group.to_le_bytes()).add(&bytes).value();
        put(&mut bytes, 30, &low16(checksum).to_le_bytes());
        bytes
    }
}
