//! The ACPI tables of a [`Board`] (ACPI 6.5, chapter 5): what a kernel without firmware needs to find processors,
//! interrupt controllers, PCI, serial ports, the power button and the way to switch off.
//!
//! Boards with NUMA nodes have three tables more ([`numa`]).
//!
//! Fixed-hardware ACPI: an SCI, PM1 registers and a PM timer ([`crate::power`]); no SMI port, no GPEs, no HPET.

mod dsdt;
mod numa;
mod table;
#[cfg(test)]
mod test;

use crate::board::{self, Board};
use crate::local_apic::LocalApic;
use crate::power::pm;
use table::{Table, checksum};

/// FADT IA-PC boot architecture flags: ISA devices exist, no VGA; the i8042 bit is clear.
const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 2;

/// FADT fixed feature flags (5.2.9, table 5.10).
mod feature {
    pub(super) const WBINVD: u32 = 1 << 0;
    pub(super) const PROC_C1: u32 = 1 << 2;
    /// No fixed sleep button.
    pub(super) const SLEEP_BUTTON: u32 = 1 << 5;
    /// The RTC is no fixed wake event.
    pub(super) const FIX_RTC: u32 = 1 << 6;
    pub(super) const TIMER_32_BITS: u32 = 1 << 8;
    pub(super) const RESET_REGISTER: u32 = 1 << 10;
    pub(super) const HEADLESS: u32 = 1 << 12;
}

/// MADT interrupt flags: active high, level-triggered.
const LEVEL_HIGH: u16 = 0b1101;
/// APIC ids from here on have x2APIC structures in the MADT.
const X2APIC_ONLY: u32 = 255;

/// The tables, ready to be copied into guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Where they go: also the address of the RSDP.
    pub base: u64,
    /// All of them.
    pub bytes: Vec<u8>,
}

/// Builds the tables to be put at `base`, a multiple of 64 below 4 GiB ([`board::ACPI_TABLES`]).
pub fn build(board: &Board, base: u64) -> Tables {
    let mut blob = Blob { base, bytes: vec![0; RSDP_LEN] };
    let facs = blob.add(&facs());
    let dsdt = blob.add(&dsdt::build(board));
    let mut tables = vec![fadt(facs, dsdt), madt(board), mcfg(board), waet()];
    tables.extend(numa::tables(&board.nodes));
    let mut xsdt = Table::new(b"XSDT", 1);
    for table in tables {
        let address = blob.add(&table.finish());
        xsdt.u64(address);
    }
    let xsdt = blob.add(&xsdt.finish());
    let rsdp = rsdp(xsdt);
    for (to, from) in blob.bytes.iter_mut().zip(rsdp) {
        *to = from;
    }
    Tables { base, bytes: blob.bytes }
}

/// Tables one after the other, each at a multiple of 64 (which the FACS needs).
struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = self.base.saturating_add(self.bytes.len() as u64);
        self.bytes.extend_from_slice(table);
        address
    }
}

const RSDP_LEN: usize = 36;

/// Root system description pointer, revision 2 (5.2.5.3).
fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut rsdp = Vec::with_capacity(RSDP_LEN);
    rsdp.extend_from_slice(b"RSD PTR ");
    rsdp.push(0);
    rsdp.extend_from_slice(&table::OEM_ID);
    rsdp.push(2);
    rsdp.extend_from_slice(&0u32.to_le_bytes());
    if let Some(byte) = rsdp.get(..20).map(checksum)
        && let Some(place) = rsdp.get_mut(8)
    {
        *place = byte;
    }
    rsdp.extend_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    rsdp.extend_from_slice(&xsdt.to_le_bytes());
    rsdp.extend_from_slice(&[0; 4]);
    let byte = checksum(&rsdp);
    if let Some(place) = rsdp.get_mut(32) {
        *place = byte;
    }
    rsdp
}

/// Firmware ACPI control structure (5.2.10): no header like the others', no checksum.
fn facs() -> Vec<u8> {
    let mut facs = Vec::with_capacity(64);
    facs.extend_from_slice(b"FACS");
    facs.extend_from_slice(&64u32.to_le_bytes());
    facs.resize(32, 0);
    facs.push(2);
    facs.resize(64, 0);
    facs
}

