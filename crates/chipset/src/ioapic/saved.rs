//! The I/O APIC's saved state.

use super::{IoApic, Pin, State};
use crate::locked;
use device::{Saved, StateError};

same_fields! {
    /// What a pin is made of.
    PinState of Pin {
        entry: u64,
        high: bool,
    }
}

/// What an I/O APIC is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IoApicState {
    id: u32,
    select: u8,
    pins: Vec<PinState>,
}

impl Saved for IoApic {
    type State = IoApicState;

    fn save(&self) -> IoApicState {
        let state = locked(&self.0);
        let State { id, select, pins, sink: _, watch: _ } = &*state;
        IoApicState { id: *id, select: *select, pins: pins.iter().map(PinState::from).collect() }
    }

    /// Sends nothing: what was to be sent is in the state of the local APICs.
    fn restore(&mut self, saved: IoApicState) -> Result<(), StateError> {
        let IoApicState { id, select, pins } = saved;
        let mut state = locked(&self.0);
        if pins.len() != state.pins.len() {
            return Err(StateError { device: "ioapic", why: "it has another number of pins" });
        }
        let pins = pins.into_iter().map(Pin::from).collect();
        *state = State { id, select, pins, sink: state.sink.clone(), watch: state.watch.take() };
        state.tell();
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use device::{Access, Device, MsiSink, VmTime};
    use proptest::prelude::*;

    /// The guest programs an entry (register, value), or a device drives a pin.
    fn run(chip: &mut IoApic, steps: &[(u8, u32, bool)]) {
        for &(register, value, drives) in steps {
            if drives {
                chip.set(usize::from(register) % 24, value & 1 != 0);
            } else {
                let mut write = |offset, value| {
                    chip.write(Access { window: 0, offset, size: 4 }, value, VmTime(0));
                };
                write(0, u64::from(register % 0x40));
                write(0x10, value.into());
            }
        }
    }

    proptest! {
        #[test]
        fn a_restored_chip_goes_on(before: Vec<(u8, u32, bool)>, after: Vec<(u8, u32, bool)>) {
            let chip = || IoApic::new(0, 24, MsiSink::unconnected());
            let (mut first, mut second) = (chip(), chip());
            run(&mut first, &before);
            let json = serde_json::to_string(&first.save()).unwrap();
            second.restore(serde_json::from_str(&json).unwrap()).unwrap();
            prop_assert_eq!(first.save(), second.save());
            run(&mut first, &after);
            run(&mut second, &after);
            prop_assert_eq!(first.save(), second.save());
        }
    }

    #[test]
    fn another_number_of_pins_is_refused() {
        let small = IoApic::new(0, 16, MsiSink::unconnected());
        assert!(IoApic::new(0, 24, MsiSink::unconnected()).restore(small.save()).is_err());
    }
}
