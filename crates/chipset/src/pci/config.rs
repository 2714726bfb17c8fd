//! A type 0 configuration space: bytes, and which bits of them the guest may write.
//!
//! BAR sizing needs no code of its own: the address bits below a BAR's size are read-only zeroes, so all ones
//! written read back as the size mask (PCI 3.0, 6.2.5.1).

use device::Line;
use serde_json::{Value, json};

mod saved;

pub use saved::ConfigSpaceState;

/// Bytes of configuration space of a function, with the extended part (PCI Express 5.0, 7.2.2).
const SIZE: usize = 4096;
/// End of the part that holds capabilities.
const CAPABILITIES_END: u16 = 0x100;
/// First byte after the header.
const CAPABILITIES_START: u16 = 0x40;

const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const BAR0: u16 = 0x10;
const CAPABILITY_POINTER: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

/// Status: INTx is asserted.
const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: the capability list exists.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Bits of the command register (PCI 3.0, 6.2.2).
pub mod command {
    /// I/O BARs are decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs are decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may read and write memory.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// INTx is kept silent.
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// Bits 0-2 and 10, and parity and SERR enables, which do nothing here.
const COMMAND_WRITABLE: u16 = 0x0547;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class code.
    pub class: u8,
    /// Subclass code.
    pub subclass: u8,
    /// Programming interface.
    pub prog_if: u8,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// What a BAR maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BAR registers.
    Memory64 {
        /// Prefetchable.
        prefetchable: bool,
    },
}

/// A BAR: its kind and its size in bytes, a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Kind.
    pub kind: BarKind,
    /// Bytes.
    pub size: u64,
}

/// A function's configuration space.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8]>,
    writable: Box<[u8]>,
    power_up: Box<[u8]>,
    bars: [Option<Bar>; 6],
    /// Where the next capability goes.
    free: u16,
    /// The "next" pointer of the last capability.
    link: u16,
    line: Line,
    asserted: bool,
}

impl ConfigSpace {
    /// A header with no BARs, capabilities or interrupt pin.
    pub fn new(identity: Identity) -> Self {
        let zeroes = || vec![0u8; SIZE].into_boxed_slice();
        let mut config = Self {
            bytes: zeroes(),
            writable: zeroes(),
            power_up: zeroes(),
            bars: [None; 6],
            free: CAPABILITIES_START,
            link: CAPABILITY_POINTER,
            line: Line::unconnected(),
            asserted: false,
        };
        config.preset(0x00, &identity.vendor.to_le_bytes());
        config.preset(0x02, &identity.device.to_le_bytes());
        config.preset(0x08, &[identity.revision, identity.prog_if, identity.subclass, identity.class]);
        config.preset(0x2c, &identity.subsystem_vendor.to_le_bytes());
        config.preset(0x2e, &identity.subsystem.to_le_bytes());
        config.set_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.set_writable(0x0c, &[0xff]); // cache line size: a scratch byte for software
        config.set_writable(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Adds BAR `index` (0-5; a 64-bit one takes `index + 1` too). `size` is rounded up to a power of two, at
    /// least 16 bytes for memory and 4 for ports. A BAR that does not fit is not added.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) {
        let Some(offset) = Self::bar_offset(index) else { return };
        let (least, flags, wide) = match kind {
            BarKind::Io => (4, 0b01, false),
            BarKind::Memory32 => (16, 0b0000, false),
            BarKind::Memory64 { prefetchable } => (16, 0b0100 | (u8::from(prefetchable) << 3), true),
        };
        if wide && index >= 5 {
            return;
        }
        let Some(size) = size.max(least).checked_next_power_of_two() else { return };
        let mask = !size.wrapping_sub(1);
        self.preset(offset, &[flags]);
        let mask = mask.to_le_bytes();
        self.set_writable(offset, if wide { &mask } else { mask.get(..4).unwrap_or_default() });
        if let Some(bar) = self.bars.get_mut(usize::from(index)) {
            *bar = Some(Bar { kind, size });
        }
    }

    /// Adds a capability: `body` is what follows its id and next pointer. Answers its offset in configuration
    /// space, or 0 if there is no room. Read-only until [`Self::set_writable`].
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let offset = self.free;
        let len = u16::try_from(body.len()).unwrap_or(u16::MAX).saturating_add(2);
        let end = offset.saturating_add(len);
        let Ok(offset_byte) = u8::try_from(offset) else { return 0 };
        if end > CAPABILITIES_END {
            return 0;
        }
        self.preset(offset, &[id, 0]);
        self.preset(offset.wrapping_add(2), body);
        self.preset(self.link, &[offset_byte]);
        self.preset(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = offset.wrapping_add(1);
        self.free = end.next_multiple_of(4);
        offset
    }

    /// Adds a PCI Express capability of a root complex integrated endpoint (PCI Express 5.0, 7.5.3).
    pub fn add_express(&mut self) -> u16 {
        let mut body = [0u8; 58];
        // Capability version 2, device/port type 1001b.
        let flags = 0x0092u16.to_le_bytes();
        for (to, from) in body.iter_mut().zip(flags) {
            *to = from;
        }
        self.add_capability(super::EXPRESS_CAPABILITY, &body)
    }

    /// Says that the function has interrupt pin A-D (0-3), wired to `line`.
    pub fn connect_interrupt(&mut self, pin: u8, gsi: u8, line: Line) {
        self.preset(INTERRUPT_PIN, &[(pin & 3).wrapping_add(1)]);
        self.preset(INTERRUPT_LINE, &[gsi]);
        self.line = line;
    }

    /// Lets the guest write the bits set in `mask` from `offset` on.
    pub fn set_writable(&mut self, offset: u16, mask: &[u8]) {
        copy_at(&mut self.writable, offset, mask);
    }

    /// Sets bytes and their value after reset.
    pub fn preset(&mut self, offset: u16, value: &[u8]) {
        copy_at(&mut self.bytes, offset, value);
        copy_at(&mut self.power_up, offset, value);
    }

    /// Sets bytes until the next reset, as the hardware side of a register does.
    pub fn update(&mut self, offset: u16, value: &[u8]) {
        copy_at(&mut self.bytes, offset, value);
    }

    /// Reads 1, 2 or 4 bytes.
    pub fn read(&self, offset: u16, size: u8) -> u32 {
        let mut value = 0;
        for i in (0..size.min(4)).rev() {
            value = (value << 8) | u32::from(self.byte(offset.wrapping_add(u16::from(i))));
        }
        value
    }

    /// The guest writes 1, 2 or 4 bytes.
    pub fn write(&mut self, offset: u16, size: u8, value: u32) {
        for (i, new) in (0u16..u16::from(size.min(4))).zip(value.to_le_bytes()) {
            let at = usize::from(offset.wrapping_add(i));
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
        self.drive_line();
    }

    /// BAR `index` as added.
    pub fn bar(&self, index: u8) -> Option<Bar> {
        self.bars.get(usize::from(index)).copied().flatten()
    }

    /// The address in BAR `index`, decoded or not.
    pub fn bar_base(&self, index: u8) -> Option<u64> {
        let bar = self.bar(index)?;
        let offset = Self::bar_offset(index)?;
        let low = u64::from(self.read(offset, 4));
        Some(match bar.kind {
            BarKind::Io => low & 0xfffc,
            BarKind::Memory32 => low & !0xf,
            BarKind::Memory64 { .. } => {
                (low & !0xf) | (u64::from(self.read(offset.wrapping_add(4), 4)) << 32)
            }
        })
    }

    /// The address at which BAR `index` answers now: its space is enabled in the command register and the range is
    /// not at 0 and does not wrap.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let bar = self.bar(index)?;
        let enable = if bar.kind == BarKind::Io { command::IO } else { command::MEMORY };
        let base = self.bar_base(index)?;
        (self.command() & enable != 0 && base != 0 && base.checked_add(bar.size).is_some()).then_some(base)
    }

    /// Puts an address into BAR `index`, as firmware does.
    pub fn set_bar_base(&mut self, index: u8, base: u64) {
        let (Some(bar), Some(offset)) = (self.bar(index), Self::bar_offset(index)) else { return };
        #[allow(clippy::cast_possible_truncation)]
        self.write(offset, 4, base as u32);
        if matches!(bar.kind, BarKind::Memory64 { .. }) {
            self.write(offset.wrapping_add(4), 4, (base >> 32) as u32);
        }
    }

    /// The command register (see [`command`]).
    pub fn command(&self) -> u16 {
        self.read(COMMAND, 2) as u16
    }

    /// Whether the function may access memory.
    pub fn bus_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0
    }

