//! How fast the tiers run small kernels, against the bare host: `cargo run --release -p engine-soft --example tiers`.
#![allow(unsafe_code)]

use engine_soft::cpu_core::Core;
use engine_soft::exception::Stop;
use engine_soft::translate::{Config, Outcome, Translator};
use memory::{Backing, GuestMemory};
use std::time::Instant;

macro_rules! kernels {
    ($($name:ident: $($line:literal)+;)+) => {
        $(#[unsafe(naked)]
        extern "sysv64" fn $name(_count: u64, _data: u64) -> u64 {
            std::arch::naked_asm!($($line,)+ "ret")
        })+
        const KERNELS: &[(&str, extern "sysv64" fn(u64, u64) -> u64)] = &[$((stringify!($name), $name),)+];
    };
}

// RDI counts, RSI points to 64 KiB of data.
kernels! {
    registers:
        "xor eax, eax" "2: add rax, rdi" "rol rax, 7" "xor rax, rdi" "lea rdx, [rax + rdi*2]" "sub rax, rdx"
        "dec rdi" "jnz 2b";
    load_sum:
        "xor eax, eax" "2: mov edx, edi" "and edx, 0xfff" "add rax, [rsi + rdx*8]" "dec rdi" "jnz 2b";
    copy:
        "2: mov edx, edi" "and edx, 0xfff" "mov rax, [rsi + rdx*8]" "mov [rsi + rdx*8 + 0x8000], rax" "dec rdi"
        "jnz 2b";
    chase:
        "mov [rsi], rsi" "2: mov rsi, [rsi]" "dec rdi" "jnz 2b";
    carry_chain:
        "xor eax, eax" "xor ecx, ecx" "clc"
        "2: mov rax, [rsi]" "adc rax, [rsi + 8]" "mov [rsi + 16], rax" "mov rax, [rsi + 8]" "adc rax, [rsi + 24]"
        "mov [rsi + 32], rax" "dec rdi" "jnz 2b";
    submul:
        "xor r8d, r8d" "mov rcx, 12345" "2: mov r9d, edi" "and r9d, 0xff" "mov rax, [rsi + r9*8]" "mul rcx"
        "add rax, r8" "adc rdx, 0" "sub [rsi + r9*8 + 0x2000], rax" "adc rdx, 0" "mov r8, rdx" "dec rdi" "jnz 2b";
    calls:
        "2: call 3f" "dec rdi" "jnz 2b" "ret" "3: push rbx" "mov rbx, rdi" "pop rbx";
    frames:
        "2: call 3f" "dec rdi" "jnz 2b" "ret"
        "3: push rbp" "mov rbp, rsp" "push rbx" "push r12" "push r13" "sub rsp, 32" "mov [rbp - 40], rdi"
        "mov r12, [rbp - 40]" "lea r13, [r12 + 1]" "mov rbx, r13" "add rsp, 32" "pop r13" "pop r12" "pop rbx"
        "pop rbp";
    indirect:
        "lea rdx, [rip + 3f]" "2: call rdx" "dec rdi" "jnz 2b" "ret" "3: inc rax";
    spilled:
        "push r12" "push r13" "push r14" "xor r12d, r12d" "xor r13d, r13d"
        "2: add r12, rdi" "xor r13, r12" "lea r14, [r13 + r12]" "sub r12, r14" "dec rdi" "jnz 2b"
        "mov rax, r12" "pop r14" "pop r13" "pop r12";
    vectors:
        "2: mov edx, edi" "and edx, 0xff0" "movaps xmm0, [rsi + rdx]" "mulps xmm0, [rsi + rdx + 4096]"
        "addps xmm1, xmm0" "dec rdi" "jnz 2b";
    crossing_load:
        "2: vaddps ymm0, ymm0, [rsi + 4080]" "dec rdi" "jnz 2b";
    crossing_store:
        "2: vmovups [rsi + 4080], ymm1" "dec rdi" "jnz 2b";
    repeat:
        "mov rdx, rdi" "2: mov ecx, 8" "mov rdi, rsi" "rep stosq" "dec rdx" "jnz 2b";
    cli_sti:
        "2: pushfq" "cli" "popfq" "dec rdi" "jnz 2b";
}

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x30_0000;
const STACK: u64 = 0x20_0000;

fn guest(kernel: extern "sysv64" fn(u64, u64) -> u64, count: u64) -> Core {
    let memory = GuestMemory::new(&[(0, 8 << 20)], Backing::Private).expect("guest memory");
    // SAFETY: the bytes of a function, and what the linker put behind it, are readable.
    let code = unsafe { std::slice::from_raw_parts(kernel as *const u8, 512) };
    memory.write(CODE, code).expect("code fits");
    memory.write(0x9000, &[0xf4]).expect("code fits");
    memory.write(STACK, &0x9000u64.to_le_bytes()).expect("stack fits");
    let mut core = Core::flat64(memory).expect("a vCPU");
    core.state.rip = CODE;
    (core.state.gpr[4], core.state.gpr[7], core.state.gpr[6]) = (STACK, count, DATA);
    core
}

fn main() {
    let count = 4_000_000u64;
    let mut data = vec![0u64; 16384];
    println!("{:<12} {:>9} {:>11} {:>6} {:>10}", "kernel", "native ns", "translated", "ratio", "steps ns");
    for &(name, kernel) in KERNELS {
        if name == "cli_sti" {
            continue;
        }
        let (mut native, mut translated) = (f64::MAX, f64::MAX);
        let mut core = guest(kernel, 0);
        let mut translator = Translator::new(&Config::default()).expect("a translator");
        for _ in 0..3 {
            let start = Instant::now();
            kernel(count, (data.as_mut_ptr() as u64 + 4095) & !4095);
            native = native.min(start.elapsed().as_nanos() as f64 / count as f64);
            core.state.rip = CODE;
            (core.state.gpr[4], core.state.gpr[7], core.state.gpr[6]) = (STACK, count, DATA);
            let start = Instant::now();
            loop {
                if translator.run(&mut core) == Outcome::Step {
                    if core.state.rip == 0x9000 {
                        break;
                    }
                    engine_soft::step::step(&mut core);
                }
            }
            translated = translated.min(start.elapsed().as_nanos() as f64 / count as f64);
        }
        let few = 100_000;
        let mut core = guest(kernel, few);
        let start = Instant::now();
        while core.state.rip != 0x9000 {
            if !matches!(engine_soft::step::step(&mut core), Stop::Continue) {
                break;
            }
        }
        let steps = start.elapsed().as_nanos() as f64 / few as f64;
        println!("{name:<12} {native:>9.2} {translated:>11.2} {:>6.2} {steps:>10.0}", translated / native);
    }
}
