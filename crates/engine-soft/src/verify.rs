//! Lock-step: every block that the template tier runs is run by the single-step tier first, and compared.
//!
//! For each block: the single-step tier executes from the present state, one instruction at a time, remembering the
//! state after each and every byte written to RAM; the writes are undone and the state put back; the translator runs
//! one block; and where it stopped, its registers, vectors, x87 and written bytes must be those remembered. Only then
//! does the guest go on, with the translator's state. Page-table accessed and dirty bits, which both set alike, stay.
//!
//! Status flags that nobody reads any more are not kept by the template tier. They are not compared at the end of a
//! block but carried on: the single-step tier continues with its own flags, so that a flag that does matter makes a
//! difference later. Where a block ends for an instruction of the single-step tier, all flags must be right, but before STI.
//!
//! What both tiers cannot answer alike (the clock, random numbers) ends the comparison of a block early; what a block
//! does after that goes unseen and is counted. For one vCPU; slow; RAM shared with devices that write is at risk of
//! false alarms.

use crate::cpu_core::Core;
use crate::exception::Stop;
use crate::host;
use crate::state::{CpuState, Shadow, Vectors, X87};
use crate::step::native::arena;
use crate::step::step;
use crate::translate::{Outcome, Translator, passed};
use cpu::{Error, Registers, rflags};
use iced_x86::{EncodingKind, FlowControl, Instruction, Mnemonic};
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// What was compared so far in this process, for people.
#[derive(Debug, Default)]
pub struct Verified {
    /// Blocks.
    pub blocks: AtomicU64,
    /// Their instructions.
    pub instructions: AtomicU64,
    /// Blocks that did more than could be compared.
    pub unseen: AtomicU64,
}

/// See [`Verified`].
pub static VERIFIED: Verified =
    Verified { blocks: AtomicU64::new(0), instructions: AtomicU64::new(0), unseen: AtomicU64::new(0) };

/// As long as the longest block: a longer window may come by the block's end again.
const WINDOW: usize = crate::translate::INSTRUCTIONS_MAX;

/// One write to RAM.
struct Entry {
    host: *mut u8,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// Writes of the single-step tier, in order. Sites that write to RAM note them before they do.
#[derive(Default)]
pub(crate) struct WriteLog(Vec<Entry>);

// SAFETY: the pointers are into guest RAM, which any thread may use; they do not outlive one `Verifier::run`.
#[allow(unsafe_code)]
unsafe impl Send for WriteLog {}

impl WriteLog {
    /// `len` bytes at `host` are about to be written.
    pub(crate) fn note(&mut self, host: *mut u8, len: usize) {
        let mut old = vec![0; len];
        host::read(host, &mut old);
        self.0.push(Entry { host, old, new: vec![] });
    }

    /// Remembers what was written since `from`.
    fn complete(&mut self, from: usize) {
        for entry in self.0.iter_mut().skip(from) {
            entry.new.resize(entry.old.len(), 0);
            host::read(entry.host, &mut entry.new);
        }
    }

    fn undo(&self) {
        for entry in self.0.iter().rev() {
            host::write(entry.host, &entry.old);
        }
    }

    /// Whether RAM holds what it did before all writes.
    fn is_undone(&self) -> bool {
        let mut seen: Vec<(usize, usize)> = vec![];
        self.0.iter().all(|entry| {
            let start = entry.host as usize;
            let mut now = vec![0; entry.old.len()];
            host::read(entry.host, &mut now);
            let same = entry.old.iter().zip(&now).enumerate().all(|(i, (old, now))| {
                let at = start.wrapping_add(i);
                old == now || seen.iter().any(|(from, to)| (*from..*to).contains(&at))
            });
            seen.push((start, start.wrapping_add(entry.old.len())));
            same
        })
    }

    /// Whether RAM now holds what the first `count` writes left.
    fn differs(&self, count: usize) -> Option<(usize, u8, u8)> {
        let mut later: Vec<(usize, usize)> = vec![];
        for entry in self.0.iter().take(count).rev() {
            let start = entry.host as usize;
            let mut now = vec![0; entry.new.len()];
            host::read(entry.host, &mut now);
            for (i, (expected, got)) in entry.new.iter().zip(&now).enumerate() {
                let at = start.wrapping_add(i);
                if expected != got && !later.iter().any(|(from, to)| (*from..*to).contains(&at)) {
                    return Some((at, *expected, *got));
                }
            }
            later.push((start, start.wrapping_add(entry.new.len())));
        }
        None
    }
}

/// The state after an instruction.
struct Record {
    instruction: Instruction,
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    writes: usize,
    /// Index of the vectors at that time.
    vectors: usize,
}

/// All that an instruction of a window may change but RAM.
struct Snapshot {
    registers: Registers,
    kernel_gs_base: u64,
    ymm: Vectors,
    mxcsr: u32,
    x87: X87,
    shadow: Shadow,
    attention: u32,
    halted: bool,
}

impl Snapshot {
    fn of(state: &mut CpuState) -> Self {
        arena::peek_x87(state);
        Self {
            registers: state.registers(),
            kernel_gs_base: state.msrs.kernel_gs_base,
            ymm: state.ymm,
            mxcsr: state.mxcsr,
            x87: state.x87,
            shadow: state.shadow,
            attention: state.attention,
            halted: state.halted,
        }
    }

