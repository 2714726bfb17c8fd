//! Every copied instruction form, with random operands, against the bare host CPU.
//!
//! The guest's page tables map a window of guest RAM at the very address that it has in this process, so that the
//! same bytes run natively and translated on the same data.
#![allow(unsafe_code)]

use super::template::Kind;
use super::*;
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Mnemonic, OpCodeOperandKind as K, Register};
use memory::{Backing, GuestMemory};

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Context {
    gpr: [u64; 16],
    flags: u64,
    code: u64,
    host_rsp: u64,
    pad: [u64; 5],
    fx: [u8; 512],
    ymm: [[u64; 4]; 16],
}

static mut CONTEXT: Context =
    Context { gpr: [0; 16], flags: 0, code: 0, host_rsp: 0, pad: [0; 5], fx: [0; 512], ymm: [[0; 4]; 16] };

const FX: usize = std::mem::offset_of!(Context, fx);
const YMM: usize = std::mem::offset_of!(Context, ymm);

/// Runs `CONTEXT.code` with the registers of `CONTEXT`, until it jumps to [`back`].
#[unsafe(naked)]
extern "sysv64" fn go() {
    std::arch::naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "lea rax, [rip + {c}]",
        "mov [rax + 144], rsp",
        "fxrstor64 [rax + {fx}]",
        ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        "vmovdqu ymm\\i, [rax + {ymm} + 32*\\i]",
        ".endr",
        "push qword ptr [rax + 128]", "popfq",
        "mov rcx, [rax + 8]", "mov rdx, [rax + 16]", "mov rbx, [rax + 24]", "mov rsp, [rax + 32]",
        "mov rbp, [rax + 40]", "mov rsi, [rax + 48]", "mov rdi, [rax + 56]",
        "mov r8, [rax + 64]", "mov r9, [rax + 72]", "mov r10, [rax + 80]", "mov r11, [rax + 88]",
        "mov r12, [rax + 96]", "mov r13, [rax + 104]", "mov r14, [rax + 112]", "mov r15, [rax + 120]",
        "mov rax, [rax]",
        "jmp [rip + {c} + 136]",
        c = sym CONTEXT, fx = const FX, ymm = const YMM,
    )
}

#[unsafe(naked)]
extern "sysv64" fn back() {
    std::arch::naked_asm!(
        "mov [rip + {c}], rax",
        "lea rax, [rip + {c}]",
        "mov [rax + 8], rcx", "mov [rax + 16], rdx", "mov [rax + 24], rbx", "mov [rax + 32], rsp",
        "mov [rax + 40], rbp", "mov [rax + 48], rsi", "mov [rax + 56], rdi",
        "mov [rax + 64], r8", "mov [rax + 72], r9", "mov [rax + 80], r10", "mov [rax + 88], r11",
        "mov [rax + 96], r12", "mov [rax + 104], r13", "mov [rax + 112], r14", "mov [rax + 120], r15",
        "mov rsp, [rax + 144]",
        "pushfq", "pop qword ptr [rax + 128]",
        "fxsave64 [rax + {fx}]",
        ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        "vmovdqu [rax + {ymm} + 32*\\i], ymm\\i",
        ".endr",
        "vzeroupper",
        "fninit",
        "mov dword ptr [rsp - 8], 0x1f80", "ldmxcsr [rsp - 8]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        c = sym CONTEXT, fx = const FX, ymm = const YMM,
    )
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 8) % limit
    }

    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => !self.below(4),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }
}

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x30_0000;
const DATA_LEN: usize = 0x3000;
const FLAGS: u64 = 0x8d5;

fn register(kind: K, random: &mut Random) -> Option<Register> {
    use Register as R;
    let n = random.below(16) as u32;
    let of = |first: Register, n: u32| first + n;
    Some(match kind {
        K::r8_reg | K::r8_or_mem | K::r8_opcode => of(R::AL, random.below(20) as u32),
        K::r16_reg | K::r16_or_mem | K::r16_rm | K::r16_opcode => of(R::AX, n),
        K::r32_reg | K::r32_or_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => of(R::EAX, n),
        K::r64_reg | K::r64_or_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => of(R::RAX, n),
        K::mm_reg | K::mm_rm | K::mm_or_mem => of(R::MM0, n & 7),
        K::xmm_reg | K::xmm_rm | K::xmm_or_mem | K::xmm_vvvv | K::xmm_is4 => of(R::XMM0, n),
        K::ymm_reg | K::ymm_rm | K::ymm_or_mem | K::ymm_vvvv | K::ymm_is4 => of(R::YMM0, n),
        K::al => R::AL,
        K::cl => R::CL,
        K::ax => R::AX,
        K::dx => R::DX,
        K::eax => R::EAX,
        K::rax => R::RAX,
        K::st0 => R::ST0,
        K::sti_opcode => of(R::ST0, n & 7),
        _ => return None,
    })
}

