//! Limits: so many bits, and frames, each second.

use super::meter::Meter;
use serde::{Deserialize, Serialize};

/// What a limit lets through at once, if it does not say: this long at its rate, and at least one large segment.
const BURST_MICROSECONDS: u64 = 1000;
const BURST_BYTES_MIN: u64 = 3028;
/// Below this rate large segments are cut, so that no other frame waits long for one.
const CUT_BELOW_BITS: u64 = 1_000_000_000;

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Bits each second.
    pub bits_per_second: u64,
    /// Bytes at once.
    #[serde(default)]
    pub burst_bytes: Option<u64>,
    /// Frames each second; large segments count as what they are cut into.
    #[serde(default)]
    pub frames_per_second: Option<u64>,
}

/// A rate of bits, in bytes, with its usual burst; a meter that goes on from `old`.
pub fn meter(old: Option<Meter>, bits: u64, burst: Option<u64>, now: u64) -> Meter {
    let rate = (bits / 8).max(1);
    let short = (rate / 1_000_000).saturating_mul(BURST_MICROSECONDS).max(BURST_BYTES_MIN);
    changed(old, rate, burst.unwrap_or(short), now)
}

fn changed(old: Option<Meter>, rate: u64, burst: u64, now: u64) -> Meter {
    old.map_or_else(|| Meter::new(rate, burst), |meter| meter.changed(rate, burst, now))
}

/// A limit at work.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limiter {
    bytes: Option<Meter>,
    frames: Option<Meter>,
    cut: bool,
}

impl Limiter {
    /// Changes the limit.
    pub fn set(&mut self, limit: Option<Limit>, now: u64) {
        self.cut = limit.is_some_and(|limit| limit.bits_per_second < CUT_BELOW_BITS);
        self.bytes = limit.map(|limit| meter(self.bytes, limit.bits_per_second, limit.burst_bytes, now));
        let frames = limit.and_then(|limit| limit.frames_per_second);
        self.frames = frames.map(|rate| changed(self.frames, rate, (rate / 1000).max(1), now));
    }

    /// Whether there is one.
    #[inline]
    pub fn limited(&self) -> bool {
        self.bytes.is_some() || self.frames.is_some()
    }

    /// Whether large segments are to be cut.
    pub fn cuts(&self) -> bool {
        self.cut
    }

    /// When it lets something through: a moment, maybe past.
    pub fn ready_at(&self) -> u64 {
        let at = |meter: &Option<Meter>| meter.as_ref().map_or(0, Meter::ready_at);
        at(&self.bytes).max(at(&self.frames))
    }

    /// Something was let through.
    pub fn charge(&mut self, bytes: usize, frames: u64, now: u64) {
        if let Some(meter) = &mut self.bytes {
            meter.charge(bytes as u64, now);
        }
        if let Some(meter) = &mut self.frames {
            meter.charge(frames, now);
        }
    }
}
