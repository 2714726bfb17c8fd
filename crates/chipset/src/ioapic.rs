//! The I/O APIC (82093AA datasheet; version 0x20 with the EOI register, as in Intel's ICH datasheets).
//!
//! A pin is edge- or level-triggered by its redirection entry. A level pin sends when it is high and its remote IRR
//! is clear, and again after the EOI if it is still high. Polarity is kept but ignored: a [`Line`] is high when it
//! is asserted. An edge on a masked pin is lost, as the datasheet says.
//!
//! [`IoApic`] is a handle: devices raise [`IoApic::line`]s from any thread. Lock order: this lock -> local APIC (the
//! message is sent under the lock, so that edges arrive in order).

use crate::local_apic::Trigger;
use crate::{locked, msi};
use device::{Access, Device, Line, Msi, MsiSink, VmTime};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

mod saved;

pub use saved::IoApicState;

/// Pins of the chip on a PC.
pub const PINS: usize = 24;
/// Version 0x20.
const VERSION: u32 = 0x20;

/// Register select, data and EOI in the window.
const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;
const EOI: u64 = 0x40;

/// Bits of a redirection entry.
mod entry {
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    /// Vector, delivery mode, destination mode, polarity, trigger, mask, destination with KVM's seven more bits.
    pub(super) const WRITABLE: u64 = 0xffff_0000_0001_afff;
}

#[derive(Debug, Clone, Copy)]
struct Pin {
    entry: u64,
    high: bool,
}

const POWER_UP: Pin = Pin { entry: entry::MASKED, high: false };

impl Pin {
    fn is_level(&self) -> bool {
        self.entry & entry::LEVEL != 0
    }

    /// What it sends, masked or not.
    fn message(&self) -> Msi {
        let trigger = if self.is_level() { Trigger::Level } else { Trigger::Edge };
        // Bits 63-56 as ever; KVM_FEATURE_MSI_EXT_DEST_ID puts 14-8 into 55-49, beside the bit that would mean remapping.
        let destination = ((self.entry >> 56) | ((self.entry >> 49) & 0x7f) << 8) as u32;
        let logical = self.entry & entry::LOGICAL != 0;
        msi::encode(destination, logical, (self.entry >> 8) as u32, self.entry as u8, trigger)
    }

    fn send(&mut self, sink: &MsiSink) {
        if self.entry & entry::MASKED != 0 {
            return;
        }
        if self.is_level() {
            self.entry |= entry::REMOTE_IRR;
        }
        sink.send(self.message());
    }

    /// A level pin that is high and not in service sends.
    fn send_level(&mut self, sink: &MsiSink) {
        if self.high && self.is_level() && self.entry & entry::REMOTE_IRR == 0 {
            self.send(sink);
        }
    }

    fn set(&mut self, high: bool, sink: &MsiSink) {
        let rising = high && !self.high;
        self.high = high;
        if self.is_level() {
            self.send_level(sink);
        } else if rising {
            self.send(sink);
        }
    }

    fn write(&mut self, value: u64) {
        self.entry = (self.entry & !entry::WRITABLE) | (value & entry::WRITABLE);
        if !self.is_level() {
            self.entry &= !entry::REMOTE_IRR;
        }
    }
}

struct State {
    id: u32,
    select: u8,
    pins: Vec<Pin>,
    sink: MsiSink,
    watch: Option<Watch>,
}

/// Hears what all pins send, whenever that changes and before any of them sends it. Called with the chip locked.
pub type Watch = Box<dyn Fn(&[Msi]) + Send>;

/// A handle to an I/O APIC; clones are the same chip.
#[derive(Clone)]
pub struct IoApic(Arc<Mutex<State>>);

impl std::fmt::Debug for IoApic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IoApic")
    }
}

impl IoApic {
    /// Bytes of the register window.
    pub const LEN: u64 = 0x1000;

    /// A chip with `pins` (at most 240) pins that sends its messages to `sink`.
    pub fn new(id: u8, pins: usize, sink: MsiSink) -> Self {
        let pins = vec![POWER_UP; pins.clamp(1, 240)];
        Self(Arc::new(Mutex::new(State { id: id.into(), select: 0, pins, sink, watch: None })))
    }

    /// Names who hears of changed messages: local APICs that are not the board's must know which vectors are
    /// level-triggered. They are told at once.
    pub fn set_watch(&self, watch: Watch) {
        let mut state = locked(&self.0);
        state.watch = Some(watch);
        state.tell();
    }

