//! Numbers in images: read and written at a place in a slice of bytes. What lies outside reads as zero and is not
//! written, so that hostile lengths cannot do harm; callers check what must be there.

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(from) = at.checked_add(N).and_then(|end| bytes.get(at..end)) {
        out.copy_from_slice(from);
    }
    out
}

/// Writes `what` at `at`, if it fits.
pub(crate) fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(to) = at.checked_add(what.len()).and_then(|end| bytes.get_mut(at..end)) {
        to.copy_from_slice(what);
    }
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// A length as the host's memory counts; longer than any memory if it does not fit.
pub(crate) fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// All big-endian 64-bit numbers of a table.
pub(crate) fn words_be(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|word| be64(word, 0))
}

/// A table of big-endian 64-bit numbers.
pub(crate) fn bytes_be(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_be_bytes).collect()
}