/// One random instruction of a code, with the register values its memory operand needs.
fn instruction(code: Code, window: u64, random: &mut Random) -> Option<(Instruction, Vec<(Register, u64)>)> {
    let info = code.op_code();
    let mut made = Instruction::new();
    made.set_code(code);
    let mut setup = Vec::new();
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
        if kind == K::mem || maybe && random.below(2) == 0 {
            let at = match random.below(4) {
                // Often aligned, sometimes over the end of the page.
                0 => 0xff0 + random.below(32),
                1 => random.below(0x1f00),
                _ => random.below(0x1f0) * 16,
            };
            let base = Register::RAX + random.below(16) as u32;
            let mut index = Register::RAX + random.below(16) as u32;
            if index == Register::RSP || index == base || random.below(2) == 0 {
                index = Register::None;
            }
            let scale = 1 << random.below(4);
            let disp = match random.below(3) {
                0 => 0,
                1 => random.below(256) as i64 - 128,
                _ => random.below(4096) as i64 - 2048,
            };
            let steps = random.below(16);
            let mut value = (window + at).wrapping_sub(disp as u64);
            if index != Register::None {
                value = value.wrapping_sub(u64::from(scale) * steps);
                setup.push((index, steps));
            }
            setup.push((base, value));
            let size = if disp == 0 { 0 } else { 8 };
            let operand = MemoryOperand::new(
                base,
                index,
                if index == Register::None { 1 } else { scale },
                disp,
                size,
                false,
                Register::None,
            );
            iced_memory(&mut made, i, &operand);
            continue;
        }
        if let Some(register) = register(kind, random) {
            made.set_op_register(i, register);
            made.set_op_kind(i, iced_x86::OpKind::Register);
            continue;
        }
        let value = random.value() as i64;
        let (kind, value) = match kind {
            K::imm8 => (iced_x86::OpKind::Immediate8, value & 0xff),
            K::imm8_const_1 => (iced_x86::OpKind::Immediate8, 1),
            K::imm8sex16 => (iced_x86::OpKind::Immediate8to16, i64::from(value as i8)),
            K::imm8sex32 => (iced_x86::OpKind::Immediate8to32, i64::from(value as i8)),
            K::imm8sex64 => (iced_x86::OpKind::Immediate8to64, i64::from(value as i8)),
            K::imm16 => (iced_x86::OpKind::Immediate16, value & 0xffff),
            K::imm32 => (iced_x86::OpKind::Immediate32, value & 0xffff_ffff),
            K::imm32sex64 => (iced_x86::OpKind::Immediate32to64, i64::from(value as i32)),
            K::imm64 => (iced_x86::OpKind::Immediate64, value),
            _ => return None,
        };
        made.set_op_kind(i, kind);
        match kind {
            iced_x86::OpKind::Immediate8 => made.set_immediate8(value as u8),
            iced_x86::OpKind::Immediate16 => made.set_immediate16(value as u16),
            iced_x86::OpKind::Immediate32 => made.set_immediate32(value as u32),
            iced_x86::OpKind::Immediate64 => made.set_immediate64(value as u64),
            iced_x86::OpKind::Immediate8to16 => made.set_immediate8to16(value as i16),
            iced_x86::OpKind::Immediate8to32 => made.set_immediate8to32(value as i32),
            iced_x86::OpKind::Immediate8to64 => made.set_immediate8to64(value),
            _ => made.set_immediate32to64(value),
        }
    }
    if matches!(code, Code::Push_r64 | Code::Pop_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Push_rm64)
    {
        if setup.iter().any(|s| s.0 == Register::RSP) {
            return None;
        }
        setup.push((Register::RSP, window + 0x800 + random.below(0x100) * 8));
    }
    if is_bit_string(code) && made.op0_kind() == iced_x86::OpKind::Memory {
        // The register moves the address: by at most 512 bytes here.
        let offset = made.op1_register().full_register();
        if setup.iter().any(|s| s.0 == offset) {
            return None;
        }
        let value = random.below(8192) as i64 - 4096;
        setup.push((offset, value as u64));
        if let Some(base) = setup.iter_mut().find(|s| s.0 == made.memory_base()) {
            base.1 = base.1.wrapping_add(0x400);
        }
    }
    if code == Code::Leaveq {
        setup.push((Register::RBP, window + 0x800 + random.below(0x100) * 8));
    }
    Some((made, setup))
}