    /// The wire to a pin. A pin has one level: devices that share it must combine theirs first.
    pub fn line(&self, pin: usize) -> Line {
        let chip = self.clone();
        Line::new(move |high| chip.set(pin, high))
    }

    /// Sets the level of a pin.
    pub fn set(&self, pin: usize, high: bool) {
        let mut state = locked(&self.0);
        let State { pins, sink, .. } = &mut *state;
        if let Some(pin) = pins.get_mut(pin) {
            pin.set(high, sink);
        }
    }

    /// A level-triggered vector has ended at a local APIC ([`crate::local_apic::Effect::Eoi`]).
    pub fn eoi(&self, vector: u8) {
        locked(&self.0).eoi(vector);
    }
}

impl State {
    fn tell(&self) {
        if let Some(watch) = &self.watch {
            watch(&self.pins.iter().map(Pin::message).collect::<Vec<_>>());
        }
    }

    fn eoi(&mut self, vector: u8) {
        for pin in &mut self.pins {
            if pin.entry as u8 == vector && pin.entry & entry::REMOTE_IRR != 0 {
                pin.entry &= !entry::REMOTE_IRR;
                pin.send_level(&self.sink);
            }
        }
    }

    fn read_data(&self) -> u32 {
        match self.select {
            0x00 | 0x02 => self.id << 24,
            0x01 => {
                let last = u32::try_from(self.pins.len()).unwrap_or(0).saturating_sub(1);
                VERSION | last << 16
            }
            0x10.. => {
                let index = self.select.wrapping_sub(0x10);
                let entry = self.pins.get(usize::from(index >> 1)).map_or(u64::MAX, |pin| pin.entry);
                if index & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => u32::MAX,
        }
    }

    fn write_data(&mut self, value: u32) {
        match self.select {
            0x00 => self.id = (value >> 24) & 0xf,
            0x10.. => {
                let index = self.select.wrapping_sub(0x10);
                let index_of_pin = usize::from(index >> 1);
                let Some(pin) = self.pins.get_mut(index_of_pin) else { return };
                let entry = if index & 1 == 0 {
                    (pin.entry & !0xffff_ffff) | u64::from(value)
                } else {
                    (pin.entry & 0xffff_ffff) | u64::from(value) << 32
                };
                pin.write(entry);
                self.tell();
                if let Some(pin) = self.pins.get_mut(index_of_pin) {
                    pin.send_level(&self.sink);
                }
            }
            _ => {}
        }
    }
}

impl Device for IoApic {
    fn name(&self) -> &'static str {
        "ioapic"
    }

    fn read(&mut self, access: Access, _now: VmTime) -> u64 {
        let state = locked(&self.0);
        let value = match access.offset {
            SELECT => state.select.into(),
            DATA => state.read_data().into(),
            _ => u64::MAX,
        };
        value & access.mask()
    }

    fn write(&mut self, access: Access, value: u64, _now: VmTime) {
        let mut state = locked(&self.0);
        match access.offset {
            SELECT => state.select = value as u8,
            DATA => state.write_data(value as u32),
            EOI => state.eoi(value as u8),
            _ => {}
        }
    }

    /// Masks all pins. Their levels are the devices' and stay.
    fn reset(&mut self) {
        let mut state = locked(&self.0);
        state.select = 0;
        for pin in &mut state.pins {
            pin.entry = POWER_UP.entry;
        }
        state.tell();
    }

