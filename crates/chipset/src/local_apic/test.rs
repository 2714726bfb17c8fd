//! Local APICs as a kernel drives them.
// Most register writes here have no effect to act upon.
#![allow(unused_must_use)]

use super::*;
use crate::ioapic::IoApic;
use crate::locked;
use device::{Access, Device};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

const NOBODY: [usize; 0] = [];
const BUS_HZ: u64 = 1_000_000_000;
const TSC_HZ: u64 = 2_000_000_000;

fn config(id: u32) -> ApicConfig {
    ApicConfig {
        id,
        bsp: id == 0,
        timer_hz: BUS_HZ,
        tsc: TscClock { hz: TSC_HZ, offset: 0 },
        physical_address_bits: 40,
        x2apic: true,
    }
}

fn write(apic: &mut LocalApic, offset: u64, value: u32) -> Effect {
    apic.page_write(offset, value, VmTime(0))
}

/// An enabled xAPIC.
fn xapic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(config(id));
    assert_eq!(write(&mut apic, 0xf0, 0x1ff), Effect::None);
    apic
}

fn x2apic(id: u32) -> LocalApic {
    let mut apic = xapic(id);
    apic.set_base(apic.base() | base::X2APIC).unwrap();
    apic
}

struct Machine {
    apics: Apics,
    woken: Arc<Mutex<Vec<usize>>>,
}

impl Machine {
    fn new(apics: Vec<LocalApic>) -> Self {
        let woken: Arc<Mutex<Vec<usize>>> = Arc::default();
        let log = woken.clone();
        let apics = apics.into_iter().map(|apic| Arc::new(Mutex::new(apic))).collect();
        Self { apics: Apics::new(apics, move |index| log.lock().unwrap().push(index)), woken }
    }

    /// A write to ICR by `from`, carried out; whom it woke.
    fn icr(&self, from: usize, icr: u64) -> Vec<usize> {
        let effect = {
            let mut apic = self.apic(from);
            if apic.is_x2apic() {
                apic.msr_write(0x830, icr, VmTime(0)).unwrap()
            } else {
                assert_eq!(write(&mut apic, 0x310, (icr >> 32) as u32), Effect::None);
                write(&mut apic, 0x300, icr as u32)
            }
        };
        if let Effect::Ipi(ipi) = effect {
            self.apics.route(&ipi);
        }
        std::mem::take(&mut self.woken.lock().unwrap())
    }

    fn apic(&self, index: usize) -> std::sync::MutexGuard<'_, LocalApic> {
        locked(self.apics.get(index).unwrap())
    }
}

#[test]
fn power_up_state() {
    let mut apic = LocalApic::new(config(3));
    let mut read = |offset| apic.page_read(offset, VmTime(0));
    assert_eq!(read(0x20), 3 << 24);
    assert_eq!(read(0x30), 0x0005_0014);
    assert_eq!(read(0xf0), 0xff);
    assert_eq!(read(0xe0), u32::MAX);
    assert_eq!(read(0x320), 0x10000);
    assert_eq!(apic.base(), 0xfee0_0800);
    assert!(apic.waiting_for_sipi());
    assert_eq!(LocalApic::new(config(0)).base(), 0xfee0_0900);
    assert!(!apic.deliver(0x40, Trigger::Edge), "software-disabled");
    write(&mut apic, 0x320, 0x40);
    assert_eq!(apic.page_read(0x320, VmTime(0)), 0x10040, "the mask bit sticks while disabled");
}

#[test]
fn priorities_and_eoi() {
    let mut apic = xapic(0);
    assert!(apic.deliver(0x41, Trigger::Edge));
    assert!(!apic.deliver(0x41, Trigger::Edge), "already there");
    assert!(apic.deliver(0x45, Trigger::Level));
    assert_eq!(apic.pending(), Some(0x45));
    apic.acknowledge(0x45);
    assert_eq!(apic.ppr(), 0x40);
    assert_eq!(apic.pending(), None, "same class");
    assert!(apic.deliver(0x51, Trigger::Edge));
    assert_eq!(apic.pending(), Some(0x51));
    assert_eq!(write(&mut apic, 0x80, 0x50), Effect::None);
    assert_eq!(apic.pending(), None, "TPR");
    assert_eq!(apic.page_read(0xa0, VmTime(0)), 0x50);
    assert_eq!(apic.page_read(0x120, VmTime(0)), 1 << 5, "ISR word 2");
    assert_eq!(apic.page_read(0x220, VmTime(0)), 1 << 17 | 1 << 1, "IRR word 2");
    assert_eq!(apic.page_read(0x1a0, VmTime(0)), 1 << 5, "TMR word 2");
    assert_eq!(write(&mut apic, 0xb0, 0), Effect::Eoi(0x45));
    write(&mut apic, 0x80, 0);
    assert_eq!(apic.pending(), Some(0x51));
    apic.acknowledge(0x51);
    assert!(!apic.eoi_skippable(), "0x41 waits");
    assert_eq!(write(&mut apic, 0xb0, 0), Effect::None);
    apic.acknowledge(0x41);
    assert!(apic.eoi_skippable());
    assert_eq!(apic.eoi(), None);
    assert_eq!(write(&mut apic, 0xb0, 0), Effect::None, "nothing in service");
    apic.deliver(0x45, Trigger::Level);
    apic.acknowledge(0x45);
    assert!(!apic.eoi_skippable(), "the I/O APIC must hear of it");
}

