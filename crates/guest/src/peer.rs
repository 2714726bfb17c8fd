//! The agent's half of the protocol, without system calls (`no_std` with `alloc`): the agent feeds it the stream's bytes, carries
//! out the commands that come of them, and hands it what the commands' processes write.
//!
//! The link is *down* until a `Hello` of the host's and whenever bytes were lost; going down ends all sessions. Memory is
//! bounded: a session holds at most its window of standard input, and [`Peer::room`] is 0 while enough waits to be sent.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::message::{Ending, Exec, Failure, Poweroff, Stream, ToAgent, ToHost, VERSION};
use crate::wire::{DATA_MAX, Decoder, Outbox, REQUEST_MAX};

/// How many sessions there may be at a time.
pub const SESSIONS_MAX: usize = 64;
/// Output is taken from processes only while less than this waits to be sent.
const OUT_HIGH: usize = 64 * 1024;

/// What the agent shall do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// End all sessions: their host is gone.
    Reset,
    /// Start a command; answer with [`Peer::started`] or [`Peer::failed`].
    Exec(u32, Exec),
    /// Set a terminal's size: rows, columns.
    Resize(u32, u16, u16),
    /// Send a signal to a session's process group.
    Signal(u32, u8),
    /// Switch the guest off.
    Poweroff(Poweroff),
    /// Set the clock (nanoseconds since 1970).
    SetTime(u64),
}

#[derive(Debug)]
struct Session {
    id: u32,
    stdin: VecDeque<u8>,
    stdin_ended: bool,
    /// Consumed bytes of stdin that the host has not been told of yet.
    stdin_owed: u32,
    stdout_credit: u32,
    stderr_credit: u32,
}

/// The agent's half of the protocol.
#[derive(Debug)]
pub struct Peer {
    decoder: Decoder,
    outbox: Outbox,
    up: bool,
    build: u64,
    stdin_window: u32,
    sessions: Vec<Session>,
    commands: VecDeque<Command>,
}

impl Peer {
    /// An agent of this build whose sessions each take `stdin_window` bytes ahead.
    pub fn new(build: u64, stdin_window: u32) -> Self {
        Self {
            decoder: Decoder::new(REQUEST_MAX),
            outbox: Outbox::default(),
            up: false,
            build,
            stdin_window,
            sessions: Vec::new(),
            commands: VecDeque::new(),
        }
    }

    /// Whether a host has greeted and all bytes have come through since.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// How many bytes sessions take ahead on the stream opened next.
    pub fn set_stdin_window(&mut self, bytes: u32) {
        self.stdin_window = bytes;
    }

    /// Bytes for the stream.
    pub fn pending(&self) -> &[u8] {
        self.outbox.pending()
    }

    /// The stream took `count` bytes.
    pub fn sent(&mut self, count: usize) {
        self.outbox.advance(count);
    }

    /// Says "here I am", unless something waits to be sent anyway. For a link that is down: once when the stream opens, then
    /// from time to time.
    pub fn announce(&mut self) {
        if self.outbox.is_empty() {
            self.outbox.delimiter();
            ToHost::Announce.send(0, &mut self.outbox);
        }
    }

    /// The stream has gone away: what waited for it is void.
    pub fn disconnected(&mut self) {
        self.outbox.clear();
        self.decoder.reset();
        self.go_down();
    }

    fn go_down(&mut self) {
        self.up = false;
        self.sessions.clear();
        self.commands.clear();
        self.commands.push_back(Command::Reset);
    }

    /// Bytes were lost, or the host broke the rules: start over.
    fn lose(&mut self) {
        if self.up {
            self.outbox.clear();
            self.go_down();
            self.announce();
        }
    }

    /// Takes bytes from the stream.
    pub fn receive(&mut self, mut bytes: &[u8]) {
        loop {
            let frame = self.decoder.feed(&mut bytes);
            if self.decoder.take_noise() {
                self.lose();
            }
            let Some(frame) = frame else { return };
            match ToAgent::decode(frame) {
                Some((_, ToAgent::Hello { version: _, nonce })) => self.greet(nonce),
                Some((session, message)) if self.up => self.obey(session, message),
                None => self.lose(),
                Some(_) => {}
            }
        }
    }

    fn greet(&mut self, nonce: u64) {
        self.outbox.clear();
        self.go_down();
        self.up = true;
        self.outbox.delimiter();
        // The host compares the versions: it is the one who can tell somebody.
        let (build, stdin_window) = (self.build, self.stdin_window);
        ToHost::Ready { version: VERSION, nonce, build, stdin_window }.send(0, &mut self.outbox);
    }

