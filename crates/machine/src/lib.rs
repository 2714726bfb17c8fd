//! One virtual machine: kernel loading, board wiring, the vCPU loop, timers, lifecycle.
//!
//! What may enter: every crate below (`cpu`, `memory`, `device`, the engines, `chipset`, `virtio`, `nvme`, `image`).
//! No terminal, no command line: those are the `yado` binary's.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(any(test, fuzzing)),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod agent;
mod board;
pub mod boot;
mod buses;
mod clock;
mod config;
pub mod console;
pub mod control;
mod functions;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod kernel;
mod lending;
mod lifecycle;
mod linux;
mod machine;
mod network;
mod notice;
pub mod numa;
mod observe;
mod panic_watch;
pub mod port;
mod ram;
mod restart;
mod standstill;
pub mod storage;
mod timers;
mod vcpu;

pub use config::{
    BackEnd, DiskConfig, DiskInterface, EngineKind, MachineConfig, MemoryPolicy, NetworkConfig, NetworkKind,
    OnError,
};
pub use engine_soft::look_at_clocks;
pub use functions::Error as FunctionError;
#[cfg(fuzzing)]
pub use fuzz::fuzz_exits;
pub use lifecycle::{Crash, Outcome};
pub use machine::{CPUS_MAX, Error, Machine};
pub use notice::Notice;
pub use numa::{NodeConfig, NumaConfig};
