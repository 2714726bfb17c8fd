//! Real, protected, compatibility and long mode.

use super::*;
use cpu::{Registers, cr0, efer};

/// Real mode at 0x8000, as after a start-up IPI to vector 8.
fn real_mode(machine: &mut Machine) {
    let mut registers = Registers::default();
    registers.segments[seg::CS] = Segment { base: 0x8000, limit: 0xffff, selector: 0x800, attr: 0x9b };
    registers.rip = 0;
    registers.gpr[4] = 0x7000;
    machine.core.state.set_registers(&registers);
    machine.core.mmu.flush_all(&mut machine.core.state);
}

#[test]
fn real_to_protected_to_long_mode() {
    let mut machine = Machine::with_bytes(&[]);
    // 16-bit: lgdt [0x60]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 0x18:0x8020
    machine.write(
        0x8000,
        &[
            0x66, 0x2e, 0x0f, 0x01, 0x16, 0x60, 0x00, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0x66,
            0xea, 0x20, 0x80, 0x00, 0x00, 0x18, 0x00,
        ],
    );
    machine.write(0x8060, &0x47u16.to_le_bytes());
    machine.write(0x8062, &(GDT as u32).to_le_bytes());
    // 32-bit: mov eax, 0x10; mov ss, eax; mov ds, eax; inc eax; push 0x1234; pop ebx; mov eax, 0x20; mov cr4, eax;
    // mov eax, 0x1000; mov cr3, eax; mov ecx, 0xc0000080; rdmsr; bts eax, 8; wrmsr;
    // mov eax, cr0; bts eax, 31; mov cr0, eax; jmp 0x08:0x8100
    machine.write(
        0x8020,
        &[
            0xb8, 0x10, 0, 0, 0, 0x8e, 0xd0, 0x8e, 0xd8, 0x40, 0x68, 0x34, 0x12, 0, 0, 0x5b, 0xb8, 0x20, 0,
            0, 0, 0x0f, 0x22, 0xe0, 0xb8, 0x00, 0x10, 0, 0, 0x0f, 0x22, 0xd8, 0xb9, 0x80, 0, 0, 0xc0, 0x0f,
            0x32, 0x0f, 0xba, 0xe8, 0x08, 0x0f, 0x30, 0x0f, 0x20, 0xc0, 0x0f, 0xba, 0xe8, 0x1f, 0x0f, 0x22,
            0xc0, 0xea, 0x00, 0x81, 0, 0, 0x08, 0x00,
        ],
    );
    // 64-bit: mov rax, 0x1122334455667788; hlt
    machine.write(0x8100, &[0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xf4]);
    real_mode(&mut machine);
    assert_eq!(machine.run(), Exit::Halt);
    let state = &machine.core.state;
    assert_eq!(state.rip, 0x810b);
    assert_eq!(state.gpr[0], 0x1122_3344_5566_7788);
    assert_eq!(state.gpr[3], 0x1234);
    assert!(state.code64());
    assert_eq!(state.efer & (efer::LME | efer::LMA), efer::LME | efer::LMA);
    assert_eq!(state.cr0 & (cr0::PE | cr0::PG), cr0::PE | cr0::PG);
}

#[test]
fn real_mode_interrupts_go_through_the_vector_table() {
    let mut machine = Machine::with_bytes(&[]);
    // int 0x21; hlt  --  handler at 0x900:0x10: iret
    machine.write(0x8000, &[0xcd, 0x21, 0xf4]);
    machine.write(0x21 * 4, &[0x10, 0x00, 0x00, 0x09]);
    machine.write(0x9010, &[0xcf]);
    real_mode(&mut machine);
    machine.core.state.idtr = DescriptorTable { base: 0, limit: 0x3ff };
    machine.core.state.rflags |= cpu::rflags::IF;
    machine.step();
    let state = &machine.core.state;
    assert_eq!((state.segments[seg::CS].base, state.rip, state.gpr[4]), (0x9000, 0x10, 0x6ffa));
    assert_eq!(state.rflags & cpu::rflags::IF, 0);
    machine.step();
    let state = &machine.core.state;
    assert_eq!((state.segments[seg::CS].selector, state.rip, state.gpr[4]), (0x800, 2, 0x7000));
    assert_eq!(state.rflags & cpu::rflags::IF, cpu::rflags::IF);
}

