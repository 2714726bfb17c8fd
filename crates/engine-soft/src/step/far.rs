//! Far control flow: JMP, CALL, RET between segments, software interrupts, IRET.

use super::operand::mask;
use crate::cpu_core::{Core, attention};
use crate::deliver::{Source, task_switch};
use crate::exception::{Exception, Trap, vector};
use crate::fetch::Decoded;
use crate::mmu::{Mmu, Privilege};
use crate::segmentation::{Descriptor, null_stack, system};
use crate::state::{reg, seg};
use cpu::{Segment, attr, cr0, rflags};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// Selector, offset and operand size of a far pointer operand.
fn pointer(core: &mut Core, i: &Instruction) -> Result<(u16, u64, usize), Trap> {
    match i.op0_kind() {
        OpKind::FarBranch16 => Ok((i.far_branch_selector(), u64::from(i.far_branch16()), 2)),
        OpKind::FarBranch32 => Ok((i.far_branch_selector(), u64::from(i.far_branch32()), 4)),
        OpKind::Memory => {
            let size = i.memory_size().size() - 2;
            let linear = core.memory_operand(i, size + 2, false)?;
            let mut bytes = [0; 10];
            core.read(linear, &mut bytes[..size + 2], core.privilege())?;
            let mut offset = [0; 8];
            offset[..size].copy_from_slice(&bytes[..size]);
            Ok((u16::from_le_bytes([bytes[size], bytes[size + 1]]), u64::from_le_bytes(offset), size))
        }
        _ => Err(Exception::UD.into()),
    }
}

/// Checks a code descriptor for a direct far transfer to it at the same level.
fn check_direct(core: &Core, selector: u16, target: Descriptor) -> Result<(), Trap> {
    let cpl = core.state.cpl();
    let level = if target.conforming() {
        target.dpl() <= cpl
    } else {
        (selector & 3) as u8 <= cpl && target.dpl() == cpl
    };
    if !level || core.state.long_mode() && target.attr() & (attr::L | attr::DB) == attr::L | attr::DB {
        return Err(Exception::gp(selector).into());
    }
    if target.present() { Ok(()) } else { Err(Exception::np(selector).into()) }
}

/// #GP(0) if code in `target` cannot run at `offset`.
fn check_offset(core: &Core, target: Descriptor, offset: u64) -> Result<(), Trap> {
    let wide = core.state.long_mode() && target.attr() & attr::L != 0;
    let valid = if wide { Mmu::canonical(offset) } else { offset <= u64::from(target.limit()) };
    if valid { Ok(()) } else { Err(Exception::GP.into()) }
}

fn enter_code(core: &mut Core, selector: u16, cpl: u8, target: Descriptor, rip: u64) -> Result<(), Trap> {
    let target = core.set_accessed(selector, target)?;
    core.state.segments[seg::CS] = target.load(selector & !3 | u16::from(cpl));
    core.state.rip = rip;
    core.state.attention |= attention::MODE;
    Ok(())
}

/// JMP, far.
pub(crate) fn jmp(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let (selector, offset, size) = pointer(core, &d.instruction)?;
    if !core.protected() {
        if offset > u64::from(core.state.segments[seg::CS].limit) {
            return Err(Exception::GP.into());
        }
        core.state.segments[seg::CS] = core.real_mode_segment(seg::CS, selector);
        core.state.rip = offset & mask(size);
        core.state.attention |= attention::MODE;
        return Ok(());
    }
    if selector & !3 == 0 {
        return Err(Exception::GP.into());
    }
    let target = core.descriptor(selector, Exception::gp)?;
    if target.code() {
        check_direct(core, selector, target)?;
        check_offset(core, target, offset)?;
        let cpl = core.state.cpl();
        return enter_code(core, selector, cpl, target, offset);
    }
    let gate = read_gate(core, selector, target)?;
    let code = core.descriptor(gate.selector, Exception::gp)?;
    let cpl = core.state.cpl();
    let level = if code.conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
    check_gate_code(core, &gate, code, level)?;
    check_offset(core, code, gate.offset)?;
    enter_code(core, gate.selector, cpl, code, gate.offset)
}

/// A call gate.
struct Gate {
    selector: u16,
    offset: u64,
    size: usize,
    count: u8,
}

