//! The 16550A UART (National Semiconductor PC16550D datasheet).
//!
//! Characters take no time: what is written to THR is at once in the output buffer, and a receive FIFO below its
//! trigger level is at once timed out. So THR is empty unless the output buffer is nearly full, and back-pressure is
//! a THR that does not empty. The baud rate is kept and otherwise ignored. OUT2 does not gate the interrupt.

use crate::byte_wide;
use device::serial::Endpoint;
use device::{Access, Device, Line, Notify, VmTime};
use serde_json::{Value, json};
use std::collections::VecDeque;

mod saved;

pub use saved::Uart16550State;

/// Depth of the receive FIFO, and what a driver may write into an empty transmit FIFO.
const FIFO_BYTES: usize = 16;
/// Output held for the other end; more is lost, but THR says "not empty" 16 bytes earlier.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

mod ier {
    pub(super) const DATA: u8 = 1 << 0;
    pub(super) const THR_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const MODEM_STATUS: u8 = 1 << 3;
}

mod iir {
    pub(super) const MODEM_STATUS: u8 = 0x00;
    pub(super) const NONE: u8 = 0x01;
    pub(super) const THR_EMPTY: u8 = 0x02;
    pub(super) const DATA: u8 = 0x04;
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const FIFOS: u8 = 0xc0;
}

mod lcr {
    pub(super) const DIVISOR: u8 = 1 << 7;
}

mod mcr {
    pub(super) const DTR: u8 = 1 << 0;
    pub(super) const RTS: u8 = 1 << 1;
    pub(super) const OUT1: u8 = 1 << 2;
    pub(super) const OUT2: u8 = 1 << 3;
    pub(super) const LOOP: u8 = 1 << 4;
    pub(super) const WRITABLE: u8 = 0x1f;
}

mod lsr {
    pub(super) const DATA: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    pub(super) const BREAK: u8 = 1 << 4;
    pub(super) const THR_EMPTY: u8 = 1 << 5;
    pub(super) const IDLE: u8 = 1 << 6;
    /// Those that raise the line status interrupt and that a read clears.
    pub(super) const ERRORS: u8 = 0x1e;
}

mod msr {
    pub(super) const CTS: u8 = 1 << 4;
    pub(super) const DSR: u8 = 1 << 5;
    pub(super) const RING: u8 = 1 << 6;
    pub(super) const CARRIER: u8 = 1 << 7;
}

/// A UART.
#[derive(Debug)]
pub struct Uart16550 {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    /// Error bits of LSR.
    errors: u8,
    /// Input lines (bits 4-7) when not looped back.
    lines: u8,
    /// The value of MSR: lines and their changes.
    msr: u8,
    thr_empty_interrupt: bool,
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    lost_bytes: u64,
    line: Line,
    notify: Notify,
}

