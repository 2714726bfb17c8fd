//! [`SoftVcpu`]: the run loop over the two tiers, behind the seam of `cpu`.
//!
//! States: *running* inside `run`; *answering* while an exit waits for [`Vcpu::complete`]; *halted* after HLT. In
//! order of precedence the loop completes an instruction that is half done, delivers what waits, obeys kicks, and runs
//! translated code or a single step.
//!
//! The thread that calls `run` is prepared on its first call: an alternate signal stack, and all signals that others
//! may send are blocked in it, since translated code does not keep RSP on a stack.

use crate::cpu_core::{Core, attention};
use crate::debug::DR6_BS;
use crate::direct::{Direct, Next};
use crate::engine::{Options, Stood};
use crate::exception::{Exception, Stop};
use crate::peers::{Flag, Peers, Requests, Watch, kick};
use crate::saved;
use crate::signal;
use crate::state::seg;
use crate::step::step;
use crate::translate::visit::Visit;
use crate::translate::{Config, Outcome, Translator};
use crate::verify::Verifier;
use cpu::{Error, Exit, HostCode, Kick, Registers, Vcpu, VcpuConfig};
use memory::GuestMemory;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One vCPU of the software engine.
pub struct SoftVcpu {
    core: Core,
    translator: Option<Translator>,
    direct: Option<Direct>,
    verifier: Option<Verifier>,
    flag: Arc<Flag>,
    requests: Arc<Requests>,
    /// How long the machine has stood still, and how much of that the TSC knows.
    stood: Arc<Stood>,
    stood_known: u64,
    /// The TSC's offset as if nobody had written to it: all vCPUs' is the same.
    first_offset: u64,
}

impl Drop for SoftVcpu {
    fn drop(&mut self) {
        // After a panic in `run`, too: the others must not wait for a vCPU that is no more.
        self.requests.set_inside(false);
        self.flag.end();
        // Only now nobody signals its processes any more.
        self.direct = None;
    }
}

