//! Commands in the guest: drives the agent's protocol over a [`Port`] with one thread, and gives each command a
//! [`Command`] handle that any thread may hold.
//!
//! Lock order: the client's lock, then (inside [`Port::send`]) the device's.

use crate::port::Port;
use guest::{Client, Event, Exec, Failure, LostReason, Poweroff, RequestError, SessionId, Stream};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// How often an agent that has not answered is greeted again.
const GREETING_PERIOD: Duration = Duration::from_millis(500);
/// How often bytes the port had no room for are offered again.
const RETRY_PERIOD: Duration = Duration::from_millis(20);

/// Something a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It runs.
    Started,
    /// It wrote.
    Output(Stream, Vec<u8>),
    /// Its standard input takes bytes again.
    StdinReady,
    /// It ended with this exit code (128 + n for signal n). Nothing follows.
    Exited(u8),
    /// It did not start. Nothing follows.
    Failed(Failure, std::io::ErrorKind),
    /// The link to the guest broke, or the machine is gone. Nothing follows.
    Lost(String),
}

/// Hears what a command does, on the agent's thread: it must not block. Answers `false` when it listens no longer.
type Listener = Box<dyn FnMut(Progress) -> bool + Send>;

struct Shared {
    client: Client,
    commands: HashMap<SessionId, Listener>,
    incompatible: Option<u16>,
    gone: bool,
}

struct Inner {
    port: Port,
    shared: Mutex<Shared>,
    changed: Condvar,
}

/// The link to the agent of one guest. Cheap to clone; its thread ends when the machine does.
#[derive(Clone)]
pub struct Agent(Arc<Inner>);

/// A command in the guest. Dropping it kills the command.
pub struct Command {
    agent: Agent,
    session: SessionId,
}

impl Agent {
    /// Starts to greet the agent on `port`.
    pub fn new(port: Port) -> std::io::Result<Self> {
        let nonce = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |t| t.as_nanos() as u64);
        let shared =
            Shared { client: Client::new(nonce), commands: HashMap::new(), incompatible: None, gone: false };
        // Linux lets nobody in the guest write to a virtio port before the host has opened its end.
        port.connect(true);
        let inner = Arc::new(Inner { port, shared: Mutex::new(shared), changed: Condvar::new() });
        let weak = Arc::downgrade(&inner);
        thread::Builder::new().name("agent".into()).spawn(move || {
            sandbox::narrow(sandbox::Role::Port);
            serve(&weak);
        })?;
        Ok(Self(inner))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether commands can be run now.
    pub fn is_ready(&self) -> bool {
        self.lock().client.is_ready()
    }

