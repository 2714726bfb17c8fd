//! Machines that are paused at any moment, and vCPUs that are saved and restored there, a thousand times: nothing is lost, and nothing
//! is left behind.
//!
//! YADO_CYCLES says how many cycles of each kind on each engine; without it there are few, for those who wait.

#[path = "engines/mod.rs"]
mod engines;
#[path = "agreement/expected.rs"]
mod expected;
#[path = "agreement/program.rs"]
mod program;
#[path = "agreement/running.rs"]
mod running;

use cpu::cpuid::{Model, Topology};
use cpu::{Engine, Exit, Registers, Segment, Space, Vcpu, VcpuConfig, VcpuState, attr, cr0};
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;
use engines::faults;
use expected::{EXPECTED, SHOWS};
use machine::{EngineKind, Machine};
use memory::{Backing, GuestMemory};
use running::run_beside;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Cycles of each kind.
fn cycles() -> usize {
    std::env::var("YADO_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(50)
}

/// Numbers that are the same in every run, so that what fails once fails again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What the process holds: descriptors, threads and mappings.
fn held() -> [usize; 3] {
    let count = |path| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    [count("/proc/self/fd"), count("/proc/self/task"), maps]
}

/// Lets the machine stand and go on at random, now and then by two who ask at once.
fn disturb(machine: &Machine, over: &AtomicBool, dice: &mut Dice, done: &AtomicUsize) {
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_micros(dice.below(400)));
        if machine.pause() {
            std::thread::sleep(Duration::from_micros(dice.below(200)));
            machine.resume();
            done.fetch_add(1, Ordering::SeqCst);
        } else {
            // Not started yet, or over.
            machine.resume();
        }
    }
}

fn cases_under_pauses(engine: EngineKind) {
    let (mut dice, done) = (Dice(engine as u64 + 1), AtomicUsize::new(0));
    while done.load(Ordering::SeqCst) < cycles() {
        for (case, expected) in EXPECTED {
            if engine == EngineKind::Kvm
                && SHOWS.iter().any(|(shows, fault)| shows == case && faults().contains(fault))
            {
                continue;
            }
            let printed = run_beside(case, engine, Duration::from_secs(60), |machine, over| {
                disturb(machine, over, &mut dice, &done);
            });
            assert_eq!(printed, *expected, "{case} on {engine:?} after {done:?} pauses");
        }
    }
    println!("{engine:?}: {done:?} pauses");
}

const CODE: u64 = 0x8000;

fn memory() -> GuestMemory {
    let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Shared).unwrap();
    // inc eax; inc dword ptr [0x5000]; add esi, eax; out 0x80, eax; jmp
    let code = [0x40, 0xff, 0x05, 0x00, 0x50, 0x00, 0x00, 0x01, 0xc6, 0xe7, 0x80, 0xeb, 0xf3];
    memory.write(CODE, &code).unwrap();
    memory
}

fn vcpu(kind: EngineKind, memory: &GuestMemory) -> (Box<dyn Engine>, Box<dyn Vcpu>) {
    let engine: Box<dyn Engine> = match kind {
        EngineKind::Soft => {
            Box::new(SoftEngine::new(memory.clone(), engine_soft::Options::default()).unwrap())
        }
        EngineKind::Kvm => Box::new(KvmEngine::new(memory.clone(), engine_kvm::Options::default()).unwrap()),
    };
    let topology = Topology { apic_id: 0, cpus: 1 };
    let table = Model::named("host").unwrap().table(topology, engine.tsc_hz()).unwrap();
    let cpuid = Arc::new(engine.offer(table));
    let vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid }).unwrap();
    (engine, vcpu)
}

fn start() -> Registers {
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    let data = flat(16, attr::DATA);
    Registers {
        rip: CODE,
        rflags: cpu::rflags::FIXED,
        segments: [data, flat(8, attr::CODE32), data, data, data, data],
        cr0: cr0::PE | cr0::ET,
        ..Registers::default()
    }
}

/// A guest that counts is saved as text at a random moment and goes on from it: in the same vCPU, or in a new VM of the same or of
/// the other engine.
fn counting_through_saves(kinds: &[EngineKind]) {
    let memory = memory();
    let mut dice = Dice(7);
    let mut kind = kinds[0];
    let (mut engine, mut running) = vcpu(kind, &memory);
    running.set_registers(&start());
    let (mut count, mut sum, mut clock) = (0u32, 0u32, None);
    for cycle in 0..cycles() {
        for _ in 0..dice.below(5) {
            // Kicks that come at any moment cost nothing but time.
            if dice.below(3) == 0 {
                running.kick_handle().kick();
            }
            loop {
                match running.run().unwrap() {
                    Exit::Write { space: Space::Port, address: 0x80, size: 4, value } => {
                        count += 1;
                        sum = sum.wrapping_add(count);
                        assert_eq!(value, u64::from(count), "cycle {cycle} on {kind:?}");
                        break;
                    }
                    Exit::Interrupted => {}
                    other => panic!("{other:?} in cycle {cycle} on {kind:?}"),
                }
            }
        }
        // Between two instructions, which may be any two of the loop's.
        running.kick_handle().kick();
        while let Exit::Write { .. } = running.run().unwrap() {
            (count, sum) = (count + 1, sum.wrapping_add(count + 1));
            running.kick_handle().kick();
        }
        running.stand();
        engine.stand();
        let text = serde_json::to_string(&running.save().unwrap()).unwrap();
        let saved: VcpuState = serde_json::from_str(&text).unwrap();
        if dice.below(4) == 0 {
            kind = kinds[dice.below(kinds.len() as u64) as usize];
            drop((running, engine));
            (engine, running) = vcpu(kind, &memory);
            running.stand();
            engine.stand();
        }
        running.restore(&saved).unwrap();
        engine.go_on();
        running.go_on();
        // kvmclock never goes back; on the software engine it is the machine's.
        if let Some(now) = saved.clock_ns {
            assert!(clock.is_none_or(|before| before <= now), "cycle {cycle}: {clock:?}, then {now}");
        }
        clock = saved.clock_ns;
    }
    let registers = running.registers();
    let counted = memory.load_u32(0x5000).unwrap();
    // The last turn of the loop may be under way.
    assert!((count..=count + 1).contains(&counted), "{count} {counted}");
    assert!(registers.gpr[6] as u32 == sum || registers.gpr[6] as u32 == sum.wrapping_add(count + 1));
}

#[test]
fn nothing_is_lost_and_nothing_left() {
    let engines = engines::engines();
    let all = || {
        counting_through_saves(&[EngineKind::Soft]);
        counting_through_saves(&engines);
        engines.iter().for_each(|&engine| cases_under_pauses(engine));
    };
    // What is made once, for ever, is made in the first round.
    all();
    let before = held();
    all();
    let after = held();
    let grown = |at: usize| after[at].saturating_sub(before[at]);
    assert!(grown(0) == 0 && grown(1) == 0, "descriptors and threads: {before:?}, then {after:?}");
    // The allocator maps as it likes; a machine that stayed would have many.
    assert!(grown(2) < 64, "mappings: {before:?}, then {after:?}");
}
