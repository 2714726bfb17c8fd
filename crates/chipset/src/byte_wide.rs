//! Wide accesses to devices whose registers are bytes: the bus splits them, lowest address first.

use device::Access;

/// Reads a register window byte by byte.
pub(crate) fn read(access: Access, mut byte: impl FnMut(u64) -> u8) -> u64 {
    (0..u64::from(access.size.min(8)))
        .fold(0, |value, i| value | u64::from(byte(access.offset.wrapping_add(i))) << i.wrapping_mul(8))
}

/// Writes a register window byte by byte.
pub(crate) fn write(access: Access, value: u64, mut byte: impl FnMut(u64, u8)) {
    for (i, value) in (0..u64::from(access.size)).zip(value.to_le_bytes()) {
        byte(access.offset.wrapping_add(i), value);
    }
}
