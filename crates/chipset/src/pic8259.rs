//! The two cascaded 8259A interrupt controllers of a PC (Intel 8259A datasheet), with the ELCR of the EISA chipsets.
//!
//! Enough for kernels that probe and mask them and for those that use them. The INTR output goes to LINT0 of the
//! boot processor's local APIC; that vCPU's loop asks [`Pic8259::acknowledge`] for the vector.
//!
//! [`Pic8259`] is a handle. Lock order: this lock -> local APIC.

use crate::{byte_wide, locked};
use device::{Access, Device, Line, VmTime};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

mod saved;

pub use saved::Pic8259State;

/// The slave's output is the master's input 2.
const CASCADE: u8 = 2;
/// Inputs that are edge-triggered whatever ELCR says: timer, keyboard, cascade; RTC, coprocessor.
const ALWAYS_EDGE: [u8; 2] = [0b0000_0111, 0b0010_0001];
const SPURIOUS: u8 = 7;

/// Where the initialisation sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    Done,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Debug, Clone)]
struct Chip {
    slave: bool,
    irr: u8,
    isr: u8,
    imr: u8,
    levels: u8,
    elcr: u8,
    vector_base: u8,
    init: Init,
    icw1: u8,
    /// ICW4: automatic EOI.
    auto_eoi: bool,
    /// ICW4: special fully nested mode.
    fully_nested: bool,
    special_mask: bool,
    read_isr: bool,
    poll: bool,
    rotate_on_auto_eoi: bool,
    /// The input with the lowest priority.
    lowest: u8,
}

impl Chip {
    fn new(slave: bool) -> Self {
        Self {
            slave,
            irr: 0,
            isr: 0,
            imr: 0,
            levels: 0,
            elcr: 0,
            vector_base: 0,
            init: Init::Done,
            icw1: 0,
            auto_eoi: false,
            fully_nested: false,
            special_mask: false,
            read_isr: false,
            poll: false,
            rotate_on_auto_eoi: false,
            lowest: 7,
        }
    }

    fn set(&mut self, input: u8, high: bool) {
        let bit = 1u8 << (input & 7);
        let level_triggered = self.elcr & bit != 0 || self.icw1 & 8 != 0;
        let rising = high && self.levels & bit == 0;
        self.levels = if high { self.levels | bit } else { self.levels & !bit };
        if rising || (high && level_triggered) {
            self.irr |= bit;
        } else if !high {
            // A request that goes away before it is acknowledged becomes spurious, edge or level.
            self.irr &= !bit;
        }
    }

    /// The set input with the highest priority, and its rank (0 is highest).
    fn highest(&self, inputs: u8) -> Option<(u8, u8)> {
        (0..8u8)
            .map(|rank| (self.lowest.wrapping_add(1).wrapping_add(rank) & 7, rank))
            .find(|&(input, _)| inputs & (1 << input) != 0)
    }

    /// The input that should interrupt now.
    fn request(&self) -> Option<u8> {
        let (input, rank) = self.highest(self.irr & !self.imr)?;
        let mut service = self.isr;
        if self.special_mask {
            service &= !self.imr;
        }
        if self.fully_nested && !self.slave {
            // The slave may interrupt again while its input is in service.
            service &= !(1 << CASCADE);
        }
        let blocked = self.highest(service).is_some_and(|(_, in_service)| in_service <= rank);
        (!blocked).then_some(input)
    }

    fn accept(&mut self, input: u8) {
        let bit = 1u8 << (input & 7);
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
        if !(self.elcr & bit != 0 || self.icw1 & 8 != 0) {
            self.irr &= !bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1.
            let Self { slave, levels, elcr, .. } = *self;
            *self = Self { levels, elcr, icw1: value, init: Init::Icw2, ..Self::new(slave) };
            // Level inputs that are high request at once; edges start anew.
            self.irr = levels & if value & 8 != 0 { 0xff } else { elcr };
        } else if value & 0x08 != 0 {
            // OCW3.
            self.poll = value & 0x04 != 0;
            match value & 3 {
                2 => self.read_isr = false,
                3 => self.read_isr = true,
                _ => {}
            }
            match (value >> 5) & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => {}
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        let current = self.highest(self.isr).map(|(input, _)| input);
        match value >> 5 {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            6 => self.lowest = named,
            code @ (1 | 5 | 3 | 7) => {
                let ended = if code & 2 != 0 { Some(named) } else { current };
                if let Some(input) = ended {
                    self.isr &= !(1 << input);
                    if code & 4 != 0 {
                        self.lowest = input;
                    }
                }
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.vector_base = value & 0xf8;
                self.init = match (self.icw1 & 2 != 0, self.icw1 & 1 != 0) {
                    (false, _) => Init::Icw3,
                    (true, true) => Init::Icw4,
                    (true, false) => Init::Done,
                };
            }
            // The cascade is wired; what software says about it changes nothing.
            Init::Icw3 => self.init = if self.icw1 & 1 != 0 { Init::Icw4 } else { Init::Done },
            Init::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.fully_nested = value & 0x10 != 0;
                self.init = Init::Done;
            }
        }
    }

