//! Why an image could not be made.

use std::io;

/// Shows a path that need not be UTF-8.
pub(crate) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Why an image could not be made, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The requested size cannot hold a file system.
    #[error("an ext4 file system of {size} bytes is too small: give it at least {least} bytes")]
    TooSmall {
        /// Bytes asked for.
        size: u64,
        /// Bytes that are certainly enough for an empty file system.
        least: u64,
    },
    /// The requested size needs more than 2^32 blocks.
    #[error(
        "an ext4 file system of {size} bytes is too large: the limit is {most} bytes (16T); choose less (--disk-size)"
    )]
    TooLarge {
        /// Bytes asked for.
        size: u64,
        /// Largest size in bytes.
        most: u64,
    },
    /// The label does not fit the superblock.
    #[error("the file system label is {length} bytes long: the limit is 16 bytes")]
    Label {
        /// Bytes in the label.
        length: usize,
    },
    /// The data does not fit.
    #[error(
        "the file system is full: {what} needs {missing} more bytes than are free; make the file system larger (--disk-size)"
    )]
    Full {
        /// What was being stored.
        what: String,
        /// Bytes (whole blocks) that were missing for it.
        missing: u64,
    },
    /// All inodes are in use.
    #[error("no inode is left for {path}: all {inodes} are used; make the file system larger (--disk-size)")]
    NoInodes {
        /// The path that needed one.
        path: String,
        /// Inodes of the file system.
        inodes: u32,
    },
    /// The path cannot exist in an ext4 file system, or tries to climb with `..`.
    #[error("cannot use the path {path:?}: {why}")]
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A path runs through something that is not a directory.
    #[error("cannot reach {path:?}: {through:?} in it is not a directory")]
    NotADirectory {
        /// The path.
        path: String,
        /// The component that is in the way.
        through: String,
    },
    /// A directory is in the way of something that is not one.
    #[error("cannot make {path:?}: a directory of that name exists")]
    IsADirectory {
        /// The path.
        path: String,
    },
    /// Too many symbolic links were followed.
    #[error("cannot reach {path:?}: more than {limit} symbolic links on the way, probably a loop")]
    SymlinkLoop {
        /// The path.
        path: String,
        /// Links followed at most.
        limit: u32,
    },
    /// The target of a hard link does not exist.
    #[error("cannot link to {path:?}: no such file")]
    NotFound {
        /// The missing path.
        path: String,
    },
    /// The target of a hard link has as many names as ext4 can count.
    #[error("cannot link to {path:?}: it has {limit} links already, the most that ext4 allows")]
    TooManyLinks {
        /// The linked path.
        path: String,
        /// Most links to one file.
        limit: u16,
    },
    /// A symbolic link's target is empty, too long or holds a NUL byte.
    #[error("cannot make the symbolic link {path:?}: its target must have 1 to 4095 bytes and no NUL")]
    SymlinkTarget {
        /// The link.
        path: String,
    },
    /// A device number does not fit its field.
    #[error(
        "cannot make the device {path:?}: {major}:{minor} is above 4095:1048575, the most that Linux stores"
    )]
    DeviceNumber {
        /// The device file.
        path: String,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// The file is larger than an ext4 file can be.
    #[error("the file {path:?} of {size} bytes is too large: the limit is {most} bytes")]
    FileTooLarge {
        /// The file.
        path: String,
        /// Its bytes.
        size: u64,
        /// Largest file in bytes.
        most: u64,
    },
    /// A directory has more entries than a two-level htree can index.
    #[error(
        "the directory with inode {inode} has too many entries ({entries}): spread them over subdirectories"
    )]
    DirectoryTooLarge {
        /// Its inode number.
        inode: u32,
        /// Its entries.
        entries: usize,
    },
    /// An extended attribute's name or value cannot be stored in the inode.
    #[error("cannot store the extended attribute {name:?}: {why}")]
    Xattr {
        /// The attribute's full name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A content reader failed or ended early.
    #[error("reading the content of {path:?} ({size} bytes) failed: {source}")]
    Content {
        /// The file.
        path: String,
        /// Bytes that it should have.
        size: u64,
        /// The reader's error.
        source: io::Error,
    },
    /// Writing the image failed.
    #[error("writing the image at byte {offset} failed: {source}")]
    Target {
        /// Where in the image.
        offset: u64,
        /// The target's error.
        source: io::Error,
    },
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
