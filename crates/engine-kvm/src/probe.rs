//! Does this host's KVM run kernels? Opening /dev/kvm does not tell: some hosts offer it on top of a back end that
//! refuses instructions every kernel uses, or emulates kernel code one instruction at a time. So a small guest runs on
//! the engine itself, the way every guest does.
//!
//! A verdict takes about the time of making a VM and a millisecond of guest code. What takes long is judged by the
//! processor time that it took, not by the clock: a busy host is no slow KVM.

use crate::engine::{KvmEngine, Options};
use crate::guest::{LOOP_ITERATIONS, PORT, program};
use cpu::cpuid::{Model, Topology};
use cpu::{Engine, Error, Exit, Registers, Segment, Space, Vcpu, VcpuConfig, attr, cr0, cr4, efer};
use memory::{Backing, GuestMemory};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Processor time that the probe's guest may take in all.
const PROCESSOR_TIME_MAX: Duration = Duration::from_millis(15);
/// How long it may take by the clock.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Processor time that the timed loop may take; native, it is a tenth of a millisecond.
const LOOP_MAX: Duration = Duration::from_millis(2);
/// How often its time is looked at.
const TURN: Duration = Duration::from_millis(5);

/// What a look at /dev/kvm told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It runs what kernels execute, at native speed.
    Usable {
        /// Nanoseconds per iteration of the timed loop, in tenths.
        loop_tenth_ns: u64,
    },
    /// It does not; one clause says why, another what to do about it.
    Unusable {
        /// What is wrong, for a sentence that begins with "/dev/kvm".
        why: String,
        /// What the user can do, if anything.
        cure: Option<String>,
        /// Whether guests that keep to what it can do may run all the same: the engine works.
        engine_works: bool,
    },
}

/// Tries /dev/kvm with a small guest.
pub fn probe() -> Verdict {
    match Guest::new() {
        Ok(guest) => run(guest),
        Err(error) => refused(error),
    }
}

fn unusable(why: impl Into<String>, cure: Option<&str>, engine_works: bool) -> Verdict {
    Verdict::Unusable { why: why.into(), cure: cure.map(str::to_owned), engine_works }
}

/// There is no engine here: why, for people.
fn refused(error: Error) -> Verdict {
    let Error::Host { what: "opening /dev/kvm", source } = error else {
        return unusable(format!("makes no guests ({error})"), None, false);
    };
    match source.kind() {
        ErrorKind::NotFound => unusable(
            "does not exist",
            Some(
                "enable virtualization in the firmware, or nesting in the cloud, and load kvm_intel or kvm_amd",
            ),
            false,
        ),
        ErrorKind::PermissionDenied => unusable(
            "may not be opened by this user",
            Some("sudo usermod -aG kvm $USER, then log in again"),
            false,
        ),
        _ => unusable(format!("cannot be opened ({source})"), None, false),
    }
}

const STEPS: [&str; 6] = ["its first instruction", "int3", "cmpxchg16b", "xrstor", "a loop", "the end"];

fn step_name(step: u8) -> &'static str {
    STEPS.get(usize::from(step)).copied().unwrap_or("its end")
}

fn run(mut guest: Guest) -> Verdict {
    let step = Arc::new(AtomicU8::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let kick = guest.vcpu.kick_handle();
    let (seen, done) = (step.clone(), over.clone());
    let spawned = thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        let ended = guest.run(&seen);
        done.store(true, Ordering::Release);
        ended
    });
    let Ok(thread) = spawned else { return unusable("could not be tried: no thread", None, true) };
    let began = Instant::now();
    while !over.load(Ordering::Acquire) {
        // Its own end wakes nobody; a kick makes it look at the time that it took.
        thread::sleep(Duration::from_micros(200));
        if began.elapsed() > TURN {
            kick.kick();
            thread::sleep(TURN);
        }
    }
    match thread.join() {
        Ok(Ok(took)) if took > LOOP_MAX => unusable(
            format!(
                "emulates kernel code: {} ns per instruction where native code takes less than one",
                took.as_nanos().checked_div(u128::from(LOOP_ITERATIONS).saturating_mul(2)).unwrap_or(0)
            ),
            None,
            true,
        ),
        Ok(Ok(took)) => Verdict::Usable {
            loop_tenth_ns: u64::try_from(took.as_nanos())
                .unwrap_or(u64::MAX)
                .saturating_mul(10)
                .checked_div(LOOP_ITERATIONS.into())
                .unwrap_or(0),
        },
        Ok(Err(Failure::Slow)) => {
            let at = step_name(step.load(Ordering::Acquire));
            unusable(
                format!("crawls: our test guest took more than {PROCESSOR_TIME_MAX:?} (at {at})"),
                None,
                true,
            )
        }
        Ok(Err(Failure::At(step, why))) => {
            let at = step_name(step);
            unusable(format!("does not run kernels: our test guest failed at {at} ({why})"), None, true)
        }
        Err(_) => unusable("could not be tried: the probe failed", None, false),
    }
}

/// Why the guest did not come to its end.
enum Failure {
    Slow,
    At(u8, String),
}

/// The test guest: 2 MiB of RAM, identity-mapped, one vCPU in long mode.
struct Guest {
    vcpu: Box<dyn Vcpu>,
}

