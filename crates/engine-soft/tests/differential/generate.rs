//! Makes cases: instructions with operands at interesting places, and the registers that put them there.

use super::case::{CODE, CODE_MAX, Case, DATA, PAGE, State};
use super::codes;
use super::random::Random;
use iced_x86::{
    Code, ConstantOffsets, Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory,
    MemoryOperand, OpAccess, OpCodeOperandKind as K, OpKind, Register,
};

/// The pointers a register may hold, and numbers to index with.
pub struct Generator {
    codes: Vec<Code>,
    /// Codes that make other instructions meet: flags and memory in simple forms.
    frequent: Vec<Code>,
}

/// A place to be filled in when the addresses of all instructions are known.
enum Fixup {
    /// The relative operand of the instruction made last: offset in the code, size.
    Relative(usize, usize, usize),
    /// A register is to hold the address of a later instruction.
    Register(usize),
    /// So is the quadword at an address.
    Memory(u64),
}

struct Maker<'a> {
    random: &'a mut Random,
    state: State,
    pokes: Vec<(u64, u64)>,
    fixups: Vec<Fixup>,
    /// Registers that hold addresses of data; seldom written.
    pointers: u32,
    info: InstructionInfoFactory,
}

const RCX: usize = 1;
const RSP: usize = 4;

impl Generator {
    pub fn new() -> Self {
        use Code as C;
        let frequent = vec![
            C::Add_rm64_r64,
            C::Adc_rm64_r64,
            C::Adc_r64_rm64,
            C::Sbb_r32_rm32,
            C::Sbb_rm64_r64,
            C::Cmp_r64_rm64,
            C::Cmp_rm8_imm8,
            C::Test_rm32_r32,
            C::Inc_rm64,
            C::Dec_rm32,
            C::Mov_r64_rm64,
            C::Mov_rm64_r64,
            C::Mov_r32_rm32,
            C::Mov_rm32_r32,
            C::Mov_r8_rm8,
            C::Mov_rm8_r8,
            C::Mov_rm16_r16,
            C::Lea_r64_m,
            C::Push_r64,
            C::Pop_r64,
            C::Push_rm64,
            C::Pop_rm64,
            C::Pushfq,
            C::Popfq,
            C::Jb_rel8_64,
            C::Jne_rel8_64,
            C::Jo_rel8_64,
            C::Jle_rel32_64,
            C::Jmp_rel8_64,
            C::Call_rel32_64,
            C::Retnq,
            C::Jmp_rm64,
            C::Call_rm64,
            C::Loop_rel8_64_RCX,
            C::Jrcxz_rel8_64,
            C::Setb_rm8,
            C::Seto_rm8,
            C::Cmovbe_r64_rm64,
            C::Lahf,
            C::Sahf,
            C::Stosq_m64_RAX,
            C::Movsb_m8_m8,
            C::Movsq_m64_m64,
            C::Lodsd_EAX_m32,
            C::Cmpsb_m8_m8,
            C::Scasw_AX_m16,
            C::Stosb_m8_AL,
            C::Cmpxchg_rm64_r64,
            C::Xadd_rm32_r32,
            C::Xchg_rm64_r64,
            C::Bts_rm64_r64,
            C::Btr_rm32_r32,
            C::Shl_rm64_CL,
            C::Rcr_rm32_imm8,
            C::Imul_r64_rm64,
            C::Mul_rm64,
            C::Div_rm64,
            C::Idiv_rm32,
            C::Movzx_r32_rm8,
            C::Movsxd_r64_rm32,
            C::Leaveq,
            C::Enterq_imm16_imm8,
            C::Popcnt_r64_rm64,
            C::Movaps_xmm_xmmm128,
            C::Movups_xmmm128_xmm,
            C::VEX_Vmovdqu_ymm_ymmm256,
            C::VEX_Vpaddd_ymm_ymm_ymmm256,
            C::Fld_m64fp,
            C::Fstp_m80fp,
            C::Fadd_st0_sti,
            C::Ldmxcsr_m32,
            C::Fldcw_m2byte,
            C::Cld,
            C::Std,
            C::Cmc,
            C::Stc,
        ];
        let all = codes::all();
        let frequent = frequent.into_iter().filter(|code| all.contains(code)).collect();
        Self { codes: all, frequent }
    }

