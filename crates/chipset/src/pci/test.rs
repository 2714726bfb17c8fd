//! A guest driver's view of a function with two BARs and MSI-X.

use super::*;
use device::{Access, Device, Line, Msi, MsiSink, Saved};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

struct Card {
    config: ConfigSpace,
    msix: MsiX,
    register: u64,
    deadline: Option<VmTime>,
}

impl Card {
    fn new(sink: MsiSink) -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1234,
            device: 0x5678,
            class: 0x01,
            subclass: 0x08,
            prog_if: 0x02,
            revision: 3,
            subsystem_vendor: 0xaaaa,
            subsystem: 0xbbbb,
        });
        config.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x4000);
        config.add_bar(2, BarKind::Io, 32);
        config.add_bar(3, BarKind::Memory32, 0x1000);
        config.add_capability(VENDOR_CAPABILITY, &[4, 0xee]);
        let msix = MsiX::new(&mut config, sink, 70, 0, 0x2000, 0x3000);
        Self { config, msix, register: 0, deadline: None }
    }
}

impl Function for Card {
    fn name(&self) -> &'static str {
        "card"
    }
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn bar_read(&mut self, bar: u8, offset: u64, size: u8, _now: VmTime) -> u64 {
        self.msix.read(bar, offset, size).unwrap_or(self.register)
    }
    fn bar_write(&mut self, bar: u8, offset: u64, size: u8, value: u64, _now: VmTime) {
        if !self.msix.write(bar, offset, size, value) {
            self.register = value;
        }
    }
    fn config_written(&mut self, offset: u16) {
        self.msix.sync(&self.config);
        if offset == 4 {
            self.deadline = Some(VmTime(7));
        }
    }
    fn deadline(&self) -> Option<VmTime> {
        self.deadline
    }
    fn tick(&mut self, _now: VmTime) {
        self.deadline = None;
        self.register = 0x71c;
    }
    fn reset(&mut self) {
        self.config.reset();
        self.msix.reset();
        self.register = 0;
    }
    fn inspect(&self) -> serde_json::Value {
        self.msix.inspect()
    }
}

struct Bench {
    host: Host,
    card: Arc<Mutex<Card>>,
    sent: Arc<Mutex<Vec<Msi>>>,
    levels: Arc<Mutex<Vec<(usize, bool)>>>,
    resets: Arc<Mutex<Vec<u8>>>,
}

const SLOT: u32 = 1;
const NOW: VmTime = VmTime(0);

impl Bench {
    fn new() -> Self {
        let (sent, levels, resets) =
            <(Arc<Mutex<Vec<_>>>, Arc<Mutex<Vec<_>>>, Arc<Mutex<Vec<_>>>)>::default();
        let log = levels.clone();
        let line = |i: usize| {
            let log = log.clone();
            (16 + i as u8, Line::new(move |high| log.lock().unwrap().push((i, high))))
        };
        let log = resets.clone();
        let host = Host::new([line(0), line(1), line(2), line(3)], move |v| log.lock().unwrap().push(v));
        let log = sent.clone();
        let sink = MsiSink::new(move |msi| log.lock().unwrap().push(msi));
        let card = Arc::new(Mutex::new(Card::new(sink)));
        assert_eq!(host.attach(card.clone()), Some(SLOT as u8));
        assert!(host.assign_resources(
            Window { base: 0xc000, len: 0x1000 },
            Window { base: 0xc000_0000, len: 0x1000_0000 },
            Window { base: 0x40_0000_0000, len: 0x10_0000_0000 },
        ));
        Self { host, card, sent, levels, resets }
    }

    fn access(window: u16, offset: u64, size: u8) -> Access {
        Access { window, offset, size }
    }

    fn cf8_read(&mut self, slot: u32, register: u32, size: u8) -> u64 {
        let address = 0x8000_0000 | slot << 11 | register & 0xfc;
        self.host.write(Self::access(Host::PORTS, 0, 4), address.into(), NOW);
        self.host.read(Self::access(Host::PORTS, 4 + u64::from(register & 3), size), NOW)
    }

