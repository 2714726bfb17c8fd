//! Frames on a byte stream. Shared by the host and the agent (`no_std` with `alloc`).
//!
//! A frame is `kind: u8, session: u32, payload, crc32c: u32` (little-endian; the CRC covers all before it), stuffed with
//! COBS (Cheshire and Baker, "Consistent Overhead Byte Stuffing", 1999) so that it holds no zero byte, and ended by one zero
//! byte. So a receiver that joins late, or meets bytes of somebody else (boot messages on a serial port), is in step again
//! at the next zero, however long the frame was that it thought to be reading. Bytes that make no frame are *noise*: they are
//! counted, and the owner of the decoder decides what they mean.

use alloc::vec::Vec;

/// The most bytes that one frame of output or input data carries.
pub const DATA_MAX: usize = 16 * 1024;
/// The most payload bytes of a frame to the agent (an `Exec` with its arguments and environment).
pub const REQUEST_MAX: usize = 256 * 1024;

const FRAME_OVERHEAD: usize = 1 + 4 + 4;
const BLOCK_MAX: usize = 254;

/// One frame, its checksum verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the frame says (see [`crate::message`]).
    pub kind: u8,
    /// The session it is about, 0 for the link itself.
    pub session: u32,
    /// What follows depends on `kind`.
    pub payload: Vec<u8>,
}

const CRC_TABLE: [u32; 256] = crc_table();

#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)] // Evaluated by the compiler only.
const fn crc_table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(value & 1));
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

/// CRC-32C (Castagnoli, reflected), as iSCSI and ext4 use it (RFC 3720, appendix B.4).
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        let [low, ..] = crc.to_le_bytes();
        crc = (crc >> 8) ^ CRC_TABLE.get(usize::from(low ^ byte)).copied().unwrap_or(0);
    }
    !crc
}

/// Bytes on their way out: frames are appended at the end, the transport takes from the front.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    start: usize,
    scratch: Vec<u8>,
}

impl Outbox {
    /// What waits to be sent.
    pub fn pending(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or(&[])
    }

    /// How many bytes wait to be sent.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The transport took `count` bytes.
    pub fn advance(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.bytes.len());
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start >= 64 * 1024 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// Forgets what waits. What was sent may end in the middle of a frame: send a delimiter next.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    /// A zero byte of its own: whatever the other side thought to be reading ends here.
    pub fn delimiter(&mut self) {
        self.bytes.push(0);
    }

    /// Appends one frame.
    pub fn frame(&mut self, kind: u8, session: u32, payload: &[u8]) {
        self.scratch.clear();
        self.scratch.push(kind);
        self.scratch.extend_from_slice(&session.to_le_bytes());
        self.scratch.extend_from_slice(payload);
        let crc = crc32c(&self.scratch);
        self.scratch.extend_from_slice(&crc.to_le_bytes());
        stuff(&self.scratch, &mut self.bytes);
        self.bytes.push(0);
    }
}

/// COBS: each block is its length plus one, then up to 254 non-zero bytes; a block shorter than that stands for a zero after it.
fn stuff(raw: &[u8], out: &mut Vec<u8>) {
    out.reserve(raw.len().saturating_add(raw.len() / BLOCK_MAX).saturating_add(2));
    let mut rest = raw;
    loop {
        let window = rest.get(..BLOCK_MAX).unwrap_or(rest);
        let run = window.iter().position(|&byte| byte == 0).unwrap_or(window.len());
        let (block, after) = rest.split_at_checked(run).unwrap_or((rest, &[]));
        out.push(u8::try_from(run.saturating_add(1)).unwrap_or(u8::MAX));
        out.extend_from_slice(block);
        match after.split_first() {
            None => return,
            // A full block stands for no zero: the next byte, zero or not, begins the next block.
            Some(_) if run == BLOCK_MAX => rest = after,
            Some((_, after_zero)) => rest = after_zero,
        }
    }
}

/// Finds frames in a stream of bytes; holds at most one frame.
#[derive(Debug)]
pub struct Decoder {
    raw: Vec<u8>,
    raw_max: usize,
    block_left: usize,
    zero_due: bool,
    broken: bool,
    touched: bool,
    noise: bool,
}

impl Decoder {
    /// A decoder that takes frames with payloads of up to `payload_max` bytes.
    pub fn new(payload_max: usize) -> Self {
        Self {
            raw: Vec::new(),
            raw_max: payload_max.saturating_add(FRAME_OVERHEAD),
            block_left: 0,
            zero_due: false,
            broken: false,
            touched: false,
            noise: false,
        }
    }

    /// Whether bytes that made no frame have passed since the last call.
    pub fn take_noise(&mut self) -> bool {
        core::mem::take(&mut self.noise)
    }

    /// Bytes held at the moment.
    pub fn held(&self) -> usize {
        self.raw.len()
    }

    /// Forgets a frame begun and any noise: the stream starts anew.
    pub fn reset(&mut self) {
        self.restart();
        self.noise = false;
    }

    fn restart(&mut self) {
        self.raw.clear();
        self.block_left = 0;
        self.zero_due = false;
        self.broken = false;
        self.touched = false;
    }