    /// How many codes are tried.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// Case `index` of a run with `seed`. Every code is met in turn by the first instruction.
    pub fn case(&self, seed: u64, index: u64) -> Case {
        let mut random = Random::of(seed, index);
        loop {
            if let Some(case) = self.attempt(&mut random, index) {
                return case;
            }
        }
    }

    fn attempt(&self, random: &mut Random, index: u64) -> Option<Case> {
        let mut maker = Maker::new(random);
        let count = if maker.random.chance(40) { 1 } else { 1 + maker.random.below(8) as usize };
        let at = maker.random.below(count as u64) as usize;
        let mut start = match maker.random.below(4) {
            0 => CODE + PAGE - maker.random.below(40),
            1 => CODE + maker.random.below(64),
            _ => CODE + maker.random.below(0x1c00),
        };
        if maker.random.chance(30) {
            start &= !15;
        }
        let mut encoder = Encoder::new(64);
        let mut code = vec![];
        let mut starts = vec![];
        let mut relatives = vec![];
        for i in 0..count {
            let mut tries = 0;
            loop {
                tries += 1;
                let wanted = if i == at && tries < 20 {
                    self.codes[(index % self.codes.len() as u64) as usize]
                } else if maker.random.chance(50) {
                    maker.random.pick(&self.frequent)
                } else {
                    maker.random.pick(&self.codes)
                };
                if count > 1 && codes::unsteady(wanted) {
                    continue;
                }
                let fixups = maker.fixups.len();
                let ip = start + code.len() as u64;
                if let Some(instruction) = maker.instruction(wanted, ip)
                    && encoder.encode(&instruction, ip).is_ok()
                {
                    let mut bytes = encoder.take_buffer();
                    let offsets = encoder.get_constant_offsets();
                    maker.prefix(&mut bytes);
                    if !valid(&bytes, ip) {
                        maker.fixups.truncate(fixups);
                        continue;
                    }
                    if is_relative(&instruction) {
                        relatives.push(relative(&offsets, code.len(), bytes.len(), i));
                    }
                    starts.push((code.len(), fixups..maker.fixups.len()));
                    code.extend(bytes);
                    break;
                }
                let _ = encoder.take_buffer();
                maker.fixups.truncate(fixups);
                if tries > 200 {
                    return None;
                }
            }
        }
        if code.len() > CODE_MAX {
            return None;
        }
        maker.connect(start, &mut code, &starts, &relatives);
        let flush = maker.random.chance(30);
        let Maker { state, pokes, .. } = maker;
        let case = Case { code, start, state, pokes, flush };
        let fine = case
            .instructions()
            .iter()
            .all(|i| !i.is_invalid() && codes::allowed(i.code()) && !system_call(i));
        fine.then_some(case)
    }
}

/// Decodes alone to one allowed instruction.
fn valid(bytes: &[u8], ip: u64) -> bool {
    let decoded = Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE).decode();
    // A REX.B prefix makes F3 90 an XCHG for CPUs, not for the decoder.
    let pause = decoded.code() == Code::Pause && bytes.len() > 2;
    !pause && !decoded.is_invalid() && decoded.len() == bytes.len() && codes::allowed(decoded.code())
}

/// INT 80h and its like are the host kernel's.
fn system_call(i: &Instruction) -> bool {
    i.code() == Code::Int_imm8 && i.immediate8() >= 32
}

fn is_relative(i: &Instruction) -> bool {
    (0..i.op_count())
        .any(|op| matches!(i.op_kind(op), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64))
}

fn relative(offsets: &ConstantOffsets, at: usize, len: usize, number: usize) -> Fixup {
    // The relative operand is the instruction's end.
    let size = offsets.immediate_size();
    Fixup::Relative(at + len - size, size, number)
}

