//! Reading what needs no waiting: a file's bytes that the host has in memory.
//!
//! The kernel says of a read from a file whether it would have to wait for a disk (`RWF_NOWAIT`); then another thread
//! waits, and the one that receives goes on. Some file systems cannot say it; of these the ones in memory never wait. Where
//! bytes come otherwise (decompressed, past the page cache, from another server) nobody can say it beforehand.

use crate::buffers::{Buffers, ReadInto};
use rustix::io::{Errno, ReadWriteFlags};
use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// File systems in memory: tmpfs and ramfs (statfs(2)).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// What a file's kernel can say of reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tells {
    /// Whether they would wait.
    Beforehand,
    /// They never wait.
    Never,
    /// Nothing.
    Nothing,
}

thread_local! {
    /// The file that was read last and what it tells. A descriptor that comes to mean another file makes one read slower, or
    /// wait; nothing else.
    static LAST: Cell<Option<(RawFd, Tells)>> = const { Cell::new(None) };
}

/// Memory to read into, where nothing is waited for: a read that would fails with `WouldBlock`.
pub struct ReadNow<'a> {
    into: ReadInto<'a>,
    may_have_waited: Cell<bool>,
}

impl<'a> ReadNow<'a> {
    /// Reads go into `bytes`.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { into: ReadInto::new(bytes), may_have_waited: Cell::new(false) }
    }

    fn wait_for_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.may_have_waited.set(true);
        self.into.read_file(at, len, file, offset)
    }

    /// Whether bytes came in ways that may have taken long.
    pub fn may_have_waited(&self) -> bool {
        self.may_have_waited.get()
    }
}

/// Finds out what a file tells, by reading from it.
fn probe(file: BorrowedFd<'_>) -> Tells {
    match rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut [0; 1])], 0, ReadWriteFlags::NOWAIT) {
        Ok(_) | Err(Errno::AGAIN) => Tells::Beforehand,
        Err(_) => match rustix::fs::fstatfs(file) {
            Ok(place) if IN_MEMORY.contains(&(place.f_type as u64)) => Tells::Never,
            _ => Tells::Nothing,
        },
    }
}

fn tells(file: BorrowedFd<'_>) -> Tells {
    let number = file.as_raw_fd();
    match LAST.get() {
        Some((last, tells)) if last == number => tells,
        _ => {
            let tells = probe(file);
            LAST.set(Some((number, tells)));
            tells
        }
    }
}

/// Reads whole pieces; what lies beyond the end of the file reads as zeroes.
fn read_now(file: BorrowedFd<'_>, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0usize;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(done as u64);
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::NOWAIT) {
            Ok(0) => {
                rest.fill(0);
                return Ok(());
            }
            Ok(count) => done = done.saturating_add(count),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Buffers for ReadNow<'_> {
    fn len(&self) -> u64 {
        self.into.len()
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        match tells(file) {
            Tells::Beforehand => match self.into.with(at, len, |bytes| read_now(file, offset, bytes)) {
                // The descriptor means another file now.
                Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                    LAST.set(None);
                    self.wait_for_file(at, len, file, offset)
                }
                done => done,
            },
            Tells::Never => self.into.read_file(at, len, file, offset),
            Tells::Nothing => self.wait_for_file(at, len, file, offset),
        }
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.into.write_file(at, len, file, offset)
    }

    fn put(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.may_have_waited.set(true);
        self.into.put(at, from)
    }

    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.into.get(at, into)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn cached_bytes_are_read_and_what_tells_nothing_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 5000]).unwrap();
        let open = std::fs::File::open(file.path()).unwrap();
        let mut bytes = [1; 8192];
        let now = ReadNow::new(&mut bytes);
        now.read_file(0, 8192, open.as_fd(), 0).unwrap();
        assert!(!now.may_have_waited());
        now.put(8191, &[3]).unwrap();
        assert!(now.may_have_waited());
        assert!(bytes[..5000] == [7; 5000] && bytes[5000..8191] == [0; 3191] && bytes[8191] == 3);
    }

    #[test]
    fn a_descriptor_that_has_come_to_mean_another_file_is_read_all_the_same() {
        // What is no file of a disk cannot say whether it would wait.
        let open = std::fs::File::open("/proc/version").unwrap();
        LAST.set(Some((open.as_raw_fd(), Tells::Beforehand)));
        let mut bytes = [0; 5];
        let now = ReadNow::new(&mut bytes);
        now.read_file(0, 5, open.as_fd(), 0).unwrap();
        assert!(now.may_have_waited());
        assert_eq!(&bytes, b"Linux");
    }

    #[test]
    fn a_file_that_is_not_in_memory_is_not_waited_for() {
        // The build's directory is on a disk; elsewhere there may be nothing to wait for.
        let place = option_env!("CARGO_MANIFEST_DIR").filter(|place| std::path::Path::new(place).exists());
        let Some(file) = place.and_then(|place| tempfile::NamedTempFile::new_in(place).ok()) else { return };
        std::fs::write(file.path(), vec![7; 1 << 20]).unwrap();
        let open = std::fs::File::open(file.path()).unwrap();
        if tells(open.as_fd()) != Tells::Beforehand {
            return;
        }
        open.sync_all().unwrap();
        rustix::fs::fadvise(&open, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut bytes = [1; 4096];
        let now = ReadNow::new(&mut bytes);
        let read = now.read_file(0, 4096, open.as_fd(), 512 << 10);
        // Somebody else may have brought it back meanwhile, but nobody has waited.
        assert!(read.is_ok() || read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock));
        assert!(!now.may_have_waited());
    }
}
