//! Finishing: everything that can only be written when all files are known. Directories and extent trees get their
//! blocks, inodes fill their tables, then come bitmaps, descriptors and superblocks.

use crate::allocator::{Allocator, set_range};
use crate::directory::{Builder, Entry};
use crate::error::{Error, Result};
use crate::extent::{ExtentMap, ROOT_BYTES};
use crate::inode::{self, FLAG_EXTENTS, FLAG_INDEX, Inode};
use crate::layout::INODE_SIZE;
use crate::superblock::{BLOCK_UNINIT, Descriptor, INODE_UNINIT, INODE_ZEROED, Superblock};
use crate::target::{Gather, Target};
use crate::tree::{Body, Directory, Node};
use crate::writer::{Summary, Writer, full};
use crate::{BLOCK_BYTES, BLOCK_SIZE, checksum::Checksum};

/// The count above which `dir_nlink` gives up counting and stores 1.
const DIRECTORY_LINKS_MAX: u32 = 64999;
/// Where the first superblock is.
const SUPERBLOCK_OFFSET: u64 = 1024;

/// What the inode says of a file's content.
struct Content {
    size: u64,
    blocks: u64,
    flags: u32,
    block: [u8; ROOT_BYTES],
    links: u16,
}

impl<T: Target> Writer<T> {
    /// Writes all that is left. The image is valid only if this succeeds.
    pub fn finish(mut self) -> Result<Summary> {
        let seed = Checksum::seed(&self.options.uuid);
        let mut descriptors = Vec::with_capacity(self.layout.groups as usize);
        let mut journal = None;
        for group in 0..self.layout.groups {
            descriptors.push(self.finish_inodes(group, seed, &mut journal)?);
        }
        for (group, descriptor) in (0..).zip(&mut descriptors) {
            self.finish_blocks(group, seed, descriptor)?;
        }
        let summary = self.summarize(&descriptors);
        self.finish_superblocks(&descriptors, seed, &summary, journal)?;
        self.sink.flush()?;
        Ok(summary)
    }

    fn summarize(&self, descriptors: &[Descriptor]) -> Summary {
        Summary {
            size: self.layout.blocks.saturating_mul(BLOCK_SIZE),
            free: self.allocator.free().saturating_mul(BLOCK_SIZE),
            inodes: self.layout.inodes(),
            inodes_free: descriptors.iter().map(|descriptor| descriptor.inodes_free).sum(),
            directories: descriptors.iter().map(|descriptor| descriptor.directories).sum(),
        }
    }

    /// Gives a group's inodes their blocks, then writes inode table and bitmap.
    fn finish_inodes(
        &mut self,
        group: u32,
        seed: Checksum,
        journal: &mut Option<([u8; ROOT_BYTES], u64)>,
    ) -> Result<Descriptor> {
        let per_group = self.layout.inodes_per_group;
        let first = group.saturating_mul(per_group).saturating_add(1);
        let end = self.tree.end().min(first.saturating_add(per_group));
        let mut descriptor =
            Descriptor { inodes_free: per_group, inodes_unused: per_group, ..Descriptor::default() };
        descriptor.flags = INODE_ZEROED;
        if first >= end {
            descriptor.flags |= INODE_UNINIT;
            return Ok(descriptor);
        }
        let mut table = Vec::with_capacity((end.saturating_sub(first)).saturating_mul(INODE_SIZE) as usize);
        let mut bitmap = Box::new([0; BLOCK_BYTES]);
        set_range(&mut bitmap, per_group, u32::MAX);
        for (position, number) in (first..end).enumerate() {
            let used = number < inode::FIRST || self.tree.node(number).is_some();
            if used {
                let bit = position as u32;
                set_range(&mut bitmap, bit, bit.saturating_add(1));
                descriptor.inodes_free = descriptor.inodes_free.saturating_sub(1);
                descriptor.inodes_unused = per_group.saturating_sub(bit).saturating_sub(1);
            }
            if self.tree.directory(number).is_some() {
                descriptor.directories = descriptor.directories.saturating_add(1);
            }
            let (bytes, content) = self.finish_inode(number, seed)?;
            table.extend(bytes);
            if number == inode::JOURNAL {
                *journal = content.map(|content| (content.block, content.size));
            }
        }
        self.sink.blocks(self.layout.inode_table(group), &table)?;
        self.sink.blocks(self.layout.inode_bitmap(group), bitmap.as_slice())?;
        let covered = bitmap.get(..(per_group / 8) as usize).unwrap_or_default();
        descriptor.inode_bitmap_checksum = seed.add(covered).value();
        Ok(descriptor)
    }

