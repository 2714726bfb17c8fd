//! The seam: what a machine asks of a CPU engine, and what an engine tells a machine.
//!
//! A [`Vcpu`] is driven by one thread in a loop: [`Vcpu::run`] until the next [`Exit`], act on it, run again. Exits
//! that ask for a value ([`Exit::Read`], [`Exit::ReadMsr`], [`Exit::WriteMsr`], [`Exit::Hypercall`]) are answered
//! with [`Vcpu::complete`] before the next `run`; until then the instruction has not happened and the VM must not be
//! saved ([`Exit::pausable`]).

use crate::cpuid::CpuidTable;
use crate::registers::Registers;
use crate::state::{Activity, VcpuState};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// An address space of a bus access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// The 64 KiB of I/O ports.
    Port,
    /// Guest-physical addresses that are not RAM.
    Mmio,
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest reads a device register of `size` (1, 2, 4 or 8) bytes; answer with [`Vcpu::complete`].
    Read {
        /// Ports or memory-mapped I/O.
        space: Space,
        /// Address in that space.
        address: u64,
        /// Width in bytes.
        size: u8,
    },
    /// The guest writes a device register. Needs no answer.
    Write {
        /// Ports or memory-mapped I/O.
        space: Space,
        /// Address in that space.
        address: u64,
        /// Width in bytes.
        size: u8,
        /// The value, zero-extended.
        value: u64,
    },
    /// RDMSR of a register that the engine does not hold; answer `Some(value)`, or `None` for #GP.
    ReadMsr {
        /// MSR number.
        index: u32,
    },
    /// WRMSR of a register that the engine does not hold; answer `Some(0)`, or `None` for #GP.
    WriteMsr {
        /// MSR number.
        index: u32,
        /// The value written.
        value: u64,
    },
    /// VMCALL/VMMCALL at CPL 0 (KVM ABI: number in RAX, arguments in RBX, RCX, RDX, RSI); answer with RAX's result.
    Hypercall {
        /// Hypercall number.
        number: u64,
        /// Arguments.
        args: [u64; 4],
    },
    /// HLT with nothing to deliver: run again once an interrupt is due.
    Halt,
    /// The vCPU was kicked, or its slice is over.
    Interrupted,
    /// A window for interrupts, asked for with [`Vcpu::request_interrupt_window`], has opened.
    InterruptWindow,
    /// A local APIC of the engine's own has ended a level-triggered interrupt: the I/O APIC wants to know.
    EndOfInterrupt {
        /// The vector.
        vector: u8,
    },
    /// Triple fault: the machine resets or stops, as the board decides.
    Shutdown,
    /// The guest hit a breakpoint or single-step trap that the host set.
    Debug,
}

impl Exit {
    /// Whether the VM may be paused and saved at this exit as it is. Where not, the exit's instruction is still
    /// waiting for an answer: [`Vcpu::complete`] it and run to the next exit first.
    pub fn pausable(&self) -> bool {
        match self {
            // The instruction restarts with the answer; half of it may have happened.
            Self::Read { .. } | Self::ReadMsr { .. } | Self::WriteMsr { .. } | Self::Hypercall { .. } => {
                false
            }
            // More accesses of the same instruction may follow.
            Self::Write { .. } => false,
            // Between two instructions, or before the guest was entered.
            Self::Halt
            | Self::Interrupted
            | Self::InterruptWindow
            | Self::EndOfInterrupt { .. }
            | Self::Shutdown
            | Self::Debug => true,
        }
    }
}

/// An engine failed; the guest cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refuses something the engine needs.
    #[error("{what}: {source}")]
    Host {
        /// What was asked of the host.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The host lacks something the engine needs.
    #[error("this host cannot run the {engine} engine: {why}")]
    Unsupported {
        /// The engine's name.
        engine: &'static str,
        /// What is missing, and the cure.
        why: String,
    },
    /// The guest did something that the engine cannot do, readable with registers and instruction bytes.
    #[error("the {engine} engine stopped at rip {rip:#x}: {why}")]
    Guest {
        /// The engine's name.
        engine: &'static str,
        /// Guest instruction pointer.
        rip: u64,
        /// What happened.
        why: String,
    },
}

/// Interrupts [`Vcpu::run`] from any thread: it returns [`Exit::Interrupted`] (or another exit) soon, or at once if
/// it is called next. Kicks do not queue: one `run` consumes all before it.
pub trait Kick: Send + Sync {
    /// Kicks the vCPU.
    fn kick(&self);
}

/// What a vCPU is made with.
#[derive(Debug, Clone)]
pub struct VcpuConfig {
    /// Index, also the initial APIC id.
    pub index: u32,
    /// What CPUID answers.
    pub cpuid: Arc<CpuidTable>,
}

/// The local APICs of an engine that has its own (KVM's are in the kernel), as a board reaches them. With such an
/// engine vCPUs wait in [`Vcpu::run`], for interrupts and for start-up, and never answer [`Exit::Halt`].
pub trait LocalApics: Send + Sync {
    /// A message-signalled interrupt: what a device writes where. Bits 11-5 of the address are bits 14-8 of the destination.
    fn send(&self, address: u64, data: u32);
    /// The messages that the I/O APIC's pins send now, so that [`Exit::EndOfInterrupt`] comes for level-triggered ones.
    fn set_pins(&self, messages: &[(u64, u32)]);
}

