//! Requests of any number of threads on one connection.
//!
//! Each thread sends its own request and then waits for its reply. One of those that wait receives for all, until its own
//! reply has come; then another one does. So there is no thread more, and a request alone is answered to the
//! thread that asked. Nobody who sends can wait for somebody who does not receive: replies that are due have their
//! threads waiting, and one of them receives.
//!
//! Lock order: `input` (by the one who receives), then `state`. Sending takes neither.

use super::session::{Session, Terms};
use crate::endian::{be32, be64, size};
use crate::nbd::input::Input;
use crate::nbd::stream::{Deadline, Stream};
use crate::nbd::wire::{self, Mode, Reply, Request, chunk, command};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of a reply that is no data: an error's message, or extents.
const DETAIL_MAX: u64 = 1 << 20;
/// Slowest pace of a payload, in bytes each second.
const PACE_MIN: u64 = 64 << 10;

/// Why there is no reply.
#[derive(Debug)]
pub enum Failure {
    /// The server has refused, or failed.
    Answered(io::Error),
    /// The connection is gone.
    Lost(io::Error),
}

/// What a reply brought.
#[derive(Debug, Default)]
pub struct Answer {
    /// Bytes of a read.
    pub data: Vec<u8>,
    /// Extents of a status request: length and flags.
    pub extents: Vec<(u64, u64)>,
}

/// A request under way.
struct Pending {
    request: Request,
    answer: Answer,
    /// Bytes of the data that have come.
    covered: u64,
    error: Option<io::Error>,
    done: bool,
}

#[derive(Default)]
struct State {
    pending: HashMap<u64, Pending>,
    next: u64,
    receiving: bool,
    /// Why the connection is of no use any more.
    broken: Option<String>,
}

/// See the module.
pub struct Pipe {
    stream: Stream,
    pub terms: Terms,
    timeout: Duration,
    /// Changes that servers have acknowledged on all connections of one export.
    acknowledged: Arc<AtomicU64>,
    input: Mutex<Input>,
    state: Mutex<State>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server breaks the protocol: {what}"))
}

