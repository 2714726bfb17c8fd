//! The engine's tiers: a 64-bit guest at CPL 3, set up as Linux sets up its processes.

use super::case::{CODE, Case, DATA, Ending, Outcome, PAGE, State, WRITABLE};
use cpu::cpuid::{Model, Topology};
use cpu::{DescriptorTable, Segment, attr, cr0, cr4, efer, rflags};
use engine_soft::cpu_core::{Core, Pending, attention};
use engine_soft::exception::Stop;
use engine_soft::state::{Doorbell, Shadow, seg};
use engine_soft::step::step;
use engine_soft::translate::{Config, Translator};
use iced_x86::{Decoder, DecoderOptions, Instruction};
use memory::{Backing, GuestMemory};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Guest-physical places.
mod at {
    pub const PML4: u64 = 0x1000;
    pub const LOW: [u64; 3] = [0x2000, 0x3000, 0x4000];
    pub const HIGH: [u64; 3] = [0x5000, 0x6000, 0x7000];
    /// GDT, IDT, TSS, stack and handlers: a page each, mapped at `KERNEL` for the supervisor.
    pub const SYSTEM: u64 = 0x8000;
    pub const CODE: u64 = 0x10_0000;
    pub const DATA: u64 = 0x10_2000;
}

/// Linear addresses, all in the half where no process has anything.
const KERNEL: u64 = 0xffff_8000_4000_0000;
const GDT: u64 = KERNEL;
const IDT: u64 = KERNEL + 0x1000;
const TSS: u64 = KERNEL + 0x2000;
const STACK: u64 = KERNEL + 0x4000;
const HANDLERS: u64 = KERNEL + 0x4000;

const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// Which way cases go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    Step,
    Template,
    /// Some instructions in the single-step tier, an interrupt, and the rest in the template tier.
    Interrupted,
}

impl Tier {
    pub const ALL: [Self; 3] = [Self::Step, Self::Template, Self::Interrupted];
}

/// What the engine met at its end, in the code as it was then: cases may overwrite their own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Met {
    /// The instruction at RIP, if that is in the code.
    pub instruction: Option<Instruction>,
    /// The case has overwritten some of its instructions.
    pub rewritten: bool,
    /// The case has overwritten the jump at its end, and so may have gone anywhere.
    pub lost: bool,
}

/// The vector whose handler goes back at once.
const INTERRUPT: u8 = 0x40;
const IRETQ: [u8; 2] = [0x48, 0xcf];

/// One vCPU and its RAM.
pub struct Guest {
    tier: Tier,
    core: Core,
    translator: Option<Translator>,
    data: *mut u8,
    /// Counts cases for the watchdog; all ones is the end.
    case: Arc<AtomicU64>,
    watchdog: Option<std::thread::JoinHandle<()>>,
}

/// Gets the engine out of code that never ends. What counts is the time of the CPU: on a busy host the clock on the wall
/// goes on without us.
fn watch(case: &AtomicU64, doorbell: usize) {
    let (mut last, mut since) = (u64::MAX - 1, cpu_time());
    loop {
        std::thread::park_timeout(Duration::from_secs(1));
        let now = case.load(Ordering::SeqCst);
        if now == u64::MAX {
            return;
        }
        if now != last {
            (last, since) = (now, cpu_time());
        } else if cpu_time() - since > Duration::from_secs(1) {
            // SAFETY: the guest joins this thread before its state goes away.
            unsafe { &*(doorbell as *const Doorbell) }.ring(1);
        }
    }
}

/// What this process has used.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.case.store(u64::MAX, Ordering::SeqCst);
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.thread().unpark();
            let _ = watchdog.join();
        }
    }
}

fn segment(selector: u16, attributes: u16) -> Segment {
    let dpl = (selector & 3) << attr::DPL_SHIFT;
    Segment { base: 0, limit: u32::MAX, selector, attr: attributes | dpl }
}

/// No segment: what a null selector loads.
fn null() -> Segment {
    Segment { base: 0, limit: 0, selector: 0, attr: 0 }
}

