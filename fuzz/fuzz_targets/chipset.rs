//! A guest that writes garbage to every chip, at any time.
//!
//! Six bytes are a step: which chip and window, offset, width, value, how much time passes before.
#![no_main]

use chipset::pic8259::Pic8259;
use chipset::pit8254::Pit8254;
use chipset::rtc::Rtc;
use chipset::uart16550::Uart16550;
use device::{Access, Device, Line, Notify, VmTime};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut chips: [Box<dyn Device>; 4] = [
        Box::new(Uart16550::new(Line::unconnected(), Notify::unconnected())),
        Box::new(Pit8254::new(Line::unconnected())),
        Box::new(Rtc::new(1_700_000_000_000_000_000, Line::unconnected())),
        Box::new(Pic8259::new(Line::unconnected())),
    ];
    let mut now = 0u64;
    for step in data.chunks_exact(6) {
        let [what, offset, width, value, more, time] = step else { return };
        now = now.saturating_add(1 << (time & 63));
        let time = VmTime(now);
        let access = Access { window: u16::from(what >> 4 & 3), offset: u64::from(offset & 15), size: 1 << (width & 3) };
        let Some(chip) = chips.get_mut(usize::from(what & 3)) else { continue };
        let value = u64::from_le_bytes([*value, *more, *value, *more, *value, *more, *value, *more]);
        match what >> 6 {
            0 => {
                let _ = chip.read(access, time);
            },
            3 if *more == 255 => chip.reset(),
            _ => chip.write(access, value, time),
        }
        if chip.deadline().is_some_and(|due| due <= time) {
            chip.tick(time);
        }
    }
    for chip in &chips {
        let _ = chip.inspect();
    }
});
