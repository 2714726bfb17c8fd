//! Others' exports as storage: any format can lie on one, raw above all.
//!
//! ```text
//!  Storage calls, any thread --> a connection (by the thread, up to four where the server allows several)
//!                                   |  lost? connect again, for a while, and ask again
//!                                   v
//!                                 Pipe: many requests under way, one of those who wait receives
//! ```
//!
//! Every request may be asked twice: each leaves the same content. (One that was given up for lost may still run at the
//! server, and reach the disk after a later one.) What a server had acknowledged and not made stable may be lost with its
//! connection: with its host it is, and with its process where that kept a format's tables in memory. Nobody here can tell.
//! So where a connection is replaced after such writes the next flush fails, once, as fsync(2) does; connections that end
//! together are one loss.
//!
//! Lock order: `edges`, then a place's lock (held while connecting), then another place's, if that is free. A pipe's locks: see `pipe`.

mod pipe;
mod session;
#[cfg(test)]
pub(in crate::nbd) mod test;

use super::stream::Stream;
use super::tls::ClientTls;
use super::uri::{Place, Uri};
use super::wire::{Mode, Request, allocation, command, flag};
use crate::Error;
use crate::buffers::Buffers;
use crate::endian::size;
use crate::storage::{Extent, Storage};
use pipe::{Answer, Failure, Pipe};
use session::Terms;
use std::cell::Cell;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Connections to a server that allows several.
const CONNECTIONS: usize = 4;
/// Seconds that a server may take to answer, where nobody says how many.
const TIMEOUT_SECONDS: u64 = 60;
/// Seconds that a lost server is looked for, where nobody says how many.
const RECONNECT_SECONDS: u64 = 30;
/// Bytes of one request without a payload where lengths have 32 bits.
const SHORT_MAX: u64 = 1 << 30;
/// Pauses between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Parameters of URIs that are known.
const PARAMETERS: [&str; 4] = ["timeout", "reconnect", "tls-certificates", "tls-hostname"];

static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static LANE: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed));
}

/// An export of somebody else's server.
pub struct NbdStorage {
    /// Where to look for a lost server.
    target: Option<Target>,
    terms: Terms,
    read_only: bool,
    timeout: Duration,
    reconnect: Duration,
    places: Vec<Mutex<Option<Arc<Pipe>>>>,
    /// Held for writing while a block is read, changed and written; by all other writers for reading. Only of use where
    /// the server wants whole blocks.
    edges: RwLock<()>,
    /// Changes that were acknowledged, ever.
    acknowledged: Arc<AtomicU64>,
    /// Those of them that a flush has made stable.
    stable: AtomicU64,
    /// Connections that were replaced after changes that were not stable.
    losses: AtomicU64,
    /// Those of them that a flush has told of.
    told: AtomicU64,
}

fn seconds(uri: &Uri, name: &str, usual: u64) -> Result<Duration, Error> {
    match uri.parameter(name) {
        None => Ok(Duration::from_secs(usual)),
        Some(text) => {
            let number = text.parse().map(Duration::from_secs);
            number.map_err(|_| Error::Options(format!("{name}={text}: a number of seconds")))
        }
    }
}

