//! The engines that this host has, and what is known to be wrong with its KVM: tests of machines run on every engine, and
//! what one gets wrong is listed here by name. A fault that is listed must show (`faults.rs` of the suite looks), so that
//! the list stays true.

#![allow(dead_code)]

pub mod elf;

use machine::EngineKind;

/// Something that a KVM back end gets wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// How tests name it.
    pub name: &'static str,
    /// What is wrong.
    pub what: &'static str,
}

macro_rules! faults {
    ($($constant:ident = $what:literal;)*) => {
        $(
            #[doc = $what]
            pub const $constant: Fault = Fault { name: stringify!($constant), what: $what };
        )*
        /// What is wrong with kvm_pvm, the back end without VT-x or SVM: it emulates kernel code one instruction at a
        /// time, and not every one, and keeps some of a processor's ways for itself.
        const OF_PVM: &[Fault] = &[$($constant),*];
    };
}

faults! {
    BREAKPOINT = "INT3 in kernel code is an internal error";
    HYPERCALL = "VMCALL in kernel code is emulated for ever and never done";
    TASK_PRIORITY = "an interrupt that a write to CR8 lets through comes some instructions late";
    COMPARE_SIXTEEN = "CMPXCHG16B in kernel code is an internal error";
    DATA_BREAKPOINT = "breakpoints in debug registers do not trap";
    FLOATING = "x87 instructions and most of SSE in kernel code are internal errors";
    USER_CALLS = "INT and SYSCALL in user mode are its own, not the guest's";
    CROSSING_STORE = "a store over two pages is half done when the second cannot be written";
    STRING_FAULT = "INS with REP that faults has not counted what it did";
    MEMORY_TYPES = "PAT takes types that do not exist";
    TIME = "RDTSC reads the host's TSC, whatever the guest wrote, and CR4.TSD is #UD";
}

/// The faults of this host's KVM.
pub fn faults() -> &'static [Fault] {
    if std::path::Path::new("/sys/module/kvm_pvm").exists() { OF_PVM } else { &[] }
}

/// The engines of this host that have none of these faults. What is left out is said.
pub fn engines_without(touched: &[Fault]) -> Vec<EngineKind> {
    let mut engines = vec![EngineKind::Soft];
    let known = faults().iter().find(|fault| touched.contains(fault));
    match (std::path::Path::new("/dev/kvm").exists(), known) {
        (false, _) => println!("no KVM here: this runs on the software engine only"),
        (true, Some(fault)) => println!("not on this host's KVM, where {}", fault.what),
        (true, None) => engines.push(EngineKind::Kvm),
    }
    engines
}

/// The engines of this host.
pub fn engines() -> Vec<EngineKind> {
    engines_without(&[])
}
