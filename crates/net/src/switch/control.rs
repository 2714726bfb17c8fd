//! What is asked of a switch's process over its control socket: one line of JSON each way. After an [`Request::Attach`] the connection
//! is the port's vhost-user connection; after a [`Request::Capture`] it carries a pcapng file.

use super::port::PortSpec;
use super::share::GroupSpec;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The longest line.
pub const LINE_MAX: usize = 256 << 10;
/// The longest wait for an answer.
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
    let connect = |source| Error::Connect { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    // Byte by byte: what follows the line belongs to somebody else.
    let mut answer = Vec::new();
    let mut byte = [0];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if byte == [b'\n'] {
            break;
        }
        answer.extend(byte);
    }
    stream.set_read_timeout(None)?;
    match serde_json::from_slice(&answer).map_err(|error| Error::Answer(error.to_string()))? {
        Reply::Ok(value) => Ok((value, stream)),
        Reply::Error(why) => Err(Error::Refused(why)),
    }
}

/// Asks the switch at `path`.
pub fn ask(path: &Path, request: &Request) -> Result<Value, Error> {
    Ok(open(path, request)?.0)
}
