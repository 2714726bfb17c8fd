//! What the translator knows of each instruction form: whether it may be copied, and which fields of its encoding
//! name general registers.

use super::segment;
use crate::step::feature;
use cpu::cpuid::CpuidTable;
use iced_x86::{
    Code, ConditionCode, CpuidFeature, EncodingKind, FlowControl, Mnemonic, OpCodeOperandKind as K,
};
use std::sync::Arc;

/// What must be enabled for an instruction to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Domain {
    Integer,
    /// x87 and MMX: CR0.EM and CR0.TS clear, exceptions masked.
    X87,
    /// CR4.OSFXSR besides, SIMD exceptions masked.
    Sse,
    /// CR4.OSXSAVE and XCR0's AVX besides.
    Avx,
}

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// By the single-step tier.
    Step,
    /// Copied with rewritten operands.
    Copy,
    /// Does nothing.
    Nop,
    Lea,
    /// MOV between the accumulator and an absolute address.
    Absolute,
    PushRegister,
    PushImmediate,
    PushMemory,
    PopRegister,
    Leave,
    Return,
    Jump,
    JumpIf,
    /// JRCXZ, JECXZ, LOOP and its variants.
    JumpCount,
    Call,
    JumpIndirect,
    CallIndirect,
    /// BT and its kin with a register offset, which moves the address if the operand is in memory.
    BitString,
    /// DIV and IDIV.
    Divide,
    /// PUSHFQ.
    PushFlags,
    /// POPFQ at CPL 0.
    PopFlags,
    /// CLI at CPL 0, and CLD.
    ClearFlag,
    /// STI at CPL 0.
    SetInterrupt,
    /// RDTSC and RDTSCP.
    ReadClock,
    /// MOVS and STOS with REP.
    Repeat,
    /// SWAPGS at CPL 0.
    SwapBase,
    /// MOV from a segment register to a general one.
    ReadSelector,
    /// RDFSBASE and RDGSBASE.
    ReadBase,
    /// WRFSBASE and WRGSBASE.
    WriteBase,
    /// VERW of a selector in memory at CPL 0.
    VerifyWrite,
}

/// Where a general register is named in the encoding; the number of the operand it belongs to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fields {
    pub reg: Option<u8>,
    pub rm: Option<u8>,
    pub vvvv: Option<u8>,
    pub opcode: Option<u8>,
    /// The `reg` or the `rm` operand is a byte register, whose numbers 4-7 mean AH to BH without REX.
    pub reg8: bool,
    pub rm8: bool,
    /// There is a ModRM byte.
    pub modrm: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Template {
    pub kind: Kind,
    pub domain: Domain,
    pub fields: Fields,
    /// The memory operand must be aligned to its size.
    pub aligned: bool,
}

/// Templates of all codes, made when first asked for.
pub(super) struct Templates {
    known: Vec<Option<Template>>,
    avx: bool,
    /// What the guest's CPU has.
    cpuid: Arc<CpuidTable>,
}

impl Templates {
    pub(super) fn new(avx: bool) -> Self {
        Self { known: Vec::new(), avx, cpuid: Arc::default() }
    }

    /// From here on the guest's CPU is this one. Answers whether that is news.
    pub(super) fn set_cpuid(&mut self, cpuid: &Arc<CpuidTable>) -> bool {
        if Arc::ptr_eq(&self.cpuid, cpuid) {
            return false;
        }
        self.cpuid = cpuid.clone();
        self.known.clear();
        true
    }

    pub(super) fn get(&mut self, code: Code) -> Template {
        let at = code as usize;
        if at >= self.known.len() {
            self.known.resize(at + 1, None);
        }
        if let Some(Some(template)) = self.known.get(at) {
            return *template;
        }
        let template = self.make(code);
        if let Some(place) = self.known.get_mut(at) {
            *place = Some(template);
        }
        template
    }

