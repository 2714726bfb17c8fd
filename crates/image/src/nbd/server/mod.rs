//! A server of disks.
//!
//! ```text
//!  Listener ---- accept ----> a thread for each connection: negotiate, then transmit
//!                                  |  reads and writes that are quick: done there
//!                                  |  the rest: threads of the connection (link)
//!                                  v
//!                             Export -> Disk, shared by all connections without a lock
//! ```
//!
//! A hostile client costs its own connection: a handshake has a deadline, options, strings and payloads have lengths,
//! what waits is bounded, and the number of connections is. A client that reads no replies gets none, and its requests
//! are not taken.
//!
//! Lock order: the list of connections, then nothing. A link's locks: see `link` and `stream`.

#[cfg(test)]
mod end_test;
mod export;
mod link;
mod negotiate;
mod now;
mod perform;
mod poll;
mod reply;
#[cfg(test)]
pub(in crate::nbd) mod test;
mod transmit;
mod waited;

pub use export::Export;

use super::input::Input;
use super::stream::Stream;
use super::tls::Tls;
use super::wire;
use crate::disk::Error;
use link::{Counters, Link};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What clients may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; more wait until one ends.
    pub connections_max: usize,
    /// Seconds that a handshake may take.
    pub handshake_seconds_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections_max: 64, handshake_seconds_max: 30 }
    }
}

/// What a server has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Connections now.
    pub connections: usize,
    /// Connections ever.
    pub connections_ever: u64,
    /// Requests.
    pub requests: u64,
    /// Bytes that were read.
    pub read: u64,
    /// Bytes that were written.
    pub written: u64,
}

