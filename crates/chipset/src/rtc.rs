//! The real-time clock and its CMOS memory (Motorola MC146818A datasheet), with the century in byte 0x32.
//!
//! The clock is VM time plus an offset; setting the clock moves the offset. Setting SET in register B stops the
//! clock at the fields as they are; clearing it starts it from them.

use crate::byte_wide;
use device::{Access, Device, Line, VmTime};
use serde_json::{Value, json};

mod saved;

pub use saved::RtcState;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
/// Where the FADT says the century is.
pub const CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// 32.768 kHz time base, periodic rate 1.024 kHz.
const A_POWER_UP: u8 = 0x26;
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const C_IRQ: u8 = 1 << 7;
/// Flags of C and enables of B: periodic, alarm, update ended.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
const D_VALID: u8 = 1 << 7;
const PM: u8 = 0x80;

const SECOND_NS: i128 = 1_000_000_000;
/// UIP is set this long before an update.
const UPDATE_NOTICE_NS: i128 = 244_000;
const DAY_SECONDS: i64 = 86_400;

/// A date and time of day, UTC or whatever the wall clock counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fields {
    year: i64,
    month: u8,
    day: u8,
    weekday: u8,
    hours: u8,
    minutes: u8,
    seconds: u8,
}

impl Fields {
    /// From seconds since 1970 (proleptic Gregorian calendar, years starting in March so that leap days come last).
    fn from_seconds(seconds: i64) -> Self {
        let days = seconds.div_euclid(DAY_SECONDS);
        let time = seconds.rem_euclid(DAY_SECONDS);
        // 719468 days from 0000-03-01 to 1970-01-01; 146097 days in 400 years.
        let shifted = days.saturating_add(719_468);
        let era = shifted.div_euclid(146_097);
        let of_era = shifted.rem_euclid(146_097);
        let leap = of_era / 1460;
        let century = of_era / 36_524;
        let last = of_era / 146_096;
        let year_of_era = of_era.wrapping_sub(leap).wrapping_add(century).wrapping_sub(last).div_euclid(365);
        let before = days_before_year(year_of_era);
        let of_year = of_era.wrapping_sub(before);
        let march = of_year.wrapping_mul(5).wrapping_add(2) / 153;
        let day = of_year.wrapping_sub(days_before_month(march)).wrapping_add(1);
        let month = if march < 10 { march.wrapping_add(3) } else { march.wrapping_sub(9) };
        let year = year_of_era.wrapping_add(era.wrapping_mul(400)).wrapping_add(i64::from(month <= 2));
        Self {
            year,
            month: month as u8,
            day: day as u8,
            // 1970-01-01 was a Thursday; Sunday is 1.
            weekday: (days.wrapping_add(4).rem_euclid(7) as u8).wrapping_add(1),
            hours: (time / 3600) as u8,
            minutes: (time / 60 % 60) as u8,
            seconds: (time % 60) as u8,
        }
    }

    /// Seconds since 1970. Values out of range carry over.
    fn to_seconds(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = self.year.wrapping_sub(i64::from(month <= 2));
        let march = if month > 2 { month.wrapping_sub(3) } else { month.wrapping_add(9) };
        let era = year.div_euclid(400);
        let days = era
            .wrapping_mul(146_097)
            .wrapping_add(days_before_year(year.rem_euclid(400)))
            .wrapping_add(days_before_month(march))
            .wrapping_add(i64::from(self.day))
            .wrapping_sub(719_469);
        let hours = days.wrapping_mul(24).wrapping_add(self.hours.into());
        let minutes = hours.wrapping_mul(60).wrapping_add(self.minutes.into());
        minutes.wrapping_mul(60).wrapping_add(self.seconds.into())
    }
}

fn days_before_year(year_of_era: i64) -> i64 {
    year_of_era.wrapping_mul(365).wrapping_add(year_of_era / 4).wrapping_sub(year_of_era / 100)
}

fn days_before_month(march_based: i64) -> i64 {
    march_based.wrapping_mul(153).wrapping_add(2) / 5
}

/// A real-time clock.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; 128],
    a: u8,
    b: u8,
    c: u8,
    /// Wall clock at VM time 0, nanoseconds since 1970.
    offset_ns: i128,
    /// The fields while SET stops the clock.
    stopped: Option<Fields>,
    /// Up to when the flags of C are known.
    seen: VmTime,
    line: Line,
}

impl Rtc {
    /// Ports: index and data.
    pub const LEN: u64 = 2;

    /// A clock that reads `wall_ns` (nanoseconds since 1970) at VM time 0 and interrupts on `line`.
    pub fn new(wall_ns: i64, line: Line) -> Self {
        Self {
            index: 0,
            memory: [0; 128],
            a: A_POWER_UP,
            b: B_24_HOURS,
            c: 0,
            offset_ns: wall_ns.into(),
            stopped: None,
            seen: VmTime(0),
            line,
        }
    }

