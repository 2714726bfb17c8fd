//! Instructions that 64-bit mode has dropped or that only inspect descriptors (Intel SDM 2; SDM 3, 5.10).

use super::operand::{mask, segment_index};
use crate::cpu_core::Core;
use crate::exception::{Exception, Trap, vector};
use crate::fetch::Decoded;
use crate::mmu::Privilege;
use crate::segmentation::{Descriptor, system};
use crate::state::reg;
use cpu::{attr, rflags};
use iced_x86::{Mnemonic, OpKind, Register};

fn set_result_flags(core: &mut Core, result: u8) {
    let mut flags = core.state.rflags & !(rflags::SF | rflags::ZF | rflags::PF);
    if result == 0 {
        flags |= rflags::ZF;
    }
    if result & 0x80 != 0 {
        flags |= rflags::SF;
    }
    if result.count_ones().is_multiple_of(2) {
        flags |= rflags::PF;
    }
    core.state.rflags = flags;
}

fn set_flag(core: &mut Core, flag: u64, on: bool) {
    if on {
        core.state.rflags |= flag;
    } else {
        core.state.rflags &= !flag;
    }
}

/// DAA and DAS.
pub(crate) fn decimal_adjust(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let subtract = d.instruction.mnemonic() == Mnemonic::Das;
    let old = core.state.gpr[reg::RAX] as u8;
    let (carry, auxiliary) = (core.state.rflags & rflags::CF != 0, core.state.rflags & rflags::AF != 0);
    let mut by = 0u8;
    let low = old & 15 > 9 || auxiliary;
    if low {
        by = 6;
    }
    let high = old > 0x99 || carry;
    if high {
        by += 0x60;
    }
    let result = if subtract { old.wrapping_sub(by) } else { old.wrapping_add(by) };
    // DAS may borrow in its first step alone.
    let borrow = subtract && low && old < 6;
    core.set_gpr_sized(reg::RAX, u64::from(result), 1);
    set_flag(core, rflags::CF, high || borrow);
    set_flag(core, rflags::AF, low);
    set_result_flags(core, result);
    Ok(())
}

/// AAA and AAS.
pub(crate) fn ascii_adjust(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let ax = core.state.gpr[reg::RAX] as u16;
    let adjust = ax & 15 > 9 || core.state.rflags & rflags::AF != 0;
    let mut result = ax;
    if adjust {
        result = if d.instruction.mnemonic() == Mnemonic::Aaa {
            ax.wrapping_add(0x106)
        } else {
            ax.wrapping_sub(6).wrapping_sub(0x100)
        };
    }
    result &= 0xff0f;
    core.set_gpr_sized(reg::RAX, u64::from(result), 2);
    set_flag(core, rflags::CF, adjust);
    set_flag(core, rflags::AF, adjust);
    Ok(())
}

/// AAM and AAD.
pub(crate) fn ascii_base(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let base = d.instruction.immediate8();
    let ax = core.state.gpr[reg::RAX] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let (ah, al) = if d.instruction.mnemonic() == Mnemonic::Aam {
        if base == 0 {
            return Err(Exception::DE.into());
        }
        (al / base, al % base)
    } else {
        (0, al.wrapping_add(ah.wrapping_mul(base)))
    };
    core.set_gpr_sized(reg::RAX, u64::from(u16::from_le_bytes([al, ah])), 2);
    set_result_flags(core, al);
    Ok(())
}

/// SALC.
pub(crate) fn salc(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    let carry = core.state.rflags & rflags::CF;
    core.set_gpr_sized(reg::RAX, carry.wrapping_neg(), 1);
    Ok(())
}

/// XLAT.
pub(crate) fn xlat(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let width = i.memory_base().size();
    let al = core.state.gpr[reg::RAX] & 0xff;
    let offset = core.state.gpr[reg::RBX].wrapping_add(al) & mask(width);
    let linear = core.linear(segment_index(i.memory_segment()), offset, 1, false)?;
    core.check_data_breakpoints(linear, 1, false);
    let value = core.read_uint(linear, 1, core.privilege())?;
    core.set_gpr(Register::AL, value);
    Ok(())
}