impl Guest {
    pub fn new(tier: Tier, constant: &[u8]) -> Self {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Private).expect("guest memory");
        tables(&memory);
        system(&memory);
        memory.write(at::DATA + WRITABLE as u64, constant).expect("in RAM");
        let topology = Topology { apic_id: 0, cpus: 1 };
        let table = Model::named("host").and_then(|m| m.table(topology, 1_000_000_000)).expect("a CPU model");
        let mut core = Core::new(memory.clone(), Arc::new(table), 0, 1_000_000_000).expect("a vCPU");
        let state = &mut core.state;
        state.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::MP | cr0::ET | cr0::AM;
        state.cr4 = cr4::PAE
            | cr4::DE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::OSXSAVE
            | cr4::PGE
            | cr4::FSGSBASE
            | cr4::UMIP;
        state.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        state.cr3 = at::PML4;
        state.xcr0 = 7;
        state.gdtr = DescriptorTable { base: GDT, limit: 0x7f };
        state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        state.tr = Segment { base: TSS, limit: 0x67, selector: 0x40, attr: attr::TSS_BUSY };
        let translator =
            (tier != Tier::Step).then(|| Translator::new(&Config::default()).expect("a translator"));
        let data = memory.host_range(at::DATA, WRITABLE as u64, true).expect("in RAM");
        engine_soft::signal::prepare_thread().expect("a signal stack");
        let case = Arc::new(AtomicU64::new(0));
        let (seen, doorbell) = (case.clone(), &raw const core.state.doorbell as usize);
        let watchdog = Some(std::thread::spawn(move || watch(&seen, doorbell)));
        Self { tier, core, translator, data, case, watchdog }
    }

    fn load(&mut self, case: &Case, data: &[u8]) {
        // SAFETY: guest RAM of this struct, which no other thread touches, and no vCPU runs.
        let ram = unsafe { std::slice::from_raw_parts_mut(self.data, WRITABLE) };
        ram.copy_from_slice(data);
        for &(at, value) in &case.pokes {
            let at = (at - DATA) as usize;
            ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let physical = at::CODE + (case.start - CODE);
        let memory = &self.core.mmu.memory;
        memory.fill(at::CODE, 2 * PAGE, 0xcc).expect("in RAM");
        memory.write(physical, &case.bytes()).expect("in RAM");
        if let Some(translator) = &mut self.translator {
            translator.written(&mut self.core, at::CODE, 2 * PAGE);
        }
        let core = &mut self.core;
        if case.flush {
            core.mmu.flush_all(&mut core.state);
        }
        core.pending = Pending::default();
        let state = &mut core.state;
        let start = &case.state;
        state.gpr = start.gpr;
        state.rip = case.start;
        state.rflags = start.rflags | rflags::FIXED | rflags::IF;
        state.segments = [null(); 6];
        state.segments[seg::CS] = segment(USER_CS, attr::CODE64);
        state.segments[seg::SS] = segment(USER_SS, attr::DATA);
        state.segments[seg::FS].base = start.fs;
        state.segments[seg::GS].base = start.gs;
        state.cr2 = 0;
        state.shadow = Shadow::None;
        state.halted = false;
        state.attention |= attention::MODE;
        state.mxcsr = start.mxcsr();
        state.ymm.0 = start.ymm;
        state.x87.0 = start.fx;
    }

    /// Runs a case; the data it leaves is [`Self::data`].
    pub fn run(&mut self, case: &Case, data: &[u8]) -> Outcome {
        self.load(case, data);
        self.core.enter();
        let end = super::native::end();
        let refused =
            self.tier == Tier::Interrupted && self.interrupt(interrupted_at(case), end) || self.advance(end);
        self.core.leave();
        let mut outcome = self.store();
        if refused {
            outcome.ending.kind = Ending::REFUSED;
        }
        outcome
    }

    /// So many instructions, and then an interrupt; `true` if its handler does not go back.
    fn interrupt(&mut self, after: usize, end: u64) -> bool {
        let core = &mut self.core;
        for _ in 0..after {
            if core.state.cpl() == 0 || core.state.rip == end {
                return false;
            }
            if !matches!(step(core), Stop::Continue) {
                return true;
            }
        }
        if core.state.cpl() == 0 || !core.state.interruptible() {
            return false;
        }
        core.pending.interrupt = Some(INTERRUPT);
        if !matches!(core.deliver_pending(), Stop::Continue) || core.state.cpl() != 0 {
            return true;
        }
        !matches!(step(core), Stop::Continue)
    }

    /// Until the end of the code or an exception; `true` if neither comes.
    fn advance(&mut self, end: u64) -> bool {
        self.case.fetch_add(1, Ordering::Relaxed);
        let core = &mut self.core;
        core.state.doorbell.kick.store(0, Ordering::Relaxed);
        for _ in 0..200_000 {
            if core.state.cpl() == 0 || core.state.rip == end {
                return false;
            }
            if let Some(translator) = &mut self.translator {
                translator.run(core);
                if core.state.rip == end {
                    return false;
                }
            }
            if core.state.doorbell.kick.swap(0, Ordering::Relaxed) != 0 {
                return true;
            }
            if !matches!(step(core), Stop::Continue) {
                return true;
            }
        }
        true
    }

    fn store(&mut self) -> Outcome {
        let state = &self.core.state;
        let mut after = State::EMPTY;
        after.gpr = state.gpr;
        (after.rip, after.rflags) = (state.rip, state.rflags);
        (after.fs, after.gs) = (state.segments[seg::FS].base, state.segments[seg::GS].base);
        after.fx = state.x87.0;
        after.set_mxcsr(state.mxcsr);
        after.ymm = state.ymm.0;
        let mut ending = Ending::default();
        if state.cpl() == 0 {
            let vector = (state.rip.wrapping_sub(HANDLERS) / 16) as u32;
            let memory = &self.core.mmu.memory;
            let mut frame = at::SYSTEM + state.gpr[4].wrapping_sub(KERNEL);
            let mut pop = || {
                frame += 8;
                memory.load_u64(frame - 8).unwrap_or(u64::MAX)
            };
            if vector > 0xff {
                return Outcome { state: after, ending: Ending { kind: Ending::CALLED, ..ending } };
            }
            let error = if matches!(vector, 8 | 10..=14 | 17 | 21) { pop() as u32 } else { 0 };
            ending = Ending::exception(vector, error, state.cr2);
            after.rip = pop();
            let _cs = pop();
            after.rflags = pop();
            after.gpr[4] = pop();
        }
        Outcome { state: after, ending }
    }

    /// How many interrupts it took.
    pub fn interrupts(&self) -> u64 {
        self.core.counters.interrupts
    }

    /// What the exception that ended the last case is about.
    pub fn met(&self, case: &Case, outcome: &Outcome) -> Met {
        let mut met = Met::default();
        if outcome.ending.kind == 0 {
            return met;
        }
        let memory = &self.core.mmu.memory;
        let mut code = case.bytes();
        let own = case.code.len();
        let before = code.clone();
        memory.read(at::CODE + (case.start - CODE), &mut code).expect("in RAM");
        met.rewritten = code[..own] != before[..own];
        met.lost = code[own..] != before[own..];
        let offset = outcome.state.rip.wrapping_sub(CODE);
        if offset < 2 * PAGE {
            let mut bytes = [0; 15];
            let len = bytes.len().min((2 * PAGE - offset) as usize);
            memory.read(at::CODE + offset, &mut bytes[..len]).expect("in RAM");
            let rip = outcome.state.rip;
            met.instruction = Some(Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE).decode());
        }
        met
    }

    /// The data as the last case left it.
    pub fn data(&self) -> &[u8] {
        // SAFETY: as in `load`.
        unsafe { std::slice::from_raw_parts(self.data, WRITABLE) }
    }
}

