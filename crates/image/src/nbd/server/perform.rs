//! Requests done: what each command means for a disk, and what is answered.

use super::export::{Context, Contexts, Export};
use super::reply::Output;
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::Content;
use crate::endian::{be32, be64, size};
use crate::nbd::wire::{self, Mode, Request, chunk, command, error};
use std::io;

/// Bytes that are read at a time where a reply may have several chunks: few enough to stay in a CPU's cache.
pub const PIECE: u64 = 256 << 10;
/// Reads of at least so many bytes are looked at for holes.
const HOLES_FROM: u64 = 64 << 10;
/// Extents that one reply tells of at most.
const EXTENTS_MAX: usize = 8192;
/// Lookups that one request for status may cost.
const LOOKUPS_MAX: u32 = 32768;
/// Bytes that one request to cache fetches.
const CACHED_MAX: u64 = 32 << 20;

/// What a session is about.
pub struct Subject<'a> {
    pub export: &'a Export,
    pub mode: Mode,
    pub contexts: Contexts,
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
            command::WRITE_ZEROES => command::FLAG_NO_HOLE,
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
            command::TRIM => self.export.disk.discard(request.offset, request.len),
            command::WRITE_ZEROES => {
                let unmap = request.flags & command::FLAG_NO_HOLE == 0;
                self.export.disk.write_zeroes(request.offset, request.len, unmap)
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
        let disk = &self.export.disk;
        let whole = self.mode == Mode::Simple || request.flags & command::FLAG_DF != 0;
        if request.len == 0 {
            return output.none(request);
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
            let read = output.data(request, (at, size(len)), done, |into| disk.read(at, into))?;
            if let Err(error) = read {
                return output.failed(request, wire::error_value(&error), &error.to_string());
            }
            at = at.saturating_add(len);
        }
        Ok(())
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