/// Binds a Unix socket. One at which nobody listens any more makes room; anything else that is there stays, and is an error
/// (connecting to a file is refused, too).
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    let nobody = || {
        let refused = std::os::unix::net::UnixStream::connect(path);
        refused.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    if is_socket && nobody() {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

/// Where clients come in.
pub enum Listener {
    /// A Unix socket; its file, known by device and inode, goes with the listener.
    Unix(UnixListener, PathBuf, (u64, u64)),
    /// A TCP port.
    Tcp(TcpListener),
}

impl Listener {
    /// Makes a Unix socket. A socket that nobody listens at any more is replaced; anything else that is there is not.
    pub fn unix(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Io { path: path.to_path_buf(), source };
        let listener = bind(path).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let file = identity(path).map_err(fail)?;
        Ok(Self::Unix(listener, path.to_path_buf(), file))
    }

    /// Listens at a TCP address; port 0 is any free one.
    pub fn tcp(address: SocketAddr) -> Result<Self, Error> {
        let fail = |source| Error::Io { path: address.to_string().into(), source };
        let listener = TcpListener::bind(address).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Self::Tcp(listener))
    }

    /// The TCP address, if it is one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix(..) => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, ..) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Unix(listener, ..) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.into()
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.into()
            }
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path, file) = self {
            // Somebody may have removed it already, and put another one there.
            if identity(path).is_ok_and(|found| found == *file) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// What tells a file from all others: device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// What all threads of a server share.
struct Shared {
    exports: Vec<Arc<Export>>,
    limits: Limits,
    tls: Tls,
    stopping: AtomicBool,
    /// Readable once the server stops.
    stop: OwnedFd,
    connections: Mutex<Connections>,
    /// A connection has ended.
    ended: Condvar,
    connections_ever: AtomicU64,
}

#[derive(Default)]
struct Connections {
    /// Those that transmit.
    links: HashMap<u64, Arc<Link>>,
    /// All of them.
    count: usize,
    next: u64,
    /// What those did that are gone.
    done: Statistics,
}

impl Shared {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let named = self.exports.iter().find(|export| export.name == name);
        // One export alone is also the default one.
        let only = || self.exports.first().filter(|_| name.is_empty() && self.exports.len() == 1);
        named.or_else(only).cloned()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place among the connections; `false` if the server stops.
    fn enter(&self) -> bool {
        let full = |connections: &mut Connections| {
            connections.count >= self.limits.connections_max && !self.is_stopping()
        };
        let connections = self.connections();
        let mut connections =
            self.ended.wait_while(connections, full).unwrap_or_else(PoisonError::into_inner);
        if self.is_stopping() {
            return false;
        }
        connections.count = connections.count.saturating_add(1);
        true
    }

    fn leave(&self) {
        let mut connections = self.connections();
        connections.count = connections.count.saturating_sub(1);
        self.ended.notify_all();
    }

    fn serve(&self, stream: Stream) -> io::Result<()> {
        let deadline = Instant::now().checked_add(Duration::from_secs(self.limits.handshake_seconds_max));
        let input = Input::new(transmit::INPUT);
        let Some(session) = negotiate::negotiate(self, stream, input, deadline)? else { return Ok(()) };
        let link = Arc::new(Link::new(session.stream, session.export, session.mode, session.contexts));
        let number = {
            let mut connections = self.connections();
            // Looked at under the lock: whoever stops the server finds all links, or these see that it stops.
            if self.is_stopping() {
                return Ok(());
            }
            connections.next = connections.next.wrapping_add(1);
            let number = connections.next;
            connections.links.insert(number, link.clone());
            number
        };
        self.connections_ever.fetch_add(1, Ordering::Relaxed);
        let served = transmit::serve(&link, session.input);
        link.stream.close();
        let mut connections = self.connections();
        connections.links.remove(&number);
        connections.done.add(&link.counters);
        self.ended.notify_all();
        served
    }
}

impl Statistics {
    fn add(&mut self, counters: &Counters) {
        let add = |sum: &mut u64, more: &AtomicU64| *sum = sum.saturating_add(more.load(Ordering::Relaxed));
        add(&mut self.requests, &counters.requests);
        add(&mut self.read, &counters.read);
        add(&mut self.written, &counters.written);
    }
}

/// See the module. Clones are the same server.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

impl Server {
    /// A server of these disks; their names must differ.
    pub fn new(exports: Vec<Export>, limits: Limits, tls: Tls) -> Result<Self, Error> {
        for (number, export) in exports.iter().enumerate() {
            let before = exports.get(..number).unwrap_or_default();
            if before.iter().any(|other| other.name == export.name) {
                return Err(Error::Options(format!("two exports have the name {:?}", export.name)));
            }
            let long = [&export.name, &export.description].iter().any(|text| text.len() > wire::STRING_MAX);
            if long || export.name.contains('\0') || export.description.contains('\0') {
                return Err(Error::Options(format!("{:?} is no name for an export", export.name)));
            }
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = stop.map_err(|error| Error::Options(format!("cannot make an event: {error}")))?;
        Ok(Self {
            shared: Arc::new(Shared {
                exports: exports.into_iter().map(Arc::new).collect(),
                limits,
                tls,
                stopping: AtomicBool::new(false),
                stop,
                connections: Mutex::default(),
                ended: Condvar::new(),
                connections_ever: AtomicU64::new(0),
            }),
        })
    }

    /// Takes clients until the server is stopped.
    pub fn accept(&self, listener: &Listener) -> io::Result<()> {
        while let Some(stream) = self.next_client(listener)? {
            let server = self.clone();
            let thread = std::thread::Builder::new().name("nbd-client".into());
            let spawned = thread.spawn(move || {
                // What a client does wrong ends its connection, and concerns nobody else.
                let _ = server.shared.serve(stream);
                server.shared.leave();
            });
            if spawned.is_err() {
                self.shared.leave();
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// The next client, which has a place; `None` when the server stops. Clients for whom there is none wait at the door.
    fn next_client(&self, listener: &Listener) -> io::Result<Option<Stream>> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(listener.fd(), PollFlags::IN),
                PollFd::new(&self.shared.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // Only who has a client takes a place: other listeners need them too.
            if self.shared.is_stopping() || !self.shared.enter() {
                return Ok(None);
            }
            let refused = match listener.accept() {
                Ok(stream) => return Ok(Some(stream)),
                Err(error) => error,
            };
            self.shared.leave();
            if refused.kind() != io::ErrorKind::WouldBlock {
                // A client that left early, or no descriptors for the moment.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Serves one client in this thread, until it leaves or does something that ends its connection.
    pub fn serve(&self, stream: Stream) -> io::Result<()> {
        self.shared.serve(stream)
    }

    /// Takes no more clients and no more requests; returns when all that had begun is answered.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        self.shared.ended.notify_all();
        let mut connections = self.shared.connections();
        connections.links.values().for_each(|link| link.end());
        while !connections.links.is_empty() {
            let waited = self.shared.ended.wait_timeout(connections, Duration::from_secs(10));
            let (left, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            connections = left;
            if timeout.timed_out() {
                // Clients that take no replies do not hold the server.
                connections.links.values().for_each(|link| link.stream.cut());
            }
        }
    }

    /// What it has done so far.
    pub fn statistics(&self) -> Statistics {
        let connections = self.shared.connections();
        let mut sum = connections.done;
        connections.links.values().for_each(|link| sum.add(&link.counters));
        sum.connections = connections.links.len();
        sum.connections_ever = self.shared.connections_ever.load(Ordering::Relaxed);
        sum
    }
}