    fn restore(&self, state: &mut CpuState, x87: bool) {
        state.set_registers(&self.registers);
        state.msrs.kernel_gs_base = self.kernel_gs_base;
        state.ymm = self.ymm;
        state.mxcsr = self.mxcsr;
        state.x87 = self.x87;
        state.shadow = self.shadow;
        state.attention = self.attention;
        state.halted = self.halted;
        if x87 {
            arena::load_x87(state);
        }
    }
}

/// Lock-step of one vCPU.
#[derive(Default)]
pub(crate) struct Verifier {
    records: Vec<Record>,
    vectors: Vec<(Vectors, u32)>,
    /// RIP and the single-step tier's flags after the last block.
    next: Option<(u64, u64)>,
}

impl Verifier {
    /// As [`Translator::run`] for one block; an error tells the difference.
    pub(crate) fn run(&mut self, core: &mut Core, translator: &mut Translator) -> Result<Outcome, Error> {
        if core.state.doorbell.rung() != 0 {
            return Ok(Outcome::Kicked);
        }
        if !core.state.code64() || !core.state.paging() {
            return Ok(Outcome::Step);
        }
        let before = Snapshot::of(&mut core.state);
        let flags = core.state.rflags;
        if let Some((rip, own)) = self.next.take()
            && rip == core.state.rip
            && (own ^ flags) & !rflags::STATUS == 0
        {
            core.state.rflags = own;
        }
        let own = core.state.rflags;
        let x87 = self.oracle(core);
        let after = x87.then(|| {
            arena::peek_x87(&mut core.state);
            core.state.x87
        });
        let log = core.writes.take().unwrap_or_default();
        log.undo();
        before.restore(&mut core.state, x87);
        core.state.rflags = flags;
        let exits = translator.statistics().exits_step;
        let outcome = translator.run_block(core);
        let exact = translator.statistics().exits_step != exits && !looked_through(core);
        let Some(count) = self.place(core, &before, outcome, &log) else {
            VERIFIED.unseen.fetch_add(1, Ordering::Relaxed);
            return Ok(outcome);
        };
        if count == 0 {
            self.next = Some((core.state.rip, own));
            return Ok(outcome);
        }
        let x87 = after.filter(|_| count == self.records.len());
        if let Some(what) = self.difference(core, count, &log, exact, x87.as_ref()) {
            return Err(self.report(core, &before, count, what));
        }
        VERIFIED.blocks.fetch_add(1, Ordering::Relaxed);
        VERIFIED.instructions.fetch_add(count as u64, Ordering::Relaxed);
        self.next = self.records.get(count - 1).map(|record| (record.rip, record.rflags));
        Ok(outcome)
    }

    /// Lets the single-step tier run; answers whether x87 state is in play.
    fn oracle(&mut self, core: &mut Core) -> bool {
        self.records.clear();
        self.vectors.clear();
        self.vectors.push((core.state.ymm, core.state.mxcsr));
        core.writes = Some(WriteLog::default());
        let counters = core.counters.clone();
        let mut x87 = false;
        while self.records.len() < WINDOW {
            let Ok(decoded) = core.fetch_instruction() else { break };
            let instruction = decoded.instruction;
            if unsteady(&instruction) {
                break;
            }
            x87 |= uses_x87(&instruction);
            let exceptions = core.counters.exceptions;
            let writes = core.writes.as_ref().map_or(0, |log| log.0.len());
            let stop = step(core);
            if !matches!(stop, Stop::Continue)
                || core.counters.exceptions != exceptions
                || core.state.shadow != Shadow::None
            {
                core.io.commit();
                core.pending.debug = 0;
                break;
            }
            if let Some(log) = &mut core.writes {
                log.complete(writes);
            }
            if uses_vectors(&instruction) {
                self.vectors.push((core.state.ymm, core.state.mxcsr));
            }
            let state = &core.state;
            self.records.push(Record {
                instruction,
                gpr: state.gpr,
                rip: state.rip,
                rflags: state.rflags,
                writes: core.writes.as_ref().map_or(0, |log| log.0.len()),
                vectors: self.vectors.len() - 1,
            });
            // Blocks do not go on there either.
            let controls = instruction.flow_control() != FlowControl::Next && !passed(&instruction);
            if controls || state.rip != instruction.next_ip() || (state.rip ^ instruction.ip()) >> 12 != 0 {
                break;
            }
        }
        core.counters = counters;
        x87
    }

