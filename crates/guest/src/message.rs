//! What frames say. Shared by the host and the agent (`no_std` with `alloc`).
//!
//! Numbers are little-endian. A string is `u32 length, bytes`; a list is `u32 count, strings`. A payload with bytes left over,
//! or too few, is malformed: both sides treat that as a broken link.

use alloc::vec::Vec;

use crate::wire::{Frame, Outbox};

/// The protocol's version; both sides must speak the same.
pub const VERSION: u16 = 1;

/// An output stream of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// File descriptor 1, or the terminal.
    Stdout,
    /// File descriptor 2; silent when the command has a terminal.
    Stderr,
}

/// A terminal for a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terminal {
    /// Height in characters.
    pub rows: u16,
    /// Width in characters.
    pub columns: u16,
    /// The value of `TERM`, empty to leave it unset.
    pub term: Vec<u8>,
}

/// A command to run in the guest. Strings are bytes without NUL, as the kernel takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program (looked up in `PATH` when it has no slash) and its arguments. Not empty.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` entries. The agent adds `PATH`, `HOME`, `USER`, `LOGNAME` and `SHELL` where they are missing.
    pub env: Vec<Vec<u8>>,
    /// Working directory; empty for the user's home directory.
    pub directory: Vec<u8>,
    /// `NAME`, `UID`, `NAME:GROUP` or `UID:GID`; empty for root.
    pub user: Vec<u8>,
    /// With a terminal of its own, or with three pipes.
    pub terminal: Option<Terminal>,
    /// How many bytes of stdout, and as many of stderr, the agent may send before the host grants more.
    pub output_window: u32,
}

/// How a guest is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poweroff {
    /// The guest's init stops its services first.
    Orderly,
    /// As `Orderly`, then starts again.
    Reboot,
    /// File systems are synced and the machine is off, services are not asked.
    Immediate,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It left with this code.
    Code(u8),
    /// A signal killed it.
    Signal(u8),
}

impl Ending {
    /// The exit code that a shell, and `docker run`, would show: 128 + n for signal n.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(number) => 128u8.saturating_add(number),
        }
    }
}

/// Why a command did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such program.
    NotFound,
    /// The program is there and cannot be executed.
    NotExecutable,
    /// The working directory cannot be entered.
    Directory,
    /// There is no such user or group, or its identity cannot be taken on.
    User,
    /// The agent lacks what it needs for one more command (processes, memory, pipes, terminals).
    Resources,
}

impl Failure {
    /// The exit code that a shell, and `docker run`, would show.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::NotFound => 127,
            Self::NotExecutable | Self::Directory | Self::User => 126,
            Self::Resources => 125,
        }
    }
}

/// From the host to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// A host is here: end all sessions and answer `Ready` with the same nonce.
    Hello {
        /// [`VERSION`] of the host.
        version: u16,
        /// Tells the answer to this greeting from answers to earlier ones.
        nonce: u64,
    },
    /// Start a command as a new session.
    Exec(Exec),
    /// Bytes for the command's standard input, within its window.
    Stdin(Vec<u8>),
    /// No more standard input.
    StdinEof,
    /// The agent may send so many more bytes of this stream.
    Credit(Stream, u32),
    /// The terminal has changed its size: rows, columns.
    Resize(u16, u16),
    /// Send a signal (its Linux x86-64 number) to the command's process group.
    Signal(u8),
    /// Switch the guest off.
    Poweroff(Poweroff),
    /// Set the guest's clock: nanoseconds since 1970 in UTC.
    SetTime(u64),
    /// Answer `Pong` with the same number.
    Ping(u64),
}

/// From the agent to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost {
    /// The agent has opened the stream and waits for a `Hello`; sessions that the host knew of are gone.
    Announce,
    /// Answer to `Hello`; frames before it belong to an earlier link.
    Ready {
        /// [`VERSION`] of the agent.
        version: u16,
        /// That of the `Hello`.
        nonce: u64,
        /// Which build of the agent this is.
        build: u64,
        /// How many bytes of standard input each session takes before the agent grants more.
        stdin_window: u32,
    },
    /// The command runs, as this process.
    Started(u32),
    /// Bytes that the command wrote.
    Output(Stream, Vec<u8>),
    /// The host may send so many more bytes of standard input.
    Credit(u32),
    /// The command has ended and all that it wrote has been sent. The session is over.
    Exit(Ending),
    /// The command did not start (with the kernel's error number). The session is over.
    Failed(Failure, u32),
    /// Answer to `Ping`.
    Pong(u64),
}

