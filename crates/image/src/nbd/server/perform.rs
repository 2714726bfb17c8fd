//! Requests done: what each command means for a disk, and what is answered.

use super::export::{Context, Contexts, Export};
use super::now::ReadNow;
use super::reply::{Mark, Output};
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::Content;
use crate::endian::{be32, be64, size};
use crate::nbd::wire::{self, Mode, Request, chunk, command, error};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that are read at a time where a reply may have several chunks: few enough to stay in a CPU's cache.
pub const PIECE: u64 = 256 << 10;
/// Room for the headers of a piece's chunks, as many as there usually are.
const HEADERS: usize = 4096;
/// Reads of at least so many bytes are looked at for holes.
const HOLES_FROM: u64 = 64 << 10;
/// Extents that one reply tells of at most.
const EXTENTS_MAX: usize = 8192;
/// Lookups that one request for status may cost.
const LOOKUPS_MAX: u32 = 32768;
/// Bytes that are zeroed or given back at a time, so that nobody who stops the server waits for terabytes.
const ZEROED_AT_ONCE: u64 = 1 << 30;
/// Bytes that one request to cache fetches.
const CACHED_MAX: u64 = 32 << 20;

/// What a session is about.
pub struct Subject<'a> {
    pub export: &'a Export,
    pub mode: Mode,
    pub contexts: Contexts,
    /// The server stops: what takes long comes to an end.
    pub ending: &'a AtomicBool,
}

/// What became of a read that nobody should wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Now {
    /// It is answered.
    Done,
    /// It is answered, and nobody knows whether a disk was waited for.
    MayHaveWaited,
    /// It would have to wait; nothing was done.
    WouldWait,
}

/// Why a request is not done.
pub struct Refusal {
    pub error: u32,
    pub why: String,
}

impl Refusal {
    fn new(error: u32, why: &str) -> Self {
        Self { error, why: why.to_owned() }
    }
}

impl From<io::Error> for Refusal {
    fn from(source: io::Error) -> Self {
        Self { error: wire::error_value(&source), why: source.to_string() }
    }
}

/// Whether a request writes.
pub fn writes(kind: u16) -> bool {
    matches!(kind, command::WRITE | command::TRIM | command::WRITE_ZEROES)
}

