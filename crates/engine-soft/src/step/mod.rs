//! The single-step tier: one instruction at a time, and the oracle of the other tiers.
//!
//! [`step`] fetches, decodes, and hands the instruction to one of the modules here: system, control-flow, segment and
//! string instructions are interpreted; all others go to [`native`], which lets the host CPU execute them. An
//! instruction that does not complete (a fault, a device access) leaves general registers, RIP and flags as they
//! were: `step` puts them back. What else an instruction changes, it changes last.

use crate::cpu_core::Core;
use crate::debug::DR6_BS;
use crate::exception::{Exception, Stop, Trap};
use crate::fetch::Decoded;
use crate::state::{Shadow, seg};
use cpu::{Exit, rflags};
use iced_x86::{ConditionCode, FlowControl, Instruction, Mnemonic, OpKind};

mod control;
mod far;
pub(crate) mod feature;
mod flow;
mod legacy;
mod masked;
pub(crate) mod model;
pub(crate) mod native;
pub(crate) mod operand;
mod port;
mod stack;
mod string;
mod syscall;
#[cfg(test)]
mod test;
pub(crate) mod xstate;

/// Executes one instruction.
pub(crate) type Execute = fn(&mut Core, &Decoded) -> Result<(), Trap>;

/// What comes back if an instruction does not complete.
#[derive(Debug, Clone, Default)]
pub(crate) struct Checkpoint {
    /// Software interrupts clear TF before their single-step trap would come (Intel SDM 3, 7.12.1.2).
    quiet: bool,
    /// Of SYSCALL and SYSRET the TF that they leave counts, not the one they found (AMD APM 2, 6.1; Intel SDM 2, SYSRET).
    late: bool,
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
}

impl Core {
    /// What the instruction has done so far is done.
    pub(crate) fn checkpoint(&mut self) {
        self.before.gpr = self.state.gpr;
        self.before.rflags = self.state.rflags;
    }

    fn roll_back(&mut self) {
        self.state.gpr = self.before.gpr;
        self.state.rip = self.before.rip;
        self.state.rflags = self.before.rflags;
    }

    /// Another thread wants `run` to return.
    pub(crate) fn kicked(&self) -> bool {
        self.state.doorbell.rung() != 0
    }
}

/// Executes exactly one instruction at the state's RIP (or a bounded run of iterations of a repeated one), delivering
/// the exception it meets, if any.
///
/// External events are not looked at: the caller delivers those between two steps ([`Core::deliver_pending`]).
pub fn step(core: &mut Core) -> Stop {
    core.counters.steps += 1;
    let shadow = std::mem::take(&mut core.state.shadow);
    let stepping = core.state.rflags & rflags::TF != 0;
    core.before.rip = core.state.rip;
    core.checkpoint();
    core.io.rewind();
    core.pending.debug = 0;
    core.before.quiet = false;
    core.before.late = false;
    match execute(core) {
        Ok(()) => {
            core.io.commit();
            let stepping = if core.before.late { core.state.rflags & rflags::TF != 0 } else { stepping };
            complete(core, stepping && !core.before.quiet, shadow)
        }
        Err(Trap::Exception(exception)) => {
            core.roll_back();
            core.pending.debug = 0;
            let stop = core.raise(exception);
            if matches!(stop, Stop::Continue) {
                core.io.commit();
            }
            stop
        }
        Err(Trap::Exit(exit)) => {
            core.roll_back();
            core.state.shadow = shadow;
            Stop::Exit(exit)
        }
        Err(Trap::Fail(error)) => {
            core.roll_back();
            Stop::Fail(error)
        }
    }
}

fn execute(core: &mut Core) -> Result<(), Trap> {
    if core.breakpoints_enabled() && core.state.rflags & rflags::RF == 0 {
        let base = if core.state.code64() { 0 } else { core.state.segments[seg::CS].base };
        core.check_instruction_breakpoints(base.wrapping_add(core.state.rip))?;
    }
    let decoded = core.fetch_instruction()?;
    let next = decoded.instruction.next_ip();
    core.state.rip = match core.code_bits() {
        64 => next,
        32 => next & u64::from(u32::MAX),
        _ => next & 0xffff,
    };
    let rf = core.state.rflags & rflags::RF != 0;
    (decoded.execute)(core, &decoded)?;
    // RF lives for one instruction, all of a repeated one; IRET's new value is for the next one.
    let goes_on = core.state.rip == core.before.rip && decoded.instruction.is_string_instruction();
    if rf && !goes_on && decoded.instruction.code() as u32 != 0 && !is_iret(&decoded.instruction) {
        core.state.rflags &= !rflags::RF;
    }
    Ok(())
}

