//! The host's half of the protocol as a value: bytes of the stream go in and out, events come out. No thread, socket or clock.
//!
//! ```text
//! Waiting --Ready with our nonce--> Up --Announce, noise or a breach of the rules--> Waiting (a new Hello is sent)
//!    \--Ready of another version--> Incompatible
//! ```
//!
//! The guest is hostile: whatever it sends, the client holds at most one frame, per session two windows of output and a few
//! notices. A breach of the rules ends all sessions and the link starts over.

use std::collections::{BTreeMap, VecDeque};

use crate::message::{Ending, Exec, Failure, Poweroff, Stream, Terminal, ToAgent, ToHost, VERSION};
use crate::peer::SESSIONS_MAX;
use crate::wire::{DATA_MAX, Decoder, Outbox, REQUEST_MAX};

/// How many bytes of each output stream of a session may wait here for the caller.
pub const OUTPUT_WINDOW: usize = 256 * 1024;
/// The most standard input, in bytes, that an agent is believed to take ahead.
const STDIN_WINDOW_MAX: usize = 1024 * 1024;
/// How many bytes may wait to be sent before new requests are refused.
const OUTBOX_MAX: usize = 4 * 1024 * 1024;
/// How many notices may wait for the caller before the guest is taken to be flooding.
const NOTICES_MAX: usize = 4096;

/// Names a session as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(u32);

/// Why the link went down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostReason {
    /// The agent began anew.
    #[error("the agent in the guest was restarted")]
    AgentRestarted,
    /// Bytes that are no frame.
    #[error("bytes were lost on the way to or from the agent in the guest")]
    Noise,
    /// The guest sent what it must not.
    #[error("the agent in the guest broke its protocol")]
    Breach,
    /// [`Client::reconnect`] was called.
    #[error("the connection to the agent in the guest was opened anew")]
    Reconnect,
}

/// Why a request was refused; nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The link is not up.
    #[error(
        "the agent in the guest does not answer (yet): wait until the guest has booted, or look at its console"
    )]
    NotReady,
    /// Too many sessions.
    #[error(
        "{SESSIONS_MAX} commands already run in the guest, the most there may be at a time: end one first"
    )]
    TooManySessions,
    /// A command line and environment that do not fit a frame.
    #[error(
        "the command line and its environment are longer than {REQUEST_MAX} bytes: pass long data by standard input"
    )]
    TooLong,
    /// A string with a NUL byte, or no program.
    #[error("the command is empty or has a NUL byte in it")]
    BadString,
    /// The session has ended.
    #[error("the command in the guest has ended")]
    NoSession,
    /// The stream does not take bytes.
    #[error("the guest does not take what is sent to its agent: it may be stopped or hung")]
    Backlog,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent is there; commands can be run.
    Ready {
        /// Whether it is the agent that came with this program.
        same_build: bool,
    },
    /// An agent of another version is there; nothing can be run with it.
    Incompatible {
        /// The version it speaks; ours is [`VERSION`].
        version: u16,
    },
    /// The link went down; a [`Event::SessionLost`] follows for each session.
    LinkLost(LostReason),
    /// The command runs, as this process of the guest.
    Started {
        /// Whose.
        session: SessionId,
        /// The guest's process number.
        pid: u32,
    },
    /// The command wrote bytes. Say [`Client::consumed`] when they are used up.
    Output {
        /// Whose.
        session: SessionId,
        /// Where.
        stream: Stream,
        /// What.
        bytes: Vec<u8>,
    },
    /// [`Client::stdin`] takes bytes again.
    StdinReady {
        /// Whose.
        session: SessionId,
    },
    /// The command has ended, after all its output. The session is over.
    Exited {
        /// Whose.
        session: SessionId,
        /// How.
        ending: Ending,
    },
    /// The command did not start. The session is over.
    Failed {
        /// Whose.
        session: SessionId,
        /// What failed.
        failure: Failure,
        /// The kernel's error number.
        errno: u32,
    },
    /// The link broke under the session. Its processes are gone or will be; the session is over.
    SessionLost {
        /// Whose.
        session: SessionId,
        /// Why.
        reason: LostReason,
    },
    /// Answer to [`Client::ping`].
    Pong(u64),
}

