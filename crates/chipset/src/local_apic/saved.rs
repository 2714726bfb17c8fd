//! The local APIC's saved state. How its TSC runs is not part of it: the vCPU's engine tells that anew.

use super::timer::{Mode, Timer};
use super::vectors::Vectors;
use super::{ApicConfig, LocalApic};
use device::{Saved, StateError};

/// What a local APIC is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LocalApicState {
    id: u32,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: [u64; 4],
    isr: [u64; 4],
    tmr: [u64; 4],
    errors: u32,
    esr: u32,
    icr: u64,
    lvt: [u32; 6],
    timer: TimerState,
    lint: [bool; 2],
    nmi: bool,
    external: bool,
    init: bool,
    wait_for_sipi: bool,
    sipi: Option<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct TimerState {
    pub(super) hz: u64,
    pub(super) mode: ModeState,
    pub(super) divide_config: u32,
    pub(super) initial: u32,
    pub(super) start: i128,
    pub(super) counting: bool,
    pub(super) tsc_deadline: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum ModeState {
    OneShot,
    Periodic,
    TscDeadline,
}

impl From<Mode> for ModeState {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::OneShot => Self::OneShot,
            Mode::Periodic => Self::Periodic,
            Mode::TscDeadline => Self::TscDeadline,
        }
    }
}

impl From<ModeState> for Mode {
    fn from(state: ModeState) -> Self {
        match state {
            ModeState::OneShot => Self::OneShot,
            ModeState::Periodic => Self::Periodic,
            ModeState::TscDeadline => Self::TscDeadline,
        }
    }
}

impl Saved for LocalApic {
    type State = LocalApicState;

    fn save(&self) -> LocalApicState {
        let Self {
            config: ApicConfig { id, .. },
            base,
            tpr,
            ldr,
            dfr,
            svr,
            irr,
            isr,
            tmr,
            errors,
            esr,
            icr,
            lvt,
            ref timer,
            lint,
            nmi,
            external,
            init,
            wait_for_sipi,
            sipi,
        } = *self;
        LocalApicState {
            id,
            base,
            tpr,
            ldr,
            dfr,
            svr,
            irr: irr.0,
            isr: isr.0,
            tmr: tmr.0,
            errors,
            esr,
            icr,
            lvt,
            timer: timer.save(),
            lint,
            nmi,
            external,
            init,
            wait_for_sipi,
            sipi,
        }
    }

    fn restore(&mut self, state: LocalApicState) -> Result<(), StateError> {
        let wrong = |why| Err(StateError { device: "local_apic", why });
        if state.id != self.config.id {
            return wrong("it is another processor's");
        }
        if state.timer.hz != self.timer.save().hz {
            return wrong("its timer has another frequency");
        }
        // Every field is named here, so that a new one does not compile until it is handled.
        let LocalApicState {
            id: _,
            base,
            tpr,
            ldr,
            dfr,
            svr,
            irr,
            isr,
            tmr,
            errors,
            esr,
            icr,
            lvt,
            timer,
            lint,
            nmi,
            external,
            init,
            wait_for_sipi,
            sipi,
        } = state;
        *self = Self {
            config: self.config,
            base,
            tpr,
            ldr,
            dfr,
            svr,
            irr: Vectors(irr),
            isr: Vectors(isr),
            tmr: Vectors(tmr),
            errors,
            esr,
            icr,
            lvt,
            timer: Timer::restored(timer, self.config.tsc),
            lint,
            nmi,
            external,
            init,
            wait_for_sipi,
            sipi,
        };
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::local_apic::TscClock;
    use device::VmTime;
    use proptest::prelude::*;

    fn apic(id: u32) -> LocalApic {
        let tsc = TscClock { hz: 2_000_000_000, offset: 5 };
        LocalApic::new(ApicConfig {
            id,
            bsp: id == 0,
            timer_hz: 1_000_000_000,
            tsc,
            physical_address_bits: 40,
            x2apic: true,
        })
    }

    type Step = (u8, u32, u32);

    /// Writes registers, drives pins, lets time pass; answers what can be seen.
    fn run(apic: &mut LocalApic, steps: &[Step], now: &mut u64) -> Vec<(u32, Option<u8>)> {
        let mut seen = Vec::new();
        for &(what, value, wait) in steps {
            *now += u64::from(wait);
            let at = VmTime(*now);
            apic.tick(at);
            match what {
                0..0x40 => {
                    let _ = apic.page_write(u64::from(what) << 4, value, at);
                }
                0x40..0x60 => {
                    apic.set_lint(usize::from(what & 1), value & 1 != 0);
                }
                0x60..0x80 => apic.set_tsc_deadline(value.into()),
                0x80..0xa0 => {
                    let pending = apic.pending();
                    pending.into_iter().for_each(|vector| apic.acknowledge(vector));
                }
                _ => {
                    apic.take_startup();
                }
            }
            seen.push((apic.page_read(u64::from(value & 0x3f) << 4, at), apic.pending()));
        }
        seen
    }

    proptest! {
        #[test]
        fn a_restored_apic_goes_on(before: Vec<Step>, after: Vec<Step>) {
            let (mut first, mut second) = (apic(1), apic(1));
            let mut now = 0;
            run(&mut first, &before, &mut now);
            let json = serde_json::to_string(&first.save()).unwrap();
            second.restore(serde_json::from_str(&json).unwrap()).unwrap();
            prop_assert_eq!(first.save(), second.save());
            prop_assert_eq!(first.deadline(), second.deadline());
            let mut again = now;
            prop_assert_eq!(run(&mut first, &after, &mut now), run(&mut second, &after, &mut again));
            prop_assert_eq!(first.save(), second.save());
        }
    }

    #[test]
    fn another_processors_state_is_refused() {
        let error = apic(0).restore(apic(1).save()).unwrap_err();
        assert_eq!(error.why, "it is another processor's");
    }
}
