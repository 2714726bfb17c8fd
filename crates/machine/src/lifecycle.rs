//! Whether the machine runs, and how it ended.
//!
//! States: built, running, paused, restarting, ended (with an [`Outcome`], the first one reported). Running vCPUs are
//! woken when what is wanted changes; parked ones wait here. To restart, all vCPUs meet here; the last one to come
//! resets the machine while the others wait.
//!
//! Lock order: the state's lock alone; vCPUs are woken without it.

use cpu::Registers;
use device::VmTime;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest asked for a reset, and the machine is one that ends then.
    Reset,
    /// The guest asked for a reset, and its kernel could not be loaded again: why.
    NotRestarted(String),
    /// The guest's kernel said that it panicked.
    GuestPanic,
    /// The guest wrote to the debug-exit port: the code to leave with (twice the value written, plus one).
    DebugExit(u8),
    /// A vCPU cannot go on.
    Crashed(Box<Crash>),
    /// The host stopped it.
    Stopped,
}

/// What is known of a vCPU that cannot go on.
#[derive(Debug, Clone, PartialEq)]
pub struct Crash {
    /// One sentence.
    pub why: String,
    /// Which vCPU.
    pub vcpu: usize,
    /// Whether it is the guest's own doing (a triple fault), not the engine's.
    pub guest: bool,
    /// When.
    pub at: VmTime,
    /// Its registers.
    pub registers: Registers,
    /// Its last exits, if they were logged: instruction pointer and exit.
    pub last_exits: Vec<(u64, String)>,
    /// What the engine says of itself.
    pub engine: Vec<(String, String)>,
}

impl std::fmt::Display for Crash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "vCPU {} stopped after {} ms: {}", self.vcpu, self.at.0 / 1_000_000, self.why)?;
        let r = &self.registers;
        for (names, values) in Registers::GENERAL.chunks(4).zip(r.gpr.chunks(4)) {
            for (name, value) in names.iter().zip(values) {
                write!(f, "  {name:>3} {value:016x}")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "  rip {:016x}  rflags {:08x}  efer {:04x}  cr8 {:x}", r.rip, r.rflags, r.efer, r.cr8)?;
        writeln!(f, "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}", r.cr0, r.cr2, r.cr3, r.cr4)?;
        for (name, segment) in Registers::SEGMENTS.iter().zip(&r.segments) {
            writeln!(
                f,
                "  {name} {:04x} base {:016x} limit {:08x} attr {:04x}",
                segment.selector, segment.base, segment.limit, segment.attr
            )?;
        }
        writeln!(f, "  gdt {:x}/{:x}  idt {:x}/{:x}", r.gdtr.base, r.gdtr.limit, r.idtr.base, r.idtr.limit)?;
        for (rip, exit) in &self.last_exits {
            writeln!(f, "  exit at {rip:x}: {exit}")?;
        }
        for (name, value) in &self.engine {
            writeln!(f, "  {name}: {value}")?;
        }
        Ok(())
    }
}

/// What vCPUs should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Run,
    Pause,
    Restart,
    Stop,
}

/// A vCPU's part in a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// All others wait: reset the machine, then [`Lifecycle::restarted`].
    Last,
    /// Another vCPU has reset the machine.
    Over,
    /// The machine stops.
    Stop,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    parked: usize,
    /// vCPU threads that have returned.
    gone: usize,
    /// vCPUs that have come to the restart.
    met: usize,
    /// When somebody last asked the guest to power off.
    off_asked: Option<Instant>,
}

/// A guest that resets within this time after it was asked to power off has done what was meant.
const OFF_TIME: Duration = Duration::from_secs(120);