fn is_iret(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)
}

/// Traps after a completed instruction.
fn complete(core: &mut Core, stepping: bool, shadow: Shadow) -> Stop {
    let mut debug = std::mem::take(&mut core.pending.debug);
    if stepping {
        debug |= DR6_BS;
    }
    // Held back behind MOV SS and POP SS (Intel SDM 3, 7.8.3).
    if core.state.shadow == Shadow::MovSs {
        core.pending.held = debug & !DR6_BS;
        debug = 0;
    } else if shadow == Shadow::MovSs {
        debug |= std::mem::take(&mut core.pending.held);
    }
    if debug != 0 {
        let halted = std::mem::take(&mut core.state.halted);
        let stop = core.raise(Exception::debug(debug));
        core.io.commit();
        if !matches!(stop, Stop::Continue) {
            core.state.halted = halted;
        }
        return stop;
    }
    if core.state.halted { Stop::Exit(Exit::Halt) } else { Stop::Continue }
}

fn undefined(_: &mut Core, _: &Decoded) -> Result<(), Trap> {
    Err(Exception::UD.into())
}

fn nothing(_: &mut Core, _: &Decoded) -> Result<(), Trap> {
    Ok(())
}

/// CLFLUSH and its kin: the address must be good, the caches are the host's affair.
fn cache_line(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !d.instruction.cpuid_features().iter().all(|&f| feature::supported(f, &core.cpuid)) {
        return Err(Exception::UD.into());
    }
    let linear = core.memory_operand(&d.instruction, 1, false)?;
    core.probe(linear, 1, crate::mmu::Access::Read, core.privilege())
}

/// CLZERO: the cache line at rAX becomes zero.
fn clear_line(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    if !i.cpuid_features().iter().all(|&f| feature::supported(f, &core.cpuid)) {
        return Err(Exception::UD.into());
    }
    let width = i.op0_register().size().clamp(2, 8);
    let offset = core.state.gpr[crate::state::reg::RAX] & operand::mask(width) & !63;
    let linear = core.linear(seg::DS, offset, 64, true)?;
    core.check_data_breakpoints(linear, 64, true);
    core.write(linear, &[0; 64], core.privilege())
}

fn segment_operand(i: &Instruction, operand: u32) -> bool {
    operand < i.op_count()
        && i.op_kind(operand) == OpKind::Register
        && i.op_register(operand).is_segment_register()
}

/// Who executes an instruction.
pub(crate) fn classify(i: &Instruction) -> Execute {
    match i.flow_control() {
        FlowControl::Next => {}
        FlowControl::Exception => return undefined,
        _ => return classify_flow(i),
    }
    if i.is_string_instruction() {
        return string::execute;
    }
    match i.mnemonic() {
        Mnemonic::Push => stack::push,
        Mnemonic::Pop if segment_operand(i, 0) => stack::pop_segment,
        Mnemonic::Pop => stack::pop,
        Mnemonic::Pusha | Mnemonic::Pushad => stack::pusha,
        Mnemonic::Popa | Mnemonic::Popad => stack::popa,
        Mnemonic::Enter => stack::enter,
        Mnemonic::Leave => stack::leave,
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => stack::pushf,
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => stack::popf,
        Mnemonic::Cli => stack::cli,
        Mnemonic::Sti => stack::sti,
        Mnemonic::Cld | Mnemonic::Std => stack::direction,
        Mnemonic::Clac | Mnemonic::Stac => stack::access_check,
        Mnemonic::Lea => stack::lea,
        Mnemonic::Mov if segment_operand(i, 0) => stack::mov_to_segment,
        Mnemonic::Mov if segment_operand(i, 1) => stack::mov_from_segment,
        Mnemonic::Mov if is_control(i) => control::mov_cr,
        Mnemonic::Mov if is_debug(i) => control::mov_dr,
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            stack::load_far_pointer
        }
        Mnemonic::In => port::input,
        Mnemonic::Out => port::output,
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote
        | Mnemonic::Pause => nothing,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => cache_line,
        _ => classify_system(i),
    }
}

