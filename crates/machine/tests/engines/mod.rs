//! The engines that this host has, and what is known to be wrong with its KVM: tests of machines run on every engine, and
//! what one gets wrong is listed here by name. A fault that is listed must show (`faults.rs` of the suite looks), so that
//! the list stays true.

use machine::EngineKind;

/// Something that a KVM back end gets wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// How tests name it.
    pub name: &'static str,
    /// What is wrong.
    pub what: &'static str,
}

/// INT3 at CPL 0.
pub const BREAKPOINT: Fault = Fault { name: "breakpoint", what: "INT3 in kernel code is an internal error" };
/// VMCALL at CPL 0.
pub const HYPERCALL: Fault =
    Fault { name: "hypercall", what: "VMCALL in kernel code is emulated for ever and never done" };
/// A write to CR8 that lets an interrupt through.
pub const TASK_PRIORITY: Fault = Fault {
    name: "task priority",
    what: "an interrupt that a write to CR8 lets through comes some instructions late",
};

/// What is wrong with kvm_pvm, the back end without VT-x or SVM: it emulates kernel code one instruction at a time, and not
/// every one.
const OF_PVM: &[Fault] = &[BREAKPOINT, HYPERCALL, TASK_PRIORITY];

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