/// Reads a payload from its front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Option<Vec<u8>> {
        let length = usize::try_from(self.u32()?).ok()?;
        let (head, rest): (&'a [u8], _) = self.0.split_at_checked(length)?;
        self.0 = rest;
        // The kernel ends strings at NUL: one inside would silently cut an argument.
        (!head.contains(&0)).then(|| head.to_vec())
    }

    fn list(&mut self) -> Option<Vec<Vec<u8>>> {
        let count = self.u32()?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(self.string()?);
        }
        Some(list)
    }

    fn end<T>(self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    out.extend_from_slice(&u32::try_from(string.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(string);
}

fn put_list(out: &mut Vec<u8>, list: &[Vec<u8>]) {
    out.extend_from_slice(&u32::try_from(list.len()).unwrap_or(u32::MAX).to_le_bytes());
    for string in list {
        put_string(out, string);
    }
}

impl Stream {
    fn number(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            _ => None,
        }
    }
}

impl Exec {
    /// The payload of its frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let absent = Terminal::default();
        let terminal = self.terminal.as_ref().unwrap_or(&absent);
        out.push(u8::from(self.terminal.is_some()));
        out.extend_from_slice(&terminal.rows.to_le_bytes());
        out.extend_from_slice(&terminal.columns.to_le_bytes());
        put_string(&mut out, &terminal.term);
        out.extend_from_slice(&self.output_window.to_le_bytes());
        put_string(&mut out, &self.directory);
        put_string(&mut out, &self.user);
        put_list(&mut out, &self.argv);
        put_list(&mut out, &self.env);
        out
    }

    fn decode(payload: &[u8]) -> Option<Self> {
        let mut reader = Reader(payload);
        let with_terminal = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let terminal = Terminal { rows: reader.u16()?, columns: reader.u16()?, term: reader.string()? };
        let output_window = reader.u32()?;
        let directory = reader.string()?;
        let user = reader.string()?;
        let argv = reader.list()?;
        let env = reader.list()?;
        let terminal = with_terminal.then_some(terminal);
        reader.end(Self { argv, env, directory, user, terminal, output_window })
    }
}

impl ToAgent {
    /// Appends the frame that says this about `session` to `out`.
    pub fn send(&self, session: u32, out: &mut Outbox) {
        match self {
            Self::Hello { version, nonce } => {
                let mut payload = version.to_le_bytes().to_vec();
                payload.extend_from_slice(&nonce.to_le_bytes());
                out.frame(0x01, session, &payload);
            }
            Self::Exec(exec) => out.frame(0x02, session, &exec.encode()),
            Self::Stdin(bytes) => out.frame(0x03, session, bytes),
            Self::StdinEof => out.frame(0x04, session, &[]),
            Self::Credit(stream, count) => {
                let [a, b, c, d] = count.to_le_bytes();
                out.frame(0x05, session, &[stream.number(), a, b, c, d]);
            }
            Self::Resize(rows, columns) => {
                let ([a, b], [c, d]) = (rows.to_le_bytes(), columns.to_le_bytes());
                out.frame(0x06, session, &[a, b, c, d]);
            }
            Self::Signal(number) => out.frame(0x07, session, &[*number]),
            Self::Poweroff(how) => {
                let number = match how {
                    Poweroff::Orderly => 0,
                    Poweroff::Reboot => 1,
                    Poweroff::Immediate => 2,
                };
                out.frame(0x08, session, &[number]);
            }
            Self::SetTime(nanoseconds) => out.frame(0x09, session, &nanoseconds.to_le_bytes()),
            Self::Ping(number) => out.frame(0x0a, session, &number.to_le_bytes()),
        }
    }