impl NbdStorage {
    /// Connects to an export. Parameters of the URI beside those of the standard: `timeout` and `reconnect`, in seconds.
    pub fn connect(uri: &Uri, read_only: bool) -> Result<Self, Error> {
        if let Some((name, _)) = uri.parameters.iter().find(|(name, _)| !PARAMETERS.contains(&name.as_str()))
        {
            return Err(Error::Options(format!("{uri}: the parameter {name:?} is not known")));
        }
        let target = Target { uri: uri.clone(), tls: tls_of(uri)?, addresses: Mutex::default() };
        let timeout = seconds(uri, "timeout", TIMEOUT_SECONDS)?.max(Duration::from_secs(1));
        let reconnect = seconds(uri, "reconnect", RECONNECT_SECONDS)?;
        let fail = |source| Error::Open { path: PathBuf::from(uri.to_string()), source };
        let acknowledged = Arc::default();
        let first = target.open(timeout, &acknowledged).map_err(fail)?;
        let terms = first.terms;
        if !read_only && terms.flags & flag::READ_ONLY != 0 {
            return Err(fail(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the export is read-only")));
        }
        let count = if terms.flags & flag::CAN_MULTI_CONN != 0 { CONNECTIONS } else { 1 };
        let mut places: Vec<Mutex<Option<Arc<Pipe>>>> = (0..count).map(|_| Mutex::default()).collect();
        let mine = LANE.get().checked_rem(count).unwrap_or(0);
        if let Some(place) = places.get_mut(mine) {
            *place = Mutex::new(Some(Arc::new(first)));
        }
        Ok(Self {
            target: Some(target),
            terms,
            read_only,
            timeout,
            reconnect,
            places,
            edges: RwLock::default(),
            acknowledged,
            stable: AtomicU64::default(),
            losses: AtomicU64::default(),
            told: AtomicU64::default(),
        })
    }

    /// An export over a connection that there is already; when it is lost, all fails.
    pub fn over(stream: Stream, export: &str, read_only: bool) -> io::Result<Self> {
        let timeout = Duration::from_secs(TIMEOUT_SECONDS);
        let session = session::open(stream, export, None, Instant::now().checked_add(timeout))?;
        let acknowledged = Arc::<AtomicU64>::default();
        let pipe = Pipe::new(session, timeout, acknowledged.clone());
        Ok(Self {
            target: None,
            terms: pipe.terms,
            read_only: read_only || pipe.terms.flags & flag::READ_ONLY != 0,
            timeout,
            reconnect: Duration::ZERO,
            places: vec![Mutex::new(Some(Arc::new(pipe)))],
            edges: RwLock::default(),
            acknowledged,
            stable: AtomicU64::default(),
            losses: AtomicU64::default(),
            told: AtomicU64::default(),
        })
    }

    /// The connection of this thread, other than one that is lost.
    fn pipe(&self, lost: Option<&Arc<Pipe>>) -> io::Result<Arc<Pipe>> {
        let mine = LANE.get().checked_rem(self.places.len()).unwrap_or(0);
        let place = self.places.get(mine).ok_or(io::ErrorKind::NotConnected)?;
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = place.as_ref().filter(|pipe| lost.is_none_or(|lost| !Arc::ptr_eq(lost, pipe))) {
            return Ok(pipe.clone());
        }
        let target = self.target.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let pipe = target.open(self.timeout, &self.acknowledged)?;
        let (new, old) = (pipe.terms, self.terms);
        // The numbers of contexts are a connection's own.
        if new.allocation.is_some() != old.allocation.is_some()
            || (Terms { allocation: old.allocation, ..new }) != old
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the NBD server has another export now"));
        }
        let pipe = Arc::new(pipe);
        let replaced = place.replace(pipe.clone()).is_some();
        // What the server lost it lost once, however many connections it had: those that ended with this one are not
        // found lost later, when the new server has acknowledged other changes. Whose place is locked finds out itself.
        let others = self.places.iter().enumerate().filter(|(number, _)| *number != mine);
        let dropped = others
            .filter_map(|(_, other)| other.try_lock().ok())
            .fold(false, |dropped, mut other| dropped | other.take_if(|pipe| pipe.is_over()).is_some());
        if (replaced || dropped)
            && self.acknowledged.load(Ordering::SeqCst) > self.stable.load(Ordering::SeqCst)
        {
            self.losses.fetch_add(1, Ordering::SeqCst);
        }
        Ok(pipe)
    }

    /// Asks, as often as the connection is lost and found again.
    fn ask(&self, request: Request, payload: &[u8]) -> io::Result<Answer> {
        let mut lost: Option<Arc<Pipe>> = None;
        let mut since = None;
        let mut pause = PAUSE_MIN;
        loop {
            let why = match self.pipe(lost.as_ref()) {
                Ok(pipe) => match pipe.ask(request, payload) {
                    Ok(answer) => return Ok(answer),
                    // A server that shuts down may come back.
                    Err(Failure::Lost(why)) => {
                        lost = Some(pipe);
                        why
                    }
                    Err(Failure::Answered(why)) if why.kind() == io::ErrorKind::ConnectionAborted => {
                        pipe.break_off(&why);
                        lost = Some(pipe);
                        why
                    }
                    Err(Failure::Answered(error)) => return Err(error),
                },
                // Asking again would not help.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(error),
                Err(error) => error,
            };
            if since.get_or_insert_with(Instant::now).elapsed() >= self.reconnect {
                let name =
                    self.target.as_ref().map_or_else(|| "NBD".to_owned(), |target| target.uri.to_string());
                return Err(io::Error::new(why.kind(), format!("{name}: {why}")));
            }
            std::thread::sleep(pause);
            pause = pause.saturating_mul(2).min(PAUSE_MAX);
        }
    }

    fn can(&self, what: u16) -> bool {
        self.terms.flags & what != 0
    }

    /// Whether a range is made of whole blocks.
    fn is_whole(&self, offset: u64, len: u64) -> bool {
        (offset | len) & u64::from(self.terms.block_min).saturating_sub(1) == 0
    }

    /// Blocks around a range: offset and length, none beyond the end.
    fn around(&self, offset: u64, len: u64) -> (u64, u64) {
        let mask = u64::from(self.terms.block_min).saturating_sub(1);
        let start = offset & !mask;
        let end = offset.saturating_add(len).saturating_add(mask) & !mask;
        (start, end.min(self.terms.size).saturating_sub(start))
    }

    fn read_blocks(
        &self,
        offset: u64,
        len: u64,
        mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0u64;
        while done < len {
            let at = offset.saturating_add(done);
            let part = len.saturating_sub(done).min(self.terms.block_max.into());
            let answer = self.ask(request(command::READ, 0, at, part), &[])?;
            put(done, &answer.data)?;
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn write_blocks(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let most = size(self.terms.block_max.into()).max(1);
        for (number, part) in (0u64..).zip(bytes.chunks(most)) {
            let at = offset.saturating_add(number.saturating_mul(most as u64));
            self.ask(request(command::WRITE, 0, at, part.len() as u64), part)?;
        }
        Ok(())
    }

    /// Whole blocks are written as they are; others are read, changed and written.
    fn write_plain(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        if self.is_whole(offset, len) {
            let _others = self.edges.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_blocks(offset, bytes);
        }
        let _alone = self.edges.write().unwrap_or_else(PoisonError::into_inner);
        let (start, whole) = self.around(offset, len);
        let mut blocks = vec![0; size(whole)];
        self.read_blocks(start, whole, |at, data| {
            crate::endian::put(&mut blocks, size(at), data);
            Ok(())
        })?;
        crate::endian::put(&mut blocks, size(offset.saturating_sub(start)), bytes);
        self.write_blocks(start, &blocks)
    }

    /// A request without a payload, in parts that fit.
    fn in_parts(&self, kind: u16, flags: u16, offset: u64, len: u64) -> io::Result<()> {
        let most = if self.terms.mode == Mode::Extended { u64::MAX } else { SHORT_MAX };
        let mut done = 0u64;
        while done < len {
            let part = len.saturating_sub(done).min(most);
            self.ask(request(kind, flags, offset.saturating_add(done), part), &[])?;
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn check_end(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.terms.size) {
            return Ok(());
        }
        // Not "no space": a guest would wait for some.
        Err(io::Error::new(io::ErrorKind::InvalidInput, "an NBD export does not grow"))
    }
}

fn request(kind: u16, flags: u16, offset: u64, len: u64) -> Request {
    Request { flags, kind, cookie: 0, offset, len }
}

/// Where a server is, and how it is talked with.
struct Target {
    uri: Uri,
    tls: Option<ClientTls>,
    /// The server's addresses, as its name was last resolved: a process that has been confined since may not ask again.
    addresses: Mutex<Vec<SocketAddr>>,
}

/// TLS where the URI wants it.
fn tls_of(uri: &Uri) -> Result<Option<ClientTls>, Error> {
    let host = match &uri.place {
        Place::Tcp { host, .. } => host,
        Place::Unix(_) => "localhost",
    };
    let name = uri.parameter("tls-hostname").unwrap_or(host);
    let directory = uri.parameter("tls-certificates").map(Path::new);
    if !uri.tls && (directory.is_some() || uri.parameter("tls-hostname").is_some()) {
        return Err(Error::Options(format!("{uri}: TLS is wanted with nbds:// or nbds+unix://")));
    }
    uri.tls.then(|| ClientTls::load(directory, name)).transpose()
}

impl Target {
    fn open(&self, timeout: Duration, acknowledged: &Arc<AtomicU64>) -> io::Result<Pipe> {
        let stream: Stream = match &self.uri.place {
            Place::Unix(path) => unix(path)?.into(),
            Place::Tcp { host, port } => self.tcp(host, *port, timeout)?.into(),
        };
        let deadline = Instant::now().checked_add(timeout);
        let session = self.tls.as_ref().map(ClientTls::session).transpose()?;
        let session = session::open(stream, &self.uri.export, session, deadline)?;
        Ok(Pipe::new(session, timeout, acknowledged.clone()))
    }

    fn tcp(&self, host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
        for address in self.resolved(host, port)? {
            match TcpStream::connect_timeout(&address, timeout.max(Duration::from_secs(1))) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The server's addresses; those of before, if its name cannot be resolved any more.
    fn resolved(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let now = (host, port).to_socket_addrs().map(Vec::from_iter);
        let mut known = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        match now {
            Ok(now) => known.clone_from(&now),
            Err(error) if known.is_empty() => return Err(error),
            Err(_) => {}
        }
        Ok(known.clone())
    }
}

fn unix(path: &Path) -> io::Result<UnixStream> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    match path.as_os_str().as_bytes().strip_prefix(b"\0") {
        None => UnixStream::connect(path),
        Some(name) => UnixStream::connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?),
    }
}

impl Storage for NbdStorage {
    fn len(&self) -> u64 {
        self.terms.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let there = self.terms.size.saturating_sub(offset).min(len);
        if there > 0 {
            let (start, whole) = self.around(offset, there);
            let before = offset.saturating_sub(start);
            self.read_blocks(start, whole, |done, data| {
                // Of the blocks, what was asked for.
                let from = before.saturating_sub(done).min(data.len() as u64);
                let place = done.saturating_add(from).saturating_sub(before);
                let part = (data.len() as u64).saturating_sub(from).min(there.saturating_sub(place));
                let bytes = data.get(size(from)..size(from.saturating_add(part))).unwrap_or_default();
                buffers.put(at.saturating_add(place), bytes)
            })?;
        }
        crate::buffers::put_zeroes(buffers, at.saturating_add(there), len.saturating_sub(there))
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        self.check_end(offset, len)?;
        let most = u64::from(self.terms.block_max);
        let mut bytes = vec![0; size(len.min(most))];
        let mut done = 0u64;
        while done < len {
            let part = len.saturating_sub(done).min(most);
            let piece = bytes.get_mut(..size(part)).unwrap_or_default();
            buffers.get(at.saturating_add(done), piece)?;
            self.write_plain(offset.saturating_add(done), piece)?;
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        if !self.can(flag::SEND_FLUSH) {
            // A server without flushes has nothing that it could lose.
            return Ok(());
        }
        // Flushes that are under way together cover the same writes: all of them tell.
        let told = self.told.load(Ordering::SeqCst);
        let before = self.acknowledged.load(Ordering::SeqCst);
        self.ask(request(command::FLUSH, 0, 0, 0), &[])?;
        self.stable.fetch_max(before, Ordering::SeqCst);
        let losses = self.losses.load(Ordering::SeqCst);
        if losses > told {
            self.told.fetch_max(losses, Ordering::SeqCst);
            let why = "the NBD server was lost and found again: what it had not made stable may be lost";
            return Err(io::Error::other(why));
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_end(0, len)
    }

    fn room(&self, wanted: u64) -> u64 {
        wanted.min(self.terms.size)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = len.min(self.terms.size.saturating_sub(offset));
        if !self.can(flag::SEND_WRITE_ZEROES) || !self.is_whole(offset, len) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let _others = self.edges.read().unwrap_or_else(PoisonError::into_inner);
        self.in_parts(command::WRITE_ZEROES, 0, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_end(offset, len)?;
        if self.can(flag::SEND_WRITE_ZEROES) && self.is_whole(offset, len) {
            let others = self.edges.read().unwrap_or_else(PoisonError::into_inner);
            let done = self.in_parts(command::WRITE_ZEROES, command::FLAG_NO_HOLE, offset, len);
            drop(others);
            // A server may offer it, and decline one or all.
            if !done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Unsupported) {
                return done;
            }
        }
        let zeroes = vec![0; size(len.min(1 << 20))];
        let mut done = 0u64;
        while done < len {
            let part = len.saturating_sub(done).min(zeroes.len() as u64);
            self.write_plain(offset.saturating_add(done), zeroes.get(..size(part)).unwrap_or_default())?;
            done = done.saturating_add(part);
        }
        Ok(())
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn extent(&self, offset: u64, len: u64) -> io::Result<Extent> {
        if offset >= self.terms.size || len == 0 {
            return Ok(Extent { len, hole: true });
        }
        let within = len.min(self.terms.size.saturating_sub(offset));
        if self.terms.allocation.is_none() {
            return Ok(Extent { len: within, hole: false });
        }
        let (start, whole) = self.around(offset, within);
        let most = if self.terms.mode == Mode::Extended { u64::MAX } else { SHORT_MAX };
        let answer = self.ask(request(command::BLOCK_STATUS, 0, start, whole.min(most)), &[])?;
        let reads_zero = |flags: u64| flags & u64::from(allocation::ZERO) != 0;
        let mut extents = answer.extents.iter();
        let Some((first, flags)) = extents.next() else { return Err(io::ErrorKind::InvalidData.into()) };
        let same = extents.take_while(|(_, other)| reads_zero(*other) == reads_zero(*flags));
        let run = same.fold(*first, |sum, (len, _)| sum.saturating_add(*len));
        let run = run.saturating_sub(offset.saturating_sub(start)).clamp(1, within);
        Ok(Extent { len: run, hole: reads_zero(*flags) })
    }

    fn allocated(&self) -> Option<u64> {
        None
    }
}

impl Drop for NbdStorage {
    fn drop(&mut self) {
        for place in &self.places {
            if let Some(pipe) = place.lock().unwrap_or_else(PoisonError::into_inner).take() {
                pipe.close();
            }
        }
    }
}
