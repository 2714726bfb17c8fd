//! The guest's file tree while it is built: who owns which path, and where paths lead.
//!
//! [`Tree`] is whatever stores files (an ext4 image, a directory). [`Root`] stands before it and gives dpkg's rules:
//! directories are shared,
//! a file of one package is not overwritten by another unless that one `Replaces` it, and a path leads through the symbolic links of the
//! image, never of the host. It also keeps copies of the few files that the builder itself reads.

use md5::{Digest, Md5};
use std::collections::HashMap;
use std::io::{self, Read};

/// Owner, permissions and time of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits with set-user-ID, set-group-ID and sticky bit.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the contents, in seconds since 1970.
    pub mtime: i64,
}

/// A special file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Character device with major and minor number.
    Character(u32, u32),
    /// Block device with major and minor number.
    Block(u32, u32),
    /// Named pipe.
    Fifo,
}

/// Where files are stored. Paths are relative to the root, plain (no `.`, `..` or doubled slashes) and lead through no symbolic link.
/// Every directory comes before what is in it, and the target of a hard link before the link.
pub trait Tree {
    /// Makes a directory; the empty path sets the root's metadata.
    fn directory(&mut self, path: &str, meta: &Metadata) -> io::Result<()>;
    /// Makes a file of `size` bytes.
    fn file(&mut self, path: &str, meta: &Metadata, size: u64, content: &mut dyn Read) -> io::Result<()>;
    /// Makes a symbolic link.
    fn symlink(&mut self, path: &str, meta: &Metadata, target: &str) -> io::Result<()>;
    /// Gives an existing file another name.
    fn hard_link(&mut self, path: &str, existing: &str) -> io::Result<()>;
    /// Makes a special file.
    fn device(&mut self, path: &str, meta: &Metadata, device: Device) -> io::Result<()>;
}

/// Why a file cannot be put where a package wants it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path that leads out of the tree or is no text.
    #[error("path {0:?} leads out of the file system")]
    Path(String),
    /// Two packages with the same file.
    #[error("packages {owner} and {package} both have {path}; leave one out")]
    Conflict {
        /// The path.
        path: String,
        /// Who has it.
        owner: String,
        /// Who wants it.
        package: String,
    },
    /// A link to something that is not there.
    #[error("hard link {path} leads to {target}, which the package does not have")]
    Dangling {
        /// The link.
        path: String,
        /// Its target.
        target: String,
    },
    /// The store failed.
    #[error("cannot write {path} into the image: {source}")]
    Store {
        /// The path.
        path: String,
        /// What the store said.
        source: io::Error,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Directory,
    Symlink(String),
    Other,
}

#[derive(Clone, Debug)]
struct Entry {
    node: Node,
    owner: usize,
}

/// Which files to keep a copy of.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// True for paths of such files.
    pub wants: fn(&str) -> bool,
    /// What to keep of such a file, given its path and contents.
    pub essence: fn(&str, Vec<u8>) -> Vec<u8>,
}

/// Largest file of which a copy is kept.
const KEPT_BYTES_MAX: u64 = 64 << 20;
/// Symbolic links that one path may lead through.
const LINKS_MAX: usize = 40;

/// The tree being built; see the module.
pub struct Root<'t> {
    tree: &'t mut dyn Tree,
    entries: HashMap<String, Entry>,
    keep: Keep,
    /// Copies of the files chosen by [`Keep`], by path.
    pub kept: HashMap<String, Vec<u8>>,
    /// MD5 digests of the files asked for by [`Package::digests`].
    pub digests: HashMap<String, String>,
}

/// Whose files are being put in.
#[derive(Clone, Copy)]
pub struct Package<'a> {
    /// A number that tells packages apart.
    pub number: usize,
    /// Its name.
    pub name: &'a str,
    /// Numbers of the packages whose files it may take over or leave to (`Replaces`, in either direction).
    pub yields: &'a [usize],
    /// Names by number, for messages.
    pub names: &'a [String],
    /// Paths whose MD5 digest is wanted (configuration files).
    pub digests: &'a [String],
}

