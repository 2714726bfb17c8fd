//! Which status flags an instruction needs and which it replaces.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// CF, PF, AF, ZF, SF and OF in iced's numbering.
pub(super) const STATUS: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// The status flags whose value before the instruction matters to it.
pub(super) fn read(instruction: &Instruction) -> u32 {
    instruction.rflags_read() & STATUS
}

/// The status flags whose old value is certainly gone after it.
pub(super) fn killed(instruction: &Instruction) -> u32 {
    let mut all = instruction.rflags_modified() & STATUS;
    if !defines_all(instruction.mnemonic()) {
        // "Undefined" may mean "left as it was", and the host's answer is the right one.
        all &= !instruction.rflags_undefined();
    }
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        // A repeated comparison of no elements compares nothing.
        return 0;
    }
    if !shifts(instruction.mnemonic()) {
        return all;
    }
    // A count of zero leaves all flags alone (Intel SDM 2, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR, SHLD).
    let last = instruction.op_count().saturating_sub(1);
    match instruction.op_kind(last) {
        OpKind::Immediate8 => {
            let mask = if instruction.op0_register().size() == 8 || instruction.memory_size().size() == 8 {
                63
            } else {
                31
            };
            if instruction.immediate8() & mask == 0 { 0 } else { all }
        }
        _ => 0,
    }
}

/// All CPUs write the flags that the manuals leave undefined after these.
fn defines_all(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::And | M::Or | M::Xor | M::Test | M::Shl | M::Sal | M::Shr | M::Sar)
}

fn shifts(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Flags live before the instruction, from those live after it.
pub(super) fn before(instruction: &Instruction, after: u32) -> u32 {
    after & !killed(instruction) | read(instruction)
}