    /// What `frame` says; `None` if it is malformed.
    pub fn decode(frame: Frame) -> Option<(u32, Self)> {
        let mut reader = Reader(&frame.payload);
        let message = match frame.kind {
            0x01 => Self::Hello { version: reader.u16()?, nonce: reader.u64()? },
            0x02 => return Some((frame.session, Self::Exec(Exec::decode(&frame.payload)?))),
            0x03 => return Some((frame.session, Self::Stdin(frame.payload))),
            0x04 => Self::StdinEof,
            0x05 => Self::Credit(Stream::from_number(reader.u8()?)?, reader.u32()?),
            0x06 => Self::Resize(reader.u16()?, reader.u16()?),
            0x07 => Self::Signal(reader.u8()?),
            0x08 => Self::Poweroff(match reader.u8()? {
                0 => Poweroff::Orderly,
                1 => Poweroff::Reboot,
                2 => Poweroff::Immediate,
                _ => return None,
            }),
            0x09 => Self::SetTime(reader.u64()?),
            0x0a => Self::Ping(reader.u64()?),
            _ => return None,
        };
        reader.end((frame.session, message))
    }
}

impl ToHost {
    /// Appends the frame that says this about `session` to `out`.
    pub fn send(&self, session: u32, out: &mut Outbox) {
        match self {
            Self::Announce => out.frame(0x81, session, &VERSION.to_le_bytes()),
            Self::Ready { version, nonce, build, stdin_window } => {
                let mut payload = version.to_le_bytes().to_vec();
                payload.extend_from_slice(&nonce.to_le_bytes());
                payload.extend_from_slice(&build.to_le_bytes());
                payload.extend_from_slice(&stdin_window.to_le_bytes());
                out.frame(0x82, session, &payload);
            }
            Self::Started(pid) => out.frame(0x83, session, &pid.to_le_bytes()),
            Self::Output(Stream::Stdout, bytes) => out.frame(0x84, session, bytes),
            Self::Output(Stream::Stderr, bytes) => out.frame(0x85, session, bytes),
            Self::Credit(count) => out.frame(0x86, session, &count.to_le_bytes()),
            Self::Exit(Ending::Code(code)) => out.frame(0x87, session, &[0, *code]),
            Self::Exit(Ending::Signal(number)) => out.frame(0x87, session, &[1, *number]),
            Self::Failed(failure, errno) => {
                let number = match failure {
                    Failure::NotFound => 0,
                    Failure::NotExecutable => 1,
                    Failure::Directory => 2,
                    Failure::User => 3,
                    Failure::Resources => 4,
                };
                let [a, b, c, d] = errno.to_le_bytes();
                out.frame(0x88, session, &[number, a, b, c, d]);
            }
            Self::Pong(number) => out.frame(0x89, session, &number.to_le_bytes()),
        }
    }

