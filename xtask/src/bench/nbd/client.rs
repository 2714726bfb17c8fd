//! A client that batches: it costs so little that the server is what is measured.
//!
//! It keeps a number of requests under way on one connection, sends all that it may in one call, and takes all replies
//! that have come in one call. Replies are simple ones. Each block of the disk begins with its own number, which is
//! checked on reads and kept by writes.

use anyhow::{Context, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of a numbered block.
pub const BLOCK: usize = 4096;
const REPLY: usize = 16;
const READ: u16 = 0;
const WRITE: u16 = 1;

/// What is asked of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Whether requests write.
    pub writes: bool,
    /// Bytes of each request: a multiple of [`BLOCK`].
    pub bytes: usize,
    /// Requests under way.
    pub depth: usize,
}

/// A connection in its transmission phase.
pub struct Client {
    stream: UnixStream,
    size: u64,
    random: u64,
    buffer: Vec<u8>,
    /// What a write carries but for its numbers.
    filling: Vec<u8>,
}

/// What came back.
enum Parse {
    Header,
    /// Payload of the request with this cookie: bytes that were seen, and its offset.
    Data {
        slot: usize,
        seen: usize,
    },
}

impl Client {
    /// Connects to the default export.
    pub fn connect(socket: &Path, seed: u64) -> anyhow::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "no newstyle server");
        // Client flags: fixed newstyle, no zeroes; then EXPORT_NAME with the empty name.
        stream.write_all(&3u32.to_be_bytes())?;
        stream.write_all(&[&b"IHAVEOPT"[..], &1u32.to_be_bytes(), &0u32.to_be_bytes()].concat())?;
        let mut export = [0; 10];
        stream.read_exact(&mut export)?;
        let size = u64::from_be_bytes(export[..8].try_into()?);
        Ok(Self { stream, size, random: seed | 1, buffer: vec![0; 1 << 20], filling: vec![] })
    }

    fn place(&mut self, bytes: usize) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let places = (self.size / bytes as u64).max(1);
        (self.random >> 33) % places * bytes as u64
    }

    fn request(&mut self, load: Load, slot: usize, offsets: &mut [u64], out: &mut Vec<u8>) {
        let at = self.place(load.bytes);
        offsets[slot] = at;
        let kind = if load.writes { WRITE } else { READ };
        out.extend(0x2560_9513_u32.to_be_bytes());
        out.extend(0u16.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((slot as u64).to_be_bytes());
        out.extend(at.to_be_bytes());
        out.extend((load.bytes as u32).to_be_bytes());
        if load.writes {
            let start = out.len();
            self.filling.resize(load.bytes, 0x5a);
            out.extend_from_slice(&self.filling);
            for number in 0..load.bytes / BLOCK {
                let place = at / BLOCK as u64 + number as u64;
                out[start + number * BLOCK..][..8].copy_from_slice(&place.to_le_bytes());
            }
        }
    }

    /// Asks until `time` has passed; answers how many requests were answered in how long.
    pub fn run(&mut self, load: Load, time: Duration) -> anyhow::Result<(u64, Duration)> {
        let mut offsets = vec![0; load.depth];
        let mut out = Vec::new();
        (0..load.depth).for_each(|slot| self.request(load, slot, &mut offsets, &mut out));
        let began = Instant::now();
        self.stream.write_all(&out)?;
        let (mut answered, mut under_way) = (0u64, load.depth);
        let (mut start, mut end) = (0, 0);
        let mut state = Parse::Header;
        while under_way > 0 {
            if start == end {
                (start, end) = (0, 0);
            } else if self.buffer.len() - end < BLOCK {
                self.buffer.copy_within(start..end, 0);
                (start, end) = (0, end - start);
            }
            let count = self.stream.read(&mut self.buffer[end..]).context("the server does not answer")?;
            ensure!(count > 0, "the server has left");
            end += count;
            out.clear();
            let more = began.elapsed() < time;
            loop {
                match state {
                    Parse::Header if end - start < REPLY => break,
                    Parse::Header => {
                        let head = &self.buffer[start..start + REPLY];
                        ensure!(
                            head[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0],
                            "no good reply: {head:x?}"
                        );
                        let slot = u64::from_be_bytes(head[8..].try_into()?) as usize;
                        ensure!(slot < load.depth, "a reply to nothing");
                        start += REPLY;
                        state = Parse::Data { slot, seen: if load.writes { load.bytes } else { 0 } };
                    }
                    Parse::Data { slot, mut seen } => {
                        let part = (end - start).min(load.bytes - seen);
                        self.check(offsets[slot], seen, start, part)?;
                        (start, seen) = (start + part, seen + part);
                        state = Parse::Data { slot, seen };
                        if seen < load.bytes {
                            break;
                        }
                        state = Parse::Header;
                        answered += 1;
                        if more {
                            self.request(load, slot, &mut offsets, &mut out);
                        } else {
                            under_way -= 1;
                        }
                    }
                }
            }
            if !out.is_empty() {
                self.stream.write_all(&out)?;
            }
        }
        Ok((answered, began.elapsed()))
    }

    /// Whether blocks that begin in this part of a reply have their numbers.
    fn check(&self, offset: u64, seen: usize, start: usize, part: usize) -> anyhow::Result<()> {
        let mut block = seen.next_multiple_of(BLOCK);
        while block + 8 <= seen + part {
            let place = start + block - seen;
            let number = u64::from_le_bytes(self.buffer[place..place + 8].try_into()?);
            ensure!(number == (offset + block as u64) / BLOCK as u64, "the server has mixed up its blocks");
            block += BLOCK;
        }
        Ok(())
    }
}
