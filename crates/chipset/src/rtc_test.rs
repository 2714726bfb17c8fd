//! The clock as a guest driver sees it.

use super::*;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

struct Bench {
    rtc: Rtc,
    irq: Arc<AtomicBool>,
}

/// 2024-02-29 23:59:58 UTC.
const LEAP: i64 = 1_709_251_198;

fn seconds(seconds: u64) -> VmTime {
    VmTime(seconds * 1_000_000_000)
}

impl Bench {
    fn new(wall: i64) -> Self {
        let irq = Arc::new(AtomicBool::new(false));
        let level = irq.clone();
        let line = Line::new(move |high| level.store(high, Ordering::Relaxed));
        Self { rtc: Rtc::new(wall * 1_000_000_000, line), irq }
    }
    fn get(&mut self, index: u8, now: VmTime) -> u8 {
        self.rtc.write(Access { window: 0, offset: 0, size: 1 }, index.into(), now);
        self.rtc.read(Access { window: 0, offset: 1, size: 1 }, now) as u8
    }
    fn set(&mut self, index: u8, value: u8, now: VmTime) {
        self.rtc.write(Access { window: 0, offset: 0, size: 1 }, index.into(), now);
        self.rtc.write(Access { window: 0, offset: 1, size: 1 }, value.into(), now);
    }
    fn date(&mut self, now: VmTime) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| self.get(index, now))
    }
    fn irq(&self) -> bool {
        self.irq.load(Ordering::Relaxed)
    }
}

#[test]
fn tells_the_time_over_a_leap_day() {
    let mut b = Bench::new(LEAP);
    assert_eq!(b.date(seconds(0)), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    assert_eq!(b.date(seconds(2)), [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]);
    b.set(B, B_BINARY | B_24_HOURS, seconds(0));
    assert_eq!(b.date(seconds(0)), [20, 24, 2, 29, 5, 23, 59, 58]);
    b.set(B, 0, seconds(0));
    assert_eq!(b.get(HOURS, seconds(0)), 0x91, "11 pm");
    assert_eq!(b.get(HOURS, seconds(2)), 0x12, "12 am");
    assert_eq!(b.get(D, seconds(0)), 0x80);
}

#[test]
fn update_in_progress_warns() {
    let mut b = Bench::new(LEAP);
    assert_eq!(b.get(A, VmTime(999_700_000)), 0x26);
    assert_eq!(b.get(A, VmTime(999_800_000)), 0xa6);
    assert_eq!(b.get(A, VmTime(1_000_000_000)), 0x26);
}

#[test]
fn setting_the_clock_moves_it() {
    let mut b = Bench::new(LEAP);
    b.set(B, B_SET | B_24_HOURS, seconds(1));
    for (index, value) in [
        (CENTURY, 0x19),
        (YEAR, 0x99),
        (MONTH, 0x12),
        (DAY, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x59),
    ] {
        b.set(index, value, seconds(1));
    }
    assert_eq!(b.get(SECONDS, seconds(100)), 0x59, "stopped");
    b.set(B, B_24_HOURS, seconds(100));
    assert_eq!(b.date(seconds(101)), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    b.set(MINUTES, 0x30, seconds(101));
    assert_eq!(b.get(MINUTES, seconds(101)), 0x30);
}

#[test]
fn update_interrupt_comes_every_second() {
    let mut b = Bench::new(LEAP);
    assert_eq!(b.rtc.deadline(), None);
    b.set(B, B_24_HOURS | UPDATE, VmTime(500));
    assert_eq!(b.rtc.deadline(), Some(seconds(1)));
    b.rtc.tick(seconds(1));
    assert!(b.irq());
    assert_eq!(b.rtc.deadline(), None, "until C is read");
    assert_eq!(b.get(C, seconds(1)), C_IRQ | UPDATE | b.rtc.c & PERIODIC | PERIODIC);
    assert!(!b.irq());
    assert_eq!(b.rtc.deadline(), Some(seconds(2)));
}

#[test]
fn alarm_matches_with_wildcards() {
    let mut b = Bench::new(LEAP);
    b.set(HOURS_ALARM, 0x00, seconds(0));
    b.set(MINUTES_ALARM, 0x01, seconds(0));
    b.set(SECONDS_ALARM, 0x05, seconds(0));
    b.set(B, B_24_HOURS | ALARM, seconds(0));
    assert_eq!(b.rtc.deadline(), Some(seconds(67)));
    b.set(HOURS_ALARM, 0xff, seconds(0));
    b.set(MINUTES_ALARM, 0xff, seconds(0));
    assert_eq!(b.rtc.deadline(), Some(seconds(7)));
    b.rtc.tick(seconds(6));
    assert!(!b.irq());
    b.rtc.tick(seconds(7));
    assert!(b.irq());
    assert_eq!(b.get(C, seconds(7)) & (C_IRQ | ALARM), C_IRQ | ALARM);
}

#[test]
fn periodic_rate() {
    let mut b = Bench::new(LEAP);
    b.set(B, B_24_HOURS | PERIODIC, seconds(0));
    // 1024 Hz.
    assert_eq!(b.rtc.deadline(), Some(VmTime(976_563)));
    b.rtc.tick(VmTime(976_563));
    assert!(b.irq());
    assert_eq!(b.get(C, VmTime(976_563)), C_IRQ | PERIODIC);
    b.rtc.reset();
    assert_eq!(b.rtc.deadline(), None);
}

#[test]
fn memory_keeps_bytes_and_the_clock_is_not_memory() {
    let mut b = Bench::new(LEAP);
    b.set(0x40, 0x5a, seconds(0));
    b.rtc.preset(0x41, 0xa5);
    b.rtc.preset(CENTURY, 0x77);
    assert_eq!((b.get(0x40, seconds(0)), b.get(0x41, seconds(0))), (0x5a, 0xa5));
    assert_eq!(b.get(CENTURY, seconds(0)), 0x20);
    assert_eq!(b.get(0x80 | 0x40, seconds(0)), 0x5a, "the NMI bit is not part of the index");
}

proptest! {
    #[test]
    fn dates_survive_the_round_trip(seconds in -62_135_596_800i64..253_402_300_800) {
        let fields = Fields::from_seconds(seconds);
        prop_assert!((1..=12).contains(&fields.month) && (1..=31).contains(&fields.day));
        prop_assert_eq!(fields.to_seconds(), seconds);
        let next = Fields::from_seconds(seconds + DAY_SECONDS);
        prop_assert_eq!(next.weekday, fields.weekday % 7 + 1);
        prop_assert!(next.day == fields.day + 1 || next.day == 1);
    }

    #[test]
    fn random_accesses_never_panic(
        steps in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u8>(), 0u64..1 << 34), 0..60),
        wall in any::<i32>(),
    ) {
        let mut b = Bench::new(wall.into());
        let mut now = 0;
        for (write, index, value, ahead) in steps {
            now += ahead;
            // Mostly the clock's own registers.
            let index = if index < 128 { index % 14 } else { index };
            if write { b.set(index, value, VmTime(now)) } else { b.get(index, VmTime(now)); }
            if let Some(due) = b.rtc.deadline() {
                b.rtc.tick(due.max(VmTime(now)));
                now = now.max(due.0);
            }
            prop_assert_eq!(b.irq(), b.rtc.c & b.rtc.b & 0x70 != 0);
        }
    }
}
