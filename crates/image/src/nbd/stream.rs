//! A connection's bytes: a Unix or TCP socket, in the clear or under TLS. Both ends of the protocol use it.
//!
//! Any thread may send, one at a time ([`Stream::send`] takes a lock for as long as the bytes take); one thread receives.
//! Under TLS both go through the session's lock, which nobody holds while he waits for the peer: who receives must be able
//! to, so that a peer that answers before it listens on does not wait for ever.
//!
//! Lock order: `sending` or `records`, then the TLS session.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, sockopt};
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that a socket should hold for the peer: a batch of replies, so that a sender seldom waits.
const SOCKET_BYTES: usize = 4 << 20;
/// Bytes of TLS records that are taken from the socket at a time.
const RECORDS: usize = 64 << 10;

/// A connected socket.
pub struct Stream {
    socket: OwnedFd,
    /// Held while bytes are sent; under TLS, the records on their way from the session to the socket.
    sending: Mutex<Vec<u8>>,
    tls: Option<Mutex<rustls::Connection>>,
    /// Records that were taken from the socket, for the one who receives.
    records: Mutex<Records>,
}

/// What may be waited for, and how long.
pub type Deadline = Option<Instant>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The socket's sending half for the TLS library.
struct Raw<'a>(&'a Stream, Deadline);

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send_some(bytes, self.1)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn tls_error(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}

impl From<UnixStream> for Stream {
    fn from(socket: UnixStream) -> Self {
        Self::new(socket.into())
    }
}

impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Self {
        // Best effort: both only make it faster, or notice a peer that is gone.
        let _ = socket.set_nodelay(true);
        let _ = sockopt::set_socket_keepalive(&socket, true);
        Self::new(socket.into())
    }
}