/// BOUND.
pub(crate) fn bound(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let size = i.op0_register().size();
    let linear = core.memory_operand(i, 2 * size, false)?;
    let privilege = core.privilege();
    let low = core.read_uint(linear, size, privilege)?;
    let high = core.read_uint(linear.wrapping_add(size as u64), size, privilege)?;
    let signed = |value| super::operand::sign_extend(value, size) as i64;
    let index = signed(core.gpr(i.op0_register()));
    if index < signed(low) || index > signed(high) {
        return Err(Exception::plain(vector::BR).into());
    }
    Ok(())
}

fn selector_operand(core: &mut Core, d: &Decoded, operand: u32) -> Result<u16, Trap> {
    let i = &d.instruction;
    if i.op_kind(operand) == OpKind::Register {
        return Ok(core.gpr(i.op_register(operand)) as u16);
    }
    let linear = core.memory_operand(i, 2, false)?;
    Ok(core.read_uint(linear, 2, core.privilege())? as u16)
}

/// ARPL.
pub(crate) fn arpl(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !core.protected() {
        return Err(Exception::UD.into());
    }
    let i = &d.instruction;
    let destination = core.operand(i, 0)?;
    let source = core.gpr(i.op1_register());
    let lower = destination & 3 < source & 3;
    if lower {
        core.set_operand(i, 0, destination & !3 | source & 3)?;
    }
    set_flag(core, rflags::ZF, lower);
    Ok(())
}

/// The descriptor of a selector, if there is one; faults only for the access itself.
fn inspect(core: &mut Core, selector: u16) -> Result<Option<Descriptor>, Trap> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    match core.descriptor_address(selector, 8, Exception::gp) {
        Ok(address) => Ok(Some(Descriptor(core.read_uint(address, 8, Privilege::Implicit)?))),
        Err(Trap::Exception(_)) => Ok(None),
        Err(other) => Err(other),
    }
}

fn visible(core: &Core, selector: u16, descriptor: Descriptor) -> bool {
    let level = core.state.cpl().max((selector & 3) as u8);
    descriptor.conforming() || descriptor.dpl() >= level
}

/// LAR and LSL.
pub(crate) fn load_rights(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !core.protected() {
        return Err(Exception::UD.into());
    }
    let i = &d.instruction;
    let selector = selector_operand(core, d, 1)?;
    let limit = i.mnemonic() == Mnemonic::Lsl;
    let found = inspect(core, selector)?.filter(|&descriptor| {
        let long = core.state.long_mode();
        let kind = match descriptor.kind() {
            _ if descriptor.segment() => true,
            system::LDT | system::TSS | system::TSS_BUSY => true,
            system::TSS16 | system::TSS16_BUSY => !long,
            system::CALL_GATE => !limit,
            system::CALL_GATE16 | system::TASK_GATE => !limit && !long,
            _ => false,
        };
        kind && visible(core, selector, descriptor)
    });
    if let Some(descriptor) = found {
        let value = if limit { u64::from(descriptor.limit()) } else { descriptor.0 >> 32 & 0x00ff_ff00 };
        // The limit's four bits in the middle are undefined for LAR; the host's own CPUs keep them.
        core.set_gpr(i.op0_register(), value);
    }
    set_flag(core, rflags::ZF, found.is_some());
    Ok(())
}

/// VERR and VERW.
pub(crate) fn verify(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !core.protected() {
        return Err(Exception::UD.into());
    }
    let selector = selector_operand(core, d, 0)?;
    let write = d.instruction.mnemonic() == Mnemonic::Verw;
    if write {
        crate::host::forget_buffers(&core.state.host_data);
    }
    let good = inspect(core, selector)?.is_some_and(|descriptor| {
        let right = if write { descriptor.writable() } else { descriptor.readable() };
        right && descriptor.attr() & attr::S != 0 && visible(core, selector, descriptor)
    });
    set_flag(core, rflags::ZF, good);
    Ok(())
}
