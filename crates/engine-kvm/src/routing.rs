//! The way of messages to the kernel's local APICs.

use crate::engine::Vm;
use crate::host::Plain;
use crate::ioctl;
use cpu::LocalApics;
use kvm_bindings as kvm;
use kvm_bindings::{kvm_irq_routing_entry, kvm_msi};
use std::sync::{Arc, Mutex, PoisonError};

/// Bits 11-5 of a message's address are bits 14-8 of its destination (KVM_FEATURE_MSI_EXT_DEST_ID); KVM has them in the
/// address's upper half, as VT-d's remapping does.
const EXTENDED: u64 = 0xfe0;

/// A message's address in KVM's two halves.
pub(crate) fn halves(address: u64) -> (u32, u32) {
    let low = (address & !EXTENDED) as u32;
    let high = (address & EXTENDED) >> 5 << 8;
    (low, high as u32 | (address >> 32) as u32)
}

/// The local APICs of one VM.
pub(crate) struct Apics {
    vm: Arc<Vm>,
    /// What the I/O APIC's pins send, as the kernel knows it.
    pins: Mutex<Vec<(u64, u32)>>,
}

impl Apics {
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self { vm, pins: Mutex::default() }
    }
}

fn route(gsi: u32, (address, data): (u64, u32)) -> kvm_irq_routing_entry {
    let (low, high) = halves(address);
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: kvm::KVM_IRQ_ROUTING_MSI, ..kvm_irq_routing_entry::zeroed() };
    entry.u.msi = kvm::kvm_irq_routing_msi { address_lo: low, address_hi: high, data, ..Default::default() };
    entry
}

impl LocalApics for Apics {
    fn send(&self, address: u64, data: u32) {
        let (address_lo, address_hi) = halves(address);
        let message = kvm_msi { address_lo, address_hi, data, ..kvm_msi::zeroed() };
        // A message to nobody is the guest's own mistake; one that is blocked is pending already.
        let _ = self.vm.handle.set(ioctl::SIGNAL_MSI, message);
    }

    fn set_pins(&self, messages: &[(u64, u32)]) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if *pins == messages {
            return;
        }
        let entries: Vec<_> = (0u32..).zip(messages).map(|(gsi, &message)| route(gsi, message)).collect();
        // Without memory in the kernel for a table, ends of interrupts are not heard of until the next change.
        if self.vm.handle.list(ioctl::SET_GSI_ROUTING, &entries).is_ok() {
            *pins = messages.to_vec();
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn wide_destinations_are_where_kvm_looks_for_them() {
        assert_eq!(halves(0xfee0_3000), (0xfee0_3000, 0));
        assert_eq!(halves(0xfeef_f00c), (0xfeef_f00c, 0));
        // Destination 0x1ff: bit 5 is bit 8.
        assert_eq!(halves(0xfeef_f020), (0xfeef_f000, 0x100));
        assert_eq!(halves(0xfee0_0fe4), (0xfee0_0004, 0x7f00));
    }
}