fn is_bit_string(code: Code) -> bool {
    matches!(code.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && !code.op_code().op_kind(1).eq(&K::imm8)
}

fn iced_memory(made: &mut Instruction, operand: u32, memory: &MemoryOperand) {
    made.set_op_kind(operand, iced_x86::OpKind::Memory);
    made.set_memory_base(memory.base);
    made.set_memory_index(memory.index);
    made.set_memory_index_scale(memory.scale);
    made.set_memory_displacement64(memory.displacement as u64);
    made.set_memory_displ_size(memory.displ_size);
    made.set_segment_prefix(Register::None);
}

struct Arena {
    core: Core,
    translator: Translator,
    window: u64,
    native: *mut u8,
}

impl Arena {
    fn new() -> Self {
        let memory = GuestMemory::new(&[(0, 8 << 20)], Backing::Private).unwrap();
        let host = memory.host_page(0).unwrap().host as u64;
        let mut core = Core::flat64(memory.clone()).unwrap();
        core.cpuid = super::test::host_cpuid();
        // The window: linear = host address.
        let mut tables = 0x3000u64;
        for part in 0..4u64 {
            let linear = host + (part << 21);
            let mut table = 0x1000;
            for shift in [39, 30] {
                let at = table + (linear >> shift & 511) * 8;
                let entry = memory.load_u64(at).unwrap();
                if entry & 1 == 0 {
                    memory.write(at, &(tables | 7).to_le_bytes()).unwrap();
                    table = tables;
                    tables += 0x1000;
                } else {
                    table = entry & !0xfff;
                }
            }
            memory.write(table + (linear >> 21 & 511) * 8, &(part << 21 | 0x87).to_le_bytes()).unwrap();
        }
        // SAFETY: a fresh anonymous mapping.
        let native = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(native, libc::MAP_FAILED);
        Self {
            core,
            translator: Translator::new(&Config::default()).unwrap(),
            window: host + DATA,
            native: native.cast(),
        }
    }

    /// Runs `code` (instruction lengths in `ends`) both ways and compares.
    fn compare(
        &mut self,
        code: &[u8],
        ends: &[usize],
        start: &Context,
        data: &[u8],
        what: &dyn std::fmt::Debug,
    ) {
        let memory = self.core.mmu.memory.clone();
        memory.write(DATA, data).unwrap();
        memory.write(CODE, code).unwrap();
        memory.write(CODE + code.len() as u64, &[0xf4]).unwrap();
        self.translator.written(&mut self.core, CODE, code.len() as u64 + 1);
        let state = &mut self.core.state;
        state.gpr = start.gpr;
        state.rflags = start.flags;
        state.rip = CODE;
        state.ymm.0 = start.ymm;
        state.mxcsr = 0x1f80;
        // SAFETY: the image was made by FXSAVE; the x87 state is the guest's while it runs.
        let outcome = unsafe {
            std::arch::asm!("fxrstor64 [{}]", in(reg) &raw const start.fx, options(nostack));
            let outcome = self.translator.run(&mut self.core);
            let image = &raw mut self.core.state.x87;
            std::arch::asm!("fxsave64 [{}]", "fninit", in(reg) image, options(nostack));
            outcome
        };
        assert_eq!(outcome, Outcome::Step);
        let state = &self.core.state;
        let done = (state.rip - CODE) as usize;
        assert!(done == 0 || ends.contains(&done), "{what:?}: stopped inside an instruction");
        let mut after = vec![0; DATA_LEN];
        memory.read(DATA, &mut after).unwrap();
        memory.write(DATA, data).unwrap();
        // SAFETY: the mapping has room for the code and the jump; the code before `done` ran without a fault.
        let native = unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.native, done);
            let tail = self.native.add(done);
            std::ptr::copy_nonoverlapping([0xffu8, 0x25, 0, 0, 0, 0].as_ptr(), tail, 6);
            tail.add(6).cast::<u64>().write_unaligned(back as *const () as u64);
            let context = &raw mut CONTEXT;
            *context = *start;
            (*context).code = self.native as u64;
            go();
            *context
        };
        let mut expected = vec![0; DATA_LEN];
        memory.read(DATA, &mut expected).unwrap();
        assert_eq!(state.gpr, native.gpr, "{what:?}: general registers after {done} of {} bytes", code.len());
        assert_eq!(state.ymm.0, native.ymm, "{what:?}: vector registers");
        let mxcsr = u32::from_le_bytes(native.fx[24..28].try_into().unwrap());
        assert_eq!(state.mxcsr, mxcsr, "{what:?}: MXCSR");
        assert_eq!(state.x87.0[..6], native.fx[..6], "{what:?}: x87 control, status, tags");
        assert_eq!(state.x87.0[32..160], native.fx[32..160], "{what:?}: x87 registers");
        if let Some(at) = (0..DATA_LEN).find(|&i| after[i] != expected[i]) {
            panic!("{what:?}: memory differs at {at:#x}");
        }
        if done == code.len() {
            let (got, wanted) = (state.rflags & FLAGS, native.flags & FLAGS);
            assert_eq!(got, wanted, "{what:?}: flags {got:#x}, not {wanted:#x}");
        }
    }
}

