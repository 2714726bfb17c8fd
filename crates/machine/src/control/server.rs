//! Answers the control socket: a thread accepts, a thread serves each connection.

use super::protocol::{Ended, ExecRequest, Kind, PAYLOAD_MAX, Reply, Request, read, write, write_json};
use crate::agent::{Agent, Command, Progress};
use crate::console::Console;
use guest::{Exec, RequestError, Stream};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The most connections served at a time.
const CONNECTIONS_MAX: usize = 256;
/// The longest wait inside a serving thread before it looks whether the machine is gone.
const TURN: Duration = Duration::from_millis(200);

/// What can be done to a machine, by any thread.
pub trait Operations: Send + Sync {
    /// The live tree.
    fn inspect(&self) -> serde_json::Value;
    /// What the vCPUs have counted.
    fn statistics(&self) -> serde_json::Value;
    /// Where the guest's time goes, for so long from now on.
    fn profile(&self, length: Duration, rate_hz: u32) -> Result<serde_json::Value, String>;
    /// Lines for `perf`.
    fn perf_map(&self) -> String;
    /// What goes through the network cards.
    fn networks(&self) -> serde_json::Value;
    /// Look at their frames.
    fn capture(&self, snap: u32) -> Result<net::watch::View, String>;
    /// Press the power button; the guest decides.
    fn power_button(&self);
    /// Stop at once.
    fn stop(&self);
    /// Stand still.
    fn pause(&self);
    /// Go on.
    fn resume(&self);
}

struct Shared {
    operations: Arc<dyn Operations>,
    console: Console,
    agent: Option<Agent>,
    closing: AtomicBool,
    connections: AtomicUsize,
    /// Connections to shut down when the machine goes.
    open: Mutex<BTreeMap<u64, UnixStream>>,
    /// How many there have been.
    count: AtomicU64,
}

/// A socket at which nobody answers yet.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    listener: UnixListener,
}

impl Listener {
    /// Listens at `path`, replacing a socket that a dead machine left there.
    pub fn new(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self { path: path.to_path_buf(), listener: UnixListener::bind(path)? })
    }
}

/// The socket's server; dropping it closes all connections and removes the socket.
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    shared: Arc<Shared>,
}

impl Server {
    /// Answers at a socket.
    pub fn new(
        listener: Listener,
        operations: Arc<dyn Operations>,
        console: Console,
        agent: Option<Agent>,
    ) -> io::Result<Self> {
        let Listener { path, listener } = listener;
        let shared = Arc::new(Shared {
            operations,
            console,
            agent,
            closing: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            open: Mutex::new(BTreeMap::new()),
            count: AtomicU64::new(0),
        });
        let (accepting, accepted) = (shared.clone(), listener.try_clone()?);
        thread::Builder::new().name("control".into()).spawn(move || {
            sandbox::narrow(sandbox::Role::Control);
            accept(&accepted, &accepting);
        })?;
        Ok(Self { path, listener, shared })
    }