impl Stream {
    fn new(socket: OwnedFd) -> Self {
        // Whoever may not have so much gets what the host allows.
        if sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BYTES).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(&socket, SOCKET_BYTES);
        }
        Self { socket, sending: Mutex::default(), tls: None, records: Mutex::default() }
    }

    /// Whether bytes are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Does the TLS handshake; everything goes through `session` from then on.
    pub fn start_tls(self, mut session: rustls::Connection, deadline: Deadline) -> io::Result<Self> {
        let mut records = Records::default();
        while session.is_handshaking() || session.wants_write() {
            while session.wants_write() {
                session.write_tls(&mut Raw(&self, deadline))?;
            }
            if session.is_handshaking() {
                let came = !records.have().is_empty()
                    || records.fill(|bytes| self.receive_raw(bytes, deadline))? > 0;
                if !came {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if let Err(error) = records.give(&mut session) {
                    // The alert tells the peer why.
                    let _ = session.write_tls(&mut Raw(&self, deadline));
                    return Err(error);
                }
            }
        }
        Ok(Self { tls: Some(Mutex::new(session)), records: Mutex::new(records), ..self })
    }

    /// Takes what has come, at least one byte unless the peer has ended the connection; waits until `deadline`.
    pub fn receive(&self, into: &mut [u8], deadline: Deadline) -> io::Result<usize> {
        match &self.tls {
            None => self.receive_raw(into, deadline),
            Some(session) => {
                let mut records = lock(&self.records);
                loop {
                    if let Some(count) = self.decrypt(session, &mut records, into)? {
                        return Ok(count);
                    }
                    if records.fill(|bytes| self.receive_raw(bytes, deadline))? == 0 {
                        return Ok(0);
                    }
                }
            }
        }
    }

    /// Takes what has come, if anything has: `None` if nothing has.
    pub fn receive_now(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        match &self.tls {
            None => self.receive_raw_now(into),
            Some(session) => {
                let mut records = lock(&self.records);
                if let Some(count) = self.decrypt(session, &mut records, into)? {
                    return Ok(Some(count));
                }
                let mut nothing = false;
                let count = records.fill(|bytes| {
                    let count = self.receive_raw_now(bytes)?;
                    nothing = count.is_none();
                    Ok(count.unwrap_or(0))
                })?;
                match count {
                    0 => Ok(if nothing { None } else { Some(0) }),
                    _ => self.decrypt(session, &mut records, into),
                }
            }
        }
    }

    /// Decrypts what has come, no more than the session has room for at a time; `None` if it is no whole record, zero at
    /// the session's end.
    fn decrypt(
        &self,
        session: &Mutex<rustls::Connection>,
        records: &mut Records,
        into: &mut [u8],
    ) -> io::Result<Option<usize>> {
        let mut session = lock(session);
        loop {
            match session.reader().read(into) {
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if records.have().is_empty() {
                return Ok(None);
            }
            // What the session wants to say to that (new keys) goes along with the next bytes that are sent.
            records.give(&mut session)?;
        }
    }

    fn receive_raw_now(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match recv(&self.socket, &mut *into, RecvFlags::DONTWAIT) {
                Ok((_, count)) => return Ok(Some(count)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive_raw(&self, into: &mut [u8], deadline: Deadline) -> io::Result<usize> {
        loop {
            if deadline.is_some() {
                if let Some(count) = self.receive_raw_now(into)? {
                    return Ok(count);
                }
                self.wait(PollFlags::IN, deadline)?;
                continue;
            }
            match recv(&self.socket, &mut *into, RecvFlags::empty()) {
                Ok((_, count)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until the socket is ready or the deadline has come, which is an error.
    fn wait(&self, how: PollFlags, deadline: Deadline) -> io::Result<()> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let left = left.map(timespec);
            let mut fds = [PollFd::new(&self.socket, how)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send_some(&self, bytes: &[u8], deadline: Deadline) -> io::Result<usize> {
        let how = if deadline.is_some() { SendFlags::DONTWAIT } else { SendFlags::empty() };
        loop {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL | how) {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends all of the bytes, with nobody else's between; gives up at the deadline, after which the connection is of no
    /// use any more.
    pub fn send(&self, parts: &[&[u8]], deadline: Deadline) -> io::Result<()> {
        let mut encrypted = lock(&self.sending);
        let Some(session) = &self.tls else { return self.send_raw(parts, deadline) };
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                encrypted.clear();
                let count = {
                    let mut session = lock(session);
                    let count = session.writer().write(rest)?;
                    while session.wants_write() {
                        session.write_tls(&mut *encrypted)?;
                    }
                    count
                };
                self.send_raw(&[&encrypted], deadline)?;
                rest = rest.get(count..).unwrap_or_default();
            }
        }
        Ok(())
    }

    fn send_raw(&self, parts: &[&[u8]], deadline: Deadline) -> io::Result<()> {
        let mut sent = 0;
        if parts.len() > 1 {
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let wait = if deadline.is_some() { SendFlags::DONTWAIT } else { SendFlags::empty() };
            let how = SendFlags::NOSIGNAL | wait;
            sent = match sendmsg(&self.socket, &slices, &mut SendAncillaryBuffer::default(), how) {
                // Below they go one by one, with patience.
                Err(Errno::INTR | Errno::AGAIN) => 0,
                other => other?,
            };
        }
        for part in parts {
            let before = sent.min(part.len());
            sent = sent.saturating_sub(before);
            let mut rest = part.get(before..).unwrap_or_default();
            while !rest.is_empty() {
                let count = self.send_some(rest, deadline)?;
                rest = rest.get(count..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Nothing more is received: who waits for bytes sees the connection's end. What is under way can be answered.
    pub fn end_receiving(&self) {
        // A socket that is not connected any more needs no shutdown.
        let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Read);
    }

    /// Whether the peer has ended the connection, and nothing of what it sent is left to be received.
    pub fn is_at_end(&self) -> bool {
        let mut byte = [0];
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recv(&self.socket, &mut byte, peek) {
            Ok((_, count)) => count == 0,
            Err(error) => !matches!(error, Errno::AGAIN | Errno::INTR),
        }
    }

    /// Ends the connection at once, whoever uses it.
    pub fn cut(&self) {
        let _ = rustix::net::shutdown(self.socket.as_fd(), Shutdown::Both);
    }

    /// Says farewell to the peer.
    pub fn close(&self) {
        if let Some(session) = &self.tls {
            let mut encrypted = lock(&self.sending);
            encrypted.clear();
            {
                let mut session = lock(session);
                session.send_close_notify();
                while session.wants_write() && session.write_tls(&mut *encrypted).is_ok() {}
            }
            let deadline = Instant::now().checked_add(Duration::from_secs(1));
            // A peer that is gone needs no farewell.
            let _ = self.send_raw(&[&encrypted], deadline);
        }
        self.cut();
    }
}

/// TLS records on their way from the socket to the session.
#[derive(Default)]
struct Records {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Records {
    fn have(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Takes more, once all that was there is given on.
    fn fill(&mut self, receive: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        self.bytes.resize(RECORDS, 0);
        (self.start, self.end) = (0, 0);
        self.end = receive(&mut self.bytes)?;
        Ok(self.end)
    }

    /// Gives as much to the session as it takes at once.
    fn give(&mut self, session: &mut rustls::Connection) -> io::Result<()> {
        let mut bytes = self.have();
        let count = session.read_tls(&mut bytes)?;
        self.start = if count == 0 { self.end } else { self.start.saturating_add(count) };
        session.process_new_packets().map_err(tls_error)?;
        Ok(())
    }
}

/// For system calls.
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
