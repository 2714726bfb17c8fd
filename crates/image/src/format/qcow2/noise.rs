//! Bytes that no deflate makes shorter, recognised far quicker than by trying: keys, media, what is compressed already.
//!
//! Deflate (RFC 1951) saves bits by giving frequent bytes short codes, block by block, and by naming what came before. So
//! where all values are about as frequent, and nothing of four bytes or more comes again, nothing is saved: a code's table
//! and the longer codes cost more than what is left. (Three bytes that come again by chance save a few bits at most.)

/// Bytes whose values are counted together: about what deflaters put into a block.
const CHUNK: usize = 16 << 10;
/// Bits that short codes could save in a chunk at most; a table of codes costs more.
const SAVED_BITS_MAX: f64 = 400.0;
/// Repetitions that do not matter.
const REPEATS_MAX: u32 = 3;
/// log2 of the places that are remembered.
const PLACES_BITS: u32 = 12;

/// Whether deflating is in vain.
pub fn is_noise(bytes: &[u8]) -> bool {
    bytes.chunks(CHUNK).all(is_flat) && !repeats(bytes)
}

/// Whether short codes for frequent values save next to nothing (their entropy is the limit of any code).
fn is_flat(chunk: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    for byte in chunk {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count = count.wrapping_add(1);
        }
    }
    let weight = |count: f64| if count > 0.0 { count * count.log2() } else { 0.0 };
    let len = chunk.len() as f64;
    let same: f64 = counts.iter().map(|count| weight(f64::from(*count))).sum();
    8.0 * len - (weight(len) - same) <= SAVED_BITS_MAX
}

/// Whether four bytes come again more often than by chance.
fn repeats(bytes: &[u8]) -> bool {
    let mut places = [0u32; 1 << PLACES_BITS];
    let mut found = 0u32;
    for (at, four) in bytes.array_windows::<4>().enumerate() {
        let hash = u32::from_le_bytes(*four).wrapping_mul(0x9e37_79b1) >> 32u32.wrapping_sub(PLACES_BITS);
        let Some(place) = places.get_mut(hash as usize) else { continue };
        let before = std::mem::replace(place, at as u32) as usize;
        if before < at && bytes.get(before..before.wrapping_add(4)) == Some(&four[..]) {
            found = found.wrapping_add(1);
            if found > REPEATS_MAX {
                return true;
            }
        }
    }
    false
}

#[cfg(test)]
mod test {
    use super::super::codec::Deflater;
    use super::super::header::Compression;
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut random = seed | 1;
        let mut draw = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
        };
        (0..len).map(|_| draw()).collect()
    }

    #[test]
    fn noise_is_known_from_text() {
        assert!(is_noise(&noise(65536, 5)));
        let text: Vec<u8> = (0u32..6000).flat_map(|line| format!("line {line}\n").into_bytes()).collect();
        assert!(!is_noise(&text));
        // All values as often as each other, but the same again.
        let again: Vec<u8> = (0..65536u32).map(|at| at as u8).collect();
        assert!(!is_noise(&again));
        // Base64: six bits in eight.
        let letters: Vec<u8> = noise(65536, 9).into_iter().map(|byte| b'0' + byte % 64).collect();
        assert!(!is_noise(&letters));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever is put between: what is taken for noise, deflate cannot make shorter.
        #[test]
        fn what_is_taken_for_noise_does_not_shrink(
            seed: u64,
            islands in prop::collection::vec((0usize..65536, 1usize..600, 0u8..4), 0..6),
        ) {
            let mut bytes = noise(65536, seed);
            for (at, len, kind) in islands {
                let from = (at.wrapping_mul(7919)) % 60000;
                let copy: Vec<u8> = bytes[from..from + len].to_vec();
                let end = (at + len).min(bytes.len());
                for (place, byte) in (at..end).enumerate() {
                    bytes[byte] = match kind {
                        0 => 0,
                        1 => copy[place],
                        2 => bytes[byte] & 0x7f,
                        _ => b'a' + (place % 20) as u8,
                    };
                }
            }
            if is_noise(&bytes) {
                prop_assert_eq!(Deflater::new(Compression::Zlib).unwrap().deflate_all(&bytes), None);
            }
        }
    }
}
