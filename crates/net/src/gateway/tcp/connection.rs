//! One TCP connection: the guest's end of it is ours, the other end is a socket of the host's.
//!
//! ```text
//! guest calls: Connecting --socket connects--> Offered --guest acknowledges--\
//! host calls:  Calling --guest answers-----------------------------------------> Open --both have ended--> gone
//! ```
//!
//! Nothing is stored that the host's kernel stores already. What goes to the guest stays in the socket until the guest
//! has acknowledged it: it is *peeked* at `sent - discarded` and *discarded* later, and is still there should it have to be
//! sent again. What comes from the guest goes into the socket at once; what the socket does not take waits in `pending`,
//! never more than the window that the guest was told, and out of a budget for all connections.
//!
//! The link to the guest loses a frame only where the guest itself drops it, so there is no selective repeat: after
//! three duplicates or a time-out everything from the first missing byte on is sent again.

use super::header::{Header, Segment, flag};
use std::io;
use std::time::{Duration, Instant};

/// What we let the guest send ahead, in bytes.
pub const WINDOW_MAX: u32 = 1 << 20;
/// By how much our windows are scaled.
const SCALE: u8 = 7;
/// The longest segments to the guest: a whole IP packet.
const SEGMENT_MAX: u16 = 65_535 - 60 - 20;
/// Acknowledged bytes that the socket may still hold.
const DISCARD_STEP: u32 = 64 << 10;
/// What one turn sends at most, so that others have theirs.
const TURN_MAX: u32 = 256 << 10;
/// The first wait for an acknowledgement, doubled with every one that does not come.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How long nothing may happen before the guest is asked whether it is still there (RFC 1122, 4.2.3.6).
const IDLE: Duration = Duration::from_secs(2 * 3600);
/// How often a guest is called, once a second: it may still be booting, and nobody else is on its link. How often its own call
/// is answered, and how often it is asked to acknowledge, before it is given up.
const CALLS_MAX: u8 = 120;
const ANSWERS_MAX: u8 = 7;
const RETRIES_MAX: u8 = 30;
/// The least segment size that RFC 9293 lets a peer have; smaller ones would make each byte a packet.
const MSS_MIN: u16 = 88;
const MSS_DEFAULT: u16 = 536;

/// The host's end.
pub trait Stream {
    /// Copies bytes from `offset` on without taking them; 0: there will be no more.
    fn peek(&mut self, offset: u32, into: &mut [u8]) -> io::Result<usize>;
    /// Takes bytes that were peeked at; answers whether there may be an end behind them that no peek has shown.
    fn discard(&mut self, len: u32) -> io::Result<bool>;
    /// Sends bytes; answers how many.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Nothing more will be sent.
    fn shutdown(&mut self);
}

/// Where segments to the guest go.
pub trait Link {
    /// Room for at most `len` bytes of payload, if there is any.
    fn room(&mut self, len: usize) -> Option<&mut [u8]>;
    /// Sends a segment with the first `len` bytes of the room, to be cut into pieces of `mss` bytes. Answers whether it
    /// had a place.
    fn send(&mut self, header: Header, len: usize, mss: u16) -> bool;
}

/// Bytes that all connections together may keep for sockets that do not take them.
#[derive(Debug)]
pub struct Budget {
    left: usize,
}

impl Budget {
    pub fn new(bytes: usize) -> Self {
        Self { left: bytes }
    }

    fn take(&mut self, wanted: usize) -> usize {
        let got = wanted.min(self.left);
        self.left = self.left.saturating_sub(got);
        got
    }

    fn put(&mut self, bytes: usize) {
        self.left = self.left.saturating_add(bytes);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The guest has called; the socket is not connected yet.
    Connecting,
    /// The guest was told that it is.
    Offered,
    /// The guest is called on behalf of somebody outside.
    Calling,
    Open,
}

/// What the connection's holder does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    /// Both sides have ended: forget it.
    Done,
    /// Tell the guest that it is broken, break the socket, forget it.
    Break,
    /// The guest has broken it: break the socket, forget it.
    Broken,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    state: State,
    /// Segments' payload to the guest.
    mss: u16,
    /// What we say of ours.
    own_mss: u16,
    guest_scale: Option<u8>,
    /// To the guest: first byte not acknowledged, next to send, the highest ever sent, first still in the socket.
    acknowledged: u32,
    next: u32,
    highest: u32,
    discarded: u32,
    window: u32,
    duplicates: u8,
    /// The next acknowledgement shall be out of place, so that the guest says where it stands.
    probe: bool,
    /// The place of the end of what goes to the guest, once it is known.
    end: Option<u32>,
    /// The socket may have bytes that were not peeked at.
    readable: bool,
    /// From the guest: next byte, and the end of what it may send.
    expected: u32,
    edge: u32,
    pending: Vec<u8>,
    written: usize,
    guest_ended: bool,
    shut: bool,
    /// An acknowledgement, or the (SYN-)SYN, has to be sent.
    answer_due: bool,
    /// The guest acknowledges what it was never sent: it has a connection from before, which is to be reset by this number.
    stale: Option<u32>,
    retries: u8,
    deadline: Option<Instant>,
}

