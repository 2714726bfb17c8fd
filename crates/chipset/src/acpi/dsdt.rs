//! The differentiated system description table: the device tree of the board in AML (ACPI 6.5, chapters 6 and 20).

use super::table::Table;
use crate::board::{self, Board, SerialPort};
use crate::pci::{Host, Window};
use crate::power::{SLEEP_TYPE_S5, pm};
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::{Aml, AmlSink};

/// Slots on the PCI bus with interrupt routes.
const SLOTS: u32 = 32;

struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

pub(super) fn build(board: &Board) -> Vec<u8> {
    let mut aml = Bytes(Vec::new());
    name("_S5_", &Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO])).to_aml_bytes(&mut aml);
    scope("_SB_", &[&PciRoot(board), &Reserved(board), &Clock, &Panic]).to_aml_bytes(&mut aml);
    for (index, &port) in (0u8..).zip(&board.serial) {
        scope("_SB_", &[&Serial { index, port }]).to_aml_bytes(&mut aml);
    }
    let mut table = Table::new(b"DSDT", 2);
    table.bytes(&aml.0);
    table.finish()
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

fn scope<'a>(name: &str, children: &[&'a dyn Aml]) -> Scope<'a> {
    Scope::new(Path::new(name), children.to_vec())
}

fn resources(parts: &[&dyn Aml]) -> Name {
    name("_CRS", &ResourceTemplate::new(parts.to_vec()))
}

fn last(window: Window) -> u64 {
    window.base.saturating_add(window.len).saturating_sub(1)
}

/// The PCI Express root bridge with what it passes on and where its INTx pins go.
struct PciRoot<'a>(&'a Board);

impl Aml for PciRoot<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(board) = self;
        let mmio32 = AddressSpace::<u32>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            board.mmio32.base as u32,
            last(board.mmio32) as u32,
            None,
        );
        let mmio64 = AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            board.mmio64.base,
            last(board.mmio64),
            None,
        );
        let ports = board::PCI_PORTS as u16;
        let after_ports = ports.saturating_add(8);
        let crs = resources(&[
            &AddressSpace::<u16>::new_bus_number(0, 0),
            &IO::new(ports, ports, 1, 8),
            &AddressSpace::<u16>::new_io(0, ports.saturating_sub(1), None),
            &AddressSpace::<u16>::new_io(after_ports, u16::MAX, None),
            &mmio32,
            &mmio64,
        ]);
        let (hid, cid) = (name("_HID", &EISAName::new("PNP0A08")), name("_CID", &EISAName::new("PNP0A03")));
        let numbers = ["_UID", "_SEG", "_BBN"].map(|which| name(which, &ZERO));
        let routes = name("_PRT", &routes());
        // All devices are at the first node.
        let near = name("_PXM", &ZERO);
        let mut children: Vec<&dyn Aml> = vec![&hid, &cid];
        children.extend(numbers.iter().map(|number| number as &dyn Aml));
        children.extend([&crs as &dyn Aml, &routes]);
        if !board.nodes.is_empty() {
            children.push(&near);
        }
        Device::new(Path::new("PCI0"), children).to_aml_bytes(sink);
    }
}

/// `_PRT`: one entry for each pin of each slot, straight to its GSI.
fn routes() -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 0..SLOTS {
        for pin in 0..4u8 {
            let wire = Host::wire(slot as u8, pin);
            let gsi = board::INTX_GSIS.get(wire).copied().unwrap_or_default();
            let address = slot << 16 | 0xffff;
            routes.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    routes
}

/// What a kernel must not give to PCI devices: the configuration space (which it wants to see reserved before it
/// uses it) and the fixed hardware's ports.
struct Reserved<'a>(&'a Board);

impl Aml for Reserved<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ecam = self.0.ecam;
        let pm = board::PM as u16;
        let crs = resources(&[
            &Memory32Fixed::new(true, ecam.base as u32, ecam.len as u32),
            &IO::new(pm, pm, 1, pm::LEN as u8),
        ]);
        Device::new(
            Path::new("RSVD"),
            vec![&name("_HID", &EISAName::new("PNP0C02")), &name("_UID", &ZERO), &crs],
        )
        .to_aml_bytes(sink);
    }
}

struct Clock;

impl Aml for Clock {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let rtc = board::RTC as u16;
        let crs = resources(&[&IO::new(rtc, rtc, 1, 2), &isa_interrupt(board::RTC_IRQ)]);
        Device::new(Path::new("RTC_"), vec![&name("_HID", &EISAName::new("PNP0B00")), &crs])
            .to_aml_bytes(sink);
    }
}

/// pvpanic, by the name that QEMU gave it.
struct Panic;

impl Aml for Panic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let port = board::PVPANIC as u16;
        let crs = resources(&[&IO::new(port, port, 1, 1)]);
        Device::new(Path::new("PEVT"), vec![&name("_HID", &"QEMU0001"), &name("_STA", &0x0fu8), &crs])
            .to_aml_bytes(sink);
    }
}

struct Serial {
    index: u8,
    port: SerialPort,
}

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let SerialPort { port, irq } = self.port;
        let crs = resources(&[&IO::new(port, port, 1, 8), &isa_interrupt(irq)]);
        let uid = self.index.saturating_add(1);
        Device::new(
            Path::new(&format!("COM{:X}", uid & 0xf)),
            vec![&name("_HID", &EISAName::new("PNP0501")), &name("_UID", &uid), &crs],
        )
        .to_aml_bytes(sink);
    }
}

/// An edge-triggered, active-high interrupt that nobody shares.
fn isa_interrupt(irq: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, board::gsi_of_irq(irq).into())
}