impl<'a> Maker<'a> {
    fn new(random: &'a mut Random) -> Self {
        let mut state = State::EMPTY;
        let mut pointers = 0;
        for (i, slot) in state.gpr.iter_mut().enumerate() {
            let percent = match i {
                RSP => 92,
                6 | 7 => 75,
                5 => 60,
                3 => 40,
                RCX => 0,
                _ => 20,
            };
            *slot = if random.chance(percent) {
                pointers |= 1 << i;
                let at = target(random);
                if i == RSP && random.chance(70) { at & !7 } else { at }
            } else if i == RCX && random.chance(80) || random.chance(15) {
                random.below(20)
            } else {
                random.value()
            };
        }
        state.rflags = 2 | random.next() & 0x8d5;
        if random.chance(8) {
            state.rflags |= 0x400;
        }
        if random.chance(3) {
            state.rflags |= 0x4_0000;
        }
        if random.chance(3) {
            state.rflags |= random.next() & 0x20_4000;
        }
        state.rflags |= 0x200;
        state.fs = base(random);
        state.gs = base(random);
        x87(random, &mut state);
        let mxcsr = match random.below(20) {
            0 => random.next() as u32 & 0xffff,
            1..=8 => 0x1f80 | random.next() as u32 & 0xe07f,
            _ => 0x1f80,
        };
        state.set_mxcsr(mxcsr);
        for ymm in &mut state.ymm {
            for lane in ymm {
                *lane = random.lane();
            }
        }
        Self { random, state, pokes: vec![], fixups: vec![], pointers, info: InstructionInfoFactory::new() }
    }

    fn instruction(&mut self, code: Code, ip: u64) -> Option<Instruction> {
        let info = code.op_code();
        let mut made = Instruction::new();
        made.set_code(code);
        let mut memory = false;
        for i in 0..info.op_count() {
            let kind = info.op_kind(i);
            let maybe = matches!(
                kind,
                K::r8_or_mem
                    | K::r16_or_mem
                    | K::r32_or_mem
                    | K::r64_or_mem
                    | K::mm_or_mem
                    | K::xmm_or_mem
                    | K::ymm_or_mem
            );
            let always = matches!(
                kind,
                K::mem | K::mem_mib | K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y
            );
            if always || maybe && self.random.chance(55) {
                self.memory(&mut made, i, kind, ip)?;
                memory = true;
            } else if let Some(register) = self.register(kind) {
                made.set_op_kind(i, OpKind::Register);
                made.set_op_register(i, register);
            } else {
                self.other(&mut made, i, kind, ip)?;
            }
        }
        if info.can_use_lock_prefix() && memory && made.op0_kind() == OpKind::Memory && self.random.chance(25)
        {
            made.set_has_lock_prefix(true);
        }
        if made.is_string_instruction() && self.random.chance(60) {
            if self.random.chance(70) {
                made.set_has_rep_prefix(true);
            } else {
                made.set_has_repne_prefix(true);
            }
        }
        self.spare_pointers(&made)?;
        self.aim(code, &made);
        Some(made)
    }

