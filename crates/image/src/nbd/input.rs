//! What a peer has sent and nobody has looked at yet, in a buffer of fixed size.

use super::stream::{Deadline, Stream};
use std::io;

/// Bytes that are moved to the buffer's beginning without need.
const MOVED_MAX: usize = 8 << 10;

/// Bytes from a peer.
pub struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// Room for `room` bytes.
    pub fn new(room: usize) -> Self {
        Self { bytes: vec![0; room], start: 0, end: 0 }
    }

    /// What is there.
    pub fn have(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Bytes that fit at most.
    pub fn room(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets the first bytes.
    pub fn consume(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Where the next bytes go: room for at least one, and for whatever `wanted` bytes lack.
    fn free(&mut self, wanted: usize) -> &mut [u8] {
        // Little is moved at once, so that the next bytes come in one go; much only when it must be.
        let little = self.end.saturating_sub(self.start) <= MOVED_MAX;
        if self.start > 0 && (little || self.start.saturating_add(wanted) > self.bytes.len()) {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Takes what has come already; `None` if nothing has, zero at the connection's end.
    pub fn fill_now(&mut self, stream: &Stream, wanted: usize) -> io::Result<Option<usize>> {
        let count = stream.receive_now(self.free(wanted))?;
        self.end = self.end.saturating_add(count.unwrap_or(0));
        Ok(count)
    }

    /// Waits for more; zero at the connection's end.
    pub fn fill(&mut self, stream: &Stream, wanted: usize, deadline: Deadline) -> io::Result<usize> {
        let count = stream.receive(self.free(wanted), deadline)?;
        self.end = self.end.saturating_add(count);
        Ok(count)
    }

    /// The next `count` bytes, which must fit; an error of the kind `UnexpectedEof` where the connection ends before.
    pub fn need(&mut self, stream: &Stream, count: usize, deadline: Deadline) -> io::Result<&[u8]> {
        if count > self.room() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while self.have().len() < count {
            if self.fill(stream, count, deadline)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.have().get(..count).unwrap_or_default())
    }

    /// Receives into somebody else's memory, what is here first.
    pub fn read_exact(&mut self, stream: &Stream, mut into: &mut [u8], deadline: Deadline) -> io::Result<()> {
        while !into.is_empty() {
            let have = self.have();
            let count = if have.is_empty() {
                match stream.receive(into, deadline)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => count,
                }
            } else {
                let count = have.len().min(into.len());
                if let (Some(to), Some(from)) = (into.get_mut(..count), have.get(..count)) {
                    to.copy_from_slice(from);
                }
                self.consume(count);
                count
            };
            into = into.get_mut(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Lets `count` bytes pass unseen.
    pub fn skip(&mut self, stream: &Stream, mut count: u64, deadline: Deadline) -> io::Result<()> {
        while count > 0 {
            if self.have().is_empty() && self.fill(stream, 1, deadline)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let part = crate::endian::size(count).min(self.have().len());
            self.consume(part);
            count = count.saturating_sub(part as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_come_whole_and_in_order() {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let stream = Stream::from(ours);
        let mut input = Input::new(8);
        assert_eq!(input.fill_now(&stream, 1).unwrap(), None);
        peer.write_all(b"0123456789abcdef").unwrap();
        assert_eq!(input.need(&stream, 3, None).unwrap(), b"012");
        input.consume(3);
        assert_eq!(input.need(&stream, 8, None).unwrap(), b"3456789a");
        assert!(input.need(&stream, 9, None).is_err());
        input.consume(6);
        let mut two = [0; 4];
        input.read_exact(&stream, &mut two, None).unwrap();
        assert_eq!(&two, b"9abc");
        input.skip(&stream, 2, None).unwrap();
        drop(peer);
        assert_eq!(input.need(&stream, 2, None).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let late = std::time::Instant::now();
        let (_peer, ours) = UnixStream::pair().unwrap();
        let error = Input::new(8).need(&ours.into(), 1, Some(late)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
