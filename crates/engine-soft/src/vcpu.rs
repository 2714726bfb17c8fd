//! [`SoftVcpu`]: the run loop over the two tiers, behind the seam of `cpu`.
//!
//! States: *running* inside `run`; *answering* while an exit waits for [`Vcpu::complete`]; *halted* after HLT. In
//! order of precedence the loop completes an instruction that is half done, delivers what waits, obeys kicks, and runs
//! translated code or a single step.
//!
//! The thread that calls `run` is prepared on its first call: an alternate signal stack, and all signals that others
//! may send are blocked in it, since translated code does not keep RSP on a stack.

use crate::cpu_core::{Core, attention};
use crate::engine::Options;
use crate::exception::Stop;
use crate::signal;
use crate::state::{CpuState, seg};
use crate::step::step;
use crate::translate::{Config, Outcome, Translator};
use cpu::{Error, Exit, Kick, Registers, Vcpu, VcpuConfig};
use memory::GuestMemory;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bits of [`CpuState::kick`].
mod kick {
    /// Somebody wants `run` to return.
    pub(super) const LEAVE: u32 = 1 << 0;
    /// Somebody wrote to a code page.
    pub(super) const CODE: u32 = 1 << 1;
}

/// The flag inside a vCPU's state that translated code polls, for other threads: gone when the vCPU is.
struct Flag(Mutex<Option<*const AtomicU32>>);

#[allow(unsafe_code)]
// SAFETY: the pointer is to an atomic, and is only followed under the lock, which the vCPU takes to clear it.
unsafe impl Send for Flag {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for Flag {}

impl Flag {
    fn new(state: &CpuState) -> Self {
        Self(Mutex::new(Some(&raw const state.kick)))
    }

    fn set(&self, bits: u32) {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flag) = *guard {
            #[allow(unsafe_code)]
            // SAFETY: the vCPU clears the pointer under this lock before its state goes away.
            unsafe {
                (*flag).fetch_or(bits, Ordering::SeqCst);
            }
        }
    }

    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Kick for Flag {
    fn kick(&self) {
        self.set(kick::LEAVE);
    }
}

/// Writes to code pages by others than this vCPU, until it looks.
pub(crate) struct CodeWrites {
    list: Mutex<Vec<(u64, u64)>>,
    flag: Arc<Flag>,
}

/// Beyond this many remembered writes all translations are dropped instead.
const WRITES_MAX: usize = 1024;

impl CodeWrites {
    pub(crate) fn push(&self, address: u64, len: u64) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if list.len() <= WRITES_MAX {
            list.push((address, len));
        }
        drop(list);
        self.flag.set(kick::CODE);
    }

    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.list.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One vCPU of the software engine.
pub struct SoftVcpu {
    core: Core,
    translator: Option<Translator>,
    flag: Arc<Flag>,
    writes: Arc<CodeWrites>,
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        self.flag.end();
    }
}

impl SoftVcpu {
    pub(crate) fn new(
        memory: GuestMemory,
        config: &VcpuConfig,
        options: &Options,
        tsc_hz: u64,
        tsc_offset: u64,
    ) -> Result<Self, Error> {
        let mut core = Core::new(memory, config.cpuid.clone(), config.index, tsc_hz)?;
        core.state.tsc_offset = tsc_offset;
        let translator = if options.translate {
            let config =
                Config { code_cache_bytes: options.code_cache_bytes, single_cpu: options.single_cpu };
            Some(Translator::new(&config)?)
        } else {
            None
        };
        let flag = Arc::new(Flag::new(&core.state));
        let writes = Arc::new(CodeWrites { list: Mutex::new(Vec::new()), flag: flag.clone() });
        let mut vcpu = Self { core, translator, flag, writes };
        vcpu.reset(false);
        Ok(vcpu)
    }

    pub(crate) fn code_writes(&self) -> &Arc<CodeWrites> {
        &self.writes
    }

    /// The vCPU as the tiers see it.
    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    fn run_loop(&mut self) -> Result<Exit, Error> {
        loop {
            if self.core.io.is_empty() {
                match self.between() {
                    Some(Stop::Continue) => continue,
                    Some(Stop::Exit(exit)) => return Ok(exit),
                    Some(Stop::Fail(error)) => return Err(error),
                    None => {}
                }
                if let Some(translator) = &mut self.translator
                    && translator.run(&mut self.core) == Outcome::Kicked
                {
                    continue;
                }
            }
            match step(&mut self.core) {
                Stop::Continue => {}
                Stop::Exit(exit) => return Ok(exit),
                Stop::Fail(error) => return Err(error),
            }
        }
    }

