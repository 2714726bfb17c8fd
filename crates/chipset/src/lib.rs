//! Devices named after chips.
//!
//! What lives here: the parts of a PC that are not paravirtual. What may enter: `device`. Each part is a value (no
//! clock, file, socket or thread), driven by register accesses and VM time. Three of them are handles, since others
//! reach into them from other threads: [`ioapic::IoApic`], [`pic8259::Pic8259`] and [`pci::Host`].
//!
//! The wiring of the PC board (constants in [`board`]):
//!
//! | device | ports or address | window | interrupt |
//! |---|---|---|---|
//! | [`pic8259`] | 0x20-0x21, 0xa0-0xa1, 0x4d0-0x4d1 | `MASTER`, `SLAVE`, `ELCR` | to LINT0 of vCPU 0 |
//! | [`pit8254`] | 0x40-0x43, 0x61 | `COUNTERS`, `SPEAKER` | IRQ 0, GSI 2 |
//! | [`power`] | 0x600-0x60f (PM block), 0x60, 0x64, 0x92 | `PM`, `I8042_DATA`, `I8042`, `PORT_92` | SCI, GSI 9 |
//! | [`rtc`] | 0x70-0x71 | - | IRQ 8 |
//! | [`uart16550`] COM1, COM2 | 0x3f8-0x3ff, 0x2f8-0x2ff | - | IRQ 4, IRQ 3 |
//! | [`pci::Host`] | 0xcf8-0xcff (0xcf9 resets), 0xe0000000 (1 MiB ECAM) | `PORTS`, `ECAM` | INTx on GSI 16-19 |
//! | BARs of PCI functions | ports 0xc000-0xcfff, 0xc0000000-0xdfffffff, 0x4000000000-0x7fffffffff | `Host::port`, `Host::mmio` | MSI-X |
//! | [`ioapic`] | 0xfec00000 | - | messages to the local APICs |
//! | [`local_apic`] | 0xfee00000, MSRs 0x800-0x8ff | - | - |
//! | [`test_devices`] exit, console | 0xf4-0xf7, 0xe9 | - | - |
//! | [`test_devices`] pc-testdev | 0x2000-0x2017, 0xe0-0xe3, 0xe4-0xe7, 0xff000000 (64 KiB) | `IRQS`, `SCRATCH`, `FLUSH`, `MEMORY` | GSI 0-23 |
//!
//! Lock order: PCI host -> function -> INTx wires -> 8259A or I/O APIC -> local APIC. A local APIC locks nothing.
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

#[macro_use]
mod saved;

pub mod acpi;
pub mod board;
mod byte_wide;
pub mod ioapic;
pub mod local_apic;
pub mod msi;
pub mod pci;
pub mod pic8259;
pub mod pit8254;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod test_devices;
pub mod uart16550;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; a device whose thread panicked elsewhere keeps its registers.
pub(crate) fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
