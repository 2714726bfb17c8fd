//! A disk's worker: takes requests from a storage controller, moves bytes between guest RAM and the image, answers.
//!
//! One thread per disk. Lock order: the disk's [`Traffic`], held while requests are worked on, then the controller's
//! lock, held only to take or answer a request and never during I/O.

use crate::port::Wake;
use device::block::{Controller, Operation, Outcome, Request, Segment};
use image::{Buffers, Disk};
use memory::GuestMemory;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// How many requests are taken in one go of the lock.
const BATCH: usize = 16;

/// Held while a disk's requests are worked on. Whoever holds it from outside knows that none is, and that none begins:
/// nothing of the disk reads or writes guest RAM.
#[derive(Clone, Default)]
pub struct Traffic(Arc<Mutex<()>>);

impl Traffic {
    /// Waits until no request is being worked on, and keeps it so.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that a disk's thread works with.
pub struct Worker {
    /// Whose requests it serves.
    pub controller: Arc<Mutex<dyn Controller>>,
    /// Where the bytes are.
    pub disk: Box<dyn Disk>,
    /// Where they are in the guest.
    pub memory: GuestMemory,
    /// Held while requests are worked on.
    pub traffic: Traffic,
    /// Called when the host has no space for a write, and not again before one has succeeded.
    pub full: Box<dyn Fn() + Send>,
}

impl Worker {
    /// Serves from a thread of its own until `wake` is closed. The image is flushed at the end.
    pub fn serve(self, name: &str, wake: Wake) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(name.to_owned()).spawn(move || self.run(&wake))
    }

    fn run(&self, wake: &Wake) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut was_full = false;
        loop {
            let (seen, closed) = wake.count();
            let working = self.traffic.hold();
            {
                let mut controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner);
                while batch.len() < BATCH {
                    let Some(request) = controller.next_request() else { break };
                    batch.push(request);
                }
            }
            if batch.is_empty() {
                drop(working);
                if closed {
                    break;
                }
                wake.wait_change(seen);
                continue;
            }
            for request in batch.drain(..) {
                let outcome = execute(self.disk.as_ref(), &self.memory, &request);
                let writes = matches!(request.operation, Operation::Write { .. });
                if outcome == Outcome::NoSpace && !std::mem::replace(&mut was_full, true) {
                    (self.full)();
                }
                was_full &= !(writes && outcome == Outcome::Ok);
                let mut controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner);
                controller.complete(request.token, outcome);
            }
        }
        if !self.disk.read_only() {
            // The machine is gone; nobody is left to tell.
            let _ = self.disk.flush();
        }
    }
}

fn execute(disk: &dyn Disk, memory: &GuestMemory, request: &Request) -> Outcome {
    let Request { operation, offset, len, segments, .. } = request;
    let guest = GuestBuffers { memory, segments, len: *len };
    if !segments.iter().all(|segment| memory.contains(segment.address, u64::from(segment.len))) {
        return Outcome::BadAddress;
    }
    let done = match operation {
        Operation::Read => disk.read(*offset, &guest),
        Operation::Write { fua } => {
            let written = disk.write(*offset, &guest);
            if *fua { written.and_then(|()| disk.flush()) } else { written }
        }
        Operation::Flush => disk.flush(),
        Operation::Discard => disk.discard(*offset, *len),
        Operation::WriteZeroes { unmap } => disk.write_zeroes(*offset, *len, *unmap),
    };
    match done.map_err(|error| error.kind()) {
        Ok(()) => Outcome::Ok,
        Err(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge) => {
            Outcome::NoSpace
        }
        Err(io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::Unsupported) => Outcome::Unsupported,
        Err(_) => Outcome::IoError,
    }
}

/// A request's memory: pieces of guest RAM, in order.
struct GuestBuffers<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    len: u64,
}