    fn cf8_write(&mut self, slot: u32, register: u32, size: u8, value: u32) {
        let address = 0x8000_0000 | slot << 11 | register & 0xfc;
        self.host.write(Self::access(Host::PORTS, 0, 4), address.into(), NOW);
        self.host.write(Self::access(Host::PORTS, 4 + u64::from(register & 3), size), value.into(), NOW);
    }

    fn bar_read(&self, address: u64, size: u8) -> Option<u64> {
        let Decoded { function, bar, offset } = self.host.mmio(address)?;
        Some(function.lock().unwrap().bar_read(bar, offset, size, NOW))
    }

    fn bar_write(&self, address: u64, size: u8, value: u64) {
        let Decoded { function, bar, offset } = self.host.mmio(address).unwrap();
        function.lock().unwrap().bar_write(bar, offset, size, value, NOW);
    }

    fn find_capability(&mut self, id: u8) -> Option<u32> {
        let mut at = self.cf8_read(SLOT, 0x34, 1) as u32;
        while at != 0 {
            if self.cf8_read(SLOT, at, 1) == u64::from(id) {
                return Some(at);
            }
            at = self.cf8_read(SLOT, at + 1, 1) as u32;
        }
        None
    }
}

#[test]
fn enumeration_finds_bridge_and_card_by_both_mechanisms() {
    let mut bench = Bench::new();
    assert_eq!(bench.cf8_read(0, 0, 4), 0x0008_1b36);
    assert_eq!(bench.cf8_read(0, 8, 4) >> 16, 0x0600);
    assert_eq!(bench.cf8_read(SLOT, 0, 4), 0x5678_1234);
    assert_eq!(bench.cf8_read(SLOT, 2, 2), 0x5678);
    assert_eq!(bench.cf8_read(SLOT, 8, 4), 0x0108_0203);
    assert_eq!(bench.cf8_read(SLOT, 0x2c, 4), 0xbbbb_aaaa);
    assert_eq!(bench.cf8_read(2, 0, 4), 0xffff_ffff);
    assert_eq!(bench.cf8_read(SLOT + (1 << 5), 0, 4), 0xffff_ffff, "bus 1 is empty");
    let ecam = Bench::access(Host::ECAM, 1 << 15, 4);
    assert_eq!(bench.host.read(ecam, NOW), 0x5678_1234);
    assert_eq!(bench.host.read(Bench::access(Host::ECAM, 1 << 15 | 1 << 12, 4), NOW), 0xffff_ffff);
    // Identity is read-only.
    bench.cf8_write(SLOT, 0, 4, 0);
    assert_eq!(bench.cf8_read(SLOT, 0, 4), 0x5678_1234);
}

#[test]
fn bars_answer_their_size_and_move() {
    let mut bench = Bench::new();
    assert_eq!(bench.cf8_read(SLOT, 4, 2), u64::from(command::IO | command::MEMORY));
    let base = bench.cf8_read(SLOT, 0x10, 4);
    assert_eq!(base, 0xc000_0004);
    assert_eq!(bench.cf8_read(SLOT, 0x18, 4), 0xc001);
    bench.cf8_write(SLOT, 4, 2, 0);
    assert!(bench.bar_read(0xc000_0000, 4).is_none(), "decoding is off");
    for (register, size) in [(0x10, !0x3fffu32 | 4), (0x14, !0), (0x18, !31 | 1), (0x1c, !0xfff), (0x20, 0)] {
        let before = bench.cf8_read(SLOT, register, 4);
        bench.cf8_write(SLOT, register, 4, !0);
        assert_eq!(bench.cf8_read(SLOT, register, 4), u64::from(size), "BAR register {register:#x}");
        bench.cf8_write(SLOT, register, 4, before as u32);
    }
    bench.cf8_write(SLOT, 0x14, 4, 0x70);
    bench.cf8_write(SLOT, 4, 2, 3);
    assert!(bench.bar_read(0xc000_0000, 4).is_none());
    bench.bar_write(0x70_c000_0010, 4, 0x1122);
    assert_eq!(bench.bar_read(0x70_c000_0010, 4), Some(0x1122));
    assert!(bench.bar_read(0x70_c000_4000, 4).is_none());
    assert_eq!(bench.host.port(0xc01f).unwrap().offset, 0x1f);
    assert!(bench.host.port(0xc020).is_none());
    // A machine reset puts everything back.
    bench.host.reset();
    assert_eq!(bench.bar_read(0xc000_0010, 4), Some(0));
}

