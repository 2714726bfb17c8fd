//! A vCPU to and from yado's saved form ([`cpu::VcpuState`]), the same that other engines have.
//!
//! Between two runs everything is in memory: general registers and flags in their fields, vectors in `ymm`, x87 in an FXSAVE
//! image. What of the form is not this engine's (the local APIC, its timer, paravirtual registers) is the machine's.

use crate::cpu_core::{Core, attention};
use crate::exception::{Exception, Stop, vector};
use crate::state::Shadow;
use crate::state::seg;
use crate::step::xstate::AREA;
use cpu::{Activity, Error, Events, Registers, VcpuState, msr};

/// Parts of an XSAVE area in the standard form (Intel SDM 1, 13.4).
const MXCSR: std::ops::Range<usize> = 24..28;
const X87: [std::ops::Range<usize>; 2] = [0..8, 32..160];
/// Where the last x87 instruction and its operand were: the host's addresses, which are nobody's business.
const X87_POINTERS: std::ops::Range<usize> = 8..24;
const XMM: usize = 160;
const XSTATE_BV: std::ops::Range<usize> = 512..520;
/// XCOMP_BV and a word more, which are zero in that form (Intel SDM 1, 13.8.1).
const COMPACTED: std::ops::Range<usize> = 520..536;
const YMM_HIGH: usize = 576;
const X87_PART: u64 = 1 << 0;
const SSE_PART: u64 = 1 << 1;
const AVX_PART: u64 = 1 << 2;
/// Bits of MXCSR that LDMXCSR takes on every processor that runs guests, and MM, which those with misaligned SSE mode have
/// (AMD APM 3, CPUID Fn8000_0001 ECX).
const MXCSR_KNOWN: u32 = 0xffff;
const MXCSR_MM: u32 = 1 << 17;
const MISALIGNED_SSE: u32 = 1 << 7;

/// Registers of the engine's own that nothing else of the form holds; of memory types, which are sixteen and eleven more.
const SAVED: [u32; 16] = [
    msr::TSC,
    msr::TSC_ADJUST,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::KERNEL_GS_BASE,
    msr::TSC_AUX,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::PAT,
    msr::MISC_ENABLE,
    msr::SPEC_CTRL,
    msr::XSS,
    msr::MTRR_DEF_TYPE,
];
const MEMORY_TYPES: std::ops::RangeInclusive<u32> = 0x200..=0x26f;

/// Everything, between two runs.
pub(crate) fn save(core: &Core) -> VcpuState {
    let numbers = SAVED.into_iter().chain(MEMORY_TYPES);
    VcpuState {
        registers: core.state.registers(),
        extended: extended(core),
        msrs: numbers.filter_map(|number| Some((number, core.msr(number)?))).collect(),
        events: events(core),
        activity: activity(core),
        local_apic: None,
        clock_ns: None,
    }
}

/// A processor that waits for start-up is one that halts where INIT has put it: at the reset vector, behind which nothing halts,
/// for that would be an HLT in the last bytes of a firmware that no board of ours has.
fn activity(core: &Core) -> Activity {
    let (state, reset) = (&core.state, Registers::default());
    let reset_base = reset.segments.get(seg::CS).map(|cs| cs.base);
    match state.halted {
        false => Activity::Running,
        true if state.rip == reset.rip && Some(state.segments[seg::CS].base) == reset_base => {
            Activity::WaitingForStartup
        }
        true => Activity::Halted,
    }
}

fn extended(core: &Core) -> Vec<u8> {
    let state = &core.state;
    let mut area = vec![0; AREA];
    for part in X87 {
        area[part.clone()].copy_from_slice(&state.x87.0[part]);
    }
    area[MXCSR].copy_from_slice(&state.mxcsr.to_le_bytes());
    let mut avx = false;
    for (number, register) in state.ymm.0.iter().enumerate() {
        for (quad, value) in register.iter().enumerate() {
            let at =
                if quad < 2 { XMM + number * 16 + quad * 8 } else { YMM_HIGH + number * 16 + (quad - 2) * 8 };
            area[at..at + 8].copy_from_slice(&value.to_le_bytes());
            avx |= quad >= 2 && *value != 0;
        }
    }
    let parts = X87_PART | SSE_PART | if avx { AVX_PART } else { 0 };
    area[XSTATE_BV].copy_from_slice(&parts.to_le_bytes());
    if !avx {
        area.truncate(YMM_HIGH);
    }
    area
}

fn events(core: &Core) -> Events {
    let pending = &core.pending;
    let debug = pending.debug | pending.held;
    Events {
        exception: (debug != 0).then_some(cpu::Exception {
            vector: vector::DB,
            error_code: None,
            payload: Some(debug),
            delivering: false,
        }),
        interrupt: pending.interrupt,
        nmi_pending: pending.nmi,
        nmi_blocked: core.state.nmi_blocked,
        shadow: match core.state.shadow {
            Shadow::None => cpu::Shadow::None,
            Shadow::Sti => cpu::Shadow::Sti,
            Shadow::MovSs => cpu::Shadow::MovSs,
        },
        ..Events::default()
    }
}

