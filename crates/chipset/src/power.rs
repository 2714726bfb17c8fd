//! Power management and reset: the ACPI fixed hardware (ACPI 6.5, 4.8: PM1a event and control blocks, the PM timer,
//! the power button, the SCI) and the PC's ways to reset.
//!
//! What the guest asks for leaves as a [`PowerEvent`]. The machine is in ACPI mode from the start: the FADT has no
//! SMI command port, and SCI_EN reads as one. There is no i8042 keyboard controller; its reset pulse works, since
//! kernels try it, and its status says "nothing to read, ready for commands" so that they do not wait.

use device::{Access, Device, Line, VmTime};
use serde_json::{Value, json};
use std::sync::Arc;

use crate::byte_wide;

mod saved;

pub use saved::PowerState;

/// Frequency of the PM timer (4.8.3.3).
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// The SLP_TYP value that the DSDT's `\_S5` names.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Offsets in the PM window: the event block (status, enable), the control block, the timer.
pub mod pm {
    /// PM1a event block: 4 bytes.
    pub const EVENT: u64 = 0x0;
    /// PM1a control block: 2 bytes.
    pub const CONTROL: u64 = 0x4;
    /// PM timer: 4 bytes.
    pub const TIMER: u64 = 0x8;
    /// Ports in the window.
    pub const LEN: u64 = 0x10;
}

/// Bits of the PM1 status and enable registers.
mod pm1 {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    /// Never happens, but Linux complains if it cannot enable it.
    pub(super) const REAL_TIME_CLOCK: u16 = 1 << 10;
    pub(super) const WAKE: u16 = 1 << 15;
    pub(super) const STATUS: u16 = TIMER | GLOBAL | POWER_BUTTON | REAL_TIME_CLOCK | WAKE;
    pub(super) const ENABLE: u16 = TIMER | GLOBAL | POWER_BUTTON | REAL_TIME_CLOCK;
}

/// Bits of the PM1 control register.
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const BUS_MASTER_RELOAD: u16 = 1 << 1;
    pub(super) const SLEEP_TYPE: u16 = 7 << 10;
    pub(super) const SLEEP: u16 = 1 << 13;
}

/// Reset control register at 0xcf9 (Intel ICH datasheets): the reset happens when this bit rises.
const RESET_CPU: u8 = 1 << 2;
/// The i8042's command "pulse output lines", with bit 0 (the reset line) low.
const I8042_PULSE_RESET: u8 = 0xfe;
/// Fast reset in system control port A.
const PORT_92_RESET: u8 = 1 << 0;

/// What the guest wants done with the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off (S5).
    Off,
    /// Reset.
    Reset,
}

/// Where power events go. Called with the device locked: it only notes and wakes. Cheap to clone.
#[derive(Clone)]
pub struct PowerSink(Arc<dyn Fn(PowerEvent) + Send + Sync>);

impl PowerSink {
    /// A sink that hands events to `to`.
    pub fn new(to: impl Fn(PowerEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(to))
    }

    fn send(&self, event: PowerEvent) {
        (self.0)(event);
    }

    /// What a write to the reset control register (port 0xcf9) does; for [`crate::pci::Host::new`].
    pub fn reset_control(&self) -> impl Fn(u8) + Send + Sync + use<> {
        let sink = self.clone();
        move |value| {
            if value & RESET_CPU != 0 {
                sink.send(PowerEvent::Reset);
            }
        }
    }
}

impl std::fmt::Debug for PowerSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PowerSink")
    }
}

/// Fixed hardware and reset ports.
#[derive(Debug)]
pub struct Power {
    status: u16,
    enable: u16,
    control: u16,
    port_92: u8,
    /// Timer values with this bit changing set TIMER status: 23 or 31.
    timer_top_bit: u32,
    /// The half-period of the timer's top bit that was last seen.
    timer_half: u64,
    sci: Line,
    sink: PowerSink,
}

impl Power {
    /// Window of the PM block ([`pm`]).
    pub const PM: u16 = 0;
    /// Window of ports 0x60 and 0x64 (one byte each, put on the bus as windows `I8042_DATA` and `I8042`).
    pub const I8042_DATA: u16 = 1;
    /// Window of port 0x64.
    pub const I8042: u16 = 2;
    /// Window of port 0x92.
    pub const PORT_92: u16 = 3;

    /// Fixed hardware with a 32-bit timer that interrupts on `sci` (level-triggered).
    pub fn new(sci: Line, sink: PowerSink) -> Self {
        Self { status: 0, enable: 0, control: 0, port_92: 0, timer_top_bit: 31, timer_half: 0, sci, sink }
    }

    /// Makes the PM timer 24 bits wide (the FADT's TMR_VAL_EXT flag clear).
    pub fn with_24_bit_timer(mut self) -> Self {
        self.timer_top_bit = 23;
        self
    }

