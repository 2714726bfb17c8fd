//! Devices named after chips.
//!
//! What lives here: the parts of a PC that are not paravirtual. What may enter: `device`. Each part is a value (no
//! clock, file, socket or thread), driven by register accesses and VM time.
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

mod byte_wide;
pub mod ioapic;
pub mod local_apic;
pub mod msi;
pub mod pci;
pub mod pic8259;
pub mod pit8254;
pub mod power;
pub mod rtc;
pub mod test_devices;
pub mod uart16550;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; a device whose thread panicked elsewhere keeps its registers.
pub(crate) fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