/// What waits for the caller, output apart from its bytes so that a flood of small frames stays small.
#[derive(Debug)]
enum Notice {
    Event(Event),
    Output(u32, Stream),
    /// The event is the session's last.
    Last(u32, Event),
}

#[derive(Debug, Default)]
struct Flow {
    /// Bytes the guest has sent and the caller has not fetched; a notice waits when not empty.
    waiting: Vec<u8>,
    /// Bytes the guest may still send.
    granted: usize,
    /// Bytes used up by the caller and not granted anew yet.
    owed: usize,
}

#[derive(Debug, Default)]
struct Session {
    started: bool,
    /// The guest has said its last word; the session only waits for the caller to hear it.
    over: bool,
    abandoned: bool,
    stdout: Flow,
    stderr: Flow,
    stdin_credit: usize,
    stdin_ended: bool,
    stdin_wanted: bool,
}

impl Session {
    fn flow(&mut self, stream: Stream) -> &mut Flow {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Waiting,
    Up,
    Incompatible,
}

/// The host's half of the protocol with one guest's agent.
#[derive(Debug)]
pub struct Client {
    decoder: Decoder,
    outbox: Outbox,
    link: Link,
    nonce: u64,
    stdin_window: usize,
    next_id: u32,
    pings: VecDeque<u64>,
    sessions: BTreeMap<u32, Session>,
    notices: VecDeque<Notice>,
}

impl Client {
    /// A client that greets the agent. `nonce` should differ from those of earlier clients of the same guest (a clock's
    /// nanoseconds will do).
    pub fn new(nonce: u64) -> Self {
        let mut client = Self {
            decoder: Decoder::new(DATA_MAX),
            outbox: Outbox::default(),
            link: Link::Waiting,
            nonce,
            stdin_window: 0,
            next_id: 0,
            pings: VecDeque::new(),
            sessions: BTreeMap::new(),
            notices: VecDeque::new(),
        };
        client.greet();
        client
    }

    /// Whether commands can be run.
    pub fn is_ready(&self) -> bool {
        self.link == Link::Up
    }

    /// Bytes for the stream.
    pub fn pending(&self) -> &[u8] {
        self.outbox.pending()
    }

    /// The stream took `count` bytes of [`Client::pending`].
    pub fn sent(&mut self, count: usize) {
        self.outbox.advance(count);
    }

    /// Bytes held for the caller and of a frame begun: never more than two windows per session and a frame.
    pub fn held(&self) -> usize {
        let flows = self.sessions.values().flat_map(|session| [&session.stdout, &session.stderr]);
        flows.fold(self.decoder.held(), |sum, flow| sum.saturating_add(flow.waiting.len()))
    }

    /// Greets again if no answer has come. Call it about once a second, and when the guest opens the stream: an earlier
    /// greeting may have been lost while nobody was listening.
    pub fn nudge(&mut self) {
        if self.link == Link::Waiting && self.outbox.is_empty() {
            self.greet();
        }
    }

    /// The stream was opened anew (the guest was reset, or restored from a saved state): starts over.
    pub fn reconnect(&mut self) {
        self.decoder.reset();
        self.lose(LostReason::Reconnect);
    }

    fn greet(&mut self) {
        self.nonce = self.nonce.wrapping_add(1);
        // Nothing else can matter before the answer, and only the newest greeting's answer counts.
        self.outbox.clear();
        self.outbox.delimiter();
        ToAgent::Hello { version: VERSION, nonce: self.nonce }.send(0, &mut self.outbox);
    }

