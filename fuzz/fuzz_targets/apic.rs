//! Interrupt controllers that hear from each other: three local APICs, an I/O APIC, the 8259A pair, and messages.
#![no_main]

use chipset::ioapic::{IoApic, PINS};
use chipset::local_apic::{ApicConfig, Apics, Effect, LocalApic, TscClock};
use chipset::msi;
use chipset::pic8259::Pic8259;
use device::{Access, Device, Msi, VmTime};
use std::sync::{Arc, Mutex};
use yado_fuzz::Input;

const CPUS: usize = 3;
const HZ: u64 = 1_000_000_000;

fn local_apic(id: u32) -> Arc<Mutex<LocalApic>> {
    Arc::new(Mutex::new(LocalApic::new(ApicConfig {
        id,
        bsp: id == 0,
        timer_hz: HZ,
        tsc: TscClock { hz: HZ, offset: 0 },
        physical_address_bits: 40,
        x2apic: true,
    })))
}

fn act(apics: &Apics, ioapic: &IoApic, effect: Effect) {
    match effect {
        Effect::None => {}
        Effect::Ipi(ipi) => {
            apics.route(&ipi);
        }
        Effect::Eoi(vector) => ioapic.eoi(vector),
    }
}

/// What a vCPU does with what its APIC has for it.
fn serve(apic: &mut LocalApic, kind: u8) -> Option<u8> {
    match kind & 7 {
        0 => {
            if let Some(vector) = apic.pending() {
                assert!(vector >= 16, "vector {vector} is not one that an APIC delivers");
                apic.acknowledge(vector);
                assert!(apic.pending().is_none_or(|next| next >> 4 > vector >> 4), "priorities");
            }
        }
        1 if apic.external_pending() => apic.acknowledge_external(),
        2 => {
            apic.take_nmi();
        }
        3 => {
            apic.take_startup();
        }
        4 => return apic.eoi(),
        5 => apic.set_tpr(kind & 0xf0),
        6 => {
            apic.eoi_skippable();
            apic.has_work();
            apic.waiting_for_sipi();
        }
        _ => {
            apic.ppr();
        }
    }
    None
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let apics = Apics::new((0..CPUS as u32).map(local_apic).collect(), |_| {});
    let sink = msi::sink(&apics);
    let ioapic = IoApic::new(0, PINS, sink.clone());
    let mut chip = ioapic.clone();
    let pic = Pic8259::new(apics.lint_line(0, 0));
    let mut now = 0u64;
    while !input.is_empty() {
        let [action, time] = input.array();
        now = now.saturating_add(1 << (time & 31)).saturating_add(if time == 255 { 1 << 60 } else { 0 });
        let time = VmTime(now);
        let cpu = usize::from(action >> 4) % CPUS;
        let Some(apic) = apics.get(cpu) else { return };
        let mut apic = apic.lock().expect("no panic before");
        match action & 15 {
            0..=3 => {
                let offset = u64::from(input.u8() & 0x3f) << 4 | if action & 3 == 3 { 4 } else { 0 };
                let effect = apic.page_write(offset, input.number() as u32, time);
                drop(apic);
                act(&apics, &ioapic, effect);
            }
            4 => {
                apic.page_read(u64::from(input.u16() & 0xfff), time);
            }
            5 | 6 => {
                let effect = apic.msr_write(0x800 + u32::from(input.u8() & 0x3f), input.number(), time);
                drop(apic);
                act(&apics, &ioapic, effect.unwrap_or(Effect::None));
            }
            7 => {
                apic.msr_read(0x800 + u32::from(input.u8()), time);
                apic.set_tsc_deadline(input.number());
            }
            8 => {
                let value = input.number() & 0xc00
                    | if input.u8() & 1 == 0 { LocalApic::BASE } else { input.number() };
                apic.set_base(value);
                apic.page();
            }
            9 | 10 => {
                let ended = serve(&mut apic, input.u8());
                drop(apic);
                if let Some(vector) = ended {
                    ioapic.eoi(vector);
                }
            }
            11 => {
                drop(apic);
                let (select, value) = (input.u8() % 0x48, input.number());
                chip.write(Access { window: 0, offset: 0, size: 4 }, select.into(), time);
                chip.write(Access { window: 0, offset: 0x10, size: 4 }, value, time);
                chip.read(Access { window: 0, offset: 0x10, size: 4 }, time);
            }
            12 => {
                drop(apic);
                let [pin, high] = input.array();
                ioapic.set(usize::from(pin) % (PINS + 1), high & 1 != 0);
                pic.set(pin & 15, high & 2 != 0);
            }
            13 => {
                drop(apic);
                sink.send(Msi {
                    address: 0xfee0_0000 | u64::from(input.u32() & 0xf_ffff),
                    data: input.number() as u32,
                });
            }
            14 => {
                apic.set_lint(usize::from(action >> 6), time.0 & 1 != 0);
                if action >> 4 == 15 {
                    apic.reset();
                }
            }
            _ => {
                if apic.deadline().is_some_and(|due| due <= time) {
                    apic.tick(time);
                    let next = apic.deadline();
                    assert!(next.is_none_or(|next| next > time || now == u64::MAX), "the timer never stops");
                }
            }
        }
    }
    for cpu in 0..CPUS {
        let Some(apic) = apics.get(cpu) else { return };
        apic.lock().expect("no panic before").inspect(VmTime(now));
    }
    chip.inspect();
});
