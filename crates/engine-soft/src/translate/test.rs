//! Translated code against what it must do, with guest code written in assembly.
#![allow(unsafe_code)]

use super::*;
use crate::cpu_core::Core;
use memory::{Backing, GuestMemory};

/// Defines guest code in assembly, of at most [`CODE_LEN`] bytes, ending with HLT.
macro_rules! guest {
    ($name:ident: $($line:literal)+) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            std::arch::naked_asm!($($line,)+ "hlt")
        }
    };
}
pub(super) use guest;

const CODE_LEN: usize = 512;
pub(super) const CODE: u64 = 0x10_0000;
pub(super) const STACK: u64 = 0x20_0000;
pub(super) const DATA: u64 = 0x30_0000;
const STATUS: u64 = rflags::STATUS;

/// The features of this host.
pub(super) fn host_cpuid() -> std::sync::Arc<cpu::cpuid::CpuidTable> {
    let mut table = cpu::cpuid::CpuidTable::default();
    for (function, index) in [(0, 0), (1, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)] {
        table.set(function, Some(index), cpu::cpuid::host(function, index));
    }
    std::sync::Arc::new(table)
}

pub(super) struct Machine {
    pub(super) core: Core,
    pub(super) translator: Translator,
}

impl Machine {
    pub(super) fn new(code: extern "C" fn()) -> Self {
        // SAFETY: the bytes of a function, and of what the linker put behind it, are readable.
        let code = unsafe { std::slice::from_raw_parts(code as *const u8, CODE_LEN) };
        let memory = GuestMemory::new(&[(0, 8 << 20)], Backing::Private).unwrap();
        memory.write(CODE, code).unwrap();
        let mut core = Core::flat64(memory).unwrap();
        core.cpuid = host_cpuid();
        core.state.rip = CODE;
        core.state.gpr[4] = STACK;
        Self { core, translator: Translator::new(&Config::default()).unwrap() }
    }

    fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        self.core.mmu.memory.read_array(address).unwrap()
    }

    fn u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.bytes(address))
    }

    /// Runs to HLT, without the single-step tier.
    pub(super) fn run(&mut self) {
        assert_eq!(self.translator.run(&mut self.core), Outcome::Step);
        assert_eq!(self.bytes(self.core.state.rip), [0xf4], "stopped at {:#x}", self.core.state.rip);
    }

    /// Maps the 4 KiB page at linear `address` (anywhere in the lowest 2 MiB from 1 GiB on) with this entry.
    pub(super) fn map(&mut self, address: u64, entry: u64) {
        let memory = &self.core.mmu.memory;
        memory.write(0x2008, &0x5007u64.to_le_bytes()).unwrap();
        memory.write(0x5000, &0x6007u64.to_le_bytes()).unwrap();
        memory.write(0x6000 + (address >> 12 & 511) * 8, &entry.to_le_bytes()).unwrap();
        self.core.mmu.flush_all(&mut self.core.state);
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

guest!(fibonacci:
    "mov edi, 20"
    "call 2f"
    "jmp 5f"
    "2: cmp edi, 2"
    "jb 4f"
    "push rbx"
    "push rdi"
    "dec edi"
    "call 2b"
    "mov rbx, rax"
    "pop rdi"
    "sub edi, 2"
    "call 2b"
    "add rax, rbx"
    "pop rbx"
    "ret"
    "4: mov eax, edi"
    "ret"
    "5: nop"
);

#[test]
fn calls_and_returns_keep_the_stack() {
    let mut machine = Machine::new(fibonacci);
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 6765);
    assert_eq!(machine.core.state.gpr[4], STACK);
    // All returns but the first of each place are found inline.
    assert!(machine.translator.statistics().exits_lookup < 20, "{:?}", machine.translator.statistics());
}

guest!(carry:
    "mov rsi, 0x300ff0"
    "mov rdi, 0x302000"
    "mov ecx, 64"
    "mov rax, -1"
    "mov r13d, 8"
    "2: mov [rsi + rcx*8 - 0x208], rax"
    "dec ecx"
    "jnz 2b"
    "mov qword ptr [rdi], 1"
    "mov ecx, 64"
    "mov rsi, 0x300df0"
    "xor edx, edx"
    "add rdx, [rdi]"
    "stc"
    "2: mov rax, [rsi]"
    "adc rax, 0"
    "mov [rsi], rax"
    "lea rsi, [rsi + 8]"
    "push rdx"
    "pop r14"
    "dec ecx"
    "jnz 2b"
    "setc al"
    "mov r15, rsp"
    "call 3f"
    "3: pop rbx"
    "setc ah"
);

