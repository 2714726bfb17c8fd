//! The writer: takes files in any order and streams their content to the target.

use std::io::{self, Read};

use crate::allocator::{Allocator, Run};
use crate::error::{Error, Result, show};
use crate::extent::ExtentMap;
use crate::inode::{self, DeviceKind, Metadata};
use crate::layout::{Layout, SIZE_SURE};
use crate::resize::{self, Resize};
use crate::target::{Gather, Target};
use crate::tree::{Body, Node, PATH_BYTES_MAX, Place, Tree};
use crate::{BLOCK_BYTES, BLOCK_SIZE, journal, xattr};

/// `EXT4_LINK_MAX`.
const LINKS_MAX: u16 = 65000;
/// A symbolic link's target up to here lives in the inode.
const INLINE_TARGET_MAX: usize = 59;
/// Logical block numbers have 32 bits, and the last one is never used.
const FILE_BYTES_MAX: u64 = (u32::MAX as u64) * BLOCK_SIZE;
/// Content read at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// What the file system is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of the file system; rounded down to whole blocks.
    pub size: u64,
    /// Identity, for `root=UUID=`; it also seeds all checksums.
    pub uuid: [u8; 16],
    /// Volume name, up to 16 bytes; may be empty.
    pub label: String,
    /// Seed of the directory hash; make it random where directory contents may be hostile.
    pub hash_seed: [u8; 16],
    /// Time of making in seconds since 1970: of the file system, of all inodes, of directories made on demand.
    pub timestamp: i64,
}

impl Options {
    /// Of `size` bytes, with no label, and with zero for all else: the same calls then make the same image.
    pub fn new(size: u64) -> Self {
        Self { size, uuid: [0; 16], label: String::new(), hash_seed: [0; 16], timestamp: 0 }
    }
}

/// What was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Inodes of the file system.
    pub inodes: u32,
    /// Inodes that are free.
    pub inodes_free: u32,
    /// Directories, with the root and `lost+found`.
    pub directories: u32,
}

/// Makes one file system; see the crate's documentation.
pub struct Writer<T> {
    pub(crate) options: Options,
    pub(crate) layout: Layout,
    pub(crate) allocator: Allocator,
    pub(crate) sink: Gather<T>,
    pub(crate) tree: Tree,
    chunk: Vec<u8>,
}

impl<T: Target> Writer<T> {
    /// Starts a file system on `target`, whose former content is lost.
    pub fn new(target: T, options: &Options) -> Result<Self> {
        if options.label.len() > 16 {
            return Err(Error::Label { length: options.label.len() });
        }
        let layout = Layout::new(options.size)?;
        let mut this = Self {
            options: options.clone(),
            allocator: Allocator::new(layout.clone()),
            sink: Gather::new(target, layout.blocks.saturating_mul(BLOCK_SIZE))?,
            tree: Tree::new(layout.inodes(), inode::FIRST, options.timestamp),
            layout,
            chunk: vec![0; CHUNK_BYTES],
        };
        this.make_resize_inode()?;
        this.make_journal()?;
        this.directory(b"lost+found", &Metadata::new(0o700, options.timestamp))?;
        Ok(this)
    }

    fn make_resize_inode(&mut self) -> Result<()> {
        let double_indirect = self.reserve(1)?.start;
        let resize = Resize::new(&self.layout, double_indirect);
        for (block, bytes) in &resize.content {
            self.sink.blocks(*block, bytes)?;
        }
        let body = Body::Mapped { block: resize.block, size: resize::SIZE, blocks: resize.blocks };
        let meta = Metadata::new(0o600, self.options.timestamp);
        self.tree.set(inode::RESIZE, Node { meta, links: 1, body });
        Ok(())
    }

    /// The journal's blocks were never written, so they are zero but for the first.
    fn make_journal(&mut self) -> Result<()> {
        let length = self.layout.journal_blocks();
        if length == 0 {
            return Ok(());
        }
        let mut map = ExtentMap::default();
        let mut logical = 0;
        while logical < length {
            let run = self.reserve(length.saturating_sub(logical))?;
            if logical == 0 {
                self.sink.blocks(run.start, &journal::superblock(length, &self.options.uuid))?;
            }
            map.push(logical, run);
            logical = logical.saturating_add(run.length);
        }
        let body = Body::File { size: u64::from(length).saturating_mul(BLOCK_SIZE), map };
        let meta = Metadata::new(0o600, self.options.timestamp);
        self.tree.set(inode::JOURNAL, Node { meta, links: 1, body });
        Ok(())
    }

