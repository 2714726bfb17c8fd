//! Virtio devices as guests' own drivers expect them (Virtual I/O Device 1.2; section numbers refer to it).
//!
//! What lives here: split virtqueues ([`queue`]), the PCI transport ([`transport::Pci`]), and one folder per device,
//! each with the same files: `spec` (numbers from the specification), `device` (behaviour), `test` (a fake driver).
//! What may enter: `chipset` (for PCI), `device`, `memory`, `net` (what frames are). No file, socket, clock or thread: bytes,
//! disk requests and frames leave through `device::serial::Endpoint`, `device::block::Controller` and `net::Card`.
//!
//! The guest is hostile. Rings are parsed completely before anything is done with them, and a ring that breaks the rules
//! puts its device into DEVICE_NEEDS_RESET (2.1.1): it touches no guest memory until the driver has reset it.
//!
//! Lock order: none here; a device is locked by its holder, and calls out only to its message sink, its INTx wire and
//! its `Notify`, none of which may call back.
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

mod block;
mod console;
#[cfg(test)]
mod driver;
mod fuzz;
mod net;
pub mod queue;
mod rng;
pub mod transport;

pub use self::net::{Lending, Loan, Net, NetConfig, NetDevice};
pub use block::{Block, BlockDevice};
pub use console::{CONSOLE_PORT, Console, ConsoleDevice};
#[doc(hidden)]
pub use fuzz::{fuzz_block, fuzz_console, fuzz_net, fuzz_rng};
pub use rng::{EntropySource, Rng, RngDevice};
pub use transport::Bell;
