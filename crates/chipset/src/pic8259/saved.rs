//! The saved state of the two chips.

use super::{Chip, Init, Pic8259};
use crate::locked;
use device::{Saved, StateError};

/// Where an initialisation sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum InitState {
    Done,
    Icw2,
    Icw3,
    Icw4,
}

impl From<Init> for InitState {
    fn from(init: Init) -> Self {
        match init {
            Init::Done => Self::Done,
            Init::Icw2 => Self::Icw2,
            Init::Icw3 => Self::Icw3,
            Init::Icw4 => Self::Icw4,
        }
    }
}

impl From<InitState> for Init {
    fn from(state: InitState) -> Self {
        match state {
            InitState::Done => Self::Done,
            InitState::Icw2 => Self::Icw2,
            InitState::Icw3 => Self::Icw3,
            InitState::Icw4 => Self::Icw4,
        }
    }
}

same_fields! {
    /// What one chip is made of.
    ChipState of Chip {
        slave: bool,
        irr: u8,
        isr: u8,
        imr: u8,
        levels: u8,
        elcr: u8,
        vector_base: u8,
        init: InitState,
        icw1: u8,
        auto_eoi: bool,
        fully_nested: bool,
        special_mask: bool,
        read_isr: bool,
        poll: bool,
        rotate_on_auto_eoi: bool,
        lowest: u8,
    }
}

/// What the pair is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Pic8259State {
    master: ChipState,
    slave: ChipState,
}

impl Saved for Pic8259 {
    type State = Pic8259State;

    fn save(&self) -> Pic8259State {
        let pair = locked(&self.0);
        Pic8259State { master: (&pair.master).into(), slave: (&pair.slave).into() }
    }

    fn restore(&mut self, state: Pic8259State) -> Result<(), StateError> {
        let Pic8259State { master, slave } = state;
        if master.slave || !slave.slave {
            return Err(StateError { device: "pic8259", why: "master and slave are exchanged" });
        }
        if master.lowest > 7 || slave.lowest > 7 {
            return Err(StateError { device: "pic8259", why: "the lowest priority is no input" });
        }
        let mut pair = locked(&self.0);
        (pair.master, pair.slave) = (master.into(), slave.into());
        pair.update();
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::saved::test::{goes_on, steps};
    use device::Line;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_restored_pair_goes_on(before in steps(3, 2), after in steps(3, 2), raised: u16) {
            let pic = Pic8259::new(Line::unconnected());
            for irq in (0..16u8).filter(|irq| *irq != 2 && raised >> irq & 1 != 0) {
                pic.line(irq).set(true);
            }
            goes_on(pic, Pic8259::new(Line::unconnected()), &before, &after);
        }
    }

    #[test]
    fn an_impossible_priority_is_refused() {
        let mut pic = Pic8259::new(Line::unconnected());
        let mut state = pic.save();
        state.slave.lowest = 8;
        assert!(pic.restore(state).is_err());
    }
}