#[test]
fn base_transitions() {
    let ok = |apic: &mut LocalApic, bits: u64| apic.set_base(LocalApic::BASE | base::BSP | bits).is_some();
    let (enable, both) = (base::ENABLE, base::ENABLE | base::X2APIC);
    let mut apic = xapic(0);
    assert!(!ok(&mut apic, base::X2APIC));
    assert!(!ok(&mut apic, enable | 1), "reserved");
    assert!(apic.set_base(apic.base() | 1 << 40).is_none(), "beyond MAXPHYADDR");
    assert_eq!(apic.msr_read(0x802, VmTime(0)), None, "no MSRs in xAPIC mode");
    assert!(ok(&mut apic, both));
    assert_eq!((apic.page(), apic.msr_read(0x802, VmTime(0))), (None, Some(0)));
    assert!(!ok(&mut apic, enable), "x2APIC leaves only through disabled");
    assert!(ok(&mut apic, 0));
    assert_eq!(apic.msr_read(0x802, VmTime(0)), None);
    assert!(!ok(&mut apic, both), "disabled enters only xAPIC");
    assert!(ok(&mut apic, enable));
    assert_eq!(apic.page_read(0xf0, VmTime(0)), 0xff, "disabling lost the registers");
    assert_eq!(apic.page(), Some(LocalApic::BASE));
}

#[test]
fn x2apic_registers_fault_where_they_must() {
    let mut apic = x2apic(0x23);
    let now = VmTime(0);
    assert_eq!(apic.msr_read(0x802, now), Some(0x23));
    assert_eq!(apic.msr_read(0x80d, now), Some(0x0002_0008));
    for index in [0x80b, 0x80e, 0x831, 0x83f, 0x800, 0x804, 0x840, 0x8ff] {
        assert_eq!(apic.msr_read(index, now), None, "read {index:#x}");
    }
    for (index, value) in [
        (0x802, 0),
        (0x80b, 1),
        (0x828, 1),
        (0x808, 0x100),
        (0x80d, 0),
        (0x80a, 0),
        (0x839, 0),
        (0x830, 1 << 20),
        (0x80f, 1 << 12),
        (0x83e, 4),
        (0x832, 1 << 40),
    ] {
        assert_eq!(apic.msr_write(index, value, now), None, "write {index:#x}");
    }
    assert_eq!(apic.msr_write(0x83f, 0x66, now), Some(Effect::None));
    assert_eq!(apic.pending(), Some(0x66), "self IPI");
    assert_eq!(apic.msr_read(0x823, now), Some(1 << 6));
    apic.acknowledge(0x66);
    assert_eq!(apic.msr_write(0x80b, 0, now), Some(Effect::None));
    assert_eq!(apic.msr_write(0x808, 0x20, now), Some(Effect::None));
    assert_eq!((apic.tpr(), apic.msr_read(0x808, now)), (0x20, Some(0x20)));
}