    /// Refuses most instructions that would destroy an address that others use.
    fn spare_pointers(&mut self, made: &Instruction) -> Option<()> {
        for used in self.info.info(made).used_registers() {
            let writes = matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            );
            let register = used.register();
            if writes && register.is_gpr() {
                let number = register.full_register().number();
                let stack = number == RSP && made.is_stack_instruction();
                let strings = made.is_string_instruction();
                if !stack && !strings && self.pointers >> number & 1 != 0 && self.random.chance(80) {
                    return None;
                }
            }
        }
        Some(())
    }

    /// Indirect jumps want something to jump to.
    fn aim(&mut self, code: Code, made: &Instruction) {
        match code {
            Code::Jmp_rm64 | Code::Call_rm64 if made.op0_kind() == OpKind::Register => {
                self.fixups.push(Fixup::Register(made.op0_register().number()));
            }
            Code::Retnq | Code::Retnq_imm16 if self.random.chance(70) => {
                self.fixups.push(Fixup::Memory(self.state.gpr[RSP]));
            }
            Code::Jmp_rm64 | Code::Call_rm64 => {
                let register = |register: Register| match register {
                    Register::RIP | Register::None => 0,
                    other => self.state.gpr[other.full_register().number()],
                };
                let index = register(made.memory_index()).wrapping_mul(made.memory_index_scale().into());
                let at = register(made.memory_base())
                    .wrapping_add(index)
                    .wrapping_add(made.memory_displacement64());
                if made.segment_prefix() == Register::None {
                    self.fixups.push(Fixup::Memory(at));
                }
            }
            _ => {}
        }
    }

    fn register(&mut self, kind: K) -> Option<Register> {
        use Register as R;
        let n = self.random.below(16) as u32;
        Some(match kind {
            K::r8_reg | K::r8_or_mem | K::r8_opcode => R::AL + self.random.below(20) as u32,
            K::r16_reg | K::r16_or_mem | K::r16_rm | K::r16_opcode | K::r16_reg_mem => R::AX + n,
            K::r32_reg | K::r32_or_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv | K::r32_reg_mem => {
                R::EAX + n
            }
            K::r64_reg | K::r64_or_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv | K::r64_reg_mem => {
                R::RAX + n
            }
            K::mm_reg | K::mm_rm | K::mm_or_mem => R::MM0 + (n & 7),
            K::xmm_reg | K::xmm_rm | K::xmm_or_mem | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => R::XMM0 + n,
            K::ymm_reg | K::ymm_rm | K::ymm_or_mem | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => R::YMM0 + n,
            K::cr_reg => R::CR0 + n,
            K::dr_reg => R::DR0 + (n & 7),
            K::al => R::AL,
            K::cl => R::CL,
            K::ax => R::AX,
            K::dx => R::DX,
            K::eax => R::EAX,
            K::rax => R::RAX,
            K::st0 => R::ST0,
            K::sti_opcode => R::ST0 + (n & 7),
            _ => return None,
        })
    }

    /// Immediates, branches, and memory operands without a ModRM byte.
    fn other(&mut self, made: &mut Instruction, i: u32, kind: K, ip: u64) -> Option<()> {
        let value = self.random.value();
        let narrow = self.random.chance(10);
        let kind = match kind {
            K::imm8 | K::imm4_m2z => {
                made.set_immediate8(value as u8);
                OpKind::Immediate8
            }
            K::imm8_const_1 => {
                made.set_immediate8(1);
                OpKind::Immediate8
            }
            K::imm8sex16 => {
                made.set_immediate8to16((value as i8).into());
                OpKind::Immediate8to16
            }
            K::imm8sex32 => {
                made.set_immediate8to32((value as i8).into());
                OpKind::Immediate8to32
            }
            K::imm8sex64 => {
                made.set_immediate8to64((value as i8).into());
                OpKind::Immediate8to64
            }
            K::imm16 => {
                made.set_immediate16(value as u16);
                OpKind::Immediate16
            }
            K::imm32 => {
                made.set_immediate32(value as u32);
                OpKind::Immediate32
            }
            K::imm32sex64 => {
                made.set_immediate32to64((value as i32).into());
                OpKind::Immediate32to64
            }
            K::imm64 => {
                made.set_immediate64(value);
                OpKind::Immediate64
            }
            K::br64_1 | K::br64_4 => {
                made.set_near_branch64(ip);
                OpKind::NearBranch64
            }
            K::mem_offs => {
                let segment = self.segment();
                let at = target(self.random).wrapping_sub(self.base_of(segment));
                made.set_memory_base(Register::None);
                made.set_memory_displacement64(if narrow { at & 0xffff_ffff } else { at });
                made.set_memory_displ_size(if narrow { 4 } else { 8 });
                made.set_segment_prefix(segment);
                OpKind::Memory
            }
            K::seg_rSI => {
                made.set_segment_prefix(self.segment());
                if narrow { OpKind::MemorySegESI } else { OpKind::MemorySegRSI }
            }
            K::es_rDI => {
                if narrow {
                    OpKind::MemoryESEDI
                } else {
                    OpKind::MemoryESRDI
                }
            }
            K::seg_rDI => {
                made.set_segment_prefix(self.segment());
                if narrow { OpKind::MemorySegEDI } else { OpKind::MemorySegRDI }
            }
            K::seg_rBX_al => {
                made.set_segment_prefix(self.segment());
                made.set_memory_base(if narrow { Register::EBX } else { Register::RBX });
                made.set_memory_index(Register::AL);
                OpKind::Memory
            }
            _ => return None,
        };
        made.set_op_kind(i, kind);
        if made.op_count() == 2 && matches!(kind, OpKind::MemorySegRSI | OpKind::MemoryESRDI) && i == 1 {
            // Both operands of MOVS and CMPS have the same address size.
            match made.op0_kind() {
                OpKind::MemoryESEDI | OpKind::MemorySegESI => return None,
                _ => {}
            }
        }
        Some(())
    }

    fn segment(&mut self) -> Register {
        match self.random.below(20) {
            0 | 1 => Register::FS,
            2 | 3 => Register::GS,
            4 => self.random.pick(&[Register::CS, Register::DS, Register::ES, Register::SS]),
            _ => Register::None,
        }
    }

    fn base_of(&self, segment: Register) -> u64 {
        match segment {
            Register::FS => self.state.fs,
            Register::GS => self.state.gs,
            _ => 0,
        }
    }

    /// A ModRM memory operand at an interesting address, if the registers are as they were at the start.
    fn memory(&mut self, made: &mut Instruction, i: u32, kind: K, ip: u64) -> Option<()> {
        let at = target(self.random);
        let segment = self.segment();
        let at = at.wrapping_sub(self.base_of(segment));
        let vector = match kind {
            K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM0),
            _ => None,
        };
        if vector.is_none() && self.random.chance(6) {
            let base = if self.random.chance(80) { Register::RIP } else { Register::EIP };
            let reach = at.wrapping_sub(ip) as i64;
            if i32::try_from(reach).is_err() || segment != Register::None && self.random.chance(50) {
                return None;
            }
            put(made, i, &MemoryOperand::new(base, Register::None, 1, at as i64, 8, false, segment));
            return Some(());
        }
        let narrow = self.random.chance(7);
        let file = if narrow { Register::EAX } else { Register::RAX };
        let mut sum = 0u64;
        let mut base = Register::None;
        if self.random.chance(94) {
            let number = self.base();
            base = file + number as u32;
            sum = self.state.gpr[number];
        }
        let mut index = Register::None;
        let scale = 1u32 << self.random.below(4);
        if let Some(first) = vector {
            let number = self.random.below(16) as u32;
            index = first + number;
            self.small_lanes(number as usize, matches!(kind, K::mem_vsib32x | K::mem_vsib32y));
        } else if self.random.chance(35) || base == Register::None && self.random.chance(50) {
            let number = self.random.below(16) as usize;
            if number != RSP {
                index = file + number as u32;
                sum = sum.wrapping_add(self.state.gpr[number].wrapping_mul(scale.into()));
            }
        }
        let mut displacement = at.wrapping_sub(sum) as i64;
        if narrow {
            displacement = (displacement as i32).into();
        }
        let displacement = match i32::try_from(displacement) {
            Ok(_) if self.random.chance(85) || base == Register::None => displacement,
            Ok(_) => 0,
            Err(_) if self.random.chance(10) => (self.random.value() as i32).into(),
            Err(_) => return None,
        };
        let size = match displacement {
            0 if base != Register::None && self.random.chance(80) => 0,
            -128..=127 if base != Register::None && self.random.chance(80) => 1,
            _ if narrow => 4,
            _ => 8,
        };
        let scale = if index == Register::None { 1 } else { scale };
        put(made, i, &MemoryOperand::new(base, index, scale, displacement, size, false, segment));
        Some(())
    }

    /// A register for the base: mostly one with an address.
    fn base(&mut self) -> usize {
        for _ in 0..4 {
            let number = self.random.below(16) as usize;
            if self.pointers >> number & 1 != 0 {
                return number;
            }
        }
        self.random.below(16) as usize
    }

    /// Indices of a gather, near enough to be in the data mostly.
    fn small_lanes(&mut self, number: usize, double: bool) {
        for lane in &mut self.state.ymm[number] {
            let mut one = || self.random.below(200) as i64 - 40;
            *lane = if double { (one() as u32 as u64) | (one() as u64) << 32 } else { one() as u64 };
        }
    }

    /// Prefixes that mean nothing, mostly.
    fn prefix(&mut self, bytes: &mut Vec<u8>) {
        if bytes.len() < 13 && self.random.chance(4) {
            let prefix = self.random.pick(&[0x66, 0x67, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]);
            // On AMD's CPUs these change the condition of LOOPE and LOOPNE.
            let conditional_loop = bytes.len() >= 2 && matches!(bytes[bytes.len() - 2], 0xe0 | 0xe1);
            if !(conditional_loop && matches!(prefix, 0xf2 | 0xf3)) {
                bytes.insert(0, prefix);
            }
        }
    }

    /// Fills in the addresses of instructions.
    fn connect(
        &mut self,
        start: u64,
        code: &mut [u8],
        starts: &[(usize, std::ops::Range<usize>)],
        relatives: &[Fixup],
    ) {
        let len = code.len();
        let later = |random: &mut Random, number: usize| match number + 1 + random.below(4) as usize {
            n if n < starts.len() => starts[n].0,
            _ => len,
        };
        for fixup in relatives {
            let &Fixup::Relative(at, size, number) = fixup else { continue };
            let mut distance = later(self.random, number) as i64 - (at + size) as i64;
            let far = self.random.value() as i32;
            if size == 4 && far.unsigned_abs() > 0x4000 && self.random.chance(5) {
                distance = far.into();
            }
            code[at..at + size].copy_from_slice(&distance.to_le_bytes()[..size]);
        }
        for (number, (_, range)) in starts.iter().enumerate() {
            for fixup in &self.fixups[range.clone()] {
                let address = start + later(self.random, number) as u64;
                match fixup {
                    Fixup::Register(register) if self.random.chance(80) => {
                        self.state.gpr[*register] = address
                    }
                    Fixup::Memory(at)
                        if (DATA..DATA + 2 * PAGE - 8).contains(at)
                            && self.pokes.len() < super::native::POKES =>
                    {
                        self.pokes.push((*at, address));
                    }
                    _ => {}
                }
            }
        }
    }
}

