//! The saved state of power management.

use super::Power;
use device::{Saved, StateError};

/// What the fixed hardware is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PowerState {
    status: u16,
    enable: u16,
    control: u16,
    port_92: u8,
    timer_top_bit: u32,
    timer_half: u64,
}

impl Saved for Power {
    type State = PowerState;

    fn save(&self) -> PowerState {
        let Self { status, enable, control, port_92, timer_top_bit, timer_half, sci: _, sink: _ } = *self;
        PowerState { status, enable, control, port_92, timer_top_bit, timer_half }
    }

    fn restore(&mut self, state: PowerState) -> Result<(), StateError> {
        let PowerState { status, enable, control, port_92, timer_top_bit, timer_half } = state;
        if timer_top_bit != self.timer_top_bit {
            return Err(StateError { device: "power", why: "its timer has another width" });
        }
        let (sci, sink) = (self.sci.clone(), self.sink.clone());
        *self = Self { status, enable, control, port_92, timer_top_bit, timer_half, sci, sink };
        self.update_sci();
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::power::PowerSink;
    use crate::saved::test::{goes_on, steps};
    use device::Line;
    use proptest::prelude::*;

    fn power() -> Power {
        Power::new(Line::unconnected(), PowerSink::new(|_| {}))
    }

    proptest! {
        #[test]
        fn restored_hardware_goes_on(before in steps(4, 16), after in steps(4, 16), pressed: bool) {
            let mut saved = power();
            if pressed {
                saved.press_power_button();
            }
            goes_on(saved, power(), &before, &after);
        }
    }

    #[test]
    fn another_timer_is_refused() {
        assert!(power().with_24_bit_timer().restore(power().save()).is_err());
    }
}
