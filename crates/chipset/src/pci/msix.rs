//! MSI-X: the table and the pending bits of a function (PCI 3.0, 6.8.2).
//!
//! A value owned by the function. The function routes BAR accesses to [`MsiX::read`] and [`MsiX::write`] first,
//! calls [`MsiX::sync`] after configuration writes, and [`MsiX::notify`] to interrupt.

use super::ConfigSpace;
use device::{Msi, MsiSink};
use serde_json::{Value, json};

mod saved;

pub use saved::MsiXState;

/// Capability id.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// Bytes of a table entry.
const ENTRY_SIZE: u64 = 16;
/// Most vectors that the table size field can say.
const VECTORS_MAX: u16 = 2048;
/// Message control: all vectors masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X in use.
const ENABLE: u16 = 1 << 15;

#[derive(Debug, Clone, Copy)]
struct Vector {
    message: Msi,
    masked: bool,
    pending: bool,
}

const POWER_UP: Vector = Vector { message: Msi { address: 0, data: 0 }, masked: true, pending: false };

/// The MSI-X state of a function.
#[derive(Debug)]
pub struct MsiX {
    vectors: Vec<Vector>,
    bar: u8,
    table: u64,
    pba: u64,
    capability: u16,
    enabled: bool,
    function_masked: bool,
    /// The function may send messages, which are writes to memory (6.8.3.4; the command register's bus master bit).
    bus_master: bool,
    sink: MsiSink,
}

impl MsiX {
    /// Bytes of a table of `vectors` entries.
    pub fn table_size(vectors: u16) -> u64 {
        u64::from(vectors).saturating_mul(ENTRY_SIZE)
    }

    /// Bytes of the pending bit array of `vectors` entries.
    pub fn pba_size(vectors: u16) -> u64 {
        u64::from(vectors).div_ceil(64).saturating_mul(8)
    }