fn refused(why: impl Into<String>) -> Error {
    Error::Unsupported { engine: "soft", why: why.into() }
}

/// Becomes what was saved. The caller forgets what was translated.
pub(crate) fn restore(core: &mut Core, saved: &VcpuState) -> Result<(), Error> {
    let VcpuState { registers, extended, msrs, events, activity, local_apic: _, clock_ns: _ } = saved;
    if events.triple_fault {
        return Err(refused("the guest was saved in a triple fault: start it anew"));
    }
    if registers.xcr0 & !7 != 0 {
        let why = format!(
            "the guest has enabled processor state that it does not have (XCR0 {:#x})",
            registers.xcr0
        );
        return Err(refused(why));
    }
    restore_extended(core, extended)?;
    core.state.set_registers(registers);
    core.state.attention |= attention::MODE;
    core.io.commit();
    core.mmu.flush_all(&mut core.state);
    for (&number, &value) in msrs {
        // One that is not held here is the machine's, or of no consequence.
        if core.msr(number).is_some_and(|now| now != value) && !core.set_msr(number, value, true) {
            return Err(refused(format!("it refuses the saved value {value:#x} of MSR {number:#x}")));
        }
    }
    restore_events(core, events)?;
    core.state.halted = *activity != Activity::Running;
    if *activity == Activity::WaitingForStartup {
        // Nothing but a start-up message ends that (Intel SDM 3, 10.4.4.1): it comes as new registers.
        (core.pending.interrupt, core.pending.nmi, core.pending.debug) = (None, false, 0);
    }
    Ok(())
}

fn restore_extended(core: &mut Core, area: &[u8]) -> Result<(), Error> {
    let short = || refused(format!("the saved XSAVE area of {} bytes is cut off", area.len()));
    let word = |range: std::ops::Range<usize>| area.get(range).ok_or_else(short);
    let quad = |at: usize| -> Result<u64, Error> {
        Ok(u64::from_le_bytes(word(at..at + 8)?.try_into().map_err(|_| short())?))
    };
    let parts = quad(XSTATE_BV.start)?;
    let more = area.get(YMM_HIGH + 256..).is_some_and(|rest| rest.iter().any(|&byte| byte != 0));
    if parts & !7 != 0 || more {
        return Err(refused(format!(
            "the guest has used processor state that it does not have ({parts:#x})"
        )));
    }
    if word(COMPACTED)?.iter().any(|&byte| byte != 0) {
        return Err(refused(
            "the saved XSAVE area is in the compacted form, or in none: it was not saved by yado",
        ));
    }
    let mxcsr = u32::from_le_bytes(word(MXCSR)?.try_into().map_err(|_| short())?);
    let misaligned = core.cpuid.query(0x8000_0001, 0).ecx & MISALIGNED_SSE != 0;
    if mxcsr & !(MXCSR_KNOWN | if misaligned { MXCSR_MM } else { 0 }) != 0 {
        return Err(refused(format!("no processor has the saved MXCSR {mxcsr:#x}")));
    }
    // What an area does not have is as after power-up.
    let fresh = crate::state::X87::default();
    for part in X87 {
        let from = if parts & X87_PART != 0 { word(part.clone())? } else { &fresh.0[part.clone()] };
        core.state.x87.0[part].copy_from_slice(from);
    }
    core.state.x87.0[X87_POINTERS].fill(0);
    core.state.mxcsr = if parts & (SSE_PART | AVX_PART) != 0 { mxcsr } else { 0x1f80 };
    for number in 0..16 {
        let part = |has: u64, at: usize| if parts & has != 0 { quad(at) } else { Ok(0) };
        let (low, high) = (XMM + number * 16, YMM_HIGH + number * 16);
        core.state.ymm.0[number] = [
            part(SSE_PART, low)?,
            part(SSE_PART, low + 8)?,
            part(AVX_PART, high)?,
            part(AVX_PART, high + 8)?,
        ];
    }
    Ok(())
}