#[test]
fn ipis_find_their_way_in_xapic_mode() {
    let machine = Machine::new((0..4).map(xapic).collect());
    for index in 0..4 {
        write(&mut machine.apic(index), 0xd0, 1 << (24 + index));
    }
    assert_eq!(machine.icr(0, 2 << 56 | 0x40), [2], "physical");
    assert_eq!(machine.icr(0, 9 << 56 | 0x40), NOBODY, "nobody");
    assert_eq!(machine.icr(0, 0b1010 << 56 | 0x841), [1, 3], "logical flat");
    assert_eq!(machine.icr(0, 0xff << 56 | 0x42), [0, 1, 2, 3], "broadcast");
    assert_eq!(machine.icr(1, 2 << 18 | 0x43), [0, 1, 2, 3], "all including self");
    assert_eq!(machine.icr(1, 3 << 18 | 0x44), [0, 2, 3], "all excluding self");
    assert_eq!(machine.icr(1, 1 << 18 | 0x45), NOBODY, "self needs no wake");
    assert_eq!(machine.apic(1).pending(), Some(0x45));
    assert_eq!(machine.icr(0, 3 << 18 | 0x400), [1, 2, 3], "NMI");
    assert!(machine.apic(3).take_nmi() && !machine.apic(3).take_nmi() && !machine.apic(0).take_nmi());
    // Lowest priority: 1 is the least busy of the named.
    write(&mut machine.apic(2), 0x80, 0x80);
    write(&mut machine.apic(3), 0x80, 0x90);
    assert_eq!(machine.icr(0, 0b1110 << 56 | 0x959), [1]);
    // Logical cluster: cluster 2, members 0 and 1.
    for index in 0..4 {
        let mut apic = machine.apic(index);
        write(&mut apic, 0xe0, 0x0fff_ffff);
        write(&mut apic, 0xd0, (if index < 2 { 0x20 } else { 0x10 } | 1 << (index & 1)) << 24);
    }
    assert_eq!(machine.icr(3, 0x22 << 56 | 0x85b), [1]);
    assert_eq!(machine.icr(3, 0x13 << 56 | 0x85b), [2, 3]);
}

#[test]
fn ipis_find_their_way_in_x2apic_mode() {
    let machine = Machine::new((0..20).map(x2apic).collect());
    assert_eq!(machine.icr(0, 17 << 32 | 0x40), [17]);
    assert_eq!(machine.icr(0, (1 << 16 | 0b101) << 32 | 0x841), [16, 18], "cluster 1");
    assert_eq!(machine.icr(0, 0xff << 32 | 0x42), NOBODY, "0xff is an id here");
    assert_eq!(machine.icr(0, 0xffff_ffff << 32 | 0x42).len(), 20);
    assert_eq!(machine.apic(0).msr_read(0x830, VmTime(0)), Some(0xffff_ffff_0000_0042));
}

#[test]
fn init_and_startup() {
    let machine = Machine::new((0..2).map(|id| LocalApic::new(config(id))).collect());
    assert_eq!(machine.icr(0, 1 << 56 | 0xc500), [1], "INIT assert");
    assert_eq!(machine.icr(0, 1 << 56 | 0x8500), NOBODY, "INIT de-assert");
    assert_eq!(machine.icr(0, 1 << 56 | 0x69a), [1]);
    assert_eq!(machine.icr(0, 1 << 56 | 0x69b), NOBODY, "only the first start-up counts");
    let mut apic = machine.apic(1);
    assert!(apic.has_work());
    assert_eq!(apic.take_startup(), Some(Startup::Init));
    assert_eq!(apic.take_startup(), Some(Startup::Sipi(0x9a)));
    assert_eq!(apic.take_startup(), None);
    assert!(!apic.waiting_for_sipi());
}

#[test]
fn timer_one_shot_and_periodic() {
    let mut apic = xapic(0);
    let at = VmTime;
    apic.page_write(0x3e0, 0b1011, at(0)); // divide by 1
    apic.page_write(0x320, 0x30, at(0));
    apic.page_write(0x380, 100_000, at(1_000));
    assert_eq!(apic.page_read(0x390, at(1_000)), 100_000);
    assert_eq!(apic.page_read(0x390, at(31_000)), 70_000);
    assert_eq!(apic.deadline(), Some(at(101_000)));
    assert!(!apic.tick(at(100_999)));
    assert!(apic.tick(at(101_000)));
    assert_eq!((apic.pending(), apic.deadline()), (Some(0x30), None));
    assert_eq!(apic.page_read(0x390, at(101_000)), 0);
    apic.page_write(0x320, 0x20030, at(101_000));
    assert_eq!(apic.deadline(), None, "periodic mode does not restart what has ended");
    apic.page_write(0x3e0, 0b0011, at(101_000)); // divide by 16
    apic.page_write(0x380, 10_000, at(200_000));
    assert_eq!(apic.deadline(), Some(at(360_000)));
    apic.acknowledge(0x30);
    assert!(apic.tick(at(360_000)));
    assert_eq!(apic.deadline(), Some(at(520_000)));
    apic.acknowledge(0x30);
    assert!(apic.tick(at(1_000_000)));
    assert_eq!(apic.deadline(), Some(at(1_160_000)), "missed periods count once and the phase stays");
    apic.page_write(0x320, 0x30030, at(1_000_000));
    assert_eq!(apic.deadline(), None, "masked");
    apic.page_write(0x380, 0, at(1_000_000));
    apic.page_write(0x320, 0x20030, at(1_000_000));
    assert_eq!(apic.deadline(), None, "stopped");
}

