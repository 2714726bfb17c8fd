//! A bad line, for tests: frames that come late, in another order, twice, or not at all.

use super::queue::Waiting;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::hash::{BuildHasher, RandomState};

/// Frames on the line at a time.
const FRAMES_MAX: usize = 16_384;
/// Bytes on the line at a time.
const BYTES_MAX: usize = 64 << 20;

/// How bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Emulation {
    /// Frames of a million that are lost.
    pub loss_ppm: u32,
    /// Frames of a million that come twice.
    pub duplicate_ppm: u32,
    /// Frames of a million that overtake those on the line.
    pub reorder_ppm: u32,
    /// How long a frame takes, in microseconds.
    pub delay_us: u64,
    /// How much more, or less, at most.
    pub jitter_us: u64,
}

/// A line.
#[derive(Debug)]
pub struct Emulator {
    spec: Emulation,
    random: u64,
    count: u64,
    order: BinaryHeap<Reverse<(u64, u64)>>,
    frames: BTreeMap<u64, Waiting>,
    bytes: usize,
}

impl Emulator {
    /// An empty line.
    pub fn new(spec: Emulation) -> Self {
        let random = RandomState::new().hash_one(0u8) | 1;
        Self { spec, random, count: 0, order: BinaryHeap::new(), frames: BTreeMap::new(), bytes: 0 }
    }

    /// xorshift64 (Marsaglia 2003): nobody guesses it in a hurry, and nothing depends on that.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn chance(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.random() % 1_000_000 < u64::from(ppm)
    }

    /// A frame enters the line; answers whether it, or one for it, will arrive.
    pub fn push(&mut self, frame: Waiting, now: u64) -> bool {
        let len = frame.bytes.len();
        if self.chance(self.spec.loss_ppm)
            || self.frames.len() >= FRAMES_MAX
            || self.bytes.saturating_add(len) > BYTES_MAX
        {
            return false;
        }
        let (delay, jitter) =
            (self.spec.delay_us.saturating_mul(1000), self.spec.jitter_us.saturating_mul(1000));
        let overtakes = self.chance(self.spec.reorder_ppm);
        let late = self.random().checked_rem(jitter.saturating_mul(2).saturating_add(1)).unwrap_or(0);
        let wait = if overtakes { 0 } else { delay.saturating_add(late).saturating_sub(jitter) };
        if self.chance(self.spec.duplicate_ppm) {
            self.add(frame.clone(), now.saturating_add(wait));
        }
        self.add(frame, now.saturating_add(wait));
        true
    }

    fn add(&mut self, frame: Waiting, at: u64) {
        self.count = self.count.wrapping_add(1);
        self.bytes = self.bytes.saturating_add(frame.bytes.len());
        self.order.push(Reverse((at, self.count)));
        self.frames.insert(self.count, frame);
    }

    /// What is on the line is for nobody any more.
    pub fn clear(&mut self) {
        *self = Self::new(self.spec);
    }

    /// The next frame that has arrived.
    pub fn pop(&mut self, now: u64) -> Option<Waiting> {
        let Reverse((at, number)) = *self.order.peek()?;
        if at > now {
            return None;
        }
        self.order.pop();
        let frame = self.frames.remove(&number)?;
        self.bytes = self.bytes.saturating_sub(frame.bytes.len());
        Some(frame)
    }

    /// When the next frame arrives.
    pub fn next_at(&self) -> Option<u64> {
        self.order.peek().map(|Reverse((at, _))| *at)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::Offload;

    fn frame(number: u16) -> Waiting {
        let bytes = number.to_be_bytes().to_vec();
        Waiting { offload: Offload::default(), bytes, vlan: 1, priority: 0, since: 0 }
    }

    fn arrivals(spec: Emulation, count: u16) -> (Vec<u16>, u64) {
        let mut line = Emulator::new(spec);
        (0..count).for_each(|number| {
            line.push(frame(number), 1_000_000);
        });
        assert!(line.pop(999_999).is_none() || spec.delay_us == 0);
        let mut last = 0;
        let mut got = Vec::new();
        while let Some(at) = line.next_at() {
            last = at;
            let bytes = line.pop(at).unwrap().bytes;
            got.push(u16::from_be_bytes([bytes[0], bytes[1]]));
        }
        (got, last)
    }

    #[test]
    fn a_line_is_as_bad_as_said() {
        let (all, last) = arrivals(Emulation { delay_us: 10_000, ..Emulation::default() }, 1000);
        assert_eq!((all, last), ((0..1000).collect(), 11_000_000), "in order, and late");
        let (some, _) = arrivals(Emulation { loss_ppm: 100_000, ..Emulation::default() }, 10_000);
        assert!((8_800..=9_200).contains(&some.len()), "{}", some.len());
        let (twice, _) = arrivals(Emulation { duplicate_ppm: 500_000, ..Emulation::default() }, 1000);
        assert!((1_400..=1_600).contains(&twice.len()), "{}", twice.len());
        let spec = Emulation { delay_us: 1000, reorder_ppm: 100_000, ..Emulation::default() };
        let (order, _) = arrivals(spec, 1000);
        assert!(order.windows(2).any(|pair| pair[0] > pair[1]) && order.len() == 1000);
        let (_, last) = arrivals(Emulation { delay_us: 5000, jitter_us: 1000, ..Emulation::default() }, 1000);
        assert!((6_500_000..=7_000_000).contains(&last), "{last}");
    }

    #[test]
    fn a_line_holds_only_so_much() {
        let mut line = Emulator::new(Emulation { delay_us: 1_000_000, ..Emulation::default() });
        let taken = (0..20_000u16).filter(|number| line.push(frame(*number), 0)).count();
        assert_eq!(taken, FRAMES_MAX);
    }
}
