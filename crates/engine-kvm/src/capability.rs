//! What this KVM can do: what yado cannot do without, each with the kernel that brought it, and what it uses if it is there.

use crate::host::Handle;
use crate::ioctl::CHECK_EXTENSION;
use cpu::Error;
use kvm_bindings as kvm;

/// A capability without which there is no engine: number, name, the first kernel with it.
const NEEDED: &[(u32, &str, &str)] = &[
    (kvm::KVM_CAP_USER_MEMORY, "USER_MEMORY", "2.6.25"),
    (kvm::KVM_CAP_MP_STATE, "MP_STATE", "2.6.26"),
    (kvm::KVM_CAP_IRQFD, "IRQFD", "2.6.31"),
    (kvm::KVM_CAP_IOEVENTFD, "IOEVENTFD", "2.6.31"),
    (kvm::KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS", "2.6.33"),
    (kvm::KVM_CAP_DEBUGREGS, "DEBUGREGS", "2.6.35"),
    (kvm::KVM_CAP_XSAVE, "XSAVE", "2.6.36"),
    (kvm::KVM_CAP_XCRS, "XCRS", "2.6.36"),
    (kvm::KVM_CAP_GET_TSC_KHZ, "GET_TSC_KHZ", "2.6.39"),
    (kvm::KVM_CAP_SIGNAL_MSI, "SIGNAL_MSI", "3.5"),
    (kvm::KVM_CAP_SPLIT_IRQCHIP, "SPLIT_IRQCHIP", "4.4"),
    (kvm::KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", "4.13"),
    (kvm::KVM_CAP_X86_USER_SPACE_MSR, "X86_USER_SPACE_MSR", "5.10"),
    (kvm::KVM_CAP_X86_MSR_FILTER, "X86_MSR_FILTER", "5.10"),
];

/// What is used where it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Capabilities {
    /// vCPU ids in 32 bits (4.8).
    pub(crate) x2apic_api: bool,
    /// Paravirtual registers that CPUID does not offer are #GP (5.10).
    pub(crate) enforce_pv: bool,
    /// Entries of a vCPU's ring of dirty pages, at most (5.11); 0: none.
    pub(crate) dirty_ring: u32,
    /// Dirty pages are protected again only when asked (5.2).
    pub(crate) manual_protect: u32,
    /// Counters by file descriptor (5.14).
    pub(crate) statistics: bool,
    /// A triple fault that waits is part of a vCPU's events (6.0).
    pub(crate) triple_fault: bool,
    /// The local APIC timer has the deadline mode.
    pub(crate) tsc_deadline: bool,
    /// Doorbells do not mind how wide a write is (4.5): VT-x then rings them without decoding the instruction.
    pub(crate) any_width: bool,
    /// vCPUs that a VM may have.
    pub(crate) vcpus_max: u32,
}

/// The number that CHECK_EXTENSION answers; no answer is no.
pub(crate) fn check(vm: &Handle, capability: u32) -> u32 {
    vm.number(CHECK_EXTENSION, capability.into()).unwrap_or(0)
}

impl Capabilities {
    /// Asks a VM.
    pub(crate) fn of(vm: &Handle) -> Result<Self, Error> {
        let missing: Vec<_> = NEEDED.iter().filter(|(number, ..)| check(vm, *number) == 0).collect();
        if !missing.is_empty() {
            let names: Vec<_> =
                missing.iter().map(|(_, name, since)| format!("KVM_CAP_{name} (Linux {since})")).collect();
            return Err(Error::Unsupported {
                engine: "kvm",
                why: format!("its KVM lacks {}; use a newer host kernel, or --engine soft", names.join(", ")),
            });
        }
        let has = |capability| check(vm, capability) != 0;
        Ok(Self {
            x2apic_api: has(kvm::KVM_CAP_X2APIC_API),
            enforce_pv: has(kvm::KVM_CAP_ENFORCE_PV_FEATURE_CPUID),
            // The number is bytes; an entry has 16.
            dirty_ring: check(vm, kvm::KVM_CAP_DIRTY_LOG_RING)
                .max(check(vm, kvm::KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
                / 16,
            manual_protect: check(vm, kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
            statistics: has(kvm::KVM_CAP_BINARY_STATS_FD),
            triple_fault: has(kvm::KVM_CAP_X86_TRIPLE_FAULT_EVENT),
            tsc_deadline: has(kvm::KVM_CAP_TSC_DEADLINE_TIMER),
            any_width: has(kvm::KVM_CAP_IOEVENTFD_ANY_LENGTH),
            // 4 is what the oldest kernels mean by no answer.
            vcpus_max: check(vm, kvm::KVM_CAP_MAX_VCPUS).max(4),
        })
    }
}
