//! The socket of a vhost-user connection: whole messages with their files, one after the other, without ever waiting.

use super::message::{BODY_MAX, FILES_MAX, HEADER_LEN, Header, flag};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::time::Timespec;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side has left.
    #[error("the other side has closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The other side breaks the rules of the protocol.
    #[error("the other side broke the vhost-user protocol: {0}")]
    Protocol(&'static str),
    /// Whoever tells the other side something, or gets files from it, is made to wait.
    #[error("the other side makes others wait")]
    Waits,
}

/// Whether nobody else can make those wait who ask about a file or close it, as the server of a FUSE file system can: it is memory, or
/// of a kind that the kernel serves by itself. Neither question reaches a file system.
fn is_harmless(file: &OwnedFd) -> bool {
    let own = |link: std::ffi::CString| {
        let kinds = [&b"anon_inode:"[..], b"socket:", b"pipe:"];
        kinds.iter().any(|kind| link.as_bytes().starts_with(kind))
    };
    let link = || rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new());
    rustix::fs::fcntl_get_seals(file).is_ok() || link().is_ok_and(own)
}

/// Closes a file in a thread of its own, which may wait for ever. Who sends one is sent away for good.
fn discard(file: OwnedFd) {
    // Without a thread, rather lose a file than wait.
    let file = std::mem::ManuallyDrop::new(file);
    let close = move || drop(std::mem::ManuallyDrop::into_inner(file));
    drop(std::thread::Builder::new().name("discard".into()).spawn(close));
}

impl From<Errno> for Error {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A message.
#[derive(Debug)]
pub struct Message {
    /// What it says of itself.
    pub header: Header,
    /// Its body.
    pub body: Vec<u8>,
    /// Files that came with it.
    pub files: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    /// Takes over a socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, bytes: Vec::with_capacity(HEADER_LEN), files: Vec::new() }
    }

    /// The next message; `None` if it is not all there yet.
    pub fn receive(&mut self) -> Result<Option<Message>, Error> {
        loop {
            let header = self.bytes.first_chunk::<HEADER_LEN>().map(|bytes| Header::decode(*bytes));
            let whole = match header {
                None => HEADER_LEN,
                Some(header) if header.flags & flag::VERSION_MASK != flag::VERSION => {
                    return Err(Error::Protocol("another version than 1"));
                }
                Some(header) if header.size as usize > BODY_MAX => {
                    return Err(Error::Protocol("a message that is too long"));
                }
                Some(header) => HEADER_LEN.saturating_add(header.size as usize),
            };
            if let Some(header) = header.filter(|_| self.bytes.len() >= whole) {
                let body = self.bytes.get(HEADER_LEN..).unwrap_or_default().to_vec();
                self.bytes.clear();
                return Ok(Some(Message { header, body, files: std::mem::take(&mut self.files) }));
            }
            if !self.read(whole)? {
                return Ok(None);
            }
        }
    }

    /// Reads until there are `until` bytes, or no more for now; answers whether something came.
    fn read(&mut self, until: usize) -> Result<bool, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let have = self.bytes.len();
        let mut room = vec![0; until.saturating_sub(have)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let result = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut room)], &mut ancillary, flags);
        let count = match result {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN) => return Ok(false),
            Err(Errno::INTR) => return Ok(true),
            Err(Errno::CONNRESET) => return Err(Error::Closed),
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        if let Some(place) = self.files.iter().position(|file| !is_harmless(file)) {
            discard(self.files.swap_remove(place));
            return Err(Error::Waits);
        }
        if self.files.len() > FILES_MAX {
            return Err(Error::Protocol("too many files"));
        }
        if count == 0 {
            return Err(Error::Closed);
        }
        self.bytes.extend(room.into_iter().take(count));
        Ok(true)
    }

    /// Sends a message. Messages are short and answers are awaited, so the socket has room; one that has none is closed.
    pub fn send(&self, header: Header, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if self.try_send(header, body, files)? {
            Ok(())
        } else {
            Err(Error::Protocol("answers are not read"))
        }
    }

    /// Sends a message to a side that may have much to do, which is waited for.
    pub fn send_within(
        &self,
        wait: Duration,
        header: Header,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let until = Instant::now().checked_add(wait);
        while !self.try_send(header, body, files)? {
            let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Error::Protocol("messages are not read"));
            }
            let secs = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
            let left = Timespec { tv_sec: secs, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(self, PollFlags::OUT)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Answers whether the socket had room.
    fn try_send(&self, header: Header, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<bool, Error> {
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(Error::Protocol("too many files"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
                Ok(count) if count == bytes.len() => return Ok(true),
                Ok(_) => return Err(Error::Protocol("a message went only in part")),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn files_of_file_systems_are_not_taken() {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let memory = super::super::memory::memory_file(4096).unwrap();
        let (mut socket, other) = UnixStream::pair().unwrap();
        assert!([&event, &memory, &socket.try_clone().unwrap().into()].into_iter().all(is_harmless));
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        assert!(!is_harmless(&file.try_clone().unwrap().into()));
        let mut channel = Channel::new(other);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let bytes = [0; HEADER_LEN];
        sendmsg(&socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(channel.receive(), Err(Error::Waits)));
        drop(channel);
        assert_eq!(std::io::Read::read(&mut socket, &mut [0]).unwrap(), 0);
    }
}