    /// Somebody pressed the power button. A guest that listens shuts down.
    pub fn press_power_button(&mut self) {
        self.status |= pm1::POWER_BUTTON;
        self.update_sci();
    }

    /// Whether the guest listens to the power button.
    pub fn power_button_enabled(&self) -> bool {
        self.enable & pm1::POWER_BUTTON != 0
    }

    fn update_sci(&self) {
        self.sci.set(self.status & self.enable != 0);
    }

    fn timer(&self, now: VmTime) -> u32 {
        let ticks = now.ticks(PM_TIMER_HZ) as u32;
        if self.timer_top_bit == 23 { ticks & 0x00ff_ffff } else { ticks }
    }

    /// Notes whether the timer's top bit has changed since the last look (4.8.3.3).
    fn follow_timer(&mut self, now: VmTime) {
        let half = now.ticks(PM_TIMER_HZ) >> self.timer_top_bit;
        if half != self.timer_half {
            self.timer_half = half;
            self.status |= pm1::TIMER;
        }
    }

    fn read_pm(&self, offset: u64, now: VmTime) -> u8 {
        let byte = |register: u32, at: u64| (register >> (at & 3).wrapping_mul(8)) as u8;
        match offset {
            0x0..0x4 => byte(u32::from(self.status) | u32::from(self.enable) << 16, offset),
            0x4..0x8 => byte(u32::from(self.control | control::SCI_ENABLE), offset),
            0x8..0xc => byte(self.timer(now), offset),
            _ => 0,
        }
    }

    fn write_pm(&mut self, offset: u64, value: u8) {
        let value = u16::from(value);
        let wide = if offset & 1 == 0 { value } else { value << 8 };
        let keep = if offset & 1 == 0 { 0xff00 } else { 0x00ff };
        match offset {
            0 | 1 => self.status &= !wide,
            2 | 3 => self.enable = (self.enable & keep) | (wide & pm1::ENABLE),
            4 | 5 => {
                let control = (self.control & keep) | wide;
                self.control = control & (control::BUS_MASTER_RELOAD | control::SLEEP_TYPE);
                if wide & control::SLEEP != 0 {
                    self.sleep(((control & control::SLEEP_TYPE) >> 10) as u8);
                }
            }
            _ => {}
        }
        self.status &= pm1::STATUS;
    }

    fn sleep(&mut self, sleep_type: u8) {
        // Only S5 is named in the DSDT; other types are no state of this machine.
        if sleep_type == SLEEP_TYPE_S5 {
            self.sink.send(PowerEvent::Off);
        }
    }
}