#[test]
fn a_carry_lives_across_loads_stores_stack_and_jumps() {
    let mut machine = Machine::new(carry);
    machine.run();
    let state = &machine.core.state;
    assert_eq!(state.gpr[0] & 0xffff, 0x0101);
    assert_eq!(state.gpr[14], 1);
    assert_eq!(state.gpr[15], STACK);
    assert_eq!(machine.u64(0x300df0), 0);
    assert_eq!(machine.u64(0x300df0 + 63 * 8), 0);
}

guest!(registers:
    "mov r12, 0x300100"
    "mov r13, 2"
    "mov r14d, 0x11223344"
    "mov [r12 + r13*4 + 8], r14"
    "mov r15, [r12 + 16]"
    "mov rdx, r12"
    "mov ah, [rdx + 17]"
    "mov rbx, rsp"
    "lea rsp, [rsp - 64]"
    "mov [rsp + 8], r15d"
    "mov rcx, [rsp + 8]"
    "mov rsp, rbx"
    "xchg r12, r13"
    "lea r8d, [r12d + r13d*2 - 1]"
    "lea r12w, [r13 + 3]"
    "push rsp"
    "pop r11"
    "push r14"
    "push 0x1234"
    "pop r9"
    "pop rdi"
    "push qword ptr [r13 + 16]"
    "pop rsi"
    "mov r10, [rip + 2f]"
    "movabs al, [0x300110]"
    "jmp 3f"
    "2: .quad 0x1122334455667788"
    "3: cpuid" // ends the block
);

#[test]
fn spilled_registers_and_the_stack_pointer_stand_in_all_places() {
    let mut machine = Machine::new(registers);
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    let state = &machine.core.state;
    assert_eq!(machine.bytes(state.rip), [0x0f, 0xa2]);
    let gpr = state.gpr;
    assert_eq!(gpr[14], 0x1122_3344);
    assert_eq!(gpr[15], 0x1122_3344);
    assert_eq!(gpr[0], 0x3344);
    assert_eq!(gpr[1] as u32, 0x1122_3344);
    assert_eq!(gpr[4], STACK);
    assert_eq!(gpr[3], STACK);
    assert_eq!(gpr[13], 0x30_0100);
    assert_eq!(gpr[8], 2 + 0x30_0100 * 2 - 1);
    assert_eq!(gpr[12], 0x0103);
    assert_eq!(gpr[11], STACK);
    assert_eq!(gpr[9], 0x1234);
    assert_eq!(gpr[7], 0x1122_3344);
    assert_eq!(gpr[6], 0x1122_3344);
    assert_eq!(gpr[10], 0x1122_3344_5566_7788);
}

guest!(segments:
    "mov eax, fs:[0x10]"
    "mov edx, 8"
    "mov gs:[rdx + 8], rax"
    "mov rdi, 0x100000300018"
    "mov ecx, [edi]"
    "mov r13, 0x300000"
    "mov r12, gs:[r13 + rdx*2 - 0x300000]"
);

#[test]
fn segment_bases_and_narrow_addresses() {
    let mut machine = Machine::new(segments);
    machine.core.state.segments[crate::state::seg::FS].base = DATA;
    machine.core.state.segments[crate::state::seg::GS].base = DATA + 0x1000;
    machine.core.mmu.memory.write(DATA + 0x10, &0xabcdu32.to_le_bytes()).unwrap();
    machine.core.mmu.memory.write(DATA + 0x18, &0x77u32.to_le_bytes()).unwrap();
    machine.run();
    assert_eq!(machine.u64(DATA + 0x1010), 0xabcd);
    assert_eq!(machine.core.state.gpr[1], 0x77);
    assert_eq!(machine.core.state.gpr[12], 0xabcd);
}

guest!(crossing:
    "mov rsi, 0x40000ffc"
    "mov eax, 5"
    "add eax, -5"
    "mov ebx, 7"
    "adc rbx, [rsi]"
    "mov ecx, 1"
);

#[test]
fn a_fault_in_a_block_leaves_the_state_before_the_instruction() {
    let mut machine = Machine::new(crossing);
    machine.map(0x4000_0000, 0x30_0007);
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    let state = &machine.core.state;
    assert_eq!(machine.bytes(state.rip), [0x48, 0x13, 0x1e]);
    assert_eq!(state.rflags & STATUS, rflags::CF | rflags::ZF | rflags::PF | rflags::AF);
    assert_eq!((state.gpr[0], state.gpr[3], state.gpr[6]), (0, 7, 0x4000_0ffc));
    assert_eq!(machine.translator.statistics().tlb_misses, 1);
}

