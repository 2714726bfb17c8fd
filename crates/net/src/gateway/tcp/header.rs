//! TCP headers (RFC 9293, 3.1).

use crate::wire::{be16, be32};

/// Bytes of a header without options.
pub const LEN: usize = 20;

pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
}

/// A segment as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    /// Not scaled.
    pub window: u16,
    /// The longest segment that the sender takes, if it says.
    pub mss: Option<u16>,
    /// By how much the sender scales windows, if it does.
    pub scale: Option<u8>,
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Reads the segment that `bytes` are.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::from(bytes.get(12)? >> 4).saturating_mul(4);
        let options = bytes.get(LEN..header)?;
        let mut segment = Self {
            sequence: be32(bytes, 4)?,
            acknowledged: be32(bytes, 8)?,
            flags: *bytes.get(13)?,
            window: be16(bytes, 14)?,
            mss: None,
            scale: None,
            payload: bytes.get(header..)?,
        };
        if segment.flags & flag::SYN != 0 {
            segment.options(options);
        }
        Some(segment)
    }

    /// RFC 9293, 3.2 and RFC 7323, 2.2. What is malformed ends the list.
    fn options(&mut self, mut rest: &[u8]) {
        loop {
            match rest {
                [1, after @ ..] => rest = after,
                [2, 4, high, low, after @ ..] => {
                    self.mss = Some(u16::from_be_bytes([*high, *low]));
                    rest = after;
                }
                [3, 3, scale, after @ ..] => {
                    self.scale = Some((*scale).min(14));
                    rest = after;
                }
                [kind, len, ..] if *kind > 1 && *len >= 2 => match rest.get(usize::from(*len)..) {
                    Some(after) => rest = after,
                    None => return,
                },
                _ => return,
            }
        }
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A header to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    /// As it stands in the header.
    pub window: u16,
    /// Options of a SYN: the longest segment, and by how much windows are scaled.
    pub options: Option<(u16, Option<u8>)>,
}

impl Header {
    /// Bytes of it.
    pub fn len(&self) -> usize {
        match self.options {
            None => LEN,
            Some((_, None)) => 24,
            Some((_, Some(_))) => 28,
        }
    }

    /// Writes it with `checksum` into its first bytes.
    pub fn write(&self, ports: (u16, u16), checksum: u16, into: &mut [u8]) {
        let mut bytes = [0; 28];
        let [from, to] = [ports.0.to_be_bytes(), ports.1.to_be_bytes()];
        let words = [self.sequence.to_be_bytes(), self.acknowledged.to_be_bytes()];
        let offset = (self.len() as u8) << 2;
        let (mss, scale) = self.options.unwrap_or_default();
        let parts: [&[u8]; 9] = [
            &from,
            &to,
            words.as_flattened(),
            &[offset, self.flags],
            &self.window.to_be_bytes(),
            &checksum.to_be_bytes(),
            &[0, 0],
            &[2, 4],
            &mss.to_be_bytes(),
        ];
        let all = parts.iter().flat_map(|part| part.iter().copied());
        let all = all.chain([1, 3, 3, scale.unwrap_or(0)]);
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        into.iter_mut().zip(bytes.iter().take(self.len())).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            sequence: u32, acknowledged: u32, flags in 0u8..64, window: u16,
            options in prop::option::of((any::<u16>(), prop::option::of(0u8..15))),
        ) {
            let flags = if options.is_some() { flags | flag::SYN } else { flags & !flag::SYN };
            let header = Header { sequence, acknowledged, flags, window, options };
            let mut bytes = vec![0; header.len()];
            header.write((1, 2), 3, &mut bytes);
            let expected = Segment {
                sequence, acknowledged, flags, window, payload: &[],
                mss: options.map(|options| options.0), scale: options.and_then(|options| options.1),
            };
            prop_assert_eq!(Segment::parse(&bytes), Some(expected));
        }

        #[test]
        fn no_bytes_harm(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            Segment::parse(&bytes);
        }
    }

    #[test]
    fn options_that_lie_are_left_alone() {
        let mut bytes = vec![0; 28];
        bytes[12] = 0x70;
        bytes[13] = flag::SYN;
        for options in [[2, 4, 5, 0xb4, 3, 3, 200, 0], [8, 0, 2, 4, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 2, 4]] {
            bytes[20..].copy_from_slice(&options);
            let segment = Segment::parse(&bytes).unwrap();
            assert_eq!(segment.mss, (options[0] == 2).then_some(1460));
            assert_eq!(segment.scale, (options[0] == 2).then_some(14));
        }
    }
}