#[test]
fn msix_masks_and_remembers() {
    let mut bench = Bench::new();
    let capability = bench.find_capability(MSIX_CAPABILITY).unwrap();
    assert!(bench.find_capability(VENDOR_CAPABILITY).is_some());
    assert_eq!(bench.cf8_read(SLOT, capability + 2, 2), 69);
    assert_eq!(bench.cf8_read(SLOT, capability + 4, 4), 0x2000);
    let entry = 0xc000_2000 + 65 * 16;
    assert_eq!(bench.bar_read(entry + 12, 4), Some(1), "masked at power-up");
    bench.bar_write(entry, 8, 0xfee0_1000);
    bench.bar_write(entry + 8, 4, 0x41);
    bench.card.lock().unwrap().msix.notify(65);
    assert_eq!(bench.bar_read(0xc000_3008, 8), Some(0), "disabled: nothing is remembered");
    bench.cf8_write(SLOT, capability + 2, 2, 0xc000);
    assert_eq!(bench.cf8_read(SLOT, capability + 2, 2), 0xc000 | 69);
    bench.card.lock().unwrap().msix.notify(65);
    assert_eq!(bench.bar_read(0xc000_3008, 8), Some(2));
    bench.cf8_write(SLOT, capability + 2, 2, 0x8000);
    assert!(bench.sent.lock().unwrap().is_empty(), "the vector is still masked");
    bench.bar_write(entry + 12, 4, 0);
    assert!(bench.sent.lock().unwrap().is_empty(), "the function is no bus master");
    bench.cf8_write(SLOT, 4, 2, u32::from(command::MEMORY | command::BUS_MASTER));
    let message = Msi { address: 0xfee0_1000, data: 0x41 };
    assert_eq!(*bench.sent.lock().unwrap(), [message]);
    assert_eq!(bench.bar_read(0xc000_3008, 8), Some(0));
    bench.card.lock().unwrap().msix.notify(65);
    bench.card.lock().unwrap().msix.notify(70);
    assert_eq!(*bench.sent.lock().unwrap(), [message, message]);
}

#[test]
fn intx_wires_are_shared_and_gated() {
    let mut bench = Bench::new();
    assert_eq!(bench.cf8_read(SLOT, 0x3c, 2), 0x0111, "pin A of slot 1 is on GSI 17");
    let mut slots = vec![];
    for _ in 0..4 {
        slots.push(bench.host.attach(Arc::new(Mutex::new(Card::new(MsiSink::unconnected())))).unwrap());
    }
    assert_eq!(slots, [2, 3, 4, 5]);
    let (gsi, other) = bench.host.interrupt_line(5, 0);
    assert_eq!(gsi, 17);
    bench.card.lock().unwrap().config.set_interrupt(true);
    other.set(true);
    assert_eq!(bench.cf8_read(SLOT, 6, 2) & 8, 8);
    bench.cf8_write(SLOT, 4, 2, command::INTERRUPT_DISABLE.into());
    assert_eq!(*bench.levels.lock().unwrap(), [(1, true)], "slot 5 still holds the wire");
    other.set(false);
    assert_eq!(*bench.levels.lock().unwrap(), [(1, true), (1, false)]);
}

