//! Disk images: what a guest's disk is made of, usable alone. Knows no VM and no guest memory.
//!
//! * [`Disk`] is what every format is, seen from above: bytes at offsets, flush, discard.
//! * [`format`](mod@format) has the formats: raw, qcow2, QED and VHD; VHDX and VMDK to read.
//! * [`Image`] opens files, with the chain of images that they build on.
//! * [`job`] works on whole images: convert, compare, commit, rebase.
//! * [`nbd`] serves disks to clients of the NBD protocol.
//! * [`storage`] has what lies below a format: a file or block device of the host, locked against a second writer.
//! * [`Overlay`] lays private, disposable writes over an image that must not change.
//! * [`clone_file`] copies images, sharing blocks where the file system can, keeping holes where it cannot.
//!
//! Bytes move between an image and whatever holds them above (guest RAM, a network buffer) through [`Buffers`], so
//! that formats that need no copy make none.
#![deny(unsafe_code)]
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

mod buffers;
mod chain;
mod copy;
mod disk;
mod endian;
pub mod format;
pub mod job;
pub mod nbd;
mod open;
mod overlay;
mod row;
pub mod storage;
mod zeroes;

pub use buffers::{Buffers, Part, ReadInto, VecBuffers, WriteFrom};
pub use copy::{clone_file, share_blocks};
pub use disk::{Content, Disk, Error, Status};
pub use open::{
    Image, OpenOptions, beside, create_qcow2, create_qcow2_alone, create_qed, create_raw, create_vhd,
};
pub use overlay::Overlay;
pub use row::Row;
pub use zeroes::DetectZeroes;
