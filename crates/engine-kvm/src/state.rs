//! A vCPU's state, group by group, to and from yado's saved form.
//!
//! The order matters (Linux `Documentation/virt/kvm/api.rst`, and what KVM's own code makes of it): reading the activity
//! first lets the local APIC's pending messages take effect; the APIC base comes before the APIC's page, whose id field
//! depends on the mode; the page before the deadline of its timer; events last, for setting registers forgets them.

use crate::host::{Handle, Plain};
use crate::ioctl;
use crate::msr;
use crate::registers::Groups;
use crate::vcpu::{KvmVcpu, host};
use cpu::{Activity, Error, Events, Exception, Shadow, VcpuState};
use kvm_bindings as kvm;
use kvm_bindings::{kvm_lapic_state, kvm_mp_state, kvm_vcpu_events};

/// Bytes of the structure of KVM_GET_XSAVE.
const XSAVE: usize = 4096;
/// Legacy area and header: the least that an XSAVE area has.
const XSAVE_LEAST: usize = 576;
/// Bytes of the legacy area that are software's: the host kernel's, here.
const XSAVE_SOFTWARE: std::ops::Range<usize> = 464..512;
/// Offsets in the local APIC's page (Intel SDM 3, table 12-1).
const SVR: usize = 0xf0;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;

/// KVM's number for what a vCPU does.
pub(crate) fn activity(mp_state: u32) -> Activity {
    match mp_state {
        kvm::KVM_MP_STATE_HALTED | kvm::KVM_MP_STATE_AP_RESET_HOLD => Activity::Halted,
        kvm::KVM_MP_STATE_UNINITIALIZED | kvm::KVM_MP_STATE_INIT_RECEIVED => Activity::WaitingForStartup,
        _ => Activity::Running,
    }
}

/// And back. A processor after power-up is as one after INIT: it takes a start-up message.
pub(crate) fn mp_state(activity: Activity) -> u32 {
    match activity {
        Activity::Running => kvm::KVM_MP_STATE_RUNNABLE,
        Activity::Halted => kvm::KVM_MP_STATE_HALTED,
        Activity::WaitingForStartup => kvm::KVM_MP_STATE_INIT_RECEIVED,
    }
}

fn page(state: &kvm_lapic_state) -> Vec<u8> {
    state.regs.iter().map(|&byte| byte as u8).collect()
}

fn from_page(page: &[u8]) -> kvm_lapic_state {
    let mut state = kvm_lapic_state::zeroed();
    for (byte, value) in state.regs.iter_mut().zip(page) {
        *byte = *value as _;
    }
    state
}