    /// A connection for this process itself.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        begin(theirs, &self.shared)?;
        Ok(ours)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        // Wakes the accepting thread, which then sees that it is over.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = std::fs::remove_file(&self.path);
        for stream in self.shared.open.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
        // Let streams say their last word (a command's exit code).
        for _ in 0..100 {
            if self.shared.connections.load(Ordering::Acquire) == 0 {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.closing.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else { continue };
        // A client too many is told by the end of its connection.
        let _ = begin(stream, shared);
    }
}

/// Serves a connection from a thread of its own.
fn begin(stream: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let number = shared.count.fetch_add(1, Ordering::Relaxed);
    if shared.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
        shared.connections.fetch_sub(1, Ordering::AcqRel);
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    if let Ok(copy) = stream.try_clone() {
        shared.open.lock().unwrap_or_else(PoisonError::into_inner).insert(number, copy);
    }
    let serving = shared.clone();
    let over = move |shared: &Shared| {
        shared.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        shared.connections.fetch_sub(1, Ordering::AcqRel);
    };
    let spawned = thread::Builder::new().name("control-client".into()).spawn(move || {
        sandbox::narrow(sandbox::Role::Control);
        // A client that goes away is its own affair.
        let _ = serve(stream, &serving);
        over(&serving);
    });
    if spawned.is_err() {
        over(shared);
    }
    spawned.map(drop)
}

fn serve(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let Some((Kind::Request, payload)) = read(&mut stream)? else { return Ok(()) };
    let request: Request = match serde_json::from_slice(&payload) {
        Ok(request) => request,
        Err(error) => {
            let why = format!("this machine does not know that request (another version of yado?): {error}");
            return write_json(&mut stream, Kind::Reply, &Reply::Refused(why));
        }
    };
    let operations = &shared.operations;
    let value = match request {
        Request::Inspect => operations.inspect(),
        Request::Stats => operations.statistics(),
        Request::Profile { milliseconds, rate_hz } => {
            match operations.profile(Duration::from_millis(milliseconds), rate_hz) {
                Ok(value) => value,
                Err(why) => return write_json(&mut stream, Kind::Reply, &Reply::Refused(why)),
            }
        }
        Request::PerfMap => return perf_map(stream, shared),
        Request::Networks => operations.networks(),
        Request::Capture { snap } => return capture(stream, shared, snap),
        Request::PowerButton => done(|| operations.power_button()),
        Request::Stop => done(|| operations.stop()),
        Request::Pause => done(|| operations.pause()),
        Request::Resume => done(|| operations.resume()),
        Request::Console => return console(stream, shared),
        Request::Exec(exec) => return command(stream, shared, exec),
        Request::Wait => {
            write_json(&mut stream, Kind::Reply, &Reply::Ok(serde_json::Value::Null))?;
            // Nothing is expected but the end, of either side.
            while read(&mut stream)?.is_some() {}
            return Ok(());
        }
    };
    write_json(&mut stream, Kind::Reply, &Reply::Ok(value))
}

fn done(act: impl FnOnce()) -> serde_json::Value {
    act();
    serde_json::Value::Null
}

fn perf_map(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let map = shared.operations.perf_map();
    write_json(&mut stream, Kind::Reply, &Reply::Ok(serde_json::Value::Null))?;
    for part in map.as_bytes().chunks(PAYLOAD_MAX) {
        write(&mut stream, Kind::Output, part)?;
    }
    write_json(&mut stream, Kind::Ended, &Ended::Exited(0))
}

fn capture(mut stream: UnixStream, shared: &Shared, snap: u32) -> io::Result<()> {
    let view = match shared.operations.capture(snap) {
        Ok(view) => view,
        Err(why) => return write_json(&mut stream, Kind::Reply, &Reply::Refused(why)),
    };
    write_json(&mut stream, Kind::Reply, &Reply::Ok(serde_json::Value::Null))?;
    while !shared.closing.load(Ordering::Acquire) && !is_over(&stream) {
        for part in view.read(TURN).chunks(PAYLOAD_MAX) {
            write(&mut stream, Kind::Output, part)?;
        }
    }
    let _ = write_json(&mut stream, Kind::Ended, &Ended::Exited(0));
    stream.shutdown(Shutdown::Both)
}

/// Whether a client that has nothing more to say has gone away.
fn is_over(stream: &UnixStream) -> bool {
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|count| count > 0)
}

fn console(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    let (past, printed) = shared.console.attach_with_past();
    write_json(&mut stream, Kind::Reply, &Reply::Ok(serde_json::Value::Null))?;
    write(&mut stream, Kind::Output, &past)?;
    let mut input = stream.try_clone()?;
    let typed = shared.console.clone();
    let reader = thread::Builder::new().name("control-input".into()).spawn(move || {
        while let Ok(Some((kind, payload))) = read(&mut input) {
            if kind == Kind::Input {
                typed.send(&payload, Duration::from_secs(1));
            }
        }
        let _ = input.shutdown(Shutdown::Both);
    })?;
    while let Some(bytes) = next_chunk(&printed, &reader, shared) {
        write(&mut stream, Kind::Output, &bytes)?;
    }
    let _ = write_json(&mut stream, Kind::Ended, &Ended::Lost("the machine is off".into()));
    stream.shutdown(Shutdown::Both)
}

/// The next bytes of the console; `None` when the machine or the viewer is gone.
fn next_chunk(
    printed: &Receiver<Vec<u8>>,
    reader: &thread::JoinHandle<()>,
    shared: &Shared,
) -> Option<Vec<u8>> {
    loop {
        match printed.recv_timeout(TURN) {
            Ok(bytes) => return Some(bytes),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return None,
            Err(_) if reader.is_finished() || shared.closing.load(Ordering::Acquire) => return None,
            Err(_) => {}
        }
    }
}

/// What moves a command's connection on.
enum Turn {
    Frame(Kind, Vec<u8>),
    ClientGone,
    Command(Progress),
}

fn command(mut stream: UnixStream, shared: &Shared, request: ExecRequest) -> io::Result<()> {
    let (turns, next) = channel();
    let listener = turns.clone();
    let command = match start(shared, request, move |progress| listener.send(Turn::Command(progress)).is_ok())
    {
        Ok(command) => command,
        Err(why) => return write_json(&mut stream, Kind::Reply, &Reply::Refused(why)),
    };
    write_json(&mut stream, Kind::Reply, &Reply::Ok(serde_json::Value::Null))?;
    let mut input = stream.try_clone()?;
    thread::Builder::new().name("control-input".into()).spawn(move || {
        while let Ok(Some((kind, payload))) = read(&mut input) {
            if turns.send(Turn::Frame(kind, payload)).is_err() {
                return;
            }
        }
        let _ = turns.send(Turn::ClientGone);
    })?;
    let command = &command;
    let ended = thread::scope(|scope| {
        let (frames, to_write) = channel();
        let mut output = stream.try_clone()?;
        let writer = thread::Builder::new().name("control-output".into());
        writer.spawn_scoped(scope, move || write_frames(&mut output, to_write, command))?;
        // The writer ends when it has written what this has left.
        let ended = Stdio { frames, command, waiting: VecDeque::new() }.run(&next, shared);
        if ended.is_err() {
            stream.shutdown(Shutdown::Both)?;
        }
        ended
    })?;
    write_json(&mut stream, Kind::Ended, &ended)?;
    stream.shutdown(Shutdown::Both)
}

