//! Exceptions, interrupts, returns.

use super::*;
use crate::exception::Exception;
use crate::state::Shadow;
use cpu::{cr0, efer, rflags};

guest!(load: "mov rax, [rbx]");
guest!(store: "mov [rbx], rax");

#[test]
fn page_faults_tell_why_and_where() {
    // (entry, write, user) -> error code
    for (entry, write, user, code) in [
        (0u64, false, false, 0u64),
        (0, true, false, 2),
        (0, false, true, 4),
        (0x30_0003, false, true, 5),
        (0x30_0005, true, true, 7),
        (0x30_0005, true, false, 3),
        (0x30_0007 | 1 << 51, false, false, 9),
    ] {
        let mut machine = Machine::new(if write { store } else { load });
        machine.map(0x4000_0000, entry);
        machine.core.state.gpr[3] = 0x4000_0ff8;
        let cpl3 = user;
        if cpl3 {
            machine.user();
        }
        assert_eq!(machine.fault(), 14);
        assert_eq!(machine.frame(0), code, "entry {entry:#x} write {write} user {user}");
        assert_eq!(machine.core.state.cr2, 0x4000_0ff8);
        assert_eq!(machine.frame(1), CODE);
        assert_eq!(machine.frame(3) & rflags::RF, rflags::RF);
    }
}

#[test]
fn a_store_across_pages_faults_before_the_first_byte() {
    let mut machine = Machine::new(store);
    machine.map(0x4000_0000, 0x30_0003);
    machine.core.state.gpr[0] = u64::MAX;
    machine.core.state.gpr[3] = 0x4000_0ffc;
    assert_eq!(machine.fault(), 14);
    assert_eq!(machine.core.state.cr2, 0x4000_1000);
    assert_eq!(machine.u32(DATA + 0xffc), 0);
}

#[test]
fn no_execute_and_supervisor_pages_are_not_fetched() {
    let mut machine = Machine::with_bytes(&[]);
    machine.map(0x4000_0000, 0x10_0003 | 1 << 63);
    machine.core.state.rip = 0x4000_0000;
    assert_eq!(machine.fault(), 14);
    assert_eq!(machine.frame(0), 0x11);
    let mut machine = Machine::with_bytes(&[]);
    machine.map(0x4000_0000, 0x10_0003);
    machine.core.state.rip = 0x4000_0000;
    machine.user();
    assert_eq!(machine.fault(), 14);
    assert_eq!(machine.frame(0), 0x15);
}

guest!(to_kernel: "int 0x20");

#[test]
fn an_interrupt_from_user_mode_gets_the_stack_of_the_tss() {
    let mut machine = Machine::new(to_kernel);
    machine.gate(0x20, 0xee, 0);
    machine.core.state.gpr[4] = STACK + 3;
    machine.user();
    assert_eq!(machine.fault(), 0x20);
    assert_eq!(machine.core.state.gpr[4], RSP0 - 40);
    assert_eq!(machine.core.state.cpl(), 0);
    assert_eq!(machine.core.state.segments[seg::SS].selector, 0);
    assert_eq!(machine.frame(0), CODE + 2);
    assert_eq!(machine.frame(1), u64::from(selector::USER_CODE64));
    assert_eq!(machine.frame(3), STACK + 3);
    assert_eq!(machine.frame(4), u64::from(selector::USER_DATA));
}

#[test]
fn int_n_through_a_kernel_gate_is_refused_to_user_mode() {
    let mut machine = Machine::new(to_kernel);
    machine.user();
    assert_eq!(machine.fault(), 13);
    assert_eq!(machine.frame(0), 0x20 * 8 + 2);
    assert_eq!(machine.frame(1), CODE);
}

#[test]
fn without_change_of_level_the_stack_is_aligned_and_ss_kept() {
    let mut machine = Machine::new(to_kernel);
    machine.core.state.gpr[4] = STACK + 9;
    assert_eq!(machine.fault(), 0x20);
    assert_eq!(machine.core.state.gpr[4], STACK - 40);
    assert_eq!(machine.frame(3), STACK + 9);
    assert_eq!(machine.core.state.segments[seg::SS].selector, selector::DATA);
}