    /// Adds the capability to `config`: `vectors` (1-2048) entries in BAR `bar` with the table at byte `table` and
    /// the pending bits at byte `pba`, both multiples of 8.
    pub fn new(config: &mut ConfigSpace, sink: MsiSink, vectors: u16, bar: u8, table: u32, pba: u32) -> Self {
        let vectors = vectors.clamp(1, VECTORS_MAX);
        let (table, pba) = (table & !7, pba & !7);
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&vectors.wrapping_sub(1).to_le_bytes());
        body.extend_from_slice(&(table | u32::from(bar & 7)).to_le_bytes());
        body.extend_from_slice(&(pba | u32::from(bar & 7)).to_le_bytes());
        let capability = config.add_capability(MSIX_CAPABILITY, &body);
        config.set_writable(capability.wrapping_add(2), &(ENABLE | FUNCTION_MASK).to_le_bytes());
        Self {
            vectors: vec![POWER_UP; usize::from(vectors)],
            bar,
            table: table.into(),
            pba: pba.into(),
            capability,
            enabled: false,
            function_masked: false,
            bus_master: false,
            sink,
        }
    }

    /// Takes over the enable and mask bits from configuration space; sends what became unmasked.
    pub fn sync(&mut self, config: &ConfigSpace) {
        let control = config.read(self.capability.wrapping_add(2), 2) as u16;
        self.enabled = control & ENABLE != 0;
        self.function_masked = control & FUNCTION_MASK != 0;
        self.bus_master = config.bus_master();
        self.send_pending();
    }

    /// Whether the guest uses MSI-X (if not, the function uses INTx).
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// Never: there is at least one vector.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Interrupts with `vector`; a masked one, or one of a function that is no bus master, becomes pending. Does nothing
    /// while MSI-X is disabled or if there is no such vector.
    pub fn notify(&mut self, vector: u16) {
        if !self.enabled {
            return;
        }
        let held = self.function_masked || !self.bus_master;
        let Some(entry) = self.vectors.get_mut(usize::from(vector)) else { return };
        if held || entry.masked {
            entry.pending = true;
        } else {
            self.sink.send(entry.message);
        }
    }

    /// Reads the table or pending bits at `offset` of BAR `bar`; `None` if it is neither.
    pub fn read(&self, bar: u8, offset: u64, size: u8) -> Option<u64> {
        if bar != self.bar {
            return None;
        }
        if let Some(at) = within(offset, self.table, Self::table_size(self.len())) {
            return Some(read_words(at, size, |word| self.table_word(word)));
        }
        let at = within(offset, self.pba, Self::pba_size(self.len()))?;
        Some(read_words(at, size, |word| self.pending_word(word)))
    }

    /// Writes the table at `offset` of BAR `bar` (the pending bits ignore writes); `false` if it is neither.
    pub fn write(&mut self, bar: u8, offset: u64, size: u8, value: u64) -> bool {
        if bar != self.bar {
            return false;
        }
        if let Some(at) = within(offset, self.table, Self::table_size(self.len())) {
            // Software writes whole, aligned double words (6.8.2); anything else has no defined meaning.
            if at & 3 == 0 && (size == 4 || size == 8) {
                self.write_table_word(at >> 2, value as u32);
                if size == 8 {
                    self.write_table_word((at >> 2).wrapping_add(1), (value >> 32) as u32);
                }
                self.send_pending();
            }
            return true;
        }
        within(offset, self.pba, Self::pba_size(self.len())).is_some()
    }

    /// Back to the power-up state.
    pub fn reset(&mut self) {
        self.vectors.fill(POWER_UP);
        self.enabled = false;
        self.function_masked = false;
        self.bus_master = false;
    }

    /// Enable bits and the vectors in use.
    pub fn inspect(&self) -> Value {
        let vectors: Vec<Value> = self
            .vectors
            .iter()
            .enumerate()
            .filter(|(_, v)| v.message.address != 0)
            .map(|(i, v)| {
                json!({ "vector": i, "address": format!("{:#x}", v.message.address),
                    "data": format!("{:#x}", v.message.data), "masked": v.masked, "pending": v.pending })
            })
            .collect();
        json!({ "enabled": self.enabled, "function_masked": self.function_masked, "vectors": vectors })
    }

    fn table_word(&self, word: u64) -> u32 {
        let Some(entry) = usize::try_from(word >> 2).ok().and_then(|i| self.vectors.get(i)) else { return 0 };
        match word & 3 {
            0 => entry.message.address as u32,
            1 => (entry.message.address >> 32) as u32,
            2 => entry.message.data,
            _ => entry.masked.into(),
        }
    }

    fn write_table_word(&mut self, word: u64, value: u32) {
        let Some(entry) = usize::try_from(word >> 2).ok().and_then(|i| self.vectors.get_mut(i)) else {
            return;
        };
        let address = entry.message.address;
        match word & 3 {
            0 => entry.message.address = (address & !0xffff_ffff) | u64::from(value & !3),
            1 => entry.message.address = (address & 0xffff_ffff) | (u64::from(value) << 32),
            2 => entry.message.data = value,
            _ => entry.masked = value & 1 != 0,
        }
    }

    fn pending_word(&self, word: u64) -> u32 {
        let first = usize::try_from(word).unwrap_or(usize::MAX).saturating_mul(32);
        let bits = self.vectors.iter().skip(first).take(32).enumerate();
        bits.fold(0, |bits, (i, vector)| bits | (u32::from(vector.pending) << i))
    }

    fn send_pending(&mut self) {
        if !self.enabled || self.function_masked || !self.bus_master {
            return;
        }
        for entry in self.vectors.iter_mut().filter(|v| v.pending && !v.masked) {
            entry.pending = false;
            self.sink.send(entry.message);
        }
    }
}

fn within(offset: u64, start: u64, len: u64) -> Option<u64> {
    offset.checked_sub(start).filter(|&at| at < len)
}

/// Reads `size` bytes at byte `at` of an array of 32-bit words.
fn read_words(at: u64, size: u8, word: impl Fn(u64) -> u32) -> u64 {
    let first = at >> 2;
    let wide = u64::from(word(first)) | (u64::from(word(first.wrapping_add(1))) << 32);
    let value = wide >> ((at & 3).wrapping_mul(8));
    if size >= 8 { value } else { value & (1u64 << (u32::from(size).wrapping_mul(8))).wrapping_sub(1) }
}
