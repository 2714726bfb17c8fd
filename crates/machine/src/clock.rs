//! VM time from the host's monotonic clock: it stands still while the machine does.
//!
//! States: standing (also before the first start) and running. One word holds which: the offset between host time
//! and VM time while running, the frozen VM time while standing.

use device::VmTime;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// The clock of one machine.
#[derive(Debug)]
pub struct Clock {
    state: RwLock<State>,
    /// Host time over VM time.
    divisor: u32,
    /// Serialises [`Self::run`] and [`Self::stand`].
    change: Mutex<()>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Standing(VmTime),
    /// VM time was `.1` at host time `.0`.
    Running(Instant, VmTime),
}

impl Default for Clock {
    fn default() -> Self {
        Self::slower(1)
    }
}

impl Clock {
    /// One that runs `divisor` times slower than the host's, for guests that do.
    pub fn slower(divisor: u32) -> Self {
        let state = RwLock::new(State::Standing(VmTime(0)));
        Self { state, divisor: divisor.max(1), change: Mutex::new(()) }
    }

    /// VM time now.
    pub fn now(&self) -> VmTime {
        match *self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Standing(at) => at,
            State::Running(since, at) => at.after(self.passed(since)),
        }
    }

    /// How long from now until `deadline`, in host time; `None` while the machine stands.
    pub fn until(&self, deadline: VmTime) -> Option<Duration> {
        match *self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Standing(_) => None,
            State::Running(since, at) => {
                let left = deadline.since(at.after(self.passed(since)));
                Some(left.saturating_mul(self.divisor))
            }
        }
    }

    /// VM time since then.
    fn passed(&self, since: Instant) -> Duration {
        since.elapsed().checked_div(self.divisor).unwrap_or_default()
    }

    /// Time passes from now on.
    pub fn run(&self) {
        self.set(|now| State::Running(Instant::now(), now));
    }

    /// Time stands still from now on.
    pub fn stand(&self) {
        self.set(State::Standing);
    }

    fn set(&self, make: impl FnOnce(VmTime) -> State) {
        let _one = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let state = make(self.now());
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_standing_clock_stands_and_goes_on_where_it_was() {
        let clock = Clock::default();
        assert_eq!(clock.now(), VmTime(0));
        assert_eq!(clock.until(VmTime(5)), None);
        clock.run();
        std::thread::sleep(Duration::from_millis(2));
        clock.stand();
        let stood = clock.now();
        assert!(stood.0 >= 2_000_000);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), stood);
        clock.run();
        assert!(clock.now() >= stood && clock.now().0 < stood.0 + 1_000_000_000);
        assert!(clock.until(VmTime(u64::MAX)).unwrap() > Duration::from_secs(1000));
    }

    #[test]
    fn a_slower_clock_waits_longer() {
        let clock = Clock::slower(100);
        clock.run();
        std::thread::sleep(Duration::from_millis(2));
        assert!((20_000..20_000_000).contains(&clock.now().0));
        let left = clock.until(VmTime(1_000_000_000)).unwrap();
        assert!((Duration::from_secs(98)..Duration::from_secs(100)).contains(&left), "{left:?}");
    }
}