#[test]
fn a_divisor_change_keeps_the_count() {
    let mut apic = xapic(0);
    apic.page_write(0x3e0, 0b1011, VmTime(0));
    apic.page_write(0x320, 0x30, VmTime(0));
    apic.page_write(0x380, 1_000_000, VmTime(0));
    apic.page_write(0x3e0, 0b0000, VmTime(400_000)); // divide by 2
    assert_eq!(apic.page_read(0x390, VmTime(400_000)), 600_000);
    assert_eq!(apic.page_read(0x390, VmTime(600_000)), 500_000);
}

#[test]
fn tsc_deadline() {
    let mut apic = xapic(0);
    apic.set_tsc_deadline(1);
    assert_eq!(apic.tsc_deadline(), 0, "ignored in other modes");
    apic.page_write(0x320, 0x40031, VmTime(0));
    apic.set_tsc_clock(TscClock::of(TSC_HZ, 5_000, VmTime(1_000)));
    apic.set_tsc_deadline(25_000);
    assert_eq!(apic.deadline(), Some(VmTime(11_000)));
    assert!(!apic.tick(VmTime(10_999)));
    assert!(apic.tick(VmTime(11_000)));
    assert_eq!((apic.tsc_deadline(), apic.deadline()), (0, None));
    apic.set_tsc_deadline(3);
    apic.acknowledge(0x31);
    assert!(apic.tick(VmTime(11_001)), "a deadline in the past fires at once");
    apic.set_tsc_deadline(u64::MAX);
    assert!(apic.deadline().unwrap() > VmTime(1 << 60));
    apic.page_write(0x320, 0x31, VmTime(11_001));
    assert_eq!(apic.tsc_deadline(), 0, "changing the mode disarms");
    let behind = TscClock { hz: TSC_HZ, offset: -1_000 };
    assert_eq!((behind.tsc(VmTime(1_000)), behind.at(1_000)), (1_000, VmTime(1_000)));
}

#[test]
fn errors_are_latched_by_a_write() {
    let mut apic = xapic(0);
    write(&mut apic, 0x370, 0xfe);
    assert_eq!(write(&mut apic, 0x300, 0x0f), Effect::None);
    assert_eq!(apic.page_read(0x280, VmTime(0)), 0, "not before a write");
    write(&mut apic, 0x280, 0);
    assert_eq!(apic.page_read(0x280, VmTime(0)), 1 << 5);
    assert_eq!(apic.pending(), Some(0xfe));
    apic.deliver(3, Trigger::Edge);
    write(&mut apic, 0x3f0, 0);
    write(&mut apic, 0x280, 0);
    assert_eq!(apic.page_read(0x280, VmTime(0)), 1 << 6 | 1 << 7);
    write(&mut apic, 0x280, 0);
    assert_eq!(apic.page_read(0x280, VmTime(0)), 0);
}

#[test]
fn lint_pins() {
    let mut apic = LocalApic::new(config(0));
    assert!(apic.set_lint(0, true), "virtual wire mode from the start");
    assert!(apic.external_pending() && apic.has_work());
    apic.set_lint(0, false);
    assert!(!apic.external_pending());
    assert!(apic.set_lint(1, true));
    assert!(apic.take_nmi());
    assert!(!apic.set_lint(1, true), "NMI comes with the edge");
    write(&mut apic, 0x350, 0x10700);
    assert!(!apic.set_lint(0, true));
    assert!(!apic.external_pending(), "masked");
    apic.set_base(LocalApic::BASE | base::BSP).unwrap();
    assert!(apic.external_pending(), "a disabled APIC leaves the pin to the processor");
}

