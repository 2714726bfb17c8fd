//! Devices: ports, memory-mapped registers, and instructions that meet them half-way.

use super::*;
use cpu::{Space, msr, rflags};

/// Beyond the 8 MiB of RAM.
const DEVICE: u64 = 0x80_0000;

fn read(space: Space, address: u64, size: u8) -> Exit {
    Exit::Read { space, address, size }
}

fn write(space: Space, address: u64, size: u8, value: u64) -> Exit {
    Exit::Write { space, address, size, value }
}

guest!(ports: "mov dx, 0x3f8" "in al, dx" "add al, 1" "out dx, al" "in eax, 0x71" "nop");

#[test]
fn ports_are_read_and_written_once() {
    let mut machine = Machine::new(ports);
    assert_eq!(machine.run(), read(Space::Port, 0x3f8, 1));
    machine.core.io.complete(Some(0x41));
    assert_eq!(machine.run(), write(Space::Port, 0x3f8, 1, 0x42));
    assert_eq!(machine.run(), read(Space::Port, 0x71, 4));
    machine.core.io.complete(Some(0x1234_5678));
    machine.finish();
    assert_eq!(machine.core.state.gpr[0], 0x1234_5678);
}

#[test]
fn the_bitmap_of_the_tss_decides_for_user_mode() {
    for (allowed, fault) in [(true, false), (false, true)] {
        let mut machine = Machine::with_bytes(&[0xec, 0xf4]);
        machine.core.state.gpr[2] = 0x3f8;
        machine.core.state.tr.limit = 0x67 + 0x2000;
        machine.write(TSS + 102, &0x68u16.to_le_bytes());
        if !allowed {
            machine.write(TSS + 0x68 + 0x3f8 / 8, &[1]);
        }
        machine.user();
        if fault {
            assert_eq!(machine.fault(), 13);
        } else {
            assert_eq!(machine.run(), read(Space::Port, 0x3f8, 1));
        }
    }
}

guest!(modify: "lock add dword ptr [rbx], 5");

#[test]
fn read_modify_write_of_a_register_is_one_read_and_one_write() {
    let mut machine = Machine::new(modify);
    machine.core.state.gpr[3] = DEVICE;
    assert_eq!(machine.run(), read(Space::Mmio, DEVICE, 4));
    assert_eq!(machine.core.state.rip, CODE, "the instruction has not happened");
    machine.core.io.complete(Some(0x7fff_fffe));
    assert_eq!(machine.run(), write(Space::Mmio, DEVICE, 4, 0x8000_0003));
    machine.finish();
    assert_eq!(machine.core.state.rflags & rflags::OF, rflags::OF);
    assert!(machine.core.io.is_empty());
}

guest!(movs: "mov ecx, 3" "rep movsd");

#[test]
fn rep_movs_from_a_device_reads_each_element_once() {
    let mut machine = Machine::new(movs);
    machine.core.state.gpr[6] = DEVICE;
    machine.core.state.gpr[7] = DATA;
    for n in 0..3u64 {
        assert_eq!(machine.run(), read(Space::Mmio, DEVICE + 4 * n, 4));
        assert_eq!(machine.core.state.gpr[1], 3 - n);
        machine.core.io.complete(Some(0x100 + n));
    }
    machine.finish();
    assert_eq!([machine.u32(DATA), machine.u32(DATA + 4), machine.u32(DATA + 8)], [0x100, 0x101, 0x102]);
}

guest!(push: "push qword ptr [rbx]" "pop rax");

#[test]
fn push_of_a_device_register() {
    let mut machine = Machine::new(push);
    machine.core.state.gpr[3] = DEVICE;
    assert_eq!(machine.run(), read(Space::Mmio, DEVICE, 8));
    assert_eq!(machine.core.state.gpr[4], STACK);
    machine.core.io.complete(Some(0x1122_3344_5566_7788));
    machine.finish();
    assert_eq!(machine.core.state.gpr[0], 0x1122_3344_5566_7788);
}

guest!(vector: "movups xmm1, [rbx]" "movups [rbx + 16], xmm1");

#[test]
fn vectors_reach_devices_in_quadwords() {
    let mut machine = Machine::new(vector);
    machine.core.state.gpr[3] = DEVICE;
    for n in 0..2 {
        assert_eq!(machine.run(), read(Space::Mmio, DEVICE + 8 * n, 8));
        machine.core.io.complete(Some(n + 7));
    }
    for n in 0..2 {
        assert_eq!(machine.run(), write(Space::Mmio, DEVICE + 16 + 8 * n, 8, n + 7));
    }
    machine.finish();
}

guest!(x87: "fild dword ptr [rsi]" "fild dword ptr [rsi]" "fistp dword ptr [rbx]" "fistp dword ptr [rsi + 4]");

#[test]
fn a_popping_store_to_a_device_pops_once() {
    let mut machine = Machine::new(x87);
    machine.write(DATA, &42u32.to_le_bytes());
    machine.core.state.gpr[6] = DATA;
    machine.core.state.gpr[3] = DEVICE;
    assert_eq!(machine.run(), write(Space::Mmio, DEVICE, 4, 42));
    machine.finish();
    assert_eq!(machine.u32(DATA + 4), 42);
}

guest!(compare: "cmpxchg [rbx], ecx");

#[test]
fn cmpxchg_with_a_device_writes_even_if_unequal() {
    let mut machine = Machine::new(compare);
    machine.core.state.gpr[3] = DEVICE;
    machine.core.state.gpr[0] = 1;
    assert_eq!(machine.run(), read(Space::Mmio, DEVICE, 4));
    machine.core.io.complete(Some(2));
    assert_eq!(machine.run(), write(Space::Mmio, DEVICE, 4, 2));
    machine.finish();
    assert_eq!(machine.core.state.gpr[0], 2);
}

guest!(outs: "mov dx, 0x10" "mov ecx, 2" "rep outsb");

#[test]
fn rep_outs_writes_each_byte() {
    let mut machine = Machine::new(outs);
    machine.write(DATA, b"ok");
    machine.core.state.gpr[6] = DATA;
    assert_eq!(machine.run(), write(Space::Port, 0x10, 1, u64::from(b'o')));
    assert_eq!(machine.run(), write(Space::Port, 0x10, 1, u64::from(b'k')));
    machine.finish();
}

guest!(registers: "rdmsr" "wrmsr");

#[test]
fn the_machine_answers_for_msrs_that_are_not_the_engine_s() {
    let mut machine = Machine::new(registers);
    machine.core.state.gpr[1] = u64::from(msr::APIC_BASE);
    assert_eq!(machine.run(), Exit::ReadMsr { index: msr::APIC_BASE });
    machine.core.io.complete(Some(0x1_fee0_0900));
    assert_eq!(machine.run(), Exit::WriteMsr { index: msr::APIC_BASE, value: 0x1_fee0_0900 });
    machine.core.io.complete(None);
    assert_eq!(machine.fault(), 13);
    assert_eq!(machine.core.state.gpr[0], 0xfee0_0900);
}

guest!(call: "vmcall" "nop");

#[test]
fn hypercalls_carry_arguments_and_a_result() {
    let mut machine = Machine::new(call);
    machine.core.state.gpr[0] = 9;
    machine.core.state.gpr[3] = 1;
    machine.core.state.gpr[1] = 2;
    machine.core.state.gpr[2] = 3;
    machine.core.state.gpr[6] = 4;
    assert_eq!(machine.run(), Exit::Hypercall { number: 9, args: [1, 2, 3, 4] });
    machine.core.io.complete(Some(77));
    machine.finish();
    assert_eq!(machine.core.state.gpr[0], 77);
}