impl<'t> Root<'t> {
    /// Starts a tree whose `/bin`, `/sbin`, `/lib` and `/lib64` are links into `/usr` (merged /usr), which every Debian since 12 wants.
    pub fn new(tree: &'t mut dyn Tree, keep: Keep, mtime: i64) -> Result<Self, Error> {
        let mut root =
            Root { tree, entries: HashMap::new(), keep, kept: HashMap::new(), digests: HashMap::new() };
        root.entries.insert(String::new(), Entry { node: Node::Directory, owner: usize::MAX });
        let directory = Metadata { mode: 0o755, mtime, ..Metadata::default() };
        root.store_directory("", &directory)?;
        root.store_directory("usr", &directory)?;
        for name in ["bin", "sbin", "lib", "lib64"] {
            let target = format!("usr/{name}");
            root.store_directory(&target, &directory)?;
            let link = Metadata { mode: 0o777, mtime, ..Metadata::default() };
            root.tree.symlink(name, &link, &target).map_err(store(name))?;
            root.entries.insert(name.to_owned(), Entry { node: Node::Symlink(target), owner: usize::MAX });
        }
        Ok(root)
    }

    fn store_directory(&mut self, path: &str, meta: &Metadata) -> Result<(), Error> {
        self.tree.directory(path, meta).map_err(store(path))?;
        self.entries.entry(path.to_owned()).or_insert(Entry { node: Node::Directory, owner: usize::MAX });
        Ok(())
    }

    /// Where a path leads: its parents' symbolic links followed, its last part kept. Missing parents are made.
    fn place(&mut self, path: &str, mtime: i64) -> Result<String, Error> {
        let mut pending: Vec<String> = plain_parts(path)?.into_iter().rev().map(str::to_owned).collect();
        let mut place = String::new();
        let mut links = 0usize;
        while let Some(part) = pending.pop() {
            if part == ".." {
                place.truncate(place.rfind('/').unwrap_or(0));
                continue;
            }
            let next = if place.is_empty() { part } else { format!("{place}/{part}") };
            if pending.is_empty() {
                return Ok(next);
            }
            match self.entries.get(&next).map(|entry| &entry.node) {
                Some(Node::Directory) => place = next,
                Some(Node::Symlink(target)) => {
                    links = links.saturating_add(1);
                    if links > LINKS_MAX {
                        return Err(Error::Path(path.to_owned()));
                    }
                    if target.starts_with('/') {
                        place.clear();
                    }
                    let parts: Vec<_> = target
                        .split('/')
                        .filter(|part| !part.is_empty() && *part != ".")
                        .map(str::to_owned)
                        .collect();
                    pending.extend(parts.into_iter().rev());
                }
                Some(Node::Other) => return Err(Error::Path(path.to_owned())),
                None => {
                    let meta = Metadata { mode: 0o755, mtime, ..Metadata::default() };
                    self.store_directory(&next, &meta)?;
                    place = next;
                }
            }
        }
        Ok(place)
    }

    /// Makes a directory, or shares one that is there, or a link to one.
    pub fn directory(&mut self, package: &Package<'_>, path: &str, meta: &Metadata) -> Result<(), Error> {
        let place = self.place(path, meta.mtime)?;
        match self.entries.get(&place).map(|entry| &entry.node) {
            Some(Node::Symlink(_)) => Ok(()),
            Some(Node::Other) => Err(self.conflict(&place, package)),
            // As dpkg does it, the first package that has a directory says what it is like.
            Some(Node::Directory)
                if self.entries.get(&place).is_some_and(|entry| entry.owner != usize::MAX) =>
            {
                Ok(())
            }
            Some(Node::Directory) | None => {
                self.store_directory(&place, meta)?;
                self.claim(place, Node::Directory, package);
                Ok(())
            }
        }
    }

