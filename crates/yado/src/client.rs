//! The command line's side of a guest's control socket.

use crate::exit::{self, with_code};
use crate::{registry, signals, terminal};
use anyhow::{Context, bail};
use machine::control::protocol::{Ended, ExecRequest, Kind, Reply, Request, read, write, write_json};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Ctrl-], which leaves a console.
const LEAVE: u8 = 0x1d;
/// How long a guest's process may take for what it does at once.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How many frames of standard input may be on their way.
const INPUT_FRAMES_MAX: u32 = 8;
const SIGPIPE: u8 = 13;

/// Connects to the guest.
pub fn connect(name: &str) -> anyhow::Result<UnixStream> {
    let path = registry::socket(name)?;
    UnixStream::connect(&path).with_context(|| {
        format!(
            "the guest {name} does not answer at {}: it may be starting or stopping; try again",
            path.display()
        )
    })
}

/// Connects to the guest and asks for something that is done at once; a refusal is an error.
pub fn ask(name: &str, request: &Request) -> anyhow::Result<serde_json::Value> {
    ask_within(name, request, ANSWER_MAX)
}

/// Connects to the guest and asks for a stream, or for something that takes its time.
pub fn open(name: &str, request: &Request) -> anyhow::Result<(UnixStream, serde_json::Value)> {
    ask_on(connect(name)?, request)
}

/// Asks, and waits for the answer no longer than that: the guest's process may be stopped.
pub fn ask_within(name: &str, request: &Request, time: Duration) -> anyhow::Result<serde_json::Value> {
    let mut timed = Timed::connect(&registry::socket(name)?, time)
        .with_context(|| format!("the guest {name} does not answer"))?;
    asked(&mut timed, request)
}

/// A connection that ends when its time is over, however little comes how often.
struct Timed {
    stream: UnixStream,
    until: Instant,
}

impl Timed {
    fn connect(path: &Path, time: Duration) -> io::Result<Self> {
        use rustix::net::{self, sockopt};
        let until = Instant::now() + time;
        let flags = net::SocketFlags::CLOEXEC;
        let socket = net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, flags, None)?;
        // Where too many are waiting to be accepted connecting waits, too (socket(7): as sending does).
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(time))?;
        net::connect(&socket, &net::SocketAddrUnix::new(path)?)?;
        Ok(Self { stream: socket.into(), until })
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(bytes)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Asks on a fresh connection.
fn ask_on(mut stream: UnixStream, request: &Request) -> anyhow::Result<(UnixStream, serde_json::Value)> {
    let value = asked(&mut stream, request)?;
    Ok((stream, value))
}

fn asked(stream: &mut (impl Read + Write), request: &Request) -> anyhow::Result<serde_json::Value> {
    let why = |error: io::Error| {
        let what = match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                "the guest's process does not answer: is it stopped (by SIGSTOP, or a debugger)?"
            }
            ErrorKind::InvalidInput => "the guest's process is not asked",
            _ => "the guest's process is gone",
        };
        anyhow::Error::new(error).context(what)
    };
    write_json(stream, Kind::Request, request).map_err(why)?;
    match read(stream).map_err(why)? {
        Some((Kind::Reply, payload)) => match serde_json::from_slice(&payload)? {
            Reply::Ok(value) => Ok(value),
            Reply::Refused(why) => bail!("{why}"),
        },
        Some(_) => {
            bail!("the guest's process does not speak this yado's language: was yado updated while it ran?")
        }
        None => bail!("the guest's process went away"),
    }
}

/// How a look at the console ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleEnd {
    /// The user typed Ctrl-].
    Left,
    /// The machine is off.
    Off,
}

/// Joins the terminal and the guest's console, over a fresh connection.
pub fn console(stream: UnixStream) -> anyhow::Result<ConsoleEnd> {
    let (stream, _) = ask_on(stream, &Request::Console)?;
    let mut output = stream.try_clone()?;
    let _ending = signals::end_console(stream.try_clone()?);
    let raw = terminal::Raw::enter();
    let is_raw = raw.is_some();
    let mut input = stream;
    thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = io::stdin().lock().read(&mut bytes) {
            let typed = bytes.get(..count).unwrap_or_default();
            let leave = typed.iter().position(|byte| *byte == LEAVE).filter(|_| is_raw);
            let typed = typed.get(..leave.unwrap_or(count)).unwrap_or_default();
            if write(&mut input, Kind::Input, typed).is_err() {
                return;
            }
            if leave.is_some() {
                let _ = input.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    })?;
    loop {
        match read(&mut output) {
            Ok(Some((Kind::Output, bytes))) => {
                let mut out = io::stdout().lock();
                out.write_all(&bytes)
                    .and_then(|()| out.flush())
                    .context("cannot write to standard output")?;
            }
            Ok(Some((Kind::Ended, _))) => {
                drop(raw);
                return Ok(ConsoleEnd::Off);
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                drop(raw);
                return Ok(ConsoleEnd::Left);
            }
        }
    }
}