fn is_control(i: &Instruction) -> bool {
    (0..2).any(|op| i.op_kind(op) == OpKind::Register && i.op_register(op).is_cr())
}

fn is_debug(i: &Instruction) -> bool {
    (0..2).any(|op| i.op_kind(op) == OpKind::Register && i.op_register(op).is_dr())
}

fn classify_flow(i: &Instruction) -> Execute {
    match i.mnemonic() {
        Mnemonic::Jmp if is_far(i) => far::jmp,
        Mnemonic::Call if is_far(i) => far::call,
        Mnemonic::Jmp => flow::jmp,
        Mnemonic::Call => flow::call,
        Mnemonic::Ret => flow::ret,
        Mnemonic::Retf => far::ret,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => far::iret,
        Mnemonic::Int | Mnemonic::Int3 | Mnemonic::Into | Mnemonic::Int1 => far::int,
        Mnemonic::Syscall => syscall::syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => syscall::sysret,
        Mnemonic::Sysenter => syscall::sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => syscall::sysexit,
        Mnemonic::Vmcall | Mnemonic::Vmmcall => control::hypercall,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => flow::count,
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => flow::count,
        Mnemonic::Hlt => control::hlt,
        _ if i.condition_code() != ConditionCode::None => flow::jcc,
        _ => undefined,
    }
}

fn is_far(i: &Instruction) -> bool {
    i.is_jmp_far() || i.is_jmp_far_indirect() || i.is_call_far() || i.is_call_far_indirect()
}

fn classify_system(i: &Instruction) -> Execute {
    match i.mnemonic() {
        Mnemonic::Hlt => control::hlt,
        Mnemonic::Vmcall | Mnemonic::Vmmcall => control::hypercall,
        Mnemonic::Clts => control::clts,
        Mnemonic::Lmsw => control::lmsw,
        Mnemonic::Smsw | Mnemonic::Sldt | Mnemonic::Str => control::store_system,
        Mnemonic::Lldt | Mnemonic::Ltr => control::load_system,
        Mnemonic::Lgdt | Mnemonic::Lidt => control::load_table,
        Mnemonic::Sgdt | Mnemonic::Sidt => control::store_table,
        Mnemonic::Invlpg => control::invlpg,
        Mnemonic::Invpcid => control::invpcid,
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => control::cache,
        Mnemonic::Serialize => control::serialize,
        Mnemonic::Swapgs => control::swapgs,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            control::segment_base
        }
        Mnemonic::Cpuid => model::cpuid,
        Mnemonic::Rdtsc => model::rdtsc,
        Mnemonic::Rdtscp => model::rdtscp,
        Mnemonic::Rdpid => model::rdpid,
        Mnemonic::Rdpmc => model::rdpmc,
        Mnemonic::Rdmsr => model::rdmsr,
        Mnemonic::Wrmsr => model::wrmsr,
        Mnemonic::Xgetbv => model::xgetbv,
        Mnemonic::Xsetbv => model::xsetbv,
        Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsavec
        | Mnemonic::Xsavec64
        | Mnemonic::Xsaveopt
        | Mnemonic::Xsaveopt64
        | Mnemonic::Xsaves
        | Mnemonic::Xsaves64
        | Mnemonic::Xrstor
        | Mnemonic::Xrstor64
        | Mnemonic::Xrstors
        | Mnemonic::Xrstors64 => xstate::execute,
        Mnemonic::Daa | Mnemonic::Das => legacy::decimal_adjust,
        Mnemonic::Aaa | Mnemonic::Aas => legacy::ascii_adjust,
        Mnemonic::Aam | Mnemonic::Aad => legacy::ascii_base,
        Mnemonic::Salc => legacy::salc,
        Mnemonic::Xlatb => legacy::xlat,
        Mnemonic::Bound => legacy::bound,
        Mnemonic::Arpl => legacy::arpl,
        Mnemonic::Lar | Mnemonic::Lsl => legacy::load_rights,
        Mnemonic::Verr | Mnemonic::Verw => legacy::verify,
        Mnemonic::Clzero => clear_line,
        _ if masked::masked(i) => masked::execute,
        _ if i.is_privileged() || i.is_stack_instruction() || segment_operand(i, 0) => undefined,
        _ => native::execute,
    }
}
