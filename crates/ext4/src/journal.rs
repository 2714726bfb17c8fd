//! The journal of a file system that was never mounted: its superblock, and nothing in it (kernel docs: ext4/journal).
//! Alone among ext4's structures it is big-endian.

use crate::BLOCK_BYTES;
use crate::record::put;

const MAGIC: u32 = 0xc03b_3998;
const SUPERBLOCK_V2: u32 = 4;
/// The transaction number that the first mount will use.
const FIRST_SEQUENCE: u32 = 1;

/// The journal's first block; `length` is in blocks. A start of 0 says that the rest is not looked at.
pub(crate) fn superblock(length: u32, uuid: &[u8; 16]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    let fields = [
        (0x00, MAGIC),
        (0x04, SUPERBLOCK_V2),
        (0x0c, BLOCK_BYTES as u32),
        (0x10, length),
        (0x14, 1), // the first block behind this one
        (0x18, FIRST_SEQUENCE),
        (0x40, 1), // one file system uses it
    ];
    for (offset, value) in fields {
        put(&mut block, offset, &value.to_be_bytes());
    }
    put(&mut block, 0x30, uuid);
    block
}
