//! The timer: one-shot and periodic on a divided bus clock, or a TSC deadline (Intel SDM 3, 12.5.4).

use super::saved::TimerState;
use device::VmTime;

/// Shortest period served, so that no guest keeps its machine busy with nothing but timer interrupts.
const PERIOD_MIN_NS: u64 = 20_000;

/// How a vCPU's TSC follows from VM time: `tsc = now.ticks(hz) + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TscClock {
    /// Frequency.
    pub hz: u64,
    /// The TSC at VM time 0; may be negative.
    pub offset: i64,
}

impl TscClock {
    /// The clock of a TSC that reads `tsc` at `now`.
    pub fn of(hz: u64, tsc: u64, now: VmTime) -> Self {
        Self { hz, offset: tsc.wrapping_sub(now.ticks(hz)) as i64 }
    }

    /// The TSC at `now`.
    pub fn tsc(&self, now: VmTime) -> u64 {
        now.ticks(self.hz).wrapping_add_signed(self.offset)
    }

    /// When the TSC reaches `tsc`; time 0 if it was past it from the start.
    pub fn at(&self, tsc: u64) -> VmTime {
        let ticks = i128::from(tsc).saturating_sub(i128::from(self.offset)).max(0);
        VmTime::at_ticks(u64::try_from(ticks).unwrap_or(u64::MAX), self.hz)
    }
}

/// Timer mode field of the LVT entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

#[derive(Debug, Clone)]
pub(super) struct Timer {
    /// Bus clock before the divider.
    hz: u64,
    pub(super) tsc: TscClock,
    pub(super) mode: Mode,
    pub(super) divide_config: u32,
    pub(super) initial: u32,
    /// When the count was `initial`, in nanoseconds of VM time; before time 0 after some changes of the divisor.
    start: i128,
    counting: bool,
    /// The TSC value to fire at; 0 is disarmed.
    pub(super) tsc_deadline: u64,
}

impl Timer {
    pub(super) fn new(hz: u64, tsc: TscClock) -> Self {
        Self {
            hz,
            tsc,
            mode: Mode::OneShot,
            divide_config: 0,
            initial: 0,
            start: 0,
            counting: false,
            tsc_deadline: 0,
        }
    }

    /// What outlives the program; how the TSC runs does not.
    pub(super) fn save(&self) -> TimerState {
        let Self { hz, tsc: _, mode, divide_config, initial, start, counting, tsc_deadline } = *self;
        TimerState { hz, mode: mode.into(), divide_config, initial, start, counting, tsc_deadline }
    }

    pub(super) fn restored(state: TimerState, tsc: TscClock) -> Self {
        let TimerState { hz, mode, divide_config, initial, start, counting, tsc_deadline } = state;
        Self { hz, tsc, mode: mode.into(), divide_config, initial, start, counting, tsc_deadline }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.hz, self.tsc);
    }

    /// The divisor is 2 to the power of (bits 3, 1, 0 plus one), modulo 8.
    fn divisor_shift(&self) -> u32 {
        let code = (self.divide_config & 0b11) | ((self.divide_config >> 1) & 0b100);
        code.wrapping_add(1) & 7
    }

    fn ns(&self, counts: u32) -> u64 {
        VmTime::at_ticks(u64::from(counts) << self.divisor_shift(), self.hz).0
    }

    fn period_ns(&self) -> u64 {
        self.ns(self.initial).max(PERIOD_MIN_NS)
    }

    fn since_start(&self, now: VmTime) -> u64 {
        u64::try_from(i128::from(now.0).saturating_sub(self.start)).unwrap_or(0)
    }

    fn after_start(&self, ns: u64) -> VmTime {
        let at = self.start.saturating_add(ns.into()).max(0);
        VmTime(u64::try_from(at).unwrap_or(u64::MAX))
    }

    /// Counts made since the start of this period.
    fn elapsed(&self, now: VmTime) -> u64 {
        VmTime(self.since_start(now)).ticks(self.hz) >> self.divisor_shift()
    }

    pub(super) fn count(&self, now: VmTime) -> u32 {
        if !self.counting || self.initial == 0 {
            return 0;
        }
        let elapsed = self.elapsed(now);
        let left = u64::from(self.initial).saturating_sub(match self.mode {
            Mode::Periodic => elapsed.checked_rem(self.initial.into()).unwrap_or(0),
            Mode::OneShot | Mode::TscDeadline => elapsed,
        });
        u32::try_from(left).unwrap_or(0)
    }

    pub(super) fn set_initial(&mut self, value: u32, now: VmTime) {
        // In TSC-deadline mode the count registers are inert.
        if self.mode != Mode::TscDeadline {
            self.initial = value;
            self.start = now.0.into();
            self.counting = value != 0;
        }
    }

    /// Changes the divisor; the current count goes on from where it is.
    pub(super) fn set_divide_config(&mut self, value: u32, now: VmTime) {
        let done = self.initial.saturating_sub(self.count(now));
        self.divide_config = value & 0b1011;
        if self.counting {
            self.start = i128::from(now.0).saturating_sub(self.ns(done).into());
        }
    }

    /// Changes the mode. Going to or from TSC-deadline mode disarms the timer.
    pub(super) fn set_mode(&mut self, mode: Mode) {
        if mode != self.mode {
            if mode == Mode::TscDeadline || self.mode == Mode::TscDeadline {
                self.counting = false;
                self.initial = 0;
                self.tsc_deadline = 0;
            }
            self.mode = mode;
        }
    }

    pub(super) fn deadline(&self) -> Option<VmTime> {
        match self.mode {
            Mode::TscDeadline => (self.tsc_deadline != 0).then(|| self.tsc.at(self.tsc_deadline)),
            Mode::OneShot => self.counting.then(|| self.after_start(self.ns(self.initial))),
            Mode::Periodic => self.counting.then(|| self.after_start(self.period_ns())),
        }
    }

    /// Whether the timer has fired since the last call. Missed periods count once.
    pub(super) fn expire(&mut self, now: VmTime) -> bool {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return false;
        }
        match self.mode {
            Mode::TscDeadline => self.tsc_deadline = 0,
            Mode::OneShot => self.counting = false,
            Mode::Periodic => {
                let period = self.period_ns();
                let phase = self.since_start(now).checked_rem(period).unwrap_or(0);
                self.start = i128::from(now.0).saturating_sub(phase.into());
            }
        }
        true
    }
}
