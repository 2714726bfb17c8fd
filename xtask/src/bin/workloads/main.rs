//! The programs of `cargo xtask bench cpu`: small loops, each after one thing that CPU engines are good or bad at. The same
//! static binary runs on the bare host and as the only program of a guest, where it is `/init`.
//!
//! For each workload it prints `@@ GROUP NAME NANOSECONDS CHECK`: the best time of one unit of work in three passes, and a
//! checksum of what was computed, which must be the same everywhere. Arguments choose workloads by name or group; what wants two
//! CPUs, or instructions that the CPU has not, is left out where they are missing.

mod crypto;
mod disk;
mod floating;
mod generated;
mod integer;
mod memory;
mod parallel;
mod system;
mod vector;

use std::hint::black_box;
use std::time::{Duration, Instant};

/// One workload: a function that does `units` of work and answers a checksum that does not depend on `units`.
pub struct Workload {
    /// For the geometric means.
    pub group: &'static str,
    /// What it exercises.
    pub name: &'static str,
    /// The work.
    pub run: fn(units: u64) -> u64,
}

/// Shortest pass that is measured, natively and in guests.
const PASS: Duration = Duration::from_millis(60);
const PASSES: usize = 3;
/// What a guest gets to finish its start.
const SETTLING: Duration = Duration::from_secs(4);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == system::NOTHING) {
        return;
    }
    let is_init = std::process::id() == 1;
    let chosen = if is_init { system::prepare_as_init() } else { arguments };
    if is_init {
        disk::prepare();
        // A kernel goes on with its start beside the first program: that is not what is measured.
        std::thread::sleep(SETTLING);
    }
    println!("@@begin");
    for workload in all() {
        let wanted = |name: &String| name == workload.name || name == workload.group;
        if (chosen.is_empty() || chosen.iter().any(wanted)) && offered(&workload) {
            measure(&workload);
        }
    }
    println!("@@end");
    if is_init {
        system::power_off();
    }
}

fn offered(workload: &Workload) -> bool {
    crypto::offered(workload.name)
        && (workload.group != parallel::GROUP || parallel::cpus() > 1)
        && (workload.group != disk::GROUP || disk::offered())
}

fn all() -> Vec<Workload> {
    let groups = [
        integer::ALL,
        memory::ALL,
        vector::ALL,
        floating::ALL,
        crypto::ALL,
        system::ALL,
        generated::ALL,
        parallel::ALL,
        disk::ALL,
    ];
    groups.into_iter().flatten().map(copy).collect()
}

fn copy(workload: &Workload) -> Workload {
    Workload { group: workload.group, name: workload.name, run: workload.run }
}

fn measure(workload: &Workload) {
    // What is made once is made here.
    (workload.run)(black_box(1));
    // Finds a number of units that takes long enough for the clock.
    let mut units = 1;
    let (mut took, mut check);
    loop {
        (took, check) = pass(workload, units);
        if took >= PASS {
            break;
        }
        let wanted = PASS.as_nanos() as u64 * units / (took.as_nanos() as u64).max(1);
        units = wanted.clamp(units * 2, units * 50);
    }
    let mut best = took;
    for _ in 1..PASSES {
        best = best.min(pass(workload, units).0);
    }
    let nanoseconds = best.as_nanos() as f64 / units as f64;
    println!("@@ {} {} {nanoseconds:.3} {check:x}", workload.group, workload.name);
}

fn pass(workload: &Workload, units: u64) -> (Duration, u64) {
    let start = Instant::now();
    let check = (workload.run)(black_box(units));
    (start.elapsed(), check)
}

/// A small generator of numbers that look random (xorshift64*).
pub struct Numbers(pub u64);

impl Numbers {
    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