guest!(patch_self:
    "mov rdi, 0x100000"
    "mov eax, 0"
    "mov ecx, 3"
    "2: add eax, 1" // 83 c0 01 at offset 17
    "add byte ptr [rdi + 19], 1"
    "nop"
    "dec ecx"
    "jnz 2b"
);

#[test]
fn a_write_to_translated_code_goes_to_the_other_tier_and_kills_the_block() {
    let mut machine = Machine::new(patch_self);
    assert_eq!(machine.bytes(CODE + 17), [0x83, 0xc0, 0x01]);
    let mut expected = 0;
    for round in 1..=3u8 {
        assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
        expected += u64::from(round);
        assert_eq!(machine.core.state.gpr[0], expected);
        // What the single-step tier does for the ADD, and tells.
        assert_eq!(machine.bytes(machine.core.state.rip), [0x80, 0x47, 0x13, 0x01]);
        machine.core.mmu.memory.write(CODE + 19, &[round + 1]).unwrap();
        machine.core.notify_code_write(CODE + 19, 1);
        machine.core.state.rip += 4;
    }
    machine.run();
    assert!(machine.translator.statistics().blocks_killed >= 3);
}

guest!(write_beside:
    "mov ecx, 100"
    "2: add qword ptr [rip + 3f], 1"
    "dec ecx"
    "jnz 2b"
    "jmp 4f"
    ".balign 64"
    "3: .quad 0"
    ".balign 64"
    "4: nop"
);

#[test]
fn a_write_beside_translated_code_stays_in_this_tier() {
    let mut machine = Machine::new(write_beside);
    machine.run();
    assert_eq!(machine.core.state.gpr[1], 0);
    assert_eq!(machine.translator.statistics().slow_writes, 100);
    assert_eq!(machine.translator.statistics().blocks_killed, 0);
}

guest!(far_jumps:
    "mov rbx, 0x40000000"
    "mov r12d, 2"
    "2: call rbx"
    "dec r12d"
    "jnz 2b"
);

#[test]
fn a_remapped_page_runs_its_new_code() {
    let mut machine = Machine::new(far_jumps);
    // inc eax; ret, and add eax, 16; ret.
    machine.core.mmu.memory.write(DATA, &[0xff, 0xc0, 0xc3]).unwrap();
    machine.core.mmu.memory.write(DATA + 0x1000, &[0x83, 0xc0, 0x10, 0xc3]).unwrap();
    machine.map(0x4000_0000, DATA | 7);
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 2);
    machine.map(0x4000_0000, (DATA + 0x1000) | 7);
    machine.core.state.rip = CODE;
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 34);
    machine.map(0x4000_0000, 0);
    machine.core.state.rip = CODE;
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_eq!(machine.core.state.rip, 0x4000_0000);
}

guest!(forever: "2: inc rax" "jmp 2b");
guest!(forever_flags: "2: adc rax, 1" "jmp 2b");
guest!(forever_indirect: "lea rbx, [rip + 2f]" "2: inc rax" "jmp rbx");
guest!(forever_count: "2: mov ecx, 2" "loop 2b" "jmp 2b");

#[test]
fn a_kick_ends_tight_loops_soon() {
    for code in [forever, forever_flags, forever_indirect, forever_count] {
        let mut machine = Machine::new(code);
        let doorbell = std::ptr::from_ref(&machine.core.state.doorbell) as usize;
        let late = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            // SAFETY: the machine outlives this thread, which is joined below.
            let doorbell = unsafe { &*(doorbell as *const crate::state::Doorbell) };
            doorbell.ring(1);
            std::time::Instant::now()
        });
        assert_eq!(machine.translator.run(&mut machine.core), Outcome::Kicked);
        let now = std::time::Instant::now();
        let delay = now.saturating_duration_since(late.join().unwrap());
        // The host may have other things to do: the loops above would never end.
        assert!(delay.as_secs() < 5, "{delay:?}");
        assert!(machine.core.state.rip >= CODE && machine.core.state.rip < CODE + 32);
    }
}

