//! One vCPU of KVM's: `KVM_RUN`, and what its exits mean.
//!
//! States: *runnable*; *awaiting*, from an exit that asks for something until the machine has completed it; *failed*,
//! once the kernel has refused to take state that the machine set: the next run says so.
//!
//! After an exit that awaits something the kernel completes the instruction when KVM_RUN is entered again; a kick makes
//! that entry return at once, with the instruction done. That is how the machine's loop gets from an exit at which
//! pausing is not sound ([`Exit::pausable`]) to one at which it is.

use crate::access::Accesses;
use crate::engine::{Vm, enable};
use crate::failure;
use crate::host::Handle;
use crate::ioctl;
use crate::kick::Kicker;
use crate::msr::{self, Msrs};
use crate::registers::Groups;
use crate::run_page::RunPage;
use crate::state;
use crate::statistics::Statistics;
use cpu::{Activity, Error, Exit, Kick, Registers, Vcpu, VcpuState, cpuid::CpuidTable};
use kvm_bindings as kvm;
use kvm_bindings::{
    kvm_mp_state, kvm_run__bindgen_ty_1__bindgen_ty_8 as Hypercall,
    kvm_run__bindgen_ty_1__bindgen_ty_19 as SystemEvent, kvm_run__bindgen_ty_1__bindgen_ty_21 as Eoi,
    kvm_run__bindgen_ty_1__bindgen_ty_23 as Msr,
};
use std::io;
use std::sync::Arc;

/// What the last exit wants beside device accesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaiting {
    Nothing,
    Msr,
    Hypercall,
}

/// See the module page.
pub struct KvmVcpu {
    handle: Handle,
    page: Arc<RunPage>,
    kicker: Arc<Kicker>,
    accesses: Accesses,
    awaiting: Awaiting,
    /// An interrupt to be injected with the next run.
    external: Option<u8>,
    /// The last run ended between two instructions, and nothing has been set since: what `kvm_run` says of interrupts holds.
    settled: bool,
    failed: Option<Error>,
    msrs: Msrs,
    statistics: Option<Statistics>,
    power_up: Option<Box<VcpuState>>,
    index: u32,
    signature: u32,
    frozen: state::Frozen,
    /// How far the TSC has been moved back, of what the VM has stood in all.
    moved_back: u64,
    // Last, so that the VM and its memory outlive the descriptor.
    vm: Arc<Vm>,
}

/// An error of the host's.
pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

impl KvmVcpu {
    pub(crate) fn new(handle: Handle, index: u32, cpuid: &CpuidTable, vm: Arc<Vm>) -> Result<Self, Error> {
        let mapping = handle.map(0, vm.run_len).map_err(host("mapping kvm_run"))?;
        let page = Arc::new(RunPage::new(mapping));
        vm.dirty.add(&handle).map_err(host("mapping a ring of dirty pages"))?;
        let entries = crate::cpuid::entries(cpuid);
        handle.list(ioctl::SET_CPUID2, &entries).map_err(host("KVM_SET_CPUID2"))?;
        if vm.capabilities.enforce_pv {
            let cap = kvm::KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
            enable(&handle, cap, 1, "KVM_CAP_ENFORCE_PV_FEATURE_CPUID")?;
        }
        let kicker = Arc::new(Kicker::new(page.clone()));
        let msrs = Msrs::of(&handle, &vm.msr_indices);
        let statistics = vm.capabilities.statistics.then(|| Statistics::of(&handle)).flatten();
        let mut vcpu = Self {
            handle,
            page,
            kicker,
            accesses: Accesses::default(),
            awaiting: Awaiting::Nothing,
            external: None,
            settled: false,
            failed: None,
            msrs,
            statistics,
            power_up: None,
            index,
            signature: cpuid.query(1, 0).eax,
            frozen: state::Frozen::default(),
            moved_back: vm.tsc_back(),
            vm,
        };
        vcpu.power_up()?;
        Ok(vcpu)
    }