/// Fixed ACPI description table (5.2.9), revision 6.
fn fadt(facs: u64, dsdt: u64) -> Table {
    let port = |offset: u64| board::PM.saturating_add(offset) as u32;
    let (event, control, timer) = (port(pm::EVENT), port(pm::CONTROL), port(pm::TIMER));
    let mut t = Table::new(b"FACP", 6);
    t.u32(facs as u32);
    t.u32(dsdt as u32);
    t.u8(0);
    t.u8(0); // preferred profile: unspecified
    t.u16(board::SCI_GSI.into());
    t.u32(0); // no SMI command port: in ACPI mode from the start
    t.zeroes(4); // ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
    t.u32(event);
    t.u32(0);
    t.u32(control);
    t.u32(0);
    t.u32(0); // PM2
    t.u32(timer);
    t.u32(0); // GPE0
    t.u32(0); // GPE1
    t.u8(4);
    t.u8(2);
    t.u8(0);
    t.u8(4);
    t.zeroes(4); // GPE0, GPE1 lengths, GPE1 base, _CST
    t.u16(0xfff); // C2 latency: not supported
    t.u16(0xfff); // C3
    t.u16(0); // flush size
    t.u16(0); // flush stride
    t.zeroes(4); // duty offset, duty width, day and month alarms
    t.u8(crate::rtc::CENTURY);
    t.u16(BOOT_ARCHITECTURE);
    t.u8(0);
    t.u32(
        feature::WBINVD
            | feature::PROC_C1
            | feature::SLEEP_BUTTON
            | feature::FIX_RTC
            | feature::TIMER_32_BITS
            | feature::RESET_REGISTER
            | feature::HEADLESS,
    );
    let (reset_port, reset_value) = board::RESET_CONTROL;
    t.io_register(reset_port.into(), 8, 1);
    t.u8(reset_value);
    t.u16(0); // ARM boot architecture
    t.u8(5); // minor version
    t.u64(0); // X_FIRMWARE_CTRL: the 32-bit one is in use
    t.u64(dsdt);
    t.io_register(event, 32, 2);
    t.no_register();
    t.io_register(control, 16, 2);
    t.no_register();
    t.no_register(); // PM2
    t.io_register(timer, 32, 3);
    t.no_register(); // GPE0
    t.no_register(); // GPE1
    t.no_register(); // sleep control
    t.no_register(); // sleep status
    t.u64(0); // hypervisor vendor
    t
}

/// Multiple APIC description table (5.2.12), revision 5.
fn madt(board: &Board) -> Table {
    let mut t = Table::new(b"APIC", 5);
    t.u32(LocalApic::BASE as u32);
    t.u32(1); // 8259As are there too
    for id in 0..board.vcpus {
        if id < X2APIC_ONLY {
            t.bytes(&[0, 8, id as u8, id as u8]);
        } else {
            t.bytes(&[9, 16, 0, 0]);
            t.u32(id);
        }
        t.u32(1); // enabled
        if id >= X2APIC_ONLY {
            t.u32(id);
        }
    }
    t.bytes(&[1, 12, 0, 0]);
    t.u32(board::IOAPIC as u32);
    t.u32(0);
    for (irq, gsi, flags) in [(0, board::PIT_GSI, 0), (board::SCI_GSI, board::SCI_GSI, LEVEL_HIGH)] {
        t.bytes(&[2, 10, 0, irq]);
        t.u32(gsi.into());
        t.u16(flags);
    }
    // NMI is on LINT1 of all.
    t.bytes(&[4, 6, 0xff, 0, 0, 1]);
    if board.vcpus > X2APIC_ONLY {
        t.bytes(&[0x0a, 12, 0, 0]);
        t.u32(u32::MAX);
        t.bytes(&[1, 0, 0, 0]);
    }
    t
}

/// PCI memory-mapped configuration space (PCI Firmware 3.3, 4.1.2): bus 0 of segment 0.
fn mcfg(board: &Board) -> Table {
    let mut t = Table::new(b"MCFG", 1);
    t.u64(0);
    t.u64(board.ecam.base);
    t.u16(0);
    t.bytes(&[0, 0]);
    t.u32(0);
    t
}

/// Windows ACPI emulated devices table: the RTC and the PM timer need no workarounds, one read is enough.
fn waet() -> Table {
    let mut t = Table::new(b"WAET", 1);
    t.u32(0b11);
    t
}