const RAM: u64 = 2 << 20;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x7ff0;
const IDT: u64 = 0x6000;
const PAGE_TABLES: u64 = 0x1000;
const PAGE_DIRECTORIES: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x9000;
const XSAVE: u32 = 1 << 26;

fn layout(memory: &GuestMemory) -> Result<(), memory::AccessError> {
    let (code, handler) = program();
    memory.write(CODE, code)?;
    // One 2 MiB page through three levels: present, writable; page size in the last.
    memory.write(PAGE_TABLES, &(PAGE_DIRECTORIES | 3).to_le_bytes())?;
    memory.write(PAGE_DIRECTORIES, &(PAGE_DIRECTORY | 3).to_le_bytes())?;
    memory.write(PAGE_DIRECTORY, &0x83u64.to_le_bytes())?;
    // GDT: null, 64-bit code, data. IDT: vector 3 is an interrupt gate to the handler.
    memory
        .write(GDT, &[0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat())?;
    let to = CODE.wrapping_add(handler);
    let gate = to & 0xffff | 8 << 16 | 0x8e00 << 32 | (to >> 16 & 0xffff) << 48;
    memory.write(IDT.wrapping_add(3 * 16), &[gate.to_le_bytes(), (to >> 32).to_le_bytes()].concat())
}

fn registers(xsave: bool) -> Registers {
    let segment = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    let data = segment(16, attr::DATA);
    let mut registers = Registers {
        rip: CODE,
        segments: [data, segment(8, attr::CODE64), data, data, data, data],
        tr: Segment { base: 0, limit: 0x67, selector: 0, attr: attr::TSS_BUSY },
        cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG,
        cr3: PAGE_TABLES,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | if xsave { cr4::OSXSAVE } else { 0 },
        efer: efer::LME | efer::LMA,
        ..Registers::default()
    };
    (registers.gdtr.base, registers.gdtr.limit) = (GDT, 23);
    (registers.idtr.base, registers.idtr.limit) = (IDT, 4 * 16 - 1);
    registers.gpr = [0, 0, 0, 0, STACK, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, xsave.into()];
    registers
}

impl Guest {
    fn new() -> Result<Self, Error> {
        let no_room = |_| Error::Host { what: "making guest RAM", source: ErrorKind::OutOfMemory.into() };
        let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).map_err(no_room)?;
        layout(&memory)
            .map_err(|_| Error::Host { what: "writing guest RAM", source: ErrorKind::NotFound.into() })?;
        let engine = KvmEngine::new(memory, Options::default())?;
        let model = Model::named("host")
            .and_then(|host| host.table(Topology { apic_id: 0, cpus: 1 }, engine.tsc_hz()));
        let no_model =
            |error: cpu::cpuid::ModelError| Error::Unsupported { engine: "kvm", why: error.to_string() };
        let table = engine.offer(model.map_err(no_model)?);
        let xsave = table.query(1, 0).ecx & XSAVE != 0;
        let mut vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid: Arc::new(table) })?;
        vcpu.set_registers(&registers(xsave));
        Ok(Self { vcpu })
    }

    /// Runs to the end; answers the processor time that the loop took.
    fn run(&mut self, step: &AtomicU8) -> Result<Duration, Failure> {
        let began = (Instant::now(), thread_time());
        let mut loop_began = began.1;
        loop {
            let at = step.load(Ordering::Acquire);
            match self.vcpu.run() {
                Ok(Exit::Write { space: Space::Port, address, value, .. }) if address == u64::from(PORT) => {
                    match value as u8 {
                        4 => loop_began = thread_time(),
                        5 => return Ok(thread_time().saturating_sub(loop_began)),
                        9 => return Err(Failure::At(at, "wrong result".into())),
                        _ => {}
                    }
                    step.store(value as u8, Ordering::Release);
                }
                Ok(Exit::Interrupted) => {
                    let took = thread_time().saturating_sub(began.1);
                    if took > PROCESSOR_TIME_MAX || began.0.elapsed() > PATIENCE {
                        return Err(Failure::Slow);
                    }
                }
                Ok(Exit::Shutdown) => return Err(Failure::At(at, "triple fault".into())),
                Ok(other) => return Err(Failure::At(at, format!("unexpected exit {other:?}"))),
                Err(Error::Guest { why, .. }) => return Err(Failure::At(at, why)),
                Err(error) => return Err(Failure::At(at, error.to_string())),
            }
        }
    }
}

/// Processor time of the calling thread.
#[allow(unsafe_code)]
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_probe_comes_to_a_verdict_in_time() {
        let begin = Instant::now();
        let verdict = probe();
        assert!(begin.elapsed() < PATIENCE * 2, "{verdict:?} took {:?}", begin.elapsed());
        if let Verdict::Unusable { why, .. } = &verdict {
            assert!(!why.is_empty());
        }
        println!("{verdict:?} after {:?}", begin.elapsed());
    }

    #[test]
    fn a_host_without_kvm_is_explained() {
        let error =
            |code| Error::Host { what: "opening /dev/kvm", source: std::io::Error::from_raw_os_error(code) };
        let told = |code| match refused(error(code)) {
            Verdict::Unusable { why, cure, engine_works: false } => (why, cure.unwrap_or_default()),
            other => panic!("{other:?}"),
        };
        assert!(told(libc::ENOENT).1.contains("kvm_intel"));
        assert!(told(libc::EACCES).1.contains("usermod"));
        assert!(told(libc::EBUSY).0.contains("cannot be opened"));
    }
}
