//! A system description table being written (ACPI 6.5, 5.2.6).

/// Who made the tables.
pub(super) const OEM_ID: [u8; 6] = *b"YADO  ";
const OEM_TABLE_ID: [u8; 8] = *b"YADOPC  ";
const CREATOR_ID: [u8; 4] = *b"YADO";

/// The byte that makes the sum of all bytes zero.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// A table, without its length and checksum until [`Self::finish`].
pub(super) struct Table(Vec<u8>);

impl Table {
    pub(super) fn new(signature: &[u8; 4], revision: u8) -> Self {
        let mut table = Self(Vec::with_capacity(256));
        table.bytes(signature);
        table.u32(0);
        table.bytes(&[revision, 0]);
        table.bytes(&OEM_ID);
        table.bytes(&OEM_TABLE_ID);
        table.u32(1);
        table.bytes(&CREATOR_ID);
        table.u32(1);
        table
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn zeroes(&mut self, count: usize) {
        self.0.resize(self.0.len().saturating_add(count), 0);
    }

    /// A generic address structure (5.2.3.2) of an I/O port; `access` is log2 of its bytes, plus one.
    pub(super) fn io_register(&mut self, port: u32, bits: u8, access: u8) {
        self.bytes(&[1, bits, 0, access]);
        self.u64(port.into());
    }

    /// The generic address structure that says "none".
    pub(super) fn no_register(&mut self) {
        self.zeroes(12);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        for (to, from) in self.0.iter_mut().skip(4).zip(len.to_le_bytes()) {
            *to = from;
        }
        let sum = checksum(&self.0);
        if let Some(byte) = self.0.get_mut(9) {
            *byte = sum;
        }
        self.0
    }
}
