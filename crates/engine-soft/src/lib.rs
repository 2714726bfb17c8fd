//! The software engine: x86-64 system software on an x86-64 host without the help of /dev/kvm.
//!
//! Guest and host speak the same instruction set, so the host CPU supplies the semantics of every unprivileged
//! instruction, and this crate supplies what the host CPU must not do: addresses, privilege, control flow. Two tiers
//! share one [`state::CpuState`]:
//!
//! * the **single-step tier** ([`step`]), the oracle: system, control-flow and segment instructions interpreted as the
//!   manuals say, all others executed one at a time by the host CPU on guest state through re-encoded stubs;
//! * the **template tier** ([`translate`]): blocks of 64-bit code copied with rewritten operands, guest registers in
//!   host registers, memory through an inlined check of the software TLB ([`mmu`]).
//!
//! User code that computes for a while leaves both: it runs on the host's CPU in a process of its own (`direct`).
//!
//! What may enter: `cpu`, `memory`. No device, no image, no thread: a vCPU runs on its caller's thread.
#![deny(unsafe_code)]

mod access;
pub mod cpu_core;
mod debug;
mod deliver;
mod direct;
mod engine;
pub mod exception;
mod fetch;
mod host;
pub mod io;
pub mod mmu;
mod peers;
mod saved;
mod segmentation;
pub mod signal;
pub mod state;
pub mod step;
pub mod translate;
mod vcpu;
pub mod verify;

pub use engine::{Options, SoftEngine, look_at_clocks};
pub use vcpu::SoftVcpu;