    fn inspect(&self) -> Value {
        json!({ "irr": self.irr, "isr": self.isr, "imr": self.imr, "elcr": self.elcr,
            "vector_base": self.vector_base })
    }
}

struct Pair {
    master: Chip,
    slave: Chip,
    intr: Line,
}

impl Pair {
    fn update(&mut self) {
        let slave = self.slave.request().is_some();
        self.master.set(CASCADE, slave);
        self.intr.set(self.master.request().is_some());
    }

    fn acknowledge_slave(&mut self) -> u8 {
        let input = match self.slave.request() {
            Some(input) => {
                self.slave.accept(input);
                input
            }
            None => SPURIOUS,
        };
        self.slave.vector_base | input
    }

    fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.request() {
            Some(input) => {
                self.master.accept(input);
                if input == CASCADE { self.acknowledge_slave() } else { self.master.vector_base | input }
            }
            None => self.master.vector_base | SPURIOUS,
        };
        self.update();
        vector
    }

    fn chip(&mut self, window: u16) -> &mut Chip {
        if window == Pic8259::SLAVE { &mut self.slave } else { &mut self.master }
    }

    /// A poll command turns the next read into an acknowledgement.
    fn poll(&mut self, window: u16) -> u8 {
        let chip = self.chip(window);
        chip.poll = false;
        let answer = match chip.request() {
            Some(input) => {
                chip.accept(input);
                0x80 | input
            }
            None => 0,
        };
        self.update();
        answer
    }

    fn read_byte(&mut self, window: u16, offset: u64) -> u8 {
        if window == Pic8259::ELCR {
            return if offset == 0 { self.master.elcr } else { self.slave.elcr };
        }
        if self.chip(window).poll {
            return self.poll(window);
        }
        let chip = self.chip(window);
        match offset {
            0 if chip.read_isr => chip.isr,
            0 => chip.irr,
            _ => chip.imr,
        }
    }

    fn write_byte(&mut self, window: u16, offset: u64, value: u8) {
        if window == Pic8259::ELCR {
            let [master, slave] = ALWAYS_EDGE;
            if offset == 0 { self.master.elcr = value & !master } else { self.slave.elcr = value & !slave }
        } else if offset == 0 {
            self.chip(window).write_command(value);
        } else {
            self.chip(window).write_data(value);
        }
    }
}

/// A handle to the pair; clones are the same chips.
#[derive(Clone)]
pub struct Pic8259(Arc<Mutex<Pair>>);

impl std::fmt::Debug for Pic8259 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pic8259")
    }
}

impl Pic8259 {
    /// Window of ports 0x20 and 0x21.
    pub const MASTER: u16 = 0;
    /// Window of ports 0xa0 and 0xa1.
    pub const SLAVE: u16 = 1;
    /// Window of ports 0x4d0 and 0x4d1.
    pub const ELCR: u16 = 2;

    /// A pair whose INTR output is `intr`.
    pub fn new(intr: Line) -> Self {
        Self(Arc::new(Mutex::new(Pair { master: Chip::new(false), slave: Chip::new(true), intr })))
    }

    /// The wire to input `irq` (0-15; 2 is the cascade and goes nowhere).
    pub fn line(&self, irq: u8) -> Line {
        let pair = self.clone();
        Line::new(move |high| pair.set(irq, high))
    }

    /// Sets the level of an input.
    pub fn set(&self, irq: u8, high: bool) {
        let mut pair = locked(&self.0);
        match irq {
            CASCADE | 16.. => return,
            0..8 => pair.master.set(irq, high),
            _ => pair.slave.set(irq & 7, high),
        }
        pair.update();
    }

    /// The processor takes the interrupt: its vector, that of input 7 if there is none any more.
    pub fn acknowledge(&self) -> u8 {
        locked(&self.0).acknowledge()
    }
}

