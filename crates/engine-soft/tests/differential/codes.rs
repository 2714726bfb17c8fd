//! Which instructions are tried.

use cpu::cpuid::host;
use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature as F, Mnemonic as M, OpCodeOperandKind as K};

/// Why an instruction of 64-bit mode is left out.
fn left_out(code: Code) -> Option<&'static str> {
    let info = code.op_code();
    Some(match code.mnemonic() {
        M::Syscall | M::Sysenter => "would be a system call of the child",
        M::Cpuid
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Rdrand
        | M::Rdseed
        | M::Rdpid
        | M::Rdpru
        | M::Xgetbv => "its result is the host's own",
        M::Sgdt | M::Sidt | M::Sldt | M::Smsw | M::Str => "Linux answers for the CPU (UMIP)",
        M::Xsave
        | M::Xsave64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xrstor
        | M::Xrstor64 => "XCR0 of host and guest differ",
        M::Fxsave | M::Fxsave64 | M::Fnsave | M::Fnstenv => "stores the pointers of the last x87 instruction",
        M::Retf | M::Iret | M::Iretd | M::Iretq | M::Lar | M::Lsl | M::Verr | M::Verw => {
            "the host's descriptor tables are its own"
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => "the host's descriptor tables are its own",
        M::Vmcall | M::Vmmcall | M::Vmgexit | M::Pvalidate | M::Tdcall | M::Seamcall => {
            "would ask the hypervisor"
        }
        M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx | M::Clzero | M::Mcommit | M::Serialize => {
            "differs between host and model"
        }
        M::Xbegin | M::Xend | M::Xabort | M::Xtest => "transactions are hidden",
        M::Int1 => "some hypervisors report it as a fault",
        M::Reservednop if code as u32 <= Code::Reservednop_rm64_r64_0F0D as u32 => {
            "AMD refuses what Intel ignores"
        }
        _ if code == Code::Movsxd_r16_rm16 => "AMD's CPUs read four bytes of memory, the decoder says two",
        M::Rsm | M::Enclu => "the hypervisor may meddle",
        _ if (0..info.op_count()).any(|i| info.op_kind(i) == K::seg_reg) => {
            "the host's descriptor tables are its own"
        }
        M::Push | M::Pop if matches!(info.op_kind(0), K::fs | K::gs) => {
            "the host's descriptor tables are its own"
        }
        M::Jmp | M::Call if is_far(code) => "the host's descriptor tables are its own",
        _ => return None,
    })
}

fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Call_ptr1616
            | Code::Call_ptr1632
    )
}

/// Whether host and guest have a feature alike.
fn offered(feature: F) -> bool {
    let (one, seven, extended) = (host(1, 0), host(7, 0), host(0x8000_0001, 0));
    let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
    match feature {
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::MMX
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::FXSR
        | F::SSE
        | F::SSE2
        | F::PAUSE
        | F::MULTIBYTENOP
        | F::CLFSH
        | F::MSR
        | F::SYSCALL => true,
        F::SSE3 => bit(one.ecx, 0),
        F::PCLMULQDQ => bit(one.ecx, 1),
        F::SSSE3 => bit(one.ecx, 9),
        F::FMA => bit(one.ecx, 12),
        F::CMPXCHG16B => bit(one.ecx, 13),
        F::SSE4_1 => bit(one.ecx, 19),
        F::SSE4_2 => bit(one.ecx, 20),
        F::MOVBE => bit(one.ecx, 22),
        F::POPCNT => bit(one.ecx, 23),
        F::AES => bit(one.ecx, 25),
        F::AVX => bit(one.ecx, 28),
        F::F16C => bit(one.ecx, 29),
        F::FSGSBASE => bit(seven.ebx, 0),
        F::BMI1 => bit(seven.ebx, 3),
        F::AVX2 => bit(seven.ebx, 5),
        F::BMI2 => bit(seven.ebx, 8),
        F::ADX => bit(seven.ebx, 19),
        F::CLFLUSHOPT => bit(seven.ebx, 23),
        F::SHA => bit(seven.ebx, 29),
        F::GFNI => bit(seven.ecx, 8),
        F::VAES => bit(seven.ecx, 9),
        F::VPCLMULQDQ => bit(seven.ecx, 10),
        F::LZCNT => bit(extended.ecx, 5),
        F::SSE4A => bit(extended.ecx, 6),
        F::PREFETCHW => bit(extended.ecx, 8),
        _ => false,
    }
}

/// Whether the child may execute it, and host and guest shall agree.
pub fn allowed(code: Code) -> bool {
    // CPUID is slow under a hypervisor.
    static ALLOWED: OnceLock<Vec<bool>> = OnceLock::new();
    ALLOWED.get_or_init(|| Code::values().map(judge).collect())[code as usize]
}

fn judge(code: Code) -> bool {
    let info = code.op_code();
    info.is_instruction()
        && info.mode64()
        && left_out(code).is_none()
        && code.cpuid_features().iter().all(|&feature| offered(feature))
}

/// OF after rotations through the carry by more than one depends on what ran before, even on the bare CPU.
pub fn unsteady(code: Code) -> bool {
    matches!(code.mnemonic(), M::Rcl | M::Rcr) && code.op_code().op_kind(1) != K::imm8_const_1
}

/// All of them, in the encodings that the generator can make.
pub fn all() -> Vec<Code> {
    Code::values().filter(|&code| allowed(code)).collect()
}
