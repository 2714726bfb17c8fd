//! Where things are on the PC board: every port, address and interrupt number, once.

use crate::ioapic::IoApic;
use crate::pci::Window;
use crate::pic8259::Pic8259;
use device::Line;

/// 8259A master, slave and edge/level control.
pub const PIC_MASTER: u64 = 0x20;
/// Slave.
pub const PIC_SLAVE: u64 = 0xa0;
/// Edge/level control registers.
pub const PIC_ELCR: u64 = 0x4d0;
/// 8254 counters.
pub const PIT: u64 = 0x40;
/// Speaker and counter 2 gate.
pub const SPEAKER: u64 = 0x61;
/// i8042 data, where there is none.
pub const I8042_DATA: u64 = 0x60;
/// i8042 command, for its reset pulse.
pub const I8042: u64 = 0x64;
/// RTC index and data.
pub const RTC: u64 = 0x70;
/// System control port A.
pub const PORT_92: u64 = 0x92;
/// ACPI fixed hardware ([`crate::power::pm`]).
pub const PM: u64 = 0x600;
/// PCI configuration mechanism 1, with the reset control register at 0xcf9.
pub const PCI_PORTS: u64 = 0xcf8;
/// Reset control register and the value that resets.
pub const RESET_CONTROL: (u16, u8) = (0xcf9, 6);
/// Ports for PCI I/O BARs.
pub const PCI_IO: Window = Window { base: 0xc000, len: 0x1000 };
/// pvpanic, where QEMU has it.
pub const PVPANIC: u64 = 0x505;
/// Debug console.
pub const DEBUG_CONSOLE: u64 = 0xe9;
/// isa-debug-exit.
pub const DEBUG_EXIT: u64 = 0xf4;
/// pc-testdev: interrupt lines (24 ports).
pub const TEST_IRQS: u64 = 0x2000;
/// pc-testdev: scratch (4 ports).
pub const TEST_SCRATCH: u64 = 0xe0;
/// pc-testdev: flush (4 ports).
pub const TEST_FLUSH: u64 = 0xe4;
/// pc-testdev: scratch memory.
pub const TEST_MEMORY: u64 = 0xff00_0000;

/// A serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SerialPort {
    /// First of eight ports.
    pub port: u16,
    /// ISA interrupt.
    pub irq: u8,
}

/// The serial ports of a PC.
pub const COM1: SerialPort = SerialPort { port: 0x3f8, irq: 4 };
/// The second.
pub const COM2: SerialPort = SerialPort { port: 0x2f8, irq: 3 };

/// End of the RAM below 4 GiB: the PCI window begins here, more RAM is from 4 GiB on.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Memory BARs below 4 GiB.
pub const MMIO32: Window = Window { base: LOW_RAM_END, len: 0x2000_0000 };
/// PCI memory-mapped configuration space of bus 0.
pub const ECAM: Window = Window { base: 0xe000_0000, len: 0x10_0000 };
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Memory BARs above 4 GiB, below the 512 GiB that 39 physical address bits reach, of a guest whose RAM does not ([`mmio64`]).
pub const MMIO64: Window = Window { base: 0x40_0000_0000, len: 0x40_0000_0000 };

/// Memory BARs above 4 GiB and all RAM, which ends at `ram_end`, as far as so many bits of an address reach; `None` if there is no room.
pub fn mmio64(ram_end: u64, physical_address_bits: u8) -> Option<Window> {
    const GIB: u64 = 1 << 30;
    if ram_end <= MMIO64.base {
        return Some(MMIO64);
    }
    let base = ram_end.checked_next_multiple_of(GIB)?;
    let reach = 1u64.checked_shl(physical_address_bits.into()).unwrap_or(u64::MAX);
    let len = reach.checked_sub(base)?.min(MMIO64.len);
    (len >= GIB).then_some(Window { base, len })
}

/// The 8254's GSI: ISA interrupt 0 is on pin 2.
pub const PIT_GSI: u8 = 2;
/// RTC interrupt.
pub const RTC_IRQ: u8 = 8;
/// System control interrupt, level-triggered.
pub const SCI_GSI: u8 = 9;
/// GSIs of the four PCI INTx wires.
pub const INTX_GSIS: [u8; 4] = [16, 17, 18, 19];

/// Where the ACPI tables are built: kernels search the RSDP from here to 1 MiB.
pub const ACPI_TABLES: u64 = 0xe_0000;

/// The I/O APIC pin of an ISA interrupt.
pub fn gsi_of_irq(irq: u8) -> u8 {
    if irq == 0 { PIT_GSI } else { irq }
}

/// The wire of an ISA interrupt: both to the 8259A and to the I/O APIC; the kernel masks one of them.
pub fn isa_line(pic: &Pic8259, ioapic: &IoApic, irq: u8) -> Line {
    let (pic, ioapic) = (pic.clone(), ioapic.clone());
    let pin = usize::from(gsi_of_irq(irq));
    Line::new(move |high| {
        pic.set(irq, high);
        ioapic.set(pin, high);
    })
}

/// A NUMA node: processors and memory that are near to each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// APIC ids of its processors.
    pub cpus: Vec<u32>,
    /// Its memory: guest-physical start and bytes of each range.
    pub memory: Vec<(u64, u64)>,
    /// How far each node is, itself among them: 10 is here (ACPI 6.5, 5.2.17).
    pub distances: Vec<u8>,
    /// Of an access to its memory by the nearest processor, in nanoseconds.
    pub latency_ns: Option<u32>,
    /// Of its memory to the nearest processor, in megabytes (10^6) per second.
    pub bandwidth_mb_s: Option<u32>,
}

/// What the ACPI tables tell a kernel about the board.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Board {
    /// Number of vCPUs; APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u32,
    /// The serial ports that exist.
    pub serial: Vec<SerialPort>,
    /// Memory-mapped configuration space of bus 0.
    pub ecam: Window,
    /// Memory BARs below 4 GiB.
    pub mmio32: Window,
    /// Memory BARs above 4 GiB.
    pub mmio64: Window,
    /// Its NUMA nodes; none: all is equally near.
    pub nodes: Vec<Node>,
}

impl Board {
    /// The usual board with COM1 and COM2.
    pub fn pc(vcpus: u32) -> Self {
        Self {
            vcpus,
            serial: vec![COM1, COM2],
            ecam: ECAM,
            mmio32: MMIO32,
            mmio64: MMIO64,
            nodes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_window_of_large_bars_is_beyond_all_ram() {
        const GIB: u64 = 1 << 30;
        assert_eq!(mmio64(4 * GIB, 39), Some(MMIO64));
        assert_eq!(mmio64(256 * GIB, 39), Some(MMIO64));
        assert_eq!(mmio64(301 * GIB - 1, 39), Some(Window { base: 301 * GIB, len: 211 * GIB }));
        assert_eq!(mmio64(301 * GIB, 46), Some(Window { base: 301 * GIB, len: MMIO64.len }));
        assert_eq!((mmio64(512 * GIB, 39), mmio64(u64::MAX, 64)), (None, None));
    }
}
