//! The guest: all cases in one program, assembled into this test.
//!
//! Unsafe, because its bytes are found by linker symbols.
#![allow(unsafe_code)]

use crate::engines::elf::{BASE, elf64};

/// Where the program is in the file: after a jump into it.
const AT: u64 = 0x40;

macro_rules! cases {
    ($($name:ident)*) => {
        core::arch::global_asm!(
            ".pushsection .rodata.yado_agreement, \"a\"",
            ".balign 64",
            ".globl yado_agreement_start",
            "yado_agreement_start:",
            $(concat!(".globl ", stringify!($name)),)*
            include_str!("prologue.s"),
            include_str!("faults.s"),
            include_str!("paging.s"),
            include_str!("modes.s"),
            include_str!("interrupts.s"),
            include_str!("devices.s"),
            include_str!("registers.s"),
            include_str!("processors.s"),
            ".globl yado_entry",
            ".globl yado_agreement_end",
            "yado_agreement_end:",
            ".popsection",
            options(raw)
        );
        unsafe extern "C" {
            static yado_agreement_start: u8;
            static yado_agreement_end: u8;
            static yado_entry: u8;
            $(static $name: u8;)*
        }
        /// The place of a case.
        fn place(name: &str) -> *const u8 {
            match name {
                $(stringify!($name) => &raw const $name,)*
                _ => panic!("there is no case {name}"),
            }
        }
        /// All cases, in the order of the file.
        #[allow(dead_code)]
        pub const CASES: &[&str] = &[$(stringify!($name)),*];
    };
}

cases! {
    case_arithmetic
    case_breakpoint
    case_hypercall
    case_data_breakpoint
    case_floating_faults
    case_user_mode
    case_user_calls
    case_user_floating
    case_pages
    case_execute_disable
    case_global_pages
    case_crossing_pages
    case_own_code
    case_compatibility
    case_protected_and_real
    case_self_interrupts
    case_task_priority
    case_task_priority_at_once
    case_halt_and_timer
    case_apic_registers
    case_x2apic
    case_8259a
    case_ioapic
    case_nmi
    case_ports
    case_port_string_fault
    case_memory_moves
    case_memory_arithmetic
    case_memory_atomics
    case_memory_strings
    case_memory_stack
    case_memory_vectors
    case_memory_paged
    case_disk
    case_msrs
    case_memory_types
    case_time
    case_cpuid
    case_floating_state
    case_compare_sixteen
    case_processors
    case_far_processor
}

/// A kernel that runs one case.
pub fn kernel(case: &str) -> Vec<u8> {
    let start = &raw const yado_agreement_start;
    let offset = |at: *const u8| (at as usize - start as usize) as u64;
    let len = offset(&raw const yado_agreement_end) as usize;
    // SAFETY: the symbols enclose the bytes assembled above, which are constant data of this binary.
    let program = unsafe { std::slice::from_raw_parts(start, len) };
    // mov r15, case; jmp entry
    let mut enter = vec![0x49, 0xbf];
    enter.extend((BASE + AT + offset(place(case))).to_le_bytes());
    let entry = AT + offset(&raw const yado_entry);
    enter.push(0xe9);
    enter.extend((entry as u32 - 15).to_le_bytes());
    elf64(&[(0, enter), (AT as usize, program.to_vec())])
}
