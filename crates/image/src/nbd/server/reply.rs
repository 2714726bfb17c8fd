//! Replies on their way to a client: gathered in one buffer, into which images read directly, and sent in one go.

use crate::nbd::stream::Stream;
use crate::nbd::wire::{self, Mode, chunk};
use std::io;
use std::time::{Duration, Instant};

/// Bytes of a buffer that are kept for the next replies: those of a read as long as clients usually send.
const KEPT_MAX: usize = (1 << 20) + 4096;

/// See the module.
pub struct Output<'a> {
    stream: &'a Stream,
    mode: Mode,
    bytes: Vec<u8>,
    used: usize,
    /// How often it was sent.
    sends: u64,
    /// Time that the client took to take replies.
    sending: Duration,
}

/// A place in the replies to come back to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    sends: u64,
    used: usize,
}

impl Mark {
    /// Whether nothing was sent between two places.
    pub fn is_sent_with(self, other: Self) -> bool {
        self.sends == other.sends
    }
}

impl<'a> Output<'a> {
    /// Room for `room` bytes, more for replies that must be longer. `bytes` is a buffer to use again, or an empty one.
    pub fn new(stream: &'a Stream, mode: Mode, room: usize, mut bytes: Vec<u8>) -> Self {
        bytes.resize(room.max(bytes.len()), 0);
        Self { stream, mode, bytes, used: 0, sends: 0, sending: Duration::ZERO }
    }

