//! One running command: its process, its pipes or terminal, and the bytes between them and the link.

use alloc::vec::Vec;

use crate::message::{Ending, Exec, Failure, Stream};
use crate::peer::Peer;
use crate::spawn;
use crate::sys::{self, EAGAIN, EINTR, Errno, Fd, POLLIN, POLLOUT, PollFd};

const END_OF_FILE_CHARACTER: u8 = 4;

/// Something of a session's that the supervisor waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Status,
    Stdin,
    Output(Stream),
}

/// A command that runs, or has run and whose output is not all sent.
pub struct Session {
    pub id: u32,
    pub pid: u32,
    /// Open until exec has succeeded.
    status: Option<Fd>,
    stdin: Option<Fd>,
    stdout: Option<Fd>,
    stderr: Option<Fd>,
    terminal: bool,
    end_typed: bool,
    /// Set when the process was reaped.
    ending: Option<Ending>,
}

impl Session {
    pub fn start(id: u32, exec: &Exec) -> Result<Self, (Failure, Errno)> {
        let child = spawn::start(exec)?;
        Ok(Self {
            id,
            pid: child.pid,
            status: Some(child.status),
            stdin: Some(child.stdin),
            stdout: Some(child.stdout),
            stderr: child.stderr,
            terminal: exec.terminal.is_some(),
            end_typed: false,
            ending: None,
        })
    }

    /// Takes note of a wait status (wait(2)).
    pub fn reaped(&mut self, status: u32) {
        let signal = (status & 0x7f) as u8;
        let ending = if signal == 0 { Ending::Code((status >> 8) as u8) } else { Ending::Signal(signal) };
        self.ending = Some(ending);
    }

    /// Appends what to wait for.
    pub fn watch(&self, peer: &Peer, watched: &mut Vec<(PollFd, u32, Channel)>) {
        let mut add = |fd: &Option<Fd>, events, channel| {
            if let Some(fd) = fd {
                watched.push((PollFd::new(fd, events), self.id, channel));
            }
        };
        if self.status.is_some() {
            return add(&self.status, POLLIN, Channel::Status);
        }
        let (bytes, ended) = peer.stdin(self.id);
        if !bytes.is_empty() || (ended && !self.end_typed) {
            add(&self.stdin, POLLOUT, Channel::Stdin);
        }
        for (fd, stream) in [(&self.stdout, Stream::Stdout), (&self.stderr, Stream::Stderr)] {
            if peer.room(self.id, stream) > 0 {
                add(fd, POLLIN, Channel::Output(stream));
            }
        }
    }

    /// Moves bytes where poll has said that there are some. True when the session is over.
    pub fn serve(&mut self, peer: &mut Peer, channel: Channel) -> bool {
        match channel {
            Channel::Status => return self.resolve_start(peer),
            Channel::Stdin => self.feed(peer),
            Channel::Output(stream) => {
                self.drain_once(peer, stream);
            }
        }
        false
    }

    /// Exec has succeeded or failed. True when the session is over.
    fn resolve_start(&mut self, peer: &mut Peer) -> bool {
        let Some(status) = self.status.take() else { return false };
        match spawn::read_report(&status) {
            Some((failure, errno)) => {
                peer.failed(self.id, failure, errno.0);
                true
            }
            None => {
                peer.started(self.id, self.pid);
                false
            }
        }
    }

    /// Gives waiting input to the process.
    fn feed(&mut self, peer: &mut Peer) {
        let Some(fd) = &self.stdin else { return };
        let (bytes, ended) = peer.stdin(self.id);
        if !bytes.is_empty() {
            match sys::write(fd, bytes) {
                Ok(count) => peer.stdin_taken(self.id, count),
                Err(EAGAIN | EINTR) => return,
                Err(_) => self.stdin = None,
            }
        }
        let (bytes, _) = peer.stdin(self.id);
        if !(ended && bytes.is_empty()) {
            return;
        }
        match &self.stdin {
            // A terminal stays open for resizing; its reader is told as a person would.
            Some(fd) if self.terminal => {
                self.end_typed = sys::write(fd, &[END_OF_FILE_CHARACTER]) != Err(EAGAIN)
            }
            _ => self.stdin = None,
        }
    }

    /// Input for which there is no reader any more is thrown away, so that the host does not wait for ever.
    pub fn discard_unread(&mut self, peer: &mut Peer) {
        if self.stdin.is_none() {
            loop {
                let count = peer.stdin(self.id).0.len();
                if count == 0 {
                    return;
                }
                peer.stdin_taken(self.id, count);
            }
        }
    }

    /// Sends one piece of output. False when there is none now, or never again.
    fn drain_once(&mut self, peer: &mut Peer, stream: Stream) -> bool {
        let slot = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        let Some(fd) = slot else { return false };
        let mut buffer = [0; crate::wire::DATA_MAX];
        let room = peer.room(self.id, stream);
        if room == 0 {
            return false; // Another session's output has just taken it. (Reading 0 bytes would look like an end.)
        }
        match sys::read(fd, &mut buffer[..room]) {
            Ok(count) if count > 0 => {
                peer.output(self.id, stream, buffer[..count].to_vec());
                true
            }
            Err(EINTR) => true,
            Err(EAGAIN) => false,
            // A pipe without writers, or (EIO) a terminal whose users are gone.
            _ => {
                *slot = None;
                false
            }
        }
    }

    /// When the process has ended: sends what it left in its pipes, then how it ended. What processes that it left behind
    /// write later is not waited for. True when the session is over.
    pub fn finish(&mut self, peer: &mut Peer) -> bool {
        let Some(ending) = self.ending else { return false };
        if self.resolve_start(peer) {
            return true;
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let open = match stream {
                Stream::Stdout => self.stdout.is_some(),
                Stream::Stderr => self.stderr.is_some(),
            };
            if !open {
                continue;
            }
            loop {
                if peer.room(self.id, stream) == 0 {
                    return false;
                }
                if !self.drain_once(peer, stream) {
                    break;
                }
            }
        }
        peer.exited(self.id, ending);
        true
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        if let Some(fd) = self.stdin.as_ref().filter(|_| self.terminal) {
            let _ = sys::resize_terminal(fd, rows, columns);
        }
    }

    /// Signals the process group, while there is a process whose number it is.
    pub fn signal(&self, number: u8) {
        if self.ending.is_none()
            && let Ok(pid) = i32::try_from(self.pid)
        {
            // The group is there once the child has called setsid.
            let _ = sys::kill(-pid, number).or_else(|_| sys::kill(pid, number));
        }
    }
}
