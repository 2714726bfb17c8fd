//! On-disk records, written field by field with the offsets of the specification.

/// A little-endian record under construction.
#[derive(Default)]
pub(crate) struct Record {
    bytes: Vec<u8>,
}

impl Record {
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes on at `offset`; what was skipped is zero.
    pub fn at(&mut self, offset: usize) -> &mut Self {
        debug_assert!(self.bytes.len() <= offset, "fields overlap at offset {offset}");
        self.bytes.resize(offset, 0);
        self
    }

    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(value);
        self
    }

    pub fn take(&mut self, length: usize) -> Vec<u8> {
        self.at(length);
        std::mem::take(&mut self.bytes)
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// Overwrites the field at `offset` of a finished record.
pub(crate) fn put(record: &mut [u8], offset: usize, value: &[u8]) {
    match record.get_mut(offset..offset.saturating_add(value.len())) {
        Some(field) => field.copy_from_slice(value),
        None => debug_assert!(false, "field at {offset} is outside of the record"),
    }
}

/// The low 16 bits, for fields that are split on disk.
pub(crate) const fn low16(value: u32) -> u16 {
    (value & 0xffff) as u16
}

/// The high 16 bits, for fields that are split on disk.
pub(crate) const fn high16(value: u32) -> u16 {
    (value >> 16) as u16
}

/// The low 32 bits, for fields that are split on disk.
pub(crate) const fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// The high 32 bits, for fields that are split on disk.
pub(crate) const fn high32(value: u64) -> u32 {
    (value >> 32) as u32
}
