//! The probe's guest: 64-bit code at CPL 0 that executes what every Linux kernel executes early, and reports each step
//! on a port before it tries it.
//!
//! Unsafe, because the program is assembled into this binary and its bytes are found by linker symbols.
#![allow(unsafe_code)]

/// Port on which the guest announces a step.
pub(crate) const PORT: u16 = 0x10;
/// Iterations of the timed loop, two instructions each.
pub(crate) const LOOP_ITERATIONS: u32 = 100_000;

core::arch::global_asm!(
    ".pushsection .rodata.yado_probe, \"a\"",
    ".globl yado_probe_start",
    "yado_probe_start:",
    // Step 1: a breakpoint; the kernel's text patching depends on it. The handler counts in RBX.
    "mov al, 1",
    "out 0x10, al",
    "xor ebx, ebx",
    "int3",
    "cmp ebx, 1",
    "jne 9f",
    // Step 2: the slab allocator's instruction.
    "mov al, 2",
    "out 0x10, al",
    "mov edi, 0x5000",
    "xor eax, eax",
    "xor edx, edx",
    "xor ebx, ebx",
    "xor ecx, ecx",
    "lock cmpxchg16b [rdi]",
    "jnz 9f",
    // Step 3: the FPU switch of kernels where the CPU has XSAVE (R15 says so).
    "mov al, 3",
    "out 0x10, al",
    "test r15d, r15d",
    "jz 2f",
    "xor ecx, ecx",
    "mov eax, 3",
    "xor edx, edx",
    "xsetbv",
    "mov edi, 0xa000",
    "xsave64 [rdi]",
    "xrstor64 [rdi]",
    "2:",
    // Step 4: a loop, timed from outside.
    "mov al, 4",
    "out 0x10, al",
    "mov ecx, 100000",
    "3:",
    "dec ecx",
    "jnz 3b",
    "mov al, 5",
    "out 0x10, al",
    "hlt",
    // A wrong result.
    "9:",
    "mov al, 9",
    "out 0x10, al",
    "hlt",
    ".globl yado_probe_breakpoint",
    "yado_probe_breakpoint:",
    "inc ebx",
    "iretq",
    ".globl yado_probe_end",
    "yado_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static yado_probe_start: u8;
    static yado_probe_breakpoint: u8;
    static yado_probe_end: u8;
}

/// The program, and the offset of its breakpoint handler.
pub(crate) fn program() -> (&'static [u8], u64) {
    let start = &raw const yado_probe_start;
    let handler = &raw const yado_probe_breakpoint;
    let end = &raw const yado_probe_end;
    let len = (end as usize).wrapping_sub(start as usize);
    // SAFETY: the symbols enclose the bytes assembled above, which are constant data of this binary.
    let code = unsafe { std::slice::from_raw_parts(start, len) };
    (code, (handler as u64).wrapping_sub(start as u64))
}