    /// Makes a file.
    pub fn file(
        &mut self,
        package: &Package<'_>,
        path: &str,
        meta: &Metadata,
        size: u64,
        content: &mut dyn Read,
    ) -> Result<(), Error> {
        let Some(place) = self.free_place(package, path, meta)? else { return Ok(()) };
        let digest = package.digests.iter().find(|wanted| wanted.trim_start_matches('/') == path);
        if (self.keep.wants)(&place) && size <= KEPT_BYTES_MAX {
            let mut bytes = Vec::new();
            content.take(size).read_to_end(&mut bytes).map_err(store(&place))?;
            self.tree.file(&place, meta, size, &mut bytes.as_slice()).map_err(store(&place))?;
            if let Some(name) = digest {
                self.digests.insert(name.clone(), crate::cache::hex(&Md5::digest(&bytes)));
            }
            self.kept.insert(place.clone(), (self.keep.essence)(&place, bytes));
        } else if let Some(name) = digest {
            let mut content = Digesting { inner: content, hash: Md5::new() };
            self.tree.file(&place, meta, size, &mut content).map_err(store(&place))?;
            self.digests.insert(name.clone(), crate::cache::hex(&content.hash.finalize()));
        } else {
            self.tree.file(&place, meta, size, content).map_err(store(&place))?;
        }
        self.claim(place, Node::Other, package);
        Ok(())
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &mut self,
        package: &Package<'_>,
        path: &str,
        meta: &Metadata,
        target: &str,
    ) -> Result<(), Error> {
        let place = self.place(path, meta.mtime)?;
        match self.entries.get(&place).map(|entry| &entry.node) {
            // The merged-/usr links are there before the package that has them.
            Some(Node::Symlink(found)) if found == target => return Ok(()),
            // dpkg keeps a directory where a package has a link.
            Some(Node::Directory) => return Ok(()),
            _ => {}
        }
        let Some(place) = self.free_place(package, path, meta)? else { return Ok(()) };
        self.tree.symlink(&place, meta, target).map_err(store(&place))?;
        self.claim(place, Node::Symlink(target.to_owned()), package);
        Ok(())
    }

    /// Gives a file of the same package another name.
    pub fn hard_link(
        &mut self,
        package: &Package<'_>,
        path: &str,
        meta: &Metadata,
        existing: &str,
    ) -> Result<(), Error> {
        let Some(place) = self.free_place(package, path, meta)? else { return Ok(()) };
        let target = self.place(existing, meta.mtime)?;
        if self.entries.get(&target).map(|entry| &entry.node) != Some(&Node::Other) {
            return Err(Error::Dangling { path: path.to_owned(), target: existing.to_owned() });
        }
        self.tree.hard_link(&place, &target).map_err(store(&place))?;
        self.claim(place, Node::Other, package);
        Ok(())
    }

    /// Makes a special file.
    pub fn device(
        &mut self,
        package: &Package<'_>,
        path: &str,
        meta: &Metadata,
        device: Device,
    ) -> Result<(), Error> {
        let Some(place) = self.free_place(package, path, meta)? else { return Ok(()) };
        self.tree.device(&place, meta, device).map_err(store(&place))?;
        self.claim(place, Node::Other, package);
        Ok(())
    }

    /// True if something is at the path, links in its parents followed.
    pub fn has(&mut self, path: &str) -> bool {
        self.place(path, 0).is_ok_and(|place| self.entries.contains_key(&place))
    }

    /// The paths of all files and links below a directory.
    pub fn below(&self, directory: &str) -> Vec<String> {
        let mut found: Vec<_> = self
            .entries
            .iter()
            .filter(|(path, entry)| {
                entry.node != Node::Directory
                    && path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
            })
            .map(|(path, _)| path.clone())
            .collect();
        found.sort_unstable();
        found
    }

    /// Files and directories there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The place of a new file, or nothing if it gives way to the file that is there.
    fn free_place(
        &mut self,
        package: &Package<'_>,
        path: &str,
        meta: &Metadata,
    ) -> Result<Option<String>, Error> {
        let place = self.place(path, meta.mtime)?;
        match self.entries.get(&place) {
            None if place.is_empty() => Err(Error::Path(path.to_owned())),
            None => Ok(Some(place)),
            // Packages that replace others are put in first, so what is there stays.
            Some(entry) if entry.node != Node::Directory && package.yields.contains(&entry.owner) => Ok(None),
            Some(_) => Err(self.conflict(&place, package)),
        }
    }

    fn claim(&mut self, place: String, node: Node, package: &Package<'_>) {
        self.entries.insert(place, Entry { node, owner: package.number });
    }

    fn conflict(&self, place: &str, package: &Package<'_>) -> Error {
        let owner = self.entries.get(place).and_then(|entry| package.names.get(entry.owner));
        let owner = owner.cloned().unwrap_or_else(|| "the base system".to_owned());
        Error::Conflict { path: format!("/{place}"), owner, package: package.name.to_owned() }
    }
}

fn store(path: &str) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::Store { path: format!("/{path}"), source }
}

