//! A rate that is kept: so many bytes, or frames, each second, and so many at once.
//!
//! The generic cell rate algorithm (ITU-T I.371): what is remembered is the moment at which all that was let through would have been
//! sent at the rate exactly. So nothing has to be added up in between, and no error adds up either.

/// Parts of a nanosecond that costs are kept in.
const FRACTION_BITS: u32 = 20;
const NANOSECONDS: u64 = 1_000_000_000;

/// A rate with its burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meter {
    /// Nanoseconds that a unit takes, in 2^-20.
    unit: u64,
    /// How far ahead of the rate one may be, in nanoseconds.
    burst: u64,
    /// When all that was let through is done.
    done: u64,
    fraction: u64,
}

impl Meter {
    /// `rate` units each second, `burst` units at once.
    pub fn new(rate: u64, burst: u64) -> Self {
        let unit = (NANOSECONDS << FRACTION_BITS).checked_div(rate.max(1)).unwrap_or(1).max(1);
        let burst = u128::from(burst).saturating_mul(unit.into()) >> FRACTION_BITS;
        Self { unit, burst: u64::try_from(burst).unwrap_or(u64::MAX), done: 0, fraction: 0 }
    }

    /// The same in other numbers, with what it has already let through.
    pub fn changed(self, rate: u64, burst: u64, now: u64) -> Self {
        // A debt at an old rate is no debt at a new one, beyond what is being sent.
        let fresh = Self::new(rate, burst);
        Self { done: self.done.min(now.saturating_add(fresh.burst)), ..fresh }
    }

    /// When something may be let through: a moment, maybe past.
    #[inline]
    pub fn ready_at(&self) -> u64 {
        self.done.saturating_sub(self.burst)
    }

    /// Whether something may be let through now.
    #[inline]
    pub fn ready(&self, now: u64) -> bool {
        self.ready_at() <= now
    }

    /// Something was let through.
    #[inline]
    pub fn charge(&mut self, units: u64, now: u64) {
        let cost = units.saturating_mul(self.unit).saturating_add(self.fraction);
        self.fraction = cost & ((1 << FRACTION_BITS) - 1);
        self.done = self.done.max(now).saturating_add(cost >> FRACTION_BITS);
    }

    /// Lets something through if it may be; answers whether.
    #[inline]
    pub fn pass(&mut self, units: u64, now: u64) -> bool {
        let ready = self.ready(now);
        if ready {
            self.charge(units, now);
        }
        ready
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut meter = Meter::new(1000, 10);
        let now = 5 * NANOSECONDS;
        let at_once = (0..100).filter(|_| meter.pass(1, now)).count();
        assert!((10..=11).contains(&at_once), "{at_once}");
        assert!(!meter.ready(now + 500_000));
        assert!(meter.ready(now + 1_100_000));
        let faster = meter.changed(1_000_000, 10, now);
        assert!(faster.ready(now + 11_000));
    }

    proptest! {
        /// Over a second, within one part in a thousand of the rate, at any rate and any size of frames.
        #[test]
        fn rates_are_kept(
            mbit in prop::sample::select(vec![1u64, 10, 123, 1000, 10_000]),
            sizes in prop::collection::vec(60u64..66_000, 1..20),
        ) {
            let rate = mbit * 125_000;
            let mut meter = Meter::new(rate, 3000);
            let (mut now, mut sent) = (1_000, 0u64);
            let begin = now;
            for size in sizes.iter().cycle() {
                now = now.max(meter.ready_at());
                if now - begin > NANOSECONDS * 2 || sent > 40_000_000 {
                    break;
                }
                meter.charge(*size, now);
                sent += size;
            }
            // To the end of what was sent, with the burst that was ahead.
            let expected = (meter.done - begin) as f64 * rate as f64 / 1e9;
            prop_assert!((sent as f64 / expected - 1.0).abs() < 0.001, "{} of {}", sent, expected);
        }
    }
}