#[test]
fn reset_control_is_a_byte_in_the_address_register() {
    let mut bench = Bench::new();
    bench.host.write(Bench::access(Host::PORTS, 1, 1), 6, NOW);
    bench.host.write(Bench::access(Host::PORTS, 0, 4), 0x8000_0600, NOW);
    assert_eq!(*bench.resets.lock().unwrap(), [6]);
    assert_eq!(bench.host.read(Bench::access(Host::PORTS, 0, 4), NOW), 0x8000_0600);
}

#[test]
fn a_function_whose_configuration_space_was_written_has_its_time() {
    let mut bench = Bench::new();
    assert_eq!(bench.host.deadline(), None);
    bench.cf8_write(SLOT, 4, 2, 6);
    assert_eq!(bench.host.deadline(), Some(VmTime(7)));
    bench.host.tick(VmTime(6));
    assert_eq!(bench.card.lock().unwrap().register, 0);
    bench.host.tick(VmTime(7));
    assert_eq!(bench.card.lock().unwrap().register, 0x71c);
    assert_eq!(bench.host.deadline(), None);
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        accesses in prop::collection::vec((any::<bool>(), 0u16..2, any::<u32>(), 0u8..4, any::<u64>()), 0..200)
    ) {
        let mut bench = Bench::new();
        for (write, window, offset, size, value) in accesses {
            let size = 1 << size;
            let len = if window == Host::PORTS { 8 } else { 2 << 15 };
            let offset = u64::from(offset) % (len + 1 - u64::from(size));
            let access = Access { window, offset, size };
            if write {
                bench.host.write(access, value, NOW);
            } else {
                bench.host.read(access, NOW);
            }
            if let Some(decoded) = bench.host.mmio(value & 0xc000_7fff) {
                let mut function = decoded.function.lock().unwrap();
                function.bar_write(decoded.bar, decoded.offset, size, value, NOW);
                function.bar_read(decoded.bar, decoded.offset, size, NOW);
            }
        }
    }
}

proptest! {
    #[test]
    fn a_restored_function_goes_on(
        before: Vec<(bool, u16, u32, bool)>,
        after: Vec<(bool, u16, u32, bool)>,
    ) {
        let card = || Card::new(MsiSink::unconnected());
        let run = |card: &mut Card, steps: &[(bool, u16, u32, bool)]| {
            for &(config, at, value, interrupts) in steps {
                if config {
                    card.config.write(at & 0xffc, 4, value);
                    card.config_written(at & 0xffc);
                } else {
                    card.bar_write(0, u64::from(at & 0x3ffc), 4, value.into(), VmTime(0));
                }
                card.config.set_interrupt(interrupts);
                card.msix.notify(at % 80);
            }
        };
        let (mut first, mut second) = (card(), card());
        run(&mut first, &before);
        let json = serde_json::to_string(&(first.config.save(), first.msix.save())).unwrap();
        let (config, msix) = serde_json::from_str(&json).unwrap();
        second.config.restore(config).unwrap();
        second.msix.restore(msix).unwrap();
        run(&mut first, &after);
        run(&mut second, &after);
        prop_assert_eq!(first.config.save(), second.config.save());
        prop_assert_eq!(first.msix.save(), second.msix.save());
    }
}

#[test]
fn states_of_other_functions_are_refused() {
    let mut card = Card::new(MsiSink::unconnected());
    let mut state: serde_json::Value = serde_json::to_value(card.config.save()).unwrap();
    state["changed"]["0"] = 7.into();
    assert!(card.config.restore(serde_json::from_value(state).unwrap()).is_err());
    let other = MsiX::new(&mut card.config, MsiSink::unconnected(), 3, 0, 0x2000, 0x3000);
    assert!(card.msix.restore(other.save()).is_err());
}