/// 32-bit code at CPL 3 in compatibility mode.
fn compatibility(code: &[u8]) -> Machine {
    let mut machine = Machine::with_bytes(code);
    machine.user();
    machine.core.state.segments[seg::CS] =
        Segment { base: 0, limit: u32::MAX, selector: selector::USER_CODE32, attr: 0xc0fb };
    for segment in [seg::DS, seg::ES] {
        machine.core.state.segments[segment] = machine.core.state.segments[seg::SS];
    }
    machine
}

#[test]
fn compatibility_mode_runs_32_bit_code() {
    // inc ecx; dec edx; pusha; popa; mov eax, [0x300000]; daa; lea esi, [eax + ecx*4]; aam; les ebx, [0x300010];
    // int 0x80
    let mut machine = compatibility(&[
        0x41, 0x4a, 0x60, 0x61, 0xa1, 0x00, 0x00, 0x30, 0x00, 0x27, 0x8d, 0x34, 0x88, 0xd4, 0x0a, 0xc4, 0x1d,
        0x10, 0x00, 0x30, 0x00, 0xcd, 0x30,
    ]);
    machine.gate(0x30, 0xee, 0);
    machine.write(DATA, &0x1au32.to_le_bytes());
    machine.write(DATA + 0x10, &[0x44, 0x33, 0x22, 0x11, 0x2b, 0x00]);
    machine.core.state.gpr[1] = 0xffff_ffff;
    machine.core.state.gpr[2] = 0;
    assert_eq!(machine.fault(), 0x30);
    let state = &machine.core.state;
    assert_eq!(state.gpr[1], 0, "INC wraps at 32 bits");
    assert_eq!(state.gpr[2], 0xffff_ffff);
    assert_eq!(state.gpr[6], 0x20, "DAA of 1Ah");
    assert_eq!(state.gpr[0] & 0xffff, 0x0302, "AAM of 20h");
    assert_eq!(state.gpr[3], 0x1122_3344);
    assert_eq!(machine.frame(1), u64::from(selector::USER_CODE32));
    assert!(machine.core.state.code64());
}

#[test]
fn segment_limits_hold_in_32_bit_code() {
    let mut machine = compatibility(&[0xa1, 0xfd, 0x0f, 0x00, 0x00]);
    machine.core.state.segments[seg::DS].limit = 0xfff;
    assert_eq!(machine.fault(), 13);
    let mut machine = compatibility(&[0xa1, 0xfc, 0x0f, 0x00, 0x00, 0x90]);
    machine.core.state.segments[seg::DS].limit = 0xfff;
    machine.step();
    assert_eq!(machine.core.state.rip, CODE + 5);
}

#[test]
fn a_limit_counts_for_code_that_ran_before_too() {
    let mut machine = compatibility(&[0x90, 0x90]);
    machine.step();
    machine.core.state.rip = CODE;
    machine.core.state.segments[seg::CS].limit = CODE as u32 - 1;
    assert_eq!(machine.fault(), 13);
}

/// 32-bit code in legacy mode, with 4 MiB pages: the page directory is at 0x7000, and a table at 0x8000.
fn legacy(code: &[u8]) -> Machine {
    let mut machine = compatibility(code);
    machine.write(0x7000, &0x83u32.to_le_bytes());
    machine.write(0x7004, &0x8007u32.to_le_bytes());
    machine.write(0x8004, &(DATA as u32 | 7).to_le_bytes());
    let state = &mut machine.core.state;
    state.efer = 0;
    state.cr4 = cpu::cr4::PSE;
    state.cr3 = 0x7000;
    for segment in [seg::CS, seg::SS] {
        state.segments[segment].attr &= !(3 << 5);
    }
    machine.core.mmu.flush_all(&mut machine.core.state);
    machine
}

/// No task is linked to, and no gate leads to a handler.
#[test]
fn a_return_to_a_task_that_is_none_is_the_programs_fault() {
    let mut machine = legacy(&[0xcf]);
    machine.core.state.rflags |= cpu::rflags::NT;
    machine.core.state.idtr.limit = 0;
    assert_eq!(machine.run(), Exit::Shutdown);
}

#[test]
fn legacy_paging_translates_with_two_levels() {
    let mut machine = legacy(&[0xa1, 0x34, 0x12, 0x40, 0x00]);
    machine.write(DATA + 0x234, &0xcafe_f00du32.to_le_bytes());
    machine.step();
    assert_eq!(machine.core.state.gpr[0], 0xcafe_f00d);
    assert_eq!(machine.u32(0x8004) & 0x60, 0x20, "accessed, not dirty");
}