    /// The bytes of one inode, zero if it is not in use.
    fn finish_inode(&mut self, number: u32, seed: Checksum) -> Result<(Vec<u8>, Option<Content>)> {
        let seed = seed.of_inode(number);
        let Some(content) = self.finish_content(number, seed)? else {
            return Ok((vec![0; INODE_SIZE as usize], None));
        };
        let Some(node) = self.tree.node(number) else {
            return Ok((vec![0; INODE_SIZE as usize], None));
        };
        let inode = Inode {
            file_type: node.file_type(),
            meta: &node.meta,
            links: content.links,
            size: content.size,
            blocks: content.blocks,
            flags: content.flags,
            block: content.block,
            made: self.options.timestamp,
        };
        Ok((inode.encode(seed)?, Some(content)))
    }

    /// Writes a directory's blocks and an extent tree's.
    fn finish_content(&mut self, number: u32, seed: Checksum) -> Result<Option<Content>> {
        let Some(node) = self.tree.node(number) else { return Ok(None) };
        let links = node.links;
        let plain = |block| Content { size: 0, blocks: 0, flags: 0, block, links };
        let content = match &node.body {
            Body::Device { major, minor, .. } => Some(plain(inode::device_numbers(*major, *minor))),
            Body::Mapped { block, size, blocks } => {
                Some(Content { size: *size, blocks: *blocks, ..plain(*block) })
            }
            Body::Symlink { target, map } if map.data_blocks() == 0 => {
                let mut block = [0; ROOT_BYTES];
                crate::record::put(&mut block, 0, target);
                Some(Content { size: target.len() as u64, ..plain(block) })
            }
            Body::Symlink { target, map } => {
                let stored = store_map(&mut self.allocator, &mut self.sink, map, seed)?;
                stored.map(|content| Content { size: target.len() as u64, links, ..content })
            }
            Body::File { size, map } => {
                let stored = store_map(&mut self.allocator, &mut self.sink, map, seed)?;
                stored.map(|content| Content { size: *size, links, ..content })
            }
            Body::Directory(directory) => {
                let links = directory.subdirectories.saturating_add(2);
                let links = if links > DIRECTORY_LINKS_MAX { 1 } else { links as u16 };
                let (bytes, indexed) = self.directory_blocks(number, directory, seed)?;
                let content = self.store_directory(number, &bytes, seed)?;
                let index = if indexed { FLAG_INDEX } else { 0 };
                return Ok(Some(Content { links, flags: content.flags | index, ..content }));
            }
        };
        match content {
            Some(content) => Ok(Some(content)),
            None => Err(self.full_at(number, node.map().map_or(0, ExtentMap::tree_blocks))),
        }
    }

    fn store_directory(&mut self, number: u32, bytes: &[u8], seed: Checksum) -> Result<Content> {
        let mut map = ExtentMap::default();
        let mut rest = bytes;
        let mut logical = 0_u32;
        while !rest.is_empty() {
            let want = rest.len().div_ceil(BLOCK_BYTES) as u32;
            let Some(run) = self.allocator.take(want) else {
                return Err(self.full_at(number, u64::from(want)));
            };
            let length = (run.length as usize).saturating_mul(BLOCK_BYTES);
            let (now, later) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            self.sink.blocks(run.start, now)?;
            map.push(logical, run);
            logical = logical.saturating_add(run.length);
            rest = later;
        }
        let Some(mut content) = store_map(&mut self.allocator, &mut self.sink, &map, seed)? else {
            return Err(self.full_at(number, map.tree_blocks()));
        };
        content.size = bytes.len() as u64;
        Ok(content)
    }

