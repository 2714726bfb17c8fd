//! What an engine's exits cost: each kind by a guest that does nothing else, kicks and interrupts by asking how long they take.
//!
//!     cargo run --release -p machine --example latency -- soft|kvm
//!
//! One line for each measurement: name, median of nine rounds in nanoseconds, and the spread of the middle half.

use cpu::cpuid::{MODELS, Topology};
use cpu::{Engine, Exit, Segment, Vcpu, VcpuConfig, attr, cr0};
use memory::{Backing, GuestMemory};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const CODE: u64 = 0x8000;
const ROUNDS: usize = 9;
const EACH: u32 = 2000;

type Failed = Box<dyn std::error::Error>;

/// A vCPU, after the engine that it must not outlive.
type Guest = (Box<dyn Vcpu>, Arc<dyn Engine>);

/// Flat 32-bit code at [`CODE`], interrupts through a table at 0x4000 whose gate 0x40 is at 0x9000.
fn guest(engine: &str, code: &[u8]) -> Result<Guest, Failed> {
    let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private)?;
    memory.write(CODE, code)?;
    memory.write(0x3008, &0x00cf_9b00_0000_ffffu64.to_le_bytes())?;
    memory.write(0x4000 + 0x40 * 8, &0x0000_8e00_0008_9000u64.to_le_bytes())?;
    // The handler: out 0x81, al; add esp, 12; jmp to the beginning. (Not every KVM can emulate IRET in such code.)
    memory.write(0x9000, &[0xe6, 0x81, 0x83, 0xc4, 0x0c, 0xe9, 0xf6, 0xef, 0xff, 0xff])?;
    let engine: Arc<dyn Engine> = match engine {
        "kvm" => Arc::new(engine_kvm::KvmEngine::new(memory, engine_kvm::Options::default())?),
        "soft" => Arc::new(engine_soft::SoftEngine::new(memory, engine_soft::Options::default())?),
        other => return Err(format!("there is no engine called {other}").into()),
    };
    let model = MODELS.last().ok_or("there is no model")?;
    let table = engine.offer(model.table(Topology { apic_id: 0, cpus: 1 }, engine.tsc_hz())?);
    let mut vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid: Arc::new(table) })?;
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    let data = flat(16, attr::DATA);
    let mut registers = vcpu.registers();
    registers.segments = [data, flat(8, attr::CODE32), data, data, data, data];
    (registers.cr0, registers.rip, registers.gpr[4]) = (cr0::PE | cr0::ET, CODE, 0x7000);
    (registers.gdtr.base, registers.gdtr.limit) = (0x3000, 15);
    (registers.idtr.base, registers.idtr.limit) = (0x4000, 0x7ff);
    vcpu.set_registers(&registers);
    Ok((vcpu, engine))
}

/// Nanoseconds of one exit: `EACH` of them, `ROUNDS` times.
fn exits(engine: &str, code: &[u8]) -> Result<Vec<f64>, Failed> {
    let (mut vcpu, _engine) = guest(engine, code)?;
    let mut one = || -> Result<(), Failed> {
        if let Exit::Read { .. } | Exit::ReadMsr { .. } = vcpu.run()? {
            vcpu.complete(Some(0));
        }
        Ok(())
    };
    (0..EACH).try_for_each(|_| one())?;
    (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            (0..EACH).try_for_each(|_| one())?;
            Ok(began.elapsed().as_nanos() as f64 / f64::from(EACH))
        })
        .collect()
}

/// From a kick on another thread to the return of a run.
fn kicks(engine: &str) -> Result<Vec<f64>, Failed> {
    let (mut vcpu, _engine) = guest(engine, &[0xeb, 0xfe])?;
    let kick = vcpu.kick_handle();
    let over = Arc::new(AtomicBool::new(false));
    let (sender, kicked) = std::sync::mpsc::sync_channel(1);
    let done = over.clone();
    let kicker = std::thread::spawn(move || {
        while !done.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
            let at = Instant::now();
            if sender.send(at).is_err() {
                return;
            }
            kick.kick();
        }
    });
    let mut took = Vec::new();
    while took.len() < 200 {
        if vcpu.run()? == Exit::Interrupted
            && let Ok(at) = kicked.try_recv()
        {
            took.push(at.elapsed().as_nanos() as f64);
        }
    }
    over.store(true, Ordering::Release);
    drop(kicked);
    kicker.join().map_err(|_| "the kicker failed")?;
    Ok(took)
}

/// From an interrupt's injection to the first access of its handler.
fn interrupts(engine: &str) -> Result<Vec<f64>, Failed> {
    // sti; out 0x80, al; jmp to the out
    let (mut vcpu, _engine) = guest(engine, &[0xfb, 0xe6, 0x80, 0xeb, 0xfc])?;
    let mut took = Vec::new();
    let mut asked = None;
    while took.len() < 2000 {
        let exit = vcpu.run()?;
        if let (Exit::Write { address: 0x81, .. }, Some(at)) = (&exit, asked) {
            took.push(Instant::elapsed(&at).as_nanos() as f64);
            asked = None;
        } else if asked.is_none() && vcpu.interruptible() {
            asked = Some(Instant::now());
            vcpu.inject_interrupt(0x40);
        } else if asked.is_none() {
            vcpu.request_interrupt_window(true);
        }
    }
    Ok(took)
}

fn told(name: &str, mut samples: Vec<f64>) {
    samples.sort_by(f64::total_cmp);
    let at = |share: usize| samples.get(samples.len() * share / 100).copied().unwrap_or(f64::NAN);
    println!("{name} {:.0} {:.0} {:.0}", at(50), at(25), at(75));
}

fn main() -> Result<(), Failed> {
    let engine = std::env::args().nth(1).ok_or("which engine: soft or kvm?")?;
    let jump_back = |code: &[u8]| [code, &[0xeb, (0u8).wrapping_sub(code.len() as u8 + 2)]].concat();
    told("port_write", exits(&engine, &jump_back(&[0xe6, 0x80]))?);
    told("port_read", exits(&engine, &jump_back(&[0xe4, 0x80]))?);
    // mov [0xfd000000], eax, and the other way round.
    told("mmio_write", exits(&engine, &jump_back(&[0xa3, 0, 0, 0, 0xfd]))?);
    told("mmio_read", exits(&engine, &jump_back(&[0xa1, 0, 0, 0, 0xfd]))?);
    // mov ecx, 0xc0010015; rdmsr: AMD's HWCR, which is the machine's on both engines.
    told("msr_read", exits(&engine, &jump_back(&[0xb9, 0x15, 0, 0x01, 0xc0, 0x0f, 0x32]))?);
    told("kick", kicks(&engine)?);
    told("interrupt", interrupts(&engine)?);
    Ok(())
}
