//! The 8254 programmable interval timer (Intel 8254 datasheet) and port 0x61, through which a PC reaches counter 2.
//!
//! Counter 0 interrupts; counter 1 (once the DRAM refresh) only counts; counter 2 has a gate and its output can be
//! read. A count is never kept: it follows from the VM time at which it was loaded.

use crate::byte_wide;
use device::{Access, Device, Line, VmTime};
use serde_json::{Value, json};

mod saved;

pub use saved::Pit8254State;

/// Frequency of the counters' clock: 105/88 MHz.
pub const HZ: u64 = 1_193_182;
/// Interrupts come at most this often (in ticks), so that no guest keeps its machine busy with nothing else.
const INTERRUPT_GAP_TICKS: u64 = 24;
/// Port 0x61 bit 4 changes with every refresh, each 15.085 us.
const REFRESH_NS: u64 = 15_085;

/// Bits of port 0x61.
mod speaker {
    pub(super) const GATE: u8 = 1 << 0;
    pub(super) const DATA: u8 = 1 << 1;
    pub(super) const REFRESH: u8 = 1 << 4;
    pub(super) const OUTPUT: u8 = 1 << 5;
}

/// Which bytes of a count are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    Both,
}

#[derive(Debug, Clone)]
struct Counter {
    mode: u8,
    bytes: Bytes,
    bcd: bool,
    /// The initial count, 1 to 65536.
    reload: u64,
    /// When counting from `reload` began, in ticks; `None` while no count has been loaded or awaits its trigger.
    start: Option<u64>,
    /// Ticks counted before the gate closed (modes 0 and 4).
    paused: Option<u64>,
    gate: bool,
    /// First byte of a two-byte count being written.
    low_byte: Option<u8>,
    /// The next read of a two-byte count is of the high byte.
    high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    /// A count has been written but not loaded.
    null_count: bool,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bytes: Bytes::Both,
            bcd: false,
            reload: 0x10000,
            start: None,
            paused: None,
            gate,
            low_byte: None,
            high_next: false,
            latched: None,
            latched_status: None,
            null_count: true,
        }
    }

    fn elapsed(&self, now: u64) -> Option<u64> {
        self.paused.or_else(|| self.start.map(|start| now.saturating_sub(start)))
    }

    fn period_phase(&self, elapsed: u64) -> u64 {
        elapsed.checked_rem(self.reload).unwrap_or(0)
    }

    fn count(&self, now: u64) -> u16 {
        let Some(elapsed) = self.elapsed(now) else { return self.displayed(self.reload) };
        let count = match self.mode {
            2 => self.reload.saturating_sub(self.period_phase(elapsed)),
            // Counts down by two, twice per period.
            3 => {
                let twice = self.period_phase(elapsed).wrapping_mul(2);
                let into = twice.checked_rem(self.reload).unwrap_or(0);
                self.reload.saturating_sub(into) & !1
            }
            _ => self.reload.wrapping_sub(elapsed),
        };
        self.displayed(count)
    }

    fn displayed(&self, count: u64) -> u16 {
        if !self.bcd {
            return count as u16;
        }
        let mut rest = count.rem_euclid(10_000);
        let mut digits = 0u16;
        for shift in [0, 4, 8, 12] {
            digits |= ((rest % 10) as u16) << shift;
            rest /= 10;
        }
        digits
    }

    fn output(&self, now: u64) -> bool {
        let Some(elapsed) = self.elapsed(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= self.reload,
            2 => !self.gate || self.period_phase(elapsed) != self.reload.saturating_sub(1),
            3 => !self.gate || self.period_phase(elapsed) < self.reload.div_ceil(2),
            _ => elapsed != self.reload,
        }
    }

    /// The first tick after `after` at which the output rises.
    fn next_rise(&self, after: u64) -> Option<u64> {
        let start = self.start.filter(|_| self.paused.is_none())?;
        match self.mode {
            2 | 3 => {
                let periods = after.saturating_sub(start).checked_div(self.reload)?.saturating_add(1);
                Some(start.saturating_add(periods.saturating_mul(self.reload)))
            }
            mode => {
                let strobe = u64::from(mode >= 4);
                Some(start.saturating_add(self.reload).saturating_add(strobe)).filter(|&rise| rise > after)
            }
        }
    }

    fn program(&mut self, control: u8) {
        let bytes = match (control >> 4) & 3 {
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        // Modes 6 and 7 are 2 and 3.
        let mode = match (control >> 1) & 7 {
            mode @ 0..=5 => mode,
            mode => mode & 3,
        };
        *self = Self { mode, bytes, bcd: control & 1 != 0, ..Self::new(self.gate) };
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match (self.bytes, self.low_byte) {
            (Bytes::Low, _) => u16::from(value),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::Both, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (Bytes::Both, None) => {
                self.low_byte = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counting.
                    self.start = None;
                }
                return;
            }
        };
        self.low_byte = None;
        self.load(count, now);
    }

    fn load(&mut self, count: u16, now: u64) {
        let (count, most) = if self.bcd {
            let digits = [12, 8, 4, 0].into_iter();
            let value = digits.fold(0, |value: u64, shift| {
                value.wrapping_mul(10).wrapping_add(u64::from((count >> shift) & 0xf))
            });
            (value, 10_000)
        } else {
            (count.into(), 0x10000)
        };
        // 1 is not allowed in modes 2 and 3; it counts as 2.
        let least = if matches!(self.mode, 2 | 3) { 2 } else { 1 };
        self.reload = if count == 0 { most } else { count.max(least) };
        self.paused = None;
        match self.mode {
            // Hardware-triggered: the gate's next edge starts it.
            1 | 5 => self.null_count = true,
            _ => {
                self.start = Some(now);
                self.null_count = false;
                if !self.gate {
                    self.paused = Some(0);
                }
            }
        }
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            1 | 5 if rising => {
                self.start = Some(now);
                self.null_count = false;
            }
            2 | 3 if rising && self.start.is_some() => {
                self.start = Some(now);
                self.paused = None;
            }
            _ if rising => {
                if let Some(done) = self.paused.take() {
                    self.start = Some(now.saturating_sub(done));
                }
            }
            0 | 2 | 3 | 4 if falling => self.paused = self.elapsed(now),
            _ => {}
        }
    }

    fn latch(&mut self, now: u64) {
        // A second latch before the first is read does nothing.
        if self.latched.is_none() {
            self.latched = Some(self.count(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            let bytes = match self.bytes {
                Bytes::Low => 0x10,
                Bytes::High => 0x20,
                Bytes::Both => 0x30,
            };
            let output = u8::from(self.output(now)) << 7;
            let null = u8::from(self.null_count) << 6;
            self.latched_status = Some(output | null | bytes | self.mode << 1 | u8::from(self.bcd));
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.latched.unwrap_or_else(|| self.count(now));
        match (self.bytes, self.high_next) {
            (Bytes::Low, _) => {
                self.latched = None;
                count as u8
            }
            (Bytes::High, _) => {
                self.latched = None;
                (count >> 8) as u8
            }
            (Bytes::Both, false) => {
                self.high_next = true;
                count as u8
            }
            (Bytes::Both, true) => {
                self.high_next = false;
                self.latched = None;
                (count >> 8) as u8
            }
        }
    }

    fn inspect(&self, seen: u64) -> Value {
        json!({ "mode": self.mode, "reload": self.reload, "gate": self.gate, "count": self.count(seen) })
    }
}

/// The timer.
#[derive(Debug)]
pub struct Pit8254 {
    counters: [Counter; 3],
    speaker_data: bool,
    /// Counter 0's next interrupt, in ticks.
    due: Option<u64>,
    seen: u64,
    line: Line,
}

impl Pit8254 {
    /// Window of the counters and the control word (4 ports).
    pub const COUNTERS: u16 = 0;
    /// Window of port 0x61.
    pub const SPEAKER: u16 = 1;

    /// A timer whose counter 0 interrupts on `line`.
    pub fn new(line: Line) -> Self {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        Self { counters, speaker_data: false, due: None, seen: 0, line }
    }

    fn control(&mut self, value: u8, now: u64) {
        let select = value >> 6;
        if select == 3 {
            // Read-back: bits 1-3 choose counters, clear bits 5 and 4 latch count and status.
            for (counter, bit) in self.counters.iter_mut().zip([2, 4, 8]) {
                if value & bit != 0 {
                    if value & 0x20 == 0 {
                        counter.latch(now);
                    }
                    if value & 0x10 == 0 {
                        counter.latch_status(now);
                    }
                }
            }
            return;
        }
        let Some(counter) = self.counters.get_mut(usize::from(select)) else { return };
        if value & 0x30 == 0 {
            counter.latch(now);
            return;
        }
        counter.program(value);
        if select == 0 {
            self.line.set(false);
            self.due = None;
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8, now: u64) {
        if offset == 3 {
            return self.control(value, now);
        }
        let index = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(counter) = self.counters.get_mut(index) else { return };
        counter.write(value, now);
        if index == 0 {
            self.due = counter.next_rise(now);
        }
    }

    fn read_byte(&mut self, offset: u64, now: u64) -> u8 {
        let index = usize::try_from(offset).unwrap_or(usize::MAX);
        self.counters.get_mut(index).map_or(0xff, |counter| counter.read(now))
    }

    fn read_speaker(&self, now: VmTime) -> u8 {
        let counter = &self.counters[2];
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        bit(counter.gate, speaker::GATE)
            | bit(self.speaker_data, speaker::DATA)
            | bit((now.0 / REFRESH_NS) & 1 != 0, speaker::REFRESH)
            | bit(counter.output(now.ticks(HZ)), speaker::OUTPUT)
    }

    fn run(&mut self, now: VmTime) -> u64 {
        let ticks = now.ticks(HZ);
        self.seen = ticks;
        if self.due.is_some_and(|due| ticks >= due) {
            self.line.set(false);
            self.line.set(true);
            // Missed periods are one interrupt.
            let gap = ticks.saturating_add(INTERRUPT_GAP_TICKS);
            self.due = self.counters[0].next_rise(ticks).map(|next| next.max(gap));
        }
        ticks
    }
}

impl Device for Pit8254 {
    fn name(&self) -> &'static str {
        "pit8254"
    }

    fn read(&mut self, access: Access, now: VmTime) -> u64 {
        let ticks = self.run(now);
        match access.window {
            Self::COUNTERS => byte_wide::read(access, |offset| self.read_byte(offset, ticks)),
            _ => self.read_speaker(now).into(),
        }
    }

    fn write(&mut self, access: Access, value: u64, now: VmTime) {
        let ticks = self.run(now);
        match access.window {
            Self::COUNTERS => {
                byte_wide::write(access, value, |offset, byte| self.write_byte(offset, byte, ticks));
            }
            _ => {
                self.speaker_data = value as u8 & speaker::DATA != 0;
                self.counters[2].set_gate(value as u8 & speaker::GATE != 0, ticks);
            }
        }
    }

    fn deadline(&self) -> Option<VmTime> {
        self.due.map(|due| VmTime::at_ticks(due, HZ))
    }

    fn tick(&mut self, now: VmTime) {
        self.run(now);
    }

    fn reset(&mut self) {
        *self = Self::new(self.line.clone());
        self.line.set(false);
    }

    fn inspect(&self) -> Value {
        json!({
            "counters": self.counters.iter().map(|c| c.inspect(self.seen)).collect::<Vec<_>>(),
            "speaker": self.speaker_data,
            "due_tick": self.due,
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn at(ticks: u64) -> VmTime {
        VmTime::at_ticks(ticks, HZ)
    }

    struct Bench {
        pit: Pit8254,
        edges: Arc<AtomicUsize>,
    }

    impl Bench {
        fn new() -> Self {
            let edges = Arc::new(AtomicUsize::new(0));
            let count = edges.clone();
            let line = Line::new(move |high| {
                count.fetch_add(high.into(), Ordering::Relaxed);
            });
            Self { pit: Pit8254::new(line), edges }
        }
        fn out(&mut self, port: u64, value: u8, ticks: u64) {
            let access = if port == 0x61 {
                Access { window: Pit8254::SPEAKER, offset: 0, size: 1 }
            } else {
                Access { window: Pit8254::COUNTERS, offset: port - 0x40, size: 1 }
            };
            self.pit.write(access, value.into(), at(ticks));
        }
        fn get(&mut self, port: u64, ticks: u64) -> u8 {
            let access = if port == 0x61 {
                Access { window: Pit8254::SPEAKER, offset: 0, size: 1 }
            } else {
                Access { window: Pit8254::COUNTERS, offset: port - 0x40, size: 1 }
            };
            self.pit.read(access, at(ticks)) as u8
        }
        fn edges(&self) -> usize {
            self.edges.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn periodic_interrupts() {
        let mut b = Bench::new();
        b.out(0x43, 0x34, 0);
        b.out(0x40, 0xe8, 0);
        b.out(0x40, 0x03, 100);
        assert_eq!(b.pit.deadline(), Some(at(1100)));
        for i in 1..=3 {
            let due = b.pit.deadline().unwrap();
            assert_eq!(due, at(100 + 1000 * i));
            b.pit.tick(due);
            assert_eq!(b.edges(), i as usize);
        }
        b.pit.tick(at(10_350));
        assert_eq!(b.edges(), 4, "missed periods are one interrupt");
        assert_eq!(b.pit.deadline(), Some(at(11_100)));
    }

    #[test]
    fn one_shots() {
        for (mode, due) in [(0x30u8, 1000), (0x38, 1001)] {
            let mut b = Bench::new();
            b.out(0x43, mode, 0);
            b.out(0x40, 0xe8, 0);
            b.out(0x40, 0x03, 0);
            assert_eq!(b.pit.deadline(), Some(at(due)), "mode word {mode:#x}");
            b.pit.tick(at(due));
            assert_eq!((b.edges(), b.pit.deadline()), (1, None));
        }
    }

    /// Linux calibrates the TSC with counter 2 in mode 0, its gate and its output in port 0x61.
    #[test]
    fn counter_2_gate_and_output() {
        let mut b = Bench::new();
        b.out(0x61, 0x01, 0);
        b.out(0x43, 0xb0, 0);
        b.out(0x42, 0xff, 0);
        b.out(0x42, 0x0f, 0);
        assert_eq!(b.get(0x61, 0) & 0x21, 0x01);
        assert_eq!(b.get(0x42, 0xff), 0x00);
        assert_eq!(b.get(0x42, 0xff), 0x0f);
        b.out(0x61, 0x00, 0x100);
        assert_eq!(b.get(0x61, 0x2000) & 0x20, 0, "the gate is closed");
        b.out(0x61, 0x01, 0x2000);
        assert_eq!(b.get(0x61, 0x2000 + 0xefe) & 0x20, 0);
        assert_eq!(b.get(0x61, 0x2000 + 0xeff) & 0x20, 0x20);
        assert_eq!(b.get(0x42, 0x2000 + 0xf00), 0xff, "counts on past zero");
        assert_eq!(b.edges(), 0);
    }

    #[test]
    fn latch_and_read_back() {
        let mut b = Bench::new();
        b.out(0x43, 0x34, 0);
        b.out(0x40, 0x00, 0);
        b.out(0x40, 0x00, 0);
        b.out(0x43, 0x00, 0x10);
        b.out(0x43, 0x00, 0x20);
        assert_eq!((b.get(0x40, 0x30), b.get(0x40, 0x30)), (0xf0, 0xff), "the first latch counts");
        b.out(0x43, 0xc2, 0x40);
        assert_eq!(b.get(0x40, 0x50), 0xb4, "status: output high, both bytes, mode 2");
        assert_eq!((b.get(0x40, 0x50), b.get(0x40, 0x50)), (0xc0, 0xff));
        // BCD, low byte only.
        b.out(0x43, 0x15, 0);
        b.out(0x40, 0x42, 0);
        assert_eq!(b.get(0x40, 3), 0x39);
    }

    #[test]
    fn square_wave() {
        let mut b = Bench::new();
        b.out(0x61, 1, 0);
        b.out(0x43, 0xb6, 0);
        b.out(0x42, 100, 0);
        b.out(0x42, 0, 0);
        assert_eq!(
            [0, 49, 50, 99, 100].map(|t| b.get(0x61, t) & 0x20 != 0),
            [true, true, false, false, true]
        );
        b.out(0x43, 0x80, 10);
        assert_eq!(b.get(0x42, 10), 80);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in prop::collection::vec((any::<bool>(), 0u64..5, any::<u8>(), 0u64..1 << 20), 0..200)
        ) {
            let mut b = Bench::new();
            let mut now = 0;
            for (write, port, value, ahead) in steps {
                now += ahead;
                let port = if port == 4 { 0x61 } else { 0x40 + port };
                if write { b.out(port, value, now) } else { b.get(port, now); }
                if let Some(due) = b.pit.deadline() {
                    b.pit.tick(due);
                    prop_assert!(b.pit.deadline().is_none_or(|next| next > due));
                    now = now.max(due.ticks(HZ));
                }
            }
        }
    }
}
