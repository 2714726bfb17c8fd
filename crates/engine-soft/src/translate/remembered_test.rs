//! What translated code remembers of translations, and when it must not use that any more.
#![allow(unsafe_code)]

use super::test::{CODE, DATA, Machine, STACK, guest};
use super::*;

/// Linear address of the page that the tests map to one place and another.
const MAPPED: u64 = 1 << 30;
const PRESENT_WRITE: u64 = 3;
const GLOBAL: u64 = 1 << 8;

guest!(load: "mov rax, [rbx]" "mov rcx, [rbx + 8]");

fn remap(machine: &mut Machine, physical: u64, flags: u64) {
    machine.core.mmu.memory.write(0x6000, &(physical | flags).to_le_bytes()).unwrap();
}

fn load_from(machine: &mut Machine, address: u64) -> u64 {
    machine.core.state.rip = CODE;
    machine.core.state.gpr[3] = address;
    machine.run();
    machine.core.state.gpr[0]
}

/// A machine whose mapped page has been read from so often that hints know it.
fn known(flags: u64) -> Machine {
    let mut machine = Machine::new(load);
    for (at, value) in [(DATA, 1u64), (DATA + 0x1000, 2)] {
        machine.core.mmu.memory.write(at, &value.to_le_bytes()).unwrap();
    }
    machine.map(MAPPED, DATA | flags);
    for _ in 0..3 {
        assert_eq!(load_from(&mut machine, MAPPED), 1);
    }
    machine
}

#[test]
fn an_invalidated_page_is_looked_up_again() {
    for flags in [PRESENT_WRITE, PRESENT_WRITE | GLOBAL] {
        let mut machine = known(flags);
        remap(&mut machine, DATA + 0x1000, flags);
        let core = &mut machine.core;
        core.mmu.invalidate_page(&mut core.state, MAPPED);
        assert_eq!(load_from(&mut machine, MAPPED), 2);
    }
}

#[test]
fn a_load_of_cr3_forgets_what_is_not_global() {
    let mut machine = known(PRESENT_WRITE);
    remap(&mut machine, DATA + 0x1000, PRESENT_WRITE);
    let core = &mut machine.core;
    core.mmu.load(&mut core.state, 0, false);
    assert_eq!(load_from(&mut machine, MAPPED), 2);
    let mut machine = known(PRESENT_WRITE | GLOBAL);
    remap(&mut machine, DATA + 0x1000, PRESENT_WRITE);
    let core = &mut machine.core;
    core.mmu.load(&mut core.state, 0, false);
    assert_eq!(
        load_from(&mut machine, MAPPED),
        1,
        "a global translation stays until INVLPG or a flush of all"
    );
    let core = &mut machine.core;
    core.mmu.flush_all(&mut core.state);
    assert_eq!(load_from(&mut machine, MAPPED), 2);
}

#[test]
fn addresses_that_are_none_are_for_the_single_step_tier() {
    let mut machine = known(PRESENT_WRITE | GLOBAL);
    for address in [1 << 47, 1 << 62, 1 << 63, u64::MAX - 3, MAPPED - 4, MAPPED + 0xff9 + (511 << 12)] {
        machine.core.state.rip = CODE;
        machine.core.state.gpr[3] = address;
        assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
        assert_eq!(machine.core.state.rip, CODE, "{address:#x}");
    }
}

/// As of a library that is there twice, of which one copy was changed.
#[test]
fn a_page_at_two_addresses_leads_to_what_is_behind_each() {
    let mut machine = Machine::new(load);
    machine.map(MAPPED, DATA | PRESENT_WRITE);
    // One page at two addresses, and behind it another page at each.
    for (index, page) in [(1, DATA + 0x1000), (16, DATA), (17, DATA + 0x2000)] {
        machine.core.mmu.memory.write(0x6000 + index * 8, &(page | PRESENT_WRITE).to_le_bytes()).unwrap();
    }
    // nop and jmp +0; mov eax, N; hlt
    machine.core.mmu.memory.write(DATA + 0xffd, &[0x90, 0xeb, 0]).unwrap();
    for copy in [1, 2] {
        machine.core.mmu.memory.write(DATA + u64::from(copy) * 0x1000, &[0xb8, copy, 0, 0, 0, 0xf4]).unwrap();
    }
    for copy in [1, 1, 1, 2, 2, 1, 2, 1] {
        machine.core.state.rip = MAPPED + (copy - 1) * 0x1_0000 + 0xffd;
        assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
        assert_eq!(machine.core.state.gpr[0], copy);
    }
}

guest!(store: "mov [rbx], rax");

#[test]
fn a_store_to_a_page_that_now_holds_code_is_heard() {
    let mut machine = Machine::new(store);
    // mov eax, 1; hlt
    machine.core.mmu.memory.write(DATA, &[0xb8, 1, 0, 0, 0, 0xf4]).unwrap();
    for _ in 0..3 {
        machine.core.state.rip = CODE;
        (machine.core.state.gpr[0], machine.core.state.gpr[3]) = (5, DATA + 0x800);
        machine.run();
    }
    machine.core.state.rip = DATA;
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 1);
    machine.core.state.rip = CODE;
    (machine.core.state.gpr[0], machine.core.state.gpr[3]) = (0xf400_0000_02b8, DATA);
    // The hint of the store no longer leads to the page: the store is not made unseen.
    assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
    assert_eq!(machine.core.state.rip, CODE);
    assert!(matches!(crate::step::step(&mut machine.core), crate::exception::Stop::Continue));
    machine.core.state.rip = DATA;
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 2);
}

