//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum that is being made. Every piece but the last has an even number of bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[must_use]
    pub fn add(self, bytes: &[u8]) -> Self {
        // The sum does not depend on the order of bytes in words as long as the result is swapped back (RFC 1071, 2),
        // and words of 32 bits fold to those of 16. No input is long enough to overflow 64 bits.
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum = self.0;
        for word in words {
            sum = sum.wrapping_add(u64::from(u32::from_ne_bytes(*word)));
        }
        let mut last = [0; 4];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        Self(sum.wrapping_add(u64::from(u32::from_ne_bytes(last))))
    }

    /// Adds a big-endian word.
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        self.add(&word.to_be_bytes())
    }

    /// Adds the pseudo header (RFC 9293, 3.1; RFC 8200, 8.1). Addresses of different kinds make nonsense.
    #[must_use]
    pub fn pseudo(self, from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Self {
        let address = |sum: Self, address| match address {
            IpAddr::V4(v4) => sum.add(&v4.octets()),
            IpAddr::V6(v6) => sum.add(&v6.octets()),
        };
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        address(address(self, from), to).word(protocol.into()).add(&len.to_be_bytes())
    }

    /// The sum itself: what stands in a checksum field that somebody else completes.
    pub fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum >> 16).wrapping_add(sum & 0xffff);
        }
        (sum as u16).to_be()
    }

    /// The checksum: the sum's complement.
    pub fn checksum(self) -> u16 {
        !self.folded()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, 4.1, word by word.
    fn slowly(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| low.into());
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn the_examples_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().add(&bytes).folded(), 0xddf2);
    }

    proptest! {
        #[test]
        fn as_word_by_word(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..100) {
            let cut = (cut * 2).min(bytes.len() & !1);
            let sum = Sum::default().add(&bytes[..cut]).add(&bytes[cut..]);
            // 0 and ffff are the same number in ones' complement.
            let same = |a: u16, b: u16| a == b || (a ^ b == 0xffff && (a == 0 || b == 0));
            prop_assert!(same(sum.checksum(), slowly(&bytes)));
        }
    }
}
