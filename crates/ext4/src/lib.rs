//! Makes a fresh ext4 file system, streaming, without root and without `mke2fs`.
//!
//! A [`Writer`] takes directories, files, links and devices in any order, writes file contents to a [`Target`] as
//! they arrive, and writes everything else (directories, inode tables, bitmaps, group descriptors, superblocks) in
//! [`Writer::finish`]. Only names, metadata and extents are held in memory.
//!
//! What comes out is what `mke2fs -t ext4` makes: 4 KiB blocks, 256-byte inodes, 64-bit descriptors, flexible block
//! groups, extents, crc32c on all metadata, hashed directories (htree) above one block, an empty journal, and a resize
//! inode, so that `resize2fs` can grow the mounted file system. Two choices differ: no blocks are reserved for root, and
//! a block of a file that holds only zeros becomes a hole.
//!
//! States: open (after [`Writer::new`]), then finished (the image is valid only after `finish` returned `Ok`). A call
//! that fails leaves the tree as it was, apart from parent directories made on demand, and the writer usable. There
//! are no threads and no locks.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use ext4::{Metadata, Options, Writer};
//!
//! let options = Options { label: "root".into(), ..Options::new(64 << 20) };
//! let mut writer = Writer::new(tempfile::tempfile()?, &options)?;
//! writer.symlink(b"/bin", &Metadata::new(0o777, 0), b"usr/bin")?;
//! writer.file(b"/bin/hello", &Metadata::new(0o755, 0), 5, &b"hello"[..])?; // lands in /usr/bin
//! let summary = writer.finish()?;
//! assert_eq!(summary.directories, 4); // the root, lost+found, usr and usr/bin
//! # Ok(()) }
//! ```
//!
//! Layout and field names follow the kernel's `Documentation/filesystems/ext4/`.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod allocator;
mod checksum;
mod directory;
mod error;
mod extent;
mod finish;
mod half_md4;
mod inode;
mod journal;
mod layout;
mod record;
mod resize;
mod superblock;
mod target;
mod tree;
mod writer;
mod xattr;

pub use error::Error;
pub use inode::{DeviceKind, Metadata};
pub use target::Target;
pub use writer::{Options, Summary, Writer};

/// Bytes in a block of the file systems made here.
pub const BLOCK_SIZE: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
