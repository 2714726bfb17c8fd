//! The timer's saved state.

use super::{Bytes, Counter, Pit8254};
use device::{Saved, StateError};

/// Which bytes of a count are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum BytesState {
    Low,
    High,
    Both,
}

impl From<Bytes> for BytesState {
    fn from(bytes: Bytes) -> Self {
        match bytes {
            Bytes::Low => Self::Low,
            Bytes::High => Self::High,
            Bytes::Both => Self::Both,
        }
    }
}

impl From<BytesState> for Bytes {
    fn from(state: BytesState) -> Self {
        match state {
            BytesState::Low => Self::Low,
            BytesState::High => Self::High,
            BytesState::Both => Self::Both,
        }
    }
}

same_fields! {
    /// What a counter is made of.
    CounterState of Counter {
        mode: u8,
        bytes: BytesState,
        bcd: bool,
        reload: u64,
        start: Option<u64>,
        paused: Option<u64>,
        gate: bool,
        low_byte: Option<u8>,
        high_next: bool,
        latched: Option<u16>,
        latched_status: Option<u8>,
        null_count: bool,
    }
}

/// What the timer is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Pit8254State {
    counters: [CounterState; 3],
    speaker_data: bool,
    due: Option<u64>,
    seen: u64,
}

impl Saved for Pit8254 {
    type State = Pit8254State;

    fn save(&self) -> Pit8254State {
        let Self { counters, speaker_data, due, seen, line: _ } = self;
        Pit8254State {
            counters: counters.each_ref().map(CounterState::from),
            speaker_data: *speaker_data,
            due: *due,
            seen: *seen,
        }
    }

    fn restore(&mut self, state: Pit8254State) -> Result<(), StateError> {
        let Pit8254State { counters, speaker_data, due, seen } = state;
        if counters.iter().any(|counter| counter.mode > 5 || !(1..=0x10000).contains(&counter.reload)) {
            return Err(StateError { device: "pit8254", why: "a counter's mode or count is impossible" });
        }
        let counters = counters.map(Counter::from);
        *self = Self { counters, speaker_data, due, seen, line: self.line.clone() };
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
        fn a_restored_timer_goes_on(before in steps(2, 4), after in steps(2, 4)) {
            goes_on(Pit8254::new(Line::unconnected()), Pit8254::new(Line::unconnected()), &before, &after);
        }
    }

    #[test]
    fn an_impossible_count_is_refused() {
        let mut pit = Pit8254::new(Line::unconnected());
        let mut state = pit.save();
        state.counters[1].reload = 0;
        assert!(pit.restore(state).is_err());
    }
}
