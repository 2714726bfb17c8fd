//! virtio-blk (5.2): a disk.

mod device;
mod spec;

pub use device::{Block, BlockDevice};