fn put(made: &mut Instruction, operand: u32, memory: &MemoryOperand) {
    made.set_op_kind(operand, OpKind::Memory);
    made.set_memory_base(memory.base);
    made.set_memory_index(memory.index);
    made.set_memory_index_scale(memory.scale);
    made.set_memory_displacement64(memory.displacement as u64);
    made.set_memory_displ_size(memory.displ_size);
    made.set_segment_prefix(memory.segment_prefix);
}

/// An address of data: aligned, anywhere, or about the end of one of the pages.
fn target(random: &mut Random) -> u64 {
    match random.below(20) {
        0..=7 => DATA + random.below(WRITABLE_LINES) * 64,
        8..=10 => DATA + random.below(0x2000),
        11 | 12 => DATA + random.below(0x400) * 8,
        13 | 14 => DATA + PAGE - random.below(40),
        15 => DATA + 2 * PAGE - random.below(40),
        16 => DATA + 3 * PAGE - random.below(40),
        17 => DATA - random.below(40),
        18 => DATA + 2 * PAGE + random.below(0x1000),
        _ => DATA + 0x800 + random.below(64) * 16,
    }
}

const WRITABLE_LINES: u64 = 0x2000 / 64;

/// A segment base: small, or some canonical address.
fn base(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => 0,
        1..=3 => random.below(0x1000),
        4 => target(random),
        _ => ((random.next() as i64) << 16 >> 16) as u64,
    }
}

fn x87(random: &mut Random, state: &mut State) {
    let image = &mut state.fx;
    let control: u16 = match random.below(20) {
        0 => random.next() as u16 & 0x1f3f | 0x40,
        1..=6 => 0x037f | (random.next() as u16 & 0x0f00),
        _ => 0x037f,
    };
    image[..2].copy_from_slice(&control.to_le_bytes());
    if random.chance(60) {
        let unmasked = !control & 0x3f;
        let exceptions = random.next() as u16 & 0x7f & !(unmasked & random.next() as u16);
        let pending = if exceptions & unmasked & 0x3f != 0 { 0x8080 } else { 0 };
        let status = random.next() as u16 & 0x7f00 & if random.chance(50) { 0 } else { 0xffff };
        let status = status & 0x7f00 | exceptions | pending;
        image[2..4].copy_from_slice(&status.to_le_bytes());
        image[4] = if random.chance(50) { 0xff } else { random.next() as u8 };
    }
    for i in 0..8 {
        image[32 + 16 * i..42 + 16 * i].copy_from_slice(&random.extended());
    }
}