    fn inspect(&self) -> Value {
        let state = locked(&self.0);
        let pins: Vec<Value> = state
            .pins
            .iter()
            .enumerate()
            .filter(|(_, pin)| pin.high || pin.entry & entry::MASKED == 0)
            .map(|(i, pin)| json!({ "pin": i, "entry": format!("{:#018x}", pin.entry), "high": pin.high }))
            .collect();
        json!({ "id": state.id, "pins": pins })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn chip() -> (IoApic, Arc<Mutex<Vec<Msi>>>) {
        let sent: Arc<Mutex<Vec<Msi>>> = Arc::default();
        let log = sent.clone();
        (IoApic::new(1, PINS, MsiSink::new(move |msi| log.lock().unwrap().push(msi))), sent)
    }

    fn write(chip: &mut IoApic, register: u64, value: u32) {
        chip.write(Access { window: 0, offset: SELECT, size: 4 }, register, VmTime(0));
        chip.write(Access { window: 0, offset: DATA, size: 4 }, value.into(), VmTime(0));
    }

    fn read(chip: &mut IoApic, register: u64) -> u32 {
        chip.write(Access { window: 0, offset: SELECT, size: 4 }, register, VmTime(0));
        chip.read(Access { window: 0, offset: DATA, size: 4 }, VmTime(0)) as u32
    }

    #[test]
    fn identifies_itself() {
        let (mut chip, _) = chip();
        assert_eq!(read(&mut chip, 1), 0x0017_0020);
        assert_eq!(read(&mut chip, 0), 1 << 24);
        assert_eq!(read(&mut chip, 0x10), 0x10000);
        assert_eq!(read(&mut chip, 0x10 + 2 * 24), u32::MAX);
    }

    #[test]
    fn edge_pin_sends_on_rising_edges_only() {
        let (mut chip, sent) = chip();
        let line = chip.line(4);
        line.pulse();
        write(&mut chip, 0x19, 0x0200_0000);
        write(&mut chip, 0x18, 0x0000_0031);
        assert!(sent.lock().unwrap().is_empty(), "the edge on the masked pin is lost");
        line.set(true);
        line.set(true);
        line.set(false);
        line.set(true);
        let message = Msi { address: 0xfee0_2000, data: 0x4031 };
        assert_eq!(*sent.lock().unwrap(), [message, message]);
    }

    #[test]
    fn level_pin_waits_for_eoi() {
        let (mut chip, sent) = chip();
        chip.line(9).set(true);
        write(&mut chip, 0x22, 0x0000_8039);
        assert_eq!(sent.lock().unwrap().len(), 1, "unmasking a high level pin sends");
        assert_eq!(read(&mut chip, 0x22), 0x0000_c039, "remote IRR");
        chip.line(9).set(false);
        chip.line(9).set(true);
        chip.eoi(0x38);
        assert_eq!(sent.lock().unwrap().len(), 1);
        chip.eoi(0x39);
        assert_eq!(sent.lock().unwrap().len(), 2, "still high");
        chip.line(9).set(false);
        chip.write(Access { window: 0, offset: EOI, size: 4 }, 0x39, VmTime(0));
        assert_eq!(read(&mut chip, 0x22), 0x0000_8039);
        assert_eq!(sent.lock().unwrap().len(), 2);
    }

    #[test]
    fn messages_are_told_before_they_are_sent() {
        let (mut chip, sent) = chip();
        let heard: Arc<Mutex<Vec<(usize, Msi)>>> = Arc::default();
        let (log, before) = (heard.clone(), sent.clone());
        chip.set_watch(Box::new(move |pins| {
            log.lock().unwrap().push((before.lock().unwrap().len(), pins[9]));
        }));
        chip.line(9).set(true);
        write(&mut chip, 0x22, 0x0000_8039);
        let level = Msi { address: 0xfee0_0000, data: 0xc039 };
        assert_eq!(*sent.lock().unwrap(), [level]);
        let edge = Msi { address: 0xfee0_0000, data: 0x4000 };
        assert_eq!(*heard.lock().unwrap(), [(0, edge), (0, level)]);
        chip.reset();
        assert_eq!(heard.lock().unwrap().last(), Some(&(1, edge)));
    }

    #[test]
    fn mask_and_edge_trick_clears_remote_irr() {
        let (mut chip, _) = chip();
        chip.line(9).set(true);
        write(&mut chip, 0x22, 0x0000_8039);
        write(&mut chip, 0x22, 0x0001_0039);
        write(&mut chip, 0x22, 0x0001_8039);
        assert_eq!(read(&mut chip, 0x22), 0x0001_8039);
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in prop::collection::vec((0u8..4, 0u64..0x100, any::<u32>()), 0..300)
        ) {
            let (mut chip, sent) = chip();
            for (step, register, value) in steps {
                match step {
                    0 => write(&mut chip, register, value),
                    1 => { read(&mut chip, register); }
                    2 => chip.set(register as usize, value & 1 != 0),
                    _ => chip.eoi(value as u8),
                }
            }
            for msi in sent.lock().unwrap().iter() {
                prop_assert_eq!(msi.address >> 20, 0xfee);
            }
        }
    }
}