impl Pipe {
    pub fn new(session: Session, timeout: Duration, acknowledged: Arc<AtomicU64>) -> Self {
        Self {
            stream: session.stream,
            terms: session.terms,
            timeout,
            acknowledged,
            input: Mutex::new(session.input),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn deadline(&self, bytes: u64) -> Deadline {
        let paced = Duration::from_secs(bytes.checked_div(PACE_MIN).unwrap_or(0));
        Instant::now().checked_add(self.timeout.saturating_add(paced))
    }

    fn broken(state: &State) -> Option<Failure> {
        let why = state.broken.as_ref()?;
        Some(Failure::Lost(io::Error::new(io::ErrorKind::ConnectionAborted, why.clone())))
    }

    /// Nobody can use the connection any more, and no answer is taken from it.
    pub fn break_off(&self, error: &io::Error) {
        let mut state = lock(&self.state);
        state.broken.get_or_insert_with(|| match error.kind() {
            io::ErrorKind::TimedOut => "the NBD server does not answer".to_owned(),
            io::ErrorKind::UnexpectedEof => "the NBD server has closed the connection".to_owned(),
            _ => error.to_string(),
        });
        self.changed.notify_all();
        drop(state);
        self.stream.cut();
    }

    /// Whether the connection is lost, be it that nobody has noticed yet. Then no answer is taken from it any more.
    pub fn is_over(&self) -> bool {
        if lock(&self.state).broken.is_some() {
            return true;
        }
        let over = self.stream.is_at_end();
        if over {
            self.break_off(&io::ErrorKind::UnexpectedEof.into());
        }
        over
    }

    /// Asks, and waits for the reply.
    pub fn ask(&self, mut request: Request, payload: &[u8]) -> Result<Answer, Failure> {
        {
            let mut state = lock(&self.state);
            if let Some(failure) = Self::broken(&state) {
                return Err(failure);
            }
            state.next = state.next.wrapping_add(1);
            request.cookie = state.next;
            let data = if request.kind == command::READ { vec![0; size(request.len)] } else { Vec::new() };
            let answer = Answer { data, extents: Vec::new() };
            let pending = Pending { request, answer, covered: 0, error: None, done: false };
            state.pending.insert(request.cookie, pending);
        }
        if request.kind == command::WRITE && self.terms.mode == Mode::Extended {
            request.flags |= command::FLAG_PAYLOAD_LEN;
        }
        let (header, count) = request.encode(self.terms.mode);
        let header = header.get(..count).unwrap_or_default();
        let deadline = self.deadline(payload.len() as u64);
        // One answer may take no longer, however much the server says to others meanwhile, or to this request without end.
        let until = self.deadline(request.len.min(wire::PAYLOAD_MAX.into()));
        let sent = if payload.is_empty() {
            self.stream.send(&[header], deadline)
        } else {
            self.stream.send(&[header, payload], deadline)
        };
        if let Err(error) = sent {
            self.break_off(&error);
        }
        self.wait(request.cookie, until)
    }

    fn wait(&self, cookie: u64, until: Deadline) -> Result<Answer, Failure> {
        let mut state = lock(&self.state);
        loop {
            if state.pending.get(&cookie).is_some_and(|pending| pending.done)
                && let Some(pending) = state.pending.remove(&cookie)
            {
                return pending.error.map_or(Ok(pending.answer), |error| Err(Failure::Answered(error)));
            }
            if let Some(failure) = Self::broken(&state) {
                state.pending.remove(&cookie);
                return Err(failure);
            }
            let left = until.map_or(self.timeout, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                drop(state);
                self.break_off(&io::ErrorKind::TimedOut.into());
                state = lock(&self.state);
                continue;
            }
            if state.receiving {
                let waited = self.changed.wait_timeout(state, left);
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.receiving = true;
            drop(state);
            let received = self.receive();
            if let Err(error) = &received {
                self.break_off(error);
            }
            state = lock(&self.state);
            state.receiving = false;
            self.changed.notify_all();
        }
    }

    /// Takes one message from the server.
    fn receive(&self) -> io::Result<()> {
        let mut input = lock(&self.input);
        let deadline = self.deadline(0);
        let magic = be32(input.need(&self.stream, 4, deadline)?, 0);
        let count = Reply::len(self.terms.mode, magic).ok_or_else(|| wrong("that begins no reply"))?;
        let head = input.need(&self.stream, count, deadline)?;
        let reply = Reply::parse(head).ok_or_else(|| wrong("that begins no reply"))?;
        input.consume(count);
        let (Reply::Simple { cookie, .. } | Reply::Chunk { cookie, .. }) = reply;
        // Taken out meanwhile: others may come and go.
        let pending = lock(&self.state).pending.remove(&cookie).filter(|pending| !pending.done);
        let mut pending = pending.ok_or_else(|| wrong("a reply to nothing"))?;
        let taken = match reply {
            Reply::Simple { error, .. } => self.take_simple(&mut input, &mut pending, error),
            Reply::Chunk { flags, kind, len, .. } => {
                pending.done = flags & chunk::FLAG_DONE != 0;
                self.take_chunk(&mut input, &mut pending, kind, len)
            }
        };
        let complete = taken.and_then(|()| pending.check());
        // What came in part is no answer: whoever asked hears that the connection is lost, and asks again.
        pending.done &= complete.is_ok();
        let mut state = lock(&self.state);
        if pending.done && pending.error.is_none() && pending.request.changes() {
            // Who connects anew must know of all that was acknowledged here.
            pending.done = state.broken.is_none();
            self.acknowledged.fetch_add(u64::from(pending.done), Ordering::SeqCst);
        }
        state.pending.insert(cookie, pending);
        drop(state);
        complete
    }

    fn take_simple(&self, input: &mut Input, pending: &mut Pending, error: u32) -> io::Result<()> {
        pending.done = true;
        if error != 0 {
            pending.error = Some(wire::error_of(error, ""));
        } else if pending.request.kind == command::READ {
            if self.terms.mode > Mode::Simple {
                return Err(wrong("a simple reply to a read"));
            }
            input.read_exact(&self.stream, &mut pending.answer.data, self.deadline(pending.request.len))?;
            pending.covered = pending.request.len;
        }
        Ok(())
    }

    fn take_chunk(&self, input: &mut Input, pending: &mut Pending, kind: u16, len: u64) -> io::Result<()> {
        let read = pending.request.kind == command::READ;
        match kind {
            chunk::NONE if len == 0 && pending.done => Ok(()),
            chunk::OFFSET_DATA if read && len > 8 => {
                let offset = be64(input.need(&self.stream, 8, self.deadline(0))?, 0);
                input.consume(8);
                let into = pending.part(offset, len.saturating_sub(8))?;
                input.read_exact(&self.stream, into, self.deadline(len))
            }
            chunk::OFFSET_HOLE if read && len == 12 => {
                let bytes = input.need(&self.stream, 12, self.deadline(0))?;
                let (offset, hole) = (be64(bytes, 0), be32(bytes, 8));
                input.consume(12);
                pending.part(offset, hole.into())?.fill(0);
                Ok(())
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if len <= DETAIL_MAX => {
                let bytes = self.detail(input, len)?;
                self.take_extents(pending, kind, &bytes)
            }
            _ if kind & chunk::ERROR_BIT != 0 && (6..=DETAIL_MAX).contains(&len) => {
                let bytes = self.detail(input, len)?;
                let message = bytes.get(6..).and_then(|rest| {
                    let count = usize::from(crate::endian::be16(&bytes, 4));
                    rest.get(..count)
                });
                let message =
                    String::from_utf8_lossy(message.ok_or_else(|| wrong("a message without its end"))?);
                let message: String = message.chars().filter(|c| !c.is_control()).collect();
                pending.error.get_or_insert_with(|| wire::error_of(be32(&bytes, 0), &message));
                Ok(())
            }
            _ => Err(wrong("a chunk that is no answer to what was asked")),
        }
    }

    fn detail(&self, input: &mut Input, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; size(len)];
        input.read_exact(&self.stream, &mut bytes, self.deadline(len))?;
        Ok(bytes)
    }

    fn take_extents(&self, pending: &mut Pending, kind: u16, bytes: &[u8]) -> io::Result<()> {
        let extended = self.terms.mode == Mode::Extended;
        let (head, row) = if extended { (8, 16) } else { (4, 8) };
        let rows = bytes.get(head..).filter(|rows| !rows.is_empty() && rows.len().is_multiple_of(row));
        let ours = Some(be32(bytes, 0)) == self.terms.allocation;
        let fits =
            pending.request.kind == command::BLOCK_STATUS && (kind == chunk::BLOCK_STATUS_EXT) == extended;
        let rows = rows.filter(|_| ours && fits).ok_or_else(|| wrong("extents that do not add up"))?;
        let read = |row: &[u8]| {
            if extended { (be64(row, 0), be64(row, 8)) } else { (be32(row, 0).into(), be32(row, 4).into()) }
        };
        pending.answer.extents = rows.chunks_exact(row).map(read).collect();
        if pending.answer.extents.iter().any(|(len, _)| *len == 0) {
            return Err(wrong("an extent of nothing"));
        }
        Ok(())
    }

    /// Says farewell.
    pub fn close(&self) {
        if lock(&self.state).broken.is_none() {
            let request = Request { flags: 0, kind: command::DISC, cookie: 0, offset: 0, len: 0 };
            let (header, count) = request.encode(self.terms.mode);
            let deadline = Instant::now().checked_add(Duration::from_secs(1));
            // The server may be gone: then it knows.
            let _ = self.stream.send(&[header.get(..count).unwrap_or_default()], deadline);
        }
        self.stream.close();
    }
}

impl Pending {
    /// Where a part of a read goes.
    fn part(&mut self, offset: u64, len: u64) -> io::Result<&mut [u8]> {
        let start = offset.checked_sub(self.request.offset);
        let end = start.and_then(|start| start.checked_add(len)).filter(|_| len > 0);
        self.covered = self.covered.saturating_add(len);
        let range = start.zip(end).map(|(start, end)| size(start)..size(end));
        range
            .and_then(|range| self.answer.data.get_mut(range))
            .ok_or_else(|| wrong("data that nobody asked for"))
    }

    /// Whether a finished answer has all that was asked for.
    fn check(&self) -> io::Result<()> {
        if !self.done || self.error.is_some() {
            return Ok(());
        }
        match self.request.kind {
            command::READ if self.covered != self.request.len => {
                Err(wrong("a read with parts missing or twice"))
            }
            command::BLOCK_STATUS if self.answer.extents.is_empty() => Err(wrong("a status without extents")),
            _ => Ok(()),
        }
    }
}