    fn lose(&mut self, reason: LostReason) {
        if self.link == Link::Up {
            self.notices.push_back(Notice::Event(Event::LinkLost(reason)));
        }
        self.link = Link::Waiting;
        self.pings.clear();
        for (&id, session) in self.sessions.iter_mut().filter(|(_, session)| !session.over) {
            session.over = true;
            let lost = Event::SessionLost { session: SessionId(id), reason };
            self.notices.push_back(Notice::Last(id, lost));
        }
        self.greet();
    }

    /// Takes bytes from the stream.
    pub fn receive(&mut self, mut bytes: &[u8]) {
        loop {
            let frame = self.decoder.feed(&mut bytes);
            if self.decoder.take_noise() && self.link == Link::Up {
                self.lose(LostReason::Noise);
            }
            let Some(frame) = frame else { return };
            let breach = match ToHost::decode(frame) {
                Some((_, ToHost::Announce)) => {
                    self.lose(LostReason::AgentRestarted);
                    false
                }
                Some((_, ToHost::Ready { version, nonce, build, stdin_window })) => {
                    self.welcome(version, nonce, build, stdin_window);
                    false
                }
                Some((id, message)) => self.link == Link::Up && self.heed(id, message).is_none(),
                None => self.link == Link::Up,
            };
            if breach || self.notices.len() > NOTICES_MAX {
                self.lose(LostReason::Breach);
            }
            if self.notices.len() > NOTICES_MAX {
                // A guest that restarts its link without end: what it says of links is not worth keeping.
                self.notices.retain(|notice| matches!(notice, Notice::Output(..) | Notice::Last(..)));
            }
        }
    }

    fn welcome(&mut self, version: u16, nonce: u64, build: u64, stdin_window: u32) {
        if nonce != self.nonce || self.link != Link::Waiting {
            return; // An answer to an earlier greeting.
        }
        if version == VERSION {
            self.link = Link::Up;
            self.stdin_window = usize::try_from(stdin_window).unwrap_or(usize::MAX).min(STDIN_WINDOW_MAX);
            let same_build = build == crate::AGENT_BUILD;
            self.notices.push_back(Notice::Event(Event::Ready { same_build }));
        } else {
            self.link = Link::Incompatible;
            self.notices.push_back(Notice::Event(Event::Incompatible { version }));
        }
    }

    /// `None` is a breach of the rules.
    fn heed(&mut self, id: u32, message: ToHost) -> Option<()> {
        if let ToHost::Pong(number) = message {
            let asked = self.pings.pop_front()?;
            self.notices.push_back(Notice::Event(Event::Pong(number)));
            return (asked == number).then_some(());
        }
        let window = self.stdin_window;
        let session = self.sessions.get_mut(&id).filter(|session| !session.over)?;
        let name = SessionId(id);
        let last = match message {
            ToHost::Announce | ToHost::Ready { .. } | ToHost::Pong(_) => return None,
            ToHost::Started(pid) => {
                if std::mem::replace(&mut session.started, true) {
                    return None;
                }
                self.notices.push_back(Notice::Event(Event::Started { session: name, pid }));
                return Some(());
            }
            ToHost::Output(stream, bytes) => return self.output(id, stream, &bytes),
            ToHost::Credit(count) => {
                let count = usize::try_from(count).ok()?;
                session.stdin_credit =
                    session.stdin_credit.checked_add(count).filter(|&sum| sum <= window)?;
                if count > 0 && std::mem::take(&mut session.stdin_wanted) {
                    self.notices.push_back(Notice::Event(Event::StdinReady { session: name }));
                }
                return Some(());
            }
            ToHost::Exit(ending) if session.started => Event::Exited { session: name, ending },
            ToHost::Failed(failure, errno) if !session.started => {
                Event::Failed { session: name, failure, errno }
            }
            ToHost::Exit(_) | ToHost::Failed(..) => return None,
        };
        session.over = true;
        self.notices.push_back(Notice::Last(id, last));
        Some(())
    }

