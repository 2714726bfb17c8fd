//! Translated code against what it must do, with guest code written in assembly.
#![allow(unsafe_code)]

use super::*;
use crate::cpu_core::Core;
use memory::{Backing, GuestMemory};

/// Defines guest code in assembly, of at most [`CODE_LEN`] bytes.
macro_rules! guest {
    ($name:ident: $($line:literal)+) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            std::arch::naked_asm!($($line,)+ "hlt")
        }
    };
}

const CODE_LEN: usize = 512;

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;

struct Machine {
    core: Core,
    translator: Translator,
}

impl Machine {
    fn new(code: extern "C" fn()) -> Self {
        // SAFETY: the bytes of a function, and of what the linker put behind it, are readable.
        let code = unsafe { std::slice::from_raw_parts(code as *const u8, CODE_LEN) };
        let memory = GuestMemory::new(&[(0, 8 << 20)], Backing::Private).unwrap();
        memory.write(CODE, code).unwrap();
        let mut core = Core::flat64(memory).unwrap();
        core.state.rip = CODE;
        core.state.gpr[4] = STACK;
        Self { core, translator: Translator::new(&Config::default()).unwrap() }
    }

    /// Runs to HLT, without the single-step tier.
    fn run(&mut self) {
        assert_eq!(self.translator.run(&mut self.core), Outcome::Step);
        let mut byte = [0];
        self.core.mmu.memory.read(self.core.state.rip, &mut byte).unwrap();
        assert_eq!(byte, [0xf4], "stopped at {:#x}", self.core.state.rip);
    }
}

guest!(sum:
    "mov rdi, 0x300000"
    "mov ecx, 1000"
    "xor eax, eax"
    "2: mov [rdi + rcx*8], rcx"
    "add rax, [rdi + rcx*8]"
    "dec ecx"
    "jnz 2b"
);

#[test]
fn a_loop_over_memory_adds_up() {
    let mut machine = Machine::new(sum);
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 500_500);
    assert!(machine.translator.statistics().exits_link < 10);
}