guest!(vectors:
    "mov rsi, 0x300010"
    "movups xmm9, [rsi + 1]"
    "paddd xmm9, [rsi]"
    "movaps [rsi + 0x20], xmm9"
    "fld qword ptr [rsi]"
    "fadd st(0), st(0)"
    "fstp tbyte ptr [rsi + 0x40]"
    "movaps xmm1, [rsi + 1]"
);

#[test]
fn vectors_and_x87_and_an_alignment_fault() {
    let mut machine = Machine::new(vectors);
    machine.core.mmu.memory.write(DATA + 0x10, &1.5f64.to_le_bytes()).unwrap();
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_eq!(machine.bytes(machine.core.state.rip), [0x0f, 0x28, 0x4e, 0x01]);
    let mut expected = [0u8; 16];
    let shifted: [u8; 16] = machine.bytes(DATA + 0x11);
    let plain: [u8; 16] = machine.bytes(DATA + 0x10);
    for i in 0..4 {
        let word = |bytes: &[u8; 16]| u32::from_le_bytes(bytes[i * 4..i * 4 + 4].try_into().unwrap());
        expected[i * 4..i * 4 + 4].copy_from_slice(&word(&shifted).wrapping_add(word(&plain)).to_le_bytes());
    }
    assert_eq!(machine.bytes::<16>(DATA + 0x30), expected);
    // 3.0 in extended precision.
    assert_eq!(machine.bytes::<10>(DATA + 0x50), [0, 0, 0, 0, 0, 0, 0, 0xc0, 0, 0x40]);
}

guest!(divide:
    "mov ecx, 100"
    "2: mov eax, 1000"
    "xor edx, edx"
    "div ecx"
    "add ebx, eax"
    "stc"
    "dec ecx"
    "jnz 2b"
    "mov r12, rcx"
    "mov edx, 7"
    "idiv r12"
);

#[test]
fn a_division_that_faults_goes_to_the_other_tier() {
    let mut machine = Machine::new(divide);
    crate::signal::prepare_thread().unwrap();
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    let state = &machine.core.state;
    assert_eq!(machine.bytes(state.rip), [0x49, 0xf7, 0xfc]);
    assert_eq!((state.gpr[0], state.gpr[2], state.gpr[4]), (1000, 7, STACK));
    let expected: u64 = (1..=100).map(|i| 1000 / i).sum();
    assert_eq!(state.gpr[3], expected);
    assert_eq!(state.rflags & rflags::CF, rflags::CF);
}

guest!(system:
    "mov r15, 0x300000"
    "mov eax, 5"
    "sub eax, 6"
    "pushfq"
    "cli"
    "pop r12"
    "pushfq"
    "pop r13"
    "or r12, 0x800"
    "stc"
    "sti"
    "mov ecx, 0"
    "adc ecx, 0"
    "push r12"
    "popfq"
    "seto bl"
    "setc bh"
    "cld"
    "rdtsc"
    "swapgs"
    "mov rsi, -3"
    "bts qword ptr [r15 + 8], rsi"
    "mov esi, 70"
    "lock bts [r15], esi"
    "bt [r15], esi"
    "setc dh"
    "pushfq"
);

#[test]
fn flags_clock_and_bit_strings() {
    let mut machine = Machine::new(system);
    machine.core.state.rflags |= rflags::IF;
    machine.core.state.tsc_offset = 1 << 60;
    machine.core.state.segments[crate::state::seg::GS].base = 0x1111;
    machine.core.state.msrs.kernel_gs_base = 0x2222;
    machine.run();
    let state = &machine.core.state;
    let minus = rflags::CF | rflags::PF | rflags::AF | rflags::SF;
    assert_eq!(state.gpr[12], minus | rflags::IF | rflags::FIXED | rflags::OF);
    assert_eq!(state.gpr[13], minus | rflags::FIXED);
    assert_eq!(state.gpr[1], 1);
    assert_eq!(state.gpr[3] & 0xffff, 0x0101);
    assert_eq!(state.segments[crate::state::seg::GS].base, 0x2222);
    assert_eq!(state.msrs.kernel_gs_base, 0x1111);
    assert_eq!(machine.u64(DATA), 1 << 61);
    assert_eq!(machine.u64(DATA + 8), 1 << 6);
    assert_eq!(state.gpr[2] >> 8 & 0xff, 1);
    assert_eq!(machine.u64(STACK - 8), state.rflags);
    assert!(state.rflags & rflags::IF != 0);
    let tsc = state.gpr[0] | (state.gpr[2] & 0xffff_00ff) << 32;
    assert!(tsc > 1 << 60, "{tsc:#x}");
}

