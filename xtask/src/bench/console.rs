//! A guest as a process whose standard output is its console, watched with a clock.

use anyhow::{Context, bail};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A running guest.
pub struct Console {
    child: Child,
    began: Instant,
    bytes: Receiver<(Instant, Vec<u8>)>,
    /// All that was printed so far.
    pub printed: Vec<u8>,
}

impl Console {
    /// Starts `command`; the clock runs from just before.
    pub fn start(mut command: Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let (sender, bytes) = channel();
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|stream| Box::new(stream) as _),
            child.stderr.take().map(|stream| Box::new(stream) as _),
        ];
        for mut stream in streams.into_iter().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    let Some(part) = buffer.get(..count) else { break };
                    if sender.send((Instant::now(), part.to_vec())).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { child, began, bytes, printed: Vec::new() })
    }

    /// Waits until `needle` is on the console; answers the time since the start.
    pub fn wait_for(&mut self, needle: &str, limit: Duration) -> anyhow::Result<Duration> {
        loop {
            let left = limit.saturating_sub(self.began.elapsed());
            let before = self.printed.len().saturating_sub(needle.len());
            match self.bytes.recv_timeout(left) {
                Ok((at, part)) => {
                    self.printed.extend(part);
                    let fresh = self.printed.get(before..).unwrap_or_default();
                    if fresh.windows(needle.len()).any(|window| window == needle.as_bytes()) {
                        return Ok(at.duration_since(self.began));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {needle:?} within {} s; last lines:\n{}", limit.as_secs(), self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("it ended without {needle:?}; last lines:\n{}", self.tail())
                }
            }
        }
    }

    /// Waits for the end; answers the time since the start.
    pub fn wait_end(&mut self, limit: Duration) -> anyhow::Result<Duration> {
        loop {
            match self.bytes.recv_timeout(limit.saturating_sub(self.began.elapsed())) {
                Ok((_, part)) => self.printed.extend(part),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("it did not end within {} s; last lines:\n{}", limit.as_secs(), self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait()?;
                    let took = self.began.elapsed();
                    if !status.success() {
                        bail!("it ended with {status}; last lines:\n{}", self.tail());
                    }
                    return Ok(took);
                }
            }
        }
    }

    /// Takes what comes until the end, a part at a time.
    pub fn next_part(&mut self, limit: Duration) -> Option<(Duration, Vec<u8>)> {
        let left = limit.saturating_sub(self.began.elapsed());
        let (at, part) = self.bytes.recv_timeout(left).ok()?;
        self.printed.extend_from_slice(&part);
        Some((at.duration_since(self.began), part))
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The last lines that were printed.
    pub fn tail(&self) -> String {
        let text = String::from_utf8_lossy(&self.printed);
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(12)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // A guest that runs on is ended as a user would; then for certain.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = Command::new("kill").arg(self.child.id().to_string()).status();
            let until = Instant::now() + Duration::from_secs(5);
            while Instant::now() < until && !matches!(self.child.try_wait(), Ok(Some(_))) {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
