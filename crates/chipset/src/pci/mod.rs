//! PCI: configuration space, MSI-X, and a root bus (PCI Local Bus 3.0, PCI Express Base 5.0).
//!
//! A device elsewhere implements [`Function`]: it owns a [`ConfigSpace`] (built once, then driven by the guest) and,
//! if it has message interrupts, a [`MsiX`]. The board puts functions on a [`Host`], which answers configuration
//! accesses and says which function and BAR an address belongs to.
//!
//! Lock order: host configuration lock -> function lock -> (a function's interrupts) INTx wires -> interrupt
//! controllers. The routing table is read with no other lock held.

mod config;
mod host;
mod msix;
#[cfg(test)]
mod test;

pub use config::{Bar, BarKind, ConfigSpace, ConfigSpaceState, Identity, command};
pub use host::{Decoded, Host, SharedFunction, Window};
pub use msix::{MSIX_CAPABILITY, MsiX, MsiXState};

use device::VmTime;

/// Capability id "vendor specific" (PCI code and ID assignment, section 2).
pub const VENDOR_CAPABILITY: u8 = 0x09;
/// Capability id "PCI Express".
pub const EXPRESS_CAPABILITY: u8 = 0x10;

/// A function on a PCI bus. All calls come with the function locked.
pub trait Function: Send {
    /// Name for people and for `inspect`.
    fn name(&self) -> &'static str;
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;
    /// Its configuration space, for writing.
    fn config_mut(&mut self) -> &mut ConfigSpace;
    /// The guest reads `size` (1, 2, 4 or 8) bytes at `offset` in BAR `bar`; the access is inside the BAR.
    fn bar_read(&mut self, bar: u8, offset: u64, size: u8, now: VmTime) -> u64;
    /// The guest writes to BAR `bar`.
    fn bar_write(&mut self, bar: u8, offset: u64, size: u8, value: u64, now: VmTime);
    /// The guest is about to read configuration space at `offset` (for registers that read through to elsewhere).
    fn config_reading(&mut self, _offset: u16) {}
    /// The guest has written configuration space at `offset`. A function with MSI-X calls [`MsiX::sync`] here.
    fn config_written(&mut self, _offset: u16) {}
    /// When [`Self::tick`] is due.
    fn deadline(&self) -> Option<VmTime> {
        None
    }
    /// Time has passed.
    fn tick(&mut self, _now: VmTime) {}
    /// Back to the power-up state, with [`ConfigSpace::reset`].
    fn reset(&mut self);
    /// The live state, for people.
    fn inspect(&self) -> serde_json::Value;
}