impl Device for Power {
    fn name(&self) -> &'static str {
        "power"
    }

    fn read(&mut self, access: Access, now: VmTime) -> u64 {
        match access.window {
            Self::PM => {
                self.follow_timer(now);
                let value = byte_wide::read(access, |offset| self.read_pm(offset, now));
                self.update_sci();
                value
            }
            Self::PORT_92 => self.port_92.into(),
            _ => 0,
        }
    }

    fn write(&mut self, access: Access, value: u64, now: VmTime) {
        match access.window {
            Self::PM => {
                self.follow_timer(now);
                byte_wide::write(access, value, |offset, byte| self.write_pm(offset, byte));
                self.update_sci();
            }
            Self::I8042 if value as u8 == I8042_PULSE_RESET => self.sink.send(PowerEvent::Reset),
            Self::PORT_92 => {
                // Bit 1 is the A20 gate, which is always open; it is kept for software that looks.
                let value = value as u8;
                if value & PORT_92_RESET != 0 {
                    self.sink.send(PowerEvent::Reset);
                }
                self.port_92 = value & 0b10;
            }
            _ => {}
        }
    }

    fn deadline(&self) -> Option<VmTime> {
        let next = self.timer_half.saturating_add(1).checked_shl(self.timer_top_bit)?;
        (self.enable & pm1::TIMER != 0).then(|| VmTime::at_ticks(next, PM_TIMER_HZ))
    }

    fn tick(&mut self, now: VmTime) {
        self.follow_timer(now);
        self.update_sci();
    }

    fn reset(&mut self) {
        self.status = 0;
        self.enable = 0;
        self.control = 0;
        self.port_92 = 0;
        self.update_sci();
    }

    fn inspect(&self) -> Value {
        json!({
            "pm1_status": format!("{:#06x}", self.status),
            "pm1_enable": format!("{:#06x}", self.enable),
            "pm1_control": format!("{:#06x}", self.control | control::SCI_ENABLE),
            "timer_bits": self.timer_top_bit.saturating_add(1),
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Bench {
        power: Power,
        sci: Arc<AtomicBool>,
        events: Arc<Mutex<Vec<PowerEvent>>>,
    }

    impl Bench {
        fn new() -> Self {
            let (sci, events) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Vec<_>>>::default());
            let (level, log) = (sci.clone(), events.clone());
            let line = Line::new(move |high| level.store(high, Ordering::Relaxed));
            let sink = PowerSink::new(move |event| log.lock().unwrap().push(event));
            Self { power: Power::new(line, sink), sci, events }
        }
        fn out(&mut self, window: u16, offset: u64, size: u8, value: u64) {
            self.power.write(Access { window, offset, size }, value, VmTime(0));
        }
        fn get(&mut self, offset: u64, size: u8, now: VmTime) -> u64 {
            self.power.read(Access { window: Power::PM, offset, size }, now)
        }
        fn events(&self) -> Vec<PowerEvent> {
            std::mem::take(&mut self.events.lock().unwrap())
        }
    }

    #[test]
    fn power_button_is_an_sci_until_acknowledged() {
        let mut b = Bench::new();
        b.power.press_power_button();
        assert!(!b.sci.load(Ordering::Relaxed), "not enabled");
        b.out(Power::PM, 0, 2, 0x100);
        b.out(Power::PM, 2, 2, 0x120);
        assert!(b.power.power_button_enabled());
        b.power.press_power_button();
        assert!(b.sci.load(Ordering::Relaxed));
        assert_eq!(b.get(0, 2, VmTime(0)), 0x100);
        assert_eq!(b.get(0, 4, VmTime(0)), 0x120_0100);
        b.out(Power::PM, 0, 2, 0x100);
        assert!(!b.sci.load(Ordering::Relaxed));
    }

    #[test]
    fn s5_is_off_and_other_sleep_types_are_not() {
        let mut b = Bench::new();
        assert_eq!(b.get(4, 2, VmTime(0)), 1, "ACPI mode from the start");
        b.out(Power::PM, 4, 2, 1 << 10 | 1 << 13);
        assert_eq!(b.events(), []);
        // Linux writes SLP_TYP first and SLP_EN with it second.
        b.out(Power::PM, 4, 2, 5 << 10 | 1);
        assert_eq!(b.events(), []);
        assert_eq!(b.get(4, 2, VmTime(0)), 5 << 10 | 1);
        b.out(Power::PM, 4, 2, 5 << 10 | 1 << 13 | 1);
        assert_eq!(b.events(), [PowerEvent::Off]);
    }

    #[test]
    fn three_ways_to_reset() {
        let mut b = Bench::new();
        b.out(Power::I8042, 0, 1, 0xd1);
        b.out(Power::PORT_92, 0, 1, 2);
        assert_eq!(b.power.read(Access { window: Power::PORT_92, offset: 0, size: 1 }, VmTime(0)), 2);
        assert_eq!(b.power.read(Access { window: Power::I8042, offset: 0, size: 1 }, VmTime(0)), 0);
        assert_eq!(b.events(), []);
        b.out(Power::I8042, 0, 1, 0xfe);
        b.out(Power::PORT_92, 0, 1, 1);
        let control = b.power.sink.reset_control();
        control(2);
        control(6);
        assert_eq!(b.events(), [PowerEvent::Reset; 3]);
    }

    #[test]
    fn timer_counts_and_interrupts() {
        let mut b = Bench::new();
        assert_eq!(b.get(8, 4, VmTime(1_000_000_000)), PM_TIMER_HZ);
        b.power = Power::new(b.power.sci.clone(), b.power.sink.clone()).with_24_bit_timer();
        assert_eq!(b.get(8, 4, VmTime(10_000_000_000)), (PM_TIMER_HZ * 10) & 0xff_ffff);
        b.out(Power::PM, 0, 2, 1);
        assert_eq!(b.power.deadline(), None);
        b.power.reset();
        b.power.tick(VmTime(10_000_000_000));
        b.power.write(Access { window: 0, offset: 0, size: 2 }, 1, VmTime(10_000_000_000));
        b.power.write(Access { window: 0, offset: 2, size: 2 }, 1, VmTime(10_000_000_000));
        let due = b.power.deadline().unwrap();
        assert_eq!(due.ticks(PM_TIMER_HZ) & 0x7f_ffff, 0, "the top bit changes then");
        assert!(!b.sci.load(Ordering::Relaxed));
        b.power.tick(due);
        assert!(b.sci.load(Ordering::Relaxed));
        assert!(b.power.deadline().unwrap() > due);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in prop::collection::vec((any::<bool>(), 0u16..5, 0u64..16, 0u8..4, any::<u64>()), 0..200)
        ) {
            let mut b = Bench::new();
            for (write, window, offset, size, value) in steps {
                let access = Access { window, offset, size: 1 << size };
                if write {
                    b.power.write(access, value, VmTime(value));
                } else {
                    b.power.read(access, VmTime(value));
                }
                let _ = b.power.deadline();
                prop_assert_eq!(b.sci.load(Ordering::Relaxed), b.power.status & b.power.enable != 0);
            }
        }
    }
}