impl SoftVcpu {
    pub(crate) fn new(
        memory: GuestMemory,
        config: &VcpuConfig,
        options: &Options,
        watch: &Arc<Watch>,
        (tsc_hz, tsc_offset, stood): (u64, u64, Arc<Stood>),
    ) -> Result<Self, Error> {
        let mut core = Core::new(memory, config.cpuid.clone(), config.index, tsc_hz)?;
        core.state.tsc_offset = tsc_offset;
        core.state.tsc_divisor = options.clock_divisor.max(1).into();
        let translator = if options.translate {
            let config =
                Config { code_cache_bytes: options.code_cache_bytes, single_cpu: options.single_cpu };
            Some(Translator::new(&config)?)
        } else {
            None
        };
        let flag = Arc::new(Flag::new(&core.state));
        let requests = Arc::new(Requests::new(flag.clone()));
        watch.add(config.index as usize, &requests);
        if !options.single_cpu {
            core.set_peers(Peers::new(watch.clone(), requests.clone(), config.index as usize));
        }
        let verifier = options.verify.then(Verifier::default);
        let direct =
            options.direct && options.translate && !options.verify && core.mmu.memory.file().is_some();
        let direct = direct.then(|| Direct::new(tsc_hz));
        let stood_known = stood.ticks();
        let first_offset = tsc_offset;
        let mut vcpu =
            Self { core, translator, direct, verifier, flag, requests, stood, stood_known, first_offset };
        vcpu.reset(false);
        Ok(vcpu)
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
                match self.run_direct()? {
                    Next::Kicked => continue,
                    Next::Step => {}
                    Next::SingleStepped => match self.core.raise(Exception::debug(DR6_BS)) {
                        Stop::Continue => continue,
                        Stop::Exit(exit) => return Ok(exit),
                        Stop::Fail(error) => return Err(error),
                    },
                    Next::Translate => {
                        if self.translate()? == Outcome::Kicked {
                            continue;
                        }
                    }
                }
            }
            match step(&mut self.core) {
                Stop::Continue => {}
                Stop::Exit(exit) => return Ok(exit),
                Stop::Fail(error) => return Err(error),
            }
        }
    }

    /// Runs user code on the host's CPU, if that is worth it.
    fn run_direct(&mut self) -> Result<Next, Error> {
        let (Some(direct), Some(translator)) = (&mut self.direct, &mut self.translator) else {
            return Ok(Next::Translate);
        };
        if !direct.wants(&self.core.state) {
            translator.visit = None;
            return Ok(Next::Translate);
        }
        if translator.visit.as_ref().is_some_and(|visit| !visit.over(&self.core.state)) {
            return Ok(Next::Translate);
        }
        translator.drain_writes(&mut self.core);
        let next = direct.run(&mut self.core)?;
        translator.visit = (next == Next::Translate).then(|| Visit::new(&self.core.state));
        Ok(next)
    }

    fn translate(&mut self) -> Result<Outcome, Error> {
        match (&mut self.translator, &mut self.verifier) {
            (None, _) => Ok(Outcome::Step),
            (Some(translator), None) => Ok(translator.run(&mut self.core)),
            (Some(translator), Some(verifier)) => verifier.run(&mut self.core, translator),
        }
    }

    /// What comes before the next instruction; `None` to execute it.
    fn between(&mut self) -> Option<Stop> {
        let core = &mut self.core;
        if core.pending.nmi || core.pending.interrupt.is_some() {
            if let Some(direct) = &mut self.direct
                && core.pending.interrupt.is_some()
                && core.state.interruptible()
            {
                direct.sample(&core.state);
            }
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
        if core.state.doorbell.rung() != 0 {
            let bits = core.state.doorbell.kick.swap(0, Ordering::SeqCst);
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
        self.requests.forget(&mut self.core.mmu, &mut self.core.state);
        for (page, written) in self.requests.take_written() {
            self.core.mmu.news.written(page);
            if let Some(translator) = &mut self.translator {
                for (offset, len) in written.runs() {
                    translator.written(&mut self.core, page + offset, len);
                }
            }
            if written.drops()
                && let Some(peers) = &self.core.peers
            {
                peers.dropped(page, &self.core.mmu.memory);
            }
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<Exit, Error> {
        signal::prepare_thread()?;
        self.requests.set_inside(true);
        self.foreign_writes();
        self.core.enter();
        let exit = self.run_loop();
        self.core.leave();
        self.requests.set_inside(false);
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

    fn task_priority(&self) -> u8 {
        self.core.state.cr8 as u8
    }

    fn set_task_priority(&mut self, priority: u8) {
        self.core.state.cr8 = u64::from(priority & 0xf);
    }

    fn tsc(&self) -> u64 {
        self.core.tsc()
    }

    fn flush_tlb(&mut self) {
        self.core.mmu.flush_all(&mut self.core.state);
    }

    fn go_on(&mut self) {
        let stood = self.stood.ticks();
        let more = stood.wrapping_sub(std::mem::replace(&mut self.stood_known, stood));
        let state = &mut self.core.state;
        let more = more.checked_div(state.tsc_divisor).unwrap_or(0);
        state.tsc_offset = state.tsc_offset.wrapping_sub(more);
        self.first_offset = self.first_offset.wrapping_sub(more);
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
            core.state.tsc_offset = self.first_offset;
            if let Some(translator) = &mut self.translator {
                // What was translated belongs to what ran before.
                translator.flush(core);
            }
        }
        core.state.segments[seg::CS] = registers.segments[seg::CS];
        core.state.nmi_blocked = false;
        core.state.shadow = crate::state::Shadow::None;
        core.pending = crate::cpu_core::Pending::default();
        self.set_registers(&registers);
    }

    fn activity(&self) -> cpu::Activity {
        if self.core.state.halted { cpu::Activity::Halted } else { cpu::Activity::Running }
    }

    fn save(&self) -> Result<cpu::VcpuState, Error> {
        let mut state = saved::save(&self.core);
        // All vCPUs' TSCs as of the same moment, or they would be apart afterwards.
        if let Some(since) = self.stood.since()
            && let Some(tsc) = state.msrs.get_mut(&cpu::msr::TSC)
        {
            *tsc = self.core.tsc_at(since);
        }
        Ok(state)
    }

    fn restore(&mut self, state: &cpu::VcpuState) -> Result<(), Error> {
        if let Some(translator) = &mut self.translator {
            translator.flush(&mut self.core);
        }
        saved::restore(&mut self.core, state)?;
        if let (Some(since), Some(&tsc)) = (self.stood.since(), state.msrs.get(&cpu::msr::TSC)) {
            let off = tsc.wrapping_sub(self.core.tsc_at(since));
            self.core.state.tsc_offset = self.core.state.tsc_offset.wrapping_add(off);
        }
        self.stood_known = self.stood.ticks();
        Ok(())
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.flag.clone()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.core.counters;
        let mut rows = vec![
            ("steps", counters.steps),
            ("steps_native", counters.native),
            ("exceptions", counters.exceptions),
            ("interrupts", counters.interrupts),
        ];
        if let Some(translator) = &self.translator {
            let done = translator.statistics();
            rows.extend([
                ("code_cache_bytes", translator.cache_used() as u64),
                ("blocks", done.blocks),
                ("guest_bytes", done.guest_bytes),
                ("host_bytes", done.host_bytes),
                ("cache_flushes", done.cache_flushes),
                ("blocks_killed", done.blocks_killed),
                ("slow_writes", done.slow_writes),
                ("tlb_misses", done.tlb_misses),
                ("jump_cache_changes", done.salts),
                ("entries", done.entries),
                ("exits_step", done.exits_step),
                ("exits_link", done.exits_link),
                ("exits_bridge", done.exits_bridge),
                ("exits_lookup", done.exits_lookup),
                ("exits_kick", done.exits_kick),
            ]);
        }
        if let Some(direct) = &self.direct {
            let done = &direct.statistics;
            rows.extend([
                ("direct_entries", done.entries),
                ("direct_stops", done.stops),
                ("direct_steps", done.steps),
                ("direct_pages", done.pages),
            ]);
        }
        rows
    }

    fn host_code(&self) -> Vec<HostCode> {
        self.translator.as_ref().map(Translator::host_code).unwrap_or_default()
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let mut rows: Vec<_> =
            self.counters().into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect();
        rows.push(("mmu generation".to_owned(), self.core.mmu.generation().to_string()));
        if let Some(why) = self.direct.as_ref().and_then(Direct::off) {
            rows.push(("user code does not run directly".to_owned(), why.to_owned()));
        }
        rows
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::SoftEngine;
    use cpu::{Engine, Space, cr0, cr4, efer, rflags};
    use memory::Backing;
    use std::time::{Duration, Instant};

    const CODE: u64 = 0x8000;

    /// A vCPU in flat 64-bit mode with an IDT of one gate, 0x40, to `hlt` at 0x9000.
    fn vcpu(translate: bool, code: &[u8]) -> (GuestMemory, Box<dyn Vcpu>) {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Private).unwrap();
        let vcpu = vcpus(&memory, translate, code, 1).remove(0);
        (memory, vcpu)
    }

    /// Several of them.
    fn vcpus(memory: &GuestMemory, translate: bool, code: &[u8], cpus: u32) -> Vec<Box<dyn Vcpu>> {
        memory.write(CODE, code).unwrap();
        memory.write(0x9000, &[0xf4]).unwrap();
        memory.write(0x1000, &0x2007u64.to_le_bytes()).unwrap();
        memory.write(0x2000, &0x87u64.to_le_bytes()).unwrap();
        memory.write(0x3008, &0x00af_9b00_0000_ffffu64.to_le_bytes()).unwrap();
        memory.write(0x4400, &0x0000_8e00_0008_9000u64.to_le_bytes()).unwrap();
        let options = Options { translate, ..Options::default() };
        let engine = SoftEngine::new(memory.clone(), options).unwrap();
        (0..cpus).map(|index| flat64(&engine, index, cpus)).collect()
    }

    fn flat64(engine: &SoftEngine, index: u32, cpus: u32) -> Box<dyn Vcpu> {
        let topology = cpu::cpuid::Topology { apic_id: index, cpus };
        let table = cpu::cpuid::default_model().table(topology, engine.tsc_hz()).unwrap();
        let mut vcpu = engine.create_vcpu(VcpuConfig { index, cpuid: Arc::new(table) }).unwrap();
        let mut registers = vcpu.registers();
        registers.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE;
        registers.cr3 = 0x1000;
        registers.cr4 = cr4::PAE;
        registers.efer = efer::LME | efer::LMA;
        registers.gdtr.base = 0x3000;
        registers.idtr.base = 0x4000;
        registers.rip = CODE;
        registers.gpr[4] = 0x7000;
        let flat = |selector, attr| cpu::Segment { base: 0, limit: u32::MAX, selector, attr };
        registers.segments = [flat(0, 0); 6];
        registers.segments[1] = flat(8, cpu::attr::CODE64);
        vcpu.set_registers(&registers);
        vcpu
    }

    #[test]
    fn another_vcpus_code_beside_ones_own_is_not_written_unheard() {
        // mov byte [0x8801], 2; hlt, and on the same page the other's mov eax, 1; hlt
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Shared).unwrap();
        let mut both = vcpus(&memory, true, &[0xc6, 0x04, 0x25, 0x01, 0x88, 0, 0, 2, 0xf4], 2);
        memory.write(CODE + 0x800, &[0xb8, 1, 0, 0, 0, 0xf4]).unwrap();
        let mut run = |index: usize, rip: u64| {
            let mut registers = both[index].registers();
            registers.rip = rip;
            both[index].set_registers(&registers);
            assert!(matches!(both[index].run(), Ok(Exit::Halt)));
            both[index].registers().gpr[0]
        };
        for turn in 0..3 {
            // The writer has code of the page too.
            run(0, CODE);
            assert_eq!(run(1, CODE + 0x800), 2, "turn {turn}");
            memory.write(CODE + 0x801, &[1]).unwrap();
            assert_eq!(run(1, CODE + 0x800), 1, "turn {turn}");
        }
    }

    #[test]
    fn tscs_restored_while_the_machine_stands_go_on_together() {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Private).unwrap();
        let engine = SoftEngine::new(memory, Options::default()).unwrap();
        let mut both: Vec<_> = (0..2).map(|index| flat64(&engine, index, 2)).collect();
        engine.stand();
        let mut saved = vec![];
        for vcpu in &both {
            saved.push(vcpu.save().unwrap());
            std::thread::sleep(Duration::from_millis(3));
        }
        let tsc = |index: usize| saved[index].msrs[&cpu::msr::TSC];
        assert_eq!(tsc(0), tsc(1));
        for (vcpu, state) in both.iter_mut().zip(&saved) {
            vcpu.restore(state).unwrap();
            std::thread::sleep(Duration::from_millis(3));
        }
        engine.go_on();
        both.iter_mut().for_each(|vcpu| vcpu.go_on());
        let millisecond = engine.tsc_hz() / 1000;
        let now = [both[0].tsc(), both[1].tsc()];
        assert!(now[0] >= tsc(0) && now[1] >= now[0], "{now:?}");
        assert!(now[1] - tsc(0) < 2 * millisecond, "{now:?} {}", tsc(0));
        // What a guest has done to one ends with a reset.
        both[0].set_msr(cpu::msr::TSC, 5);
        both.iter_mut().for_each(|vcpu| vcpu.reset(false));
        let (first, second) = (both[0].tsc(), both[1].tsc());
        assert!(second.wrapping_sub(first) < millisecond, "{first} {second}");
    }

    #[test]
    fn locked_accesses_over_a_page_end_are_atomic() {
        const COUNT: u64 = 5000;
        const AT: u64 = 0x1_0ffd;
        // mov ecx, COUNT; mov edi, AT; 1: lock inc qword ptr [rdi]; loop 1b; hlt
        let code = [0xb9, 0x88, 0x13, 0, 0, 0xbf, 0xfd, 0x0f, 1, 0, 0xf0, 0x48, 0xff, 0x07, 0xe2, 0xfa, 0xf4];
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Shared).unwrap();
        let threads = vcpus(&memory, true, &code, 2)
            .into_iter()
            .map(|mut vcpu| std::thread::spawn(move || while vcpu.run().unwrap() != Exit::Halt {}));
        threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(memory.load_u64(AT).unwrap_or_default(), 2 * COUNT);
    }

    #[test]
    fn a_kick_ends_an_endless_loop() {
        for translate in [false, true] {
            let (_memory, mut vcpu) = vcpu(translate, &[0xeb, 0xfe]);
            let handle = vcpu.kick_handle();
            let kicker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                handle.kick();
            });
            let start = Instant::now();
            assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
            assert!(start.elapsed() > Duration::from_millis(15));
            kicker.join().unwrap();
            let handle = vcpu.kick_handle();
            drop(vcpu);
            handle.kick();
        }
    }

    #[test]
    fn an_interrupt_waits_for_its_window() {
        for translate in [false, true] {
            // mov al, 1; out 0x80, al; sti; nop; jmp $
            let (_memory, mut vcpu) = vcpu(translate, &[0xb0, 1, 0xe6, 0x80, 0xfb, 0x90, 0xeb, 0xfe]);
            let write = Exit::Write { space: Space::Port, address: 0x80, size: 1, value: 1 };
            assert_eq!(vcpu.run().unwrap(), write);
            assert!(!vcpu.interruptible());
            vcpu.request_interrupt_window(true);
            assert_eq!(vcpu.run().unwrap(), Exit::InterruptWindow);
            assert!(vcpu.interruptible());
            assert_eq!(vcpu.registers().rip, CODE + 6);
            vcpu.inject_interrupt(0x40);
            assert_eq!(vcpu.run().unwrap(), Exit::Halt);
            let registers = vcpu.registers();
            assert_eq!((registers.rip, registers.rflags & rflags::IF), (0x9001, 0));
            assert_eq!(vcpu.run().unwrap(), Exit::Halt, "nothing has ended the halt");
        }
    }

    #[test]
    fn a_device_that_rewrites_code_is_noticed() {
        // mov eax, 1; hlt
        let (memory, mut vcpu) = vcpu(true, &[0xb8, 1, 0, 0, 0, 0xf4]);
        assert_eq!(vcpu.run().unwrap(), Exit::Halt);
        let mut registers = vcpu.registers();
        assert_eq!(registers.gpr[0], 1);
        memory.write(CODE + 1, &[2]).unwrap();
        registers.rip = CODE;
        vcpu.set_registers(&registers);
        assert_eq!(vcpu.run().unwrap(), Exit::Halt);
        assert_eq!(vcpu.registers().gpr[0], 2);
    }

    #[test]
    fn reset_gives_the_power_up_state() {
        let (_memory, mut vcpu) = vcpu(true, &[0xf4]);
        vcpu.set_msr(cpu::msr::LSTAR, 0x1234);
        vcpu.reset(true);
        assert_eq!(vcpu.msr(cpu::msr::LSTAR), Some(0x1234));
        vcpu.reset(false);
        assert_eq!(vcpu.msr(cpu::msr::LSTAR), Some(0));
        let registers = vcpu.registers();
        assert_eq!((registers.segments[1].base, registers.rip), (0xffff_0000, 0xfff0));
        assert_ne!(registers.gpr[2], 0, "the processor's signature");
    }
}
