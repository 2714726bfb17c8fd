//! Directory blocks: one linear block, or an htree as soon as one block is not enough (kernel docs: ext4/directory).

use crate::BLOCK_BYTES;
use crate::checksum::Checksum;
use crate::error::{Error, Result};
use crate::half_md4::half_md4;
use crate::inode::FileType;
use crate::record::{Record, put};

/// A leaf ends with a false entry of 12 bytes that holds its checksum.
const LEAF_END: usize = BLOCK_BYTES - 12;
/// Index entries behind `.`, `..` and the htree's header in the first block, before the checksum.
const ROOT_LIMIT: usize = 507;
/// Index entries in other index blocks.
const NODE_LIMIT: usize = 510;
const HASH_HALF_MD4: u8 = 1;

/// A name in a directory.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub name: &'a [u8],
    pub inode: u32,
    pub file_type: FileType,
}

/// A directory with its own number and its parent's.
pub(crate) struct Builder<'a> {
    pub inode: u32,
    pub parent: u32,
    /// Of the directory's inode.
    pub checksum: Checksum,
    pub hash_seed: &'a [u8; 16],
}

impl Builder<'_> {
    /// All blocks of the directory, and whether they are an htree. `entries` come sorted by name.
    pub fn build(&self, entries: &[Entry<'_>]) -> Result<(Vec<u8>, bool)> {
        let mut leaf = Leaf::default();
        leaf.push(b".", self.inode, FileType::Directory);
        leaf.push(b"..", self.parent, FileType::Directory);
        for entry in entries {
            if !leaf.has_room(entry.name) {
                return Ok((self.htree(entries)?, true));
            }
            leaf.push(entry.name, entry.inode, entry.file_type);
        }
        Ok((leaf.seal(self.checksum), false))
    }

    fn htree(&self, entries: &[Entry<'_>]) -> Result<Vec<u8>> {
        let (leaves, mut hashes) = self.leaves(entries);
        let mut blocks = Vec::with_capacity(leaves.len().saturating_add(2).saturating_mul(BLOCK_BYTES));
        let too_large = || Error::DirectoryTooLarge { inode: self.inode, entries: entries.len() };
        if hashes.len() <= ROOT_LIMIT {
            number(&mut hashes, 1);
            blocks.extend(self.root(0, &hashes));
        } else {
            let nodes = hashes.len().div_ceil(NODE_LIMIT);
            if nodes > ROOT_LIMIT {
                return Err(too_large());
            }
            number(&mut hashes, nodes.saturating_add(1) as u32);
            let mut top: Vec<Pointer> =
                hashes.chunks(NODE_LIMIT).filter_map(|c| c.first().copied()).collect();
            number(&mut top, 1);
            blocks.extend(self.root(1, &top));
            for pointers in hashes.chunks(NODE_LIMIT) {
                let mut node = Record::new();
                node.u32(0).u16(BLOCK_BYTES as u16).u16(0);
                blocks.extend(self.index(node, pointers, NODE_LIMIT));
            }
        }
        for leaf in leaves {
            blocks.extend(leaf.seal(self.checksum));
        }
        Ok(blocks)
    }

    /// Leaves in the order of their names' hashes, and the least hash of each.
    fn leaves(&self, entries: &[Entry<'_>]) -> (Vec<Leaf>, Vec<Pointer>) {
        let mut hashed: Vec<((u32, u32), Entry<'_>)> =
            entries.iter().map(|entry| (half_md4(entry.name, self.hash_seed), *entry)).collect();
        hashed.sort_by_key(|(hash, _)| *hash);
        let mut leaves: Vec<Leaf> = Vec::new();
        let mut pointers = Vec::new();
        let mut previous = None;
        for ((hash, _), entry) in hashed {
            if !leaves.last().is_some_and(|leaf| leaf.has_room(entry.name)) {
                // The lowest bit says that names of this hash began in the leaf before.
                let continues = u32::from(previous == Some(hash));
                pointers.push(Pointer { hash: hash | continues, block: 0 });
                leaves.push(Leaf::default());
            }
            if let Some(leaf) = leaves.last_mut() {
                leaf.push(entry.name, entry.inode, entry.file_type);
            }
            previous = Some(hash);
        }
        (leaves, pointers)
    }

    fn root(&self, levels: u8, pointers: &[Pointer]) -> Vec<u8> {
        let mut root = Record::new();
        root.u32(self.inode).u16(12).u8(1).u8(FileType::Directory.in_directory()).bytes(b".\0\0\0");
        root.u32(self.parent).u16(BLOCK_BYTES.saturating_sub(12) as u16);
        root.u8(2).u8(FileType::Directory.in_directory()).bytes(b"..\0\0");
        root.u32(0).u8(HASH_HALF_MD4).u8(8).u8(levels).u8(0);
        self.index(root, pointers, ROOT_LIMIT)
    }

    /// Appends the index entries and the checksum. The first entry's hash is the least possible; its place holds limit
    /// and count.
    fn index(&self, mut block: Record, pointers: &[Pointer], limit: usize) -> Vec<u8> {
        block.u16(limit as u16).u16(pointers.len() as u16);
        for (position, pointer) in pointers.iter().enumerate() {
            if position > 0 {
                block.u32(pointer.hash);
            }
            block.u32(pointer.block);
        }
        let mut bytes = block.take(block.len());
        let checksum = self.checksum.add(&bytes).add(&[0; 8]).value();
        bytes.resize(BLOCK_BYTES, 0);
        put(&mut bytes, BLOCK_BYTES.saturating_sub(4), &checksum.to_le_bytes());
        bytes
    }
}

/// An index entry: names from this hash on are in that block of the directory.
#[derive(Clone, Copy)]
struct Pointer {
    hash: u32,
    block: u32,
}

fn number(pointers: &mut [Pointer], first: u32) {
    for (pointer, block) in pointers.iter_mut().zip(first..) {
        pointer.block = block;
    }
}

/// A block of entries.
#[derive(Default)]
struct Leaf {
    bytes: Vec<u8>,
    last: usize,
}

impl Leaf {
    fn has_room(&self, name: &[u8]) -> bool {
        self.bytes.len().saturating_add(entry_bytes(name)) <= LEAF_END
    }

    fn push(&mut self, name: &[u8], inode: u32, file_type: FileType) {
        let length = entry_bytes(name);
        self.last = self.bytes.len();
        let mut entry = Record::new();
        entry.u32(inode).u16(length as u16).u8(name.len() as u8).u8(file_type.in_directory()).bytes(name);
        self.bytes.extend(entry.take(length));
    }

    /// Stretches the last entry to the end and appends the checksum.
    fn seal(mut self, checksum: Checksum) -> Vec<u8> {
        let length = LEAF_END.saturating_sub(self.last) as u16;
        self.bytes.resize(LEAF_END, 0);
        put(&mut self.bytes, self.last.saturating_add(4), &length.to_le_bytes());
        let mut tail = Record::new();
        tail.u32(0).u16(12).u8(0).u8(0xde).u32(checksum.add(&self.bytes).value());
        self.bytes.extend(tail.take(12));
        self.bytes
    }
}

/// What an entry takes in a block.
pub(crate) fn entry_bytes(name: &[u8]) -> usize {
    name.len().saturating_add(8).next_multiple_of(4)
}
