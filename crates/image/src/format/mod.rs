//! Disk image formats.

mod raw;

pub use raw::Raw;
