//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, INS, OUTS, with and without a repeat prefix.
//!
//! A repeated instruction runs in bounded chunks: RCX, RSI and RDI are up to date after each, and RIP stays on the
//! instruction until the count is used up, so that interrupts get in and a fault restarts at the faulting element.
//! Runs of MOVS and STOS inside one page of RAM on each side are copied at once.

use super::operand::{mask, segment_index, sign_extend};
use crate::access::room_in_page;
use crate::cpu_core::Core;
use crate::exception::Trap;
use crate::fetch::Decoded;
use crate::host;
use crate::mmu::{Access, Mmu};
use crate::state::{reg, seg};
use cpu::rflags;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Elements between two looks for interrupts, where no whole page is moved at once.
const CHUNK: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

struct Run {
    operation: Operation,
    /// Element size in bytes.
    size: usize,
    /// Address size in bytes.
    width: usize,
    source: usize,
    backwards: bool,
}

/// Any string instruction.
pub(crate) fn execute(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let run = decode(core, i);
    if matches!(run.operation, Operation::Ins | Operation::Outs) {
        super::port::allowed(core, core.state.gpr[reg::RDX] as u16, run.size)?;
    }
    if !i.has_rep_prefix() && !i.has_repne_prefix() {
        return run.element(core);
    }
    let mut budget = CHUNK;
    loop {
        let left = core.state.gpr[reg::RCX] & mask(run.width);
        if left == 0 {
            return Ok(());
        }
        if budget == 0 || budget < CHUNK && core.kicked() {
            break;
        }
        let done = match run.bulk(core, left)? {
            0 => {
                run.element(core)?;
                // The element is complete, and its device accesses with it.
                core.io.commit();
                1
            }
            done => done,
        };
        core.set_gpr_sized(reg::RCX, left.wrapping_sub(done), run.width);
        core.checkpoint();
        budget -= 1;
        if run.ends(core, i) {
            return Ok(());
        }
        if core.pending.debug != 0 || core.state.rflags & rflags::TF != 0 {
            break;
        }
    }
    // Interrupted: the rest runs when RIP's instruction is executed again.
    if core.state.gpr[reg::RCX] & mask(run.width) != 0 {
        core.state.rip = i.ip();
    }
    Ok(())
}

fn decode(core: &Core, i: &Instruction) -> Run {
    let operation = match i.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => Operation::Movs,
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => Operation::Stos,
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => Operation::Lods,
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => Operation::Scas,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Operation::Ins,
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => Operation::Outs,
        _ => Operation::Cmps,
    };
    let mut width = core.code_bits() as usize / 8;
    for op in 0..i.op_count() {
        width = match i.op_kind(op) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => 8,
            _ => continue,
        };
    }
    Run {
        operation,
        size: i.memory_size().size().clamp(1, 8),
        width,
        source: segment_index(i.memory_segment()),
        backwards: core.state.rflags & rflags::DF != 0,
    }
}

impl Run {
    fn source(&self, core: &mut Core) -> Result<u64, Trap> {
        let offset = core.state.gpr[reg::RSI] & mask(self.width);
        let linear = core.linear(self.source, offset, self.size, false)?;
        core.check_alignment(linear, self.size)?;
        core.check_data_breakpoints(linear, self.size, false);
        Ok(linear)
    }

    fn destination(&self, core: &mut Core, write: bool) -> Result<u64, Trap> {
        let offset = core.state.gpr[reg::RDI] & mask(self.width);
        let linear = core.linear(seg::ES, offset, self.size, write)?;
        core.check_alignment(linear, self.size)?;
        core.check_data_breakpoints(linear, self.size, write);
        Ok(linear)
    }

    fn advance(&self, core: &mut Core, register: usize, elements: u64) {
        let by = elements.wrapping_mul(self.size as u64);
        let by = if self.backwards { by.wrapping_neg() } else { by };
        core.set_gpr_sized(register, core.state.gpr[register].wrapping_add(by), self.width);
    }

    fn uses(&self) -> (bool, bool) {
        match self.operation {
            Operation::Movs | Operation::Cmps => (true, true),
            Operation::Lods | Operation::Outs => (true, false),
            Operation::Stos | Operation::Scas | Operation::Ins => (false, true),
        }
    }

