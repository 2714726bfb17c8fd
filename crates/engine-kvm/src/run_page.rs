//! `struct kvm_run`, the page that a vCPU shares with the kernel (Linux `Documentation/virt/kvm/api.rst`, section 5).
//!
//! Only the vCPU's thread touches it, outside KVM_RUN, but for one byte: `immediate_exit`, which anybody may set.

use crate::host::{Mapping, Plain};
use kvm_bindings::kvm_run;
use std::mem::offset_of;
use std::sync::atomic::Ordering;

const UNION: usize = offset_of!(kvm_run, __bindgen_anon_1);

/// See the module page.
pub(crate) struct RunPage(Mapping);

impl RunPage {
    pub(crate) fn new(mapping: Mapping) -> Self {
        Self(mapping)
    }

    /// Why KVM_RUN came back.
    pub(crate) fn exit_reason(&self) -> u32 {
        self.0.get(offset_of!(kvm_run, exit_reason))
    }

    /// What the exit has to say.
    pub(crate) fn detail<T: Plain>(&self) -> T {
        self.0.get(UNION)
    }

    /// Answers the exit.
    pub(crate) fn set_detail<T: Plain>(&self, detail: T) {
        self.0.put(UNION, detail);
    }

    /// Makes the next KVM_RUN return at once, or not. From any thread.
    pub(crate) fn set_immediate_exit(&self, wanted: bool) {
        if let Some(byte) = self.0.atomic_u8(offset_of!(kvm_run, immediate_exit)) {
            byte.store(wanted.into(), Ordering::SeqCst);
        }
    }

    /// Asks for KVM_EXIT_IRQ_WINDOW_OPEN.
    pub(crate) fn request_interrupt_window(&self, wanted: bool) {
        self.0.put(offset_of!(kvm_run, request_interrupt_window), u8::from(wanted));
    }

    /// Whether the guest could take an interrupt of the 8259A when KVM_RUN came back.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        self.0.get::<u8>(offset_of!(kvm_run, ready_for_interrupt_injection)) != 0
    }

    /// One item of string I/O: `size` bytes little-endian at an offset that the kernel named.
    pub(crate) fn data(&self, offset: u64, size: u8) -> u64 {
        (0..usize::from(size)).rev().fold(0, |value, byte| {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(byte);
            value << 8 | u64::from(self.0.get::<u8>(at))
        })
    }

    /// Stores one item.
    pub(crate) fn set_data(&self, offset: u64, size: u8, value: u64) {
        for (byte, value) in value.to_le_bytes().into_iter().take(size.into()).enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(byte);
            // Never the registers of this page, whatever offset a kernel names.
            if at >= size_of::<kvm_run>() {
                self.0.put(at, value);
            }
        }
    }
}