fn read_gate(core: &mut Core, selector: u16, low: Descriptor) -> Result<Gate, Trap> {
    let long = core.state.long_mode();
    let cpl = core.state.cpl();
    let size = match low.kind() {
        _ if low.segment() => return Err(Exception::gp(selector).into()),
        system::CALL_GATE if long => 8,
        system::CALL_GATE => 4,
        system::CALL_GATE16 if !long => 2,
        system::TASK_GATE | system::TSS | system::TSS16 if !long => {
            if low.dpl() < cpl.max((selector & 3) as u8) {
                return Err(Exception::gp(selector).into());
            }
            return Err(if low.present() {
                task_switch(core.state.rip)
            } else {
                Exception::np(selector).into()
            });
        }
        _ => return Err(Exception::gp(selector).into()),
    };
    if low.dpl() < cpl || low.dpl() < (selector & 3) as u8 {
        return Err(Exception::gp(selector).into());
    }
    if !low.present() {
        return Err(Exception::np(selector).into());
    }
    let mut offset = low.0 & 0xffff | low.0 >> 32 & 0xffff_0000;
    if long {
        let address = core.descriptor_address(selector, 16, Exception::gp)?;
        let high = core.read_uint(address.wrapping_add(8), 8, Privilege::Implicit)?;
        if high >> 40 & 0x1f != 0 {
            return Err(Exception::gp(selector).into());
        }
        offset |= high << 32;
    } else if size == 2 {
        offset &= 0xffff;
    }
    let selector = (low.0 >> 16) as u16;
    if selector & !3 == 0 {
        return Err(Exception::GP.into());
    }
    Ok(Gate { selector, offset, size, count: (low.0 >> 32 & 31) as u8 })
}

fn check_gate_code(core: &Core, gate: &Gate, code: Descriptor, level: bool) -> Result<(), Trap> {
    let wrong = core.state.long_mode() && code.attr() & (attr::L | attr::DB) != attr::L;
    if !code.code() || !level || wrong {
        return Err(Exception::gp(gate.selector).into());
    }
    if code.present() { Ok(()) } else { Err(Exception::np(gate.selector).into()) }
}

/// CALL, far.
pub(crate) fn call(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let (selector, offset, size) = pointer(core, &d.instruction)?;
    let back = d.instruction.next_ip();
    let cs = u64::from(core.state.segments[seg::CS].selector);
    if !core.protected() {
        core.push(cs, size)?;
        core.push(back, size)?;
        if offset > u64::from(core.state.segments[seg::CS].limit) {
            return Err(Exception::GP.into());
        }
        core.state.segments[seg::CS] = core.real_mode_segment(seg::CS, selector);
        core.state.rip = offset & mask(size);
        core.state.attention |= attention::MODE;
        return Ok(());
    }
    if selector & !3 == 0 {
        return Err(Exception::GP.into());
    }
    let target = core.descriptor(selector, Exception::gp)?;
    let cpl = core.state.cpl();
    if target.code() {
        check_direct(core, selector, target)?;
        check_offset(core, target, offset)?;
        core.push(cs, size)?;
        core.push(back, size)?;
        return enter_code(core, selector, cpl, target, offset);
    }
    let gate = read_gate(core, selector, target)?;
    let code = core.descriptor(gate.selector, Exception::gp)?;
    check_gate_code(core, &gate, code, code.dpl() <= cpl)?;
    check_offset(core, code, gate.offset)?;
    if code.conforming() || code.dpl() == cpl {
        core.push(cs, gate.size)?;
        core.push(back, gate.size)?;
        return enter_code(core, gate.selector, cpl, code, gate.offset);
    }
    call_inner(core, &gate, code, cs, back)
}

/// A call through a gate to an inner level: to the stack that the TSS names.
fn call_inner(core: &mut Core, gate: &Gate, code: Descriptor, cs: u64, back: u64) -> Result<(), Trap> {
    let segments = core.state.segments;
    let cpl = code.dpl();
    let long = core.state.long_mode();
    let old_ss = u64::from(core.state.segments[seg::SS].selector);
    let old_sp = core.state.gpr[reg::RSP];
    let (ss, sp) = if long {
        let sp = core.tss_stack64(4 + u64::from(cpl) * 8)?;
        (null_stack(u16::from(cpl), cpl), sp)
    } else {
        let (selector, sp) = core.tss_stack32(cpl)?;
        (core.checked_stack(selector, cpl, Exception::ts)?, sp)
    };
    let mut parameters = Vec::new();
    if !long {
        for n in 0..u64::from(gate.count) {
            parameters.push(core.peek(n * gate.size as u64, gate.size)?);
        }
    }
    core.state.segments[seg::SS] = ss;
    core.state.gpr[reg::RSP] = sp;
    if long {
        // Pushes are of 64-bit code from here on.
        core.state.segments[seg::CS] = code.load(gate.selector & !3 | u16::from(cpl));
    }
    let size = gate.size;
    let mut pushed = core.push(old_ss, size).and_then(|()| core.push(old_sp, size));
    for value in parameters.iter().rev() {
        pushed = pushed.and_then(|()| core.push(*value, size));
    }
    let entered = pushed
        .and_then(|()| core.push(cs, size))
        .and_then(|()| core.push(back, size))
        .and_then(|()| enter_code(core, gate.selector, cpl, code, gate.offset));
    if entered.is_err() {
        core.state.segments = segments;
    }
    entered
}

