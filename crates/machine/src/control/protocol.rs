//! What the command line and a running machine say to each other over a Unix socket.
//!
//! Frames in both directions: one byte of kind, a little-endian u32 length, the payload. The client begins with one
//! [`Kind::Request`]; the machine answers with one [`Kind::Reply`]; where the request opened a stream (a console, a
//! command) frames of the other kinds follow until one side closes.

use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// The longest payload of a stream's frame, in bytes.
pub const PAYLOAD_MAX: usize = 1 << 20;
/// The longest [`Kind::Request`]: a command line, whose bytes are numbers in JSON.
const REQUEST_MAX: usize = 16 << 20;
/// The longest [`Kind::Reply`]: the live tree of a machine with many vCPUs.
const REPLY_MAX: usize = 64 << 20;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A [`Request`] in JSON.
    Request = 1,
    /// A [`Reply`] in JSON.
    Reply = 2,
    /// Bytes for the console or the command's standard input; empty: end of input.
    Input = 3,
    /// Bytes of the console or of the command's standard output.
    Output = 4,
    /// Bytes of the command's standard error.
    Error = 5,
    /// The terminal's new size: rows, columns, each a little-endian u16.
    Resize = 6,
    /// A signal for the command: its number in one byte.
    Signal = 7,
    /// The stream is over: an [`Ended`] in JSON.
    Ended = 8,
    /// The machine took all input so far (answers each non-empty [`Kind::Input`] of a command).
    Taken = 9,
}

impl Kind {
    /// The longest payload, in bytes.
    fn payload_max(self) -> usize {
        match self {
            Self::Request => REQUEST_MAX,
            Self::Reply => REPLY_MAX,
            _ => PAYLOAD_MAX,
        }
    }

    fn of(byte: u8) -> Option<Self> {
        [
            Self::Request,
            Self::Reply,
            Self::Input,
            Self::Output,
            Self::Error,
            Self::Resize,
            Self::Signal,
            Self::Ended,
            Self::Taken,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; bytes, as Unix has them.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// Working directory; empty: the user's home.
    pub directory: String,
    /// User, or `user:group`; empty: root.
    pub user: String,
    /// A terminal: rows, columns, TERM.
    pub terminal: Option<(u16, u16, String)>,
    /// How long to wait for the guest's agent, in milliseconds.
    pub wait_ms: u64,
}

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The live tree of the machine.
    Inspect,
    /// What its vCPUs have counted.
    Stats,
    /// Where its time goes, looked at for so long, so often.
    Profile {
        /// Milliseconds.
        milliseconds: u64,
        /// Samples a second of each vCPU.
        rate_hz: u32,
    },
    /// Which of its memory is code made from the guest's, for `perf`: lines follow as [`Kind::Output`].
    PerfMap,
    /// Press the power button.
    PowerButton,
    /// Stop at once, as if the power failed.
    Stop,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Attach to the console: what it printed lately, then what it prints.
    Console,
    /// Run a command.
    Exec(ExecRequest),
    /// What goes through the network cards whose frames the machine's process carries.
    Networks,
    /// Look at their frames: bytes of a pcapng file follow as [`Kind::Output`].
    Capture {
        /// Bytes of each frame.
        snap: u32,
    },
    /// Answer when the machine is gone: the connection closes.
    Wait,
}

/// The machine's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, or begun; a value if one was asked for.
    Ok(serde_json::Value),
    /// Not done, and why.
    Refused(String),
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The command's exit code.
    Exited(u8),
    /// The command did not start; the code to leave with, and why.
    Failed(u8, String),
    /// The machine or its agent is gone.
    Lost(String),
}

/// Writes one frame.
pub fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    if payload.len() > kind.payload_max() {
        let why = format!("{} bytes are too many at once: {} are allowed", payload.len(), kind.payload_max());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let len = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut frame = Vec::with_capacity(payload.len().saturating_add(5));
    frame.push(kind as u8);
    frame.extend_from_slice(&len.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

/// Writes one frame of JSON.
pub fn write_json(to: &mut impl Write, kind: Kind, value: &impl Serialize) -> io::Result<()> {
    write(to, kind, &serde_json::to_vec(value)?)
}

/// Reads one frame; `None` when the other side has closed.
pub fn read(from: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut head = [0; 5];
    match from.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let [kind, len @ ..] = head;
    let len = u32::from_le_bytes(len) as usize;
    let kind = Kind::of(kind).filter(|kind| len <= kind.payload_max());
    let Some(kind) = kind else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame of yado's control protocol"));
    };
    let mut payload = vec![0; len];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        let mut wire = Vec::new();
        write_json(
            &mut wire,
            Kind::Request,
            &Request::Exec(ExecRequest { argv: vec![vec![0xff]], ..Default::default() }),
        )
        .unwrap();
        write(&mut wire, Kind::Input, b"").unwrap();
        let mut from = wire.as_slice();
        let (kind, payload) = read(&mut from).unwrap().unwrap();
        assert_eq!(kind, Kind::Request);
        assert!(
            matches!(serde_json::from_slice(&payload).unwrap(), Request::Exec(exec) if exec.argv == [[0xff]])
        );
        assert_eq!(read(&mut from).unwrap(), Some((Kind::Input, vec![])));
        assert_eq!(read(&mut from).unwrap(), None);
    }

    #[test]
    fn answers_may_be_long_and_what_is_too_long_is_not_sent() {
        let mut wire = Vec::new();
        let reply = Reply::Ok("x".repeat(2 << 20).into());
        write_json(&mut wire, Kind::Reply, &reply).unwrap();
        let (kind, payload) = read(&mut wire.as_slice()).unwrap().unwrap();
        assert_eq!((kind, serde_json::from_slice::<Reply>(&payload).unwrap()), (Kind::Reply, reply));
        let error = write(&mut wire, Kind::Output, &vec![0; PAYLOAD_MAX + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn nonsense_is_refused_before_memory_is_taken() {
        assert!(read(&mut [3, 0xff, 0xff, 0xff, 0xff].as_slice()).is_err());
        assert!(read(&mut [77, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read(&mut [3, 9, 0, 0, 0, 1].as_slice()).is_err());
    }
}