/// The parts of a path; refuses `..`, zero bytes and absurd lengths.
pub fn plain_parts(path: &str) -> Result<Vec<&str>, Error> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if path.len() > 4095 || path.contains('\0') || parts.iter().any(|part| *part == ".." || part.len() > 255)
    {
        return Err(Error::Path(path.chars().take(256).collect()));
    }
    Ok(parts)
}

/// A reader that digests what passes.
struct Digesting<'a> {
    inner: &'a mut dyn Read,
    hash: Md5,
}

impl Read for Digesting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A tree of names in memory.
    #[derive(Default)]
    struct Names(BTreeMap<String, String>);

    impl Tree for Names {
        fn directory(&mut self, path: &str, meta: &Metadata) -> io::Result<()> {
            self.0.insert(path.into(), format!("d{:o}", meta.mode));
            Ok(())
        }
        fn file(&mut self, path: &str, _: &Metadata, _: u64, content: &mut dyn Read) -> io::Result<()> {
            let mut text = String::new();
            content.read_to_string(&mut text)?;
            self.0.insert(path.into(), text);
            Ok(())
        }
        fn symlink(&mut self, path: &str, _: &Metadata, target: &str) -> io::Result<()> {
            self.0.insert(path.into(), format!("-> {target}"));
            Ok(())
        }
        fn hard_link(&mut self, path: &str, existing: &str) -> io::Result<()> {
            self.0.insert(path.into(), format!("= {existing}"));
            Ok(())
        }
        fn device(&mut self, path: &str, _: &Metadata, device: Device) -> io::Result<()> {
            self.0.insert(path.into(), format!("{device:?}"));
            Ok(())
        }
    }

    fn package<'a>(
        number: usize,
        yields: &'a [usize],
        names: &'a [String],
        digests: &'a [String],
    ) -> Package<'a> {
        Package { number, name: names[number].as_str(), yields, names, digests }
    }

    #[test]
    fn follows_dpkgs_rules() {
        let names = ["one".to_owned(), "two".to_owned()];
        let conffiles = ["/etc/c".to_owned()];
        let meta = Metadata { mode: 0o755, ..Metadata::default() };
        let mut tree = Names::default();
        let mut root =
            Root::new(&mut tree, Keep { wants: |path| path == "usr/bin/sh", essence: |_, bytes| bytes }, 0)
                .unwrap();
        let one = package(0, &[], &names, &conffiles);
        let two = package(1, &[], &names, &[]);
        root.directory(&one, "bin", &meta).unwrap();
        root.directory(&one, "tmp", &Metadata { mode: 0o1777, ..meta }).unwrap();
        root.directory(&two, "tmp", &meta).unwrap();
        root.file(&one, "bin/sh", &meta, 2, &mut b"sh".as_slice()).unwrap();
        root.file(&one, "etc/c", &meta, 0, &mut io::empty()).unwrap();
        root.hard_link(&one, "lib/sh", &meta, "bin/sh").unwrap();
        root.symlink(&one, "lib", &meta, "usr/lib").unwrap();
        assert!(matches!(
            root.file(&two, "usr/bin/sh", &meta, 0, &mut io::empty()),
            Err(Error::Conflict { .. })
        ));
        root.file(&package(1, &[0], &names, &[]), "usr/bin/sh", &meta, 0, &mut io::empty()).unwrap();
        assert!(matches!(root.hard_link(&two, "x", &meta, "nothing"), Err(Error::Dangling { .. })));
        assert!(matches!(root.file(&two, "tmp", &meta, 0, &mut io::empty()), Err(Error::Conflict { .. })));
        root.symlink(&two, "knot", &meta, "knot").unwrap();
        assert!(matches!(root.file(&two, "knot/x", &meta, 0, &mut io::empty()), Err(Error::Path(_))));
        for bad in ["../x", "a/../b", "", "a\0b"] {
            assert!(root.file(&two, bad, &meta, 0, &mut io::empty()).is_err(), "{bad:?}");
        }
        assert_eq!(root.kept["usr/bin/sh"], b"sh");
        assert_eq!(root.digests["/etc/c"], "d41d8cd98f00b204e9800998ecf8427e");
        assert_eq!(tree.0["tmp"], "d1777");
        assert_eq!(tree.0["usr/bin/sh"], "sh");
        assert_eq!(tree.0["usr/lib/sh"], "= usr/bin/sh");
        assert_eq!(tree.0["bin"], "-> usr/bin");
    }
}
