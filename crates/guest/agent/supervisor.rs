//! The loop: one poll over the stream, the children's signals and every session's pipes. One thread, nothing blocks.

use alloc::vec::Vec;

use crate::device::{Source, Stream};
use crate::message::Poweroff;
use crate::peer::{Command, Peer};
use crate::session::{Channel, Session};
use crate::sys::{self, EAGAIN, EINTR, Fd, POLLERR, POLLHUP, POLLIN, POLLOUT, PollFd};
use crate::{init, report};

const STDIN_WINDOW: u32 = 64 * 1024;
/// A terminal's input queue holds 4095 bytes (`N_TTY_BUF_SIZE`); what comes on top while the agent does not run is lost on a
/// line without flow control.
const STDIN_WINDOW_NARROW: u32 = 2 * 1024;
const ANNOUNCE_EVERY_MS: i64 = 1000;
const REOPEN_FIRST_MS: i64 = 10;
/// An idle guest whose host has no use for the agent is to stay idle.
const REOPEN_MAX_MS: i64 = 5000;
/// How long sessions of a host that is gone may take to clean up between SIGHUP and SIGKILL.
const HANGUP_GRACE_MS: i64 = 500;
const READ_SIZE: usize = 16 * 1024;

pub struct Supervisor {
    source: Source,
    stream: Option<Stream>,
    /// Not before then is the stream opened, or polled again after a hang-up.
    retry_at: i64,
    retry_delay: i64,
    announce_at: i64,
    peer: Peer,
    children: Fd,
    sessions: Vec<Session>,
    /// Process groups that were hung up, and when they are killed.
    dying: Vec<(i32, i64)>,
    /// Whose turn it is to be served first.
    turn: usize,
}

/// What poll has said of the three kinds of files.
struct Ready {
    stream: i16,
    children: bool,
    sessions: Vec<(u32, Channel)>,
}

impl Supervisor {
    pub fn new(source: Source, children: Fd) -> Self {
        Self {
            source,
            stream: None,
            retry_at: 0,
            retry_delay: REOPEN_FIRST_MS,
            announce_at: 0,
            peer: Peer::new(crate::BUILD, STDIN_WINDOW),
            children,
            sessions: Vec::new(),
            dying: Vec::new(),
            turn: 0,
        }
    }

    /// Runs until an inherited stream ends.
    pub fn run(&mut self) {
        loop {
            let now = sys::monotonic_ms();
            if !self.keep_stream(now) {
                self.reset(now);
                self.bury(now.saturating_add(HANGUP_GRACE_MS));
                return;
            }
            let ready = self.wait(now);
            self.serve_stream(ready.stream);
            for (id, channel) in ready.sessions {
                self.serve_session(id, channel);
            }
            if ready.children {
                self.reap();
            }
            self.carry_out();
            self.settle();
            self.bury(sys::monotonic_ms());
        }
    }

    /// Opens the stream when it is due and announces the agent. False when it has ended for good.
    fn keep_stream(&mut self, now: i64) -> bool {
        if self.stream.is_none() && now >= self.retry_at {
            self.stream = self.source.open();
            if let Some(stream) = &self.stream {
                self.peer.set_stdin_window(if stream.narrow { STDIN_WINDOW_NARROW } else { STDIN_WINDOW });
                self.announce_at = now;
            } else {
                self.retry_at = now.saturating_add(self.retry_delay);
                self.retry_delay = longer(self.retry_delay);
            }
        }
        if self.stream.is_some() && !self.peer.is_up() && now >= self.announce_at {
            self.peer.announce();
            self.announce_at = now.saturating_add(ANNOUNCE_EVERY_MS);
        }
        self.stream.is_some() || !self.source.ends_once()
    }

    fn wait(&mut self, now: i64) -> Ready {
        let mut watched = Vec::new();
        let count = self.sessions.len();
        self.turn = self.turn.wrapping_add(1);
        for offset in 0..count {
            // The session served first may fill the stream: each gets its turn.
            self.sessions[self.turn.wrapping_add(offset) % count].watch(&self.peer, &mut watched);
        }
        let mut files: Vec<PollFd> = watched.iter().map(|&(file, ..)| file).collect();
        files.push(PollFd::new(&self.children, POLLIN));
        let polled = self.stream.as_ref().filter(|_| now >= self.retry_at);
        if let Some(stream) = polled {
            let out = if self.peer.pending().is_empty() { 0 } else { POLLOUT };
            files.push(PollFd::new(&stream.fd, POLLIN | out));
        }
        let stream_polled = polled.is_some();
        if sys::poll(&mut files, self.timeout(now, stream_polled)).is_err() {
            return Ready { stream: 0, children: true, sessions: Vec::new() };
        }
        let happened = |index: usize| files.get(index).map_or(0, |file| file.revents);
        let sessions = watched.iter().enumerate().filter(|&(index, _)| happened(index) != 0);
        Ready {
            stream: happened(watched.len().wrapping_add(1)),
            children: happened(watched.len()) != 0,
            sessions: sessions.map(|(_, &(_, id, channel))| (id, channel)).collect(),
        }
    }