/// Whether sequence number `a` is after `b` (RFC 9293, 3.4).
fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

impl Connection {
    /// The guest calls with `segment`. `initial` is our first sequence number, `own_mss` the longest segment we take.
    pub fn called(segment: &Segment<'_>, initial: u32, own_mss: u16) -> Self {
        let mut connection = Self::new(State::Connecting, initial, own_mss);
        connection.greet(segment);
        connection
    }

    /// The guest is called.
    pub fn calling(initial: u32, own_mss: u16) -> Self {
        let mut connection = Self::new(State::Calling, initial, own_mss);
        connection.answer_due = true;
        connection
    }

    fn new(state: State, initial: u32, own_mss: u16) -> Self {
        let first = initial.wrapping_add(1);
        Self {
            state,
            mss: MSS_DEFAULT,
            own_mss,
            guest_scale: None,
            acknowledged: initial,
            next: initial,
            highest: initial,
            discarded: first,
            window: 0,
            duplicates: 0,
            probe: false,
            end: None,
            readable: false,
            expected: 0,
            edge: 0,
            pending: Vec::new(),
            written: 0,
            guest_ended: false,
            shut: false,
            answer_due: false,
            stale: None,
            retries: 0,
            deadline: None,
        }
    }

    /// What the guest's SYN says.
    fn greet(&mut self, segment: &Segment<'_>) {
        let most = self.own_mss.clamp(MSS_MIN, SEGMENT_MAX);
        self.mss = segment.mss.unwrap_or(MSS_DEFAULT).clamp(MSS_MIN, most);
        self.guest_scale = segment.scale.map(|scale| scale.min(14));
        self.expected = segment.sequence.wrapping_add(1);
        self.edge = self.expected;
        // RFC 7323, 2.2: the window of a SYN is not scaled.
        self.window = segment.window.into();
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// When [`Self::time_out`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether [`Self::advance`] has something to do.
    pub fn has_work(&self) -> bool {
        self.answer_due || self.stale.is_some() || (self.readable && self.may_send()) || self.end_is_next()
    }

    fn may_send(&self) -> bool {
        self.state == State::Open && self.end.is_none_or(|end| after(end, self.next)) && self.usable() > 0
    }

    fn end_is_next(&self) -> bool {
        self.state == State::Open && self.end == Some(self.next)
    }

    fn in_flight(&self) -> u32 {
        self.next.wrapping_sub(self.acknowledged)
    }

    /// What the guest takes now. Not in crumbs (RFC 9293, 3.8.6.2.1).
    fn usable(&self) -> u32 {
        let usable = self.window.saturating_sub(self.in_flight());
        if usable < u32::from(self.mss) && self.in_flight() > 0 { 0 } else { usable }
    }

    /// The socket is connected.
    pub fn connected(&mut self) {
        if self.state == State::Connecting {
            self.state = State::Offered;
            self.answer_due = true;
            self.readable = true;
        }
    }

    /// The socket has something to read, or its end.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// The socket takes bytes again.
    pub fn writable(&mut self, stream: &mut dyn Stream, budget: &mut Budget) -> Verdict {
        let Some(rest) = self.pending.get(self.written..).filter(|rest| !rest.is_empty()) else {
            return Verdict::Keep;
        };
        match stream.write(rest) {
            Ok(len) => self.written = self.written.saturating_add(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Verdict::Keep,
            Err(_) => return Verdict::Break,
        }
        if self.written >= self.pending.len() {
            self.drop_pending(budget);
        }
        self.end_stream(stream);
        // A window that was small and is not any more is news (RFC 9293, 3.8.6.2.2).
        let told = self.edge.wrapping_sub(self.expected);
        if self.receive_window().saturating_sub(told) >= WINDOW_MAX / 2
            || (told == 0 && self.receive_window() > 0)
        {
            self.answer_due = true;
        }
        self.verdict()
    }

    /// Gives back what the connection holds of the budget. Called before it is forgotten.
    pub fn drop_pending(&mut self, budget: &mut Budget) {
        budget.put(self.pending.len());
        self.pending = Vec::new();
        self.written = 0;
    }

    fn end_stream(&mut self, stream: &mut dyn Stream) {
        if self.guest_ended && self.pending.is_empty() && !self.shut {
            stream.shutdown();
            self.shut = true;
        }
    }

    fn receive_window(&self) -> u32 {
        WINDOW_MAX.saturating_sub(u32::try_from(self.pending.len()).unwrap_or(u32::MAX))
    }

    fn verdict(&self) -> Verdict {
        let sent_all = self.end.is_some_and(|end| after(self.acknowledged, end));
        if sent_all && self.shut && !self.answer_due { Verdict::Done } else { Verdict::Keep }
    }

    /// A segment from the guest.
    pub fn receive(
        &mut self,
        segment: &Segment<'_>,
        stream: &mut dyn Stream,
        budget: &mut Budget,
        now: Instant,
    ) -> Verdict {
        match self.state {
            // The guest asks again, or changes its mind.
            State::Connecting if segment.has(flag::RST) => return Verdict::Broken,
            State::Connecting => return Verdict::Keep,
            State::Calling => return self.called_back(segment, now),
            State::Offered | State::Open => {}
        }
        if segment.has(flag::RST) {
            // RFC 5961, 3.2: only the right number resets.
            let right = segment.sequence == self.expected;
            self.answer_due |= !right;
            return if right { Verdict::Broken } else { Verdict::Keep };
        }
        if segment.has(flag::SYN) || !segment.has(flag::ACK) {
            self.answer_due = true;
            if self.state == State::Offered {
                self.next = self.acknowledged;
            }
            return Verdict::Keep;
        }
        if !self.hear_acknowledgement(segment, now) {
            return Verdict::Keep;
        }
        if self.state == State::Offered {
            return Verdict::Keep;
        }
        // All of what the guest has is taken from the socket when much has gathered, or nothing else is on its way.
        let behind = self.acknowledged.wrapping_sub(self.discarded);
        if (behind >= DISCARD_STEP || self.acknowledged == self.next) && self.discard(stream).is_err() {
            return Verdict::Break;
        }
        if self.take_payload(segment, stream, budget).is_err() {
            return Verdict::Break;
        }
        self.verdict()
    }

    /// The answer to our call.
    fn called_back(&mut self, segment: &Segment<'_>, now: Instant) -> Verdict {
        let ours =
            segment.has(flag::ACK) && segment.acknowledged == self.highest && self.next != self.acknowledged;
        if segment.has(flag::RST) {
            return if ours { Verdict::Broken } else { Verdict::Keep };
        }
        let never_sent = segment.acknowledged != self.highest || self.highest == self.acknowledged;
        if segment.has(flag::ACK) && never_sent {
            // RFC 9293, 3.10.7.3; its next answer is to our next call.
            self.stale = Some(segment.acknowledged);
        }
        if !ours || !segment.has(flag::SYN) {
            return Verdict::Keep;
        }
        self.greet(segment);
        (self.state, self.stale) = (State::Open, None);
        self.acknowledged = segment.acknowledged;
        self.next = self.acknowledged;
        self.answer_due = true;
        self.readable = true;
        self.retries = 0;
        self.rearm(now);
        Verdict::Keep
    }

    /// The acknowledgement and the window of a segment; answers whether the segment is any good.
    fn hear_acknowledgement(&mut self, segment: &Segment<'_>, now: Instant) -> bool {
        let number = segment.acknowledged;
        if after(number, self.highest) {
            self.answer_due = true;
            return false;
        }
        let window = u32::from(segment.window) << self.guest_scale.unwrap_or(0);
        if after(number, self.acknowledged) {
            if self.state == State::Offered {
                self.state = State::Open;
                // What came before was the SYN.
                self.readable = true;
            }
            self.acknowledged = number;
            if after(number, self.next) {
                self.next = number;
            }
            (self.duplicates, self.retries) = (0, 0);
            self.window = window;
            self.rearm(now);
        } else if number == self.acknowledged {
            let repeated = segment.payload.is_empty()
                && !segment.has(flag::FIN)
                && window == self.window
                && self.next != self.acknowledged
                && self.state == State::Open;
            self.window = window;
            if repeated {
                self.duplicates = self.duplicates.saturating_add(1);
                if self.duplicates == 3 {
                    self.repeat();
                }
            }
            if self.highest == self.acknowledged {
                // It is there.
                self.retries = 0;
                self.rearm(now);
            }
        }
        true
    }

    /// Everything not acknowledged is sent again.
    fn repeat(&mut self) {
        self.next = self.acknowledged;
        self.readable = true;
    }

    /// Sets the timer anew: for an acknowledgement, for a window, or for a sign of life.
    fn rearm(&mut self, now: Instant) {
        let waits = self.highest != self.acknowledged || self.window == 0 || self.retries > 0;
        let doublings = if self.state == State::Calling { 0 } else { self.retries.min(6) };
        let retry = RETRY.saturating_mul(1u32.wrapping_shl(doublings.into())).min(RETRY_MAX);
        self.deadline = now.checked_add(if waits { retry } else { IDLE });
    }

    fn discard(&mut self, stream: &mut dyn Stream) -> io::Result<()> {
        // The end is acknowledged like a byte, but no byte.
        let end = self.end.filter(|&end| after(self.acknowledged, end));
        let len = end.unwrap_or(self.acknowledged).wrapping_sub(self.discarded);
        if len > 0 && len < 1 << 31 {
            self.readable |= stream.discard(len)?;
            self.discarded = self.discarded.wrapping_add(len);
        }
        Ok(())
    }

    fn take_payload(
        &mut self,
        segment: &Segment<'_>,
        stream: &mut dyn Stream,
        budget: &mut Budget,
    ) -> io::Result<()> {
        let fin = segment.has(flag::FIN);
        if segment.payload.is_empty() && !fin {
            // A segment beside the window asks for an acknowledgement (RFC 9293, 3.10.7.4): a keep-alive.
            self.answer_due |= segment.sequence != self.expected;
            return Ok(());
        }
        self.answer_due = true;
        let old = self.expected.wrapping_sub(segment.sequence);
        if self.guest_ended || old >= 1 << 31 {
            return Ok(());
        }
        let old = usize::try_from(old).unwrap_or(usize::MAX);
        let Some(fresh) = segment.payload.get(old..) else { return Ok(()) };
        let room = self.edge.wrapping_sub(self.expected);
        let allowed = fresh.get(..room as usize).unwrap_or(fresh);
        let taken = self.accept(allowed, stream, budget)?;
        self.expected = self.expected.wrapping_add(taken as u32);
        if fin && taken == fresh.len() {
            self.expected = self.expected.wrapping_add(1);
            self.guest_ended = true;
            self.end_stream(stream);
        }
        Ok(())
    }

    /// Bytes for the socket; answers how many are on their way or kept.
    fn accept(&mut self, bytes: &[u8], stream: &mut dyn Stream, budget: &mut Budget) -> io::Result<usize> {
        let written = if self.pending.is_empty() && !bytes.is_empty() {
            match stream.write(bytes) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            }
        } else {
            0
        };
        let rest = bytes.get(written..).unwrap_or_default();
        let room = usize::try_from(self.receive_window()).unwrap_or(0);
        let kept = budget.take(rest.len().min(room));
        self.pending.extend_from_slice(rest.get(..kept).unwrap_or_default());
        Ok(written.saturating_add(kept))
    }

    /// The deadline has come.
    pub fn time_out(&mut self, now: Instant) -> Verdict {
        let limit = match self.state {
            State::Open => RETRIES_MAX,
            State::Calling => CALLS_MAX,
            State::Connecting | State::Offered => ANSWERS_MAX,
        };
        self.retries = self.retries.saturating_add(1);
        if self.retries > limit {
            return Verdict::Break;
        }
        if self.state == State::Open && (self.highest == self.acknowledged || self.window == 0) {
            (self.probe, self.answer_due) = (true, true);
        } else {
            self.repeat();
            self.answer_due |= self.state != State::Open;
        }
        self.rearm(now);
        Verdict::Keep
    }

    fn header(&mut self, flags: u8) -> Header {
        let scale = if self.guest_scale.is_some() { SCALE } else { 0 };
        // What is not a multiple of the scale cannot be said.
        let window = (self.receive_window() >> scale).min(u16::MAX.into());
        let edge = self.expected.wrapping_add(window << scale);
        // A window is never taken back.
        if after(edge, self.edge) {
            self.edge = edge;
        }
        let window = self.edge.wrapping_sub(self.expected) >> scale;
        Header {
            sequence: self.next,
            acknowledged: self.expected,
            flags: flags | flag::ACK,
            window: u16::try_from(window).unwrap_or(u16::MAX),
            options: None,
        }
    }

    /// Sends what can be sent. [`Self::has_work`] says afterwards whether there is more, for want of room or of a turn.
    pub fn advance(&mut self, stream: &mut dyn Stream, link: &mut dyn Link, now: Instant) -> Verdict {
        match self.state {
            State::Connecting => return Verdict::Keep,
            State::Offered | State::Calling => {
                if let Some(sequence) = self.stale {
                    let reset = Header { sequence, flags: flag::RST, ..Header::default() };
                    self.stale = self.stale.filter(|_| !link.send(reset, 0, self.mss));
                }
                self.greeting(link, now);
                return Verdict::Keep;
            }
            State::Open => {}
        }
        if self.send_data(stream, link, now).is_err() {
            return Verdict::Break;
        }
        if self.end_is_next() {
            let header = self.header(flag::FIN);
            if link.send(header, 0, self.mss) {
                self.sent(1, now);
            }
        }
        if self.answer_due {
            let mut header = self.header(0);
            if self.probe {
                header.sequence = self.acknowledged.wrapping_sub(1);
            }
            if link.send(header, 0, self.mss) {
                (self.probe, self.answer_due) = (false, false);
            }
        }
        self.verdict()
    }

    /// What tells the guest that the connection is broken.
    pub fn reset(&self) -> Header {
        Header {
            sequence: if self.state == State::Connecting { 0 } else { self.next },
            acknowledged: self.expected,
            flags: flag::RST | flag::ACK,
            ..Header::default()
        }
    }

    fn greeting(&mut self, link: &mut dyn Link, now: Instant) {
        if !self.answer_due {
            return;
        }
        let calling = self.state == State::Calling;
        let scale = (calling || self.guest_scale.is_some()).then_some(SCALE);
        let flags = if calling { flag::SYN } else { flag::SYN | flag::ACK };
        let window = WINDOW_MAX.min(u16::MAX.into());
        if !calling {
            self.edge = self.expected.wrapping_add(window);
        }
        let header = Header {
            sequence: self.acknowledged,
            acknowledged: if calling { 0 } else { self.expected },
            flags,
            window: window as u16,
            options: Some((self.own_mss, scale)),
        };
        if link.send(header, 0, self.mss) {
            self.answer_due = false;
            self.next = self.acknowledged;
            self.sent(1, now);
        }
    }

    /// `len` numbers have been sent.
    fn sent(&mut self, len: u32, now: Instant) {
        self.next = self.next.wrapping_add(len);
        if after(self.next, self.highest) {
            self.highest = self.next;
        }
        self.answer_due = self.probe;
        // The timer runs from the oldest byte in flight.
        if self.in_flight() == len {
            self.rearm(now);
        }
    }

    fn send_data(&mut self, stream: &mut dyn Stream, link: &mut dyn Link, now: Instant) -> io::Result<()> {
        let mut turn = TURN_MAX;
        let whole = u32::from(SEGMENT_MAX.checked_div(self.mss).unwrap_or(1));
        let segment_max = whole.saturating_mul(self.mss.into());
        while self.readable && self.may_send() && turn > 0 {
            let len = self.usable().min(segment_max);
            let to_end = self.end.map_or(len, |end| end.wrapping_sub(self.next));
            let len = len.min(to_end);
            let Some(room) = link.room(len as usize) else { return Ok(()) };
            match stream.peek(self.next.wrapping_sub(self.discarded), room) {
                Ok(0) if self.end.is_some() => return Err(io::ErrorKind::InvalidData.into()),
                Ok(0) => {
                    self.end = Some(self.next);
                    self.readable = false;
                    // Whoever waits for the end of a connection waits for nothing else.
                    self.discard(stream)?;
                }
                Ok(got) => {
                    let header = self.header(flag::PSH);
                    let got = u32::try_from(got).unwrap_or(u32::MAX);
                    if !link.send(header, got as usize, self.mss) {
                        return Ok(());
                    }
                    self.sent(got, now);
                    turn = turn.saturating_sub(got);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
