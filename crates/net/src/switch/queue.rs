//! Frames that wait, each flow in a queue of its own: FQ-CoDel (RFC 8290). A flow that sends much waits behind itself; one that
//! sends little does not wait for it. What stays for long is dropped early (RFC 8289), so that senders slow down.

use crate::offload::Offload;
use std::collections::VecDeque;

/// Queues. Flows that share one share its delay.
const FLOWS: usize = 256;
/// Bytes that a queue may send before the next has its turn.
const QUANTUM: i64 = 1514;
/// How long a frame may wait without reason for concern, and how long that must last (RFC 8289, 4.2), in nanoseconds.
const TARGET: u64 = 5_000_000;
const INTERVAL: u64 = 100_000_000;
/// Frames that the longest flow loses at most when there is no room.
const DROPS_AT_ONCE: usize = 16;

/// A frame that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// What is left to do to it.
    pub offload: Offload,
    /// The frame, without tag.
    pub bytes: Vec<u8>,
    /// Its VLAN.
    pub vlan: u16,
    /// Its priority.
    pub priority: u8,
    /// Since when, in nanoseconds.
    pub since: u64,
}

#[derive(Debug, Default)]
struct Flow {
    frames: VecDeque<Waiting>,
    bytes: usize,
    credit: i64,
    listed: bool,
    /// Since when frames have waited too long, once they have.
    above_since: Option<u64>,
    dropping: bool,
    drop_next: u64,
    drops: u32,
}

/// What to keep within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes.
    pub bytes: usize,
    /// Frames.
    pub frames: usize,
}

/// The queues of one direction of a port.
#[derive(Debug)]
pub struct FairQueue {
    flows: Vec<Flow>,
    fresh: VecDeque<usize>,
    old: VecDeque<usize>,
    bytes: usize,
    frames: usize,
    room: Room,
    /// Frames that waited too long.
    pub late: u64,
    /// Frames for which there was no room.
    pub full: u64,
}

/// 1 / sqrt(n), as an interval (RFC 8289, 3.3).
fn control(from: u64, drops: u32) -> u64 {
    let step = INTERVAL as f64 / f64::from(drops.max(1)).sqrt();
    from.saturating_add(step as u64)
}

impl Flow {
    fn pop(&mut self) -> Option<Waiting> {
        let frame = self.frames.pop_front()?;
        self.bytes = self.bytes.saturating_sub(frame.bytes.len());
        Some(frame)
    }

    /// The next frame, and whether it, or what is behind it, has waited too long for too long.
    fn next(&mut self, now: u64) -> Option<(Waiting, bool)> {
        let Some(frame) = self.pop() else {
            self.above_since = None;
            return None;
        };
        // A last frame is never late: there is nothing that its loss would help.
        if now.saturating_sub(frame.since) < TARGET || self.frames.is_empty() {
            self.above_since = None;
            return Some((frame, false));
        }
        let since = *self.above_since.get_or_insert(now.saturating_add(INTERVAL));
        Some((frame, now >= since))
    }
}

impl FairQueue {
    /// Empty queues.
    pub fn new(room: Room) -> Self {
        Self {
            flows: Vec::new(),
            fresh: VecDeque::new(),
            old: VecDeque::new(),
            bytes: 0,
            frames: 0,
            room,
            late: 0,
            full: 0,
        }
    }

    /// Nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Frames that wait.
    pub fn len(&self) -> usize {
        self.frames
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        let (late, full) = (self.late, self.full);
        *self = Self { late, full, ..Self::new(self.room) };
    }

    /// Adds a frame of the flow `hash`; if there is no room, the longest flow loses frames.
    pub fn push(&mut self, hash: u32, frame: Waiting) {
        if self.flows.is_empty() {
            self.flows.resize_with(FLOWS, Flow::default);
        }
        let number = hash as usize % FLOWS;
        let Some(flow) = self.flows.get_mut(number) else { return };
        let len = frame.bytes.len();
        flow.bytes = flow.bytes.saturating_add(len);
        flow.frames.push_back(frame);
        self.bytes = self.bytes.saturating_add(len);
        self.frames = self.frames.saturating_add(1);
        if !flow.listed {
            flow.listed = true;
            flow.credit = QUANTUM;
            self.fresh.push_back(number);
        }
        while self.bytes > self.room.bytes || self.frames > self.room.frames {
            if !self.shorten() {
                return;
            }
        }
    }

    /// The longest flow loses up to half of what it has. Looking for it takes longer than dropping a frame, so that several are dropped at
    /// once (RFC 8290, 4.1.2: a batch against floods).
    fn shorten(&mut self) -> bool {
        let Some(fat) = self.flows.iter_mut().max_by_key(|flow| flow.bytes) else { return false };
        let half = fat.bytes / 2;
        let mut lost = 0usize;
        while let Some(frame) = fat.pop() {
            lost = lost.saturating_add(1);
            self.bytes = self.bytes.saturating_sub(frame.bytes.len());
            if fat.bytes <= half || lost >= DROPS_AT_ONCE {
                break;
            }
        }
        self.frames = self.frames.saturating_sub(lost);
        self.full = self.full.wrapping_add(lost as u64);
        lost > 0
    }

