//! One case in a machine of its own.

use crate::program;
use machine::{DiskConfig, DiskInterface, EngineKind, Machine, MachineConfig, Outcome};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// What a case printed and how it ended, with nobody disturbing it.
#[allow(dead_code)]
pub fn run(case: &str, engine: EngineKind, patience: Duration) -> String {
    run_beside(case, engine, patience, |_, _| {})
}

/// The same; meanwhile `beside` does what it likes to the machine, until it is told that it is over.
pub fn run_beside(
    case: &str,
    engine: EngineKind,
    patience: Duration,
    beside: impl FnOnce(&Machine, &AtomicBool) + Send,
) -> String {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, program::kernel(case)).unwrap();
    let cpus = match case {
        "case_processors" => 4,
        "case_far_processor" => 300,
        _ => 1,
    };
    let mut config =
        MachineConfig { engine, cpus, memory: 16 << 20, test_devices: true, ..MachineConfig::new(kernel) };
    if case == "case_disk" {
        let image = directory.path().join("disk");
        let sectors = (0x1000u32..0x1008).flat_map(|number| [number.to_le_bytes(); 128].concat());
        std::fs::write(&image, sectors.collect::<Vec<_>>()).unwrap();
        config.disks.push(DiskConfig { interface: DiskInterface::Virtio, ..DiskConfig::raw(image) });
    }
    let machine = Machine::new(config).unwrap();
    machine.start().unwrap();
    let over = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        scope.spawn(|| beside(&machine, &over));
        let outcome = machine.wait_timeout(patience);
        over.store(true, Ordering::SeqCst);
        outcome
    });
    if outcome.is_none() {
        machine.stop();
        machine.wait();
    }
    let (serial, mut bytes) = (machine.serial(), Vec::new());
    while serial.receive(&mut bytes, Duration::from_secs(1)) {}
    let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
    match outcome {
        Some(Outcome::PoweredOff) => text,
        Some(Outcome::Crashed(crash)) => format!("{text} -- {}", crash.why),
        Some(other) => format!("{text} -- {other:?}"),
        None => format!("{text} -- and did not end"),
    }
}