    /// Blocks without which there is no file system.
    fn reserve(&mut self, want: u32) -> Result<Run> {
        let size = self.options.size;
        self.allocator.take(want).ok_or(Error::TooSmall { size, least: SIZE_SURE })
    }

    /// Makes a directory, or replaces the metadata of an existing one (`/` too). Missing parents are made with mode
    /// 0755 and owner root. A symbolic link at `path` is followed.
    pub fn directory(&mut self, path: &[u8], meta: &Metadata) -> Result<()> {
        xattr::encode(&meta.xattrs)?;
        self.check_space_for_names(path)?;
        let inode = self.tree.directory_at(path)?;
        self.tree.set_metadata(inode, meta);
        Ok(())
    }

    /// Makes a regular file of exactly `size` bytes from `content`. It takes the place of anything but a directory.
    /// Blocks of zeros become holes, so a swap file cannot be made this way.
    pub fn file(&mut self, path: &[u8], meta: &Metadata, size: u64, mut content: impl Read) -> Result<()> {
        if size > FILE_BYTES_MAX {
            return Err(Error::FileTooLarge { path: show(path), size, most: FILE_BYTES_MAX });
        }
        let place = self.checked_place(path, meta)?;
        let mut map = ExtentMap::default();
        if let Err(error) = self.store(&mut map, path, size, &mut content) {
            self.release(&map);
            return Err(error);
        }
        map.shrink();
        self.insert(path, place, meta, Body::File { size, map })
    }

