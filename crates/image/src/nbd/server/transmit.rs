//! The transmission phase: requests as they come, in batches.
//!
//! All that has come is taken from the socket at once; requests are done in their order, replies gathered, and sent
//! together before the thread waits. Before it sleeps it looks at the socket for a while, if lately that would have paid.

use super::link::{Link, was_quick};
use super::perform::Now;
use super::poll::Poll;
use super::reply::Output;
use super::waited::Scheduler;
use crate::buffers::WriteFrom;
use crate::endian::size;
use crate::nbd::input::Input;
use crate::nbd::wire::{self, Request, command};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Room for requests that have come.
pub const INPUT: usize = 256 << 10;
/// Room for replies, and a chunk's header beside.
const OUTPUT: usize = (256 << 10) + 4096;
/// Replies of so many bytes are sent while more requests wait, so that the client has something to do meanwhile.
const SEND_AT: usize = 64 << 10;
/// Payloads up to this length are written in one piece; longer ones in pieces of this alignment, as they come.
const WRITE_PIECE: u64 = 128 << 10;
/// How often what a client has sent before the server stopped is looked for.
const LAST_WORDS: u32 = 64;
/// Payload of a request for block status.
const STATUS_PAYLOAD_MAX: u64 = 4096;

/// What was done since the clock was last looked at, for the disk alone.
struct Batch {
    began: Instant,
    requests: u32,
    bytes: u64,
    /// The disk may have been waited for; where it was not, time says nothing.
    may_have_waited: bool,
    /// How long this thread had run, or wanted to, if that is looked at.
    ran: Option<Duration>,
}

impl Batch {
    fn begin() -> Self {
        Self { began: Instant::now(), requests: 0, bytes: 0, may_have_waited: false, ran: None }
    }
}

/// Serves a client until it leaves; answers why, if it does not do so in order.
pub fn serve(link: &Arc<Link>, input: Input) -> io::Result<()> {
    let output = Output::new(&link.stream, link.mode, OUTPUT, Vec::new());
    let mut receiver = Receiver {
        link,
        input,
        output,
        batch: Batch::begin(),
        poll: Poll::default(),
        last_words: LAST_WORDS,
        scheduler: Scheduler::of_this_thread(),
        suspicious: false,
    };
    let served = receiver.serve();
    // Those that are under way are answered, whatever came then.
    let sent = receiver.output.send();
    link.finish();
    served.and(sent)
}

struct Receiver<'a> {
    link: &'a Arc<Link>,
    input: Input,
    output: Output<'a>,
    batch: Batch,
    poll: Poll,
    /// How often what has come is still taken once the server stops.
    last_words: u32,
    scheduler: Scheduler,
    /// The last batch took so long that the disk may have been waited for.
    suspicious: bool,
}