impl Subject<'_> {
    /// What is wrong with a request before anything is done.
    pub fn check(&self, request: &Request) -> Result<(), Refusal> {
        let extended = self.mode == Mode::Extended;
        let allowed = match request.kind {
            command::READ if self.mode >= Mode::Structured => command::FLAG_DF,
            command::READ | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE if extended => command::FLAG_PAYLOAD_LEN,
            command::WRITE => 0,
            command::WRITE_ZEROES => command::FLAG_NO_HOLE | command::FLAG_FAST_ZERO,
            command::BLOCK_STATUS if extended => command::FLAG_REQ_ONE | command::FLAG_PAYLOAD_LEN,
            command::BLOCK_STATUS => command::FLAG_REQ_ONE,
            _ => return Err(Refusal::new(error::EINVAL, "this command is not known here")),
        };
        if request.flags & !(allowed | command::FLAG_FUA) != 0 {
            return Err(Refusal::new(error::EINVAL, "the command has flags that it cannot have"));
        }
        if writes(request.kind) && self.export.is_read_only() {
            return Err(Refusal::new(error::EPERM, "the export is read-only"));
        }
        let moves = matches!(request.kind, command::READ | command::WRITE);
        if moves && request.len > wire::PAYLOAD_MAX.into() {
            return Err(Refusal::new(error::EINVAL, "the request is longer than the largest block"));
        }
        if request.kind == command::FLUSH || request.flags & command::FLAG_PAYLOAD_LEN != 0 && !moves {
            return Ok(());
        }
        self.check_range(request.kind, request.offset, request.len)
    }

    fn check_range(&self, kind: u16, offset: u64, len: u64) -> Result<(), Refusal> {
        if offset.checked_add(len).is_some_and(|end| end <= self.export.capacity()) {
            return Ok(());
        }
        let grows = matches!(kind, command::WRITE | command::WRITE_ZEROES);
        let error = if grows { error::ENOSPC } else { error::EINVAL };
        Err(Refusal::new(error, "the range is not on the disk"))
    }

    /// Does a request that was checked, and answers it. Errors are the connection's; those of the disk are answered.
    pub fn perform(&self, request: &Request, payload: &[u8], output: &mut Output<'_>) -> io::Result<()> {
        let done = match request.kind {
            command::READ => return self.read(request, output),
            command::BLOCK_STATUS => return self.block_status(request, payload, output),
            command::WRITE => self.export.disk.write(request.offset, &WriteFrom(payload)),
            command::FLUSH => self.flush(),
            command::TRIM => self.in_parts(request, |at, len| self.export.disk.discard(at, len)),
            command::WRITE_ZEROES => {
                let unmap = request.flags & command::FLAG_NO_HOLE == 0;
                let (disk, fast) = (&self.export.disk, request.flags & command::FLAG_FAST_ZERO != 0);
                self.in_parts(request, |at, len| {
                    if fast { disk.zero_quickly(at, len, unmap) } else { disk.write_zeroes(at, len, unmap) }
                })
            }
            command::CACHE => self.cache(request),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        let done = done.and_then(|()| self.make_stable(request));
        match done {
            Ok(()) => output.done(request),
            Err(error) => output.failed(request, wire::error_value(&error), &error.to_string()),
        }
    }

    /// Keeps the promise of `FLAG_FUA`.
    fn make_stable(&self, request: &Request) -> io::Result<()> {
        let must = request.flags & command::FLAG_FUA != 0 && writes(request.kind);
        if must { self.flush() } else { Ok(()) }
    }

    fn in_parts(&self, request: &Request, part: impl Fn(u64, u64) -> io::Result<()>) -> io::Result<()> {
        let mut done = 0u64;
        while done < request.len {
            if self.ending.load(Ordering::Acquire) {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server is shutting down"));
            }
            let at = request.offset.saturating_add(done);
            // Parts end at whole ones, so that a format need not cut its clusters.
            let ahead = ZEROED_AT_ONCE.saturating_sub(at & ZEROED_AT_ONCE.saturating_sub(1));
            let len = request.len.saturating_sub(done).min(ahead);
            part(at, len)?;
            done = done.saturating_add(len);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing was written through a disk that is open for reading.
        if self.export.disk.read_only() { Ok(()) } else { self.export.disk.flush() }
    }

    fn cache(&self, request: &Request) -> io::Result<()> {
        let len = request.len.min(CACHED_MAX);
        let mut bytes = vec![0; size(len.min(PIECE))];
        let mut done = 0u64;
        while done < len {
            let part = len.saturating_sub(done).min(PIECE);
            let into = bytes.get_mut(..size(part)).unwrap_or_default();
            self.export.disk.read(request.offset.saturating_add(done), &ReadInto::new(into))?;
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn read(&self, request: &Request, output: &mut Output<'_>) -> io::Result<()> {
        let read = |_, at: u64, bytes: &mut [u8]| self.export.disk.read(at, &ReadInto::new(bytes));
        match self.read_by(request, output, read)? {
            Ok(()) => Ok(()),
            Err(error) => output.failed(request, wire::error_value(&error), &error.to_string()),
        }
    }

    /// Reads if that needs no waiting for a disk.
    pub fn read_now(&self, request: &Request, output: &mut Output<'_>) -> io::Result<Now> {
        // With room for all of it usually nothing of it is sent before it is whole.
        let mark = output.mark(size(request.len.min(PIECE)).saturating_add(HEADERS))?;
        let (mut may_have_waited, mut would_wait) = (false, false);
        let read = |here: Mark, at: u64, bytes: &mut [u8]| {
            let now = ReadNow::new(bytes);
            let read = self.export.disk.read(at, &now);
            may_have_waited |= now.may_have_waited();
            let waits = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
            if !read.as_ref().is_err_and(waits) {
                return read;
            }
            // The beginning may be with the client already; then the rest is waited for here.
            would_wait = here.is_sent_with(mark);
            may_have_waited |= !would_wait;
            if would_wait { read } else { self.export.disk.read(at, &ReadInto::new(bytes)) }
        };
        let done = self.read_by(request, output, read)?;
        if would_wait && output.rewind(mark) {
            return Ok(Now::WouldWait);
        }
        if let Err(error) = done {
            output.failed(request, wire::error_value(&error), &error.to_string())?;
        }
        Ok(if may_have_waited { Now::MayHaveWaited } else { Now::Done })
    }

    /// Reads, and adds what was read to the replies; an error of the disk is the inner one, and is not answered yet.
    fn read_by(
        &self,
        request: &Request,
        output: &mut Output<'_>,
        mut read: impl FnMut(Mark, u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<io::Result<()>> {
        let disk = &self.export.disk;
        let whole = self.mode == Mode::Simple || request.flags & command::FLAG_DF != 0;
        if request.len == 0 {
            return output.none(request).map(Ok);
        }
        let end = request.offset.saturating_add(request.len);
        let mut at = request.offset;
        while at < end {
            let mut len = end.saturating_sub(at);
            if !whole {
                len = len.min(PIECE);
                if len >= HOLES_FROM
                    && let Ok(status) = disk.block_status(at, len)
                {
                    len = status.len.clamp(1, len);
                    if status.content == Content::Zero {
                        let done = at.saturating_add(len) == end;
                        output.hole(request, at, u32::try_from(len).unwrap_or(0), done)?;
                        at = at.saturating_add(len);
                        continue;
                    }
                }
            }
            let done = at.saturating_add(len) == end;
            if let Err(error) =
                output.data(request, (at, size(len)), done, |here, into| read(here, at, into))?
            {
                return Ok(Err(error));
            }
            at = at.saturating_add(len);
        }
        Ok(Ok(()))
    }

    /// The contexts that a request asks for, and the length that it means.
    fn asked(&self, request: &Request, payload: &[u8]) -> Result<(Contexts, u64), Refusal> {
        if request.flags & command::FLAG_PAYLOAD_LEN == 0 {
            return Ok((self.contexts, request.len));
        }
        let mut contexts = Contexts::default();
        let ids = payload.get(8..).filter(|ids| ids.len() % 4 == 0);
        for id in
            ids.ok_or_else(|| Refusal::new(error::EINVAL, "the payload does not add up"))?.chunks_exact(4)
        {
            let chosen = Context::ALL.into_iter().find(|context| context.id() == be32(id, 0));
            let chosen = chosen.filter(|context| self.contexts.has(*context) && !contexts.has(*context));
            contexts.add(chosen.ok_or_else(|| Refusal::new(error::EINVAL, "that context was not chosen"))?);
        }
        Ok((contexts, be64(payload, 0)))
    }

    fn block_status(&self, request: &Request, payload: &[u8], output: &mut Output<'_>) -> io::Result<()> {
        let lists = self.asked(request, payload).and_then(|(contexts, len)| {
            if contexts.is_empty() || len == 0 {
                return Err(Refusal::new(error::EINVAL, "no context, or no bytes, to tell of"));
            }
            self.check_range(request.kind, request.offset, len)?;
            Ok(self.extents(request, contexts, len)?)
        });
        let lists = match lists {
            Ok(lists) => lists,
            Err(refusal) => return output.failed(request, refusal.error, &refusal.why),
        };
        let last = lists.len().saturating_sub(1);
        for (number, (context, extents)) in lists.iter().enumerate() {
            let id = context.id().to_be_bytes();
            let done = number == last;
            if self.mode == Mode::Extended {
                let count = u32::try_from(extents.list.len()).unwrap_or(0).to_be_bytes();
                let rows = extents.list.iter().flat_map(|(len, flags)| [*len, u64::from(*flags)]);
                let rows: Vec<u8> = rows.flat_map(u64::to_be_bytes).collect();
                output.chunk(request, chunk::BLOCK_STATUS_EXT, done, &[&id, &count, &rows])?;
            } else {
                let short = |len: u64| u32::try_from(len).unwrap_or(u32::MAX);
                let rows = extents.list.iter().flat_map(|(len, flags)| [short(*len), *flags]);
                let rows: Vec<u8> = rows.flat_map(u32::to_be_bytes).collect();
                output.chunk(request, chunk::BLOCK_STATUS, done, &[&id, &rows])?;
            }
        }
        Ok(())
    }

    fn extents(
        &self,
        request: &Request,
        contexts: Contexts,
        len: u64,
    ) -> io::Result<Vec<(Context, Extents)>> {
        let most = if request.flags & command::FLAG_REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
        let chosen = Context::ALL.into_iter().filter(|context| contexts.has(*context));
        let mut lists: Vec<_> = chosen.map(|context| (context, Extents::new(most))).collect();
        let mut done = 0u64;
        for _ in 0..LOOKUPS_MAX {
            let left = len.saturating_sub(done);
            if left == 0 || lists.iter().all(|(_, extents)| extents.full) {
                break;
            }
            let status = self.export.disk.block_status(request.offset.saturating_add(done), left)?;
            let part = status.len.clamp(1, left);
            for (context, extents) in &mut lists {
                extents.push(part, context.flags(&status));
            }
            done = done.saturating_add(part);
        }
        Ok(lists)
    }
}

/// Consecutive ranges with what a context says of them; neighbours differ.
struct Extents {
    list: Vec<(u64, u32)>,
    most: usize,
    full: bool,
}

impl Extents {
    fn new(most: usize) -> Self {
        Self { list: Vec::new(), most, full: false }
    }

    fn push(&mut self, len: u64, flags: u32) {
        let room = self.list.len() < self.most;
        match self.list.last_mut() {
            _ if self.full => {}
            Some((last, same)) if *same == flags => *last = last.saturating_add(len),
            _ if !room => self.full = true,
            _ => self.list.push((len, flags)),
        }
    }
}