    fn directory_blocks(
        &self,
        number: u32,
        directory: &Directory,
        seed: Checksum,
    ) -> Result<(Vec<u8>, bool)> {
        let entries: Vec<Entry<'_>> = directory
            .entries
            .iter()
            .filter_map(|(name, &inode)| {
                let file_type = self.tree.node(inode)?.file_type();
                Some(Entry { name, inode, file_type })
            })
            .collect();
        let builder = Builder {
            inode: number,
            parent: directory.parent,
            checksum: seed,
            hash_seed: &self.options.hash_seed,
        };
        builder.build(&entries)
    }

    /// The disk is full at inode `number`, which lacks `here` blocks: counts what the inodes behind it need too.
    fn full_at(&self, number: u32, here: u64) -> Error {
        let mut missing = here;
        for later in number.saturating_add(1)..self.tree.end() {
            let blocks = match self.tree.node(later) {
                Some(Node { body: Body::Directory(directory), .. }) => self
                    .directory_blocks(later, directory, Checksum::start())
                    .map_or(0, |(bytes, _)| bytes.len() as u64 / BLOCK_SIZE),
                Some(node) => node.map().map_or(0, ExtentMap::tree_blocks),
                None => 0,
            };
            missing = missing.saturating_add(blocks);
        }
        full(b"its directories", missing.saturating_mul(BLOCK_SIZE))
    }

    fn finish_blocks(&mut self, group: u32, seed: Checksum, descriptor: &mut Descriptor) -> Result<()> {
        descriptor.blocks_free = self.allocator.free_in(group);
        let Some(bitmap) = self.allocator.bitmap(group) else {
            descriptor.flags |= BLOCK_UNINIT;
            return Ok(());
        };
        descriptor.block_bitmap_checksum = seed.add(bitmap).value();
        self.sink.blocks(self.layout.block_bitmap(group), bitmap)
    }

    /// Writes superblock and descriptors, in group 0 and wherever they have copies.
    fn finish_superblocks(
        &mut self,
        descriptors: &[Descriptor],
        seed: Checksum,
        summary: &Summary,
        journal: Option<([u8; ROOT_BYTES], u64)>,
    ) -> Result<()> {
        let mut table = Vec::new();
        for (group, descriptor) in (0..).zip(descriptors) {
            table.extend(descriptor.encode(&self.layout, group, seed));
        }
        let superblock = Superblock {
            layout: &self.layout,
            options: &self.options,
            blocks_free: self.allocator.free(),
            inodes_free: summary.inodes_free,
            journal,
        };
        for group in (0..self.layout.groups).filter(|&group| self.layout.has_superblock(group)) {
            let start = self.layout.group_start(group);
            let offset = if group == 0 { SUPERBLOCK_OFFSET } else { start.saturating_mul(BLOCK_SIZE) };
            self.sink.at(offset, &superblock.encode(group))?;
            self.sink.at(start.saturating_add(1).saturating_mul(BLOCK_SIZE), &table)?;
        }
        Ok(())
    }
}

/// Writes the blocks of an extent tree. `None` when the disk is full.
fn store_map<T: Target>(
    allocator: &mut Allocator,
    sink: &mut Gather<T>,
    map: &ExtentMap,
    seed: Checksum,
) -> Result<Option<Content>> {
    let Some(tree) = map.build(allocator, seed) else { return Ok(None) };
    for (block, bytes) in &tree.blocks {
        sink.blocks(*block, bytes)?;
    }
    let blocks = map.data_blocks().saturating_add(tree.blocks.len() as u64);
    Ok(Some(Content { size: 0, blocks, flags: FLAG_EXTENTS, block: tree.root, links: 1 }))
}
