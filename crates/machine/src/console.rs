//! The guest's serial console, shared: one thread drains the port into a log and to everybody attached.
//!
//! Lock order: the viewers' lock alone; the port's device lock is never taken under it.

use crate::port::Port;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Seek, Write};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How much of the console's past is kept for those who attach, in bytes.
const SCROLLBACK: usize = 64 * 1024;
/// How many chunks a slow viewer may be behind before it loses output.
const VIEWER_CHUNKS: usize = 1024;
/// The log starts over when it grows beyond this, in bytes.
const LOG_MAX: u64 = 64 << 20;

struct Shared {
    past: VecDeque<u8>,
    viewers: Vec<SyncSender<Vec<u8>>>,
    log: Option<File>,
    logged: u64,
    closed: bool,
}

/// The console of one guest. Cheap to clone; its thread ends when the machine does.
#[derive(Clone)]
pub struct Console {
    port: Port,
    shared: Arc<Mutex<Shared>>,
}

impl Console {
    /// Drains `port` from now on, into `log` too if there is one.
    pub fn new(port: Port, log: Option<File>) -> std::io::Result<Self> {
        let shared = Shared { past: VecDeque::new(), viewers: Vec::new(), log, logged: 0, closed: false };
        let console = Self { port, shared: Arc::new(Mutex::new(shared)) };
        let drain = console.clone();
        thread::Builder::new().name("console".into()).spawn(move || {
            sandbox::narrow(sandbox::Role::Port);
            drain.drain();
        })?;
        Ok(console)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drain(&self) {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let open = self.port.receive(&mut bytes, Duration::from_secs(3600));
            let mut shared = self.lock();
            shared.take(&bytes);
            if !open {
                // Viewers see their channel close.
                shared.closed = true;
                shared.viewers.clear();
                return;
            }
        }
    }

    /// What the guest has printed lately, and everything from now on, of which nothing is in the former.
    pub fn attach_with_past(&self) -> (Vec<u8>, Receiver<Vec<u8>>) {
        let mut shared = self.lock();
        let past = shared.past.iter().copied().collect();
        (past, shared.attach())
    }

    /// What the guest has printed lately.
    pub fn past(&self) -> Vec<u8> {
        self.lock().past.iter().copied().collect()
    }

    /// The last `count` lines the guest has printed.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let past = self.past();
        let text = String::from_utf8_lossy(&past);
        let lines: Vec<&str> = text.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(count)).map(|line| (*line).to_owned()).collect()
    }

    /// Adds a line of yado's own to what the guest has printed.
    pub fn note(&self, line: &str) {
        self.lock().take(format!("\r\n[yado: {line}]\r\n").as_bytes());
    }

    /// Everything printed from now on. A viewer that does not keep up loses output; the channel closes with the machine.
    pub fn attach(&self) -> Receiver<Vec<u8>> {
        self.lock().attach()
    }

    /// Types bytes, waiting up to `timeout` for each piece to be taken; answers how many were.
    pub fn send(&self, bytes: &[u8], timeout: Duration) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            match self.port.send(bytes.get(sent..).unwrap_or_default(), timeout) {
                0 => break,
                taken => sent = sent.saturating_add(taken),
            }
        }
        sent
    }
}

impl Shared {
    fn attach(&mut self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = sync_channel(VIEWER_CHUNKS);
        if !self.closed {
            self.viewers.push(sender);
        }
        receiver
    }

    fn take(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.past.extend(bytes);
        let excess = self.past.len().saturating_sub(SCROLLBACK);
        self.past.drain(..excess);
        if let Some(log) = &mut self.log {
            // A log that cannot be written must not stop the console.
            if log.write_all(bytes).is_err() {
                self.log = None;
            }
        }
        self.logged = self.logged.saturating_add(bytes.len() as u64);
        if self.logged > LOG_MAX
            && let Some(log) = &mut self.log
        {
            // Where it is written next is the file's own affair: cutting it off does not move that.
            let restarted = log.set_len(0).and_then(|()| log.rewind());
            if restarted.and_then(|()| log.write_all(b"[earlier output dropped]\n")).is_err() {
                self.log = None;
            }
            self.logged = 0;
        }
        self.viewers.retain(|viewer| match viewer.try_send(bytes.to_vec()) {
            Ok(()) | Err(TrySendError::Full(_)) => true,
            Err(TrySendError::Disconnected(_)) => false,
        });
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_log_that_has_grown_too_long_starts_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let log = Some(File::create(&path).unwrap());
        let mut shared = Shared { past: VecDeque::new(), viewers: Vec::new(), log, logged: 0, closed: false };
        let lines = [b'x'; 1 << 20];
        for _ in 0..=LOG_MAX >> 20 {
            shared.take(&lines);
        }
        shared.take(b"end\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"[earlier output dropped]\nend\n");
    }
}
