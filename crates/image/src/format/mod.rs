//! Disk image formats.

pub mod qcow2;
mod raw;

pub use raw::Raw;