    /// Brings the vCPU into the state after power-up, and remembers it.
    fn power_up(&mut self) -> Result<(), Error> {
        if self.index == 0 {
            state::wire_local_apic(&self.handle)?;
        }
        let mut state = self.save()?;
        let mut registers = Registers::default();
        // EDX holds the processor's signature (Intel SDM 3, 10.1.1).
        if let Some(edx) = registers.gpr.get_mut(2) {
            *edx = self.signature.into();
        }
        state.registers = registers;
        state::at_power_up(&mut state);
        self.power_up = Some(Box::new(state.clone()));
        self.restore(&state)
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Moves the TSC back by what it has not been moved yet; `None` if this kernel cannot.
    pub(crate) fn move_tsc(&mut self) -> Option<()> {
        let all = self.vm.tsc_back();
        self.vm.move_tsc(&self.handle, all.wrapping_sub(self.moved_back))?;
        self.moved_back = all;
        Some(())
    }

    /// The TSC has been set: it has nothing to make up for.
    pub(crate) fn tsc_is_set(&mut self) {
        self.moved_back = self.vm.tsc_back();
    }

    pub(crate) fn msrs(&self) -> &Msrs {
        &self.msrs
    }

    /// The next run answers this error, unless an earlier one waits.
    fn fail(&mut self, what: &'static str, result: io::Result<u32>) {
        if let Err(source) = result
            && self.failed.is_none()
        {
            self.failed = Some(Error::Host { what, source });
        }
    }

    fn exit(&mut self) -> Result<Option<Exit>, Error> {
        Ok(Some(match self.page.exit_reason() {
            kvm::KVM_EXIT_IO if self.accesses.port(&self.page) => return Ok(None),
            kvm::KVM_EXIT_MMIO => {
                self.accesses.mmio(&self.page);
                return Ok(None);
            }
            kvm::KVM_EXIT_X86_RDMSR => {
                self.awaiting = Awaiting::Msr;
                let Msr { index, .. } = self.page.detail();
                Exit::ReadMsr { index }
            }
            kvm::KVM_EXIT_X86_WRMSR => {
                self.awaiting = Awaiting::Msr;
                let Msr { index, data, .. } = self.page.detail();
                Exit::WriteMsr { index, value: data }
            }
            kvm::KVM_EXIT_HYPERCALL => {
                self.awaiting = Awaiting::Hypercall;
                let Hypercall { nr, args: [a, b, c, d, ..], .. } = self.page.detail();
                Exit::Hypercall { number: nr, args: [a, b, c, d] }
            }
            kvm::KVM_EXIT_IOAPIC_EOI => {
                let Eoi { vector } = self.page.detail();
                Exit::EndOfInterrupt { vector }
            }
            kvm::KVM_EXIT_HLT => Exit::Halt,
            kvm::KVM_EXIT_IRQ_WINDOW_OPEN => {
                // Asked for once.
                self.page.request_interrupt_window(false);
                Exit::InterruptWindow
            }
            kvm::KVM_EXIT_INTR | kvm::KVM_EXIT_SET_TPR | kvm::KVM_EXIT_TPR_ACCESS | kvm::KVM_EXIT_NMI => {
                Exit::Interrupted
            }
            kvm::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kvm::KVM_EXIT_SYSTEM_EVENT => {
                let SystemEvent { type_, .. } = self.page.detail();
                match type_ {
                    kvm::KVM_SYSTEM_EVENT_SHUTDOWN
                    | kvm::KVM_SYSTEM_EVENT_RESET
                    | kvm::KVM_SYSTEM_EVENT_CRASH => Exit::Shutdown,
                    _ => return Err(self.stopped()),
                }
            }
            kvm::KVM_EXIT_DEBUG => Exit::Debug,
            kvm::KVM_EXIT_DIRTY_RING_FULL => {
                self.vm.collect_dirty()?;
                return Ok(None);
            }
            _ => return Err(self.stopped()),
        }))
    }

    /// The guest cannot go on: the exit in words.
    fn stopped(&self) -> Error {
        let rip = self.registers().rip;
        let bytes = self.instruction(rip);
        Error::Guest { engine: "kvm", rip, why: failure::describe(&self.page, bytes.as_deref()) }
    }

    /// The bytes at the instruction pointer, through the guest's own paging, as far as they are RAM.
    fn instruction(&self, rip: u64) -> Option<Vec<u8>> {
        const LENGTH_MAX: u64 = 15;
        let groups = self.groups().ok()?;
        let linear = groups.sregs.cs.base.wrapping_add(rip);
        let mut bytes = Vec::new();
        for at in 0..LENGTH_MAX {
            let linear_address = linear.wrapping_add(at);
            let asked = kvm::kvm_translation { linear_address, ..kvm::kvm_translation::default() };
            let told = self.handle.exchange(ioctl::TRANSLATE, asked).ok().filter(|told| told.valid != 0);
            let byte = told.and_then(|told| self.vm.memory.read_array::<1>(told.physical_address).ok());
            match byte {
                Some([byte]) => bytes.push(byte),
                None => break,
            }
        }
        Some(bytes)
    }

    /// The groups of registers that make up [`Registers`].
    pub(crate) fn groups(&self) -> io::Result<Groups> {
        let xcrs: kvm::kvm_xcrs = self.handle.get(ioctl::GET_XCRS)?;
        Ok(Groups {
            regs: self.handle.get(ioctl::GET_REGS)?,
            sregs: self.handle.get(ioctl::GET_SREGS)?,
            debug: self.handle.get(ioctl::GET_DEBUGREGS)?,
            xcr0: xcrs.xcrs.first().map_or(1, |first| first.value),
        })
    }

    pub(crate) fn set_groups(&self, groups: &Groups) -> Result<(), Error> {
        // CR4.OSXSAVE, in the special registers, comes before XCR0 is of any use; the kernel checks neither order.
        self.handle.set(ioctl::SET_REGS, groups.regs).map_err(host("KVM_SET_REGS"))?;
        self.handle.set(ioctl::SET_SREGS, groups.sregs).map_err(host("KVM_SET_SREGS"))?;
        self.handle.set(ioctl::SET_DEBUGREGS, groups.debug).map_err(host("KVM_SET_DEBUGREGS"))?;
        let mut xcrs: kvm::kvm_xcrs = self.handle.get(ioctl::GET_XCRS).map_err(host("KVM_GET_XCRS"))?;
        // A processor without XSAVE has none.
        if xcrs.nr_xcrs != 0
            && let Some(first) = xcrs.xcrs.first_mut()
        {
            (first.xcr, first.value) = (0, groups.xcr0);
            self.handle.set(ioctl::SET_XCRS, xcrs).map_err(host("KVM_SET_XCRS"))?;
        }
        Ok(())
    }

    fn try_set_registers(&mut self, registers: &Registers) -> Result<(), Error> {
        let mut groups = self.groups().map_err(host("reading registers"))?;
        groups.set(registers);
        self.set_groups(&groups)
    }

    /// Gives the kernel the 8259A's vector, as an event under way: there whoever saves the vCPU sees it, even if a kick ends the
    /// next run before the guest was entered. (KVM_INTERRUPT would keep it where nobody can read it.)
    fn inject_external(&mut self) {
        let Some(vector) = self.external.take() else { return };
        if let Err(source) = self.put_under_way(vector) {
            self.failed.get_or_insert(Error::Host { what: "giving KVM an interrupt of the 8259A", source });
        }
    }

    fn put_under_way(&self, vector: u8) -> io::Result<()> {
        let mut events: kvm::kvm_vcpu_events = self.handle.get(ioctl::GET_VCPU_EVENTS)?;
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
        // All that the flags would set stays as it is: an NMI may have come since.
        events.flags = 0;
        self.handle.set(ioctl::SET_VCPU_EVENTS, events)?;
        // An event under way does not end HLT by itself.
        if self.activity() == Activity::Halted {
            self.set_activity(kvm::KVM_MP_STATE_RUNNABLE)?;
        }
        Ok(())
    }

    /// What the last exit wanted is not wanted any more.
    fn forget_exit(&mut self) {
        self.accesses.forget();
        self.awaiting = Awaiting::Nothing;
        self.settled = false;
    }

    fn set_activity(&self, activity: u32) -> io::Result<u32> {
        self.handle.set(ioctl::SET_MP_STATE, kvm_mp_state { mp_state: activity })
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, Error> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        loop {
            if let Some(exit) = self.accesses.next() {
                return Ok(exit);
            }
            self.inject_external();
            self.settled = false;
            let (kicker, handle) = (&self.kicker, &self.handle);
            match kicker.inside(|| handle.number(ioctl::RUN, 0)) {
                Ok(_) => {
                    if let Some(exit) = self.exit()? {
                        self.settled = exit.pausable();
                        return Ok(exit);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {
                        self.kicker.heard();
                        self.settled = true;
                        return Ok(Exit::Interrupted);
                    }
                    // A processor that waited for start-up has been started.
                    Some(libc::EAGAIN) => {}
                    Some(libc::EFAULT | libc::EHWPOISON)
                        if self.page.exit_reason() == kvm::KVM_EXIT_MEMORY_FAULT =>
                    {
                        return Err(self.stopped());
                    }
                    _ => return Err(Error::Host { what: "KVM_RUN", source: error }),
                },
            }
        }
    }

    fn complete(&mut self, answer: Option<u64>) {
        if self.accesses.complete(&self.page, answer.unwrap_or(u64::MAX)) {
            return;
        }
        match std::mem::replace(&mut self.awaiting, Awaiting::Nothing) {
            Awaiting::Nothing => {}
            Awaiting::Msr => {
                let mut msr: Msr = self.page.detail();
                msr.error = answer.is_none().into();
                // Of a read only; the kernel does not look at a write's.
                msr.data = answer.unwrap_or(0);
                self.page.set_detail(msr);
            }
            Awaiting::Hypercall => {
                let mut call: Hypercall = self.page.detail();
                call.ret = answer.unwrap_or(0);
                self.page.set_detail(call);
            }
        }
    }

    fn inject_interrupt(&mut self, vector: u8) {
        self.external = Some(vector);
    }

    fn inject_nmi(&mut self) {
        let done = self.handle.number(ioctl::NMI, 0);
        self.fail("KVM_NMI", done);
    }

    fn interruptible(&self) -> bool {
        self.external.is_none() && self.settled && self.page.ready_for_interrupt()
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.page.request_interrupt_window(wanted);
    }

    fn registers(&self) -> Registers {
        self.groups().map(|groups| groups.registers()).unwrap_or_default()
    }

    fn set_registers(&mut self, registers: &Registers) {
        self.forget_exit();
        if let Err(error) = self.try_set_registers(registers) {
            self.failed.get_or_insert(error);
        }
    }

    fn msr(&self, index: u32) -> Option<u64> {
        msr::get(&self.handle, index)
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        msr::set(&self.handle, index, value)
    }

    fn task_priority(&self) -> u8 {
        // The kernel's local APIC minds it.
        self.handle.get::<kvm::kvm_sregs>(ioctl::GET_SREGS).map_or(0, |sregs| sregs.cr8 as u8 & 0xf)
    }

    fn set_task_priority(&mut self, priority: u8) {
        let set = self.handle.get::<kvm::kvm_sregs>(ioctl::GET_SREGS).and_then(|mut sregs| {
            sregs.cr8 = u64::from(priority & 0xf);
            self.handle.set(ioctl::SET_SREGS, sregs)
        });
        self.fail("KVM_SET_SREGS", set);
    }

    fn tsc(&self) -> u64 {
        msr::get(&self.handle, cpu::msr::TSC).unwrap_or(0)
    }

    fn flush_tlb(&mut self) {
        // KVM flushes when the special registers are loaded.
        let done = self
            .handle
            .get::<kvm::kvm_sregs>(ioctl::GET_SREGS)
            .and_then(|sregs| self.handle.set(ioctl::SET_SREGS, sregs));
        self.fail("KVM_SET_SREGS", done);
    }

    fn reset(&mut self, init: bool) {
        self.forget_exit();
        self.external = None;
        self.page.request_interrupt_window(false);
        let Some(state) = self.power_up.clone() else { return };
        let done = if init {
            // INIT comes by the local APIC, which the kernel has; this is for a machine that asks all the same.
            self.try_set_registers(&state.registers)
        } else {
            self.restore(&state)
        };
        if let Err(error) = done {
            self.failed.get_or_insert(error);
        }
    }

    fn stand(&mut self) {
        self.frozen = state::Frozen::of(self);
    }

    fn go_on(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        if let Err(error) = frozen.thaw(self) {
            self.failed.get_or_insert(error);
        }
    }

    fn activity(&self) -> Activity {
        self.handle
            .get::<kvm_mp_state>(ioctl::GET_MP_STATE)
            .map_or(Activity::Running, |state| state::activity(state.mp_state))
    }

    fn save(&self) -> Result<VcpuState, Error> {
        let mut state = state::save(self)?;
        state.events.interrupt = state.events.interrupt.or(self.external);
        self.frozen.put_into(&mut state);
        Ok(state)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        self.forget_exit();
        self.external = None;
        // All that the kernel may have refused before is set anew.
        self.failed = None;
        state::restore(self, state)?;
        // One clock for all: of a machine that does not stand, the first vCPU's word counts, lest it step with each.
        if let Some(clock) = state.clock_ns.filter(|_| self.index == 0 || self.frozen.stands()) {
            self.vm.set_clock_ns(clock)?;
        }
        // An event under way does not end HLT by itself.
        let woken = state.events.interrupt.is_some() || state.events.exception.is_some();
        let activity = if woken { Activity::Running } else { state.activity };
        self.set_activity(state::mp_state(activity)).map_err(host("KVM_SET_MP_STATE"))?;
        if self.frozen.stands() {
            self.frozen = state::Frozen::restored(self, state);
        }
        Ok(())
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.statistics.as_ref().map(Statistics::read).unwrap_or_default()
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let mut rows = vec![("activity".to_owned(), format!("{:?}", self.activity()))];
        rows.extend(self.counters().into_iter().map(|(name, value)| (name.to_owned(), value.to_string())));
        rows
    }
}