    /// Sets a byte of CMOS memory, as firmware would; the clock's own registers are not memory.
    pub fn preset(&mut self, index: u8, value: u8) {
        if index > D
            && index != CENTURY
            && let Some(byte) = self.memory.get_mut(usize::from(index))
        {
            *byte = value;
        }
    }

    fn wall_ns(&self, now: VmTime) -> i128 {
        self.offset_ns.saturating_add(now.0.into())
    }

    fn wall_seconds(&self, now: VmTime) -> i64 {
        i64::try_from(self.wall_ns(now).div_euclid(SECOND_NS)).unwrap_or(0)
    }

    fn fields(&self, now: VmTime) -> Fields {
        self.stopped.unwrap_or_else(|| Fields::from_seconds(self.wall_seconds(now)))
    }

    fn set_fields(&mut self, fields: Fields, now: VmTime) {
        if self.stopped.is_some() {
            self.stopped = Some(fields);
        } else {
            let moved = fields.to_seconds().saturating_sub(self.wall_seconds(now));
            self.offset_ns = self.offset_ns.saturating_add(i128::from(moved).saturating_mul(SECOND_NS));
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf) }
    }

    fn encode_hours(&self, hours: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.encode(hours);
        }
        let twelve = match hours % 12 {
            0 => 12,
            hour => hour,
        };
        self.encode(twelve) | if hours >= 12 { PM } else { 0 }
    }

    fn decode_hours(&self, value: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & PM != 0 { 12 } else { 0 };
        (self.decode(value & !PM) % 12).wrapping_add(afternoon)
    }

    fn byte(&self, index: u8) -> u8 {
        self.memory.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn read_register(&mut self, now: VmTime) -> u8 {
        let fields = self.fields(now);
        match self.index {
            SECONDS => self.encode(fields.seconds),
            MINUTES => self.encode(fields.minutes),
            HOURS => self.encode_hours(fields.hours),
            WEEKDAY => self.encode(fields.weekday),
            DAY => self.encode(fields.day),
            MONTH => self.encode(fields.month),
            YEAR => self.encode(fields.year.rem_euclid(100) as u8),
            CENTURY => self.encode((fields.year.div_euclid(100)) as u8),
            A => {
                let into = self.wall_ns(now).rem_euclid(SECOND_NS);
                let updating = self.stopped.is_none() && into >= SECOND_NS.saturating_sub(UPDATE_NOTICE_NS);
                self.a | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            B => self.b,
            C => {
                self.follow(now);
                std::mem::take(&mut self.c)
            }
            D => D_VALID,
            index => self.byte(index),
        }
    }

    fn write_register(&mut self, value: u8, now: VmTime) {
        let mut fields = self.fields(now);
        match self.index {
            SECONDS => fields.seconds = self.decode(value),
            MINUTES => fields.minutes = self.decode(value),
            HOURS => fields.hours = self.decode_hours(value),
            DAY => fields.day = self.decode(value),
            MONTH => fields.month = self.decode(value),
            YEAR => {
                let century = fields.year.div_euclid(100).wrapping_mul(100);
                fields.year = century.wrapping_add(self.decode(value).into());
            }
            CENTURY => {
                let century = i64::from(self.decode(value)).wrapping_mul(100);
                fields.year = century.wrapping_add(fields.year.rem_euclid(100));
            }
            A => {
                self.follow(now);
                self.a = value & 0x7f;
            }
            B => {
                self.follow(now);
                self.write_b(value, now);
            }
            // The weekday follows from the date.
            C | D | WEEKDAY => {}
            index => {
                if let Some(byte) = self.memory.get_mut(usize::from(index)) {
                    *byte = value;
                }
            }
        }
        if matches!(self.index, SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY) {
            self.set_fields(fields, now);
        }
    }

    fn write_b(&mut self, value: u8, now: VmTime) {
        // SET clears the update interrupt enable (register B in the datasheet).
        self.b = if value & B_SET != 0 { value & !UPDATE } else { value };
        match (value & B_SET != 0, self.stopped) {
            (true, None) => self.stopped = Some(self.fields(now)),
            (false, Some(fields)) => {
                self.stopped = None;
                self.set_fields(fields, now);
            }
            _ => {}
        }
    }

    /// The period of the periodic interrupt in time base ticks of 32.768 kHz.
    fn period_ticks(&self) -> Option<u64> {
        match u32::from(self.a & 0xf) {
            0 => None,
            // Rates 1 and 2 are those of 8 and 9 (table 3).
            rate @ 1..=2 => 1u64.checked_shl(rate.wrapping_add(6)),
            rate => 1u64.checked_shl(rate.wrapping_sub(1)),
        }
    }

    /// Whether an alarm byte names `value`; its two top bits set mean any.
    fn alarm_names(&self, index: u8, value: i64) -> bool {
        let alarm = self.byte(index);
        let decoded = if index == HOURS_ALARM { self.decode_hours(alarm) } else { self.decode(alarm) };
        alarm >= 0xc0 || i64::from(decoded) == value
    }

    /// Seconds from `after` to the next alarm, at most a day. Steps over hours and minutes that do not match.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let first = after.rem_euclid(DAY_SECONDS).saturating_add(1);
        let mut at = first;
        while at.saturating_sub(first) < DAY_SECONDS {
            let unit = if !self.alarm_names(HOURS_ALARM, at % DAY_SECONDS / 3600) {
                3600
            } else if !self.alarm_names(MINUTES_ALARM, at / 60 % 60) {
                60
            } else if !self.alarm_names(SECONDS_ALARM, at % 60) {
                1
            } else {
                return Some(at.saturating_sub(first).saturating_add(1));
            };
            at = at.div_euclid(unit).saturating_add(1).saturating_mul(unit);
        }
        None
    }

    /// When the wall clock reaches `seconds`.
    fn at_wall(&self, seconds: i64) -> VmTime {
        let ns = i128::from(seconds).saturating_mul(SECOND_NS).saturating_sub(self.offset_ns);
        VmTime(u64::try_from(ns.max(0)).unwrap_or(u64::MAX))
    }

    /// Sets the flags for what has happened since the last look.
    fn follow(&mut self, now: VmTime) {
        let (then, seen) = (self.wall_seconds(self.seen), self.seen);
        if now <= seen {
            return;
        }
        self.seen = now;
        let base = 32_768;
        if let Some(period) = self.period_ticks()
            && seen.ticks(base).checked_div(period) != now.ticks(base).checked_div(period)
        {
            self.c |= PERIODIC;
        }
        let passed = self.wall_seconds(now).saturating_sub(then);
        if self.stopped.is_none() && passed > 0 {
            self.c |= UPDATE;
            // Only a listener needs the search, and reading C after a long time may miss nothing of it.
            if self.next_alarm(then).is_some_and(|ahead| ahead <= passed) {
                self.c |= ALARM;
            }
        }
        if self.c & self.b & (PERIODIC | ALARM | UPDATE) != 0 {
            self.c |= C_IRQ;
        }
    }

    fn update_line(&mut self) {
        let raised = self.c & self.b & (PERIODIC | ALARM | UPDATE) != 0;
        if raised {
            self.c |= C_IRQ;
        }
        self.line.set(raised);
    }
}