#[test]
fn ist_switches_the_stack_at_the_same_level() {
    let mut machine = Machine::new(to_kernel);
    machine.gate(0x20, 0x8e, 1);
    assert_eq!(machine.fault(), 0x20);
    assert_eq!(machine.core.state.gpr[4], IST1 - 40);
}

guest!(undefined: "ud2");

#[test]
fn faults_inside_delivery_end_in_double_fault_and_shutdown() {
    // #UD whose gate is not present: #NP. Its error code names the gate and says EXT.
    let mut machine = Machine::new(undefined);
    machine.gate(6, 0x0e, 0);
    assert_eq!(machine.fault(), 11);
    assert_eq!(machine.frame(0), 6 * 8 + 3);
    // #GP (contributory) whose gate is missing as well: #DF.
    let mut machine = Machine::new(to_kernel);
    machine.user();
    machine.gate(13, 0x0e, 0);
    assert_eq!(machine.fault(), 8);
    assert_eq!(machine.frame(0), 0);
    // And without a gate for that: shutdown.
    let mut machine = Machine::new(to_kernel);
    machine.user();
    machine.gate(13, 0x0e, 0);
    machine.gate(8, 0x0e, 0);
    assert_eq!(machine.run(), Exit::Shutdown);
}

guest!(iretq_user: "push 0x2b" "push 0x250000" "push 0x3202" "push 0x33" "push 0x100200" "iretq");

#[test]
fn iretq_goes_to_user_mode() {
    let mut machine = Machine::new(iretq_user);
    machine.core.state.segments[seg::DS].attr = attr::DATA;
    for _ in 0..6 {
        machine.step();
    }
    let state = &machine.core.state;
    assert_eq!((state.rip, state.gpr[4], state.cpl()), (0x10_0200, 0x25_0000, 3));
    assert_eq!(state.rflags, 0x3202);
    assert_eq!(state.segments[seg::DS].attr, 0, "a DPL 0 segment was left to user mode");
}

guest!(iretq_16: "push 0x38" "push 0x12345678" "push 0x2" "push 0x08" "push 0x100200" "iretq");

#[test]
fn iretq_to_a_16_bit_stack_segment_is_64_bit_code_still() {
    let mut machine = Machine::new(iretq_16);
    for _ in 0..6 {
        machine.step();
    }
    // 64-bit code uses all of RSP whatever SS says.
    assert_eq!(machine.core.state.gpr[4], 0x1234_5678);
    assert_eq!(machine.core.state.segments[seg::SS].selector, selector::DATA16);
}

guest!(iretq_compat16: "push 0x3b" "push 0x12345678" "push 0x2" "push 0x23" "push 0x100200" "iretq");

#[test]
fn iretq_to_compatibility_mode_with_a_16_bit_stack_keeps_the_upper_half_of_rsp() {
    let mut machine = Machine::new(iretq_compat16);
    machine.write_u64(GDT + 0x38, 0x0000_f300_0000_ffff);
    for _ in 0..6 {
        machine.step();
    }
    assert_eq!(machine.core.state.gpr[4] & 0xffff_ffff, (STACK - 40) & 0xffff_0000 | 0x5678);
}

#[test]
fn iretq_refuses_what_it_must() {
    for (cs, rip, flags_nt, code) in [
        (0u64, 0x10_0200u64, false, 0u64),
        (0x10, 0x10_0200, false, 0x10),
        (0x33, 1 << 47, false, 0),
        (0x08, 0x10_0200, true, 0),
        (0x1000, 0x10_0200, false, 0x1000),
    ] {
        let mut machine = Machine::with_bytes(&[0x48, 0xcf]);
        for (n, value) in [rip, cs, 2, STACK, 0x2b].into_iter().enumerate() {
            machine.write_u64(STACK - 64 + 8 * n as u64, value);
        }
        machine.core.state.gpr[4] = STACK - 64;
        if flags_nt {
            machine.core.state.rflags |= rflags::NT;
        }
        assert_eq!(machine.fault(), 13);
        assert_eq!(machine.frame(0), code, "cs {cs:#x}");
        assert_eq!(machine.frame(4), STACK - 64, "RSP moved");
    }
}