    /// After how many of the remembered instructions the translator stopped; `None` if that is not among them.
    fn place(&self, core: &mut Core, before: &Snapshot, outcome: Outcome, log: &WriteLog) -> Option<usize> {
        let rip = core.state.rip;
        let stayed = rip == before.registers.rip && core.state.gpr == before.registers.gpr;
        if stayed && (outcome == Outcome::Step || self.records.is_empty()) {
            return Some(0);
        }
        let here = |record: &Record| record.rip == rip;
        // A whole block may end at an instruction in its middle: the jump back is what counts.
        let at = match outcome {
            // A kick that came just now: nothing has been done.
            Outcome::Kicked if stayed && log.is_undone() => return Some(0),
            Outcome::Kicked => self.records.iter().rposition(here),
            Outcome::Step => self.records.iter().position(here),
        };
        let at = at?;
        // A repeated instruction that was left after some turns, for the fault of the next: the other tier's are undone.
        let turns = self.records.get(at).is_some_and(|record| record.gpr[1] != core.state.gpr[1])
            && core.fetch_instruction().is_ok_and(|next| next.instruction.is_string_instruction());
        (!turns).then_some(at + 1)
    }

    fn difference(
        &self,
        core: &mut Core,
        count: usize,
        log: &WriteLog,
        exact: bool,
        x87: Option<&X87>,
    ) -> Option<String> {
        let record = self.records.get(count.checked_sub(1)?)?;
        let mut text = String::new();
        for (number, (expected, got)) in record.gpr.iter().zip(&core.state.gpr).enumerate() {
            if expected != got {
                let _ = write!(text, " gpr{number} {expected:#x} became {got:#x};");
            }
        }
        let compared = if exact { u64::MAX } else { !rflags::STATUS };
        if (record.rflags ^ core.state.rflags) & compared != 0 {
            let _ = write!(text, " rflags {:#x} became {:#x};", record.rflags, core.state.rflags);
        }
        if let Some((ymm, mxcsr)) = self.vectors.get(record.vectors) {
            for (number, (expected, got)) in ymm.0.iter().zip(&core.state.ymm.0).enumerate() {
                if expected != got {
                    let _ = write!(text, " ymm{number} {expected:x?} became {got:x?};");
                }
            }
            if *mxcsr != core.state.mxcsr {
                let _ = write!(text, " mxcsr {mxcsr:#x} became {:#x};", core.state.mxcsr);
            }
        }
        if let Some(expected) = x87 {
            arena::peek_x87(&mut core.state);
            let part = |image: &X87| (image.0[..5].to_vec(), image.0[32..160].to_vec());
            if part(expected) != part(&core.state.x87) {
                text += " x87 state;";
            }
        }
        if let Some((at, expected, got)) = log.differs(record.writes) {
            let _ = write!(text, " byte of RAM at host address {at:#x}: {expected:#x} became {got:#x};");
        }
        (!text.is_empty()).then_some(text)
    }

    fn report(&self, core: &Core, before: &Snapshot, count: usize, what: String) -> Error {
        let mut why = format!("the tiers differ after {count} instructions of a block:{what} started with");
        for (number, value) in before.registers.gpr.iter().enumerate() {
            let _ = write!(why, " gpr{number} {value:#x}");
        }
        let _ = write!(why, " rflags {:#x};", before.registers.rflags);
        for record in self.records.iter().take(count) {
            let _ = write!(why, "\n{:#x}: {}", record.instruction.ip(), record.instruction);
        }
        let _ = write!(why, "\nended at {:#x}", core.state.rip);
        Error::Guest { engine: "soft", rip: before.registers.rip, why }
    }
}

/// The instruction at RIP is one that blocks go on over, and leave before only in some cases (an interrupt waits, a string without
/// REP): flags that nobody reads after it are not kept.
fn looked_through(core: &mut Core) -> bool {
    core.fetch_instruction().is_ok_and(|next| {
        let next = next.instruction;
        matches!(next.mnemonic(), Mnemonic::Sti | Mnemonic::Verw) || next.is_string_instruction()
    })
}

/// The two tiers cannot answer alike, or more changes than is put back.
fn unsteady(i: &Instruction) -> bool {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Cli | M::Sti | M::Swapgs | M::Clac | M::Stac => false,
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Cpuid | M::Rdpmc | M::Rdpid | M::Xgetbv => true,
        M::Syscall | M::Sysenter | M::Int | M::Int3 | M::Into | M::Int1 | M::Vmcall | M::Vmmcall => true,
        M::Iret | M::Iretd | M::Iretq | M::Retf | M::Xrstor | M::Xrstor64 | M::Popf | M::Popfd => true,
        M::Fxrstor | M::Fxrstor64 | M::Frstor | M::Fldenv | M::Wrfsbase | M::Wrgsbase => false,
        _ => {
            i.is_privileged()
                || i.is_jmp_far_indirect()
                || i.is_call_far_indirect()
                || i.op_count() > 0 && i.op0_register().is_segment_register()
        }
    }
}

fn uses_x87(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    i.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::FXSR))
        || (0..i.op_count()).any(|op| i.op_register(op).is_mm())
}

fn uses_vectors(i: &Instruction) -> bool {
    i.encoding() != EncodingKind::Legacy
        || (0..i.op_count()).any(|op| i.op_register(op).is_vector_register())
        || uses_x87(i)
        || matches!(i.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Cvttss2si | Mnemonic::Cvtss2si)
        || matches!(i.mnemonic(), Mnemonic::Cvttsd2si | Mnemonic::Cvtsd2si)
}
