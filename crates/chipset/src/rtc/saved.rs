//! The clock's saved state.

use super::{Fields, Rtc};
use device::{Saved, StateError, VmTime};

same_fields! {
    /// The time at which a clock was stopped.
    FieldsState of Fields {
        year: i64,
        month: u8,
        day: u8,
        weekday: u8,
        hours: u8,
        minutes: u8,
        seconds: u8,
    }
}

/// What a clock is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RtcState {
    index: u8,
    memory: Vec<u8>,
    a: u8,
    b: u8,
    c: u8,
    offset_ns: i128,
    stopped: Option<FieldsState>,
    seen: VmTime,
}

impl Saved for Rtc {
    type State = RtcState;

    fn save(&self) -> RtcState {
        let Self { index, memory, a, b, c, offset_ns, stopped, seen, line: _ } = self;
        RtcState {
            index: *index,
            memory: memory.to_vec(),
            a: *a,
            b: *b,
            c: *c,
            offset_ns: *offset_ns,
            stopped: stopped.as_ref().map(FieldsState::from),
            seen: *seen,
        }
    }

    fn restore(&mut self, state: RtcState) -> Result<(), StateError> {
        let RtcState { index, memory, a, b, c, offset_ns, stopped, seen } = state;
        let wrong = |why| StateError { device: "rtc", why };
        let memory = memory.try_into().map_err(|_| wrong("its memory has another size"))?;
        // Years of four digits, and a little more for clocks that ran on.
        let years = |years: i128| years.saturating_mul(366 * 86_400 * 1_000_000_000);
        let sane = stopped.as_ref().is_none_or(|fields| fields.year.unsigned_abs() <= 20_000);
        if offset_ns.unsigned_abs() > years(20_000).unsigned_abs() || !sane {
            return Err(wrong("its time is no time"));
        }
        let stopped = stopped.map(Fields::from);
        *self = Self { index, memory, a, b, c, offset_ns, stopped, seen, line: self.line.clone() };
        self.update_line();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saved::test::{goes_on, steps};
    use device::Line;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_restored_clock_goes_on(before in steps(1, 2), after in steps(1, 2), wall in 0..4_000_000_000_000_000_000i64) {
            goes_on(Rtc::new(wall, Line::unconnected()), Rtc::new(0, Line::unconnected()), &before, &after);
        }
    }

    #[test]
    fn no_time_is_refused() {
        let mut rtc = Rtc::new(0, Line::unconnected());
        for change in
            [|state: &mut RtcState| state.offset_ns = i128::MAX, |state: &mut RtcState| state.memory.push(0)]
        {
            let mut state = rtc.save();
            change(&mut state);
            assert!(rtc.restore(state).is_err());
        }
    }
}