/// The codes to be tried.
fn codes() -> Vec<Code> {
    let mut templates = Templates::new(true);
    templates.set_cpuid(&super::test::host_cpuid());
    Code::values()
        .filter(|&code| {
            let template = templates.get(code);
            let skipped = matches!(code.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed);
            code.op_code().mode64()
                && !skipped
                && matches!(
                    template.kind,
                    Kind::Copy
                        | Kind::Lea
                        | Kind::BitString
                        | Kind::PushRegister
                        | Kind::PushImmediate
                        | Kind::PushMemory
                        | Kind::PopRegister
                        | Kind::Leave
                )
        })
        .collect()
}

/// Sequences of each code between others.
fn fuzz(seed: u64, rounds: usize) {
    if !is_x86_feature_detected!("avx2") {
        return;
    }
    let mut random = Random(seed);
    let mut arena = Arena::new();
    let codes = codes();
    assert!(codes.len() > 1000, "{} codes", codes.len());
    let mut start = Context {
        gpr: [0; 16],
        flags: 0,
        code: 0,
        host_rsp: 0,
        pad: [0; 5],
        fx: [0; 512],
        ymm: [[0; 4]; 16],
    };
    // SAFETY: the buffer is an aligned FXSAVE image.
    unsafe { std::arch::asm!("fninit", "fxsave64 [{}]", in(reg) &raw mut start.fx, options(nostack)) };
    start.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    let mut data = vec![0; DATA_LEN];
    for _ in 0..rounds {
        for &code in &codes {
            let mut sequence = Vec::new();
            for place in 0..3 {
                let code = if place == 1 { code } else { codes[random.below(codes.len() as u64) as usize] };
                let Some((made, setup)) = instruction(code, arena.window, &mut random) else { continue };
                for (register, value) in setup {
                    sequence.push(Instruction::with2(Code::Mov_r64_imm64, register, value).unwrap());
                }
                sequence.push(made);
            }
            let mut encoder = Encoder::new(64);
            let mut ends = Vec::new();
            let mut bytes = Vec::new();
            for instruction in &sequence {
                if encoder.encode(instruction, 0).is_ok() {
                    bytes.extend(encoder.take_buffer());
                    ends.push(bytes.len());
                } else {
                    let _ = encoder.take_buffer();
                }
            }
            start.gpr = std::array::from_fn(|_| random.value());
            start.flags = 2 | random.next() & FLAGS;
            start.ymm = std::array::from_fn(|_| std::array::from_fn(|_| random.value()));
            start.fx[32..160].fill_with(|| random.next() as u8);
            for chunk in data.chunks_mut(8) {
                chunk.copy_from_slice(&random.value().to_le_bytes());
            }
            arena.compare(
                &bytes,
                &ends,
                &start,
                &data,
                &format_args!("{:?}", sequence.iter().map(Instruction::code).collect::<Vec<_>>()),
            );
        }
    }
}

#[test]
fn every_copied_form_does_what_the_host_does() {
    // More with ENGINE_FUZZ_ROUNDS, and others with ENGINE_FUZZ_SEED.
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seed: u64 = number("ENGINE_FUZZ_SEED").unwrap_or(1);
    fuzz(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, number("ENGINE_FUZZ_ROUNDS").unwrap_or(2) as usize);
}