/// Doorbells of an engine that has them (KVM's are in the kernel): guests' writes that signal an event counter instead of ending
/// [`Vcpu::run`], so that the vCPU goes on at once and whoever serves the device hears of it without a thread between them.
pub trait Doorbells: Send + Sync {
    /// From now on writes of two bytes, of any value, to this guest-physical address signal `event`; those of other widths may or may
    /// not. `false`: not this one; such writes go on to be [`Exit::Write`].
    fn hang(&self, address: u64, event: BorrowedFd<'_>) -> bool;
    /// They do not any more. Of an address and event that hang.
    fn take_down(&self, address: u64, event: BorrowedFd<'_>);
}

/// Makes the vCPUs of one VM.
pub trait Engine: Send + Sync {
    /// "soft" or "kvm".
    fn name(&self) -> &'static str;
    /// Makes a vCPU in the power-up state. It may be moved to its own thread before its first run.
    fn create_vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error>;
    /// Frequency in Hz at which the guest's TSC counts.
    fn tsc_hz(&self) -> u64;
    /// What of a model's CPUID the engine's vCPUs can answer.
    fn offer(&self, table: CpuidTable) -> CpuidTable {
        table
    }
    /// The engine's own local APICs; without, the machine's are used.
    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        None
    }
    /// Its doorbells; without, every write to a device is an exit.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }
    /// Writes of the guest to its RAM are to be known, or not any more. The software engine always knows them.
    fn log_writes(&self, _wanted: bool) -> Result<(), Error> {
        Ok(())
    }
    /// Tells [`memory::GuestMemory`] of the pages that the guest has written since the last time; answers how many.
    fn collect_writes(&self) -> Result<u64, Error> {
        Ok(0)
    }
    /// All vCPUs stand still: so do the clocks that the engine keeps for the guest.
    fn stand(&self) {}
    /// They go on. Before the first vCPU runs again.
    fn go_on(&self) {}
}

/// Code in this process that an engine made from code of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostCode {
    /// Where it is.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Guest-physical address of the first instruction it was made from.
    pub guest: u64,
    /// It is code of the guest's user mode.
    pub user: bool,
}

/// One virtual CPU.
pub trait Vcpu: Send {
    /// Runs the guest until something needs the machine.
    fn run(&mut self) -> Result<Exit, Error>;
    /// Answers the last exit (see [`Exit`]).
    fn complete(&mut self, answer: Option<u64>);
    /// Puts an external interrupt in front of the next instruction. Only when [`Self::interruptible`].
    fn inject_interrupt(&mut self, vector: u8);
    /// Puts a non-maskable interrupt in front of the next instruction that may take it.
    fn inject_nmi(&mut self);
    /// Whether the guest can take an external interrupt now: IF set, no interrupt shadow, nothing else waiting.
    fn interruptible(&self) -> bool;
    /// Asks `run` to return [`Exit::InterruptWindow`] as soon as the guest becomes interruptible.
    fn request_interrupt_window(&mut self, wanted: bool);
    /// All registers.
    fn registers(&self) -> Registers;
    /// Replaces all registers.
    fn set_registers(&mut self, registers: &Registers);
    /// An MSR that the engine holds; `None` if it holds no such register.
    fn msr(&self, index: u32) -> Option<u64>;
    /// Sets an MSR that the engine holds; `false` if it holds no such register or the value is refused.
    fn set_msr(&mut self, index: u32, value: u64) -> bool;
    /// CR8, the task priority (0 to 15). A guest's write to it ends [`Self::run`] with [`Exit::Interrupted`] before
    /// the next instruction, so that the local APIC can follow.
    fn task_priority(&self) -> u8;
    /// The guest has written its local APIC's task priority register: CR8 follows.
    fn set_task_priority(&mut self, priority: u8);
    /// The guest's TSC now.
    fn tsc(&self) -> u64;
    /// Forgets all translations of addresses, global ones too, before the guest runs again.
    fn flush_tlb(&mut self);
    /// Returns to the power-up state (or, by `init`, the state after an INIT: FPU, most MSRs and caches kept).
    fn reset(&mut self, init: bool);
    /// Of an engine with local APICs: the machine stands still, and this vCPU's timer with it.
    fn stand(&mut self) {}
    /// It goes on: TSC and timer are where they were. After [`Engine::go_on`].
    fn go_on(&mut self) {}
    /// What it does between instructions.
    fn activity(&self) -> Activity {
        Activity::Running
    }
    /// Everything that the vCPU is. At a [`Exit::pausable`] exit.
    fn save(&self) -> Result<VcpuState, Error> {
        Err(Error::Unsupported { engine: "this", why: "it does not save vCPUs".into() })
    }
    /// Becomes what was saved, on this engine or another.
    fn restore(&mut self, _state: &VcpuState) -> Result<(), Error> {
        Err(Error::Unsupported { engine: "this", why: "it does not restore vCPUs".into() })
    }
    /// A handle for other threads.
    fn kick_handle(&self) -> Arc<dyn Kick>;
    /// What the engine has counted since the vCPU was made, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
    /// The host's code that was made from the guest's, in no order: none where guest code runs as it is.
    fn host_code(&self) -> Vec<HostCode> {
        Vec::new()
    }
    /// The engine's live tree of counters and settings, for people.
    fn inspect(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}