guest!(syscall_there: "syscall" "nop");
guest!(sysret_back: "sysretq");

#[test]
fn syscall_and_sysret_make_a_round_trip() {
    let mut machine = Machine::new(syscall_there);
    let back = CODE + 2;
    machine.write(0x10_1000, &[0x48, 0x0f, 0x07]);
    let state = &mut machine.core.state;
    state.efer |= efer::SCE;
    state.msrs.star = u64::from(selector::CODE64) << 32 | 0x23 << 48;
    state.msrs.lstar = 0x10_1000;
    state.msrs.sfmask = rflags::IF | rflags::DF;
    state.rflags = 0x602;
    machine.user();
    machine.step();
    let state = &machine.core.state;
    assert_eq!((state.rip, state.gpr[1], state.gpr[11]), (0x10_1000, back, 0x602));
    assert_eq!((state.cpl(), state.rflags), (0, 2));
    machine.step();
    let state = &machine.core.state;
    assert_eq!((state.rip, state.cpl(), state.rflags), (back, 3, 0x602));
    assert_eq!(state.segments[seg::CS].selector, 0x33);
    assert_eq!(state.segments[seg::SS].selector, 0x2b);
    assert!(state.code64());
}

#[test]
fn single_step_over_system_calls_counts_as_they_leave_it() {
    let mut machine = Machine::new(syscall_there);
    machine.write(0x10_1000, &[0x90, 0x48, 0x0f, 0x07]);
    let state = &mut machine.core.state;
    state.efer |= efer::SCE;
    state.msrs.star = u64::from(selector::CODE64) << 32 | 0x23 << 48;
    state.msrs.lstar = 0x10_1000;
    state.msrs.sfmask = rflags::TF;
    state.rflags |= rflags::TF;
    machine.user();
    machine.step();
    assert_eq!((machine.core.state.rip, machine.core.state.cpl()), (0x10_1000, 0), "no trap");
    machine.step();
    machine.step();
    assert_eq!(machine.core.state.rip, HANDLERS + 16);
    assert_eq!(machine.frame(0), CODE + 2, "before the program goes on");
}

#[test]
fn sysret_to_a_non_canonical_address_faults_where_the_vendor_says() {
    let mut machine = Machine::new(sysret_back);
    machine.core.state.msrs.star = 0x23 << 48;
    machine.core.state.gpr[1] = 1 << 47;
    machine.core.state.gpr[11] = 2;
    assert_eq!(machine.fault(), 13);
    let level = machine.frame(2) & 3;
    assert_eq!(level, if machine.core.amd { 3 } else { 0 });
}

guest!(shadow: "sti" "nop" "nop");

#[test]
fn sti_holds_interrupts_back_for_one_instruction() {
    let mut machine = Machine::new(shadow);
    machine.core.pending.interrupt = Some(0x25);
    machine.step();
    assert_eq!(machine.core.state.shadow, Shadow::Sti);
    assert!(matches!(machine.core.deliver_pending(), Stop::Continue));
    assert_eq!(machine.core.state.rip, CODE + 1);
    assert_eq!(machine.fault(), 0x25);
    assert_eq!(machine.frame(0), CODE + 2);
    assert_eq!(machine.core.state.rflags & rflags::IF, 0);
}

#[test]
fn nmis_wait_for_iret() {
    let mut machine = Machine::new(shadow);
    machine.core.pending.nmi = true;
    machine.core.deliver_pending();
    assert_eq!(machine.core.state.rip, HANDLERS + 32);
    machine.core.pending.nmi = true;
    machine.core.deliver_pending();
    assert_eq!(machine.core.state.rip, HANDLERS + 32, "nested");
    machine.write(HANDLERS + 32, &[0x48, 0xcf]);
    machine.step();
    assert_eq!(machine.core.state.rip, CODE);
    machine.core.deliver_pending();
    assert_eq!(machine.core.state.rip, HANDLERS + 32);
}

