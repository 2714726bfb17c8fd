//! Runs the embedded agent as a process on this host and talks to it as a host does: what a guest would see, without a guest.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use guest::{Client, Event, Exec, SessionId, Stream};

mod commands;
mod link;
mod terminals;

const PATIENCE: Duration = Duration::from_secs(60);
const SIGTERM: u8 = 15;

/// The agent's file, written once for all tests of this process.
fn agent_file() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("agent-{}", std::process::id()));
        fs::write(&path, guest::AGENT).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    })
    .clone()
}

/// What has become of a command.
#[derive(Debug, Default)]
struct Run {
    pid: u32,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// How it ended: an event of the client's.
    last: Option<Event>,
    /// Input still to be given, and whether it ends after that.
    input: Vec<u8>,
    input_ends: bool,
    /// Whether output is left unused, as by a reader that has stalled.
    stalled: bool,
}

impl Run {
    fn code(&self) -> u8 {
        match self.last {
            Some(Event::Exited { ending, .. }) => ending.exit_code(),
            Some(Event::Failed { failure, .. }) => failure.exit_code(),
            _ => panic!("the command has not ended: {:?}", self.last),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// An agent and the host's end of its stream.
struct Guest {
    agent: Child,
    stream: fs::File,
    client: Client,
    runs: HashMap<SessionId, Run>,
    links: Vec<Event>,
}

impl Guest {
    fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(agent_file());
        let agent =
            command.args(["--fd", "0"]).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut guest = Self::over(fs::File::from(OwnedFd::from(ours)), agent, Client::new(1));
        guest.until("the agent is ready", |guest| guest.client.is_ready());
        guest
    }

    fn over(stream: fs::File, agent: Child, client: Client) -> Self {
        Self { agent, stream, client, runs: HashMap::new(), links: Vec::new() }
    }

    /// Moves bytes and events once. False when there was nothing to move.
    fn step(&mut self) -> bool {
        let mut moved = false;
        let mut buffer = [0; 32 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(count) => {
                assert!(count > 0, "the agent has closed its stream");
                self.client.receive(&buffer[..count]);
                moved = true;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        while let Some(event) = self.client.poll_event() {
            moved = true;
            self.take(event);
        }
        for (&session, run) in self.runs.iter_mut().filter(|(_, run)| run.last.is_none() && run.input_ends) {
            let count = self.client.stdin(session, &run.input).unwrap_or(0);
            run.input.drain(..count);
            if run.input.is_empty() {
                let _ = self.client.stdin_eof(session);
            }
        }
        if !self.client.pending().is_empty() {
            match self.stream.write(self.client.pending()) {
                Ok(count) => {
                    self.client.sent(count);
                    moved = true;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        moved
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Started { session, pid } => self.run_of(session).pid = pid,
            Event::Output { session, stream, bytes } => {
                let run = self.runs.get_mut(&session).unwrap();
                assert!(run.last.is_none(), "output after the end");
                let target = if stream == Stream::Stdout { &mut run.stdout } else { &mut run.stderr };
                target.extend_from_slice(&bytes);
                if !run.stalled {
                    self.client.consumed(session, stream, bytes.len());
                }
            }
            Event::Exited { session, .. }
            | Event::Failed { session, .. }
            | Event::SessionLost { session, .. } => {
                let run = self.run_of(session);
                assert_eq!(run.last, None);
                run.last = Some(event);
            }
            Event::StdinReady { .. } => {}
            Event::Ready { .. } | Event::Incompatible { .. } | Event::LinkLost(_) | Event::Pong(_) => {
                self.links.push(event);
            }
        }
    }

    fn run_of(&mut self, session: SessionId) -> &mut Run {
        self.runs.get_mut(&session).unwrap()
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            if !self.step() {
                sleep(Duration::from_micros(300));
            }
            assert!(start.elapsed() < PATIENCE, "in vain: {what}; {:?}", self.links);
        }
    }

    fn begin(&mut self, exec: Exec) -> SessionId {
        let session = self.client.exec(exec).unwrap();
        self.runs.insert(session, Run { input_ends: true, ..Run::default() });
        session
    }

    fn shell(&mut self, script: &str) -> SessionId {
        self.begin(Exec { argv: words(&["sh", "-c", script]), ..Exec::default() })
    }

    fn finish(&mut self, session: SessionId) -> Run {
        self.until("the command ends", |guest| guest.runs[&session].last.is_some());
        self.runs.remove(&session).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn words(words: &[&str]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.as_bytes().to_vec()).collect()
}

/// Bytes that look like nothing, the same each time (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Zeros are what the framing has to escape: make them frequent.
        if state & 0x300 == 0 { 0 } else { state as u8 }
    };
    (0..length).map(|_| next()).collect()
}

/// The state letter of a process, if there is one (proc(5)).
fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}