    /// Takes bytes off the front of `input` until a frame is complete or nothing is left.
    pub fn feed(&mut self, input: &mut &[u8]) -> Option<Frame> {
        while let Some((&first, rest)) = input.split_first() {
            if first == 0 {
                *input = rest;
                if let Some(frame) = self.end() {
                    return Some(frame);
                }
            } else if self.block_left == 0 {
                *input = rest;
                self.touched = true;
                if self.zero_due {
                    self.store(&[0]);
                }
                self.block_left = usize::from(first).saturating_sub(1);
                self.zero_due = self.block_left < BLOCK_MAX;
            } else {
                let window = input.get(..self.block_left).unwrap_or(input);
                let run = window.iter().position(|&byte| byte == 0).unwrap_or(window.len());
                let (bytes, after) = input.split_at_checked(run).unwrap_or((input, &[]));
                self.store(bytes);
                self.block_left = self.block_left.saturating_sub(run);
                *input = after;
            }
        }
        None
    }

    fn store(&mut self, bytes: &[u8]) {
        if self.broken || self.raw.len().saturating_add(bytes.len()) > self.raw_max {
            self.broken = true;
            self.raw.clear();
        } else {
            self.raw.extend_from_slice(bytes);
        }
    }

    /// At a delimiter: what was gathered is a frame, nothing at all, or noise.
    fn end(&mut self) -> Option<Frame> {
        let whole = !self.broken && self.block_left == 0;
        let frame = if whole { parse(&self.raw) } else { None };
        if frame.is_none() && self.touched {
            self.noise = true;
        }
        self.restart();
        frame
    }
}

fn parse(raw: &[u8]) -> Option<Frame> {
    let (covered, crc) = raw.split_last_chunk::<4>()?;
    if crc32c(covered) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (&kind, rest) = covered.split_first()?;
    let (session, payload) = rest.split_first_chunk::<4>()?;
    Some(Frame { kind, session: u32::from_le_bytes(*session), payload: payload.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_checksum_is_the_published_one() {
        // RFC 3720, appendix B.4: 32 bytes of zeros, and of ones; the check value of "123456789".
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn stuffing_matches_the_papers_examples() {
        let stuffed = |raw: &[u8]| {
            let mut out = Vec::new();
            stuff(raw, &mut out);
            out
        };
        assert_eq!(stuffed(&[]), [1]);
        assert_eq!(stuffed(&[0]), [1, 1]);
        assert_eq!(stuffed(&[0x11, 0x22, 0, 0x33]), [3, 0x11, 0x22, 2, 0x33]);
        assert_eq!(stuffed(&[0x11, 0, 0, 0]), [2, 0x11, 1, 1, 1]);
        let long: Vec<u8> = (1..=254).collect();
        assert_eq!(stuffed(&long)[0], 255);
        assert_eq!(stuffed(&long).len(), 255);
        let longer: Vec<u8> = (0..=255).collect();
        assert_eq!(&stuffed(&longer)[..3], &[1, 255, 1]);
        assert_eq!(&stuffed(&longer)[256..], &[2, 255]);
    }

    fn decode_all(decoder: &mut Decoder, stream: &[u8], chunk: usize) -> Vec<Frame> {
        let mut frames = Vec::new();
        for mut piece in stream.chunks(chunk.max(1)) {
            while let Some(frame) = decoder.feed(&mut piece) {
                frames.push(frame);
            }
        }
        frames
    }

    proptest! {
        #[test]
        fn frames_survive_any_chunking(
            frames in proptest::collection::vec(
                (any::<u8>(), any::<u32>(), proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..700)), 1..8),
            chunk in 1usize..900,
        ) {
            let mut out = Outbox::default();
            for (kind, session, payload) in &frames {
                out.frame(*kind, *session, payload);
            }
            let mut decoder = Decoder::new(DATA_MAX);
            let got = decode_all(&mut decoder, out.pending(), chunk);
            prop_assert!(!decoder.take_noise());
            prop_assert_eq!(got.len(), frames.len());
            for (frame, (kind, session, payload)) in got.iter().zip(&frames) {
                prop_assert_eq!((&frame.kind, &frame.session, &frame.payload), (kind, session, payload));
            }
        }

        #[test]
        fn after_noise_a_delimiter_brings_back_the_next_frame(
            noise in proptest::collection::vec(any::<u8>(), 1..600), chunk in 1usize..50,
        ) {
            let mut out = Outbox::default();
            out.delimiter();
            out.frame(7, 9, b"in step");
            let stream: Vec<u8> = noise.iter().copied().chain(out.pending().iter().copied()).collect();
            let mut decoder = Decoder::new(DATA_MAX);
            let got = decode_all(&mut decoder, &stream, chunk);
            prop_assert_eq!(got.last().map(|frame| frame.payload.clone()), Some(b"in step".to_vec()));
        }

        #[test]
        fn a_cut_frame_is_noise_and_never_a_frame(cut in 1usize..40) {
            let mut out = Outbox::default();
            out.frame(1, 2, &[3; 40]);
            let whole = out.pending().len();
            let mut stream = out.pending()[..whole - 1 - cut].to_vec();
            stream.push(0);
            let mut decoder = Decoder::new(DATA_MAX);
            prop_assert_eq!(decode_all(&mut decoder, &stream, 7), Vec::new());
            prop_assert!(decoder.take_noise());
        }
    }

    #[test]
    fn an_endless_frame_is_not_kept() {
        let mut decoder = Decoder::new(100);
        for _ in 0..1000 {
            assert_eq!(decoder.feed(&mut &[0xff; 500][..]), None);
            assert!(decoder.held() <= 100 + FRAME_OVERHEAD);
        }
    }
}