    /// Makes a symbolic link. It takes the place of anything but a directory.
    pub fn symlink(&mut self, path: &[u8], meta: &Metadata, target: &[u8]) -> Result<()> {
        if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
            return Err(Error::SymlinkTarget { path: show(path) });
        }
        let place = self.checked_place(path, meta)?;
        let mut map = ExtentMap::default();
        if target.len() > INLINE_TARGET_MAX {
            let run = self.allocator.take(1).ok_or_else(|| full(path, BLOCK_SIZE))?;
            map.push(0, run);
            let mut block = target.to_vec();
            block.resize(BLOCK_BYTES, 0);
            self.sink.blocks(run.start, &block)?;
        }
        self.insert(path, place, meta, Body::Symlink { target: target.into(), map })
    }

    /// Gives the file at `existing` (not a directory; a last symbolic link is not followed) one more name, in place of
    /// anything but a directory.
    pub fn hard_link(&mut self, path: &[u8], existing: &[u8]) -> Result<()> {
        let source = self.tree.place_for_file(existing)?;
        let Some(inode) = self.tree.lookup(&source) else {
            return Err(Error::NotFound { path: show(existing) });
        };
        self.check_space_for_names(path)?;
        let place = self.tree.place_for_file(path)?;
        if self.tree.lookup(&place) == Some(inode) {
            return Ok(());
        }
        if self.tree.node(inode).is_none_or(|node| node.links >= LINKS_MAX) {
            return Err(Error::TooManyLinks { path: show(existing), limit: LINKS_MAX });
        }
        let old = self.tree.link(place, inode);
        self.release_node(old);
        Ok(())
    }

    /// Makes a device, named pipe or socket. It takes the place of anything but a directory. `major` has 12 bits and
    /// `minor` 20.
    pub fn device(
        &mut self,
        path: &[u8],
        meta: &Metadata,
        kind: DeviceKind,
        major: u32,
        minor: u32,
    ) -> Result<()> {
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(Error::DeviceNumber { path: show(path), major, minor });
        }
        let place = self.checked_place(path, meta)?;
        self.insert(path, place, meta, Body::Device { kind, major, minor })
    }

    fn checked_place(&mut self, path: &[u8], meta: &Metadata) -> Result<Place> {
        xattr::encode(&meta.xattrs)?;
        self.check_space_for_names(path)?;
        let place = self.tree.place_for_file(path)?;
        self.tree.check_room(path, &place)?;
        Ok(place)
    }

    /// Names cost memory until the end, so no more are taken than the disk has space for.
    fn check_space_for_names(&self, path: &[u8]) -> Result<()> {
        let needed = self.tree.directory_blocks_least().saturating_add(1);
        match needed.checked_sub(self.allocator.free()) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(full(path, missing.saturating_mul(BLOCK_SIZE))),
        }
    }

    fn insert(&mut self, path: &[u8], place: Place, meta: &Metadata, body: Body) -> Result<()> {
        let old = self.tree.insert(path, place, Node { meta: meta.clone(), links: 1, body })?;
        self.release_node(old);
        Ok(())
    }

    fn release_node(&mut self, node: Option<Node>) {
        if let Some(map) = node.as_ref().and_then(Node::map) {
            self.release(map);
        }
    }

    fn release(&mut self, map: &ExtentMap) {
        for run in map.runs() {
            self.allocator.give_back(run);
        }
    }

    /// Streams `size` bytes to the target.
    fn store(&mut self, map: &mut ExtentMap, path: &[u8], size: u64, content: &mut impl Read) -> Result<()> {
        let mut chunk = std::mem::take(&mut self.chunk);
        let done = self.store_through(&mut chunk, map, path, size, content);
        self.chunk = chunk;
        done
    }

    fn store_through(
        &mut self,
        chunk: &mut [u8],
        map: &mut ExtentMap,
        path: &[u8],
        size: u64,
        content: &mut impl Read,
    ) -> Result<()> {
        let mut left = size;
        let mut logical = 0_u32;
        while left > 0 {
            let length = left.min(CHUNK_BYTES as u64);
            let padded = length.next_multiple_of(BLOCK_SIZE) as usize;
            let (bytes, padding) = chunk
                .get_mut(..padded)
                .and_then(|blocks| blocks.split_at_mut_checked(length as usize))
                .unwrap_or_default();
            content.read_exact(bytes).map_err(|source| unreadable(path, size, source))?;
            padding.fill(0);
            let blocks = chunk.get(..padded).unwrap_or_default().as_chunks::<BLOCK_BYTES>().0;
            let stored = self.store_blocks(map, logical, blocks)?;
            if let Some(unstored) = blocks.get(stored..).filter(|blocks| !blocks.is_empty()) {
                let here = unstored.iter().filter(|block| !is_zero(block)).count() as u64;
                let later = left.saturating_sub(length).div_ceil(BLOCK_SIZE);
                return Err(full(path, here.saturating_add(later).saturating_mul(BLOCK_SIZE)));
            }
            logical = logical.saturating_add(blocks.len() as u32);
            left = left.saturating_sub(length);
        }
        Ok(())
    }

    /// Stores blocks of a file from `logical` on, leaving holes for zero blocks, until the disk is full. Returns how
    /// many were dealt with.
    fn store_blocks(
        &mut self,
        map: &mut ExtentMap,
        logical: u32,
        blocks: &[[u8; BLOCK_BYTES]],
    ) -> Result<usize> {
        let mut position = 0_usize;
        for same in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let mut rest = same;
            if same.first().is_some_and(is_zero) {
                position = position.saturating_add(same.len());
                continue;
            }
            while !rest.is_empty() {
                let Some(run) = self.allocator.take(rest.len() as u32) else {
                    return Ok(position);
                };
                let (now, later) = rest.split_at_checked(run.length as usize).unwrap_or((rest, &[]));
                map.push(logical.saturating_add(position as u32), run);
                self.sink.blocks(run.start, now.as_flattened())?;
                position = position.saturating_add(now.len());
                rest = later;
            }
        }
        Ok(position)
    }
}

pub(crate) fn full(what: &[u8], missing: u64) -> Error {
    Error::Full { what: show(what), missing }
}

fn unreadable(path: &[u8], size: u64, source: io::Error) -> Error {
    Error::Content { path: show(path), size, source }
}

/// Whether a block holds only zeros. Most others are found out by their first bytes.
fn is_zero(block: &[u8; BLOCK_BYTES]) -> bool {
    block.as_chunks::<64>().0.iter().all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}