/// RET, far.
pub(crate) fn ret(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let size = match i.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let release = if i.op_count() > 0 { i.immediate(0) } else { 0 };
    let step = size as u64;
    let rip = core.peek(0, size)?;
    let selector = core.peek(step, size)? as u16;
    if !core.protected() {
        if rip > u64::from(core.state.segments[seg::CS].limit) {
            return Err(Exception::GP.into());
        }
        core.state.segments[seg::CS] = core.real_mode_segment(seg::CS, selector);
        core.state.rip = rip;
        core.move_stack(2 * step + release);
        core.state.attention |= attention::MODE;
        return Ok(());
    }
    let (target, level) = return_code(core, selector, rip)?;
    if level == core.state.cpl() {
        core.move_stack(2 * step + release);
        return enter_code(core, selector, level, target, rip);
    }
    let sp = core.peek(2 * step + release, size)?;
    let ss = core.peek(3 * step + release, size)? as u16;
    let stack = return_stack(core, ss, level, target)?;
    leave_to(core, selector, level, target, rip, stack)?;
    let width = core.stack_size();
    core.set_gpr_sized(reg::RSP, sp.wrapping_add(release), width);
    Ok(())
}

/// The code segment that RETF and IRET go back to, and its level.
fn return_code(core: &mut Core, selector: u16, rip: u64) -> Result<(Descriptor, u8), Trap> {
    if selector & !3 == 0 {
        return Err(Exception::GP.into());
    }
    let target = core.descriptor(selector, Exception::gp)?;
    let level = (selector & 3) as u8;
    let matches = if target.conforming() { target.dpl() <= level } else { target.dpl() == level };
    let both = core.state.long_mode() && target.attr() & (attr::L | attr::DB) == attr::L | attr::DB;
    if !target.code() || level < core.state.cpl() || !matches || both {
        return Err(Exception::gp(selector).into());
    }
    if !target.present() {
        return Err(Exception::np(selector).into());
    }
    check_offset(core, target, rip)?;
    Ok((target, level))
}

/// The stack segment that an outer return goes back to.
fn return_stack(core: &mut Core, selector: u16, level: u8, code: Descriptor) -> Result<Segment, Trap> {
    let to64 = core.state.long_mode() && code.attr() & attr::L != 0;
    if selector & !3 == 0 {
        if to64 && level < 3 && (selector & 3) as u8 == level {
            return Ok(null_stack(selector, level));
        }
        return Err(Exception::GP.into());
    }
    core.checked_stack(selector, level, Exception::gp)
}

fn leave_to(
    core: &mut Core,
    selector: u16,
    level: u8,
    target: Descriptor,
    rip: u64,
    stack: Segment,
) -> Result<(), Trap> {
    let outer = level > core.state.cpl();
    enter_code(core, selector, level, target, rip)?;
    core.state.segments[seg::SS] = stack;
    if outer {
        core.drop_inner_segments();
    }
    Ok(())
}

/// INT n, INT3, INT1, INTO.
pub(crate) fn int(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let (number, source) = match i.mnemonic() {
        Mnemonic::Int3 => (vector::BP, Source::Software),
        Mnemonic::Int1 => {
            core.note_debug(0);
            (vector::DB, Source::Icebp)
        }
        Mnemonic::Into if core.state.rflags & rflags::OF == 0 => return Ok(()),
        Mnemonic::Into => (vector::OF, Source::Software),
        _ => (i.immediate8(), Source::Software),
    };
    let vm = core.state.rflags & rflags::VM != 0 && core.state.cr0 & cr0::PE != 0;
    if vm && i.mnemonic() == Mnemonic::Int && core.state.rflags & rflags::IOPL != rflags::IOPL {
        return Err(Exception::GP.into());
    }
    core.deliver(number, None, source)?;
    core.before.quiet = true;
    Ok(())
}

