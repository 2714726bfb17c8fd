//! What is asked of a switch's process over its control socket: one line of JSON each way. After an [`Request::Attach`] the connection
//! is the port's vhost-user connection; after a [`Request::Capture`] it carries a pcapng file.

use super::port::PortSpec;
use super::share::GroupSpec;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest line.
pub const LINE_MAX: usize = 256 << 10;
/// The longest wait for a whole answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What a port is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PortKind {
    /// Whoever connects to a socket of its own, with vhost-user.
    Socket,
    /// A tap of the host's.
    Tap(String),
    /// A tunnel to another host.
    Vxlan(crate::vxlan::Config),
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The live tree.
    Inspect,
    /// Who is behind which port.
    Addresses,
    /// Who wants which groups of multicast, and where routers of it are.
    Multicast,
    /// A port that stays. The answer has the path of its socket.
    AddPort {
        /// Its name.
        name: String,
        /// What it is allowed.
        spec: PortSpec,
        /// What it is connected to.
        kind: PortKind,
    },
    /// A port for as long as this connection, which becomes its vhost-user connection.
    Attach {
        /// Its name.
        name: String,
        /// What it is allowed.
        spec: PortSpec,
    },
    /// Another spec for a port.
    SetPort {
        /// Its name.
        name: String,
        /// What it is allowed from now on.
        spec: PortSpec,
    },
    /// A port goes.
    RemovePort {
        /// Its name.
        name: String,
    },
    /// Another spec for a group, which is made if it is not there, or (without a name) for all of the switch.
    SetGroup {
        /// Its name.
        name: Option<String>,
        /// What it is allowed from now on.
        spec: GroupSpec,
    },
    /// A group goes; its ports share nothing with it any more.
    RemoveGroup {
        /// Its name.
        name: String,
    },
    /// What goes through ports, as a pcapng file on this connection, until it is closed.
    Capture {
        /// Their names; none: all that there are now.
        ports: Vec<String>,
        /// Bytes of each frame.
        snap: u32,
    },
    /// The end.
    Stop,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Ok(Value),
    /// Not done, and why.
    Error(String),
}

/// Why a switch did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot reach the switch at {}: {source}; `yado switch ls` lists those that run", path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the switch does not answer: {0}")]
    Io(#[from] io::Error),
    /// It said no.
    #[error("the switch refuses: {0}")]
    Refused(String),
    /// It said something else.
    #[error("the switch's answer makes no sense: {0}; is it of another version of yado?")]
    Answer(String),
}

/// Asks the switch at `path`, and keeps the connection.
pub fn open(path: &Path, request: &Request) -> Result<(Value, UnixStream), Error> {
    open_within(path, request, ANSWER_MAX)
}

/// The same for who does not wait longer than so for all of it.
pub fn open_within(path: &Path, request: &Request, wait: Duration) -> Result<(Value, UnixStream), Error> {
    let until = Instant::now().checked_add(wait);
    let left = || {
        let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(left) }
    };
    let connect = |source: io::Error| Error::Connect { path: path.to_owned(), source };
    let mut stream = connect_within(path, left()?).map_err(connect)?;
    let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
    line.push(b'\n');
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        stream.set_write_timeout(Some(left()?))?;
        match stream.write(rest) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(error) => again(error)?,
        }
    }
    // What follows the line belongs to somebody else: it is looked at before it is taken.
    let (mut answer, mut room) = (Vec::new(), vec![0; 16 << 10]);
    while answer.last() != Some(&b'\n') {
        stream.set_read_timeout(Some(left()?))?;
        let seen = match rustix::net::recv(&stream, &mut room, RecvFlags::PEEK) {
            Ok((seen, _)) => room.get(..seen).unwrap_or_default(),
            Err(error) => {
                again(error.into())?;
                continue;
            }
        };
        let end = seen.iter().position(|byte| *byte == b'\n').map_or(seen.len(), |end| end.saturating_add(1));
        if end == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let begin = answer.len();
        answer.resize(begin.saturating_add(end), 0);
        stream.read_exact(answer.get_mut(begin..).unwrap_or_default())?;
    }
    stream.set_write_timeout(None)?;
    stream.set_read_timeout(None)?;
    match serde_json::from_slice(&answer).map_err(|error| Error::Answer(error.to_string()))? {
        Reply::Ok(value) => Ok((value, stream)),
        Reply::Error(why) => Err(Error::Refused(why)),
    }
}

/// Time is up, or something came in between: who waits finds out which.
fn again(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// Connects to a socket whose owner may be too busy to take anybody (unix(7): then the sender's patience counts).
pub(crate) fn connect_within(path: &Path, wait: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(wait))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Asks the switch at `path`.
pub fn ask(path: &Path, request: &Request) -> Result<Value, Error> {
    Ok(open(path, request)?.0)
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let wait = Duration::from_millis(200);
        let begin = Instant::now();
        let timed_out = || match open_within(&path, &Request::Inspect, wait) {
            Err(Error::Io(error)) => error.kind() == io::ErrorKind::TimedOut,
            _ => false,
        };
        assert!(timed_out());
        // Nor who answers a byte now and then.
        let (mut slow, _) = listener.accept().unwrap();
        let drip = std::thread::spawn(move || {
            let (mut far, _) = listener.accept().unwrap();
            while far.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
            listener
        });
        assert!(timed_out());
        let listener = drip.join().unwrap();
        assert!(slow.write_all(b"x").is_err());
        // Nor who takes nobody.
        let full: Vec<_> =
            std::iter::from_fn(|| connect_within(&path, Duration::from_millis(50)).ok()).collect();
        assert!(!full.is_empty());
        assert!(matches!(open_within(&path, &Request::Inspect, wait), Err(Error::Connect { .. })));
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(listener);
    }

    #[test]
    fn what_follows_the_answer_is_left() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let long = "y".repeat(100_000);
        let answer = serde_json::to_string(&Reply::Ok(Value::String(long.clone()))).unwrap() + "\nmore";
        let answers = std::thread::spawn(move || {
            let (mut far, _) = listener.accept().unwrap();
            let mut byte = [0];
            while byte != *b"\n" {
                far.read_exact(&mut byte).unwrap();
            }
            far.write_all(answer.as_bytes())
        });
        let (value, mut stream) = open(&path, &Request::Inspect).unwrap();
        answers.join().unwrap().unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!((value, rest.as_str()), (Value::String(long), "more"));
    }
}
