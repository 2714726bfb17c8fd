//! The vCPU loop: one function for all engines, from one [`Exit`] to the next.
//!
//! States of a vCPU: waiting for start-up (an application processor), running, halted (HLT, asleep without cost),
//! parked (the machine is paused) and gone. Before every run it looks at its attention flag only; whoever has
//! something for it sets that flag (`slot`).
//!
//! Lock order: the local APIC's lock is never held while a device, another APIC or the memory gate is called.

mod eoi;
pub(crate) mod paravirtual;
pub(crate) mod profile;
mod registers;
pub(crate) mod report;
pub(crate) mod slot;
mod steal;

use crate::board::Resets;
use crate::buses::Buses;
use crate::clock::Clock;
use crate::lifecycle::{Crash, Lifecycle, Meeting, Outcome, Wanted};
use crate::notice::{Notice, Notices};
use crate::restart::Restart;
use crate::timers::Timers;
use chipset::ioapic::IoApic;
use chipset::local_apic::{Apics, Delivery, Destination, Effect, Ipi, LocalApic, Startup, Trigger, TscClock};
use cpu::{Activity, Error, Exit, Space, Vcpu, attr, msr};
use device::VmTime;
use eoi::ParavirtualEoi;
use memory::GuestMemory;
use paravirtual::{SystemClock, hypercall};
use profile::Profile;
use registers::Remaining;
use report::{Doing, Report, Tally};
use slot::{Patience, Slot, question};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use steal::StealTime;

/// KVM's first numbers for the wall clock and system time registers.
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
/// How many exits a crash report remembers.
const LAST_EXITS: usize = 16;

/// An interrupt table with a smaller limit has no gate for breakpoints, vector 3.
const EMPTY_IDT: u16 = 31;

/// What all vCPUs of a machine share.
pub(crate) struct Common {
    pub(crate) memory: GuestMemory,
    pub(crate) buses: Buses,
    pub(crate) apics: Apics,
    pub(crate) ioapic: IoApic,
    /// The 8259A pair's acknowledge cycle: its vector, if its output is high.
    pub(crate) external: Box<dyn Fn() -> Option<u8> + Send + Sync>,
    /// Its output, where the local APICs are the engine's.
    pub(crate) external_wire: Arc<AtomicBool>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) system_clock: SystemClock,
    pub(crate) slots: Arc<[Slot]>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) resets: Resets,
    pub(crate) restart: Restart,
    pub(crate) notices: Notices,
    pub(crate) tsc_hz: u64,
    pub(crate) log_exits: bool,
    /// The profile under way.
    pub(crate) profile: Mutex<Option<Arc<Profile>>>,
}

/// One vCPU, on its own thread.
pub(crate) struct Runner {
    vcpu: Box<dyn Vcpu>,
    index: usize,
    /// `None` where the engine has local APICs of its own.
    apic: Option<Arc<Mutex<LocalApic>>>,
    common: Arc<Common>,
    halted: bool,
    window: bool,
    /// CR8 and the upper half of the APIC's task priority, which are one register.
    task_priority: u8,
    /// The VM could be saved at the last exit.
    pausable: bool,
    /// KVM_SYSTEM_TIME, if enabled.
    system_time: Option<u64>,
    wall_clock: u64,
    steal: StealTime,
    patience: Patience,
    eoi: ParavirtualEoi,
    remaining: Remaining,
    last_exits: std::collections::VecDeque<(u64, String)>,
    tally: Tally,
}

impl Runner {
    pub(crate) fn new(vcpu: Box<dyn Vcpu>, index: usize, common: Arc<Common>) -> Option<Self> {
        let apic = common.apics.get(index).cloned();
        common.slots.get(index)?.set_kick(vcpu.kick_handle());
        Some(Self {
            vcpu,
            index,
            apic,
            common,
            halted: false,
            window: false,
            task_priority: 0,
            pausable: true,
            system_time: None,
            wall_clock: 0,
            steal: StealTime::default(),
            patience: Patience::default(),
            eoi: ParavirtualEoi::default(),
            remaining: Remaining::default(),
            last_exits: std::collections::VecDeque::new(),
            tally: Tally::default(),
        })
    }