guest!(verify: "mov r15, 0x300000" "mov al, 0x80" "add al, 0x80" "verw word ptr [r15]" "pushfq" "setz bl" "verw word ptr [r15]" "setz bh");

#[test]
fn whether_a_segment_is_writable_is_asked_without_the_other_tier() {
    // Null; 64-bit code; writable data; read-only data; writable data of the user; a busy TSS.
    let table: [u64; 6] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_9100_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x0000_8b00_0000_0067,
    ];
    let other_tier = [0, 0x30, 0x13, 0x23, 0x14, 0xfff8];
    for (selector, writable) in [(0x08, false), (0x10, true), (0x18, false), (0x20, true), (0x28, false)]
        .into_iter()
        .chain(other_tier.map(|selector| (selector, selector == 0x23)))
    {
        let mut machine = Machine::new(verify);
        let memory = &machine.core.mmu.memory;
        memory.write(DATA, &(selector as u16).to_le_bytes()).unwrap();
        for (number, descriptor) in table.iter().enumerate() {
            memory.write(0x8000 + number as u64 * 8, &descriptor.to_le_bytes()).unwrap();
        }
        machine.core.state.gdtr = cpu::DescriptorTable { base: 0x8000, limit: table.len() as u16 * 8 - 1 };
        let mut steps = 0;
        loop {
            assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
            if machine.bytes(machine.core.state.rip) == [0xf4] {
                break;
            }
            assert!(matches!(crate::step::step(&mut machine.core), crate::exception::Stop::Continue));
            steps += 1;
        }
        assert_eq!(steps, if other_tier.contains(&selector) { 2 } else { 0 }, "{selector:#x}");
        // The others stay as 80h + 80h left them.
        let flags = machine.u64(STACK - 8) & STATUS;
        let zero = if writable { rflags::ZF } else { 0 };
        assert_eq!(flags, rflags::CF | rflags::OF | rflags::PF | zero, "{selector:#x}");
        assert_eq!(machine.core.state.gpr[3] & 0xffff, u64::from(writable) * 0x0101, "{selector:#x}");
    }
}

// The assembler leaves out the prefix that makes the operand 16 bits wide.
guest!(bases:
    "mov eax, 0x80"
    "add al, 0x80"
    "mov rbx, 0x7fffffffffff"
    "wrfsbase rbx"
    "mov r12, -1"
    "wrgsbase r12d"
    "rdgsbase r13"
    "wrgsbase r12"
    "rdfsbase ecx"
    "mov r14, -1"
    ".byte 0x66"
    "mov r14w, es"
    "mov r15, -1"
    "mov r15d, ds"
    "mov rdx, fs"
    ".byte 0x66"
    "mov si, ss"
    "pushfq"
);

#[test]
fn selectors_and_bases_are_moved_without_the_other_tier() {
    let mut machine = Machine::new(bases);
    let state = &mut machine.core.state;
    for (number, segment) in state.segments.iter_mut().enumerate().filter(|(number, _)| *number != 1) {
        segment.selector = 0x1110 + number as u16 * 8;
    }
    state.gpr[6] = u64::MAX;
    machine.run();
    let state = &machine.core.state;
    assert_eq!(state.segments[crate::state::seg::FS].base, 0x7fff_ffff_ffff);
    assert_eq!(state.segments[crate::state::seg::GS].base, u64::MAX);
    assert_eq!(state.gpr[13], 0xffff_ffff);
    assert_eq!(state.gpr[1], 0xffff_ffff);
    assert_eq!(state.gpr[14], 0xffff_ffff_ffff_1110);
    assert_eq!(state.gpr[15], 0x1128);
    assert_eq!(state.gpr[2], 0x1130);
    assert_eq!(state.gpr[6], 0xffff_ffff_ffff_1120);
    // As 80h + 80h left them.
    assert_eq!(machine.u64(STACK - 8) & STATUS, rflags::CF | rflags::OF | rflags::PF | rflags::ZF);
}

#[test]
fn a_base_that_is_no_address_or_may_not_be_written_is_for_the_other_tier() {
    guest!(write: "nop" "wrfsbase r12");
    let mut machine = Machine::new(write);
    machine.core.state.gpr[12] = 1 << 47;
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_eq!(machine.core.state.rip, CODE + 1);
    let mut machine = Machine::new(write);
    machine.core.state.cr4 &= !cr4::FSGSBASE;
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_eq!(machine.core.state.rip, CODE + 1);
}

guest!(enable: "cli" "nop" "sti" "inc eax" "inc eax");