/// IRET.
pub(crate) fn iret(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let size = match d.instruction.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    let step = size as u64;
    let rip = core.peek(0, size)?;
    let selector = core.peek(step, size)? as u16;
    let flags = core.peek(2 * step, size)?;
    // NMIs are unblocked even if the return faults (Intel SDM 3, 7.7.1).
    core.state.nmi_blocked = false;
    if !core.protected() {
        if core.state.cr0 & cr0::PE != 0 && core.state.rflags & rflags::IOPL != rflags::IOPL {
            return Err(Exception::GP.into());
        }
        if rip > u64::from(core.state.segments[seg::CS].limit) {
            return Err(Exception::GP.into());
        }
        core.state.segments[seg::CS] = core.real_mode_segment(seg::CS, selector);
        core.state.rip = rip;
        core.move_stack(3 * step);
        let vm = core.state.rflags & rflags::VM;
        let level = if core.state.cr0 & cr0::PE != 0 { 3 } else { 0 };
        set_flags(core, flags, size, level);
        core.state.rflags |= vm;
        return Ok(());
    }
    if core.state.rflags & rflags::NT != 0 {
        if core.state.long_mode() {
            return Err(Exception::GP.into());
        }
        return Err(return_to_task(core)?);
    }
    let cpl = core.state.cpl();
    if flags & rflags::VM != 0 && size == 4 && cpl == 0 && !core.state.long_mode() {
        return to_virtual_8086(core, rip, selector, flags);
    }
    let (target, level) = return_code(core, selector, rip)?;
    let from64 = core.state.code64();
    if level == cpl && !from64 {
        core.move_stack(3 * step);
        enter_code(core, selector, level, target, rip)?;
        set_flags(core, flags, size, cpl);
        return Ok(());
    }
    let sp = core.peek(3 * step, size)?;
    let ss = core.peek(4 * step, size)? as u16;
    let stack = return_stack(core, ss, level, target)?;
    leave_to(core, selector, level, target, rip, stack)?;
    // To a 16-bit stack only SP is loaded: the upper half keeps the old value.
    let width = core.stack_size();
    core.set_gpr_sized(reg::RSP, sp, width);
    set_flags(core, flags, size, cpl);
    Ok(())
}

/// IRET with NT set: back to the task that the TSS links to (Intel SDM 2, IRET, TASK-RETURN). A link of a system without tasks, 0,
/// is a fault.
fn return_to_task(core: &mut Core) -> Result<Trap, Trap> {
    let link = core.read_implicit(core.state.tr.base, 2)? as u16;
    if link & 4 != 0 || link & !3 == 0 {
        return Err(Exception::ts(link & !3).into());
    }
    let to = core.descriptor(link, Exception::ts)?;
    if to.segment() || !matches!(to.kind(), system::TSS_BUSY | system::TSS16_BUSY) {
        return Err(Exception::ts(link & !3).into());
    }
    if !to.present() {
        return Err(Exception::np(link & !3).into());
    }
    Ok(task_switch(core.state.rip))
}

/// Loads the flags that IRET may change at `cpl`.
fn set_flags(core: &mut Core, new: u64, size: usize, cpl: u8) {
    let old = core.state.rflags;
    let mut changeable =
        rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::RF | rflags::AC | rflags::ID;
    if cpl == 0 {
        changeable |= rflags::IOPL | rflags::VIF | rflags::VIP;
    }
    if u64::from(cpl) <= old >> 12 & 3 {
        changeable |= rflags::IF;
    }
    changeable &= mask(size);
    core.state.rflags = old & !changeable | new & changeable | rflags::FIXED;
    core.state.attention |= attention::MODE;
}

fn to_virtual_8086(core: &mut Core, rip: u64, cs: u16, flags: u64) -> Result<(), Trap> {
    let sp = core.peek(12, 4)?;
    let mut selectors = [0u16; 6];
    for (place, segment) in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS].into_iter().enumerate() {
        selectors[segment] = core.peek(16 + 4 * place as u64, 4)? as u16;
    }
    selectors[seg::CS] = cs;
    core.state.rflags = flags & 0x003f_7fd5 | rflags::FIXED;
    for (segment, selector) in selectors.into_iter().enumerate() {
        core.state.segments[segment] = core.real_mode_segment(segment, selector);
    }
    core.state.gpr[reg::RSP] = sp;
    core.state.rip = rip & 0xffff;
    core.state.attention |= attention::MODE;
    Ok(())
}
