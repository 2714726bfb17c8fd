//! Vector accesses that touch only some of their elements: VMASKMOV, VPMASKMOV, MASKMOVDQU, MASKMOVQ and gathers.
//!
//! Elements that are masked off must not fault, so these go element by element instead of through a stub.

use super::native;
use super::operand::{mask, segment_index, sign_extend};
use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::mmu::Access;
use crate::state::reg;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

fn gather(i: &Instruction) -> Option<(usize, usize)> {
    // Bytes of an index, bytes of an element.
    Some(match i.mnemonic() {
        Mnemonic::Vgatherdps | Mnemonic::Vpgatherdd => (4, 4),
        Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd => (8, 4),
        Mnemonic::Vgatherdpd | Mnemonic::Vpgatherdq => (4, 8),
        Mnemonic::Vgatherqpd | Mnemonic::Vpgatherqq => (8, 8),
        _ => return None,
    })
}

/// Whether an instruction belongs here.
pub(crate) fn masked(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
            | Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Maskmovq
    ) || gather(i).is_some()
}

fn number(register: Register) -> usize {
    register.number() & 15
}

fn element(core: &Core, vector: usize, n: usize, size: usize) -> u64 {
    let quad = core.state.ymm.0[vector][(n * size / 8) & 3];
    quad >> (n * size % 8 * 8) & mask(size)
}

fn set_element(core: &mut Core, vector: usize, n: usize, size: usize, value: u64) {
    let shift = n * size % 8 * 8;
    let quad = &mut core.state.ymm.0[vector][(n * size / 8) & 3];
    *quad = *quad & !(mask(size) << shift) | (value & mask(size)) << shift;
}

fn chosen(core: &Core, vector: usize, n: usize, size: usize) -> bool {
    element(core, vector, n, size) >> (size * 8 - 1) != 0
}

/// Executes one of them.
pub(crate) fn execute(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    if i.encoding() == EncodingKind::EVEX {
        return Err(Exception::UD.into());
    }
    native::check(core, i)?;
    if let Some((index, size)) = gather(i) {
        return execute_gather(core, i, index, size);
    }
    match i.mnemonic() {
        Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
            let bytes = |v: [u64; 4]| (u128::from(v[0]) | u128::from(v[1]) << 64).to_le_bytes();
            let data = bytes(core.state.ymm.0[number(i.op1_register())]);
            let chosen = bytes(core.state.ymm.0[number(i.op2_register())]);
            store_bytes(core, i, &data, &chosen)
        }
        Mnemonic::Maskmovq => {
            native::pending_x87()?;
            let top = native::mmx_top(core);
            let data = native::mmx(core, (number(i.op1_register()) + 8 - top) & 7).to_le_bytes();
            let chosen = native::mmx(core, (number(i.op2_register()) + 8 - top) & 7).to_le_bytes();
            let done = store_bytes(core, i, &data, &chosen);
            // Faults that the store meets come after that.
            native::mmx_used();
            done
        }
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => masked_move(core, i, 8),
        _ => masked_move(core, i, 4),
    }
}

/// MASKMOVDQU and MASKMOVQ: bytes at DS:rDI.
fn store_bytes(core: &mut Core, i: &Instruction, data: &[u8], chosen: &[u8]) -> Result<(), Trap> {
    let width = match i.op0_kind() {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let segment = segment_index(i.memory_segment());
    let privilege = core.privilege();
    for write in [false, true] {
        for (n, byte) in data.iter().enumerate().filter(|(n, _)| chosen[*n] & 0x80 != 0) {
            let offset = core.state.gpr[reg::RDI].wrapping_add(n as u64) & mask(width);
            let linear = core.linear(segment, offset, 1, true)?;
            if write {
                core.check_data_breakpoints(linear, 1, true);
                core.write(linear, &[*byte], privilege)?;
            } else {
                core.probe(linear, 1, Access::Write, privilege)?;
            }
        }
    }
    Ok(())
}

fn masked_move(core: &mut Core, i: &Instruction, size: usize) -> Result<(), Trap> {
    let store = i.op0_kind() == OpKind::Memory;
    let selects = number(i.op1_register());
    let register = if store { i.op2_register() } else { i.op0_register() };
    let vector = number(register);
    let count = register.size() / size;
    let segment = segment_index(i.memory_segment());
    let start = core.effective(i);
    let narrow = mask(core.address_size(i));
    let privilege = core.privilege();
    let at = |n: usize| start.wrapping_add((n * size) as u64) & narrow;
    if !store {
        let mut loaded = [0u64; 8];
        for (n, value) in loaded.iter_mut().enumerate().take(count) {
            if chosen(core, selects, n, size) {
                let linear = core.linear(segment, at(n), size, false)?;
                core.check_data_breakpoints(linear, size, false);
                *value = core.read_uint(linear, size, privilege)?;
            }
        }
        core.state.ymm.0[vector] = [0; 4];
        for (n, value) in loaded.iter().enumerate().take(count) {
            set_element(core, vector, n, size, *value);
        }
        return Ok(());
    }
    for write in [false, true] {
        for n in (0..count).filter(|&n| n < 8) {
            if !chosen(core, selects, n, size) {
                continue;
            }
            let linear = core.linear(segment, at(n), size, true)?;
            if write {
                core.check_data_breakpoints(linear, size, true);
                core.write_uint(linear, element(core, vector, n, size), size, privilege)?;
            } else {
                core.probe(linear, size, Access::Write, privilege)?;
            }
        }
    }
    Ok(())
}

fn execute_gather(core: &mut Core, i: &Instruction, index_size: usize, size: usize) -> Result<(), Trap> {
    let (to, selects, indices) = (i.op0_register(), i.op2_register(), i.memory_index());
    let (vector, mask_vector, index_vector) = (number(to), number(selects), number(indices));
    if vector == mask_vector || vector == index_vector || mask_vector == index_vector {
        return Err(Exception::UD.into());
    }
    let count = (to.size() / size).min(indices.size() / index_size);
    let segment = segment_index(i.memory_segment());
    let base = i.memory_base();
    let width = core.address_size(i);
    let mut start = i.memory_displacement64();
    if base != Register::None {
        start = start.wrapping_add(core.gpr(base));
    }
    let privilege = core.privilege();
    for n in 0..count {
        if chosen(core, mask_vector, n, size) {
            let index = sign_extend(element(core, index_vector, n, index_size), index_size);
            let scaled = index.wrapping_mul(u64::from(i.memory_index_scale()));
            let linear = core.linear(segment, start.wrapping_add(scaled) & mask(width), size, false)?;
            core.check_data_breakpoints(linear, size, false);
            let value = core.read_uint(linear, size, privilege)?;
            set_element(core, vector, n, size, value);
        }
        // Elements done stay done if a later one faults; the mask tells which.
        set_element(core, mask_vector, n, size, 0);
        core.io.commit();
    }
    core.state.ymm.0[mask_vector] = [0; 4];
    for n in count * size / 4..8 {
        set_element(core, vector, n, 4, 0);
    }
    Ok(())
}
