//! A guest that writes garbage to every chip with ports, at any time.
#![no_main]

use chipset::ioapic::{IoApic, PINS};
use chipset::pic8259::Pic8259;
use chipset::pit8254::Pit8254;
use chipset::power::{Power, PowerSink};
use chipset::pvpanic::PvPanic;
use chipset::rtc::Rtc;
use chipset::test_devices::{DebugExit, PcTestDevice};
use chipset::uart16550::Uart16550;
use device::serial::Endpoint;
use device::{Access, Device, Line, MsiSink, Notify, VmTime};
use yado_fuzz::Input;

/// Windows of each chip: how many, and bytes of each (the board's).
const WINDOWS: [&[u64]; 8] =
    [&[8], &[4, 1], &[2], &[2, 2, 2], &[16, 1, 1, 1], &[1], &[4], &[PINS as u64, 4, 4, 0x1_0000]];

/// What the other end of the wire does.
fn outside(uart: &mut Uart16550, kind: u8, input: &mut Input<'_>) {
    let len = usize::from(input.u8());
    match kind & 3 {
        0 | 1 => assert!(uart.offer(0, input.take(len)) <= len, "more was taken than offered"),
        2 => {
            let mut bytes = Vec::new();
            uart.take(0, &mut bytes, len);
            assert!(bytes.len() <= len, "more was given than asked for");
        }
        _ => uart.connect(0, len & 1 != 0),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let ioapic = IoApic::new(0, PINS, MsiSink::unconnected());
    let pic = Pic8259::new(Line::unconnected());
    let isa = |irq| chipset::board::isa_line(&pic, &ioapic, irq);
    let mut uart = Uart16550::new(isa(4), Notify::unconnected());
    let wall = i64::from(input.u32()) << (input.u8() & 31);
    let mut chips: [Box<dyn Device>; 7] = [
        Box::new(Pit8254::new(isa(0))),
        Box::new(Rtc::new(wall, isa(8))),
        Box::new(pic.clone()),
        Box::new(Power::new(ioapic.line(9), PowerSink::new(|_| {}))),
        Box::new(PvPanic::new(|_| {})),
        Box::new(DebugExit::new(|_| {})),
        Box::new(PcTestDevice::new((0..PINS).map(|pin| ioapic.line(pin)).collect())),
    ];
    let mut now = 0u64;
    while !input.is_empty() {
        let [what, window, offset, time] = input.array();
        // Mostly small steps; now and then years.
        now = now.saturating_add(if time < 250 { 1u64 << (time & 31) } else { 1 << (40 + (time - 250) * 4) });
        let time = VmTime(now);
        let number = usize::from(what & 7);
        let windows = WINDOWS[number];
        let window = usize::from(window) % windows.len();
        let size = (1u64 << (what >> 3 & 3)).min(windows[window]);
        let offset = u64::from(offset) % (windows[window] - size + 1);
        let access = Access { window: window as u16, offset, size: size as u8 };
        if what >> 5 == 6 && number == 0 {
            outside(&mut uart, window as u8 | offset as u8, &mut input);
        }
        let chip: &mut dyn Device = match number {
            0 => &mut uart,
            _ => chips[number - 1].as_mut(),
        };
        match what >> 5 {
            0 | 1 => {
                chip.read(access, time);
            }
            2..=5 => chip.write(access, input.number(), time),
            6 => ioapic.eoi(offset as u8),
            _ if what == 0xff => chip.reset(),
            _ => pic.set(offset as u8 & 15, window & 1 != 0),
        }
        if chip.deadline().is_some_and(|due| due <= time) {
            chip.tick(time);
            let next = chip.deadline();
            assert!(
                next.is_none_or(|next| next > time || now == u64::MAX),
                "{} never stops ticking",
                chip.name()
            );
        }
    }
    let _ = uart.inspect();
    for chip in &chips {
        let _ = chip.inspect();
    }
});