    fn obey(&mut self, id: u32, message: ToAgent) {
        match message {
            ToAgent::Hello { .. } => {}
            ToAgent::Exec(exec) => self.open(id, exec),
            ToAgent::Poweroff(how) => self.commands.push_back(Command::Poweroff(how)),
            ToAgent::SetTime(nanoseconds) => self.commands.push_back(Command::SetTime(nanoseconds)),
            ToAgent::Ping(number) => {
                if self.outbox.len() < OUT_HIGH {
                    ToHost::Pong(number).send(0, &mut self.outbox);
                }
            }
            ToAgent::Resize(rows, columns) => self.commands.push_back(Command::Resize(id, rows, columns)),
            ToAgent::Signal(number) => self.commands.push_back(Command::Signal(id, number)),
            ToAgent::Stdin(bytes) => {
                let window = usize::try_from(self.stdin_window).unwrap_or(usize::MAX);
                // A session that has just ended is no fault of the host's: it has not heard of it yet.
                let Some(session) = self.session(id) else { return };
                if session.stdin_ended || session.stdin.len().saturating_add(bytes.len()) > window {
                    self.lose();
                } else {
                    session.stdin.extend(bytes);
                }
            }
            ToAgent::StdinEof => {
                if let Some(session) = self.session(id) {
                    session.stdin_ended = true;
                }
            }
            ToAgent::Credit(stream, count) => {
                if let Some(session) = self.session(id) {
                    let credit = session.credit(stream);
                    *credit = credit.saturating_add(count);
                }
            }
        }
    }

    fn open(&mut self, id: u32, exec: Exec) {
        if id == 0 || exec.argv.is_empty() || self.session(id).is_some() {
            self.lose();
        } else if self.sessions.len() >= SESSIONS_MAX {
            const EAGAIN: u32 = 11;
            ToHost::Failed(Failure::Resources, EAGAIN).send(id, &mut self.outbox);
        } else {
            self.sessions.push(Session {
                id,
                stdin: VecDeque::new(),
                stdin_ended: false,
                stdin_owed: 0,
                stdout_credit: exec.output_window,
                stderr_credit: exec.output_window,
            });
            self.commands.push_back(Command::Exec(id, exec));
        }
    }

    fn session(&mut self, id: u32) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }

    /// The next thing to do.
    pub fn next_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// Standard input that waits for a session's process, and whether nothing comes after it.
    pub fn stdin(&self, id: u32) -> (&[u8], bool) {
        match self.sessions.iter().find(|session| session.id == id) {
            Some(session) => {
                let (front, back) = session.stdin.as_slices();
                (front, session.stdin_ended && back.is_empty())
            }
            None => (&[], true),
        }
    }

    /// The process took `count` bytes of standard input, or will never take them.
    pub fn stdin_taken(&mut self, id: u32, count: usize) {
        let window = self.stdin_window;
        let Some(session) = self.sessions.iter_mut().find(|session| session.id == id) else { return };
        let count = count.min(session.stdin.len());
        session.stdin.drain(..count);
        session.stdin_owed = session.stdin_owed.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        let worth_telling = session.stdin_owed >= window / 2 || session.stdin.is_empty();
        if worth_telling && session.stdin_owed > 0 {
            let owed = core::mem::take(&mut session.stdin_owed);
            if !session.stdin_ended {
                ToHost::Credit(owed).send(id, &mut self.outbox);
            }
        }
    }

    /// How many bytes of output may be given to [`Peer::output`] now.
    pub fn room(&self, id: u32, stream: Stream) -> usize {
        if self.outbox.len() >= OUT_HIGH {
            return 0;
        }
        let Some(session) = self.sessions.iter().find(|session| session.id == id) else { return 0 };
        let credit = match stream {
            Stream::Stdout => session.stdout_credit,
            Stream::Stderr => session.stderr_credit,
        };
        usize::try_from(credit).unwrap_or(usize::MAX).min(DATA_MAX)
    }

    /// Sends what a process wrote, not more than [`Peer::room`] bytes.
    pub fn output(&mut self, id: u32, stream: Stream, bytes: Vec<u8>) {
        let Some(session) = self.session(id) else { return };
        let credit = session.credit(stream);
        *credit = credit.saturating_sub(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        if !bytes.is_empty() {
            ToHost::Output(stream, bytes).send(id, &mut self.outbox);
        }
    }

    /// The command runs.
    pub fn started(&mut self, id: u32, pid: u32) {
        if self.session(id).is_some() {
            ToHost::Started(pid).send(id, &mut self.outbox);
        }
    }

    /// The command has ended and all its output was given to [`Peer::output`].
    pub fn exited(&mut self, id: u32, ending: Ending) {
        self.close(id, &ToHost::Exit(ending));
    }

    /// The command could not be started.
    pub fn failed(&mut self, id: u32, failure: Failure, errno: u32) {
        self.close(id, &ToHost::Failed(failure, errno));
    }

    fn close(&mut self, id: u32, message: &ToHost) {
        if let Some(index) = self.sessions.iter().position(|session| session.id == id) {
            self.sessions.swap_remove(index);
            message.send(id, &mut self.outbox);
        }
    }
}

impl Session {
    fn credit(&mut self, stream: Stream) -> &mut u32 {
        match stream {
            Stream::Stdout => &mut self.stdout_credit,
            Stream::Stderr => &mut self.stderr_credit,
        }
    }
}
