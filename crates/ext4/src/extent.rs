//! Extents: which blocks of the disk hold which blocks of a file (kernel docs: ext4/ifork, extent tree).

use crate::allocator::Run;
use crate::checksum::Checksum;
use crate::record::{Record, high32, low16, low32};
use crate::{BLOCK_BYTES, allocator::Allocator};

/// An initialised extent has at most this many blocks.
const EXTENT_BLOCKS_MAX: u32 = 32768;
const MAGIC: u16 = 0xf30a;
/// Entries in the 60 bytes of the inode.
const ENTRIES_IN_INODE: usize = 4;
/// Entries in a block, behind a header of 12 bytes and before a checksum of 4.
const ENTRIES_IN_BLOCK: usize = 340;
pub(crate) const ROOT_BYTES: usize = 60;

/// A run of blocks of a file that lie next to each other on the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    logical: u32,
    length: u32,
    physical: u64,
}

/// All extents of one file, in order. Blocks between them are holes.
#[derive(Debug, Clone, Default)]
pub(crate) struct ExtentMap {
    extents: Vec<Extent>,
}

impl ExtentMap {
    /// Maps the blocks of a file from `logical` on to `run`.
    pub fn push(&mut self, logical: u32, run: Run) {
        if let Some(last) = self.extents.last_mut() {
            let joined = last.length.saturating_add(run.length);
            let follows = last.logical.checked_add(last.length) == Some(logical)
                && last.physical.saturating_add(u64::from(last.length)) == run.start;
            if follows && joined <= EXTENT_BLOCKS_MAX {
                last.length = joined;
                return;
            }
        }
        self.extents.push(Extent { logical, length: run.length, physical: run.start });
    }

    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.extents.iter().map(|extent| Run { start: extent.physical, length: extent.length })
    }

    /// Blocks of the disk that hold the file's content.
    pub fn data_blocks(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.length)).sum()
    }

    pub fn shrink(&mut self) {
        self.extents.shrink_to_fit();
    }

    /// Blocks that the tree needs beside the inode.
    pub fn tree_blocks(&self) -> u64 {
        let mut entries = self.extents.len();
        let mut blocks = 0_u64;
        while entries > ENTRIES_IN_INODE {
            entries = entries.div_ceil(ENTRIES_IN_BLOCK);
            blocks = blocks.saturating_add(entries as u64);
        }
        blocks
    }

    /// Builds the tree: its root for the inode, and its blocks, to be written where they say. `None` when the disk is
    /// full.
    pub fn build(&self, allocator: &mut Allocator, inode: Checksum) -> Option<Tree> {
        let mut tree = Tree { root: [0; ROOT_BYTES], blocks: Vec::new() };
        let mut level: Vec<Entry> = self.extents.iter().map(Extent::entry).collect();
        let mut depth = 0_u16;
        while level.len() > ENTRIES_IN_INODE {
            let mut above = Vec::with_capacity(level.len().div_ceil(ENTRIES_IN_BLOCK));
            for entries in level.chunks(ENTRIES_IN_BLOCK) {
                let block = allocator.take(1)?.start;
                let mut bytes = node(entries, ENTRIES_IN_BLOCK, depth).take(BLOCK_BYTES.saturating_sub(4));
                let checksum = inode.add(&bytes).value();
                bytes.extend_from_slice(&checksum.to_le_bytes());
                above.push(index(entries, block));
                tree.blocks.push((block, bytes));
            }
            level = above;
            depth = depth.saturating_add(1);
        }
        tree.root.copy_from_slice(&node(&level, ENTRIES_IN_INODE, depth).take(ROOT_BYTES));
        Some(tree)
    }
}

/// An extent tree ready to be written.
pub(crate) struct Tree {
    pub root: [u8; ROOT_BYTES],
    pub blocks: Vec<(u64, Vec<u8>)>,
}

type Entry = [u8; 12];

impl Extent {
    fn entry(&self) -> Entry {
        let mut record = Record::new();
        // 32768 itself is still an initialised extent; above it the length would mean "unwritten".
        record.u32(self.logical).u16(low16(self.length)).u16(low16(high32(self.physical)));
        record.u32(low32(self.physical));
        fixed(&mut record)
    }
}

fn index(below: &[Entry], block: u64) -> Entry {
    let mut record = Record::new();
    let first = below.first().and_then(|entry| entry.first_chunk::<4>()).copied().unwrap_or_default();
    record.bytes(&first).u32(low32(block)).u16(low16(high32(block)));
    fixed(&mut record)
}

fn fixed(record: &mut Record) -> Entry {
    let mut entry = [0; 12];
    entry.copy_from_slice(&record.take(12));
    entry
}

fn node(entries: &[Entry], capacity: usize, depth: u16) -> Record {
    let mut record = Record::new();
    record.u16(MAGIC).u16(entries.len() as u16).u16(capacity as u16).u16(depth).u32(0);
    for entry in entries {
        record.bytes(entry);
    }
    record
}
