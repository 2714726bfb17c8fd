//! Inodes: what is known of a file beside its name and content (kernel docs: ext4/inodes).

use crate::checksum::Checksum;
use crate::error::Result;
use crate::extent::ROOT_BYTES;
use crate::layout::INODE_SIZE;
use crate::record::{Record, high16, high32, low16, low32, put};
use crate::{BLOCK_SIZE, xattr};

pub(crate) const ROOT: u32 = 2;
pub(crate) const RESIZE: u32 = 7;
pub(crate) const JOURNAL: u32 = 8;
/// The first inode that is not reserved; it becomes `lost+found`.
pub(crate) const FIRST: u32 = 11;

/// `i_flags`: the directory has an htree.
pub(crate) const FLAG_INDEX: u32 = 0x1000;
/// `i_flags`: `i_block` holds an extent tree.
pub(crate) const FLAG_EXTENTS: u32 = 0x8_0000;

/// Fixed fields of the part behind the first 128 bytes.
const EXTRA_ISIZE: u16 = 32;
const CHECKSUM_LOW: usize = 124;
const CHECKSUM_HIGH: usize = 130;

/// Owner, permissions, time and extended attributes of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// Permission bits with set-user-ID, set-group-ID and sticky bit; the file type in it is ignored.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970; ext4 holds those of the years 1901 to 2446, others become the nearest of these.
    pub mtime: i64,
    /// Extended attributes with their full names (`security.capability`). They must fit the inode: about 92 bytes with
    /// 16 for each. `user.`, `trusted.` and `security.` are known.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Metadata {
    /// Of a file that belongs to root and has no extended attributes.
    pub fn new(mode: u16, mtime: i64) -> Self {
        Self { mode, mtime, ..Self::default() }
    }
}

/// A special file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A named pipe; it has no numbers.
    Fifo,
    /// A socket; it has no numbers.
    Socket,
}

/// The type of a file: its bits in `i_mode` and its number in directory entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Regular,
    Directory,
    Symlink,
    Device(DeviceKind),
}

impl FileType {
    fn mode(self) -> u16 {
        match self {
            Self::Device(DeviceKind::Fifo) => 0x1000,
            Self::Device(DeviceKind::Character) => 0x2000,
            Self::Directory => 0x4000,
            Self::Device(DeviceKind::Block) => 0x6000,
            Self::Regular => 0x8000,
            Self::Symlink => 0xa000,
            Self::Device(DeviceKind::Socket) => 0xc000,
        }
    }

    pub fn in_directory(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::Device(DeviceKind::Character) => 3,
            Self::Device(DeviceKind::Block) => 4,
            Self::Device(DeviceKind::Fifo) => 5,
            Self::Device(DeviceKind::Socket) => 6,
            Self::Symlink => 7,
        }
    }
}

/// All that an inode on disk says.
pub(crate) struct Inode<'a> {
    pub file_type: FileType,
    pub meta: &'a Metadata,
    pub links: u16,
    pub size: u64,
    /// Blocks of content and of whatever maps it.
    pub blocks: u64,
    pub flags: u32,
    pub block: [u8; ROOT_BYTES],
    /// Time of the inode's making and last change.
    pub made: i64,
}

impl Inode<'_> {
    /// The 256 bytes for the inode table.
    pub fn encode(&self, seed: Checksum) -> Result<Vec<u8>> {
        let (made, made_extra) = timestamp(self.made);
        let (modified, modified_extra) = timestamp(self.meta.mtime);
        let sectors = self.blocks.saturating_mul(BLOCK_SIZE / 512);
        let mut record = Record::new();
        record.u16(self.file_type.mode() | (self.meta.mode & 0o7777)).u16(low16(self.meta.uid));
        record.u32(low32(self.size)).u32(modified).u32(made).u32(modified).u32(0);
        record.u16(low16(self.meta.gid)).u16(self.links).u32(low32(sectors)).u32(self.flags);
        record.at(40).bytes(&self.block);
        record.at(108).u32(high32(self.size));
        record.at(116).u16(low16(high32(sectors)));
        record.at(120).u16(high16(self.meta.uid)).u16(high16(self.meta.gid));
        record.at(128).u16(EXTRA_ISIZE);
        record.at(132).u32(made_extra).u32(modified_extra).u32(modified_extra).u32(made).u32(made_extra);
        record.at(160).bytes(&xattr::encode(&self.meta.xattrs)?);
        let mut bytes = record.take(INODE_SIZE as usize);
        let checksum = seed.add(&bytes).value();
        put(&mut bytes, CHECKSUM_LOW, &low16(checksum).to_le_bytes());
        put(&mut bytes, CHECKSUM_HIGH, &high16(checksum).to_le_bytes());
        Ok(bytes)
    }
}

/// The 32 bits of a time and its "extra" word, whose two lowest bits continue the seconds (kernel docs: ext4/inodes,
/// inode timestamps).
fn timestamp(seconds: i64) -> (u32, u32) {
    const LEAST: i64 = i32::MIN as i64;
    const MOST: i64 = 0x3_7fff_ffff;
    let seconds = seconds.clamp(LEAST, MOST);
    let low = seconds as i32;
    let epoch = seconds.wrapping_sub(i64::from(low)) >> 32;
    (low.cast_unsigned(), (epoch & 3) as u32)
}

/// `i_block` of a device: the 8:8 form where it fits, else the 12:20 form of Linux.
pub(crate) fn device_numbers(major: u32, minor: u32) -> [u8; ROOT_BYTES] {
    let mut block = [0; ROOT_BYTES];
    if major < 256 && minor < 256 {
        put(&mut block, 0, &((major << 8) | minor).to_le_bytes());
    } else {
        let wide = (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12);
        put(&mut block, 4, &wide.to_le_bytes());
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_use_the_epoch_bits() {
        assert_eq!(timestamp(0), (0, 0));
        assert_eq!(timestamp(-1), (0xffff_ffff, 0));
        assert_eq!(timestamp(0x7fff_ffff), (0x7fff_ffff, 0));
        assert_eq!(timestamp(0x8000_0000), (0x8000_0000, 1));
        assert_eq!(timestamp(i64::MAX), (0x7fff_ffff, 3));
        assert_eq!(timestamp(i64::MIN), (0x8000_0000, 0));
    }
}
