//! The KVM engine's room. What lives here today: [`probe`], which finds out whether this host's /dev/kvm really runs
//! kernels, by running a small guest of ours on it. The engine itself, behind the same traits as the software engine,
//! moves in with its own issue.
//!
//! What may enter: `cpu`, `memory`.
#![deny(unsafe_code)]

mod guest;
mod interrupt;
pub mod probe;

pub use probe::{Verdict, probe};
