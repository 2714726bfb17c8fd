//! The crc32c chains of `metadata_csum` (kernel docs: ext4/checksums).

/// A running crc32c as ext4 counts it: it starts at all ones and is not inverted at the end.
#[derive(Clone, Copy)]
pub(crate) struct Checksum(u32);

impl Checksum {
    /// The start of the superblock's checksum.
    pub fn start() -> Self {
        // The crate inverts before and after; keeping its form makes "all ones, not inverted" a plain zero.
        Self(0)
    }

    /// The seed of all other checksums of a file system.
    pub fn seed(uuid: &[u8; 16]) -> Self {
        Self::start().add(uuid)
    }

    /// The seed of what belongs to one inode. All generations are 0 here.
    pub fn of_inode(self, inode: u32) -> Self {
        self.add(&inode.to_le_bytes()).add(&[0; 4])
    }

    pub fn add(self, bytes: &[u8]) -> Self {
        Self(crc32c::crc32c_append(self.0, bytes))
    }

    pub fn value(self) -> u32 {
        !self.0
    }
}
