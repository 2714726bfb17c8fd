//! x86-64 as data, and the one seam behind which every CPU engine stands.
//!
//! What lives here: the architectural state ([`Registers`], [`msr`]), CPUID models ([`cpuid`]), exceptions, and the
//! traits [`Engine`] and [`Vcpu`] with the one [`Exit`] enum. What may enter: `memory`. No engine, no device.
#![forbid(unsafe_code)]

pub mod cpuid;
mod engine;
pub mod msr;
mod registers;
mod state;

pub use engine::{Doorbells, Engine, Error, Exit, HostCode, Kick, LocalApics, Space, Vcpu, VcpuConfig};
pub use registers::{DescriptorTable, Registers, Segment, attr, cr0, cr4, efer, rflags};
pub use state::{Activity, Events, Exception, Shadow, VcpuState};
