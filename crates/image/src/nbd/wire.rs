//! Numbers of the protocol, and its messages as bytes.
//!
//! Source: the NBD protocol, doc/proto.md of the reference implementation; names are those of that document without
//! their `NBD_`. Everything is big-endian.

use crate::endian::{be16, be32, be64};
use std::io;

/// What a server says first: `NBDMAGIC`.
pub const INIT: u64 = 0x4e42_444d_4147_4943;
/// Before every option, and the server's second word: `IHAVEOPT`.
pub const OPTION: u64 = 0x4948_4156_454f_5054;
/// Before every reply to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Before every request.
pub const REQUEST: u32 = 0x2560_9513;
/// Before every request with an extended header.
pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// Before every simple reply.
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Before every chunk of a structured reply.
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// Before every chunk with an extended header.
pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// The port that IANA has assigned.
pub const PORT: u16 = 10809;
/// Longest string (names, queries, messages), in bytes.
pub const STRING_MAX: usize = 4096;
/// Longest explanation that a server of ours sends, in bytes.
pub const MESSAGE_MAX: usize = 256;
/// Longest read or write, in bytes: what clients may take for granted.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Handshake flags, of both sides.
pub mod handshake {
    /// Options can be refused.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The export's size is not followed by 124 zeroes.
    pub const NO_ZEROES: u16 = 2;
}

/// Options.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// What is told of an export.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Requests.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;

    pub const FLAG_FUA: u16 = 1;
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    pub const FLAG_DF: u16 = 1 << 2;
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
    pub const FLAG_FAST_ZERO: u16 = 1 << 4;
    pub const FLAG_PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of structured replies.
pub mod chunk {
    pub const FLAG_DONE: u16 = 1;

    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT | 1;
}

/// Error values.
pub mod error {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// Flags of the context `base:allocation`.
pub mod allocation {
    pub const NAME: &str = "base:allocation";
    pub const HOLE: u32 = 1;
    pub const ZERO: u32 = 2;
}

/// The context that says which image of a chain holds a range: QEMU's `qemu:allocation-depth`.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// How replies look in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Mode {
    /// One header, then the data.
    #[default]
    Simple,
    /// Chunks.
    Structured,
    /// Chunks and requests with 64-bit lengths.
    Extended,
}

impl Mode {
    /// Bytes of a request's header.
    pub fn request_len(self) -> usize {
        if self == Self::Extended { 32 } else { 28 }
    }

    /// Bytes of the header of a chunk or a simple reply.
    pub fn reply_len(self) -> usize {
        match self {
            Self::Simple => 16,
            Self::Structured => 20,
            Self::Extended => 32,
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u64,
}

impl Request {
    /// Whether it changes what is on the disk.
    pub fn changes(&self) -> bool {
        matches!(self.kind, command::WRITE | command::WRITE_ZEROES | command::TRIM)
    }

    /// Reads a header of [`Mode::request_len`] bytes; `None` if it does not begin as one.
    pub fn parse(mode: Mode, bytes: &[u8]) -> Option<Self> {
        let extended = mode == Mode::Extended;
        let magic = if extended { EXTENDED_REQUEST } else { REQUEST };
        (be32(bytes, 0) == magic).then(|| Self {
            flags: be16(bytes, 4),
            kind: be16(bytes, 6),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            len: if extended { be64(bytes, 24) } else { be32(bytes, 24).into() },
        })
    }

    /// The header as bytes, and how many of them count. Lengths beyond the mode's are cut.
    pub fn encode(&self, mode: Mode) -> ([u8; 32], usize) {
        let mut bytes = [0; 32];
        let magic = if mode == Mode::Extended { EXTENDED_REQUEST } else { REQUEST };
        let [.., l4, l5, l6, l7] = self.len.to_be_bytes();
        let put = |bytes: &mut [u8], at: usize, what: &[u8]| crate::endian::put(bytes, at, what);
        put(&mut bytes, 0, &magic.to_be_bytes());
        put(&mut bytes, 4, &self.flags.to_be_bytes());
        put(&mut bytes, 6, &self.kind.to_be_bytes());
        put(&mut bytes, 8, &self.cookie.to_be_bytes());
        put(&mut bytes, 16, &self.offset.to_be_bytes());
        if mode == Mode::Extended {
            put(&mut bytes, 24, &self.len.to_be_bytes());
        } else {
            put(&mut bytes, 24, &[l4, l5, l6, l7]);
        }
        (bytes, mode.request_len())
    }
}

/// The header of a reply: a whole simple one, or a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    Simple { error: u32, cookie: u64 },
    Chunk { flags: u16, kind: u16, cookie: u64, len: u64 },
}

impl Reply {
    /// Bytes of the header that begins with this magic number, if it is one of the mode's.
    pub fn len(mode: Mode, magic: u32) -> Option<usize> {
        match (mode, magic) {
            (Mode::Simple | Mode::Structured, SIMPLE_REPLY) => Some(16),
            (Mode::Structured, STRUCTURED_REPLY) => Some(20),
            (Mode::Extended, EXTENDED_REPLY) => Some(32),
            _ => None,
        }
    }