impl Receiver<'_> {
    fn serve(&mut self) -> io::Result<()> {
        let head = self.link.mode.request_len();
        loop {
            self.begin();
            while self.input.have().len() >= head {
                let request = Request::parse(self.link.mode, self.input.have());
                let broken = || io::Error::new(io::ErrorKind::InvalidData, "a request does not begin as one");
                let request = request.ok_or_else(broken)?;
                self.input.consume(head);
                if request.kind == command::DISC {
                    return Ok(());
                }
                self.take(&request)?;
                if self.output.waiting() >= SEND_AT {
                    self.note();
                    self.output.send()?;
                    self.begin();
                } else if self.suspicious {
                    self.note();
                    self.begin();
                }
            }
            self.note();
            self.output.send()?;
            if !self.more(head)? {
                return Ok(());
            }
        }
    }

    /// Waits for bytes; `false` at the connection's end.
    fn more(&mut self, wanted: usize) -> io::Result<bool> {
        // A TCP socket still takes what comes after its receiving was ended.
        if self.link.is_ending() {
            self.last_words = self.last_words.saturating_sub(1);
            return Ok(
                self.last_words > 0 && self.input.fill_now(&self.link.stream, wanted)?.unwrap_or(0) > 0
            );
        }
        let (input, stream) = (&mut self.input, &self.link.stream);
        let count = match self.poll.look(|| input.fill_now(stream, wanted))? {
            Some(count) => count,
            None => self.poll.sleep(|| input.fill(stream, wanted, None))?,
        };
        Ok(count > 0)
    }

    /// Tells how the disk did.
    fn note(&mut self) {
        if !self.batch.may_have_waited {
            return;
        }
        let mut took = self.batch.began.elapsed().saturating_sub(self.output.take_sending());
        let Batch { requests, bytes, ran, .. } = self.batch;
        let slow = !was_quick(took, requests, bytes);
        if slow && let Some(now) = self.scheduler.ran() {
            // Others may have had the CPU meanwhile: to know it the next batch is looked at more closely.
            let before = self.suspicious.then_some(ran).flatten();
            self.suspicious = true;
            let Some(before) = before else { return };
            took = took.saturating_sub(now.saturating_sub(before));
        } else {
            self.suspicious = slow;
        }
        self.link.note(took, requests, bytes);
    }

    /// The clock for what follows.
    fn begin(&mut self) {
        self.output.take_sending();
        self.batch = Batch::begin();
        if self.suspicious {
            self.batch.ran = self.scheduler.ran();
        }
    }

    fn take(&mut self, request: &Request) -> io::Result<()> {
        let counters = &self.link.counters;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        let payload = self.payload_len(request)?;
        if let Err(refusal) = self.link.subject().check(request) {
            self.pass_over(payload)?;
            return self.output.failed(request, refusal.error, &refusal.why);
        }
        match request.kind {
            command::READ => counters.read.fetch_add(request.len, Ordering::Relaxed),
            command::WRITE => counters.written.fetch_add(request.len, Ordering::Relaxed),
            _ => 0,
        };
        if request.kind == command::READ && self.link.reads_now() {
            let now = self.link.subject().read_now(request, &mut self.output)?;
            self.link.note_now(now);
            if now == Now::WouldWait {
                return self.hand_over(request, payload);
            }
            self.count(request, now == Now::MayHaveWaited);
            return Ok(());
        }
        if self.link.takes_long(request) {
            return self.hand_over(request, payload);
        }
        self.count(request, true);
        self.write(request)
    }

    fn count(&mut self, request: &Request, may_have_waited: bool) {
        self.batch.requests = self.batch.requests.saturating_add(1);
        self.batch.bytes = self.batch.bytes.saturating_add(request.len);
        self.batch.may_have_waited |= may_have_waited;
    }

    /// Gives a request to a thread that may wait.
    fn hand_over(&mut self, request: &Request, payload: u64) -> io::Result<()> {
        self.note();
        // This thread may have to wait for a place, or for the payload; what is done already has not.
        self.output.send()?;
        let mut bytes = vec![0; size(payload)];
        self.input.read_exact(&self.link.stream, &mut bytes, None)?;
        self.link.hand_over(*request, bytes)?;
        self.begin();
        Ok(())
    }

    /// Bytes that follow a request's header.
    fn payload_len(&self, request: &Request) -> io::Result<u64> {
        let counted =
            request.flags & command::FLAG_PAYLOAD_LEN != 0 && self.link.mode == wire::Mode::Extended;
        let len = if request.kind == command::WRITE || counted { request.len } else { 0 };
        let most = match request.kind {
            command::BLOCK_STATUS => STATUS_PAYLOAD_MAX,
            _ => wire::PAYLOAD_MAX.into(),
        };
        if len <= most {
            return Ok(len);
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "a request's payload is longer than any"))
    }

    /// Lets a payload pass.
    fn pass_over(&mut self, len: u64) -> io::Result<()> {
        if self.input.have().len() < size(len) {
            self.output.send()?;
        }
        self.input.skip(&self.link.stream, len, None)
    }

    /// The next bytes of a payload; replies do not wait for them.
    fn need(&mut self, count: u64) -> io::Result<()> {
        if self.input.have().len() < size(count) {
            self.note();
            self.output.send()?;
            self.input.need(&self.link.stream, size(count), None)?;
            // The time that the client took is not the disk's.
            self.begin();
        }
        Ok(())
    }

    /// Writes a payload as it comes.
    fn write(&mut self, request: &Request) -> io::Result<()> {
        let mut result = Ok(());
        let mut done = 0u64;
        while done < request.len {
            let at = request.offset.saturating_add(done);
            let left = request.len.saturating_sub(done);
            let ahead = WRITE_PIECE.saturating_sub(at & WRITE_PIECE.saturating_sub(1));
            let part = if request.len <= WRITE_PIECE { left } else { left.min(ahead) };
            self.need(part)?;
            let bytes = self.input.have().get(..size(part)).unwrap_or_default();
            if result.is_ok() {
                result = self.link.export.disk.write(at, &WriteFrom(bytes));
            }
            self.input.consume(size(part));
            done = done.saturating_add(part);
        }
        match result {
            Ok(()) => self.output.done(request),
            Err(error) => self.output.failed(request, wire::error_value(&error), &error.to_string()),
        }
    }
}
