//! Re-encoding one guest instruction as a stub for the host.
//!
//! A stub gets the state in RDI, loads the registers that the instruction uses, executes it with its memory operand
//! replaced by `[host register]`, stores the registers it used, and returns 0 in EAX. Which host registers play parts
//! of their own:
//!
//! * *frame*: the state's address, any register that the instruction does not use;
//! * *address*: the operand's host address, from `scratch[ADDRESS]`;
//! * *stack*: the guest's RSP, where the instruction uses that as an operand;
//! * *bit*: the bit offset of BT and its like, reduced to the operand, from `scratch[BIT]`.

use crate::state::CpuState;
use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpKind, Register,
};
use std::mem::offset_of;

/// Indices in [`CpuState::scratch`].
pub(crate) const ADDRESS: usize = 0;
pub(crate) const FLAGS: usize = 1;
pub(crate) const BIT: usize = 2;

/// A stub's bytes, and what its user has to prepare.
pub(crate) struct Stub {
    pub code: Vec<u8>,
    /// Takes the status flags from `scratch[FLAGS]` and leaves them there.
    pub flags: bool,
    /// Uses `scratch[BIT]`.
    pub bit: bool,
}

fn gpr_slot(number: usize) -> i64 {
    (offset_of!(CpuState, gpr) + number * 8) as i64
}

fn scratch_slot(index: usize) -> i64 {
    (offset_of!(CpuState, scratch) + index * 8) as i64
}

/// Forms that 64-bit mode lacks, or whose operand is an address, in their general form.
fn general_form(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        other => other,
    }
}

/// BT, BTS, BTR or BTC of memory by a register, which reaches beyond the operand.
pub(crate) fn bit_string(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
}

struct Assembler {
    encoder: Encoder,
    failed: bool,
}

impl Assembler {
    fn put(&mut self, instruction: Result<Instruction, iced_x86::IcedError>) {
        match instruction {
            Ok(i) => self.failed |= self.encoder.encode(&i, 0).is_err(),
            Err(_) => self.failed = true,
        }
    }

    fn load(&mut self, register: Register, frame: Register, slot: i64) {
        let from = MemoryOperand::with_base_displ(frame, slot);
        self.put(Instruction::with2(Code::Mov_r64_rm64, register, from));
    }

    fn store(&mut self, register: Register, frame: Register, slot: i64) {
        let to = MemoryOperand::with_base_displ(frame, slot);
        self.put(Instruction::with2(Code::Mov_rm64_r64, to, register));
    }
}

fn register64(number: usize) -> Register {
    Register::RAX + number as u32
}

/// The register `number` in the width (and half) of `like`.
fn same_width(like: Register, number: usize) -> Register {
    let first = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        // AL, CL, DL, BL, four high halves, SPL...
        _ => return if number < 4 { Register::AL + number as u32 } else { Register::AL + number as u32 + 4 },
    };
    first + number as u32
}

/// Makes the stub of `guest`; `None` if it cannot be encoded.
pub(crate) fn emit(guest: &Instruction) -> Option<Stub> {
    let mut i = *guest;
    i.set_code(general_form(i.code()));
    let memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
    let bit = bit_string(&i);
    i.set_segment_prefix(Register::None);
    if memory {
        i.set_memory_base(Register::None);
        i.set_memory_index(Register::None);
        i.set_memory_index_scale(1);
        i.set_memory_displacement64(0);
        i.set_memory_displ_size(0);
    }
    // Registers that the instruction uses besides its address: each is loaded before and stored after, since what is
    // written in part keeps the rest.
    let mut factory = InstructionInfoFactory::new();
    let mut used = [false; 16];
    let mut high = false;
    for part in factory.info(&i).used_registers() {
        let register = part.register();
        if register.is_gpr() {
            used[register.full_register().number() & 15] = true;
            high |= matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
        }
    }
    let mut taken = used;
    taken[4] = true;
    // AH to BH exclude a REX prefix, and with it R8 to R15.
    let order: &[usize] = if high { &[6, 7, 3, 1, 2, 0] } else { &[11, 10, 9, 8, 6, 7, 3, 1, 2, 0] };
    let mut pick = |order: &[usize]| {
        let found = order.iter().copied().find(|&n| !taken[n])?;
        taken[found] = true;
        Some(found)
    };
    let address = if memory { Some(pick(order)?) } else { None };
    let stack = if used[4] { Some(pick(order)?) } else { None };
    let bit_register = if bit { Some(pick(order)?) } else { None };
    let frame = pick(&[7, 15, 14, 13, 12])?;
    if let Some(address) = address {
        i.set_memory_base(register64(address));
    }
    for op in 0..i.op_count() {
        if i.op_kind(op) != OpKind::Register {
            continue;
        }
        let register = i.op_register(op);
        if let Some(bit) = bit_register
            && op == 1
        {
            i.set_op_register(op, same_width(register, bit));
        } else if let Some(stack) = stack
            && register.is_gpr()
            && register.full_register() == Register::RSP
        {
            i.set_op_register(op, same_width(register, stack));
        }
    }
    let flags = i.rflags_read() | i.rflags_modified() != 0;
    let mut a = Assembler { encoder: Encoder::new(64), failed: false };
    let frame_register = register64(frame);
    if frame != 7 {
        a.put(Instruction::with2(Code::Mov_r64_rm64, frame_register, Register::RDI));
    }
    if flags {
        // SAHF takes AH; OF comes from the overflow of an addition to AL.
        a.load(Register::RAX, frame_register, scratch_slot(FLAGS));
        a.put(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f));
        a.put(Ok(Instruction::with(Code::Sahf)));
    }
    if let Some(address) = address {
        a.load(register64(address), frame_register, scratch_slot(ADDRESS));
    }
    if let Some(bit) = bit_register {
        a.load(register64(bit), frame_register, scratch_slot(BIT));
    }
    let home = |number: usize| if number == 4 { stack.unwrap_or(4) } else { number };
    for number in (0..16).filter(|&n| used[n]) {
        a.load(register64(home(number)), frame_register, gpr_slot(number));
    }
    a.put(Ok(i));
    for number in (0..16).filter(|&n| used[n]) {
        a.store(register64(home(number)), frame_register, gpr_slot(number));
    }
    if flags {
        a.put(Instruction::with1(Code::Seto_rm8, Register::AL));
        a.put(Ok(Instruction::with(Code::Lahf)));
        a.store(Register::RAX, frame_register, scratch_slot(FLAGS));
    }
    a.put(Instruction::with2(Code::Xor_r32_rm32, Register::EAX, Register::EAX));
    a.put(Ok(Instruction::with(Code::Retnq)));
    if a.failed {
        return None;
    }
    Some(Stub { code: a.encoder.take_buffer(), flags, bit })
}