    /// Waits until commands can be run; `false` after `timeout` or when the machine is gone.
    pub fn wait_ready(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout).unwrap_or_else(Instant::now);
        let mut shared = self.lock();
        loop {
            if shared.client.is_ready() {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if shared.gone || left.is_zero() {
                return false;
            }
            shared = self.0.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The version an agent speaks that this yado cannot talk to, if there is such an agent.
    pub fn incompatible(&self) -> Option<u16> {
        self.lock().incompatible
    }

    /// Runs a command. `listener` hears what it does, on the agent's thread; it must not block, and answers `false`
    /// when it listens no longer.
    pub fn exec(
        &self,
        exec: Exec,
        listener: impl FnMut(Progress) -> bool + Send + 'static,
    ) -> Result<Command, RequestError> {
        let mut shared = self.lock();
        let session = shared.client.exec(exec)?;
        shared.commands.insert(session, Box::new(listener));
        self.flush(&mut shared);
        Ok(Command { agent: self.clone(), session })
    }

    /// The machine has been reset: what its agent still said counts, then all commands are lost and a new agent is
    /// waited for.
    pub fn machine_reset(&self) {
        let mut bytes = Vec::new();
        self.0.port.receive(&mut bytes, Duration::ZERO);
        let mut shared = self.lock();
        shared.client.receive(&bytes);
        self.dispatch(&mut shared);
        shared.client.reconnect();
        self.dispatch(&mut shared);
        self.flush(&mut shared);
    }

    /// Switches the guest off from inside.
    pub fn poweroff(&self, how: Poweroff) -> Result<(), RequestError> {
        self.request(|client| client.poweroff(how))
    }

    fn request<R>(
        &self,
        ask: impl FnOnce(&mut Client) -> Result<R, RequestError>,
    ) -> Result<R, RequestError> {
        let mut shared = self.lock();
        let result = ask(&mut shared.client);
        self.flush(&mut shared);
        result
    }

    /// Hands to the port what it takes now; the thread hands it the rest.
    fn flush(&self, shared: &mut Shared) {
        while !shared.client.pending().is_empty() {
            let taken = self.0.port.send(shared.client.pending(), Duration::ZERO);
            if taken == 0 {
                return;
            }
            shared.client.sent(taken);
        }
    }

    fn dispatch(&self, shared: &mut Shared) {
        while let Some(event) = shared.client.poll_event() {
            let (session, progress, last) = match event {
                Event::Ready { .. } => {
                    self.0.changed.notify_all();
                    continue;
                }
                Event::Incompatible { version } => {
                    shared.incompatible = Some(version);
                    self.0.changed.notify_all();
                    continue;
                }
                Event::LinkLost(_) | Event::Pong(_) => continue,
                Event::Started { session, .. } => (session, Progress::Started, false),
                Event::Output { session, stream, bytes } => (session, Progress::Output(stream, bytes), false),
                Event::StdinReady { session } => (session, Progress::StdinReady, false),
                Event::Exited { session, ending } => (session, Progress::Exited(ending.exit_code()), true),
                Event::Failed { session, failure, errno } => {
                    let kind = std::io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(0)).kind();
                    (session, Progress::Failed(failure, kind), true)
                }
                Event::SessionLost { session, reason } => (session, lost(reason), true),
            };
            let delivered = shared.commands.get_mut(&session).is_some_and(|listener| listener(progress));
            if last {
                shared.commands.remove(&session);
            } else if !delivered {
                shared.client.abandon(session);
            }
        }
    }
}

fn lost(reason: LostReason) -> Progress {
    Progress::Lost(match reason {
        // Nothing else opens it anew.
        LostReason::Reconnect => "the guest restarted".to_owned(),
        reason => reason.to_string(),
    })
}

fn serve(agent: &Weak<Inner>) {
    let mut bytes = Vec::new();
    let mut greeted = Instant::now();
    loop {
        let Some(inner) = agent.upgrade() else { return };
        let agent = Agent(inner);
        let waiting = !agent.lock().client.pending().is_empty();
        bytes.clear();
        let open = agent.0.port.receive(&mut bytes, if waiting { RETRY_PERIOD } else { GREETING_PERIOD });
        let mut shared = agent.lock();
        shared.client.receive(&bytes);
        if greeted.elapsed() >= GREETING_PERIOD {
            greeted = Instant::now();
            shared.client.nudge();
        }
        agent.dispatch(&mut shared);
        agent.flush(&mut shared);
        if !open {
            shared.gone = true;
            for (_, mut listener) in shared.commands.drain() {
                listener(Progress::Lost("the machine is gone".into()));
            }
            agent.0.changed.notify_all();
            return;
        }
    }
}

impl Command {
    /// Output has been used up: the command may write as much again.
    pub fn consumed(&self, stream: Stream, count: usize) {
        let mut shared = self.agent.lock();
        shared.client.consumed(self.session, stream, count);
        self.agent.flush(&mut shared);
    }

    /// Offers bytes to the command's standard input; answers how many it took. If not all, [`Progress::StdinReady`]
    /// tells when to go on.
    pub fn stdin(&self, bytes: &[u8]) -> Result<usize, RequestError> {
        self.agent.request(|client| client.stdin(self.session, bytes))
    }

    /// Ends standard input.
    pub fn stdin_eof(&self) -> Result<(), RequestError> {
        self.agent.request(|client| client.stdin_eof(self.session))
    }

    /// Sends a signal to the command's process group.
    pub fn signal(&self, number: u8) -> Result<(), RequestError> {
        self.agent.request(|client| client.signal(self.session, number))
    }

    /// The terminal has a new size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), RequestError> {
        self.agent.request(|client| client.resize(self.session, rows, columns))
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        // Nothing happens if it has ended.
        let mut shared = self.agent.lock();
        shared.client.abandon(self.session);
        self.agent.flush(&mut shared);
    }
}
