//! The KVM engine: the same [`cpu::Engine`] and [`cpu::Vcpu`] as the software engine, over /dev/kvm; and [`probe`], which
//! finds out whether this host's /dev/kvm really runs kernels, by running a small guest of ours on it.
//!
//! From the kernel up: [`ioctl`](mod@ioctl) names the requests, `host` makes them (or a double answers in the kernel's stead),
//! `run_page` is what a vCPU shares with the kernel, `access` cuts device accesses to natural widths, `state` moves register
//! groups, `cpuid` and `msr` say what guests see of the processor, `routing` sends interrupts, `doorbell` hears notifications,
//! `vcpu` and `engine` are the seam. `failure` puts into words what should not happen.
//!
//! What may enter: `cpu`, `memory`.
#![deny(unsafe_code)]
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

mod access;
mod capability;
mod cpuid;
mod dirty;
mod doorbell;
#[cfg(any(test, fuzzing))]
mod double;
mod engine;
mod failure;
#[cfg(any(test, fuzzing))]
mod fuzz;
mod guest;
mod host;
mod ioctl;
mod kick;
mod msr;
pub mod probe;
mod registers;
mod routing;
mod run_page;
mod state;
mod statistics;
#[cfg(test)]
mod test;
mod vcpu;

pub use engine::{KvmEngine, Options};
#[cfg(fuzzing)]
pub use fuzz::fuzz_exits;
pub use probe::{Verdict, probe};
pub use vcpu::KvmVcpu;
