//! An NVM Express controller with one namespace: the disk that stock Debian kernels mount without an initrd.
//!
//! [`Nvme`] is a PCI function towards the guest and a [`device::block::Controller`] towards the thread that does its
//! I/O. Admin commands are executed at the doorbell; I/O commands become requests when the worker asks for them.
//!
//! States: *disabled* (CC.EN 0) -> *ready* -> (CC.EN cleared) *draining*, until every request handed to the worker is
//! answered, because a disk that still writes into RAM the guest has taken back is the classic bug -> *disabled*.
//!
//! What may enter: `chipset` (for PCI), `device`, `memory`. Reference: NVM Express Base Specification 1.4.
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

mod admin;
mod data;
mod device_side;
mod identify;
mod io;
mod queue;
mod spec;
#[cfg(test)]
mod test;

pub use device_side::{Nvme, NvmeConfig, fuzz};
