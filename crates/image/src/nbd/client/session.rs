//! The handshake, from the client's side.

use crate::endian::{be16, be32, be64, size};
use crate::nbd::input::Input;
use crate::nbd::stream::{Deadline, Stream};
use crate::nbd::wire::{self, Fields, Mode, allocation, flag, handshake, info, option, reply};
use std::io;

/// Longest data of a reply, in bytes: a name and a description.
const REPLY_BYTES_MAX: usize = 16 << 10;
/// Replies to one option.
const REPLIES_MAX: u32 = 1024;
/// Room for replies that have come.
const INPUT: usize = 256 << 10;

/// What a server offers under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    pub mode: Mode,
    /// The number of the context `base:allocation`, if the server has it.
    pub allocation: Option<u32>,
    /// Bytes that requests are multiples of: a power of two.
    pub block_min: u32,
    /// Longest read or write, in bytes.
    pub block_max: u32,
}

/// A connection in its transmission phase.
pub struct Session {
    pub stream: Stream,
    pub input: Input,
    pub terms: Terms,
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

struct Haggling<'a> {
    stream: Stream,
    input: Input,
    deadline: Deadline,
    export: &'a str,
    no_zeroes: bool,
}

/// The last reply to an option, where it is no acknowledgement.
struct Refused {
    kind: u32,
    message: String,
}

impl Refused {
    fn into_error(self, what: &str) -> io::Error {
        let kind = match self.kind {
            reply::ERR_UNKNOWN => io::ErrorKind::NotFound,
            reply::ERR_POLICY | reply::ERR_TLS_REQD => io::ErrorKind::PermissionDenied,
            reply::ERR_SHUTDOWN => io::ErrorKind::ConnectionAborted,
            _ => io::ErrorKind::Other,
        };
        let why = match (self.message.as_str(), self.kind) {
            ("", reply::ERR_TLS_REQD) => "it wants TLS: write nbds:// or nbds+unix://",
            ("", reply::ERR_UNKNOWN) => "it has no such export",
            ("", _) => "it does not say why",
            (message, _) => message,
        };
        io::Error::new(kind, format!("the NBD server refuses {what}: {why}"))
    }
}