fn restore_events(core: &mut Core, events: &Events) -> Result<(), Error> {
    let Events {
        exception,
        interrupt,
        interrupt_soft,
        nmi_pending,
        nmi_delivering,
        nmi_blocked,
        shadow,
        triple_fault: _,
    } = *events;
    let window = core.pending.window;
    core.pending = crate::cpu_core::Pending { window, ..Default::default() };
    // An INT that had begun begins again: it is the instruction at RIP.
    core.pending.interrupt = interrupt.filter(|_| !interrupt_soft);
    core.pending.nmi = nmi_pending || nmi_delivering;
    core.state.nmi_blocked = nmi_blocked && !nmi_delivering;
    core.state.shadow = match shadow {
        cpu::Shadow::None => Shadow::None,
        cpu::Shadow::Sti => Shadow::Sti,
        cpu::Shadow::MovSs => Shadow::MovSs,
    };
    match exception {
        None => Ok(()),
        // MOV SS holds it back until after the next instruction (Intel SDM 3, 7.8.3).
        Some(cpu::Exception { vector: vector::DB, payload, delivering: false, .. })
            if core.state.shadow == Shadow::MovSs =>
        {
            core.pending.held = payload.unwrap_or(0);
            Ok(())
        }
        // The instruction at RIP raises it again.
        Some(cpu::Exception { vector: vector::BP | vector::OF, delivering: true, .. }) => Ok(()),
        Some(cpu::Exception { vector, error_code, payload, .. }) => {
            let detail = payload.unwrap_or(if vector == vector::PF { core.state.cr2 } else { 0 });
            // The guest is at its handler, or, where that cannot be reached, at a double fault's.
            match core.raise(Exception { vector, error: error_code, detail }) {
                Stop::Continue => Ok(()),
                Stop::Fail(error) => Err(error),
                Stop::Exit(_) => {
                    Err(refused(format!("the guest has no handler for exception {vector}: start it anew")))
                }
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::{Options, SoftEngine};
    use cpu::{Engine, Exit, Vcpu, VcpuConfig};
    use memory::{Backing, GuestMemory};

    fn vcpu() -> Box<dyn Vcpu> {
        let memory = GuestMemory::new(&[(0, 0x1000)], Backing::Private).unwrap();
        let engine = SoftEngine::new(memory, Options { translate: false, ..Options::default() }).unwrap();
        engine.create_vcpu(VcpuConfig { index: 1, cpuid: std::sync::Arc::default() }).unwrap()
    }

    #[test]
    fn one_that_waits_for_startup_waits_on_and_nothing_else_wakes_it() {
        let mut vcpu = vcpu();
        let mut state = vcpu.save().unwrap();
        assert_eq!(state.activity, Activity::Running);
        state.activity = Activity::WaitingForStartup;
        (state.events.nmi_pending, state.events.interrupt) = (true, Some(0x40));
        vcpu.restore(&state).unwrap();
        let reset = vcpu.registers();
        assert_eq!(vcpu.run().unwrap(), Exit::Halt, "it executes nothing");
        assert_eq!(vcpu.registers(), reset);
        assert_eq!(vcpu.save().unwrap().activity, Activity::WaitingForStartup);
        // The start-up message: `hlt` at 0.
        let mut registers = reset;
        registers.rip = 0;
        registers.segments[seg::CS].base = 0;
        vcpu.set_registers(&registers);
        assert_eq!(vcpu.save().unwrap().activity, Activity::Running);
        state.activity = Activity::Halted;
        state.events = Events::default();
        state.registers = registers;
        vcpu.restore(&state).unwrap();
        assert_eq!(vcpu.save().unwrap().activity, Activity::Halted, "HLT is another thing");
    }

    #[test]
    fn an_area_that_is_not_in_the_standard_form_is_refused() {
        let mut vcpu = vcpu();
        let sound = vcpu.save().unwrap();
        for byte in COMPACTED {
            let mut state = sound.clone();
            state.extended[byte] = 0x80;
            let error = vcpu.restore(&state).unwrap_err().to_string();
            assert!(error.contains("compacted"), "{byte}: {error}");
        }
        vcpu.restore(&sound).unwrap();
        for len in [0, 520, 535] {
            let mut state = sound.clone();
            state.extended.truncate(len);
            assert!(vcpu.restore(&state).unwrap_err().to_string().contains("cut off"), "{len}");
        }
    }

    #[test]
    fn addresses_of_the_host_are_not_saved() {
        let memory = GuestMemory::new(&[(0, 0x1000)], Backing::Private).unwrap();
        let mut core = Core::flat64(memory).unwrap();
        core.state.x87.0[X87_POINTERS].fill(0x55);
        let mut saved = save(&core);
        assert_eq!(saved.extended[X87_POINTERS], [0; 16]);
        saved.extended[X87_POINTERS].fill(0x66);
        restore(&mut core, &saved).unwrap();
        assert_eq!(core.state.x87.0[X87_POINTERS], [0; 16]);
    }

    #[test]
    fn a_debug_exception_that_was_to_come_comes() {
        let memory = GuestMemory::new(&[(0, 4 << 20)], Backing::Private).unwrap();
        // A gate for vector 1, and the code segment it wants.
        memory.write(0x4010, &0x0000_8e00_0008_9000u64.to_le_bytes()).unwrap();
        memory.write(0x3008, &0x00af_9b00_0000_ffffu64.to_le_bytes()).unwrap();
        let mut core = Core::flat64(memory).unwrap();
        let mut saved = save(&core);
        (saved.registers.gdtr.base, saved.registers.gdtr.limit) = (0x3000, 0xff);
        (saved.registers.idtr.base, saved.registers.idtr.limit) = (0x4000, 0xfff);
        saved.registers.gpr[4] = 0x7000;
        saved.registers.rip = 0x8000;
        let step = cpu::Exception {
            vector: vector::DB,
            error_code: None,
            payload: Some(1 << 14),
            delivering: false,
        };
        saved.events.exception = Some(step);
        restore(&mut core, &saved).unwrap();
        assert_eq!((core.state.rip, core.state.dr6 >> 14 & 1), (0x9000, 1));
        saved.events.shadow = cpu::Shadow::MovSs;
        restore(&mut core, &saved).unwrap();
        assert_eq!((core.state.rip, core.pending.held), (0x8000, 1 << 14));
    }
}