impl Uart16550 {
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// A UART with somebody at the other end, that interrupts on `line` and tells `notify` about output and about
    /// room for input.
    pub fn new(line: Line, notify: Notify) -> Self {
        let lines = msr::CTS | msr::DSR | msr::CARRIER;
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scratch: 0,
            // 9600 baud of 115200.
            divisor: 12,
            errors: 0,
            lines,
            msr: lines,
            thr_empty_interrupt: false,
            input: VecDeque::with_capacity(FIFO_BYTES),
            output: VecDeque::new(),
            lost_bytes: 0,
            line,
            notify,
        }
    }

    /// The other end sends a break.
    pub fn send_break(&mut self) {
        self.errors |= lsr::BREAK;
        self.receive(0);
        self.update_line();
    }

    fn fifos(&self) -> bool {
        self.fcr & 1 != 0
    }

    fn input_capacity(&self) -> usize {
        if self.fifos() { FIFO_BYTES } else { 1 }
    }

    fn thr_empty(&self) -> bool {
        self.output.len().saturating_add(FIFO_BYTES) <= OUTPUT_BYTES_MAX
    }

    fn looped(&self) -> bool {
        self.mcr & mcr::LOOP != 0
    }

    fn receive(&mut self, byte: u8) -> bool {
        if self.input.len() >= self.input_capacity() {
            self.errors |= lsr::OVERRUN;
            return false;
        }
        self.input.push_back(byte);
        true
    }

    fn transmit(&mut self, byte: u8) {
        if self.looped() {
            self.receive(byte);
        } else if self.output.len() < OUTPUT_BYTES_MAX {
            self.output.push_back(byte);
            if self.output.len() == 1 {
                self.notify.notify();
            }
        } else {
            self.lost_bytes = self.lost_bytes.saturating_add(1);
        }
        self.thr_empty_interrupt = self.thr_empty();
    }

    /// Bytes in the receive FIFO at which the data interrupt comes.
    fn trigger(&self) -> usize {
        match (self.fifos(), self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    /// The interrupt with the highest priority, as in IIR.
    fn interrupt(&self) -> u8 {
        if self.ier & ier::LINE_STATUS != 0 && self.errors != 0 {
            iir::LINE_STATUS
        } else if self.ier & ier::DATA != 0 && self.input.len() >= self.trigger() {
            iir::DATA
        } else if self.ier & ier::DATA != 0 && !self.input.is_empty() {
            iir::TIMEOUT
        } else if self.ier & ier::THR_EMPTY != 0 && self.thr_empty_interrupt {
            iir::THR_EMPTY
        } else if self.ier & ier::MODEM_STATUS != 0 && self.msr & 0x0f != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn update_line(&self) {
        self.line.set(self.interrupt() != iir::NONE);
    }

    /// Follows changes of the modem lines into MSR.
    fn update_modem(&mut self) {
        let new = if self.looped() {
            let wire = |from: u8, to: u8| if self.mcr & from != 0 { to } else { 0 };
            wire(mcr::RTS, msr::CTS)
                | wire(mcr::DTR, msr::DSR)
                | wire(mcr::OUT1, msr::RING)
                | wire(mcr::OUT2, msr::CARRIER)
        } else {
            self.lines
        };
        let old = self.msr & 0xf0;
        // The delta of RI is its trailing edge only.
        let changed = ((old ^ new) & !msr::RING) | (old & !new & msr::RING);
        self.msr = new | (self.msr & 0x0f) | changed >> 4;
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        let divisor = self.lcr & lcr::DIVISOR != 0;
        match offset {
            0 if divisor => self.divisor as u8,
            1 if divisor => (self.divisor >> 8) as u8,
            0 => {
                let byte = self.input.pop_front().unwrap_or(0);
                if self.input.is_empty() && !self.looped() {
                    self.notify.notify();
                }
                byte
            }
            1 => self.ier,
            2 => {
                let interrupt = self.interrupt();
                if interrupt == iir::THR_EMPTY {
                    // Reading IIR answers this interrupt (table 4).
                    self.thr_empty_interrupt = false;
                }
                interrupt | if self.fifos() { iir::FIFOS } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let data = if self.input.is_empty() { 0 } else { lsr::DATA };
                let empty = if self.thr_empty() { lsr::THR_EMPTY | lsr::IDLE } else { 0 };
                data | empty | std::mem::take(&mut self.errors) & lsr::ERRORS
            }
            6 => {
                let value = self.msr;
                self.msr &= 0xf0;
                value
            }
            7 => self.scratch,
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let divisor = self.lcr & lcr::DIVISOR != 0;
        match offset {
            0 if divisor => self.divisor = (self.divisor & 0xff00) | u16::from(value),
            1 if divisor => self.divisor = (self.divisor & 0x00ff) | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => {
                // Enabling the interrupt while THR is empty raises it at once; drivers count on it.
                if value & !self.ier & ier::THR_EMPTY != 0 {
                    self.thr_empty_interrupt = self.thr_empty();
                }
                self.ier = value & 0x0f;
            }
            2 => {
                if (value ^ self.fcr) & 1 != 0 || value & 0b010 != 0 {
                    self.input.clear();
                    self.notify.notify();
                }
                // Without the enable bit the others are not programmed.
                self.fcr = if value & 1 != 0 { value & 0b1100_1001 } else { 0 };
            }
            3 => self.lcr = value,
            4 => {
                let was_looped = self.looped();
                self.mcr = value & mcr::WRITABLE;
                self.update_modem();
                if was_looped && !self.looped() {
                    self.notify.notify();
                }
            }
            7 => self.scratch = value,
            _ => {}
        }
    }
}

impl Device for Uart16550 {
    fn name(&self) -> &'static str {
        "uart16550"
    }

    fn read(&mut self, access: Access, _now: VmTime) -> u64 {
        let value = byte_wide::read(access, |offset| self.read_byte(offset));
        self.update_line();
        value
    }

    fn write(&mut self, access: Access, value: u64, _now: VmTime) {
        byte_wide::write(access, value, |offset, byte| self.write_byte(offset, byte));
        self.update_line();
    }

    /// Registers only: the modem lines and the output not yet taken stay.
    fn reset(&mut self) {
        let Self {
            ier, fcr, lcr, mcr, scratch, divisor, errors, lines, msr, thr_empty_interrupt, input, ..
        } = self;
        (*ier, *fcr, *lcr, *mcr, *scratch, *errors) = (0, 0, 0, 0, 0, 0);
        *divisor = 12;
        *msr = *lines;
        *thr_empty_interrupt = false;
        input.clear();
        self.update_line();
        self.notify.notify();
    }

    fn inspect(&self) -> Value {
        json!({
            "ier": self.ier, "fcr": self.fcr, "lcr": self.lcr, "mcr": self.mcr, "msr": self.msr,
            "divisor": self.divisor,
            "interrupt": format!("{:#04x}", self.interrupt()),
            "input_bytes": self.input.len(),
            "output_bytes": self.output.len(),
            "lost_bytes": self.lost_bytes,
        })
    }
}

impl Endpoint for Uart16550 {
    fn offer(&mut self, _port: u32, bytes: &[u8]) -> usize {
        if self.looped() {
            return 0;
        }
        let room = self.input_capacity().saturating_sub(self.input.len());
        let taken = bytes.iter().take(room).map(|&byte| self.receive(byte)).count();
        self.update_line();
        taken
    }

    fn take(&mut self, _port: u32, into: &mut Vec<u8>, max: usize) {
        let was_full = !self.thr_empty();
        into.extend(self.output.drain(..max.min(self.output.len())));
        if was_full && self.thr_empty() {
            self.thr_empty_interrupt = true;
            self.update_line();
        }
        if !self.output.is_empty() {
            self.notify.notify();
        }
    }

    fn connect(&mut self, _port: u32, connected: bool) {
        let here = msr::DSR | msr::CARRIER;
        self.lines = if connected { self.lines | here } else { self.lines & !here };
        self.update_modem();
        self.update_line();
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    struct Bench {
        uart: Uart16550,
        irq: Arc<AtomicBool>,
        nudges: Arc<AtomicUsize>,
    }

    impl Bench {
        fn new() -> Self {
            let (irq, nudges) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
            let (level, count) = (irq.clone(), nudges.clone());
            let line = Line::new(move |high| level.store(high, Ordering::Relaxed));
            let notify = Notify::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            });
            Self { uart: Uart16550::new(line, notify), irq, nudges }
        }
        fn inb(&mut self, offset: u64) -> u8 {
            self.uart.read(Access { window: 0, offset, size: 1 }, VmTime(0)) as u8
        }
        fn outb(&mut self, offset: u64, value: u8) {
            self.uart.write(Access { window: 0, offset, size: 1 }, value.into(), VmTime(0));
        }
        fn irq(&self) -> bool {
            self.irq.load(Ordering::Relaxed)
        }
        fn output(&mut self) -> Vec<u8> {
            let mut bytes = vec![];
            self.uart.take(0, &mut bytes, usize::MAX);
            bytes
        }
    }

    /// The steps by which Linux's 8250 driver tells a 16550A from its relatives.
    #[test]
    fn probes_as_16550a() {
        let mut b = Bench::new();
        b.outb(1, 0);
        assert_eq!(b.inb(1) & 0x0f, 0);
        b.outb(1, 0x0f);
        assert_eq!(b.inb(1) & 0x0f, 0x0f);
        b.outb(1, 0);
        b.outb(4, 0x1a);
        assert_eq!(b.inb(6) & 0xf0, 0x90, "loopback of RTS and OUT2");
        b.outb(4, 0);
        b.outb(3, 0xbf);
        b.outb(2, 0);
        b.outb(3, 0);
        b.outb(2, 1);
        assert_eq!(b.inb(2) >> 6, 3, "FIFOs work");
        b.outb(3, 0xbf);
        assert_ne!(b.inb(2), 0, "no EFR");
        b.outb(3, 0);
        b.outb(2, 0x21);
        assert_eq!(b.inb(2) >> 5, 6, "no 64-byte FIFO");
        b.outb(1, 0x40);
        assert_eq!(b.inb(1), 0, "no unit-enable bit");
        b.outb(7, 0xa5);
        assert_eq!(b.inb(7), 0xa5);
    }

    #[test]
    fn thr_empty_interrupt_is_answered_by_iir_and_renewed() {
        let mut b = Bench::new();
        b.outb(2, 1);
        assert!(!b.irq());
        b.outb(1, 2);
        assert!(b.irq(), "enabling raises it");
        assert_eq!(b.inb(2), 0xc2);
        assert!(!b.irq());
        assert_eq!(b.inb(2), 0xc1);
        b.outb(1, 0);
        b.outb(1, 2);
        assert_eq!(b.inb(2), 0xc2, "enabling again raises it again");
        b.outb(1, 2);
        assert_eq!(b.inb(2), 0xc1, "writing the same value does not");
        b.outb(0, b'x');
        assert!(b.irq(), "the character is gone at once");
        assert_eq!(b.inb(5) & 0x60, 0x60);
        assert_eq!(b.output(), b"x");
    }

    #[test]
    fn input_interrupts_at_the_trigger_or_by_timeout() {
        let mut b = Bench::new();
        b.outb(2, 0x81);
        b.outb(1, 1);
        assert_eq!(b.uart.offer(0, b"1234567"), 7);
        assert!(b.irq());
        assert_eq!(b.inb(2), 0xcc);
        assert_eq!(b.uart.offer(0, b"890123456789"), 9, "sixteen bytes fit");
        assert_eq!(b.inb(2), 0xc4);
        let before = b.nudges.load(Ordering::Relaxed);
        let mut got = vec![];
        while b.inb(5) & 1 != 0 {
            got.push(b.inb(0));
        }
        assert_eq!(got, b"1234567890123456");
        assert!(!b.irq());
        assert_eq!(b.nudges.load(Ordering::Relaxed), before + 1, "there is room again");
        b.outb(2, 0);
        assert_eq!(b.uart.offer(0, b"ab"), 1, "no FIFO: one byte");
    }

    #[test]
    fn full_output_holds_the_driver_and_resumes_it() {
        let mut b = Bench::new();
        b.outb(1, 2);
        let mut sent = 0;
        while b.inb(5) & 0x20 != 0 {
            for _ in 0..FIFO_BYTES {
                b.outb(0, b'y');
                sent += 1;
            }
            assert!(sent <= OUTPUT_BYTES_MAX, "THR must fill");
        }
        b.inb(2);
        assert!(!b.irq());
        let mut some = vec![];
        b.uart.take(0, &mut some, 100);
        assert!(b.irq(), "room again");
        assert_eq!(some.len() + b.output().len(), sent);
        assert_eq!(b.uart.lost_bytes, 0);
        for _ in 0..OUTPUT_BYTES_MAX + 5 {
            b.outb(0, b'z');
        }
        assert_eq!(b.uart.lost_bytes, 5, "a driver that does not look loses bytes, not memory");
    }

    #[test]
    fn loopback_and_errors() {
        let mut b = Bench::new();
        b.outb(2, 1);
        b.outb(1, 5);
        b.outb(4, 0x10);
        for i in 0..17 {
            b.outb(0, i);
        }
        assert!(b.output().is_empty());
        assert_eq!(b.uart.offer(0, b"x"), 0);
        assert_eq!(b.inb(2), 0xc6);
        assert_eq!(b.inb(5) & 0x1f, 0x03, "overrun and data");
        assert_eq!(b.inb(5) & 0x1f, 0x01, "reading clears the error");
        assert_eq!(b.inb(0), 0);
        b.outb(2, 3);
        assert_eq!(b.inb(5) & 1, 0);
        b.outb(4, 0);
        b.uart.send_break();
        assert_eq!(b.inb(5) & 0x11, 0x11);
    }

    #[test]
    fn modem_lines_interrupt() {
        let mut b = Bench::new();
        b.outb(1, 8);
        b.uart.connect(0, false);
        assert!(b.irq());
        assert_eq!(b.inb(2), 0x00);
        assert_eq!(b.inb(6), 0x1a, "CTS stays, DSR and DCD changed");
        assert!(!b.irq());
        b.outb(3, 0x80);
        b.outb(0, 1);
        b.outb(1, 2);
        assert_eq!((b.inb(0), b.inb(1)), (1, 2));
        b.outb(3, 3);
        assert_eq!(b.inb(1), 8);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in prop::collection::vec((0u8..4, 0u64..8, any::<u8>(), 0u8..4), 0..300)
        ) {
            let mut b = Bench::new();
            for (step, offset, value, size) in steps {
                match step {
                    0 => b.outb(offset, value),
                    1 => {
                        let size = (1u8 << size).min(8 - offset as u8);
                        b.uart.read(Access { window: 0, offset, size }, VmTime(0));
                    }
                    2 => {
                        let taken = b.uart.offer(0, &[value; 20]);
                        prop_assert!(taken <= FIFO_BYTES);
                    }
                    _ => { b.output(); }
                }
                prop_assert!(b.uart.input.len() <= FIFO_BYTES);
                prop_assert_eq!(b.irq(), b.uart.interrupt() != iir::NONE);
            }
        }
    }
}