    fn output(&mut self, id: u32, stream: Stream, bytes: &[u8]) -> Option<()> {
        let session = self.sessions.get_mut(&id).filter(|session| session.started && !bytes.is_empty())?;
        let abandoned = session.abandoned;
        let flow = session.flow(stream);
        flow.granted = flow.granted.checked_sub(bytes.len())?;
        if abandoned {
            self.consumed(SessionId(id), stream, bytes.len());
            return Some(());
        }
        if flow.waiting.is_empty() {
            self.notices.push_back(Notice::Output(id, stream));
        }
        flow.waiting.extend_from_slice(bytes);
        Some(())
    }

    /// The next thing that has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        loop {
            match self.notices.pop_front()? {
                Notice::Event(event) => return Some(event),
                Notice::Last(id, event) => {
                    self.sessions.remove(&id);
                    return Some(event);
                }
                Notice::Output(id, stream) => {
                    let Some(session) = self.sessions.get_mut(&id) else { continue };
                    let bytes = std::mem::take(&mut session.flow(stream).waiting);
                    if !bytes.is_empty() {
                        return Some(Event::Output { session: SessionId(id), stream, bytes });
                    }
                }
            }
        }
    }

    /// The caller has used up `count` bytes of output: the guest may send as many more.
    pub fn consumed(&mut self, session: SessionId, stream: Stream, count: usize) {
        let Some(state) = self.sessions.get_mut(&session.0).filter(|state| !state.over) else { return };
        let flow = state.flow(stream);
        let out = OUTPUT_WINDOW.saturating_sub(flow.granted).saturating_sub(flow.waiting.len());
        flow.owed = flow.owed.saturating_add(count).min(out);
        // Few grants, and never one so late that the guest has to wait for it.
        if flow.owed >= OUTPUT_WINDOW / 4 {
            let owed = std::mem::take(&mut flow.owed);
            flow.granted = flow.granted.saturating_add(owed);
            let owed = u32::try_from(owed).unwrap_or(u32::MAX);
            ToAgent::Credit(stream, owed).send(session.0, &mut self.outbox);
        }
    }

    /// Whether a request can be sent.
    fn check(&self) -> Result<(), RequestError> {
        if self.link != Link::Up {
            Err(RequestError::NotReady)
        } else if self.outbox.len() > OUTBOX_MAX {
            Err(RequestError::Backlog)
        } else {
            Ok(())
        }
    }

    fn live(&mut self, session: SessionId) -> Result<&mut Session, RequestError> {
        self.check()?;
        self.sessions.get_mut(&session.0).filter(|state| !state.over).ok_or(RequestError::NoSession)
    }

    /// Runs a command (`output_window` is filled in here). Events of the session follow.
    pub fn exec(&mut self, exec: Exec) -> Result<SessionId, RequestError> {
        self.check()?;
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(RequestError::TooManySessions);
        }
        if !is_sound(&exec) {
            return Err(RequestError::BadString);
        }
        let window = u32::try_from(OUTPUT_WINDOW).unwrap_or(u32::MAX);
        let exec = Exec { output_window: window, ..exec };
        if exec.encode().len() > REQUEST_MAX {
            return Err(RequestError::TooLong);
        }
        let id = self.free_id();
        let flow = || Flow { granted: OUTPUT_WINDOW, ..Flow::default() };
        let stdin_credit = self.stdin_window;
        let session = Session { stdin_credit, stdout: flow(), stderr: flow(), ..Session::default() };
        self.sessions.insert(id, session);
        ToAgent::Exec(exec).send(id, &mut self.outbox);
        Ok(SessionId(id))
    }

    fn free_id(&mut self) -> u32 {
        loop {
            self.next_id = self.next_id.wrapping_add(1);
            if self.next_id != 0 && !self.sessions.contains_key(&self.next_id) {
                return self.next_id;
            }
        }
    }

    /// Gives bytes to the command's standard input. Takes as many as the window allows and returns their number; when that is
    /// fewer than given, [`Event::StdinReady`] tells when to come again.
    pub fn stdin(&mut self, session: SessionId, bytes: &[u8]) -> Result<usize, RequestError> {
        let state = self.live(session)?;
        if state.stdin_ended {
            return Err(RequestError::NoSession);
        }
        let count = bytes.len().min(state.stdin_credit);
        state.stdin_credit = state.stdin_credit.saturating_sub(count);
        state.stdin_wanted = count < bytes.len();
        for piece in bytes.get(..count).unwrap_or(&[]).chunks(DATA_MAX) {
            ToAgent::Stdin(piece.to_vec()).send(session.0, &mut self.outbox);
        }
        Ok(count)
    }

    /// Ends the command's standard input (on a terminal: types its end-of-file character).
    pub fn stdin_eof(&mut self, session: SessionId) -> Result<(), RequestError> {
        if !std::mem::replace(&mut self.live(session)?.stdin_ended, true) {
            ToAgent::StdinEof.send(session.0, &mut self.outbox);
        }
        Ok(())
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&mut self, session: SessionId, rows: u16, columns: u16) -> Result<(), RequestError> {
        self.live(session)?;
        ToAgent::Resize(rows, columns).send(session.0, &mut self.outbox);
        Ok(())
    }

    /// Sends a signal (Linux's number) to the command's process group.
    pub fn signal(&mut self, session: SessionId, number: u8) -> Result<(), RequestError> {
        self.live(session)?;
        ToAgent::Signal(number).send(session.0, &mut self.outbox);
        Ok(())
    }

    /// Nobody wants the command any more: hangs it up, kills it and throws away what it still writes. Its last event comes.
    pub fn abandon(&mut self, session: SessionId) {
        const SIGHUP: u8 = 1;
        const SIGKILL: u8 = 9;
        let Ok(state) = self.live(session) else { return };
        state.abandoned = true;
        for stream in [Stream::Stdout, Stream::Stderr] {
            let flow = state.flow(stream);
            flow.waiting.clear();
            flow.owed = OUTPUT_WINDOW.saturating_sub(flow.granted);
        }
        ToAgent::Signal(SIGHUP).send(session.0, &mut self.outbox);
        ToAgent::Signal(SIGKILL).send(session.0, &mut self.outbox);
        self.consumed(session, Stream::Stdout, 0);
        self.consumed(session, Stream::Stderr, 0);
    }

    /// Switches the guest off.
    pub fn poweroff(&mut self, how: Poweroff) -> Result<(), RequestError> {
        self.check()?;
        ToAgent::Poweroff(how).send(0, &mut self.outbox);
        Ok(())
    }

    /// Sets the guest's clock: nanoseconds since 1970 in UTC.
    pub fn set_time(&mut self, nanoseconds: u64) -> Result<(), RequestError> {
        self.check()?;
        ToAgent::SetTime(nanoseconds).send(0, &mut self.outbox);
        Ok(())
    }

    /// Asks for a [`Event::Pong`] with the same number.
    pub fn ping(&mut self, number: u64) -> Result<(), RequestError> {
        self.check()?;
        if self.pings.len() >= 16 {
            return Err(RequestError::Backlog);
        }
        self.pings.push_back(number);
        ToAgent::Ping(number).send(0, &mut self.outbox);
        Ok(())
    }
}

/// Whether there is a program and no string would be cut short at a NUL byte.
fn is_sound(exec: &Exec) -> bool {
    let term = exec.terminal.as_ref().map(|terminal| &terminal.term);
    let mut strings = exec.argv.iter().chain(&exec.env).chain([&exec.directory, &exec.user]).chain(term);
    exec.argv.first().is_some_and(|program| !program.is_empty()) && !strings.any(|string| string.contains(&0))
}

/// A terminal of this size; `term` is the value of `TERM`.
pub fn terminal(rows: u16, columns: u16, term: &str) -> Terminal {
    Terminal { rows, columns, term: term.as_bytes().to_vec() }
}