    /// What `frame` says; `None` if it is malformed.
    pub fn decode(frame: Frame) -> Option<(u32, Self)> {
        let mut reader = Reader(&frame.payload);
        let message = match frame.kind {
            0x81 => {
                reader.u16()?;
                Self::Announce
            }
            0x82 => Self::Ready {
                version: reader.u16()?,
                nonce: reader.u64()?,
                build: reader.u64()?,
                stdin_window: reader.u32()?,
            },
            0x83 => Self::Started(reader.u32()?),
            0x84 => return Some((frame.session, Self::Output(Stream::Stdout, frame.payload))),
            0x85 => return Some((frame.session, Self::Output(Stream::Stderr, frame.payload))),
            0x86 => Self::Credit(reader.u32()?),
            0x87 => Self::Exit(match reader.u8()? {
                0 => Ending::Code(reader.u8()?),
                1 => Ending::Signal(reader.u8()?),
                _ => return None,
            }),
            0x88 => Self::Failed(
                match reader.u8()? {
                    0 => Failure::NotFound,
                    1 => Failure::NotExecutable,
                    2 => Failure::Directory,
                    3 => Failure::User,
                    4 => Failure::Resources,
                    _ => return None,
                },
                reader.u32()?,
            ),
            0x89 => Self::Pong(reader.u64()?),
            _ => return None,
        };
        reader.end((frame.session, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Decoder, REQUEST_MAX};
    use proptest::prelude::*;

    fn frame_of(out: &Outbox) -> Frame {
        Decoder::new(REQUEST_MAX).feed(&mut out.pending()).unwrap()
    }

    fn string() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(1u8..=255, 0..20)
    }

    fn exec() -> impl Strategy<Value = Exec> {
        let list = || proptest::collection::vec(string(), 0..5);
        let terminal = proptest::option::of((any::<u16>(), any::<u16>(), string()));
        (list(), list(), string(), string(), terminal, any::<u32>()).prop_map(
            |(argv, env, directory, user, terminal, output_window)| Exec {
                argv,
                env,
                directory,
                user,
                terminal: terminal.map(|(rows, columns, term)| Terminal { rows, columns, term }),
                output_window,
            },
        )
    }

    fn stream() -> impl Strategy<Value = Stream> {
        prop_oneof![Just(Stream::Stdout), Just(Stream::Stderr)]
    }

    fn to_agent() -> impl Strategy<Value = ToAgent> {
        prop_oneof![
            (any::<u16>(), any::<u64>()).prop_map(|(version, nonce)| ToAgent::Hello { version, nonce }),
            exec().prop_map(ToAgent::Exec),
            proptest::collection::vec(any::<u8>(), 0..100).prop_map(ToAgent::Stdin),
            Just(ToAgent::StdinEof),
            (stream(), any::<u32>()).prop_map(|(stream, count)| ToAgent::Credit(stream, count)),
            (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| ToAgent::Resize(rows, columns)),
            any::<u8>().prop_map(ToAgent::Signal),
            prop_oneof![Just(Poweroff::Orderly), Just(Poweroff::Reboot), Just(Poweroff::Immediate)]
                .prop_map(ToAgent::Poweroff),
            any::<u64>().prop_map(ToAgent::SetTime),
            any::<u64>().prop_map(ToAgent::Ping),
        ]
    }

    fn to_host() -> impl Strategy<Value = ToHost> {
        let failure = prop_oneof![
            Just(Failure::NotFound),
            Just(Failure::NotExecutable),
            Just(Failure::Directory),
            Just(Failure::User),
            Just(Failure::Resources)
        ];
        prop_oneof![
            Just(ToHost::Announce),
            (any::<u16>(), any::<u64>(), any::<u64>(), any::<u32>()).prop_map(
                |(version, nonce, build, stdin_window)| ToHost::Ready { version, nonce, build, stdin_window }
            ),
            any::<u32>().prop_map(ToHost::Started),
            (stream(), proptest::collection::vec(any::<u8>(), 0..100))
                .prop_map(|(stream, bytes)| ToHost::Output(stream, bytes)),
            any::<u32>().prop_map(ToHost::Credit),
            any::<u8>().prop_map(|code| ToHost::Exit(Ending::Code(code))),
            any::<u8>().prop_map(|number| ToHost::Exit(Ending::Signal(number))),
            (failure, any::<u32>()).prop_map(|(failure, errno)| ToHost::Failed(failure, errno)),
            any::<u64>().prop_map(ToHost::Pong),
        ]
    }

    proptest! {
        #[test]
        fn what_is_sent_is_read(session in any::<u32>(), down in to_agent(), up in to_host()) {
            let mut out = Outbox::default();
            down.send(session, &mut out);
            let frame = frame_of(&out);
            prop_assert_eq!(ToHost::decode(frame.clone()), None, "an echo must not look like an answer");
            prop_assert_eq!(ToAgent::decode(frame), Some((session, down)));
            out.clear();
            up.send(session, &mut out);
            let frame = frame_of(&out);
            prop_assert_eq!(ToAgent::decode(frame.clone()), None);
            prop_assert_eq!(ToHost::decode(frame), Some((session, up)));
        }

        #[test]
        fn any_payload_is_read_or_refused(kind in any::<u8>(), payload in proptest::collection::vec(any::<u8>(), 0..60)) {
            let frame = Frame { kind, session: 1, payload };
            if let Some((session, message)) = ToHost::decode(frame.clone()) {
                let mut out = Outbox::default();
                message.send(session, &mut out);
                prop_assert!(kind == 0x81 || frame_of(&out) == frame);
            }
            if let Some((session, message)) = ToAgent::decode(frame.clone()) {
                let mut out = Outbox::default();
                message.send(session, &mut out);
                // The fields of an absent terminal are not kept.
                prop_assert!(kind == 0x02 || frame_of(&out) == frame);
            }
        }
    }
}
