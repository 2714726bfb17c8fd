//! Near control flow: jumps, calls, returns, loops, and flags' conditions.

use super::operand::mask;
use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::mmu::Mmu;
use crate::state::{reg, seg};
use cpu::rflags;
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind};

/// Whether `condition` holds for `flags`.
pub(crate) fn holds(condition: ConditionCode, flags: u64) -> bool {
    let bit = |bit: u64| flags & bit != 0;
    let (cf, pf, zf) = (bit(rflags::CF), bit(rflags::PF), bit(rflags::ZF));
    let (sf, of) = (bit(rflags::SF), bit(rflags::OF));
    match condition {
        ConditionCode::None => true,
        ConditionCode::o => of,
        ConditionCode::no => !of,
        ConditionCode::b => cf,
        ConditionCode::ae => !cf,
        ConditionCode::e => zf,
        ConditionCode::ne => !zf,
        ConditionCode::be => cf || zf,
        ConditionCode::a => !cf && !zf,
        ConditionCode::s => sf,
        ConditionCode::ns => !sf,
        ConditionCode::p => pf,
        ConditionCode::np => !pf,
        ConditionCode::l => sf != of,
        ConditionCode::ge => sf == of,
        ConditionCode::le => zf || sf != of,
        ConditionCode::g => !zf && sf == of,
    }
}

impl Core {
    /// Continues at an offset in CS, if that may be executed.
    pub(crate) fn jump(&mut self, target: u64) -> Result<(), Trap> {
        let allowed = if self.state.code64() {
            Mmu::canonical(target)
        } else {
            target <= u64::from(self.state.segments[seg::CS].limit)
        };
        if !allowed {
            return Err(Exception::GP.into());
        }
        self.state.rip = target;
        Ok(())
    }
}

/// Target of a near branch, and its operand size in bytes.
fn target(core: &mut Core, i: &Instruction) -> Result<(u64, usize), Trap> {
    Ok(match i.op0_kind() {
        OpKind::NearBranch16 => (u64::from(i.near_branch16()), 2),
        OpKind::NearBranch32 => (u64::from(i.near_branch32()), 4),
        OpKind::NearBranch64 => (i.near_branch64(), 8),
        OpKind::Register => (core.operand(i, 0)?, i.op0_register().size()),
        _ => (core.operand(i, 0)?, i.memory_size().size()),
    })
}

/// JMP, near.
pub(crate) fn jmp(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let (to, _) = target(core, &d.instruction)?;
    core.jump(to)
}

/// Jcc.
pub(crate) fn jcc(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if holds(d.instruction.condition_code(), core.state.rflags) { jmp(core, d) } else { Ok(()) }
}

/// CALL, near.
pub(crate) fn call(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let (to, size) = target(core, &d.instruction)?;
    let back = d.instruction.next_ip();
    if core.state.code64() && !Mmu::canonical(to) {
        return Err(Exception::GP.into());
    }
    core.push(back, size)?;
    core.jump(to)
}

/// RET, near.
pub(crate) fn ret(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let size = match i.code() {
        iced_x86::Code::Retnw | iced_x86::Code::Retnw_imm16 => 2,
        iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let to = core.pop(size)?;
    if i.op_count() > 0 {
        core.move_stack(i.immediate(0));
    }
    core.jump(to)
}

/// LOOP, LOOPE, LOOPNE, JCXZ and its like.
pub(crate) fn count(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    use iced_x86::Code as C;
    let i = &d.instruction;
    let width = match i.code() {
        C::Loop_rel8_16_CX | C::Loop_rel8_32_CX | C::Loope_rel8_16_CX | C::Loope_rel8_32_CX => 2,
        C::Loopne_rel8_16_CX | C::Loopne_rel8_32_CX | C::Jcxz_rel8_16 | C::Jcxz_rel8_32 => 2,
        C::Loop_rel8_64_RCX | C::Loop_rel8_16_RCX | C::Loope_rel8_64_RCX | C::Loope_rel8_16_RCX => 8,
        C::Loopne_rel8_64_RCX | C::Loopne_rel8_16_RCX | C::Jrcxz_rel8_64 | C::Jrcxz_rel8_16 => 8,
        _ => 4,
    };
    let zero = core.state.rflags & rflags::ZF != 0;
    let count = core.state.gpr[reg::RCX] & mask(width);
    let taken = match i.mnemonic() {
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => count == 0,
        other => {
            let left = count.wrapping_sub(1) & mask(width);
            core.set_gpr_sized(reg::RCX, left, width);
            left != 0
                && match other {
                    Mnemonic::Loope => zero,
                    Mnemonic::Loopne => !zero,
                    _ => true,
                }
        }
    };
    if taken { jmp(core, d) } else { Ok(()) }
}
