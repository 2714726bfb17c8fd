//! What sender and receiver of a frame leave to each other: checksums to complete, large segments to cut.
//!
//! The encoding is `struct virtio_net_hdr` (Virtual I/O Device 1.2, 5.1.6), which taps speak too. What a guest writes
//! there is its word only: [`Offload::checked`] believes nothing that the frame itself does not say.

use crate::wire::layers::{self, Layers};
use crate::wire::protocol;

/// Bytes of the encoding without the number of buffers.
pub const HEADER_LEN: usize = 10;

/// The most segments of a frame: 64 KiB in pieces of 64 bytes. A frame must not cost its receivers more than this.
const SEGMENTS_MAX: usize = 1024;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What is known of a frame's checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// It is in the frame, and nobody has looked.
    #[default]
    Unknown,
    /// It is right.
    Valid,
    /// The sum from `start` on is missing at `start + offset`, where that of the pseudo header stands.
    Partial {
        /// Byte of the frame.
        start: u16,
        /// Bytes from there.
        offset: u16,
    },
}

/// How a large frame is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// Datagrams of UDP over IPv4.
    Udp4,
    /// Datagrams of UDP over IPv6.
    Udp6,
}

/// A frame that stands for many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// Of what.
    pub kind: SegmentKind,
    /// Payload bytes of each but the last.
    pub size: u16,
    /// TCP's CWR flag is for the first only.
    pub ecn: bool,
    /// Bytes of all headers.
    pub headers: u16,
}

/// All of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// The checksum.
    pub checksum: Checksum,
    /// The segments.
    pub segments: Option<Segments>,
}

/// Why an offload header is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lie {
    /// A checksum outside the frame.
    #[error("the checksum to complete is outside the frame")]
    Checksum,
    /// A kind that nobody offered.
    #[error("a kind of segment that does not exist")]
    Kind,
    /// The frame carries something else.
    #[error("the frame is not what its segments are said to be")]
    Mismatch,
    /// Segments without payload, or too many of them.
    #[error("segments of no size, or more than {SEGMENTS_MAX}")]
    Size,
}

impl Offload {
    /// Reads the encoding and checks it against the frame that it is about.
    pub fn checked(header: [u8; HEADER_LEN], frame: &[u8]) -> Result<Self, Lie> {
        Self::checked_start(header, frame, frame.len())
    }

    /// The same for a frame of `len` bytes of which only the first are at hand: what they do not show is not believed.
    pub fn checked_start(header: [u8; HEADER_LEN], frame: &[u8], len: usize) -> Result<Self, Lie> {
        let [flags, gso, _, _, size_low, size_high, start_low, start_high, offset_low, offset_high] = header;
        let start = u16::from_le_bytes([start_low, start_high]);
        let offset = u16::from_le_bytes([offset_low, offset_high]);
        let checksum = if flags & NEEDS_CSUM != 0 {
            let field = usize::from(start).saturating_add(offset.into());
            if field.saturating_add(2) > len || start < 14 {
                return Err(Lie::Checksum);
            }
            Checksum::Partial { start, offset }
        } else if flags & DATA_VALID != 0 {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        let size = u16::from_le_bytes([size_low, size_high]);
        let kind = match gso & !GSO_ECN {
            GSO_NONE => return Ok(Self { checksum, segments: None }),
            GSO_TCPV4 => SegmentKind::Tcp4,
            GSO_TCPV6 => SegmentKind::Tcp6,
            // The encoding is one; the frame says which.
            GSO_UDP_L4 => SegmentKind::Udp4,
            _ => return Err(Lie::Kind),
        };
        let layers = layers::parse_start(frame, len, false).ok_or(Lie::Mismatch)?;
        let udp6 = kind == SegmentKind::Udp4 && layers.source.is_ipv6();
        let kind = if udp6 { SegmentKind::Udp6 } else { kind };
        let headers = kind.headers(&layers, frame).ok_or(Lie::Mismatch)?;
        let payload = layers.end.saturating_sub(headers.into());
        if size == 0 || payload > usize::from(size).saturating_mul(SEGMENTS_MAX) {
            return Err(Lie::Size);
        }
        // 5.1.6.2.1: segments come with a checksum to complete, and only the transport's can be meant.
        let field = layers.checksum_offset().and_then(|offset| u16::try_from(offset).ok());
        let transport = u16::try_from(layers.transport).map_err(|_| Lie::Mismatch)?;
        if !matches!(checksum, Checksum::Partial { start, offset } if start == transport && Some(offset) == field)
        {
            return Err(Lie::Checksum);
        }
        let segments = Segments { kind, size, ecn: gso & GSO_ECN != 0, headers };
        // One segment is none.
        let segments = (payload > usize::from(size)).then_some(segments);
        Ok(Self { checksum, segments })
    }

    /// What a frame of `len` bytes is cut into.
    pub fn pieces(&self, len: usize) -> usize {
        let piece = |segments: Segments| {
            len.saturating_sub(segments.headers.into()).div_ceil(usize::from(segments.size).max(1)).max(1)
        };
        self.segments.map_or(1, piece)
    }

    /// For the same frame with so many bytes more (or fewer) in front of its network header.
    #[must_use]
    pub fn moved(self, bytes: i16) -> Self {
        let checksum = match self.checksum {
            Checksum::Partial { start, offset } => {
                Checksum::Partial { start: start.saturating_add_signed(bytes), offset }
            }
            other => other,
        };
        let moved = |segments: Segments| Segments {
            headers: segments.headers.saturating_add_signed(bytes),
            ..segments
        };
        Self { checksum, segments: self.segments.map(moved) }
    }

    /// The encoding.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (flags, start, offset) = match self.checksum {
            Checksum::Unknown => (0, 0, 0),
            Checksum::Valid => (DATA_VALID, 0, 0),
            Checksum::Partial { start, offset } => (NEEDS_CSUM, start, offset),
        };
        let (gso, size, headers) = match self.segments {
            None => (GSO_NONE, 0, 0),
            Some(Segments { kind, size, ecn, headers }) => {
                let kind = match kind {
                    SegmentKind::Tcp4 => GSO_TCPV4,
                    SegmentKind::Tcp6 => GSO_TCPV6,
                    SegmentKind::Udp4 | SegmentKind::Udp6 => GSO_UDP_L4,
                };
                (if ecn { kind | GSO_ECN } else { kind }, size, headers)
            }
        };
        let [headers_low, headers_high] = headers.to_le_bytes();
        let [size_low, size_high] = size.to_le_bytes();
        let [start_low, start_high] = start.to_le_bytes();
        let [offset_low, offset_high] = offset.to_le_bytes();
        [
            flags,
            gso,
            headers_low,
            headers_high,
            size_low,
            size_high,
            start_low,
            start_high,
            offset_low,
            offset_high,
        ]
    }
}

impl SegmentKind {
    /// Bytes of all headers of a frame of this kind.
    fn headers(self, layers: &Layers, frame: &[u8]) -> Option<u16> {
        let fits = match self {
            Self::Tcp4 => layers.source.is_ipv4() && layers.protocol == protocol::TCP,
            Self::Tcp6 => layers.source.is_ipv6() && layers.protocol == protocol::TCP,
            Self::Udp4 | Self::Udp6 => layers.protocol == protocol::UDP,
        };
        if !fits || layers.fragment {
            return None;
        }
        u16::try_from(layers.transport.checked_add(layers.transport_header(frame)?)?).ok()
    }
}