/// After which of its instructions, or before all, a case is interrupted: it depends on the case alone.
fn interrupted_at(case: &Case) -> usize {
    let mix = |sum: u64, value: &u64| (sum ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    (case.state.gpr.iter().fold(case.start, mix) >> 32) as usize % (case.instructions().len() + 1)
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;

fn tables(memory: &GuestMemory) {
    let put = |at: u64, value: u64| memory.write(at, &value.to_le_bytes()).expect("in RAM");
    let map = |tables: [u64; 3], linear: u64, physical: u64, rights: u64| {
        let index = |shift: u32| (linear >> shift & 511) * 8;
        put(at::PML4 + index(39), tables[0] | P | W | U);
        put(tables[0] + index(30), tables[1] | P | W | U);
        put(tables[1] + index(21), tables[2] | P | W | U);
        put(tables[2] + index(12), physical | rights);
    };
    for page in 0..2 {
        map(at::LOW, CODE + page * PAGE, at::CODE + page * PAGE, P | W | U);
        map(at::LOW, DATA + page * PAGE, at::DATA + page * PAGE, P | W | U | NX);
    }
    map(at::LOW, DATA + 2 * PAGE, at::DATA + 2 * PAGE, P | U | NX);
    for page in 0..8 {
        map(at::HIGH, KERNEL + page * PAGE, at::SYSTEM + page * PAGE, P | W);
    }
}

fn system(memory: &GuestMemory) {
    let put = |linear: u64, bytes: &[u8]| {
        memory.write(linear - KERNEL + at::SYSTEM, bytes).expect("in RAM");
    };
    let flat = |attributes: u64| 0x000f_0000_0000_ffff | attributes << 40;
    let gdt = [0, 0, flat(0xa09b), flat(0xc093), flat(0xc0fb), flat(0xc0f3), flat(0xa0fb)];
    for (i, descriptor) in gdt.iter().enumerate() {
        put(GDT + 8 * i as u64, &u64::to_le_bytes(*descriptor));
    }
    for vector in 0..256u64 {
        let handler = HANDLERS + vector * 16;
        // INT3 and INTO may be called by anybody, as in Linux.
        let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = handler & 0xffff | 0x10 << 16 | (0x8e00 | dpl << 13) << 32 | (handler >> 16 & 0xffff) << 48;
        put(IDT + vector * 16, &low.to_le_bytes());
        put(IDT + vector * 16 + 8, &(handler >> 32).to_le_bytes());
    }
    put(HANDLERS + u64::from(INTERRUPT) * 16, &IRETQ);
    // RSP0, and no I/O permission bitmap.
    put(TSS + 4, &STACK.to_le_bytes());
    put(TSS + 102, &0x68u16.to_le_bytes());
}