/// The state of one machine.
#[derive(Default)]
pub(crate) struct Lifecycle {
    /// [`Wanted`] as a number, read before every run.
    wanted: AtomicU8,
    /// A reset has been asked for and is not over.
    restarting: AtomicBool,
    restarts: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    wake_all: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Lifecycle {
    /// Names how all vCPUs are made to look at [`Self::wanted`].
    pub(crate) fn set_wake_all(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake_all.set(Box::new(wake));
    }

    pub(crate) fn wanted(&self) -> Wanted {
        match self.wanted.load(Ordering::SeqCst) {
            2.. => Wanted::Stop,
            _ if self.restarting.load(Ordering::SeqCst) => Wanted::Restart,
            0 => Wanted::Run,
            1 => Wanted::Pause,
        }
    }

    fn want(&self, wanted: Wanted) {
        {
            // Under the lock, so that nobody misses it between looking and waiting.
            let _state = self.lock();
            if self.wanted() != Wanted::Stop {
                match wanted {
                    Wanted::Run => self.wanted.store(0, Ordering::SeqCst),
                    Wanted::Pause => self.wanted.store(1, Ordering::SeqCst),
                    Wanted::Restart => self.restarting.store(true, Ordering::SeqCst),
                    Wanted::Stop => self.wanted.store(2, Ordering::SeqCst),
                }
            }
            self.changed.notify_all();
        }
        if let Some(wake) = self.wake_all.get() {
            wake();
        }
    }

    /// The machine ends; the first outcome counts.
    pub(crate) fn end(&self, outcome: Outcome) {
        {
            let mut state = self.lock();
            if state.outcome.is_none() {
                state.outcome = Some(outcome);
            }
            self.wanted.store(2, Ordering::SeqCst);
        }
        self.want(Wanted::Stop);
    }

    /// The guest resets the machine: all vCPUs [`Self::meet`]. If it was asked to power off, the machine ends instead.
    pub(crate) fn restart(&self) {
        let off_asked = self.lock().off_asked;
        if off_asked.is_some_and(|asked| asked.elapsed() < OFF_TIME) {
            self.end(Outcome::Stopped);
        } else {
            self.want(Wanted::Restart);
        }
    }

    /// Somebody asks the guest to power off.
    pub(crate) fn ask_off(&self) {
        self.lock().off_asked = Some(Instant::now());
    }

    /// One of `cpus` vCPUs has come to a restart; all but the last wait here for its end.
    pub(crate) fn meet(&self, cpus: usize) -> Meeting {
        let mut state = self.lock();
        state.met = state.met.saturating_add(1);
        if state.met >= cpus {
            return Meeting::Last;
        }
        let turn = self.restarts();
        while self.restarts() == turn {
            if self.wanted() == Wanted::Stop {
                return Meeting::Stop;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Meeting::Over
    }

    /// The machine has been reset: all vCPUs go on.
    pub(crate) fn restarted(&self) {
        let mut state = self.lock();
        state.met = 0;
        self.restarting.store(false, Ordering::SeqCst);
        self.restarts.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// How often the machine has been reset.
    pub(crate) fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::SeqCst)
    }

    /// Asks all `cpus` vCPUs to park and waits until they have; `false` if the machine ended instead.
    pub(crate) fn pause(&self, cpus: usize) -> bool {
        if self.lock().outcome.is_some() {
            return false;
        }
        self.want(Wanted::Pause);
        let mut state = self.lock();
        while state.parked < cpus {
            if state.outcome.is_some() {
                return false;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.outcome.is_none()
    }

    /// Lets parked vCPUs go on.
    pub(crate) fn resume(&self) {
        let state = self.lock();
        if state.outcome.is_none() {
            drop(state);
            self.want(Wanted::Run);
        }
    }

    /// A vCPU parks until it may go on; `false` if it must not.
    pub(crate) fn park(&self) -> bool {
        let mut state = self.lock();
        state.parked = state.parked.saturating_add(1);
        self.changed.notify_all();
        while self.wanted() == Wanted::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = state.parked.saturating_sub(1);
        self.wanted() != Wanted::Stop
    }

    /// A vCPU's thread is about to return.
    pub(crate) fn leave(&self) {
        let mut state = self.lock();
        state.gone = state.gone.saturating_add(1);
        self.changed.notify_all();
    }

    /// Waits until the machine has ended and `cpus` vCPU threads have returned, or for `limit`.
    pub(crate) fn wait(&self, cpus: usize, limit: Option<Duration>) -> Option<Outcome> {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut state = self.lock();
        loop {
            if let Some(outcome) = state.outcome.clone().filter(|_| state.gone >= cpus) {
                return Some(outcome);
            }
            state = match until {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// How the machine ended, if it did.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
