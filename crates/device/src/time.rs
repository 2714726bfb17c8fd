//! VM time: nanoseconds since the machine was made, standing still while it is paused.

use std::time::Duration;

/// A point in VM time, in nanoseconds.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct VmTime(pub u64);

impl VmTime {
    /// This point moved later by `duration`, or the end of time.
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time from `earlier` to this point, zero if it is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// How many ticks of a clock of `hz` have passed at this point.
    pub fn ticks(self, hz: u64) -> u64 {
        u64::try_from(u128::from(self.0).wrapping_mul(u128::from(hz)) / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// The first point at which a clock of `hz` has made `ticks` ticks.
    pub fn at_ticks(ticks: u64, hz: u64) -> Self {
        let hz = u128::from(hz.max(1));
        let ns = u128::from(ticks).wrapping_mul(1_000_000_000).div_ceil(hz);
        Self(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ticks_and_points_agree() {
        for hz in [1_193_182, 3_579_545, 1_000_000_000, 2_399_999_999] {
            for ticks in [0, 1, 2, 1000, 65536, 1 << 40] {
                let at = VmTime::at_ticks(ticks, hz);
                assert_eq!(at.ticks(hz).max(ticks), at.ticks(hz));
                assert!(ticks == 0 || VmTime(at.0 - 1).ticks(hz) < ticks);
            }
        }
    }
}