    /// What comes before the next instruction; `None` to execute it.
    fn between(&mut self) -> Option<Stop> {
        let core = &mut self.core;
        if core.pending.nmi || core.pending.interrupt.is_some() {
            let delivered = core.counters.interrupts;
            let nmi = core.pending.nmi;
            match core.deliver_pending() {
                Stop::Continue => {}
                other => return Some(other),
            }
            if delivered != core.counters.interrupts || nmi != core.pending.nmi {
                return Some(Stop::Continue);
            }
        }
        if core.state.kick.load(Ordering::Relaxed) != 0 {
            let bits = core.state.kick.swap(0, Ordering::SeqCst);
            if bits & kick::CODE != 0 {
                self.foreign_writes();
            }
            if bits & kick::LEAVE != 0 {
                return Some(Stop::Exit(Exit::Interrupted));
            }
            return Some(Stop::Continue);
        }
        if core.pending.window && self.interruptible() {
            self.core.pending.window = false;
            return Some(Stop::Exit(Exit::InterruptWindow));
        }
        if self.core.state.halted {
            return Some(Stop::Exit(Exit::Halt));
        }
        None
    }

    fn foreign_writes(&mut self) {
        let writes = self.writes.take();
        let Some(translator) = &mut self.translator else { return };
        if writes.len() > WRITES_MAX {
            translator.flush(&mut self.core);
            return;
        }
        for (address, len) in writes {
            translator.written(&mut self.core, address, len);
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<Exit, Error> {
        signal::prepare_thread()?;
        self.core.enter();
        let exit = self.run_loop();
        self.core.leave();
        exit
    }

    fn complete(&mut self, answer: Option<u64>) {
        self.core.io.complete(answer);
    }

    fn inject_interrupt(&mut self, vector: u8) {
        self.core.pending.interrupt = Some(vector);
    }

    fn inject_nmi(&mut self) {
        self.core.pending.nmi = true;
    }

    fn interruptible(&self) -> bool {
        let core = &self.core;
        core.io.is_empty()
            && core.pending.interrupt.is_none()
            && !core.pending.nmi
            && core.state.interruptible()
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.core.pending.window = wanted;
    }

    fn registers(&self) -> Registers {
        self.core.state.registers()
    }

    fn set_registers(&mut self, registers: &Registers) {
        let core = &mut self.core;
        core.state.set_registers(registers);
        core.state.halted = false;
        core.state.attention |= attention::MODE;
        core.io.commit();
        core.mmu.flush_all(&mut core.state);
    }

    fn msr(&self, index: u32) -> Option<u64> {
        self.core.msr(index)
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        self.core.set_msr(index, value, true)
    }

    fn tsc(&self) -> u64 {
        self.core.tsc()
    }

    fn reset(&mut self, init: bool) {
        let signature = u64::from(self.core.cpuid.query(1, 0).eax);
        let mut registers = Registers::default();
        // EDX holds the processor's signature (Intel SDM 3, 10.1.1).
        registers.gpr[2] = signature;
        let core = &mut self.core;
        if init {
            // CD and NW keep their values, as do XCR0, FPU and most MSRs.
            let kept = cpu::cr0::CD | cpu::cr0::NW;
            registers.cr0 = registers.cr0 & !kept | core.state.cr0 & kept;
            registers.xcr0 = core.state.xcr0;
        } else {
            core.reset_extended();
        }
        core.state.segments[seg::CS] = registers.segments[seg::CS];
        core.state.nmi_blocked = false;
        core.state.shadow = crate::state::Shadow::None;
        core.pending = crate::cpu_core::Pending::default();
        self.set_registers(&registers);
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.flag.clone()
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let counters = &self.core.counters;
        let mut rows = vec![
            ("steps".to_owned(), counters.steps.to_string()),
            ("steps executed by the host CPU".to_owned(), counters.native.to_string()),
            ("exceptions".to_owned(), counters.exceptions.to_string()),
            ("interrupts".to_owned(), counters.interrupts.to_string()),
            ("mmu generation".to_owned(), self.core.mmu.generation.to_string()),
        ];
        if let Some(translator) = &self.translator {
            rows.push(("code cache bytes used".to_owned(), translator.cache_used().to_string()));
            rows.push(("translator".to_owned(), format!("{:?}", translator.statistics())));
        }
        rows
    }
}
