//! When user code is worth running directly.
//!
//! A process of the guest is tried when timer interrupts keep finding it in user mode, and left again when too little of the time
//! is spent in its code: each stop costs what the host needs to switch between two processes, a dozen microseconds. One that
//! failed has to wait, each time twice as long, or until it does something else: interrupts find it in user mode always.

use std::collections::HashMap;

/// Interrupts that must have found a process in user mode.
const HITS: u8 = 4;
const HITS_MAX: u8 = 8;
/// Stops for the single-step tier after which is judged.
const STEPS: u32 = 64;
/// Time after which is judged at the latest.
const PERIOD: f64 = 0.05;
/// Share of the time that must be spent in the guest's code: the translator's takes about twice as long.
const SHARE_MIN: f64 = 0.5;
/// Stops so far apart, in seconds, need not be reckoned with; interrupts that are nearer would be many stops.
const RARE: f64 = 400e-6;
/// Rare interrupts that must have found a process in user mode, and none in the kernel, for it to be tried before its time.
const STREAK: u32 = 16;
/// Seconds that a process waits after it failed for the first time, and at most.
const WAIT: (f64, f64) = (0.03, 20.0);
/// Processes that are remembered.
const PROCESSES_MAX: usize = 256;

#[derive(Debug, Default, Clone)]
struct Record {
    hits: u8,
    streak: u32,
    sampled: f64,
    active: bool,
    /// Not before this time, and how long the wait was.
    until: f64,
    wait: f64,
    /// Since the last judgement: time in code and in all, stops, and those for the single-step tier.
    inside: f64,
    all: f64,
    stops: u32,
    steps: u32,
}

/// What is known of the guest's processes, by the address of their page tables. Times are in seconds of any clock.
#[derive(Debug, Default)]
pub(super) struct Policy {
    records: HashMap<u64, Record>,
    /// The one asked for last, and the answer.
    last: Option<(u64, bool)>,
}

impl Policy {
    /// Whether the process runs directly.
    pub(super) fn active(&mut self, tables: u64) -> bool {
        if let Some((last, active)) = self.last
            && last == tables
        {
            return active;
        }
        let active = self.records.get(&tables).is_some_and(|record| record.active);
        self.last = Some((tables, active));
        active
    }

    /// An interrupt has found the process in user mode, or in the kernel.
    pub(super) fn sample(&mut self, tables: u64, user: bool, now: f64) {
        if self.records.len() >= PROCESSES_MAX && !self.records.contains_key(&tables) {
            self.records.clear();
        }
        self.last = None;
        let record = self.records.entry(tables).or_default();
        record.hits = if user { (record.hits + 1).min(HITS_MAX) } else { record.hits.saturating_sub(1) };
        let rare = now - std::mem::replace(&mut record.sampled, now) >= RARE;
        record.streak = if user && rare { record.streak + 1 } else { 0 };
        if record.hits >= HITS && now >= record.until || record.streak >= STREAK {
            (record.active, record.streak) = (true, 0);
        }
    }

    /// The process has run directly: how long in all and in its code, with how many stops, the last of them for another
    /// tier or not. `cost` measures what a stop costs at present: that looks like time in the code.
    pub(super) fn ran(
        &mut self,
        tables: u64,
        (all, inside): (f64, f64),
        (stops, step): (u32, bool),
        now: f64,
        cost: impl FnOnce() -> f64,
    ) {
        let Some(record) = self.records.get_mut(&tables) else { return };
        record.all += all;
        record.inside += inside;
        record.stops += stops;
        record.steps += u32::from(step);
        if record.steps < STEPS && record.all < PERIOD {
            return;
        }
        let stops = f64::from(record.stops);
        let cost = if stops * RARE < record.all { 0.0 } else { stops * cost() };
        if record.inside - cost < record.all * SHARE_MIN {
            record.wait = (record.wait * 2.0).clamp(WAIT.0, WAIT.1);
            (record.active, record.hits, record.streak) = (false, 0, 0);
            record.until = now + record.wait;
            self.last = None;
        } else if record.all >= PERIOD {
            record.wait = 0.0;
        }
        (record.inside, record.all, record.stops, record.steps) = (0.0, 0.0, 0, 0);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const TABLES: u64 = 0x1000;

    fn tried() -> Policy {
        let mut policy = Policy::default();
        for i in 0..HITS {
            assert!(!policy.active(TABLES));
            policy.sample(TABLES, true, f64::from(i) * 0.004);
        }
        assert!(policy.active(TABLES));
        policy
    }

    #[test]
    fn what_computes_stays() {
        let mut policy = tried();
        for i in 1..100 {
            policy
                .ran(TABLES, (0.004, 0.0039), (1, false), f64::from(i) * 0.004, || panic!("stops are rare"));
        }
        assert!(policy.active(TABLES));
        assert!(!policy.active(TABLES + 0x1000));
    }

    #[test]
    fn what_calls_the_kernel_all_the_time_leaves_soon_and_waits_longer_each_time() {
        let mut policy = tried();
        let mut now = 0.1;
        let mut waits = vec![];
        for _ in 0..3 {
            let mut steps = 0;
            while policy.active(TABLES) {
                policy.ran(TABLES, (12e-6, 9e-6), (1, true), now, || 8e-6);
                steps += 1;
                assert!(steps <= STEPS);
            }
            let left = now;
            for i in 0.. {
                if policy.active(TABLES) {
                    break;
                }
                now += 0.001;
                policy.sample(TABLES, i % 8 != 0, now);
            }
            waits.push(now - left);
        }
        assert!(waits[0] >= WAIT.0 && waits[1] > 1.5 * waits[0] && waits[2] > 1.5 * waits[1], "{waits:?}");
    }

    #[test]
    fn what_begins_to_compute_need_not_wait() {
        let mut policy = tried();
        let mut now = 0.1;
        let mut tick = || {
            now += 0.001;
            now
        };
        for _ in 0..10 {
            while policy.active(TABLES) {
                policy.ran(TABLES, (12e-6, 9e-6), (1, true), 0.1, || 8e-6);
            }
            (1..STREAK).for_each(|_| policy.sample(TABLES, true, tick()));
            assert!(!policy.active(TABLES));
            policy.sample(TABLES, true, tick());
            assert!(policy.active(TABLES));
        }
    }

    #[test]
    fn what_is_interrupted_all_the_time_waits() {
        let mut policy = tried();
        while policy.active(TABLES) {
            policy.ran(TABLES, (30e-6, 20e-6), (1, false), 0.1, || 10e-6);
        }
        (0..1000).for_each(|i| policy.sample(TABLES, true, 0.1 + f64::from(i) * 20e-6));
        assert!(!policy.active(TABLES));
    }

    #[test]
    fn memory_touched_for_the_first_time_is_forgiven() {
        let mut policy = tried();
        // A few hundred stops that bring in pages, then none.
        for _ in 0..300 {
            policy.ran(TABLES, (60e-6, 6e-6), (2, false), 0.1, || 4e-6);
        }
        assert!(policy.active(TABLES));
    }
}
