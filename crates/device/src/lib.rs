//! What every device is made of.
//!
//! A device is a value: `&mut self`, single-threaded, with no clock, file, socket or thread of its own. It gets
//! register accesses ([`Device`]), the time ([`VmTime`]), interrupt lines ([`Line`], [`MsiSink`]), guest RAM
//! (`memory::GuestMemory`) and, for storage and byte streams, request queues ([`block`], [`serial`]) from outside.
//! What may enter: `memory`. No chip and no protocol lives here.
//!
//! Lock order: the machine locks one device at a time and holds no other lock while it does; a device that raises
//! a line or sends an MSI calls out of its own lock into the interrupt controllers, which never call devices.
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

pub mod block;
mod bus;
mod interrupt;
mod saved;
pub mod serial;
mod time;

pub use bus::{Bus, RangeTaken};
pub use interrupt::{Line, Msi, MsiSink, Notify};
pub use saved::{Saved, StateError};
pub use time::VmTime;

/// One access to a register window of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Which of the device's windows (a device with one window ignores it). The board says the number when it puts
    /// the device on a bus.
    pub window: u16,
    /// Byte offset in the window. The access ends inside the window.
    pub offset: u64,
    /// Width in bytes: 1, 2, 4 or 8.
    pub size: u8,
}

impl Access {
    /// The bits that an access of this width covers.
    pub fn mask(&self) -> u64 {
        match self.size {
            0 => 0,
            1..=7 => (1u64 << (u32::from(self.size).wrapping_mul(8))).wrapping_sub(1),
            _ => u64::MAX,
        }
    }
}

/// A device on a bus.
pub trait Device: Send {
    /// Name for people and for `inspect`, such as `uart16550` or `nvme`.
    fn name(&self) -> &'static str;
    /// Reads a register. Reads of nothing answer all ones by custom.
    fn read(&mut self, access: Access, now: VmTime) -> u64;
    /// Writes a register.
    fn write(&mut self, access: Access, value: u64, now: VmTime);
    /// When [`Self::tick`] is due next, asked again after every access and tick.
    fn deadline(&self) -> Option<VmTime> {
        None
    }
    /// Time has passed. `now` is at or after the deadline, or the machine resumed.
    fn tick(&mut self, _now: VmTime) {}
    /// Back to the state after power-up.
    fn reset(&mut self);
    /// The live state, for people: names as in the datasheet.
    fn inspect(&self) -> serde_json::Value;
}