    /// Runs until the machine stops; answers the vCPU.
    pub(crate) fn run(mut self) -> Box<dyn Vcpu> {
        let common = self.common.clone();
        let Some(slot) = common.slots.get(self.index) else { return self.vcpu };
        slot.enter();
        slot.note();
        // A guest's timers are as exact as its clock: the kernel would let it sleep 50 us longer.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        loop {
            // A window that is open already when the vCPU comes back for something else.
            if self.window && self.apic.is_none() && self.vcpu.interruptible() {
                slot.note();
            }
            if slot.take_attention() && !self.attend(slot) {
                return self.vcpu;
            }
            if self.halted {
                self.sleep(slot);
                continue;
            }
            match self.vcpu.run() {
                Ok(exit) => self.handle(exit, slot),
                Err(error) => self.crash(&error.to_string(), matches!(error, Error::Guest { .. })),
            }
        }
    }

    /// One exit that did not come from the engine, and what follows from it; `false` when the machine stops. HLT takes no time.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn play(&mut self, exit: Exit) -> bool {
        let common = self.common.clone();
        let Some(slot) = common.slots.get(self.index) else { return false };
        self.handle(exit, slot);
        let goes_on = !slot.take_attention() || self.attend(slot);
        self.halted = false;
        goes_on
    }

    /// Looks at everything others may want; `false` when the machine stops.
    fn attend(&mut self, slot: &Slot) -> bool {
        loop {
            match self.common.lifecycle.wanted() {
                Wanted::Run => break,
                Wanted::Stop => return false,
                // Not in the middle of an instruction: run to an exit that is between two.
                Wanted::Pause | Wanted::Restart if !self.pausable => {
                    slot.wake_self();
                    break;
                }
                Wanted::Pause => {
                    if !self.park(slot) {
                        return false;
                    }
                }
                // And look again: a guest that resets with its first instruction would never let anybody pause it.
                Wanted::Restart => {
                    if !self.restart(slot) {
                        return false;
                    }
                }
            }
        }
        self.answer(slot);
        self.steal.update(&self.common.memory);
        self.settle_eoi();
        // One that comes before the guest has halted is for that halt: the guest has decided to already.
        if self.halted && slot.take_unhalt() {
            self.tally.kicks = self.tally.kicks.wrapping_add(1);
            // Setting registers ends HLT in the engine too.
            let registers = self.vcpu.registers();
            self.vcpu.set_registers(&registers);
            self.halted = false;
        }
        match self.apic.clone() {
            Some(apic) => self.attend_apic(&apic),
            None => self.deliver_external(),
        }
        true
    }

    /// Start-up, NMIs, interrupts and the timer of the machine's own local APIC.
    fn attend_apic(&mut self, mine: &Mutex<LocalApic>) {
        let now = self.common.clock.now();
        let priority = self.vcpu.task_priority();
        let mut apic = lock(mine);
        if priority != self.task_priority {
            self.task_priority = priority;
            apic.set_tpr(priority << 4);
        }
        apic.tick(now);
        while let Some(startup) = apic.take_startup() {
            drop(apic);
            self.start_up(startup);
            apic = lock(mine);
        }
        if apic.waiting_for_sipi() {
            self.halted = true;
            return;
        }
        if apic.take_nmi() {
            self.vcpu.inject_nmi();
            self.halted = false;
        }
        drop(apic);
        self.deliver(mine);
        // Asleep it minds its own deadline.
        if !self.halted {
            self.arm(mine);
        }
    }

    /// Tells others what they want to know.
    fn answer(&mut self, slot: &Slot) {
        let questions = slot.take_questions();
        if questions & question::CODE != 0 {
            slot.tell_code(self.vcpu.host_code());
        }
        if questions & question::REPORT != 0 {
            slot.tell(self.report(if self.halted { Doing::Halted } else { Doing::Running }));
        }
        if questions & question::SAMPLE != 0 {
            let profile = self.common.profile.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match profile {
                Some(profile) if self.halted || self.vcpu.activity() != Activity::Running => profile.idle(),
                Some(profile) => profile.sample(&self.common.memory, &*self.vcpu),
                None => {}
            }
        }
    }

    fn report(&self, doing: Doing) -> Report {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let doing = match (&self.apic, doing) {
            (Some(apic), Doing::Halted) if lock(apic).waiting_for_sipi() => Doing::Waiting,
            (None, Doing::Running) => match self.vcpu.activity() {
                Activity::Running => Doing::Running,
                Activity::Halted => Doing::Halted,
                Activity::WaitingForStartup => Doing::Waiting,
            },
            (_, doing) => doing,
        };
        Report {
            doing,
            at: self.common.clock.now(),
            registers: self.vcpu.registers(),
            tally: self.tally.clone(),
            counters: self.vcpu.counters(),
            host_time: Duration::try_from(time).unwrap_or_default(),
        }
    }

    /// Gives the vCPU the most urgent interrupt, or asks for a window if it cannot take it now.
    fn deliver(&mut self, mine: &Mutex<LocalApic>) {
        let mut apic = lock(mine);
        let (vector, external) = (apic.pending(), apic.external_pending());
        if vector.is_none() && !external {
            drop(apic);
            return self.want_window(false);
        }
        if !self.vcpu.interruptible() {
            drop(apic);
            return self.want_window(true);
        }
        let vector = match vector {
            Some(vector) => {
                apic.acknowledge(vector);
                Some(vector)
            }
            None => {
                apic.acknowledge_external();
                // The PIC's chip is asked with the APIC unlocked.
                drop(apic);
                let vector = (self.common.external)();
                apic = lock(mine);
                vector
            }
        };
        let more = apic.pending().is_some() || apic.external_pending();
        let skippable = self.eoi.is_on() && apic.eoi_skippable();
        drop(apic);
        if skippable {
            self.eoi.offer(&self.common.memory);
        }
        if let Some(vector) = vector {
            self.vcpu.inject_interrupt(vector);
            self.tally.interrupt(vector);
            self.halted = false;
        }
        self.want_window(more);
    }

    /// Gives the vCPU the 8259A's interrupt, if the engine's local APIC lets it through now.
    fn deliver_external(&mut self) {
        if self.index != 0 || !self.common.external_wire.load(Ordering::SeqCst) {
            return self.want_window(false);
        }
        if !self.vcpu.interruptible() {
            return self.want_window(true);
        }
        if let Some(vector) = (self.common.external)() {
            self.vcpu.inject_interrupt(vector);
            self.tally.interrupt(vector);
        }
        self.want_window(self.common.external_wire.load(Ordering::SeqCst));
    }

    /// Ends the interrupt that the guest has ended in memory. Before anything else is done to the local APIC.
    fn settle_eoi(&mut self) {
        if self.eoi.settle(&self.common.memory)
            && let Some(apic) = &self.apic
        {
            let level = lock(apic).eoi();
            self.act(level.map_or(Effect::None, Effect::Eoi));
        }
    }

    fn want_window(&mut self, wanted: bool) {
        if self.window != wanted {
            self.window = wanted;
            self.vcpu.request_interrupt_window(wanted);
        }
    }

    /// Tells the timers when this APIC's timer is due.
    fn arm(&self, mine: &Mutex<LocalApic>) {
        let deadline = lock(mine).deadline();
        self.common.timers.set(self.index, deadline);
    }

    /// Sleeps in HLT (or waiting for start-up) until there is something to look at. The timer thread stays out of
    /// it: this thread wakes at its own deadline.
    fn sleep(&mut self, slot: &Slot) {
        let began = Instant::now();
        let deadline = self.apic.as_ref().and_then(|apic| lock(apic).deadline());
        self.common.timers.set(self.index, None);
        let limit = deadline.map(|at| self.common.clock.until(at).unwrap_or(Duration::MAX));
        self.steal.sleeps(&self.common.memory);
        slot.sleep(limit, &self.patience);
        let slept = began.elapsed();
        self.patience.learn(slept);
        if self.steal.wakes(slept, &self.common.memory) {
            self.vcpu.flush_tlb();
            self.tally.flushes = self.tally.flushes.wrapping_add(1);
        }
        self.tally.slept(slept);
        slot.note();
    }

    /// INIT and start-up messages (Intel SDM 3, 10.4.2 and 10.4.4.1).
    fn start_up(&mut self, startup: Startup) {
        match startup {
            Startup::Init => {
                self.vcpu.reset(true);
                self.task_priority = 0;
                (self.steal, self.eoi) = Default::default();
                self.halted = false;
                self.window = false;
            }
            Startup::Sipi(page) => {
                let mut registers = self.vcpu.registers();
                let base = u64::from(page) << 12;
                if let Some(cs) = registers.segments.get_mut(1) {
                    cs.base = base;
                    cs.selector = u16::from(page) << 8;
                    cs.limit = 0xffff;
                    cs.attr = attr::P | attr::S | 0xb;
                }
                registers.rip = 0;
                self.vcpu.set_registers(&registers);
                self.halted = false;
            }
        }
    }

    /// The machine is paused: waits without cost, then tells the guest that time stood still.
    fn park(&mut self, slot: &Slot) -> bool {
        self.vcpu.stand();
        // While it stands still it answers nothing else.
        slot.take_questions();
        slot.tell(self.report(Doing::Paused));
        self.common.timers.set(self.index, None);
        if !self.common.lifecycle.park() {
            return false;
        }
        self.vcpu.go_on();
        if self.apic.is_some() {
            self.sync_tsc();
            self.write_system_time(true);
        }
        slot.note();
        true
    }

    /// The guest has reset the machine: the last vCPU to hear of it resets all that they share, then each itself.
    fn restart(&mut self, slot: &Slot) -> bool {
        let common = self.common.clone();
        match common.lifecycle.meet(common.slots.len()) {
            Meeting::Stop => return false,
            Meeting::Over => {}
            Meeting::Last => {
                if let Err(error) = common.restart.perform(&common) {
                    common.lifecycle.end(Outcome::NotRestarted(error.to_string()));
                    return false;
                }
                let starts = common.lifecycle.restarts().saturating_add(2);
                common.notices.tell(Notice::Restarted { starts });
                common.lifecycle.restarted();
            }
        }
        self.vcpu.reset(false);
        if self.index == 0 {
            self.vcpu.set_registers(&common.restart.registers());
        }
        self.vcpu.request_interrupt_window(false);
        (self.halted, self.window, self.pausable) = (false, false, true);
        (self.system_time, self.wall_clock, self.task_priority) = (None, 0, 0);
        (self.steal, self.eoi, self.patience) = Default::default();
        self.remaining = Remaining::default();
        slot.take_unhalt();
        self.sync_tsc();
        slot.note();
        true
    }

    fn handle(&mut self, exit: Exit, slot: &Slot) {
        self.tally.exit(&exit);
        self.pausable = exit.pausable();
        if self.common.log_exits {
            self.log(&exit);
        }
        match exit {
            Exit::Read { space, address, size } => {
                let value = self.read(space, address, size, slot);
                self.vcpu.complete(Some(value));
            }
            Exit::Write { space, address, size, value } => self.write(space, address, size, value, slot),
            Exit::ReadMsr { index } => {
                let value = self.read_msr(index);
                self.vcpu.complete(value);
            }
            Exit::WriteMsr { index, value } => {
                let done = self.write_msr(index, value, slot);
                self.vcpu.complete(done.map(|()| 0));
            }
            Exit::Hypercall { number, args } => {
                let result = self.hypercall(number, args);
                self.vcpu.complete(Some(result));
            }
            Exit::EndOfInterrupt { vector } => self.common.ioapic.eoi(vector),
            Exit::Halt => {
                self.halted = true;
                slot.note();
            }
            Exit::InterruptWindow => {
                self.window = false;
                slot.note();
            }
            Exit::Interrupted => {
                // The guest may have written its TSC.
                self.sync_tsc();
                slot.note();
            }
            Exit::Debug => slot.note(),
            Exit::Shutdown if self.means_reset() => {
                self.common.resets.reset();
                slot.note();
            }
            Exit::Shutdown => {
                self.crash("the guest met a fault that it could not handle (triple fault)", true)
            }
        }
    }

    fn read(&mut self, space: Space, address: u64, size: u8, slot: &Slot) -> u64 {
        if space == Space::Mmio
            && let Some((apic, offset)) = self.own_apic(address)
        {
            slot.note();
            self.settle_eoi();
            return lock(&apic).page_read(offset, self.common.clock.now()).into();
        }
        self.common.buses.read(space, address, size)
    }

    fn write(&mut self, space: Space, address: u64, size: u8, value: u64, slot: &Slot) {
        if space == Space::Mmio
            && let Some((apic, offset)) = self.own_apic(address)
        {
            self.sync_tsc();
            self.settle_eoi();
            let effect = lock(&apic).page_write(offset, value as u32, self.common.clock.now());
            self.act(effect);
            self.follow_tpr();
            slot.note();
            return;
        }
        self.common.buses.write(space, address, size, value);
    }

    /// This vCPU's APIC and the offset in its page, if the address is in it.
    fn own_apic(&self, address: u64) -> Option<(Arc<Mutex<LocalApic>>, u64)> {
        let apic = self.apic.as_ref()?;
        let page = lock(apic).page()?;
        let offset = address.checked_sub(page).filter(|&offset| offset < LocalApic::LEN)?;
        Some((apic.clone(), offset))
    }

    fn act(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Ipi(ipi) => {
                self.common.apics.route(&ipi);
            }
            Effect::Eoi(vector) => self.common.ioapic.eoi(vector),
        }
    }

    /// CR8 follows the APIC's task priority register.
    fn follow_tpr(&mut self) {
        let Some(apic) = &self.apic else { return };
        let priority = lock(apic).tpr() >> 4;
        if priority != self.task_priority {
            self.task_priority = priority;
            self.vcpu.set_task_priority(priority);
        }
    }

    /// The APIC's idea of the TSC follows the engine's.
    fn sync_tsc(&self) {
        let Some(apic) = &self.apic else { return };
        let (tsc, now) = (self.vcpu.tsc(), self.common.clock.now());
        lock(apic).set_tsc_clock(TscClock::of(self.common.tsc_hz, tsc, now));
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            msr::APIC_BASE => Some(lock(self.apic.as_ref()?).base()),
            msr::TSC_DEADLINE => Some(lock(self.apic.as_ref()?).tsc_deadline()),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                self.settle_eoi();
                lock(self.apic.as_ref()?).msr_read(index, self.common.clock.now())
            }
            KVM_WALL_CLOCK_OLD | msr::KVM_WALL_CLOCK => Some(self.wall_clock),
            KVM_SYSTEM_TIME_OLD | msr::KVM_SYSTEM_TIME => Some(self.system_time.map_or(0, |at| at | 1)),
            msr::KVM_STEAL_TIME => Some(self.steal.value()),
            msr::KVM_EOI_EN => Some(self.eoi.value()),
            msr::KVM_POLL_CONTROL => Some(u64::from(!self.patience.forbidden)),
            _ => self.remaining.read(index),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64, slot: &Slot) -> Option<()> {
        match index {
            msr::APIC_BASE => {
                slot.note();
                self.settle_eoi();
                let done = lock(self.apic.as_ref()?).set_base(value);
                self.follow_tpr();
                done
            }
            msr::TSC_DEADLINE => {
                self.sync_tsc();
                lock(self.apic.as_ref()?).set_tsc_deadline(value);
                slot.note();
                Some(())
            }
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                slot.note();
                self.settle_eoi();
                let effect = lock(self.apic.as_ref()?).msr_write(index, value, self.common.clock.now())?;
                self.act(effect);
                self.follow_tpr();
                Some(())
            }
            KVM_WALL_CLOCK_OLD | msr::KVM_WALL_CLOCK => {
                self.wall_clock = value;
                let now = self.common.clock.now();
                paravirtual::write_wall_clock(&self.common.memory, value & !3, now).ok()
            }
            KVM_SYSTEM_TIME_OLD | msr::KVM_SYSTEM_TIME => {
                self.system_time = (value & 1 != 0).then_some(value & !1);
                self.write_system_time(false);
                Some(())
            }
            msr::KVM_STEAL_TIME => self.steal.set(value, &self.common.memory),
            msr::KVM_EOI_EN => {
                self.settle_eoi();
                self.eoi.set(value)
            }
            // Whether the host may poll before it sleeps.
            msr::KVM_POLL_CONTROL => (value <= 1).then(|| self.patience.forbidden = value == 0),
            _ => self.remaining.write(index, value),
        }
    }

    fn write_system_time(&mut self, stopped: bool) {
        let Some(at) = self.system_time else { return };
        let (tsc, now) = (self.vcpu.tsc(), self.common.clock.now());
        // A page that is not RAM is the guest's own mistake.
        let _ = self.common.system_clock.write_page(&self.common.memory, at, tsc, now, stopped);
    }

    fn hypercall(&mut self, number: u64, args: [u64; 4]) -> u64 {
        let [first, second, third, fourth] = args;
        match number {
            hypercall::VAPIC_POLL_IRQ => 0,
            hypercall::KICK_CPU => {
                if let Some(slot) = usize::try_from(second).ok().and_then(|id| self.common.slots.get(id)) {
                    slot.unhalt();
                }
                0
            }
            hypercall::CLOCK_PAIRING => {
                paravirtual::clock_pairing(&self.common.memory, first, second, self.vcpu.tsc())
            }
            hypercall::SEND_IPI => self.send_ipis(first, second, third, fourth),
            hypercall::SCHED_YIELD => {
                std::thread::yield_now();
                0
            }
            _ => hypercall::NO_SUCH_CALL,
        }
    }

    /// KVM_HC_SEND_IPI: a bitmap of 128 APIC ids from `first` on, and the ICR's low half.
    fn send_ipis(&self, low: u64, high: u64, first: u64, icr: u64) -> u64 {
        let delivery = Delivery::from_field((icr >> 8) as u32);
        let Some(delivery @ (Delivery::Fixed | Delivery::Nmi)) = delivery else { return hypercall::INVALID };
        let Ok(first) = u32::try_from(first) else { return hypercall::INVALID };
        let bitmap = u128::from(high) << 64 | u128::from(low);
        let mut count = 0u64;
        for bit in (0..128u32).filter(|&bit| bitmap.wrapping_shr(bit) & 1 != 0) {
            // Nobody is beyond the last id, which is the one of all.
            let Some(id) = first.checked_add(bit).filter(|&id| id != u32::MAX) else { break };
            let destination = Destination::Physical(id);
            let ipi = Ipi { delivery, vector: icr as u8, trigger: Trigger::Edge, destination };
            if self.common.apics.route(&ipi) {
                count = count.saturating_add(1);
            }
        }
        count
    }

    /// Whether a triple fault is meant as a reset. On hardware every one is; but most are a kernel's accident, which its
    /// user wants to hear of. Kernels that mean it (Linux's `reboot=t`, FreeBSD's last resort) have said so on the
    /// console, or fault with an interrupt table that they emptied for the purpose; no kernel starts with such a one.
    fn means_reset(&self) -> bool {
        self.vcpu.registers().idtr.limit < EMPTY_IDT || self.common.resets.announced()
    }

    fn log(&mut self, exit: &Exit) {
        let rip = self.vcpu.registers().rip;
        if self.last_exits.len() >= LAST_EXITS {
            self.last_exits.pop_front();
        }
        self.last_exits.push_back((rip, format!("{exit:?}")));
        eprintln!("vcpu{} {rip:#x} {exit:?}", self.index);
    }

    fn crash(&mut self, why: &str, guest: bool) {
        let registers = self.vcpu.registers();
        let engine = self.vcpu.inspect();
        self.common.lifecycle.end(Outcome::Crashed(Box::new(Crash {
            why: why.to_owned(),
            vcpu: self.index,
            guest,
            at: self.common.clock.now(),
            registers,
            last_exits: self.last_exits.iter().cloned().collect(),
            engine,
        })));
        if let Some(slot) = self.common.slots.get(self.index) {
            slot.note();
        }
    }
}

fn lock(apic: &Mutex<LocalApic>) -> MutexGuard<'_, LocalApic> {
    apic.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clock of a TSC that has not run yet.
pub(crate) fn tsc_clock(hz: u64) -> TscClock {
    TscClock::of(hz, 0, VmTime(0))
}
