//! Which instructions the guest's CPU has: the decoder's feature names against the CPUID table.

use cpu::cpuid::CpuidTable;
use iced_x86::CpuidFeature as F;

/// Register of a CPUID answer.
#[derive(Clone, Copy)]
enum R {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Whether an instruction that needs `feature` exists, and the host may execute it for the guest.
pub(crate) fn supported(feature: F, table: &CpuidTable) -> bool {
    let bit = |function: u32, index: u32, register: R, bit: u32| {
        table.get(function, index).is_some_and(|leaf| {
            let value = match register {
                R::Eax => leaf.eax,
                R::Ebx => leaf.ebx,
                R::Ecx => leaf.ecx,
                R::Edx => leaf.edx,
            };
            value >> bit & 1 != 0
        })
    };
    use R::{Eax, Ebx, Ecx, Edx};
    match feature {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 => true,
        // Removed long ago, or of other processors; but 8086's and 386's own survive as legacy instructions.
        F::INTEL8086_ONLY | F::INTEL286_ONLY | F::INTEL386_ONLY => false,
        F::CPUID | F::PAUSE | F::MULTIBYTENOP | F::MSR | F::TSC => true,
        // Hints where they are not supported.
        F::CLDEMOTE | F::PREFETCHW | F::PREFETCHWT1 | F::PREFETCHITI | F::HLE => true,
        F::FPU | F::FPU287 | F::FPU387 => bit(1, 0, Edx, 0),
        F::CX8 => bit(1, 0, Edx, 8),
        F::CMOV => bit(1, 0, Edx, 15),
        F::CLFSH => bit(1, 0, Edx, 19),
        F::MMX => bit(1, 0, Edx, 23),
        F::FXSR => bit(1, 0, Edx, 24),
        F::SSE => bit(1, 0, Edx, 25),
        F::SSE2 => bit(1, 0, Edx, 26),
        F::SSE3 => bit(1, 0, Ecx, 0),
        F::PCLMULQDQ => bit(1, 0, Ecx, 1),
        F::SSSE3 => bit(1, 0, Ecx, 9),
        F::FMA => bit(1, 0, Ecx, 12),
        F::CMPXCHG16B => bit(1, 0, Ecx, 13),
        F::SSE4_1 => bit(1, 0, Ecx, 19),
        F::SSE4_2 => bit(1, 0, Ecx, 20),
        F::MOVBE => bit(1, 0, Ecx, 22),
        F::POPCNT => bit(1, 0, Ecx, 23),
        F::AES => bit(1, 0, Ecx, 25),
        F::XSAVE => bit(1, 0, Ecx, 26),
        F::AVX => bit(1, 0, Ecx, 28),
        F::F16C => bit(1, 0, Ecx, 29),
        F::RDRAND => bit(1, 0, Ecx, 30),
        F::FSGSBASE => bit(7, 0, Ebx, 0),
        F::BMI1 => bit(7, 0, Ebx, 3),
        F::AVX2 => bit(7, 0, Ebx, 5),
        F::BMI2 => bit(7, 0, Ebx, 8),
        F::INVPCID => bit(7, 0, Ebx, 10),
        F::RDSEED => bit(7, 0, Ebx, 18),
        F::ADX => bit(7, 0, Ebx, 19),
        F::SMAP => bit(7, 0, Ebx, 20),
        F::CLFLUSHOPT => bit(7, 0, Ebx, 23),
        F::CLWB => bit(7, 0, Ebx, 24),
        F::SHA => bit(7, 0, Ebx, 29),
        F::GFNI => bit(7, 0, Ecx, 8),
        F::VAES => bit(7, 0, Ecx, 9),
        F::VPCLMULQDQ => bit(7, 0, Ecx, 10),
        F::RDPID => bit(7, 0, Ecx, 22),
        F::SERIALIZE => bit(7, 0, Edx, 14),
        F::AVX_VNNI => bit(7, 1, Eax, 4),
        F::AVX_IFMA => bit(7, 1, Eax, 23),
        F::AVX_VNNI_INT8 => bit(7, 1, Edx, 4),
        F::AVX_NE_CONVERT => bit(7, 1, Edx, 5),
        F::AVX_VNNI_INT16 => bit(7, 1, Edx, 10),
        F::XSAVEOPT => bit(0xd, 1, Eax, 0),
        F::XSAVEC => bit(0xd, 1, Eax, 1),
        F::XSAVES => bit(0xd, 1, Eax, 3),
        F::SYSCALL => bit(0x8000_0001, 0, Edx, 11),
        F::RDTSCP => bit(0x8000_0001, 0, Edx, 27),
        F::LZCNT => bit(0x8000_0001, 0, Ecx, 5),
        F::SSE4A => bit(0x8000_0001, 0, Ecx, 6),
        F::XOP => bit(0x8000_0001, 0, Ecx, 11),
        F::FMA4 => bit(0x8000_0001, 0, Ecx, 16),
        F::TBM => bit(0x8000_0001, 0, Ecx, 21),
        F::SEP => bit(1, 0, Edx, 11),
        F::CLZERO => bit(0x8000_0008, 0, Ebx, 0),
        _ => false,
    }
}
