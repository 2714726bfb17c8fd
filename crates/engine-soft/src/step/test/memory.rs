//! String instructions, segments, the stack.

use super::*;
use cpu::rflags;

guest!(copy: "rep movsb");

#[test]
fn rep_movs_that_faults_half_way_can_go_on() {
    let mut machine = Machine::new(copy);
    machine.map(0x4000_0000, 0x31_0003);
    machine.write(DATA, &[0xab; 0x2000]);
    let state = &mut machine.core.state;
    (state.gpr[6], state.gpr[7], state.gpr[1]) = (DATA + 5, 0x4000_0f00, 0x1000);
    assert_eq!(machine.fault(), 14);
    let state = &machine.core.state;
    assert_eq!((state.gpr[6], state.gpr[7], state.gpr[1]), (DATA + 0x105, 0x4000_1000, 0xf00));
    assert_eq!(state.cr2, 0x4000_1000);
    assert_eq!(machine.frame(1), CODE);
    // The handler maps the page and returns.
    machine.write_u64(0x6008, 0x31_1003);
    machine.write(HANDLERS + 14 * 16, &[0x58, 0x48, 0xcf]);
    machine.core.state.rip = HANDLERS + 14 * 16;
    machine.finish();
    assert_eq!(machine.bytes::<0x1000>(0x31_0f00), [0xab; 0x1000]);
    assert_eq!(machine.core.state.gpr[1], 0);
}

#[test]
fn overlapping_copies_repeat_as_bytes_do() {
    for (apart, backwards) in [(1i64, false), (3, false), (-3, false), (3, true), (-1, true)] {
        let mut machine = Machine::new(copy);
        let pattern: [u8; 64] = std::array::from_fn(|n| n as u8);
        machine.write(DATA + 64, &pattern);
        let mut expected: [u8; 256] = machine.bytes(DATA);
        let start = if backwards { 127 } else { 64 };
        let (mut from, mut to) = (start, (start as i64 + apart) as usize);
        for _ in 0..40 {
            expected[to] = expected[from];
            if backwards {
                (from, to) = (from - 1, to - 1);
            } else {
                (from, to) = (from + 1, to + 1);
            }
        }
        let state = &mut machine.core.state;
        if backwards {
            state.rflags |= rflags::DF;
        }
        state.gpr[6] = DATA + start as u64;
        state.gpr[7] = (DATA + start as u64).wrapping_add_signed(apart);
        state.gpr[1] = 40;
        machine.finish();
        assert_eq!(machine.bytes::<256>(DATA), expected, "{apart} {backwards}");
    }
}

guest!(fill: "rep stosw");
guest!(find: "repne scasb");
guest!(equal: "repe cmpsb");

#[test]
fn fills_scans_and_compares() {
    let mut machine = Machine::new(fill);
    let state = &mut machine.core.state;
    (state.gpr[0], state.gpr[7], state.gpr[1]) = (0x1234, DATA + 1, 0x1801);
    machine.finish();
    assert_eq!(machine.core.state.gpr[7], DATA + 1 + 0x3002);
    assert_eq!(machine.bytes::<4>(DATA), [0, 0x34, 0x12, 0x34]);
    assert_eq!(machine.bytes::<4>(DATA + 0x3001), [0x34, 0x12, 0, 0]);

    let mut machine = Machine::new(find);
    machine.write(DATA, b"needle in a haystack");
    let state = &mut machine.core.state;
    (state.gpr[0], state.gpr[7], state.gpr[1]) = (u64::from(b'y'), DATA, 100);
    machine.finish();
    assert_eq!(machine.core.state.gpr[7], DATA + 15);
    assert_eq!(machine.core.state.gpr[1], 85);

    let mut machine = Machine::new(equal);
    machine.write(DATA, b"same same other");
    machine.write(DATA + 0x100, b"same same Other");
    let state = &mut machine.core.state;
    (state.gpr[6], state.gpr[7], state.gpr[1]) = (DATA, DATA + 0x100, 15);
    machine.finish();
    let state = &machine.core.state;
    assert_eq!((state.gpr[1], state.gpr[6]), (4, DATA + 11));
    // 'o' - 'O' = 0x20.
    assert_eq!(state.rflags & rflags::STATUS, 0);
}

#[test]
fn a_long_repeat_can_be_interrupted() {
    let mut machine = Machine::new(copy);
    let state = &mut machine.core.state;
    (state.gpr[6], state.gpr[7], state.gpr[1]) = (DATA, DATA + 0x10_0000, 0x10_0000);
    state.doorbell.ring(1);
    machine.step();
    let state = &machine.core.state;
    assert_eq!(state.rip, CODE);
    assert!(state.gpr[1] > 0 && state.gpr[1] < 0x10_0000);
    assert_eq!(state.gpr[6] - DATA, 0x10_0000 - state.gpr[1]);
}

guest!(loads: "mov ds, eax" "mov eax, 0x2b" "mov es, eax" "mov eax, 0x1000" "mov fs, eax");

#[test]
fn segment_loads_check_their_descriptors() {
    let mut machine = Machine::new(loads);
    // Not accessed yet.
    machine.write_u64(GDT + 0x28, 0x00cf_f200_0000_ffff);
    machine.core.state.gpr[0] = 0;
    assert_eq!(machine.fault(), 13);
    assert_eq!(machine.frame(0), 0x1000);
    assert_eq!(machine.core.state.segments[seg::DS].attr, 0);
    assert_eq!(machine.core.state.segments[seg::ES].selector, 0x2b);
    assert_eq!(machine.u64(GDT + 0x28), 0x00cf_f300_0000_ffff, "the accessed bit");
}

guest!(stack: "push rsp" "pop rax" "push qword ptr [rsp - 8]" "pop qword ptr [rsp + 8]" "enter 0x20, 0" "leave" "pushfq" "pop rbx");

#[test]
fn the_stack_pointer_as_operand() {
    let mut machine = Machine::new(stack);
    machine.write_u64(STACK - 8, 0x77);
    machine.finish();
    assert_eq!(machine.core.state.gpr[0], STACK);
    // POP computes its address after the increment.
    assert_eq!(machine.u64(STACK + 8), STACK);
    assert_eq!(machine.core.state.gpr[4], STACK);
    assert_eq!(machine.core.state.gpr[3] & 2, 2);
}

#[test]
fn popf_changes_only_what_the_level_may() {
    for (user, iopl, expected) in
        [(false, 0u64, rflags::IF | rflags::IOPL), (true, 0, 0), (true, 3 << 12, rflags::IF | 3 << 12)]
    {
        let mut machine = Machine::with_bytes(&[0x9d, 0xf4]);
        machine.core.state.gpr[4] = STACK - 8;
        machine.write_u64(STACK - 8, rflags::IF | rflags::IOPL);
        machine.core.state.rflags |= iopl;
        if user {
            machine.user();
        }
        machine.step();
        assert_eq!(machine.core.state.rflags & (rflags::IF | rflags::IOPL), expected);
    }
}

#[test]
fn writes_to_code_pages_are_told() {
    let mut machine = Machine::with_bytes(&[0xc7, 0x03, 1, 0, 0, 0, 0xf3, 0xaa, 0xf4]);
    let core = &mut machine.core;
    core.mmu.protect_code(&mut core.state, DATA);
    core.state.gpr[3] = DATA + 0x10;
    core.state.gpr[7] = DATA + 0x20;
    core.state.gpr[1] = 0x30;
    machine.finish();
    assert_eq!(machine.core.code_writes, [(DATA + 0x10, 4), (DATA + 0x20, 0x30)]);
}