impl GuestBuffers<'_> {
    /// Calls `with` for each piece of RAM in the run of `len` bytes at `at`: its address, length, and place in the run.
    fn pieces(
        &self,
        at: u64,
        len: u64,
        mut with: impl FnMut(u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut skip, mut left, mut done) = (at, len, 0u64);
        for segment in self.segments {
            let size = u64::from(segment.len);
            if skip >= size {
                skip = skip.saturating_sub(size);
                continue;
            }
            let part = size.saturating_sub(skip).min(left);
            if part == 0 {
                break;
            }
            with(segment.address.wrapping_add(skip), part, done)?;
            skip = 0;
            done = done.saturating_add(part);
            left = left.saturating_sub(part);
        }
        if left == 0 { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl Buffers for GuestBuffers<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.pieces(at, len, |address, part, done| {
            self.memory.read_file(address, part, file, offset.saturating_add(done))
        })
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.pieces(at, len, |address, part, done| {
            self.memory.write_file(address, part, file, offset.saturating_add(done))
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut from = bytes;
        self.pieces(at, bytes.len() as u64, |address, part, _| {
            let (now, rest) = from.split_at_checked(part as usize).ok_or(io::ErrorKind::InvalidInput)?;
            from = rest;
            self.memory.write(address, now).map_err(|_| io::ErrorKind::InvalidInput.into())
        })
    }

    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let len = into.len() as u64;
        let mut to = into;
        self.pieces(at, len, |address, part, _| {
            let (now, rest) = std::mem::take(&mut to)
                .split_at_mut_checked(part as usize)
                .ok_or(io::ErrorKind::InvalidInput)?;
            to = rest;
            self.memory.read(address, now).map_err(|_| io::ErrorKind::InvalidInput.into())
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use memory::Backing;
    use std::collections::VecDeque;

    struct Rings {
        requests: VecDeque<Request>,
        answers: Vec<(u64, Outcome)>,
    }

    impl Controller for Rings {
        fn next_request(&mut self) -> Option<Request> {
            self.requests.pop_front()
        }
        fn complete(&mut self, token: u64, outcome: Outcome) {
            self.answers.push((token, outcome));
        }
    }

    #[test]
    fn requests_move_bytes_and_bad_ones_fail_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![3; 8192]).unwrap();
        let disk = image::format::Raw::open(&path, false).unwrap();
        let memory = GuestMemory::new(&[(0, 1 << 16)], Backing::Private).unwrap();
        memory.write(0x1000, b"one").unwrap();
        memory.write(0x3000, b"two").unwrap();
        let segment = |address, len| Segment { address, len };
        let request = |token, operation, offset, segments: &[Segment]| Request {
            token,
            operation,
            offset,
            len: segments.iter().map(|segment| u64::from(segment.len)).sum(),
            segments: segments.to_vec(),
        };
        let write = Operation::Write { fua: true };
        let rings = Arc::new(Mutex::new(Rings {
            requests: VecDeque::from([
                request(1, write, 100, &[segment(0x1000, 3), segment(0x3000, 3)]),
                request(2, Operation::Read, 99, &[segment(0x5000, 4), segment(0x6000, 5)]),
                request(3, Operation::Read, 0, &[segment(0xffff, 2)]),
                request(4, Operation::Read, 8190, &[segment(0, 8)]),
                request(5, Operation::Flush, 0, &[]),
            ]),
            answers: Vec::new(),
        }));
        let wake = Wake::default();
        wake.close();
        let worker = Worker {
            controller: rings.clone(),
            disk: Box::new(disk),
            memory: memory.clone(),
            traffic: Traffic::default(),
            full: Box::new(|| panic!("there is space")),
        };
        worker.serve("disk", wake).unwrap().join().unwrap();
        let expected = [
            (1, Outcome::Ok),
            (2, Outcome::Ok),
            (3, Outcome::BadAddress),
            (4, Outcome::IoError),
            (5, Outcome::Ok),
        ];
        assert_eq!(rings.lock().unwrap().answers, expected);
        assert_eq!(&std::fs::read(&path).unwrap()[99..107], b"\x03onetwo\x03");
        assert_eq!(&memory.read_array::<4>(0x5000).unwrap(), b"\x03one");
        assert_eq!(&memory.read_array::<5>(0x6000).unwrap(), b"two\x03\x03");
    }
}
