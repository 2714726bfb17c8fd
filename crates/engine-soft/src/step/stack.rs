//! PUSH, POP, their kin, and the flags register.

use super::operand::{mask, segment_index};
use crate::cpu_core::{Core, attention};
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::state::{Shadow, reg, seg};
use cpu::{cr0, cr4, rflags};
use iced_x86::{Code, Instruction, OpKind, Register};

/// Operand size in bytes of a stack instruction, from its stack pointer's movement.
fn size_of(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

/// PUSH.
pub(crate) fn push(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let size = size_of(i);
    let value = core.operand(i, 0)?;
    if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() && size > 2 {
        // Intel and AMD write only the selector's 16 bits with a 32-bit operand; with 64 bits all, zero-extended.
        if size == 4 {
            return push_selector32(core, value);
        }
    }
    core.push(value, size)
}

fn push_selector32(core: &mut Core, selector: u64) -> Result<(), Trap> {
    let linear = core.stack_linear(4u64.wrapping_neg(), 4, true)?;
    core.write_uint(linear, selector, 2, core.privilege())?;
    core.move_stack(4u64.wrapping_neg());
    Ok(())
}

/// POP to a general register or memory.
pub(crate) fn pop(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let value = core.pop(size_of(i))?;
    // A memory operand with RSP as base uses the value after the pop; so does POP RSP keep what it popped.
    core.set_operand(i, 0, value)
}

/// POP to a segment register.
pub(crate) fn pop_segment(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let size = size_of(i);
    let segment = segment_index(i.op0_register());
    // With a 32-bit operand only two bytes are read.
    let selector = core.peek(0, size.min(if size == 4 { 2 } else { 8 }))? as u16;
    let pop_size = core.stack_size();
    core.load_segment(segment, selector)?;
    // The old stack's width holds for the pop itself.
    let sp = core.state.gpr[reg::RSP].wrapping_add(size as u64);
    core.set_gpr_sized(reg::RSP, sp, pop_size);
    if segment == seg::SS {
        core.state.shadow = Shadow::MovSs;
    }
    Ok(())
}

/// PUSHA.
pub(crate) fn pusha(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let size = if d.instruction.code() == Code::Pushaw { 2 } else { 4 };
    let sp = core.state.gpr[reg::RSP];
    let lowest = core.stack_linear((8 * size as u64).wrapping_neg(), 8 * size, true)?;
    core.probe(lowest, 8 * size, crate::mmu::Access::Write, core.privilege())?;
    for number in 0..8 {
        let value = if number == reg::RSP { sp } else { core.state.gpr[number] };
        core.push(value, size)?;
    }
    Ok(())
}

/// POPA.
pub(crate) fn popa(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let size = if d.instruction.code() == Code::Popaw { 2 } else { 4 };
    for number in (0..8).rev() {
        let value = core.pop(size)?;
        if number != reg::RSP {
            core.set_gpr_sized(number, value, size);
        }
    }
    Ok(())
}

/// ENTER.
pub(crate) fn enter(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let size = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (room, level) = (u64::from(i.immediate16()), i.immediate8_2nd() & 31);
    core.push(core.state.gpr[reg::RBP], size)?;
    let frame = core.state.gpr[reg::RSP];
    let width = core.stack_size();
    let mut bp = core.state.gpr[reg::RBP];
    for _ in 1..level {
        bp = bp.wrapping_sub(size as u64);
        let linear = core.linear(seg::SS, bp & mask(width), size, false)?;
        let value = core.read_uint(linear, size, core.privilege())?;
        core.push(value, size)?;
    }
    if level > 0 {
        core.push(frame, size)?;
    }
    core.move_stack(room.wrapping_neg());
    // The new top must be writable (Intel SDM 2, ENTER).
    let top = core.stack_linear(0, size, true)?;
    core.probe(top, size, crate::mmu::Access::Write, core.privilege())?;
    core.set_gpr_sized(reg::RBP, frame, size);
    Ok(())
}

/// LEAVE.
pub(crate) fn leave(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let size = match d.instruction.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let width = core.stack_size();
    core.set_gpr_sized(reg::RSP, core.state.gpr[reg::RBP], width);
    let bp = core.pop(size)?;
    core.set_gpr_sized(reg::RBP, bp, size);
    Ok(())
}

fn iopl(flags: u64) -> u8 {
    (flags >> 12 & 3) as u8
}

/// PUSHF.
pub(crate) fn pushf(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let size = size_of(&d.instruction);
    let flags = core.state.rflags;
    if flags & rflags::VM != 0 && core.state.cr0 & cr0::PE != 0 && iopl(flags) < 3 {
        if size != 2 || !core.state.cr4_has(cr4::VME) {
            return Err(Exception::GP.into());
        }
        // Virtual-8086 extensions: VIF in IF's place, IOPL as 3.
        let shown = flags & !rflags::IF | flags >> 10 & rflags::IF | rflags::IOPL;
        return core.push(shown, 2);
    }
    core.push(flags & !(rflags::VM | rflags::RF), size)
}

/// POPF.
pub(crate) fn popf(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let size = size_of(&d.instruction);
    let old = core.state.rflags;
    let cpl = core.state.cpl();
    let mut changeable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    if old & rflags::VM != 0 && core.state.cr0 & cr0::PE != 0 {
        if iopl(old) == 3 {
            changeable |= rflags::IF;
        } else if size == 2 && core.state.cr4_has(cr4::VME) {
            let new = core.peek(0, 2)?;
            if new & rflags::TF != 0 || new & rflags::IF != 0 && old & rflags::VIP != 0 {
                return Err(Exception::GP.into());
            }
            core.pop(2)?;
            let virtual_if = (new & rflags::IF) << 10;
            let keep = !(changeable & 0xffff) & !rflags::VIF;
            core.state.rflags = old & keep | new & changeable & 0xffff | virtual_if | rflags::FIXED;
            return Ok(());
        } else {
            return Err(Exception::GP.into());
        }
    } else {
        if cpl == 0 {
            changeable |= rflags::IOPL;
        }
        if cpl <= iopl(old) {
            changeable |= rflags::IF;
        }
    }
    changeable &= mask(size);
    let new = core.pop(size)?;
    // RF is cleared by POPF of 32 bits and more; step clears it after every instruction anyway.
    core.state.rflags = old & !changeable | new & changeable | rflags::FIXED;
    core.state.attention |= attention::MODE;
    Ok(())
}

/// CLI.
pub(crate) fn cli(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    set_interrupt_flag(core, false)
}

/// STI.
pub(crate) fn sti(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    let before = core.state.rflags & rflags::IF != 0;
    set_interrupt_flag(core, true)?;
    if !before && core.state.rflags & rflags::IF != 0 {
        core.state.shadow = Shadow::Sti;
    }
    core.state.attention |= attention::MODE;
    Ok(())
}

fn set_interrupt_flag(core: &mut Core, on: bool) -> Result<(), Trap> {
    let flags = core.state.rflags;
    let bit = if !core.protected() && core.state.cr0 & cr0::PE == 0 || core.state.cpl() <= iopl(flags) {
        rflags::IF
    } else if core.state.cpl() == 3 {
        // Virtual interrupts: CR4.VME in virtual-8086 mode, CR4.PVI else (Intel SDM 3, 21.3, 21.4).
        let extension = if flags & rflags::VM != 0 { cr4::VME } else { cr4::PVI };
        if !core.state.cr4_has(extension) || on && flags & rflags::VIP != 0 {
            return Err(Exception::GP.into());
        }
        rflags::VIF
    } else {
        return Err(Exception::GP.into());
    };
    core.state.rflags = if on { flags | bit } else { flags & !bit };
    Ok(())
}

/// CLD and STD.
pub(crate) fn direction(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if d.instruction.code() == Code::Std {
        core.state.rflags |= rflags::DF;
    } else {
        core.state.rflags &= !rflags::DF;
    }
    Ok(())
}

/// CLAC and STAC.
pub(crate) fn access_check(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !super::feature::supported(iced_x86::CpuidFeature::SMAP, &core.cpuid) || core.state.cpl() != 0 {
        return Err(Exception::UD.into());
    }
    if d.instruction.code() == Code::Stac {
        core.state.rflags |= rflags::AC;
    } else {
        core.state.rflags &= !rflags::AC;
    }
    core.state.attention |= attention::MODE;
    Ok(())
}

/// LEA.
pub(crate) fn lea(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    if i.op1_kind() == OpKind::Register {
        return Err(Exception::UD.into());
    }
    let offset = core.effective(i);
    core.set_gpr(i.op0_register(), offset);
    Ok(())
}

/// MOV to a segment register.
pub(crate) fn mov_to_segment(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let segment = segment_index(i.op0_register());
    if segment == seg::CS {
        return Err(Exception::UD.into());
    }
    let selector = match i.op1_kind() {
        OpKind::Register => core.gpr(i.op1_register()) as u16,
        _ => {
            let linear = core.memory_operand(i, 2, false)?;
            core.read_uint(linear, 2, core.privilege())? as u16
        }
    };
    core.load_segment(segment, selector)?;
    if segment == seg::SS {
        core.state.shadow = Shadow::MovSs;
    }
    Ok(())
}

/// MOV from a segment register: a register gets it zero-extended, memory always two bytes.
pub(crate) fn mov_from_segment(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let selector = u64::from(core.state.segments[segment_index(i.op1_register())].selector);
    if i.op0_kind() == OpKind::Register {
        core.set_gpr(i.op0_register(), selector);
        return Ok(());
    }
    let linear = core.memory_operand(i, 2, true)?;
    core.write_uint(linear, selector, 2, core.privilege())
}

/// LDS, LES, LFS, LGS, LSS.
pub(crate) fn load_far_pointer(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    use iced_x86::Mnemonic;
    let i = &d.instruction;
    if i.op1_kind() == OpKind::Register {
        return Err(Exception::UD.into());
    }
    let segment = segment_index(match i.mnemonic() {
        Mnemonic::Les => Register::ES,
        Mnemonic::Lfs => Register::FS,
        Mnemonic::Lgs => Register::GS,
        Mnemonic::Lss => Register::SS,
        _ => Register::DS,
    });
    let size = i.op0_register().size();
    let linear = core.memory_operand(i, size + 2, false)?;
    let mut bytes = [0; 10];
    core.read(linear, &mut bytes[..size + 2], core.privilege())?;
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&bytes[..size]);
    let selector = u16::from_le_bytes([bytes[size], bytes[size + 1]]);
    core.load_segment(segment, selector)?;
    core.set_gpr(i.op0_register(), u64::from_le_bytes(offset));
    Ok(())
}