    fn make(&self, code: Code) -> Template {
        let step =
            Template { kind: Kind::Step, domain: Domain::Integer, fields: Fields::default(), aligned: false };
        if repeats(code) {
            return Template { kind: Kind::Repeat, ..step };
        }
        let present = |f: &CpuidFeature| feature::supported(*f, &self.cpuid);
        if let Some(kind) = segment::kind(code)
            && code.cpuid_features().iter().all(present)
        {
            return Template { kind, ..step };
        }
        let Some(fields) = fields(code) else { return step };
        let Some(domain) = domain(code, self.avx) else { return step };
        let kind = kind(code, domain);
        if (kind != Kind::Nop || code == Code::Serialize) && !code.cpuid_features().iter().all(present) {
            return step;
        }
        Template { kind, domain, fields, aligned: domain_aligned(code, domain) }
    }
}

/// String instructions that are translated if they are repeated.
fn repeats(code: Code) -> bool {
    matches!(
        code,
        Code::Stosb_m8_AL
            | Code::Stosw_m16_AX
            | Code::Stosd_m32_EAX
            | Code::Stosq_m64_RAX
            | Code::Movsb_m8_m8
            | Code::Movsw_m16_m16
            | Code::Movsd_m32_m32
            | Code::Movsq_m64_m64
    )
}

/// The fields, or `None` if some operand is of a kind that is not copied.
fn fields(code: Code) -> Option<Fields> {
    let info = code.op_code();
    let mut found = Fields::default();
    for i in 0..info.op_count() {
        let n = Some(i as u8);
        match info.op_kind(i) {
            K::r8_reg => (found.reg, found.reg8, found.modrm) = (n, true, true),
            K::r16_reg | K::r32_reg | K::r64_reg => (found.reg, found.modrm) = (n, true),
            K::r8_or_mem => (found.rm, found.rm8, found.modrm) = (n, true, true),
            K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::r16_rm | K::r32_rm | K::r64_rm => {
                (found.rm, found.modrm) = (n, true);
            }
            K::r32_vvvv | K::r64_vvvv => found.vvvv = n,
            K::r8_opcode => (found.opcode, found.rm8) = (n, true),
            K::r16_opcode | K::r32_opcode | K::r64_opcode => found.opcode = n,
            K::mem | K::mm_or_mem | K::xmm_or_mem | K::ymm_or_mem => found.modrm = true,
            K::mm_reg | K::mm_rm | K::xmm_reg | K::xmm_rm | K::ymm_reg | K::ymm_rm => found.modrm = true,
            K::mem_offs | K::xmm_vvvv | K::ymm_vvvv | K::xmm_is4 | K::ymm_is4 => {}
            K::al | K::cl | K::ax | K::eax | K::rax | K::st0 | K::sti_opcode => {}
            K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64
            | K::imm64 => {}
            K::br64_1 | K::br64_4 => {}
            _ => return None,
        }
    }
    Some(found)
}