/// A kernel that never touches the local APIC gets the timer through the 8259A.
#[test]
fn pic_interrupt_in_virtual_wire_mode() {
    let machine = Machine::new((0..2).map(|id| LocalApic::new(config(id))).collect());
    let mut pic = crate::pic8259::Pic8259::new(machine.apics.lint_line(0, 0));
    for (offset, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0)] {
        let access = Access { window: crate::pic8259::Pic8259::MASTER, offset, size: 1 };
        pic.write(access, value, VmTime(0));
    }
    let ioapic = IoApic::new(0, 24, crate::msi::sink(&machine.apics));
    let mut pit = crate::pit8254::Pit8254::new(crate::board::isa_line(&pic, &ioapic, 0));
    for (offset, value) in [(3, 0x34), (0, 0x9c), (0, 0x2e)] {
        let access = Access { window: crate::pit8254::Pit8254::COUNTERS, offset, size: 1 };
        pit.write(access, value, VmTime(0));
    }
    assert!(!machine.apic(0).has_work());
    pit.tick(pit.deadline().unwrap());
    assert_eq!(*machine.woken.lock().unwrap(), [0]);
    assert!(machine.apic(0).external_pending());
    assert_eq!(pic.acknowledge(), 0x20);
    assert!(!machine.apic(0).external_pending());
}

/// A level-triggered device, from its wire to the end of the interrupt.
#[test]
fn level_interrupt_through_the_ioapic() {
    let machine = Machine::new((0..2).map(x2apic).collect());
    let mut ioapic = IoApic::new(0, 24, crate::msi::sink(&machine.apics));
    let access = |offset| Access { window: 0, offset, size: 4 };
    for (register, value) in [(0x10 + 2 * 17 + 1, 1u64 << 24), (0x10 + 2 * 17, 0xa061)] {
        ioapic.write(access(0), register, VmTime(0));
        ioapic.write(access(0x10), value, VmTime(0));
    }
    let line = ioapic.line(17);
    line.set(true);
    assert_eq!(*machine.woken.lock().unwrap(), [1]);
    let end = |machine: &Machine| {
        let mut apic = machine.apic(1);
        let vector = apic.pending().unwrap();
        apic.acknowledge(vector);
        apic.msr_write(0x80b, 0, VmTime(0)).unwrap()
    };
    assert_eq!(end(&machine), Effect::Eoi(0x61));
    ioapic.eoi(0x61);
    assert_eq!(machine.apic(1).pending(), Some(0x61), "the wire is still high");
    line.set(false);
    let effect = end(&machine);
    assert_eq!(effect, Effect::Eoi(0x61));
    ioapic.eoi(0x61);
    assert_eq!(machine.apic(1).pending(), None);
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        steps in prop::collection::vec((0u8..9, any::<u16>(), any::<u64>(), 0u64..1 << 40), 0..200)
    ) {
        let machine = Machine::new((0..3).map(xapic).collect());
        let mut now = 0u64;
        for (step, register, value, ahead) in steps {
            now += ahead;
            let time = VmTime(now);
            let effect = {
                let mut apic = machine.apic(0);
                match step {
                    0 => apic.page_write(u64::from(register) & 0xff0, value as u32, time),
                    1 => { apic.page_read(u64::from(register) & 0xfff, time); Effect::None }
                    2 => apic.msr_write(0x800 + u32::from(register & 0xff), value & 0xffff_ffff, time).unwrap_or(Effect::None),
                    3 => { apic.msr_read(0x800 + u32::from(register & 0xff), time); Effect::None }
                    4 => { let _ = apic.set_base(LocalApic::BASE | value & 0xfff); Effect::None }
                    5 => { apic.set_tsc_deadline(value); Effect::None }
                    6 => { apic.set_lint(usize::from(register), value & 1 != 0); Effect::None }
                    7 => { if let Some(v) = apic.pending() { apic.acknowledge(v) }; Effect::None }
                    _ => { apic.take_startup(); Effect::None }
                }
            };
            if let Effect::Ipi(ipi) = effect {
                machine.apics.route(&ipi);
            }
            let mut apic = machine.apic(0);
            if let Some(due) = apic.deadline() {
                apic.tick(due.max(time));
                prop_assert!(apic.deadline().is_none_or(|next| next > due), "time goes on");
            }
            if let Some(vector) = apic.pending() {
                prop_assert!(vector >= 16 && vector >> 4 > apic.ppr() >> 4);
            }
        }
    }

    /// The count register and the interrupt agree about when the count ends.
    #[test]
    fn count_ends_when_the_interrupt_comes(initial in 1u32.., divide in 0u32..16, start in 0u64..1 << 50) {
        let mut apic = xapic(0);
        apic.page_write(0x3e0, divide, VmTime(start));
        apic.page_write(0x320, 0x30, VmTime(start));
        apic.page_write(0x380, initial, VmTime(start));
        let due = apic.deadline().unwrap();
        prop_assert!(apic.page_read(0x390, VmTime(due.0 - 1)) > 0);
        prop_assert_eq!(apic.page_read(0x390, due), 0);
        prop_assert!(apic.tick(due));
    }
}
