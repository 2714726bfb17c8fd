//! The UART's saved state.

use super::{FIFO_BYTES, OUTPUT_BYTES_MAX, Uart16550};
use device::{Saved, StateError};
use std::collections::VecDeque;

/// What a UART is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Uart16550State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    errors: u8,
    lines: u8,
    msr: u8,
    thr_empty_interrupt: bool,
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    lost_bytes: u64,
}

impl Saved for Uart16550 {
    type State = Uart16550State;

    fn save(&self) -> Uart16550State {
        let Self {
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            divisor,
            errors,
            lines,
            msr,
            thr_empty_interrupt,
            ref input,
            ref output,
            lost_bytes,
            line: _,
            notify: _,
        } = *self;
        let (input, output) = (input.clone(), output.clone());
        Uart16550State {
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            divisor,
            errors,
            lines,
            msr,
            thr_empty_interrupt,
            input,
            output,
            lost_bytes,
        }
    }

    fn restore(&mut self, state: Uart16550State) -> Result<(), StateError> {
        let wrong = |why| Err(StateError { device: "uart16550", why });
        let Uart16550State {
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            divisor,
            errors,
            lines,
            msr,
            thr_empty_interrupt,
            input,
            output,
            lost_bytes,
        } = state;
        if input.len() > FIFO_BYTES {
            return wrong("more input waits than its FIFO holds");
        }
        if output.len() > OUTPUT_BYTES_MAX {
            return wrong("more output waits than it keeps");
        }
        let (line, notify) = (self.line.clone(), self.notify.clone());
        *self = Self {
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            divisor,
            errors,
            lines,
            msr,
            thr_empty_interrupt,
            input,
            output,
            lost_bytes,
            line,
            notify,
        };
        self.update_line();
        self.notify.notify();
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::saved::test::{goes_on, steps};
    use device::serial::Endpoint;
    use device::{Line, Notify};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_restored_uart_goes_on(before in steps(1, 8), after in steps(1, 8), typed: Vec<u8>) {
            let uart = || Uart16550::new(Line::unconnected(), Notify::unconnected());
            let mut saved = uart();
            saved.offer(0, &typed);
            goes_on(saved, uart(), &before, &after);
        }
    }

    #[test]
    fn too_much_input_is_refused() {
        let mut uart = Uart16550::new(Line::unconnected(), Notify::unconnected());
        let mut state = uart.save();
        state.input.extend([0; FIFO_BYTES + 1]);
        let error = uart.restore(state).unwrap_err();
        assert!(error.to_string().contains("uart16550"), "{error}");
        assert!(uart.save().input.is_empty());
    }
}