#[test]
fn hlt_ends_with_an_interrupt() {
    let mut machine = Machine::with_bytes(&[0xf4, 0x90]);
    machine.core.state.rflags |= rflags::IF;
    assert_eq!(machine.run(), Exit::Halt);
    machine.core.pending.interrupt = Some(0x30);
    machine.core.deliver_pending();
    assert!(!machine.core.state.halted);
    assert_eq!(machine.frame(0), CODE + 1);
}

#[test]
fn single_step_traps_after_each_instruction_but_not_behind_mov_ss() {
    let mut machine = Machine::with_bytes(&[0x90, 0x90]);
    machine.core.state.rflags |= rflags::TF;
    machine.step();
    assert_eq!(machine.core.state.rip, HANDLERS + 16);
    assert_eq!(machine.frame(0), CODE + 1);
    assert_eq!(machine.core.state.dr6 & 1 << 14, 1 << 14);
    assert_eq!(machine.core.state.rflags & rflags::TF, 0);
    // mov ss, eax; nop
    let mut machine = Machine::with_bytes(&[0x8e, 0xd0, 0x90]);
    machine.core.state.gpr[0] = u64::from(selector::DATA);
    machine.core.state.rflags |= rflags::TF;
    machine.step();
    assert_eq!(machine.core.state.rip, CODE + 2);
    machine.step();
    assert_eq!(machine.frame(0), CODE + 3);
}

#[test]
fn breakpoints_on_code_fault_and_on_data_trap() {
    let mut machine = Machine::new(store);
    machine.core.state.dr = [CODE, DATA, 0, 0];
    machine.core.state.dr7 = 0x400 | 1 | 1 << 2 | (1 | 3 << 2) << 20;
    machine.core.state.gpr[3] = DATA + 2;
    machine.step();
    assert_eq!((machine.core.state.rip, machine.core.state.dr6 & 15), (HANDLERS + 16, 1));
    assert_eq!(machine.frame(0), CODE);
    // The handler returns with RF: the instruction runs, and its store traps.
    machine.write(HANDLERS + 16, &[0x48, 0xcf]);
    let flags = machine.core.state.gpr[4] + 16;
    machine.write_u64(flags, 2 | rflags::RF);
    machine.step();
    machine.core.state.dr6 = 0;
    machine.step();
    assert_eq!((machine.core.state.rip, machine.core.state.dr6 & 15), (HANDLERS + 16, 2));
    assert_eq!(machine.frame(0), CODE + 3);
}

#[test]
fn control_registers_refuse_reserved_and_impossible_values() {
    let cr = |bytes: &[u8], value: u64| {
        let mut machine = Machine::with_bytes(bytes);
        machine.core.state.gpr[0] = value;
        machine.step();
        machine.core.state.rip
    };
    const TO_CR0: &[u8] = &[0x0f, 0x22, 0xc0];
    const TO_CR3: &[u8] = &[0x0f, 0x22, 0xd8];
    const TO_CR4: &[u8] = &[0x0f, 0x22, 0xe0];
    let gp = HANDLERS + 13 * 16;
    assert_eq!(cr(TO_CR0, cr0::PG), gp, "PG without PE");
    assert_eq!(cr(TO_CR0, cr0::PE | cr0::PG | cr0::NW), gp, "NW without CD");
    assert_eq!(cr(TO_CR0, 1 << 32), gp);
    assert_eq!(cr(TO_CR0, cr0::PE), gp, "paging off in 64-bit code");
    assert_eq!(cr(TO_CR4, 0), gp, "PAE off in long mode");
    assert_eq!(cr(TO_CR4, cpu::cr4::PAE | 1 << 63), gp);
    assert_eq!(cr(TO_CR3, 1 << 60), gp);
    assert_eq!(cr(TO_CR0, cr0::PE | cr0::PG | cr0::ET), CODE + 3);
    assert_eq!(cr(TO_CR4, cpu::cr4::PAE), CODE + 3);
}

#[test]
fn raise_sets_the_error_code_of_the_exception() {
    let mut machine = Machine::with_bytes(&[0x90]);
    machine.core.raise(Exception::gp(0x1234));
    assert_eq!(machine.core.state.rip, HANDLERS + 13 * 16);
    assert_eq!(machine.frame(0), 0x1234);
}
