//! Everything that one vCPU is, as it is saved: the same form for every engine, so that a guest saved on one goes on on
//! another where the architecture allows it.

use crate::Registers;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// After which instruction interrupts wait for the next (Intel SDM 3, 7.8.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Shadow {
    /// None.
    #[default]
    None,
    /// STI has just set IF.
    Sti,
    /// MOV SS or POP SS.
    MovSs,
}

/// An exception on its way to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// What CR2 or DR6 become when it is delivered, if they have not yet.
    pub payload: Option<u64>,
    /// Its delivery had begun.
    pub delivering: bool,
}

/// What comes before the next instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Events {
    /// An exception.
    pub exception: Option<Exception>,
    /// A vector taken from the interrupt controller and not delivered yet.
    pub interrupt: Option<u8>,
    /// It is of an INT instruction, which has its own way through the gate.
    pub interrupt_soft: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// The delivery of an NMI had begun.
    pub nmi_delivering: bool,
    /// Until the next IRET.
    pub nmi_blocked: bool,
    /// The instruction just executed.
    pub shadow: Shadow,
    /// A triple fault waits.
    pub triple_fault: bool,
}

/// What a vCPU does between instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Activity {
    /// It runs.
    #[default]
    Running,
    /// HLT, until an interrupt.
    Halted,
    /// It waits for INIT, or after it for start-up.
    WaitingForStartup,
}

/// See the module page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General, segment, control and debug registers.
    pub registers: Registers,
    /// x87, SSE and AVX state: an XSAVE area in the standard (not compacted) form (Intel SDM 1, 13.4).
    pub extended: Vec<u8>,
    /// Model-specific registers, by number; among them the TSC at the moment of saving.
    pub msrs: BTreeMap<u32, u64>,
    /// What comes before the next instruction.
    pub events: Events,
    /// What it does.
    pub activity: Activity,
    /// The registers of its local APIC, as its page shows them (1 KiB), of an engine that has local APICs of its own.
    pub local_apic: Option<Vec<u8>>,
    /// Nanoseconds of the machine's kvmclock at the moment of saving, of an engine that keeps one. It is the same for all vCPUs of a
    /// machine that stands. Its pages are in [`Self::msrs`].
    #[serde(default)]
    pub clock_ns: Option<u64>,
}
