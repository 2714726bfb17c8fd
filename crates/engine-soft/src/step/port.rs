//! Port I/O: IN, OUT, and who may (Intel SDM 1, 19.5).

use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::state::reg;
use cpu::{Space, cr0, rflags};
use iced_x86::{Instruction, OpKind, Register};

/// Whether the running code may reach a port: by IOPL, else by the TSS's bitmap.
pub(crate) fn allowed(core: &mut Core, port: u16, size: usize) -> Result<(), Trap> {
    let state = &core.state;
    if state.cr0 & cr0::PE == 0 {
        return Ok(());
    }
    let virtual_8086 = state.rflags & rflags::VM != 0;
    if !virtual_8086 && u64::from(state.cpl()) <= state.rflags >> 12 & 3 {
        return Ok(());
    }
    let tr = state.tr;
    // A 16-bit TSS has no bitmap.
    if tr.attr & 0xf < 9 || tr.limit < 103 {
        return Err(Exception::GP.into());
    }
    let bitmap = core.read_implicit(tr.base.wrapping_add(102), 2)?;
    let at = bitmap + u64::from(port / 8);
    if at + 1 > u64::from(tr.limit) {
        return Err(Exception::GP.into());
    }
    let bits = core.read_implicit(tr.base.wrapping_add(at), 2)?;
    if bits >> (port % 8) & ((1 << size) - 1) != 0 { Err(Exception::GP.into()) } else { Ok(()) }
}

/// Reads a port.
pub(crate) fn read(core: &mut Core, port: u16, size: usize) -> Result<u64, Trap> {
    core.check_port_breakpoints(u64::from(port), size);
    core.io.read(Space::Port, u64::from(port), size as u8)
}

/// Writes a port.
pub(crate) fn write(core: &mut Core, port: u16, size: usize, value: u64) -> Result<(), Trap> {
    core.check_port_breakpoints(u64::from(port), size);
    core.io.write(Space::Port, u64::from(port), size as u8, value & super::operand::mask(size))
}

fn port_of(core: &Core, i: &Instruction, operand: u32) -> u16 {
    match i.op_kind(operand) {
        OpKind::Register => core.state.gpr[reg::RDX] as u16,
        _ => u16::from(i.immediate8()),
    }
}

/// IN.
pub(crate) fn input(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let register: Register = i.op0_register();
    let port = port_of(core, i, 1);
    allowed(core, port, register.size())?;
    let value = read(core, port, register.size())?;
    core.set_gpr(register, value);
    Ok(())
}

/// OUT.
pub(crate) fn output(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let register = i.op1_register();
    let port = port_of(core, i, 0);
    allowed(core, port, register.size())?;
    write(core, port, register.size(), core.gpr(register))
}