    /// The buffer, for the next one.
    pub fn into_buffer(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes that wait to be sent.
    pub fn waiting(&self) -> usize {
        self.used
    }

    /// Sends all that waits.
    pub fn send(&mut self) -> io::Result<()> {
        if self.used == 0 {
            return Ok(());
        }
        let used = std::mem::take(&mut self.used);
        self.sends = self.sends.wrapping_add(1);
        let began = Instant::now();
        self.stream.send(&[self.bytes.get(..used).unwrap_or_default()], None)?;
        self.sending = self.sending.saturating_add(began.elapsed());
        if self.bytes.len() > KEPT_MAX {
            self.bytes.truncate(KEPT_MAX);
            self.bytes.shrink_to_fit();
        }
        Ok(())
    }

    /// How long sending took since this was last asked: no time of the disk's.
    pub fn take_sending(&mut self) -> Duration {
        std::mem::take(&mut self.sending)
    }

    /// Where replies are now, with room for `len` bytes more.
    pub fn mark(&mut self, len: usize) -> io::Result<Mark> {
        self.make_room(len)?;
        Ok(Mark { sends: self.sends, used: self.used })
    }

    /// Takes back what was added since; `false` if some of it was sent.
    pub fn rewind(&mut self, mark: Mark) -> bool {
        let kept = self.sends == mark.sends;
        if kept {
            self.used = mark.used;
        }
        kept
    }

    /// Makes sure that `len` bytes have room.
    fn make_room(&mut self, len: usize) -> io::Result<()> {
        if self.used.saturating_add(len) > self.bytes.len() {
            self.send()?;
            if len > self.bytes.len() {
                self.bytes.resize(len, 0);
            }
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.make_room(bytes.len())?;
        crate::endian::put(&mut self.bytes, self.used, bytes);
        self.used = self.used.saturating_add(bytes.len());
        Ok(())
    }

    fn simple(&mut self, cookie: u64, error: u32) -> io::Result<()> {
        let [m0, m1, m2, m3] = wire::SIMPLE_REPLY.to_be_bytes();
        let [e0, e1, e2, e3] = error.to_be_bytes();
        let [c0, c1, c2, c3, c4, c5, c6, c7] = cookie.to_be_bytes();
        self.put(&[m0, m1, m2, m3, e0, e1, e2, e3, c0, c1, c2, c3, c4, c5, c6, c7])
    }

    /// A chunk's header as bytes, and how many of them count. `offset` is the request's.
    fn chunk_header(&self, cookie: u64, offset: u64, kind: u16, done: bool, len: u64) -> ([u8; 32], usize) {
        let mut bytes = [0; 32];
        let put = |bytes: &mut [u8], at: usize, what: &[u8]| crate::endian::put(bytes, at, what);
        let extended = self.mode == Mode::Extended;
        let magic = if extended { wire::EXTENDED_REPLY } else { wire::STRUCTURED_REPLY };
        put(&mut bytes, 0, &magic.to_be_bytes());
        put(&mut bytes, 4, &(if done { chunk::FLAG_DONE } else { 0 }).to_be_bytes());
        put(&mut bytes, 6, &kind.to_be_bytes());
        put(&mut bytes, 8, &cookie.to_be_bytes());
        if extended {
            put(&mut bytes, 16, &offset.to_be_bytes());
            put(&mut bytes, 24, &len.to_be_bytes());
        } else {
            let [.., l4, l5, l6, l7] = len.to_be_bytes();
            put(&mut bytes, 16, &[l4, l5, l6, l7]);
        }
        (bytes, self.mode.reply_len())
    }

    /// A chunk whose content is at hand.
    pub fn chunk(
        &mut self,
        request: &wire::Request,
        kind: u16,
        done: bool,
        parts: &[&[u8]],
    ) -> io::Result<()> {
        let len = parts.iter().map(|part| part.len()).fold(0, usize::saturating_add);
        let (header, count) = self.chunk_header(request.cookie, request.offset, kind, done, len as u64);
        self.make_room(count.saturating_add(len))?;
        self.put(header.get(..count).unwrap_or_default())?;
        parts.iter().try_for_each(|part| self.put(part))
    }

    /// The request was done.
    pub fn done(&mut self, request: &wire::Request) -> io::Result<()> {
        match self.mode {
            // The shorter one of two that are allowed.
            Mode::Simple | Mode::Structured => self.simple(request.cookie, 0),
            Mode::Extended => self.chunk(request, chunk::NONE, true, &[]),
        }
    }

    /// All content of a read was sent before.
    pub fn none(&mut self, request: &wire::Request) -> io::Result<()> {
        match self.mode {
            Mode::Simple => self.simple(request.cookie, 0),
            _ => self.chunk(request, chunk::NONE, true, &[]),
        }
    }

    /// The request was not done.
    pub fn failed(&mut self, request: &wire::Request, error: u32, why: &str) -> io::Result<()> {
        if self.mode == Mode::Simple {
            return self.simple(request.cookie, error);
        }
        let message = wire::message(why);
        let count = u16::try_from(message.len()).unwrap_or(0).to_be_bytes();
        self.chunk(request, chunk::ERROR, true, &[&error.to_be_bytes(), &count, message.as_bytes()])
    }

    /// `len` bytes of a read at `offset`, which `read` puts in place: a chunk, or in simple mode the whole reply. It hears
    /// where replies are then. Nothing is added if it fails.
    pub fn data(
        &mut self,
        request: &wire::Request,
        (offset, len): (u64, usize),
        done: bool,
        read: impl FnOnce(Mark, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<io::Result<()>> {
        let place = if self.mode == Mode::Simple { 0 } else { 8 };
        let head = self.mode.reply_len().saturating_add(place);
        let here = self.mark(head.saturating_add(len))?;
        let from = self.used.saturating_add(head);
        let to = from.saturating_add(len);
        let Some(bytes) = self.bytes.get_mut(from..to) else { return Err(io::ErrorKind::OutOfMemory.into()) };
        if let Err(error) = read(here, bytes) {
            return Ok(Err(error));
        }
        if self.mode == Mode::Simple {
            self.simple(request.cookie, 0)?;
        } else {
            let content = len.saturating_add(place) as u64;
            let (header, count) =
                self.chunk_header(request.cookie, request.offset, chunk::OFFSET_DATA, done, content);
            self.put(header.get(..count).unwrap_or_default())?;
            self.put(&offset.to_be_bytes())?;
        }
        self.used = to;
        Ok(Ok(()))
    }

    /// `len` bytes of a read at `offset` are zeroes.
    pub fn hole(&mut self, request: &wire::Request, offset: u64, len: u32, done: bool) -> io::Result<()> {
        self.chunk(request, chunk::OFFSET_HOLE, done, &[&offset.to_be_bytes(), &len.to_be_bytes()])
    }
}
