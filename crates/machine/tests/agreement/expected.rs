//! What each case prints, from the manuals, and what of it a KVM back end is known to get wrong.

use crate::engines::*;

/// What each case must print.
pub const EXPECTED: &[(&str, &str)] = &[
    // Vectors and error codes of Intel SDM 3, 7.15; a trap flag acts after the next instruction.
    ("case_arithmetic", "#0/0 #6/0 #d/0 #c/0 #d/f8 #b/58 #d/10 #d/0 1 #d/0 #1/0 1 4000"),
    ("case_breakpoint", "#3/0 trapped"),
    ("case_hypercall", "0 fffffffffffffc18"),
    ("case_data_breakpoint", "#1/0 1 2"),
    ("case_floating_faults", "#7/0 #7/0 #13/0 #d/0 #d/0"),
    ("case_user_mode", "#d/0 #d/0 #d/0 #e/5@8000000000"),
    ("case_user_calls", "#d/40a #6/0 1 10 18 0 #6/0 3b435e"),
    ("case_user_floating", "#6/0 2222444466668888 5555666677778888 3 1 9f80 37f 20"),
    ("case_pages", "#e/0@8000000000 read #e/3@8000000000 1234 61 1234 a3 #e/9@8000000000 #e/2@8000000005"),
    ("case_execute_disable", "#e/11@8000000000 ran #e/9@8000000000"),
    ("case_global_pages", "1 2 1"),
    ("case_crossing_pages", "#e/2@8000001000 11111111 44444444 33333333"),
    ("case_own_code", "55 66 334"),
    ("case_compatibility", "80000002 80000002 10"),
    ("case_protected_and_real", "1616 6060 100 500"),
    ("case_self_interrupts", "20002 2 41 1 1 1 0"),
    ("case_task_priority", "60 0 1 3 1"),
    ("case_task_priority_at_once", "1"),
    ("case_halt_and_timer", "1 0 five 0 1 1 0 2"),
    ("case_apic_registers", "0 14 1000000 1 0 10000"),
    ("case_x2apic", "900 0 1 1 1 #d/0 #d/0 #d/0 900"),
    ("case_8259a", "50 1 0 1"),
    ("case_ioapic", "170020 60 3 8062 3"),
    ("case_nmi", "2 1"),
    (
        "case_ports",
        "11223344 ffffffffffffff44 ffffffffffff3344 11223344 11223399 112233ff ffffffff 310014 11223399 310007 \
         11223307 310000 11220403 310041 0 3",
    ),
    ("case_port_string_fault", "#e/2@8000001000 2 1000"),
    (
        "case_memory_moves",
        "8877665544332211 88776655 4433 8800 88 ffffffffffffff88 8877 ffff8877 ffffffff88776655 55443322 8877665544 \
         cafebabe1234225a fffffffffffffffe fffffffe 102030405060708",
    ),
    ("case_memory_arithmetic", "894 80000000 fffff00f fffff00f fffff010 0 1 ffffd030 ffff8080 ffff8085 1"),
    ("case_memory_atomics", "1234 1 9abc 9abc 0 80009acd 1"),
    (
        "case_memory_strings",
        "ff000010 3132333431323334 3132333431323334 313233340c0b0a34 c0b0a34 c0b0a34 1 5",
    ),
    ("case_memory_stack", "1111 2222 3333 3333"),
    ("case_memory_vectors", "123456789abcdef 123456789abcdef 123456789abcdef 123456700000077"),
    ("case_memory_paged", "ccddeeff 8899aabb 8899aabbccddeeff bbccddee ffffffffffffffff ff"),
    ("case_disk", "1000 0 1001 0 1002 0 3 3"),
    ("case_msrs", "334455667788 310000 6b6b 6b6b #d/0 #d/0 #d/0 #d/0 #d/0 #d/0 500 1b0010000000000 100"),
    ("case_memory_types", "7040600070406 #d/0 7010600070106"),
    ("case_time", "1 1 #d/0"),
    // "KVMKVMKVM" in two and a half words; one thread of level type 1.
    ("case_cpuid", "0 1 1 4b4d564b 564b4d56 4d 0 100 done"),
    (
        "case_floating_state",
        "3 37f 3820 1111222233334444 5555666677778888 9f80 5555666677778888 1 1111222233334444",
    ),
    ("case_compare_sixteen", "1 4"),
    ("case_processors", "6 counted 3 all"),
    ("case_far_processor", "12b 1 1 heard"),
];

/// Which fault of a KVM shows in which case.
pub const SHOWS: &[(&str, Fault)] = &[
    ("case_breakpoint", BREAKPOINT),
    ("case_hypercall", HYPERCALL),
    ("case_data_breakpoint", DATA_BREAKPOINT),
    ("case_floating_faults", FLOATING),
    ("case_user_calls", USER_CALLS),
    ("case_crossing_pages", CROSSING_STORE),
    ("case_task_priority_at_once", TASK_PRIORITY),
    ("case_port_string_fault", STRING_FAULT),
    ("case_memory_types", MEMORY_TYPES),
    ("case_time", TIME),
    ("case_floating_state", FLOATING),
    ("case_compare_sixteen", COMPARE_SIXTEEN),
];