/// The domain, or `None` if the instruction is of an extension that is not copied.
fn domain(code: Code, avx: bool) -> Option<Domain> {
    use CpuidFeature as F;
    match code.op_code().encoding() {
        EncodingKind::Legacy | EncodingKind::VEX => {}
        _ => return None,
    }
    let mut domain = Domain::Integer;
    for feature in code.cpuid_features() {
        let found = match feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 => Domain::Integer,
            F::CMOV | F::CX8 | F::CMPXCHG16B | F::MULTIBYTENOP | F::PAUSE | F::PREFETCHW => Domain::Integer,
            F::CET_IBT | F::TSC | F::RDTSCP | F::SERIALIZE => Domain::Integer,
            F::POPCNT if is_x86_feature_detected!("popcnt") => Domain::Integer,
            F::LZCNT if is_x86_feature_detected!("lzcnt") => Domain::Integer,
            F::BMI1 if is_x86_feature_detected!("bmi1") => Domain::Integer,
            F::BMI2 if is_x86_feature_detected!("bmi2") => Domain::Integer,
            F::ADX if is_x86_feature_detected!("adx") => Domain::Integer,
            F::MOVBE if is_x86_feature_detected!("movbe") => Domain::Integer,
            F::RDRAND if is_x86_feature_detected!("rdrand") => Domain::Integer,
            F::RDSEED if is_x86_feature_detected!("rdseed") => Domain::Integer,
            F::FPU | F::FPU287 | F::FPU387 | F::MMX => Domain::X87,
            F::SSE | F::SSE2 => Domain::Sse,
            F::SSE3 if is_x86_feature_detected!("sse3") => Domain::Sse,
            F::SSSE3 if is_x86_feature_detected!("ssse3") => Domain::Sse,
            F::SSE4_1 if is_x86_feature_detected!("sse4.1") => Domain::Sse,
            F::SSE4_2 if is_x86_feature_detected!("sse4.2") => Domain::Sse,
            F::AES if is_x86_feature_detected!("aes") => Domain::Sse,
            F::PCLMULQDQ if is_x86_feature_detected!("pclmulqdq") => Domain::Sse,
            F::SHA if is_x86_feature_detected!("sha") => Domain::Sse,
            F::GFNI if is_x86_feature_detected!("gfni") => Domain::Sse,
            F::AVX if avx => Domain::Avx,
            F::AVX2 if avx && is_x86_feature_detected!("avx2") => Domain::Avx,
            F::FMA if avx && is_x86_feature_detected!("fma") => Domain::Avx,
            F::F16C if avx && is_x86_feature_detected!("f16c") => Domain::Avx,
            F::VAES if avx && is_x86_feature_detected!("vaes") => Domain::Avx,
            F::VPCLMULQDQ if avx && is_x86_feature_detected!("vpclmulqdq") => Domain::Avx,
            _ => return None,
        };
        domain = match (domain, found) {
            (Domain::Integer, other) | (other, Domain::Integer) => other,
            (Domain::Avx, _) | (_, Domain::Avx) => Domain::Avx,
            // SSE forms with MMX registers switch the x87 unit: they need both, and SSE's check includes x87's.
            _ => Domain::Sse,
        };
    }
    // CRC32 is in SSE4.2 and MOVNTI, the fences are in SSE and SSE2, but they touch no vector register.
    match code.mnemonic() {
        Mnemonic::Crc32 | Mnemonic::Movnti | Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => {
            Some(Domain::Integer)
        }
        Mnemonic::Prefetchnta | Mnemonic::Prefetcht0 | Mnemonic::Prefetcht1 | Mnemonic::Prefetcht2 => {
            Some(Domain::Integer)
        }
        _ => Some(domain),
    }
}

fn kind(code: Code, domain: Domain) -> Kind {
    use Mnemonic as M;
    let info = code.op_code();
    match code.flow_control() {
        FlowControl::Next => {}
        flow => return control(code, flow),
    }
    match code {
        Code::Pushfq => return Kind::PushFlags,
        Code::Popfq => return Kind::PopFlags,
        Code::Cli | Code::Cld => return Kind::ClearFlag,
        Code::Sti => return Kind::SetInterrupt,
        Code::Rdtsc | Code::Rdtscp => return Kind::ReadClock,
        // Writes to code are seen at once by all that follows.
        Code::Serialize => return Kind::Nop,
        Code::Swapgs => return Kind::SwapBase,
        Code::Verw_rm16 | Code::Verw_r32m16 | Code::Verw_r64m16 => return Kind::VerifyWrite,
        _ => {}
    }
    if info.is_privileged() || info.is_input_output() || info.must_be_cpl0() {
        return Kind::Step;
    }
    match code {
        Code::Push_r64 | Code::Push_rm64 if code == Code::Push_r64 => return Kind::PushRegister,
        Code::Push_rm64 => return Kind::PushMemory,
        Code::Pushq_imm8 | Code::Pushq_imm32 => return Kind::PushImmediate,
        Code::Pop_r64 => return Kind::PopRegister,
        Code::Leaveq => return Kind::Leave,
        _ => {}
    }
    match code.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 | M::Pause => return Kind::Nop,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw | M::Prefetch => {
            return Kind::Nop;
        }
        M::Lea => return Kind::Lea,
        M::Div | M::Idiv => return Kind::Divide,
        M::Bt | M::Bts | M::Btr | M::Btc
            if (0..info.op_count())
                .any(|i| matches!(info.op_kind(i), K::r16_reg | K::r32_reg | K::r64_reg)) =>
        {
            return Kind::BitString;
        }
        _ => {}
    }
    if (0..info.op_count()).any(|i| info.op_kind(i) == K::mem_offs) {
        return Kind::Absolute;
    }
    if info.is_stack_instruction() || info.is_save_restore() {
        return Kind::Step;
    }
    let copied = match domain {
        Domain::Integer => integer(code),
        _ => !vector_step(code.mnemonic()),
    };
    if copied { Kind::Copy } else { Kind::Step }
}

