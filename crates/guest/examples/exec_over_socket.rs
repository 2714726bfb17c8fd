//! Runs a command in a guest whose agent's stream is a Unix socket (as any VMM's virtio port or serial port can be):
//! `exec_over_socket SOCKET COMMAND...`, or `exec_over_socket SOCKET --poweroff`. Standard input is passed on; a small example of
//! how to drive [`guest::Client`].

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use guest::{Client, Event, Exec, Poweroff, SessionId, Stream};

struct Host {
    socket: UnixStream,
    client: Client,
    input: Receiver<Vec<u8>>,
    waiting: Vec<u8>,
    ended: bool,
}

impl Host {
    /// Moves bytes between socket and client. False when there were none.
    fn transfer(&mut self) -> std::io::Result<bool> {
        let mut moved = false;
        let mut buffer = [0; 64 * 1024];
        match self.socket.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.client.receive(buffer.get(..count).unwrap_or(&[]));
                moved = true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if !self.client.pending().is_empty() {
            match self.socket.write(self.client.pending()) {
                Ok(count) => {
                    self.client.sent(count);
                    moved = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    fn give_input(&mut self, session: SessionId) {
        if self.waiting.is_empty() {
            match self.input.try_recv() {
                Ok(bytes) => self.waiting = bytes,
                Err(TryRecvError::Disconnected) if !self.ended => {
                    self.ended = self.client.stdin_eof(session).is_ok();
                }
                Err(_) => {}
            }
        }
        if let Ok(count) = self.client.stdin(session, &self.waiting) {
            self.waiting.drain(..count);
        }
    }
}

fn read_input() -> Receiver<Vec<u8>> {
    let (sender, receiver) = sync_channel(4);
    thread::spawn(move || {
        let mut buffer = [0; 64 * 1024];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
            if sender.send(buffer.get(..count).unwrap_or(&[]).to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

fn main() -> std::io::Result<ExitCode> {
    let mut words = std::env::args().skip(1);
    let path =
        words.next().ok_or_else(|| std::io::Error::other("usage: exec_over_socket SOCKET COMMAND..."))?;
    let command: Vec<String> = words.collect();
    let socket = UnixStream::connect(path)?;
    socket.set_nonblocking(true)?;
    let nonce = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |age| age.as_nanos() as u64);
    let mut host =
        Host { socket, client: Client::new(nonce), input: read_input(), waiting: Vec::new(), ended: false };
    let mut session = None;
    let (start, mut nudged) = (Instant::now(), Instant::now());
    loop {
        let moved = host.transfer()?;
        while let Some(event) = host.client.poll_event() {
            match event {
                Event::Ready { .. } if command == ["--poweroff"] => {
                    host.client.poweroff(Poweroff::Immediate).map_err(std::io::Error::other)?;
                }
                Event::Ready { .. } if session.is_none() => {
                    eprintln!("ready after {:?}", start.elapsed());
                    let argv = command.iter().map(|word| word.clone().into_bytes()).collect();
                    let exec = Exec { argv, ..Exec::default() };
                    session = Some(host.client.exec(exec).map_err(std::io::Error::other)?);
                }
                Event::Output { session, stream, bytes } => {
                    match stream {
                        Stream::Stdout => std::io::stdout().write_all(&bytes)?,
                        Stream::Stderr => std::io::stderr().write_all(&bytes)?,
                    }
                    host.client.consumed(session, stream, bytes.len());
                }
                Event::Exited { ending, .. } => {
                    std::io::stdout().flush()?;
                    eprintln!("ended after {:?}", start.elapsed());
                    return Ok(ExitCode::from(ending.exit_code()));
                }
                Event::Failed { failure, errno, .. } => {
                    eprintln!("{failure:?}: {}", std::io::Error::from_raw_os_error(errno as i32));
                    return Ok(ExitCode::from(failure.exit_code()));
                }
                Event::SessionLost { reason, .. } => return Err(std::io::Error::other(reason)),
                _ => {}
            }
        }
        if let Some(session) = session {
            host.give_input(session);
        }
        if nudged.elapsed() > Duration::from_secs(1) {
            host.client.nudge();
            nudged = Instant::now();
        }
        if !moved {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