    /// Milliseconds until something is due, -1 for never.
    fn timeout(&self, now: i64, stream_polled: bool) -> i64 {
        let retry = (!stream_polled).then_some(self.retry_at);
        let announce = (stream_polled && !self.peer.is_up()).then_some(self.announce_at);
        let kill = self.dying.iter().map(|&(_, at)| at).min();
        let next = [retry, announce, kill].into_iter().flatten().min();
        next.map_or(-1, |at| at.saturating_sub(now).max(0))
    }

    fn serve_stream(&mut self, events: i16) {
        let Some(stream) = &self.stream else { return };
        if events & POLLIN != 0 {
            let mut buffer = [0; READ_SIZE];
            match sys::read(&stream.fd, &mut buffer) {
                Ok(count) if count > 0 => {
                    self.retry_delay = REOPEN_FIRST_MS;
                    self.peer.receive(&buffer[..count]);
                }
                Err(EAGAIN | EINTR) => {}
                _ => return self.close_stream(),
            }
        } else if events & (POLLHUP | POLLERR) != 0 {
            // A port whose host side is closed: it stays open here, and is looked at again a little later.
            self.peer.disconnected();
            return self.pause_stream();
        }
        if events & POLLOUT != 0 {
            match sys::write(&stream.fd, self.peer.pending()) {
                Ok(count) => self.peer.sent(count),
                Err(EAGAIN | EINTR) => {}
                Err(_) => self.close_stream(),
            }
        }
    }

    fn pause_stream(&mut self) {
        self.retry_at = sys::monotonic_ms().saturating_add(self.retry_delay);
        self.retry_delay = longer(self.retry_delay);
    }

    fn close_stream(&mut self) {
        self.stream = None;
        self.peer.disconnected();
        self.pause_stream();
    }

    fn serve_session(&mut self, id: u32, channel: Channel) {
        if let Some(index) = self.sessions.iter().position(|session| session.id == id)
            && self.sessions[index].serve(&mut self.peer, channel)
        {
            self.sessions.swap_remove(index);
        }
    }

    fn reap(&mut self) {
        let mut buffer = [0; 1024];
        while sys::read(&self.children, &mut buffer).is_ok_and(|count| count > 0) {}
        while let Some((pid, status)) = sys::reap() {
            if let Some(session) = self.sessions.iter_mut().find(|session| session.pid == pid) {
                session.reaped(status);
            }
        }
    }

    fn carry_out(&mut self) {
        while let Some(command) = self.peer.next_command() {
            match command {
                Command::Reset => self.reset(sys::monotonic_ms()),
                Command::Exec(id, exec) => match Session::start(id, &exec) {
                    Ok(session) => self.sessions.push(session),
                    Err((failure, errno)) => self.peer.failed(id, failure, errno.0),
                },
                Command::Resize(id, rows, columns) => {
                    if let Some(session) = self.sessions.iter().find(|session| session.id == id) {
                        session.resize(rows, columns);
                    }
                }
                Command::Signal(id, number) => {
                    if let Some(session) = self.sessions.iter().find(|session| session.id == id) {
                        session.signal(number);
                    }
                }
                Command::Poweroff(how) => self.power_off(how),
                Command::SetTime(nanoseconds) => {
                    if sys::set_real_time(nanoseconds).is_err() {
                        report(&[b"cannot set the clock"]);
                    }
                }
            }
        }
    }

    fn power_off(&mut self, how: Poweroff) {
        if how == Poweroff::Immediate || sys::getpid() == 1 {
            init::power_off(how == Poweroff::Reboot);
        } else {
            init::ask_for_power_off(how == Poweroff::Reboot);
        }
    }

    /// Sends what ended processes left, and drops sessions that are over.
    fn settle(&mut self) {
        let peer = &mut self.peer;
        self.sessions.retain_mut(|session| {
            session.discard_unread(peer);
            !session.finish(peer)
        });
    }

    /// Hangs up all sessions.
    fn reset(&mut self, now: i64) {
        for session in self.sessions.drain(..) {
            session.signal(sys::SIGHUP);
            session.signal(sys::SIGCONT);
            if let Ok(pid) = i32::try_from(session.pid) {
                self.dying.push((pid, now.saturating_add(HANGUP_GRACE_MS)));
            }
        }
    }

    /// Kills the groups whose grace is over at `now`.
    fn bury(&mut self, now: i64) {
        self.dying.retain(|&(pid, at)| {
            let due = at <= now;
            if due {
                let _ = sys::kill(-pid, sys::SIGKILL);
            }
            !due
        });
    }
}

/// The delay after this one: 0.2 s after 1.3 s, 1 s after 8 s, the longest after 42 s.
fn longer(delay: i64) -> i64 {
    delay.saturating_add((delay / 8).max(REOPEN_FIRST_MS)).min(REOPEN_MAX_MS)
}