impl Device for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }

    fn read(&mut self, access: Access, now: VmTime) -> u64 {
        let value = byte_wide::read(access, |offset| match offset {
            0 => self.index,
            _ => self.read_register(now),
        });
        self.update_line();
        value
    }

    fn write(&mut self, access: Access, value: u64, now: VmTime) {
        byte_wide::write(access, value, |offset, byte| match offset {
            // The top bit was the NMI mask of the AT; nothing here raises that NMI.
            0 => self.index = byte & 0x7f,
            _ => self.write_register(byte, now),
        });
        self.update_line();
    }

    fn deadline(&self) -> Option<VmTime> {
        if self.c & C_IRQ != 0 {
            return None;
        }
        let wall = self.wall_seconds(self.seen);
        let periodic = || {
            let period = self.period_ticks()?;
            let next = self.seen.ticks(32_768).checked_div(period)?.saturating_add(1);
            Some(VmTime::at_ticks(next.saturating_mul(period), 32_768))
        };
        let update = || self.stopped.is_none().then(|| self.at_wall(wall.saturating_add(1)));
        let alarm = || {
            let ahead = self.next_alarm(wall).filter(|_| self.stopped.is_none())?;
            Some(self.at_wall(wall.saturating_add(ahead)))
        };
        let wanted = |bit: u8, at: &dyn Fn() -> Option<VmTime>| {
            if self.b & bit != 0 && self.c & bit == 0 { at() } else { None }
        };
        [wanted(PERIODIC, &periodic), wanted(UPDATE, &update), wanted(ALARM, &alarm)]
            .into_iter()
            .flatten()
            .min()
    }

    fn tick(&mut self, now: VmTime) {
        self.follow(now);
        self.update_line();
    }

    /// Interrupts off; the clock and its memory run on a battery.
    fn reset(&mut self) {
        self.b &= !(PERIODIC | ALARM | UPDATE);
        self.c = 0;
        self.update_line();
    }

    fn inspect(&self) -> Value {
        let fields = self.fields(self.seen);
        json!({
            "a": format!("{:#04x}", self.a), "b": format!("{:#04x}", self.b), "c": format!("{:#04x}", self.c),
            "index": self.index,
            "seen": format!("{:04}-{:02}-{:02} {:02}:{:02}:{:02}", fields.year, fields.month, fields.day,
                fields.hours, fields.minutes, fields.seconds),
        })
    }
}

#[cfg(test)]
#[path = "rtc_test.rs"]
mod test;