/// Opens an export. `encrypt` is the session to encrypt with, if that must be.
pub fn open(
    stream: Stream,
    export: &str,
    encrypt: Option<rustls::Connection>,
    deadline: Deadline,
) -> io::Result<Session> {
    let mut haggling = Haggling { stream, input: Input::new(INPUT), deadline, export, no_zeroes: false };
    let fixed = haggling.greet()?;
    if !fixed {
        if encrypt.is_some() {
            return Err(wrong("the NBD server is too old for TLS"));
        }
        return haggling.export_name(Mode::Simple);
    }
    if let Some(session) = encrypt {
        haggling = haggling.encrypt(session)?;
    }
    let mode = if haggling.ask(option::EXTENDED_HEADERS, &[], |_, _| Ok(()))?.is_none() {
        Mode::Extended
    } else if haggling.ask(option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_none() {
        Mode::Structured
    } else {
        Mode::Simple
    };
    let allocation = if mode > Mode::Simple { haggling.allocation()? } else { None };
    haggling.go(mode, allocation)
}

impl Haggling<'_> {
    /// Reads the greeting, answers it; whether options can be refused.
    fn greet(&mut self) -> io::Result<bool> {
        let greeting = self.input.need(&self.stream, 18, self.deadline)?;
        let (init, word, flags) = (be64(greeting, 0), be64(greeting, 8), be16(greeting, 16));
        if init != wire::INIT || word != wire::OPTION {
            return Err(wrong("what answers there is no NBD server of this century's protocol (newstyle)"));
        }
        self.input.consume(18);
        let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.no_zeroes = ours & handshake::NO_ZEROES != 0;
        self.stream.send(&[&u32::from(ours).to_be_bytes()], self.deadline)?;
        Ok(ours & handshake::FIXED_NEWSTYLE != 0)
    }

    fn send(&self, option: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let message = [&wire::OPTION.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data];
        self.stream.send(&[&message.concat()], self.deadline)
    }

    /// Sends an option and hears its replies; `None` if it was accepted.
    fn ask(
        &mut self,
        option: u32,
        data: &[u8],
        mut hear: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<Option<Refused>> {
        self.send(option, data)?;
        for _ in 0..REPLIES_MAX {
            let head = self.input.need(&self.stream, 20, self.deadline)?;
            let (magic, about, kind) = (be64(head, 0), be32(head, 8), be32(head, 12));
            let len = size(be32(head, 16).into());
            if magic != wire::OPTION_REPLY || about != option || len > REPLY_BYTES_MAX {
                return Err(wrong("the NBD server's reply to an option is none"));
            }
            self.input.consume(20);
            let data = self.input.need(&self.stream, len, self.deadline)?;
            let refused = if kind == reply::ACK {
                Some(None)
            } else if kind & reply::ERROR != 0 {
                let message: String =
                    String::from_utf8_lossy(data).chars().filter(|c| !c.is_control()).collect();
                Some(Some(Refused { kind, message }))
            } else {
                hear(kind, data)?;
                None
            };
            self.input.consume(len);
            if let Some(refused) = refused {
                return Ok(refused);
            }
        }
        Err(wrong("the NBD server replies without end"))
    }

    fn encrypt(mut self, session: rustls::Connection) -> io::Result<Self> {
        if let Some(refused) = self.ask(option::STARTTLS, &[], |_, _| Ok(()))? {
            return Err(refused.into_error("TLS"));
        }
        if !self.input.have().is_empty() {
            return Err(wrong("the NBD server sent bytes in the clear after STARTTLS"));
        }
        let stream = self.stream.start_tls(session, self.deadline)?;
        Ok(Self { stream, ..self })
    }

    fn counted_export(&self) -> Vec<u8> {
        let len = u32::try_from(self.export.len()).unwrap_or(0);
        [&len.to_be_bytes()[..], self.export.as_bytes()].concat()
    }

    /// Chooses `base:allocation`.
    fn allocation(&mut self) -> io::Result<Option<u32>> {
        let len = u32::try_from(allocation::NAME.len()).unwrap_or(0);
        let query = [&1u32.to_be_bytes()[..], &len.to_be_bytes(), allocation::NAME.as_bytes()];
        let data = [&self.counted_export()[..], &query.concat()].concat();
        let mut id = None;
        let refused = self.ask(option::SET_META_CONTEXT, &data, |kind, data| {
            if kind == reply::META_CONTEXT && data.get(4..) == Some(allocation::NAME.as_bytes()) {
                id = Some(be32(data, 0));
            }
            Ok(())
        })?;
        Ok(id.filter(|_| refused.is_none()))
    }

    fn go(mut self, mode: Mode, allocation: Option<u32>) -> io::Result<Session> {
        let wants = [&1u16.to_be_bytes()[..], &info::BLOCK_SIZE.to_be_bytes()].concat();
        let data = [self.counted_export(), wants].concat();
        let mut told = None;
        let mut blocks = (1, wire::PAYLOAD_MAX);
        let refused = self.ask(option::GO, &data, |kind, data| {
            let mut fields = Fields(data);
            if kind == reply::INFO {
                match fields.u16()? {
                    info::EXPORT => told = Some((fields.u64()?, fields.u16()?)),
                    info::BLOCK_SIZE => {
                        let (min, _) = (fields.u32()?, fields.u32()?);
                        blocks = (min, fields.u32()?);
                    }
                    _ => {}
                }
            }
            Ok(())
        })?;
        match refused {
            None => {}
            Some(refused) if refused.kind == reply::ERR_UNSUP => return self.export_name(mode),
            Some(refused) => return Err(refused.into_error(&format!("the export {:?}", self.export))),
        }
        let (size, flags) =
            told.ok_or_else(|| wrong("the NBD server does not say how large the export is"))?;
        let (min, max) = blocks;
        // A block is a power of two up to 64 KiB; requests of one block must be possible.
        if !min.is_power_of_two() || min > 64 << 10 || max < min {
            return Err(wrong("the NBD server's block sizes make no sense"));
        }
        let block_max = max.min(wire::PAYLOAD_MAX).checked_div(min).unwrap_or(0).saturating_mul(min);
        self.finish(Terms { size, flags, mode, allocation, block_min: min, block_max })
    }

    /// The way of old servers: a refusal is a closed connection.
    fn export_name(mut self, mode: Mode) -> io::Result<Session> {
        self.send(option::EXPORT_NAME, self.export.as_bytes())?;
        let len = if self.no_zeroes { 10 } else { 134 };
        let told = self.input.need(&self.stream, len, self.deadline).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(
                io::ErrorKind::NotFound,
                format!("the NBD server has no export {:?}", self.export),
            ),
            _ => error,
        })?;
        let (size, flags) = (be64(told, 0), be16(told, 8));
        self.input.consume(len);
        let block_max = wire::PAYLOAD_MAX;
        self.finish(Terms { size, flags, mode, allocation: None, block_min: 1, block_max })
    }

    fn finish(self, terms: Terms) -> io::Result<Session> {
        if terms.size > i64::MAX as u64 {
            return Err(wrong("the NBD server's export is larger than any file"));
        }
        let has_flags = terms.flags & flag::HAS_FLAGS != 0;
        let terms = Terms { flags: if has_flags { terms.flags } else { 0 }, ..terms };
        Ok(Session { stream: self.stream, input: self.input, terms })
    }
}