    /// Asserts or releases the INTx pin; the command register decides whether the wire follows.
    pub fn set_interrupt(&mut self, asserted: bool) {
        if self.asserted != asserted {
            self.asserted = asserted;
            self.drive_line();
        }
    }

    fn drive_line(&mut self) {
        let mut status = self.read(STATUS, 2) as u16 & !STATUS_INTERRUPT;
        if self.asserted {
            status |= STATUS_INTERRUPT;
        }
        self.update(STATUS, &status.to_le_bytes());
        if self.read(INTERRUPT_PIN, 1) != 0 {
            self.line.set(self.asserted && self.command() & command::INTERRUPT_DISABLE == 0);
        }
    }

    /// Back to the state in which the function was built, INTx released.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.power_up);
        self.asserted = false;
        self.drive_line();
    }

    /// Identity, command register and BARs.
    pub fn inspect(&self) -> Value {
        let bars: Vec<Value> = (0..6u8)
            .filter_map(|i| {
                let bar = self.bar(i)?;
                Some(json!({ "bar": i, "kind": format!("{:?}", bar.kind), "size": bar.size,
                    "address": self.bar_address(i).map(|a| format!("{a:#x}")) }))
            })
            .collect();
        json!({
            "vendor": format!("{:#06x}", self.read(0, 2)),
            "device": format!("{:#06x}", self.read(2, 2)),
            "class": format!("{:#08x}", self.read(8, 4) >> 8),
            "command": format!("{:#06x}", self.command()),
            "interrupt_asserted": self.asserted,
            "bars": bars,
        })
    }

    fn byte(&self, offset: u16) -> u8 {
        self.bytes.get(usize::from(offset)).copied().unwrap_or(0xff)
    }

    fn bar_offset(index: u8) -> Option<u16> {
        (index < 6).then(|| BAR0.wrapping_add(u16::from(index).wrapping_mul(4)))
    }
}

fn copy_at(bytes: &mut [u8], offset: u16, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(usize::from(offset)).zip(value) {
        *to = *from;
    }
}