fn control(code: Code, flow: FlowControl) -> Kind {
    match flow {
        FlowControl::UnconditionalBranch if matches!(code, Code::Jmp_rel8_64 | Code::Jmp_rel32_64) => {
            Kind::Jump
        }
        FlowControl::ConditionalBranch => match code.mnemonic() {
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne | Mnemonic::Jrcxz | Mnemonic::Jecxz => {
                Kind::JumpCount
            }
            _ if code.condition_code() != ConditionCode::None => Kind::JumpIf,
            _ => Kind::Step,
        },
        FlowControl::Call if code == Code::Call_rel32_64 => Kind::Call,
        FlowControl::IndirectBranch if code == Code::Jmp_rm64 => Kind::JumpIndirect,
        FlowControl::IndirectCall if code == Code::Call_rm64 => Kind::CallIndirect,
        FlowControl::Return if matches!(code, Code::Retnq | Code::Retnq_imm16) => Kind::Return,
        _ => Kind::Step,
    }
}

/// Integer instructions that are copied.
fn integer(code: Code) -> bool {
    use Mnemonic as M;
    if code.condition_code() != ConditionCode::None {
        return true; // SETcc, CMOVcc
    }
    matches!(
        code.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Mul
            | M::Imul
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Shld
            | M::Shrd
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Bswap
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Lahf
            | M::Sahf
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Popcnt
            | M::Lzcnt
            | M::Tzcnt
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Adcx
            | M::Adox
            | M::Crc32
            | M::Movbe
            | M::Movnti
            | M::Rdrand
            | M::Rdseed
            | M::Lfence
            | M::Mfence
            | M::Sfence
    )
}

/// Vector and x87 instructions that are not copied: implicit or partial memory operands, control words whose bits
/// matter to the engine, pointers to code in memory.
fn vector_step(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Ldmxcsr
            | M::Vldmxcsr
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Fldcw
            | M::Fldenv
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fninit
            | M::Finit
            | M::Fnclex
            | M::Fclex
            | M::Fstcw
            | M::Fstsw
            | M::Fnsetpm
            | M::Fsetpm
            | M::Frstpm
            | M::Feni
            | M::Fdisi
            | M::Fneni
            | M::Fndisi
            | M::Femms
    )
}

/// As [`domain_aligned`], for any instruction.
pub(crate) fn must_align(code: Code) -> bool {
    domain(code, true).is_some_and(|domain| domain_aligned(code, domain))
}

/// Whether a memory operand that is not aligned to its size faults: SSE's 16-byte ones but for the explicitly
/// unaligned, VEX's only where the name says so, CMPXCHG16B.
fn domain_aligned(code: Code, domain: Domain) -> bool {
    use Mnemonic as M;
    match domain {
        Domain::Sse if code.op_code().encoding() == EncodingKind::Legacy => {
            code.op_code().memory_size().size() == 16
                && !matches!(
                    code.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestri64
                        | M::Pcmpestrm64
                        | M::Pcmpestrm
                        | M::Pcmpistri
                        | M::Pcmpistrm
                )
        }
        Domain::Sse | Domain::Avx => matches!(
            code.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntdq | M::Vmovntdqa | M::Vmovntps | M::Vmovntpd
        ),
        Domain::Integer => code.mnemonic() == M::Cmpxchg16b,
        Domain::X87 => false,
    }
}