    /// Takes the next frame, dropping those that are late.
    pub fn pop(&mut self, now: u64) -> Option<Waiting> {
        loop {
            let from_fresh = !self.fresh.is_empty();
            let number = *self.fresh.front().or(self.old.front())?;
            let flow = self.flows.get_mut(number)?;
            let list = if from_fresh { &mut self.fresh } else { &mut self.old };
            if flow.credit <= 0 {
                flow.credit = flow.credit.saturating_add(QUANTUM);
                list.pop_front();
                self.old.push_back(number);
                continue;
            }
            match self.dequeue(number, now) {
                Some(frame) => {
                    if let Some(flow) = self.flows.get_mut(number) {
                        flow.credit =
                            flow.credit.saturating_sub(i64::try_from(frame.bytes.len()).unwrap_or(i64::MAX));
                    }
                    return Some(frame);
                }
                None => {
                    let list = if from_fresh { &mut self.fresh } else { &mut self.old };
                    list.pop_front();
                    // A flow that was fresh waits behind the others once, so that it cannot stay fresh (RFC 8290, 4.2).
                    if from_fresh && !self.old.is_empty() {
                        self.old.push_back(number);
                    } else if let Some(flow) = self.flows.get_mut(number) {
                        flow.listed = false;
                    }
                }
            }
        }
    }

    /// CoDel of one flow (RFC 8289, appendix A).
    fn dequeue(&mut self, number: usize, now: u64) -> Option<Waiting> {
        let flow = self.flows.get_mut(number)?;
        let (mut bytes, mut frames, mut late) = (0usize, 0usize, 0u64);
        let mut next = flow.next(now);
        let mut count = |frame: &Waiting| {
            bytes = bytes.saturating_add(frame.bytes.len());
            frames = frames.saturating_add(1);
        };
        if let Some((frame, _)) = &next {
            count(frame);
        }
        if flow.dropping {
            if !next.as_ref().is_some_and(|(_, late)| *late) {
                flow.dropping = false;
            }
            while flow.dropping && now >= flow.drop_next {
                late = late.wrapping_add(1);
                flow.drops = flow.drops.saturating_add(1);
                next = flow.next(now);
                if let Some((frame, _)) = &next {
                    count(frame);
                }
                match &next {
                    Some((_, true)) => flow.drop_next = control(flow.drop_next, flow.drops),
                    _ => flow.dropping = false,
                }
            }
        } else if next.as_ref().is_some_and(|(_, late)| *late) {
            late = late.wrapping_add(1);
            next = flow.next(now);
            if let Some((frame, _)) = &next {
                count(frame);
            }
            flow.dropping = true;
            // Where it was dropping not long ago, it goes on nearly as fast.
            let recent = now.saturating_sub(flow.drop_next) < INTERVAL.saturating_mul(16) && flow.drops > 2;
            flow.drops = if recent { flow.drops.saturating_sub(2) } else { 1 };
            flow.drop_next = control(now, flow.drops);
        }
        self.bytes = self.bytes.saturating_sub(bytes);
        self.frames = self.frames.saturating_sub(frames);
        self.late = self.late.wrapping_add(late);
        next.map(|(frame, _)| frame)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn frame(len: usize, since: u64) -> Waiting {
        Waiting { offload: Offload::default(), bytes: vec![0; len], vlan: 1, priority: 0, since }
    }

    const ROOM: Room = Room { bytes: 1 << 20, frames: 1024 };

    #[test]
    fn who_sends_little_does_not_wait_for_who_sends_much() {
        let mut queue = FairQueue::new(ROOM);
        (0..500).for_each(|_| queue.push(1, frame(1500, 0)));
        queue.pop(0);
        queue.push(2, frame(98, 0));
        let place = (0..).find(|_| queue.pop(0).unwrap().bytes.len() == 98).unwrap();
        assert!(place <= 2, "{place} frames before it");
    }

    #[test]
    fn what_stays_for_long_is_dropped_and_what_does_not_is_not() {
        // A flow that sends twice as fast as the link.
        let mut queue = FairQueue::new(ROOM);
        let mut taken = 0;
        for turn in 0..4000u64 {
            let now = turn * 1_000_000;
            queue.push(7, frame(1000, now));
            if turn % 2 == 0 {
                taken += usize::from(queue.pop(now).is_some());
            }
        }
        assert!(queue.late > 20 && taken > 1900, "{} late, {taken} taken", queue.late);
        let mut calm = FairQueue::new(ROOM);
        for turn in 0..4000u64 {
            calm.push(7, frame(1000, turn * 1_000_000));
            calm.pop(turn * 1_000_000 + 4_000_000).unwrap();
        }
        assert_eq!((calm.late, calm.full), (0, 0));
    }

    #[test]
    fn without_room_the_longest_flow_loses() {
        let mut queue = FairQueue::new(Room { bytes: 20_000, frames: 100 });
        (0..50).for_each(|_| queue.push(1, frame(1500, 0)));
        queue.push(2, frame(100, 0));
        let small = std::iter::from_fn(|| queue.pop(0)).filter(|frame| frame.bytes.len() == 100).count();
        assert_eq!(small, 1);
        assert!(queue.full >= 37);
        assert!(queue.is_empty() && queue.bytes() == 0);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_uncounted(actions in prop::collection::vec((any::<bool>(), 0u32..9, 14usize..3000, 0u64..20_000_000), 0..600)) {
            let mut queue = FairQueue::new(Room { bytes: 50_000, frames: 40 });
            let (mut now, mut pushed, mut popped) = (0, 0u64, 0u64);
            for (push, flow, len, pass) in actions {
                now += pass;
                if push {
                    queue.push(flow, frame(len, now));
                    pushed += 1;
                } else if queue.pop(now).is_some() {
                    popped += 1;
                }
                prop_assert!(queue.bytes() <= 50_000 && queue.len() <= 40);
            }
            prop_assert_eq!(pushed, popped + queue.late + queue.full + queue.len() as u64);
            while queue.pop(now).is_some() {}
            prop_assert!(queue.is_empty() && queue.bytes() == 0);
        }
    }
}
