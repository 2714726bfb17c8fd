//! Doorbells: writes of the guest that signal an event counter in the kernel (KVM_IOEVENTFD), without an exit to this process.
//!
//! The kernel has a thousand of them for a VM, and does not hang two that it cannot tell apart; what it refuses stays an exit.

use crate::engine::Vm;
use crate::host::Plain;
use crate::ioctl;
use cpu::Doorbells;
use kvm_bindings as kvm;
use kvm_bindings::kvm_ioeventfd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// Bytes of a notification (virtio 1.3, 4.1.5.2).
const WIDTH: u32 = 2;
/// As many as the guest likes.
const ANY_WIDTH: u32 = 0;

/// The doorbells of one VM.
pub(crate) struct Bells(Arc<Vm>);

impl Bells {
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self(vm)
    }

    fn tell(&self, address: u64, event: BorrowedFd<'_>, flags: u32) -> bool {
        let bell = kvm_ioeventfd {
            addr: address,
            len: if self.0.capabilities.any_width { ANY_WIDTH } else { WIDTH },
            fd: event.as_raw_fd(),
            flags,
            ..kvm_ioeventfd::zeroed()
        };
        self.0.handle.set(ioctl::IOEVENTFD, bell).is_ok()
    }
}

impl Doorbells for Bells {
    fn hang(&self, address: u64, event: BorrowedFd<'_>) -> bool {
        self.tell(address, event, 0)
    }

    fn take_down(&self, address: u64, event: BorrowedFd<'_>) {
        self.tell(address, event, 1 << kvm::kvm_ioeventfd_flag_nr_deassign);
    }
}
