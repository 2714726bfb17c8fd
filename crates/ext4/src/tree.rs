//! The tree of names while the image is made, and the way a path takes through it.

use std::collections::BTreeMap;

use crate::BLOCK_SIZE;
use crate::directory::entry_bytes;
use crate::error::{Error, Result, show};
use crate::extent::{ExtentMap, ROOT_BYTES};
use crate::inode::{DeviceKind, FileType, Metadata, ROOT};

/// Symbolic links followed on one path, as in Linux.
const LINKS_FOLLOWED_MAX: u32 = 40;
/// Names looked up on one path with all its links; without a limit 40 links to long paths would make each call slow.
const STEPS_MAX: u32 = 8192;
/// `PATH_MAX` of Linux without its NUL.
pub(crate) const PATH_BYTES_MAX: usize = 4095;
const NAME_BYTES_MAX: usize = 255;
/// Directories in directories: what one path can name.
const DEPTH_MAX: u16 = 2048;

/// What an inode is, beside its metadata.
pub(crate) enum Body {
    Directory(Directory),
    File {
        size: u64,
        map: ExtentMap,
    },
    /// `map` is empty for a target that fits the inode.
    Symlink {
        target: Box<[u8]>,
        map: ExtentMap,
    },
    Device {
        kind: DeviceKind,
        major: u32,
        minor: u32,
    },
    /// The resize inode, which maps its blocks in the old way.
    Mapped {
        block: [u8; ROOT_BYTES],
        size: u64,
        blocks: u64,
    },
}

/// The entries of a directory, without `.` and `..`.
#[derive(Default)]
pub(crate) struct Directory {
    pub parent: u32,
    pub entries: BTreeMap<Box<[u8]>, u32>,
    /// Entries that are directories.
    pub subdirectories: u32,
    depth: u16,
}

pub(crate) struct Node {
    pub meta: Metadata,
    pub links: u16,
    pub body: Body,
}

impl Node {
    pub fn file_type(&self) -> FileType {
        match &self.body {
            Body::Directory(_) => FileType::Directory,
            Body::File { .. } | Body::Mapped { .. } => FileType::Regular,
            Body::Symlink { .. } => FileType::Symlink,
            Body::Device { kind, .. } => FileType::Device(*kind),
        }
    }

    /// The extents of a file or symbolic link.
    pub fn map(&self) -> Option<&ExtentMap> {
        match &self.body {
            Body::File { map, .. } | Body::Symlink { map, .. } => Some(map),
            _ => None,
        }
    }
}

/// A name in a directory.
pub(crate) struct Place {
    pub directory: u32,
    pub name: Box<[u8]>,
}

/// All inodes by number, and the names that lead to them.
pub(crate) struct Tree {
    nodes: Vec<Option<Node>>,
    freed: Vec<u32>,
    inodes: u32,
    directories: u32,
    /// Of all entries, as they will be on the disk.
    name_bytes: u64,
    /// Time of directories made on demand.
    made: i64,
}

impl Tree {
    /// A tree with a root directory, for up to `inodes` inodes, of which those before `first` are reserved.
    pub fn new(inodes: u32, first: u32, made: i64) -> Self {
        let mut nodes = Vec::new();
        nodes.resize_with(first as usize, || None);
        let mut this = Self { nodes, freed: Vec::new(), inodes, directories: 1, name_bytes: 0, made };
        let root = Directory { parent: ROOT, ..Directory::default() };
        this.set(ROOT, Node { meta: Metadata::new(0o755, made), links: 1, body: Body::Directory(root) });
        this
    }

    pub fn node(&self, inode: u32) -> Option<&Node> {
        self.nodes.get(inode as usize)?.as_ref()
    }

    fn node_mut(&mut self, inode: u32) -> Option<&mut Node> {
        self.nodes.get_mut(inode as usize)?.as_mut()
    }

    /// Puts a node at a reserved number.
    pub fn set(&mut self, inode: u32, node: Node) {
        if let Some(slot) = self.nodes.get_mut(inode as usize) {
            *slot = Some(node);
        }
    }

    /// One more than the highest inode in use.
    pub fn end(&self) -> u32 {
        self.nodes.len() as u32
    }