fn put(page: &mut [u8], at: usize, value: u32) {
    if let Some(bytes) = page.get_mut(at..at.saturating_add(4)) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

/// The boot processor's local APIC is in virtual wire mode, as firmware leaves it (MultiProcessor Specification 1.4,
/// 3.6.2.2): a kernel that knows only the 8259A gets its interrupts.
pub(crate) fn wire_local_apic(vcpu: &Handle) -> Result<(), Error> {
    let state: kvm_lapic_state = vcpu.get(ioctl::GET_LAPIC).map_err(host("KVM_GET_LAPIC"))?;
    let mut page = page(&state);
    put(&mut page, SVR, 0x1ff);
    put(&mut page, LVT_LINT0, 0x700);
    put(&mut page, LVT_LINT1, 0x400);
    vcpu.set(ioctl::SET_LAPIC, from_page(&page)).map_err(host("KVM_SET_LAPIC")).map(|_| ())
}

/// What of a new vCPU's state is not that of every power-up: the TSC runs on, as it does on the software engine.
pub(crate) fn at_power_up(state: &mut VcpuState) {
    state.msrs.remove(&cpu::msr::TSC);
    state.msrs.remove(&cpu::msr::TSC_ADJUST);
    // As does kvmclock.
    state.clock_ns = None;
    state.events = Events::default();
}

/// Everything.
pub(crate) fn save(vcpu: &KvmVcpu) -> Result<VcpuState, Error> {
    let handle = vcpu.handle();
    let kvm_mp_state { mp_state } = handle.get(ioctl::GET_MP_STATE).map_err(host("KVM_GET_MP_STATE"))?;
    let groups = vcpu.groups().map_err(host("reading registers"))?;
    let mut extended = vec![0; XSAVE];
    handle.xsave(ioctl::GET_XSAVE, &mut extended).map_err(host("KVM_GET_XSAVE"))?;
    if let Some(software) = extended.get_mut(XSAVE_SOFTWARE) {
        software.fill(0);
    }
    let used = extended.iter().rposition(|&byte| byte != 0).map_or(0, |last| last.saturating_add(1));
    extended.truncate(used.next_multiple_of(64).max(XSAVE_LEAST));
    let apic: kvm_lapic_state = handle.get(ioctl::GET_LAPIC).map_err(host("KVM_GET_LAPIC"))?;
    let mut msrs = vcpu.msrs().read(handle).map_err(host("KVM_GET_MSRS"))?;
    msrs.insert(cpu::msr::APIC_BASE, groups.sregs.apic_base);
    let events: kvm_vcpu_events = handle.get(ioctl::GET_VCPU_EVENTS).map_err(host("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        registers: groups.registers(),
        extended,
        msrs,
        events: from_events(&events),
        activity: activity(mp_state),
        local_apic: Some(page(&apic)),
        clock_ns: vcpu.vm().clock_ns(),
    })
}

/// All but the activity.
pub(crate) fn restore(vcpu: &mut KvmVcpu, state: &VcpuState) -> Result<(), Error> {
    let VcpuState { registers, extended, msrs, events, activity: _, local_apic, clock_ns: _ } = state;
    let mut groups = vcpu.groups().map_err(host("reading registers"))?;
    groups.set(registers);
    deliver_payload(events, &mut groups);
    let mut msrs = msrs.clone();
    if let Some(base) = msrs.remove(&cpu::msr::APIC_BASE) {
        groups.sregs.apic_base = base;
    }
    let mut area = vec![0; XSAVE];
    if extended.len() < XSAVE_LEAST || extended.len() > XSAVE {
        let why = format!("its XSAVE area of {} bytes does not fit this host", extended.len());
        return Err(Error::Unsupported { engine: "kvm", why });
    }
    for (to, from) in area.iter_mut().zip(extended) {
        *to = *from;
    }
    vcpu.set_groups(&groups)?;
    let handle = vcpu.handle();
    handle.xsave(ioctl::SET_XSAVE, &mut area).map_err(host("KVM_SET_XSAVE"))?;
    if let Some(page) = local_apic {
        handle.set(ioctl::SET_LAPIC, from_page(page)).map_err(host("KVM_SET_LAPIC"))?;
    }
    let refused = msr::set_all(handle, &msrs);
    if !refused.is_empty() {
        let names: Vec<_> = refused.iter().map(|index| format!("{index:#x}")).collect();
        let why = format!(
            "it refuses the saved values of MSRs {}; resume on a host like the first",
            names.join(", ")
        );
        return Err(Error::Unsupported { engine: "kvm", why });
    }
    let triple_fault = vcpu.vm().capabilities.triple_fault;
    handle
        .set(ioctl::SET_VCPU_EVENTS, to_events(events, triple_fault))
        .map_err(host("KVM_SET_VCPU_EVENTS"))?;
    Ok(())
}

/// What a page fault does to CR2 and a debug exception to DR6 (Intel SDM 3, 6.15), of one that another engine has raised and
/// not begun to deliver.
fn deliver_payload(events: &Events, groups: &mut Groups) {
    const DEBUG: u8 = 1;
    const PAGE_FAULT: u8 = 14;
    match events.exception {
        Some(Exception { vector: PAGE_FAULT, payload: Some(address), .. }) => groups.sregs.cr2 = address,
        Some(Exception { vector: DEBUG, payload: Some(causes), .. }) => groups.debug.dr6 |= causes,
        _ => {}
    }
}

fn from_events(events: &kvm_vcpu_events) -> Events {
    let raised = events.exception;
    let known = raised.injected != 0 || raised.pending != 0;
    let exception = known.then(|| Exception {
        vector: raised.nr,
        error_code: (raised.has_error_code != 0).then_some(raised.error_code),
        payload: (events.exception_has_payload != 0).then_some(events.exception_payload),
        delivering: raised.injected != 0,
    });
    let interrupt = events.interrupt;
    let shadow = u32::from(interrupt.shadow);
    Events {
        exception,
        interrupt: (interrupt.injected != 0).then_some(interrupt.nr),
        interrupt_soft: interrupt.soft != 0,
        nmi_pending: events.nmi.pending != 0,
        nmi_delivering: events.nmi.injected != 0,
        nmi_blocked: events.nmi.masked != 0,
        shadow: match shadow {
            _ if shadow & kvm::KVM_X86_SHADOW_INT_MOV_SS != 0 => Shadow::MovSs,
            _ if shadow & kvm::KVM_X86_SHADOW_INT_STI != 0 => Shadow::Sti,
            _ => Shadow::None,
        },
        triple_fault: events.triple_fault.pending != 0,
    }
}

fn to_events(events: &Events, triple_fault_known: bool) -> kvm_vcpu_events {
    let Events {
        exception,
        interrupt,
        interrupt_soft,
        nmi_pending,
        nmi_delivering,
        nmi_blocked,
        shadow,
        triple_fault,
    } = *events;
    let mut raw = kvm_vcpu_events::zeroed();
    if let Some(Exception { vector, error_code, payload: _, delivering: _ }) = exception {
        raw.exception.nr = vector;
        raw.exception.has_error_code = error_code.is_some().into();
        raw.exception.error_code = error_code.unwrap_or(0);
        // Without KVM_CAP_EXCEPTION_PAYLOAD, which yado does not enable, KVM knows one word for what is raised and what is
        // being delivered; what a payload stands for has been done (`deliver_payload`).
        raw.exception.injected = 1;
    }
    raw.interrupt.injected = interrupt.is_some().into();
    raw.interrupt.nr = interrupt.unwrap_or(0);
    raw.interrupt.soft = interrupt_soft.into();
    raw.interrupt.shadow = match shadow {
        Shadow::None => 0,
        Shadow::Sti => kvm::KVM_X86_SHADOW_INT_STI as u8,
        Shadow::MovSs => kvm::KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    raw.nmi.pending = nmi_pending.into();
    raw.nmi.injected = nmi_delivering.into();
    raw.nmi.masked = nmi_blocked.into();
    raw.flags = kvm::KVM_VCPUEVENT_VALID_NMI_PENDING | kvm::KVM_VCPUEVENT_VALID_SHADOW;
    if triple_fault_known {
        raw.flags |= kvm::KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        raw.triple_fault.pending = triple_fault.into();
    }
    raw
}

/// A vCPU's clocks while its machine stands still.
#[derive(Debug, Default)]
pub(crate) struct Frozen {
    tsc: Option<u64>,
    /// It was restored meanwhile: it goes on from that, whatever it was before.
    restored: bool,
    /// Of the local APIC's timer, which is off meanwhile. Its other modes run on: at worst one tick comes early. To put the
    /// page back later would lose interrupts that devices have sent in between.
    deadline: Option<u64>,
}

impl Frozen {
    pub(crate) fn of(vcpu: &KvmVcpu) -> Self {
        let handle = vcpu.handle();
        let deadline = msr::get(handle, cpu::msr::TSC_DEADLINE).filter(|&deadline| deadline != 0);
        if deadline.is_some() {
            msr::set(handle, cpu::msr::TSC_DEADLINE, 0);
        }
        Self { tsc: msr::get(handle, cpu::msr::TSC), deadline, restored: false }
    }

    /// Of a vCPU that has been restored while it stands.
    pub(crate) fn restored(vcpu: &KvmVcpu, state: &VcpuState) -> Self {
        let deadline = state.msrs.get(&cpu::msr::TSC_DEADLINE).copied().filter(|&deadline| deadline != 0);
        if deadline.is_some() {
            msr::set(vcpu.handle(), cpu::msr::TSC_DEADLINE, 0);
        }
        Self { tsc: state.msrs.get(&cpu::msr::TSC).copied(), deadline, restored: true }
    }

    /// Whether the machine stands.
    pub(crate) fn stands(&self) -> bool {
        self.tsc.is_some()
    }

    /// What is saved meanwhile is what will go on, not what is in KVM.
    pub(crate) fn put_into(&self, state: &mut VcpuState) {
        if let Some(tsc) = self.tsc {
            state.msrs.insert(cpu::msr::TSC, tsc);
            state.msrs.insert(cpu::msr::TSC_DEADLINE, self.deadline.unwrap_or(0));
        }
    }

    pub(crate) fn thaw(self, vcpu: &mut KvmVcpu) -> Result<(), Error> {
        let Self { tsc, restored, deadline } = self;
        let Some(tsc) = tsc else { return Ok(()) };
        // All vCPUs' TSCs are moved by the same amount, so that they stay in step; before Linux 5.16, and where states are
        // restored, KVM brings them together itself if they are set within a second.
        if restored || vcpu.move_tsc().is_none() {
            msr::set(vcpu.handle(), cpu::msr::TSC, tsc);
            vcpu.tsc_is_set();
        }
        let handle = vcpu.handle();
        if let Some(deadline) = deadline {
            msr::set(handle, cpu::msr::TSC_DEADLINE, deadline);
        }
        // The guest's watchdogs hear that time stood still. Refused if it has no kvmclock.
        let _ = handle.number(ioctl::KVMCLOCK_CTRL, 0);
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn events_survive_the_way_to_kvm_and_back(
            exception: Option<(u8, Option<u32>)>, interrupt: Option<u8>, bits: [bool; 5], shadow in 0u8..3
        ) {
            let events = Events {
                exception: exception.map(|(vector, error_code)| Exception {
                    vector, error_code, payload: None, delivering: true,
                }),
                interrupt,
                interrupt_soft: bits[0],
                nmi_pending: bits[1],
                nmi_delivering: bits[2],
                nmi_blocked: bits[3],
                shadow: [Shadow::None, Shadow::Sti, Shadow::MovSs][usize::from(shadow)],
                triple_fault: bits[4],
            };
            prop_assert_eq!(from_events(&to_events(&events, true)), events);
            let old = Events { triple_fault: false, ..events };
            prop_assert_eq!(from_events(&to_events(&events, false)), old, "Linux before 6.0");
        }
    }

    #[test]
    fn what_a_vcpu_does_has_a_number() {
        for does in [Activity::Running, Activity::Halted, Activity::WaitingForStartup] {
            assert_eq!(activity(mp_state(does)), does);
        }
        assert_eq!(activity(kvm::KVM_MP_STATE_UNINITIALIZED), Activity::WaitingForStartup);
    }
}
