//! From nothing to a bootable Debian guest: packages from a mirror, verified, resolved and unpacked straight into an ext4 image.
//!
//! No program of the host is run and no privilege is needed. The way of a build:
//!
//! 1. [`sources`] says where archives may be, from the host's APT configuration or `--mirror`.
//! 2. [`repository`] fetches each suite's InRelease; [`signature`] believes it only if a Debian archive key signed it, [`release`] only
//!    if it is current and no older than one seen before. The index, and every package, must have the size and SHA-256 that
//!    this chain of trust says.
//! 3. [`resolve`](mod@resolve) chooses packages from the [`index`] of all suites.
//! 4. [`repository`] downloads them in parallel into the content-addressed [`cache`].
//! 5. [`unpack`](mod@unpack) decompresses them in parallel into the [`tree`], which lays them into an ext4 image as they come.
//! 6. [`setup`] writes what a first boot needs in place of maintainer scripts; [`dpkg`] writes dpkg's database, with every package
//!    unpacked but not configured, so that `dpkg --configure -a` inside the guest does the rest.
//! 7. [`initramfs`] makes an initial RAM disk, for kernels that cannot mount their root without one.
//!
//! The result is named by the hash of all that went into it and never changes. Threads: downloads and decompression have their
//! own; [`Progress`] is only called from the caller's. Locks: the cache's file lock is held for a whole build; no other lock is
//! taken while it is waited for.
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

pub mod accounts;
pub mod archive;
mod build;
pub mod cache;
pub mod control;
pub mod date;
pub mod deb;
pub mod dpkg;
pub mod fetch;
mod image;
pub mod index;
pub mod initramfs;
pub mod modules;
pub mod prune;
pub mod relation;
pub mod release;
pub mod repository;
pub mod resolve;
pub mod setup;
pub mod signature;
pub mod sources;
pub mod tree;
pub mod unpack;
pub mod version;

pub use build::{Error, Image, KernelFlavour, Phase, Progress, Request, Silent, build};
pub use setup::{Content, GuestFile};

/// The Debian name of the guests' architecture.
pub const ARCHITECTURE: &str = "amd64";