    /// Reads a header of [`Self::len`] bytes.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let flags = be16(bytes, 4);
        let kind = be16(bytes, 6);
        let cookie = be64(bytes, 8);
        match be32(bytes, 0) {
            SIMPLE_REPLY => Some(Self::Simple { error: be32(bytes, 4), cookie }),
            STRUCTURED_REPLY => Some(Self::Chunk { flags, kind, cookie, len: be32(bytes, 16).into() }),
            EXTENDED_REPLY => Some(Self::Chunk { flags, kind, cookie, len: be64(bytes, 24) }),
            _ => None,
        }
    }
}

/// Takes numbers and strings from the front of a message; fails where the message is too short.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next bytes.
    pub fn bytes(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(len).ok_or(io::ErrorKind::InvalidData)?;
        self.0 = rest;
        Ok(first)
    }

    pub fn u16(&mut self) -> io::Result<u16> {
        Ok(be16(self.bytes(2)?, 0))
    }

    pub fn u32(&mut self) -> io::Result<u32> {
        Ok(be32(self.bytes(4)?, 0))
    }

    pub fn u64(&mut self) -> io::Result<u64> {
        Ok(be64(self.bytes(8)?, 0))
    }

    /// A string of `len` bytes: UTF-8 without NUL, no longer than [`STRING_MAX`].
    pub fn string(&mut self, len: usize) -> io::Result<&'a str> {
        let bytes = self.bytes(len)?;
        let text = std::str::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData)?;
        if text.len() > STRING_MAX || text.contains('\0') {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(text)
    }

    /// A string with its 32-bit length before it.
    pub fn counted_string(&mut self) -> io::Result<&'a str> {
        let len = self.u32()?;
        self.string(crate::endian::size(len.into()))
    }
}

/// As much of an explanation as is sent: names in it may be long.
pub fn message(why: &str) -> &str {
    why.get(..why.floor_char_boundary(MESSAGE_MAX)).unwrap_or(why)
}

/// The error value for what an image answered.
pub fn error_value(error: &io::Error) -> u32 {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => error::EPERM,
        Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => error::ENOSPC,
        Kind::InvalidInput => error::EINVAL,
        Kind::OutOfMemory => error::ENOMEM,
        Kind::Unsupported => error::ENOTSUP,
        Kind::ConnectionAborted => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// The error for a value that a server answered.
pub fn error_of(value: u32, message: &str) -> io::Error {
    use io::ErrorKind as Kind;
    let (kind, words) = match value {
        error::EPERM => (Kind::PermissionDenied, "operation not permitted"),
        error::EIO => (Kind::Other, "input/output error"),
        error::ENOMEM => (Kind::OutOfMemory, "out of memory"),
        error::ENOSPC => (Kind::StorageFull, "no space left on the device"),
        error::EOVERFLOW => (Kind::InvalidInput, "value too large"),
        error::ENOTSUP => (Kind::Unsupported, "operation not supported"),
        error::ESHUTDOWN => (Kind::ConnectionAborted, "the server is shutting down"),
        _ => (Kind::InvalidInput, "invalid argument"),
    };
    if message.is_empty() {
        return io::Error::new(kind, format!("the NBD server says: {words}"));
    }
    io::Error::new(kind, format!("the NBD server says: {words} ({message})"))
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_are_read_as_written(flags: u16, kind: u16, cookie: u64, offset: u64, len: u64, wide: bool) {
            let (mode, len) = if wide { (Mode::Extended, len) } else { (Mode::Simple, len & 0xffff_ffff) };
            let request = Request { flags, kind, cookie, offset, len };
            let (bytes, count) = request.encode(mode);
            prop_assert_eq!(Request::parse(mode, &bytes[..count]), Some(request));
            prop_assert_eq!(Request::parse(if wide { Mode::Simple } else { Mode::Extended }, &bytes), None);
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes: Vec<u8>) {
            let mut fields = Fields(&bytes);
            while let Ok(text) = fields.counted_string() {
                prop_assert!(text.len() <= bytes.len());
            }
            let _ = Reply::parse(&bytes);
            let _ = Request::parse(Mode::Extended, &bytes);
        }
    }

    #[test]
    fn errors_come_back_as_they_went() {
        use std::io::ErrorKind as Kind;
        for kind in
            [Kind::PermissionDenied, Kind::StorageFull, Kind::InvalidInput, Kind::Unsupported, Kind::Other]
        {
            assert_eq!(error_of(error_value(&io::Error::from(kind)), "").kind(), kind);
        }
        assert_eq!(error_of(77, "").kind(), Kind::InvalidInput);
        assert!(error_of(5, "the disk is on fire").to_string().contains("fire"));
    }
}