impl Device for Pic8259 {
    fn name(&self) -> &'static str {
        "pic8259"
    }

    fn read(&mut self, access: Access, _now: VmTime) -> u64 {
        let mut pair = locked(&self.0);
        byte_wide::read(access, |offset| pair.read_byte(access.window, offset))
    }

    fn write(&mut self, access: Access, value: u64, _now: VmTime) {
        let mut pair = locked(&self.0);
        byte_wide::write(access, value, |offset, byte| pair.write_byte(access.window, offset, byte));
        pair.update();
    }

    /// The levels are the devices' and stay.
    fn reset(&mut self) {
        let mut pair = locked(&self.0);
        for slave in [false, true] {
            let chip = if slave { &mut pair.slave } else { &mut pair.master };
            *chip = Chip { levels: chip.levels, ..Chip::new(slave) };
        }
        pair.update();
    }

    fn inspect(&self) -> Value {
        let pair = locked(&self.0);
        json!({ "master": pair.master.inspect(), "slave": pair.slave.inspect() })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Bench {
        pic: Pic8259,
        intr: Arc<AtomicBool>,
    }

    impl Bench {
        fn new() -> Self {
            let intr = Arc::new(AtomicBool::new(false));
            let level = intr.clone();
            let pic = Pic8259::new(Line::new(move |high| level.store(high, Ordering::Relaxed)));
            Self { pic, intr }
        }
        fn out(&mut self, port: u64, value: u8) {
            let (window, offset) = Self::place(port);
            self.pic.write(Access { window, offset, size: 1 }, value.into(), VmTime(0));
        }
        fn get(&mut self, port: u64) -> u8 {
            let (window, offset) = Self::place(port);
            self.pic.read(Access { window, offset, size: 1 }, VmTime(0)) as u8
        }
        fn place(port: u64) -> (u16, u64) {
            match port {
                0x4d0.. => (Pic8259::ELCR, port - 0x4d0),
                0xa0.. => (Pic8259::SLAVE, port - 0xa0),
                _ => (Pic8259::MASTER, port - 0x20),
            }
        }
        /// As every PC kernel does: vectors 0x20-0x2f, all unmasked.
        fn initialised(auto_eoi: bool) -> Self {
            let mut b = Self::new();
            let icw4 = if auto_eoi { 3 } else { 1 };
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x20),
                (0x21, 4),
                (0x21, icw4),
                (0xa0, 0x11),
                (0xa1, 0x28),
                (0xa1, 2),
                (0xa1, icw4),
            ] {
                b.out(port, value);
            }
            b.out(0x21, 0);
            b.out(0xa1, 0);
            b
        }
        fn intr(&self) -> bool {
            self.intr.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn mask_register_is_probed() {
        let mut b = Bench::new();
        b.out(0xa1, 0xff);
        b.out(0x21, 0xfb);
        assert_eq!(b.get(0x21), 0xfb);
    }

    #[test]
    fn priorities_nesting_and_eoi() {
        let mut b = Bench::initialised(false);
        b.pic.set(4, true);
        assert!(b.intr());
        assert_eq!(b.pic.acknowledge(), 0x24);
        assert!(!b.intr());
        b.pic.set(5, true);
        assert!(!b.intr(), "lower priority waits");
        b.pic.set(1, true);
        assert!(b.intr(), "higher priority nests");
        assert_eq!(b.pic.acknowledge(), 0x21);
        b.out(0x20, 0x0b);
        assert_eq!(b.get(0x20), 0x12);
        b.out(0x20, 0x20);
        b.out(0x20, 0x64);
        assert_eq!(b.get(0x20), 0);
        assert_eq!(b.pic.acknowledge(), 0x25);
        b.out(0x20, 0x20);
        b.pic.set(4, true);
        assert!(!b.intr(), "no new edge");
    }

    #[test]
    fn slave_and_spurious() {
        let mut b = Bench::initialised(false);
        b.pic.set(12, true);
        assert!(b.intr());
        assert_eq!(b.pic.acknowledge(), 0x2c);
        b.out(0xa0, 0x20);
        b.out(0x20, 0x20);
        b.pic.set(14, true);
        b.pic.set(14, false);
        assert!(!b.intr());
        assert_eq!(b.pic.acknowledge(), 0x27);
        b.out(0x20, 0x0b);
        assert_eq!(b.get(0x20), 0, "a spurious interrupt is not in service");
    }

    #[test]
    fn level_inputs_request_while_high() {
        let mut b = Bench::initialised(false);
        b.out(0x4d0, 0xff);
        b.out(0x4d1, 0x08);
        assert_eq!((b.get(0x4d0), b.get(0x4d1)), (0xf8, 0x08));
        b.pic.set(11, true);
        assert_eq!(b.pic.acknowledge(), 0x2b);
        b.out(0xa0, 0x20);
        b.out(0x20, 0x20);
        assert!(b.intr(), "still high");
        b.pic.set(11, false);
        assert!(!b.intr());
    }

    #[test]
    fn auto_eoi_and_masks() {
        let mut b = Bench::initialised(true);
        b.pic.set(0, true);
        assert_eq!(b.pic.acknowledge(), 0x20);
        b.pic.set(0, false);
        b.pic.set(0, true);
        assert!(b.intr(), "nothing is in service");
        b.out(0x21, 1);
        assert!(!b.intr());
        b.out(0x20, 0x0c);
        assert_eq!(b.get(0x20), 0, "poll: nothing");
        b.out(0x21, 0);
        b.out(0x20, 0x0c);
        assert_eq!(b.get(0x20), 0x80);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in prop::collection::vec((0u8..4, 0usize..6, any::<u8>()), 0..300)
        ) {
            let mut b = Bench::initialised(false);
            for (step, port, value) in steps {
                let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1][port];
                match step {
                    0 => b.out(port, value),
                    1 => { b.get(port); }
                    2 => b.pic.set(value & 0x1f, value & 0x80 != 0),
                    _ => { b.pic.acknowledge(); }
                }
                let pair = b.pic.0.lock().unwrap();
                prop_assert_eq!(b.intr.load(Ordering::Relaxed), pair.master.request().is_some());
            }
        }
    }
}