#[test]
fn interrupts_that_wait_are_let_in_by_the_other_tier() {
    let mut machine = Machine::new(enable);
    machine.core.pending.interrupt = Some(0x30);
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_eq!(machine.core.state.rip, CODE + 2);
    assert_eq!(machine.core.state.rflags & rflags::IF, 0);
}

#[test]
fn one_block_at_a_time() {
    let mut machine = Machine::new(sum);
    let mut count = 0;
    while machine.translator.run_block(&mut machine.core) == Outcome::Kicked {
        count += 1;
        assert!(count <= 1000);
    }
    assert_eq!(count, 1000);
    assert_eq!(machine.core.state.gpr[0], 500_500);
}

#[test]
fn a_full_cache_is_flushed_and_refilled() {
    let mut machine = Machine::new(far_jumps);
    let config = Config { code_cache_bytes: 4 * BLOCK_ROOM, single_cpu: false };
    machine.translator = Translator::new(&config).unwrap();
    // A chain of blocks, each a page long and full of memory operands.
    let mut at = 0x40_0000u64;
    for page in 0..64u64 {
        let mut bytes = vec![];
        while bytes.len() < 4000 {
            bytes.extend([0x48, 0xff, 0x05]); // inc qword [rip + disp]
            let next = at + bytes.len() as u64 + 4;
            bytes.extend((DATA.wrapping_sub(next) as u32).to_le_bytes());
        }
        bytes.push(0xe9);
        let next = at + bytes.len() as u64 + 4;
        let target = if page == 63 { CODE + 400 } else { at + 4096 };
        bytes.extend((target.wrapping_sub(next) as u32).to_le_bytes());
        machine.core.mmu.memory.write(at, &bytes).unwrap();
        at += 4096;
    }
    machine.core.mmu.memory.write(CODE + 400, &[0xf4]).unwrap();
    for _ in 0..3 {
        machine.core.state.rip = 0x40_0000;
        machine.run();
    }
    assert_eq!(machine.u64(DATA), 64 * 572 * 3);
    assert!(machine.translator.statistics().cache_flushes > 3);
}

guest!(barrier: "mov rdi, 0x300000" "mov dword ptr [rdi], 1" "lock add dword ptr [rsp - 4], 0" "mov eax, [rdi + 8]");

/// A device may look at the first word and write the second: the read must not come before the write, with one vCPU too.
#[test]
fn locked_accesses_stay_barriers_where_one_vcpu_has_no_peers() {
    for single_cpu in [false, true] {
        let mut machine = Machine::new(barrier);
        machine.translator = Translator::new(&Config { single_cpu, ..Config::default() }).unwrap();
        machine.run();
        let code = &machine.translator.generator.out.bytes;
        // LOCK, maybe a REX prefix, and ADD r/m32, imm8.
        let locked = |at: &[u8]| at[0] == 0xf0 && (at[1] == 0x83 || at[1] & 0xf0 == 0x40 && at[2] == 0x83);
        assert!(code.windows(3).any(locked), "one vCPU: {single_cpu}: {code:x?}");
    }
}

/// A REX prefix that is not the last prefix means nothing, and copying it would mean something else.
#[test]
fn prefixes_in_strange_orders_are_left_to_the_single_step_tier() {
    for prefixes in [&[0x42, 0x42][..], &[0x4c, 0x4c, 0x4c], &[0x48, 0x66], &[0x41, 0xf3], &[0x40, 0x2e]] {
        // add [rax], eax
        let code = [&[0x90], prefixes, &[0x01, 0x00, 0xf4]].concat();
        let mut machine = Machine::new(sum);
        machine.core.mmu.memory.write(CODE, &code).unwrap();
        machine.core.state.gpr[0] = DATA;
        assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
        assert_eq!(machine.core.state.rip, CODE + 1, "{prefixes:x?}");
        assert_eq!(machine.u64(DATA), 0);
    }
}

guest!(narrow_bit_string: "xor r13d, r13d" "mov r12, -1" "bts qword ptr fs:[r13d], r12");

#[test]
fn bit_strings_at_32_bit_addresses_are_left_to_the_single_step_tier() {
    let mut machine = Machine::new(narrow_bit_string);
    machine.core.state.segments[crate::state::seg::FS].base = DATA + 8;
    // The word is 4 GiB above DATA, not at DATA.
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_ne!(machine.bytes(machine.core.state.rip), [0xf4]);
    assert_eq!(machine.u64(DATA), 0);
}