    /// One element, with its registers' updates.
    fn element(&self, core: &mut Core) -> Result<(), Trap> {
        let privilege = core.privilege();
        let size = self.size;
        let accumulator = core.state.gpr[reg::RAX] & mask(size);
        match self.operation {
            Operation::Movs => {
                let from = self.source(core)?;
                let value = core.read_uint(from, size, privilege)?;
                let to = self.destination(core, true)?;
                core.write_uint(to, value, size, privilege)?;
            }
            Operation::Stos => {
                let to = self.destination(core, true)?;
                core.write_uint(to, accumulator, size, privilege)?;
            }
            Operation::Lods => {
                let from = self.source(core)?;
                let value = core.read_uint(from, size, privilege)?;
                core.set_gpr_sized(reg::RAX, value, size);
            }
            Operation::Scas => {
                let to = self.destination(core, false)?;
                let value = core.read_uint(to, size, privilege)?;
                compare(core, accumulator, value, size);
            }
            Operation::Cmps => {
                let from = self.source(core)?;
                let left = core.read_uint(from, size, privilege)?;
                let to = self.destination(core, false)?;
                let right = core.read_uint(to, size, privilege)?;
                compare(core, left, right, size);
            }
            Operation::Ins => {
                let to = self.destination(core, true)?;
                // The port is not read if the store would fault.
                core.probe(to, size, Access::Write, privilege)?;
                let port = core.state.gpr[reg::RDX] as u16;
                let value = super::port::read(core, port, size)?;
                core.write_uint(to, value, size, privilege)?;
            }
            Operation::Outs => {
                let from = self.source(core)?;
                let value = core.read_uint(from, size, privilege)?;
                let port = core.state.gpr[reg::RDX] as u16;
                super::port::write(core, port, size, value)?;
            }
        }
        let (source, destination) = self.uses();
        if source {
            self.advance(core, reg::RSI, 1);
        }
        if destination {
            self.advance(core, reg::RDI, 1);
        }
        Ok(())
    }

    /// Whether a repeat with a condition ends after an element.
    fn ends(&self, core: &Core, i: &Instruction) -> bool {
        if !matches!(self.operation, Operation::Scas | Operation::Cmps) {
            return false;
        }
        let equal = core.state.rflags & rflags::ZF != 0;
        if i.has_repne_prefix() { equal } else { !equal }
    }

    /// Moves or fills as many elements as lie in one page of plain RAM on each side; 0 if it must go one by one.
    fn bulk(&self, core: &mut Core, left: u64) -> Result<u64, Trap> {
        let movs = self.operation == Operation::Movs;
        if self.backwards
            || !(movs || self.operation == Operation::Stos)
            || left < 4
            || core.state.rflags & rflags::TF != 0
            || core.breakpoints_enabled()
        {
            return Ok(0);
        }
        let size = self.size;
        let user = core.state.cpl() == 3;
        let rdi = core.state.gpr[reg::RDI] & mask(self.width);
        // Faults come from the element loop, in its order.
        let Ok(to) = core.linear(seg::ES, rdi, size, true) else { return Ok(0) };
        let mut count = (room_in_page(to) / size).min(left.try_into().unwrap_or(usize::MAX));
        let mut from = 0;
        if movs {
            let rsi = core.state.gpr[reg::RSI] & mask(self.width);
            let Ok(source) = core.linear(self.source, rsi, size, false) else { return Ok(0) };
            from = source;
            count = count.min(room_in_page(from) / size);
        }
        // Segment limits and address wrap-around inside the run: leave those to the element loop.
        let len = count * size;
        if count < 2 || !core.state.code64() && core.linear(seg::ES, rdi, len, true).is_err() {
            return Ok(0);
        }
        if movs {
            let rsi = core.state.gpr[reg::RSI] & mask(self.width);
            if !core.state.code64() && core.linear(self.source, rsi, len, false).is_err() {
                return Ok(0);
            }
        }
        if self.width < 8 && (rdi + len as u64) & !mask(self.width) != 0 {
            return Ok(0);
        }
        if core.check_alignment(to, size).is_err() || core.check_alignment(from, size).is_err() {
            return Ok(0);
        }
        let source = if movs { plain(core, from, len, false, user)? } else { None };
        let Some(target) = plain(core, to, len, true, user)? else { return Ok(0) };
        if movs {
            let Some(source) = source else { return Ok(0) };
            core.note_write(target, len);
            host::copy_up(source, target, len, size);
            self.advance(core, reg::RSI, count as u64);
        } else {
            core.note_write(target, len);
            host::fill(target, core.state.gpr[reg::RAX], size, count);
        }
        self.advance(core, reg::RDI, count as u64);
        Ok(count as u64)
    }
}

/// The host address of a run within a page, if the TLB may hold it (so: RAM, and no code if it is written).
fn plain(core: &mut Core, linear: u64, len: usize, write: bool, user: bool) -> Result<Option<*mut u8>, Trap> {
    if let Some(host) = Mmu::lookup(&core.state, linear, len as u64, write, user) {
        return Ok(Some(host));
    }
    let access = if write { Access::Write } else { Access::Read };
    core.probe(linear, 1, access, core.privilege())?;
    Ok(Mmu::lookup(&core.state, linear, len as u64, write, user))
}

/// The flags of a subtraction.
fn compare(core: &mut Core, left: u64, right: u64, size: usize) {
    let result = left.wrapping_sub(right) & mask(size);
    let sign = 1u64 << (size * 8 - 1);
    let mut flags = 0;
    if left < right {
        flags |= rflags::CF;
    }
    if (result as u8).count_ones().is_multiple_of(2) {
        flags |= rflags::PF;
    }
    if (left ^ right ^ result) & 0x10 != 0 {
        flags |= rflags::AF;
    }
    if result == 0 {
        flags |= rflags::ZF;
    }
    if sign_extend(result, size) >> 63 != 0 {
        flags |= rflags::SF;
    }
    if (left ^ right) & (left ^ result) & sign != 0 {
        flags |= rflags::OF;
    }
    core.state.rflags = core.state.rflags & !rflags::STATUS | flags;
}
