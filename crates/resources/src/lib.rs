//! What a guest's process takes of the host: on which CPUs its threads run and how urgently ([`scheduling`]), and how much of
//! CPU time, memory and I/O it may use ([`cgroup`]).
//!
//! It is all arranged before the process gives up its rights, and where the host refuses, the error says which right is missing.
//!
//! What may enter: nothing of yado's.
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

pub mod cgroup;
mod priority;
pub mod scheduling;

pub use cgroup::{Groups, IoLimits, Limits};
pub use priority::Priority;
pub use scheduling::{Scheduling, Threads};