    pub fn directory(&self, inode: u32) -> Option<&Directory> {
        match &self.node(inode)?.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn directory_mut(&mut self, inode: u32) -> Option<&mut Directory> {
        match &mut self.node_mut(inode)?.body {
            Body::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// Blocks that the directories will need at the least.
    pub fn directory_blocks_least(&self) -> u64 {
        u64::from(self.directories).max(self.name_bytes / BLOCK_SIZE)
    }

    pub fn lookup(&self, place: &Place) -> Option<u32> {
        self.directory(place.directory)?.entries.get(&place.name).copied()
    }

    /// The directory at `path`, following symbolic links; it and its parents are made on demand.
    pub fn directory_at(&mut self, path: &[u8]) -> Result<u32> {
        self.walk(path, components(path)?)
    }

    /// Replaces a directory's metadata.
    pub fn set_metadata(&mut self, inode: u32, meta: &Metadata) {
        if let Some(node) = self.node_mut(inode) {
            node.meta = meta.clone();
        }
    }

    /// Where `path` says that a file is or shall be: links are followed, except a last one.
    pub fn place(&mut self, path: &[u8]) -> Result<Place> {
        let mut parents = components(path)?;
        let Some(name) = parents.pop() else {
            return Err(Error::IsADirectory { path: show(path) });
        };
        Ok(Place { directory: self.walk(path, parents)?, name })
    }

    /// As [`place`](Self::place), for something that must not replace a directory.
    pub fn place_for_file(&mut self, path: &[u8]) -> Result<Place> {
        let place = self.place(path)?;
        match self.lookup(&place) {
            Some(inode) if self.directory(inode).is_some() => Err(Error::IsADirectory { path: show(path) }),
            _ => Ok(place),
        }
    }

    fn walk(&mut self, path: &[u8], names: Vec<Box<[u8]>>) -> Result<u32> {
        let mut directory = ROOT;
        let mut pending = names;
        pending.reverse();
        let mut followed = 0_u32;
        let mut steps = 0_u32;
        while let Some(name) = pending.pop() {
            steps = steps.saturating_add(1);
            if steps > STEPS_MAX {
                return Err(Error::Path { path: show(path), why: "its symbolic links lead too far around" });
            }
            if *name == *b".." {
                directory = self.directory(directory).map_or(ROOT, |directory| directory.parent);
                continue;
            }
            let place = Place { directory, name };
            let Some(inode) = self.lookup(&place) else {
                directory = self.make_directory(path, place)?;
                continue;
            };
            match self.node(inode).map(|node| &node.body) {
                Some(Body::Directory(_)) => directory = inode,
                Some(Body::Symlink { target, .. }) => {
                    followed = followed.saturating_add(1);
                    if followed > LINKS_FOLLOWED_MAX {
                        return Err(Error::SymlinkLoop { path: show(path), limit: LINKS_FOLLOWED_MAX });
                    }
                    if target.first() == Some(&b'/') {
                        directory = ROOT;
                    }
                    let mut names = split(path, target)?;
                    names.reverse();
                    pending.append(&mut names);
                }
                _ => return Err(Error::NotADirectory { path: show(path), through: show(&place.name) }),
            }
        }
        Ok(directory)
    }

    fn make_directory(&mut self, path: &[u8], place: Place) -> Result<u32> {
        let parent = place.directory;
        let depth = self.directory(parent).map_or(0, |parent| parent.depth).saturating_add(1);
        if depth > DEPTH_MAX {
            return Err(Error::Path { path: show(path), why: "its directories are nested too deeply" });
        }
        let directory = Directory { parent, depth, ..Directory::default() };
        let meta = Metadata::new(0o755, self.made);
        let inode = self.add(path, Node { meta, links: 1, body: Body::Directory(directory) })?;
        if let Some(parent) = self.directory_mut(parent) {
            parent.subdirectories = parent.subdirectories.saturating_add(1);
        }
        self.directories = self.directories.saturating_add(1);
        self.name(place, inode);
        Ok(inode)
    }

    /// Fails if `place` is new and no inode is left for it.
    pub fn check_room(&self, path: &[u8], place: &Place) -> Result<()> {
        let room = !self.freed.is_empty() || self.end() <= self.inodes;
        if room || self.lookup(place).and_then(|inode| self.node(inode)).is_some_and(|old| old.links == 1) {
            return Ok(());
        }
        Err(Error::NoInodes { path: show(path), inodes: self.inodes })
    }

    fn add(&mut self, path: &[u8], node: Node) -> Result<u32> {
        if let Some(inode) = self.freed.pop() {
            self.set(inode, node);
            return Ok(inode);
        }
        let inode = self.end();
        if inode > self.inodes {
            return Err(Error::NoInodes { path: show(path), inodes: self.inodes });
        }
        self.nodes.push(Some(node));
        Ok(inode)
    }

    /// Gives a name to a new node; what had it is returned if that was its last name.
    pub fn insert(&mut self, path: &[u8], place: Place, node: Node) -> Result<Option<Node>> {
        self.check_room(path, &place)?;
        let old = self.unlink(&place);
        let inode = self.add(path, node)?;
        self.name(place, inode);
        Ok(old)
    }

    fn name(&mut self, place: Place, inode: u32) {
        self.name_bytes = self.name_bytes.saturating_add(entry_bytes(&place.name) as u64);
        if let Some(directory) = self.directory_mut(place.directory) {
            directory.entries.insert(place.name, inode);
        }
    }

    /// Gives one more name to `inode`; what had the name is returned if that was its last one.
    pub fn link(&mut self, place: Place, inode: u32) -> Option<Node> {
        let old = self.unlink(&place);
        if let Some(node) = self.node_mut(inode) {
            node.links = node.links.saturating_add(1);
        }
        self.name(place, inode);
        old
    }

    fn unlink(&mut self, place: &Place) -> Option<Node> {
        let inode = self.directory_mut(place.directory)?.entries.remove(&place.name)?;
        self.name_bytes = self.name_bytes.saturating_sub(entry_bytes(&place.name) as u64);
        let node = self.node_mut(inode)?;
        node.links = node.links.saturating_sub(1);
        if node.links > 0 {
            return None;
        }
        self.freed.push(inode);
        self.nodes.get_mut(inode as usize)?.take()
    }
}

/// The components of a path that a caller gave; it may start with `/` or `./`.
fn components(path: &[u8]) -> Result<Vec<Box<[u8]>>> {
    let names = split(path, path)?;
    if names.iter().any(|name| **name == *b"..") {
        return Err(Error::Path { path: show(path), why: "\"..\" is not allowed here" });
    }
    Ok(names)
}

/// The components of `text`, met on the way along `path`.
fn split(path: &[u8], text: &[u8]) -> Result<Vec<Box<[u8]>>> {
    let refused = |why| Err(Error::Path { path: show(path), why });
    if text.len() > PATH_BYTES_MAX {
        return refused("it is longer than 4095 bytes");
    }
    if text.contains(&0) {
        return refused("it holds a NUL byte");
    }
    let names: Vec<Box<[u8]>> = text
        .split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty() && **name != *b".")
        .map(Box::from)
        .collect();
    if names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
        return refused("a name in it is longer than 255 bytes");
    }
    Ok(names)
}
