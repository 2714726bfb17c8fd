//! virtio-blk (5.2): a disk.

mod device;
mod spec;
#[cfg(test)]
mod test;

pub use device::{Block, BlockDevice};