#[test]
fn an_instruction_over_two_pages_is_made_again_when_either_changes() {
    let mut machine = Machine::new(load);
    // mov eax, imm32, with two bytes on the second page; hlt
    let at = DATA + 0xffd;
    for (offset, value) in [(1u64, 0x11u8), (2, 0x22), (3, 0x33), (4, 0x44)] {
        let mut bytes = [0xb8, 1, 2, 3, 4, 0xf4];
        machine.core.mmu.memory.write(at, &bytes).unwrap();
        machine.translator.written(&mut machine.core, at, 6);
        machine.core.state.rip = at;
        machine.run();
        assert_eq!(machine.core.state.gpr[0], 0x0403_0201);
        machine.core.mmu.memory.write(at + offset, &[value]).unwrap();
        machine.translator.written(&mut machine.core, at + offset, 1);
        machine.core.state.rip = at;
        machine.run();
        bytes[offset as usize] = value;
        let expected = u32::from_le_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        assert_eq!(machine.core.state.gpr[0], u64::from(expected));
    }
}

guest!(alternate:
    "mov ecx, 100000"
    "xor eax, eax"
    "mov rsi, 0x300000"
    "2: mov rdx, rcx"
    "and edx, 1"
    "shl edx, 12"
    "add rax, [rsi + rdx]"
    "dec ecx"
    "jnz 2b"
);

#[test]
fn an_access_that_changes_pages_each_time_finds_both() {
    let mut machine = Machine::new(alternate);
    machine.core.mmu.memory.write(DATA, &3u64.to_le_bytes()).unwrap();
    machine.core.mmu.memory.write(DATA + 0x1000, &5u64.to_le_bytes()).unwrap();
    machine.run();
    assert_eq!(machine.core.state.gpr[0], 50_000 * 8);
}

guest!(repeat: "cld" "rep movsb" "stc" "rep stosq" "setc bl");

#[test]
fn repeated_strings_go_over_pages_and_keep_flags() {
    let mut machine = Machine::new(repeat);
    let bytes: Vec<u8> = (0..10_000).map(|i| i as u8).collect();
    machine.core.mmu.memory.write(DATA + 5, &bytes).unwrap();
    let state = &mut machine.core.state;
    (state.gpr[6], state.gpr[7], state.gpr[1]) = (DATA + 5, DATA + 0x8003, 10_000);
    // Each stopped before RCX is zero: the single-step tier would do what crosses pages.
    loop {
        assert_eq!(machine.translator.run(&mut machine.core), Outcome::Step);
        if machine.core.mmu.memory.read_array::<1>(machine.core.state.rip).unwrap() == [0xf4] {
            break;
        }
        assert!(matches!(crate::step::step(&mut machine.core), crate::exception::Stop::Continue));
    }
    let mut copied = vec![0; 10_000];
    machine.core.mmu.memory.read(DATA + 0x8003, &mut copied).unwrap();
    assert_eq!(copied, bytes);
    let state = &machine.core.state;
    assert_eq!((state.gpr[6], state.gpr[7], state.gpr[1]), (DATA + 5 + 10_000, DATA + 0x8003 + 10_000, 0));
    assert_eq!((state.gpr[3] as u8, state.gpr[4]), (1, STACK), "no element, no change of flags");
}

#[test]
fn address_spaces_are_kept_apart_by_pcid() {
    let mut machine = known(PRESENT_WRITE);
    let user = |machine: &mut Machine, physical: u64| {
        for (at, entry) in [(0x1000, 0x2007u64), (0x2008, 0x5007), (0x5000, 0x6007)] {
            machine.core.mmu.memory.write(at, &entry.to_le_bytes()).unwrap();
        }
        remap(machine, physical, 7);
    };
    let resolve = |machine: &mut Machine| {
        let core = &mut machine.core;
        let known = Mmu::lookup(&core.state, MAPPED, 8, false, true);
        let found = core.mmu.resolve(&mut core.state, MAPPED, Access::Read, Privilege::User).unwrap();
        (known.is_some(), found.physical)
    };
    machine.core.state.cr4 |= cr4::PCIDE;
    let load = |machine: &mut Machine, pcid, keep| {
        let core = &mut machine.core;
        core.mmu.load(&mut core.state, pcid, keep);
        core.mmu.generation()
    };
    let first = load(&mut machine, 1, false);
    user(&mut machine, DATA);
    assert_eq!(resolve(&mut machine), (false, DATA));
    let second = load(&mut machine, 2, false);
    assert_ne!(first, second);
    assert_eq!(resolve(&mut machine), (false, DATA), "nothing of PCID 1 is used for PCID 2");
    assert_eq!(load(&mut machine, 1, true), first);
    assert_eq!(resolve(&mut machine), (true, DATA));
    // INVLPG, INVPCID, and a load that does not keep.
    let core = &mut machine.core;
    core.mmu.invalidate_page(&mut core.state, MAPPED);
    assert!(!resolve(&mut machine).0);
    load(&mut machine, 2, true);
    let core = &mut machine.core;
    core.mmu.flush_pcid(&mut core.state, 1);
    assert_ne!(load(&mut machine, 1, true), first);
    assert!(!resolve(&mut machine).0);
    load(&mut machine, 2, true);
    load(&mut machine, 1, false);
    assert!(!resolve(&mut machine).0);
    // More address spaces than are held.
    for pcid in 3..20 {
        load(&mut machine, pcid, true);
        assert!(!resolve(&mut machine).0, "PCID {pcid}");
    }
    load(&mut machine, 1, true);
    assert!(!resolve(&mut machine).0);
}