/// Runs a command in the guest with this process's standard streams, over a fresh connection; answers its exit code.
pub fn exec(stream: UnixStream, request: ExecRequest) -> anyhow::Result<u8> {
    let tty = request.terminal.is_some();
    let program = String::from_utf8_lossy(request.argv.first().map_or(&[], Vec::as_slice)).into_owned();
    let (stream, _) = ask_on(stream, &Request::Exec(request))?;
    let mut output = stream.try_clone()?;
    let input = Arc::new(Mutex::new(stream));
    let _forwarding = signals::forward(input.clone(), tty);
    let raw = tty.then(terminal::Raw::enter).flatten();
    let window = Arc::new((Mutex::new(0u32), Condvar::new()));
    let (sender, taken) = (input.clone(), window.clone());
    thread::Builder::new().name("stdin".into()).spawn(move || send_stdin(&sender, &taken))?;
    let ended = receive(&mut output, &input, &window);
    drop(raw);
    match ended? {
        Ended::Exited(code) => Ok(code),
        Ended::Failed(code, why) => {
            let doing = match code {
                127 => "is not in the guest",
                126 => "cannot be executed in the guest",
                _ => "could not be started in the guest",
            };
            Err(with_code(code, format!("{program}: {doing} ({why})")))
        }
        Ended::Lost(why) => Err(with_code(exit::YADO_FAILED, format!("the command was lost: {why}"))),
    }
}

fn send_stdin(stream: &Mutex<UnixStream>, window: &(Mutex<u32>, Condvar)) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = match io::stdin().lock().read(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // Standard input that cannot be read is empty.
            Err(_) => 0,
            Ok(count) => count,
        };
        if count > 0 {
            let mut outstanding = window.0.lock().unwrap_or_else(PoisonError::into_inner);
            while *outstanding >= INPUT_FRAMES_MAX {
                outstanding = window.1.wait(outstanding).unwrap_or_else(PoisonError::into_inner);
            }
            *outstanding += 1;
        }
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = write(&mut *stream, Kind::Input, bytes.get(..count).unwrap_or_default());
        if count == 0 || sent.is_err() {
            return;
        }
    }
}

fn receive(
    output: &mut UnixStream,
    input: &Mutex<UnixStream>,
    window: &(Mutex<u32>, Condvar),
) -> anyhow::Result<Ended> {
    loop {
        let (kind, payload) = match read(output) {
            Ok(Some(frame)) => frame,
            Ok(None) | Err(_) => return Ok(Ended::Lost("the guest's process is gone".into())),
        };
        let written = match kind {
            Kind::Output => put(&mut io::stdout().lock(), &payload),
            Kind::Error => put(&mut io::stderr().lock(), &payload),
            Kind::Ended => return Ok(serde_json::from_slice(&payload)?),
            Kind::Taken => {
                let mut outstanding = window.0.lock().unwrap_or_else(PoisonError::into_inner);
                *outstanding = outstanding.saturating_sub(1);
                window.1.notify_one();
                Ok(())
            }
            _ => Ok(()),
        };
        if written.is_err() {
            // Nobody reads any more: the command hears it as it would from a pipe.
            let _ =
                write(&mut *input.lock().unwrap_or_else(PoisonError::into_inner), Kind::Signal, &[SIGPIPE]);
        }
    }
}

fn put(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixListener;

    const TIME: Duration = Duration::from_millis(200);

    /// Asks somebody who is stopped: nothing is accepted, then nothing can even be connected.
    #[test]
    fn a_stopped_guest_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let began = Instant::now();
        let mut waiting = Vec::new();
        while let Ok(mut timed) = Timed::connect(&path, TIME) {
            assert!(asked(&mut timed, &Request::Stats).is_err());
            waiting.push(timed);
            assert!(waiting.len() < 10);
        }
        assert!(!waiting.is_empty() && began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }

    #[test]
    fn one_who_says_a_byte_now_and_then_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let mut timed = Timed::connect(&path, TIME).unwrap();
        let began = Instant::now();
        let mut bytes = Vec::new();
        assert!(timed.read_to_end(&mut bytes).is_err());
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }
}