/// A frame for the client, and of which of the command's streams it is.
type Frame = (Kind, Vec<u8>, Option<Stream>);

/// Writes as fast as the client reads. There is never more to write than the windows of the command's streams, and one answer for each
/// piece of input.
fn write_frames(to: &mut UnixStream, frames: Receiver<Frame>, command: &Command) {
    for (kind, bytes, of) in frames {
        for piece in bytes.chunks(PAYLOAD_MAX) {
            if write(to, kind, piece).is_err() {
                return;
            }
        }
        match of {
            Some(stream) => command.consumed(stream, bytes.len()),
            None if write(to, kind, &[]).is_err() => return,
            None => {}
        }
    }
}

fn start(
    shared: &Shared,
    request: ExecRequest,
    listener: impl FnMut(Progress) -> bool + Send + 'static,
) -> Result<Command, String> {
    let agent = shared.agent.as_ref().ok_or("this guest has no agent: use its console")?;
    let exec = Exec {
        argv: request.argv,
        env: request.env,
        directory: request.directory.into_bytes(),
        user: request.user.into_bytes(),
        terminal: request.terminal.map(|(rows, columns, term)| guest::terminal(rows, columns, &term)),
        output_window: 0,
    };
    let mut left = Duration::from_millis(request.wait_ms);
    while !agent.wait_ready(TURN.min(left)) && !left.is_zero() && !shared.closing.load(Ordering::Acquire) {
        if let Some(version) = agent.incompatible() {
            return Err(format!(
                "the agent in the guest speaks version {version} of the protocol, this yado another"
            ));
        }
        left = left.saturating_sub(TURN);
    }
    agent.exec(exec, listener).map_err(|error: RequestError| error.to_string())
}

/// One command's standard streams over one connection. What the client says is heard whether it reads or not.
struct Stdio<'a> {
    frames: Sender<Frame>,
    command: &'a Command,
    /// Input that the command had no room for; `None` is its end.
    waiting: VecDeque<Option<Vec<u8>>>,
}

impl Stdio<'_> {
    fn run(mut self, turns: &Receiver<Turn>, shared: &Shared) -> io::Result<Ended> {
        loop {
            match turns.recv() {
                Ok(Turn::Frame(kind, payload)) => self.frame(kind, payload)?,
                // When the machine goes, its last word comes from the agent.
                Ok(Turn::ClientGone) if shared.closing.load(Ordering::Acquire) => {}
                Ok(Turn::ClientGone) => return Ok(Ended::Lost("the client went away".into())),
                Ok(Turn::Command(Progress::Started)) => {}
                Ok(Turn::Command(Progress::StdinReady)) => self.feed()?,
                Ok(Turn::Command(Progress::Output(stream, bytes))) => {
                    let kind = if stream == Stream::Stdout { Kind::Output } else { Kind::Error };
                    // A client that is gone says so itself.
                    let _ = self.frames.send((kind, bytes, Some(stream)));
                }
                Ok(Turn::Command(Progress::Exited(code))) => return Ok(Ended::Exited(code)),
                Ok(Turn::Command(Progress::Failed(failure, why))) => {
                    return Ok(Ended::Failed(failure.exit_code(), why.to_string()));
                }
                Ok(Turn::Command(Progress::Lost(why))) => return Ok(Ended::Lost(why)),
                Err(_) => return Ok(Ended::Lost("the machine is gone".into())),
            }
        }
    }

    fn frame(&mut self, kind: Kind, payload: Vec<u8>) -> io::Result<()> {
        match (kind, payload.as_slice()) {
            (Kind::Input, []) => self.waiting.push_back(None),
            (Kind::Input, _) => self.waiting.push_back(Some(payload)),
            // A command that has just ended is no error here: its end follows.
            (Kind::Resize, &[a, b, c, d]) => {
                let _ = self.command.resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
            }
            (Kind::Signal, &[number]) => {
                let _ = self.command.signal(number);
            }
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that does not belong here")),
        }
        self.feed()
    }

    fn feed(&mut self) -> io::Result<()> {
        while let Some(next) = self.waiting.pop_front() {
            let Some(bytes) = next else {
                let _ = self.command.stdin_eof();
                continue;
            };
            // A command that does not read any more loses its input, as with a pipe.
            let taken = self.command.stdin(&bytes).unwrap_or(bytes.len());
            if taken < bytes.len() {
                self.waiting.push_front(Some(bytes.get(taken..).unwrap_or_default().to_vec()));
                return Ok(());
            }
            let _ = self.frames.send((Kind::Taken, Vec::new(), None));
        }
        Ok(())
    }
}
