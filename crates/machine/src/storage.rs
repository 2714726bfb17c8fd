//! A disk's workers: they take requests from a storage controller, move bytes between guest RAM and the image, answer.
//!
//! A request that the host cannot do is reported to the guest, ignored, or waited for while the machine stands still
//! ([`OnError`]).
//!
//! A few threads per disk. As long as the image is in the host's memory one of them takes all that there is; once requests
//! take as long as a disk does each takes one, so that the disk sees several at a time. Lock order: the disk's [`Traffic`],
//! held while requests are worked on but not while one is waited for, then the controller's lock, held only to take or
//! answer a request and never during I/O; or the count of those that wait, then the reasons to stand still.

use crate::config::OnError;
use crate::port::Wake;
use crate::standstill::Standstill;
use device::block::{Controller, Operation, Outcome, Request, Segment};
use image::{Buffers, Disk};
use memory::GuestMemory;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How many requests are taken in one go of the lock.
const BATCH: usize = 16;
/// Time that a request takes at most where the image is in memory, beside a nanosecond for each byte.
const QUICK: Duration = Duration::from_micros(40);
/// Quick requests after which a slow disk is a quick one.
const QUICK_IN_ROW: u32 = 64;
/// How often a disk that waits for space looks whether there is some.
const LOOK: Duration = Duration::from_secs(1);
/// How often a disk that waits looks whether the machine is gone.
const GLANCE: Duration = Duration::from_millis(100);

/// Held while a disk's requests are worked on. Whoever holds it from outside knows that none is, and that none begins:
/// nothing of the disk reads or writes guest RAM. It counts the times that this was so: what was taken before is not worked
/// on any more.
#[derive(Clone, Default)]
pub struct Traffic(Arc<RwLock<u64>>);

impl Traffic {
    /// Waits until no request is being worked on, and keeps it so; those taken before are given up.
    pub fn hold(&self) -> RwLockWriteGuard<'_, u64> {
        let mut held = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *held = held.wrapping_add(1);
        held
    }

    fn work(&self) -> RwLockReadGuard<'_, u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that a disk's threads work with.
pub struct Worker {
    /// Whose requests it serves.
    pub controller: Arc<Mutex<dyn Controller>>,
    /// Where the bytes are.
    pub disk: Box<dyn Disk>,
    /// Where they are in the guest.
    pub memory: GuestMemory,
    /// Held while requests are worked on.
    pub traffic: Traffic,
    /// What becomes of requests that the host cannot do.
    pub errors: Errors,
}

/// What becomes of requests that the host cannot do.
pub struct Errors {
    /// Those that write, flush included.
    pub write: OnError,
    /// Those that read.
    pub read: OnError,
    /// The disk's number, as a reason to stand still.
    pub disk: usize,
    /// The machine.
    pub standstill: Standstill,
    /// Hears what happens.
    pub tell: Box<dyn Fn(Trouble) + Send + Sync>,
}

/// What a disk has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// There is no space, and the guest sees errors; not said again before a write has succeeded.
    Full,
    /// There is no space, and the machine stands still.
    WaitsForSpace,
    /// The host fails, and the machine stands still.
    Fails,
    /// What it stood still for is done.
    Over,
}

impl Errors {
    fn on(&self, request: &Request) -> OnError {
        if request.operation == Operation::Read { self.read } else { self.write }
    }

    /// What the machine stands still for, if it does.
    fn stops(&self, request: &Request, outcome: Outcome) -> Option<Trouble> {
        match (outcome, self.on(request)) {
            (Outcome::NoSpace, OnError::Stop | OnError::Enospc) => Some(Trouble::WaitsForSpace),
            (Outcome::IoError, OnError::Stop) => Some(Trouble::Fails),
            _ => None,
        }
    }

    /// Waits until it is worth trying again, or somebody has asked for it since `seen`; `false` if the machine is gone.
    fn wait(&self, trouble: Trouble, seen: u64, wake: &Wake) -> bool {
        let began = Instant::now();
        loop {
            self.standstill.wait_nudge(seen, GLANCE);
            if wake.count().1 {
                return false;
            }
            let space = trouble == Trouble::WaitsForSpace && began.elapsed() >= LOOK;
            if space || self.standstill.nudges() != seen {
                return true;
            }
        }
    }
}

/// What the threads of a disk know together.
struct Crew {
    worker: Worker,
    wake: Wake,
    /// The last write found no space.
    full: AtomicBool,
    /// Threads that wait while the machine stands still.
    waiting: Mutex<usize>,
    /// Requests take as long as a disk does: each is for a thread of its own.
    slow: AtomicBool,
    /// Quick ones since it was slow.
    quick: AtomicU32,
}

impl Worker {
    /// Serves from so many threads of its own until `wake` is closed. The image is flushed at the end.
    pub fn serve(self, name: &str, wake: &Wake, threads: usize) -> io::Result<Vec<JoinHandle<()>>> {
        let crew = Arc::new(Crew {
            worker: self,
            wake: wake.clone(),
            full: AtomicBool::new(false),
            waiting: Mutex::default(),
            slow: AtomicBool::new(false),
            quick: AtomicU32::new(0),
        });
        let spawn = |number| {
            let crew = crew.clone();
            thread::Builder::new().name(format!("{name}.{number}")).spawn(move || {
                sandbox::narrow(sandbox::Role::Disk);
                crew.run();
            })
        };
        (0..threads).map(spawn).collect()
    }

    fn controller(&self) -> MutexGuard<'_, dyn Controller + 'static> {
        self.controller.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a request, unless its guest has been reset meanwhile.
    fn execute(&self, request: &Request, current: bool) -> Outcome {
        if current { execute(self.disk.as_ref(), &self.memory, request) } else { Outcome::BadAddress }
    }
}

impl Crew {
    fn run(&self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let (seen, closed) = self.wake.count();
            let working = self.worker.traffic.work();
            let slow = self.slow.load(Ordering::Relaxed);
            {
                let most = if slow { 1 } else { BATCH };
                let mut controller = self.worker.controller();
                while batch.len() < most && !batch.last().is_some_and(is_long) {
                    let Some(request) = controller.next_request() else { break };
                    batch.push(request);
                }
            }
            if batch.is_empty() {
                drop(working);
                if closed {
                    break;
                }
                self.wake.wait_change(seen);
                continue;
            }
            if slow || batch.last().is_some_and(is_long) {
                // There may be more for another one, and somebody has to hear what comes meanwhile.
                self.wake.nudge_one();
            }
            self.work_off(&mut batch, working);
        }
        if !self.worker.disk.read_only() {
            // The machine is gone; nobody is left to tell.
            let _ = self.worker.disk.flush();
        }
    }

    /// Does all requests of a batch.
    fn work_off<'a>(&'a self, batch: &mut Vec<Request>, mut working: RwLockReadGuard<'a, u64>) {
        let turn = *working;
        let (began, count) = (Instant::now(), batch.len());
        let mut bytes = 0u64;
        for request in batch.drain(..) {
            let mut outcome = self.worker.execute(&request, *working == turn);
            if let Some(trouble) = self.worker.errors.stops(&request, outcome) {
                // A guest that resets the machine must not wait for this disk.
                drop(working);
                (outcome, working) = self.stand(&request, trouble, turn);
            }
            outcome = self.judge(&request, outcome);
            self.worker.controller().complete(request.token, outcome);
            bytes = bytes.saturating_add(request.len);
        }
        self.note(began.elapsed(), count, bytes);
    }

    /// Keeps the machine still until a request is done, or fails in another way, or the machine is gone.
    fn stand(
        &self,
        request: &Request,
        mut trouble: Trouble,
        turn: u64,
    ) -> (Outcome, RwLockReadGuard<'_, u64>) {
        let errors = &self.worker.errors;
        let mut seen = errors.standstill.nudges();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            errors.standstill.hold_for_disk(errors.disk);
            *waiting = waiting.saturating_add(1);
            if *waiting == 1 {
                (errors.tell)(trouble);
            }
        }
        loop {
            let gone = !errors.wait(trouble, seen, &self.wake);
            seen = errors.standstill.nudges();
            let working = self.worker.traffic.work();
            let outcome = self.worker.execute(request, *working == turn);
            match errors.stops(request, outcome).filter(|_| !gone) {
                Some(still) => trouble = still,
                None => {
                    let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    *waiting = waiting.saturating_sub(1);
                    if *waiting == 0 && !gone {
                        (errors.tell)(Trouble::Over);
                    }
                    errors.standstill.release_for_disk(errors.disk);
                    return (outcome, working);
                }
            }
        }
    }

    /// What the guest hears of a request.
    fn judge(&self, request: &Request, outcome: Outcome) -> Outcome {
        let errors = &self.worker.errors;
        if outcome == Outcome::NoSpace
            && errors.stops(request, outcome).is_none()
            && !self.full.swap(true, Ordering::Relaxed)
        {
            (errors.tell)(Trouble::Full);
        }
        if outcome == Outcome::Ok && matches!(request.operation, Operation::Write { .. }) {
            self.full.store(false, Ordering::Relaxed);
        }
        let failed = matches!(outcome, Outcome::IoError | Outcome::NoSpace);
        if failed && errors.on(request) == OnError::Ignore { Outcome::Ok } else { outcome }
    }

    /// Learns from how long a batch took.
    fn note(&self, took: Duration, requests: usize, bytes: u64) {
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        if took > QUICK.saturating_mul(requests).saturating_add(Duration::from_nanos(bytes)) {
            self.quick.store(0, Ordering::Relaxed);
            self.slow.store(true, Ordering::Relaxed);
        } else if self.slow.load(Ordering::Relaxed)
            && self.quick.fetch_add(1, Ordering::Relaxed) >= QUICK_IN_ROW
        {
            self.slow.store(false, Ordering::Relaxed);
        }
    }
}

/// Whether a request takes its time on a disk that is quick otherwise: it reaches stable storage, or changes what is allocated. No other
/// request waits for one of those.
fn is_long(request: &Request) -> bool {
    !matches!(request.operation, Operation::Read | Operation::Write { fua: false })
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
        Operation::WriteZeroes { unmap, fua } => {
            let written = disk.write_zeroes(*offset, *len, *unmap);
            if *fua { written.and_then(|()| disk.flush()) } else { written }
        }
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

    fn errors(write: OnError, tell: impl Fn(Trouble) + Send + Sync + 'static) -> Errors {
        let (read, standstill) = (OnError::Report, Standstill::default());
        Errors { write, read, disk: 0, standstill, tell: Box::new(tell) }
    }

    /// A disk that has no space until somebody makes some, and whose reads fail at once or take their time.
    #[derive(Clone, Default)]
    struct Scripted {
        space: Arc<AtomicBool>,
        slow: bool,
        /// Flushes do not end.
        stuck: Arc<AtomicBool>,
        /// Slow reads now, and at most.
        now: Arc<AtomicU32>,
        most: Arc<AtomicU32>,
    }

    impl Disk for Scripted {
        fn capacity(&self) -> u64 {
            1 << 20
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read(&self, _: u64, _: &dyn Buffers) -> io::Result<()> {
            if !self.slow {
                return Err(io::Error::other("unreadable"));
            }
            let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(now, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(10));
            self.now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
        fn write(&self, _: u64, _: &dyn Buffers) -> io::Result<()> {
            if self.space.load(Ordering::SeqCst) { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
        }
        fn flush(&self) -> io::Result<()> {
            while self.stuck.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Ok(())
        }
        fn block_status(&self, _: u64, _: u64) -> io::Result<image::Status> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn resize(&self, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn snapshot(&self, _: &str) -> io::Result<()> {
            Ok(())
        }
    }

    /// A request for the first sector.
    fn first(token: u64, operation: Operation) -> Request {
        Request { token, operation, offset: 0, len: 512, segments: vec![Segment { address: 0, len: 512 }] }
    }

    /// A write to a full disk, a read that fails, and a flush.
    struct Story {
        rings: Arc<Mutex<Rings>>,
        space: Arc<AtomicBool>,
        heard: std::sync::mpsc::Receiver<Trouble>,
        standstill: Standstill,
        traffic: Traffic,
        wake: Wake,
        threads: Vec<JoinHandle<()>>,
    }

    impl Story {
        fn begin(write: OnError, read: OnError) -> Self {
            let write_first = first(1, Operation::Write { fua: false });
            let requests = [write_first, first(2, Operation::Read), first(3, Operation::Flush)];
            let rings = Arc::new(Mutex::new(Rings { requests: requests.into(), answers: Vec::new() }));
            let (disk, wake, traffic) = (Scripted::default(), Wake::default(), Traffic::default());
            let space = disk.space.clone();
            let (tell, heard) = std::sync::mpsc::channel();
            let errors = Errors { read, ..errors(write, move |trouble| tell.send(trouble).unwrap()) };
            let standstill = errors.standstill.clone();
            let worker = Worker {
                controller: rings.clone(),
                disk: Box::new(disk),
                memory: GuestMemory::new(&[(0, 1 << 16)], Backing::Private).unwrap(),
                traffic: traffic.clone(),
                errors,
            };
            let threads = worker.serve("disk", &wake, 1).unwrap();
            Self { rings, space, heard, standstill, traffic, wake, threads }
        }

        fn hear(&self) -> Trouble {
            self.heard.recv_timeout(Duration::from_secs(20)).unwrap()
        }

        fn answers(&self) -> Vec<(u64, Outcome)> {
            self.rings.lock().unwrap().answers.clone()
        }

        fn end(&mut self) -> Vec<(u64, Outcome)> {
            self.wake.close();
            self.threads.drain(..).for_each(|thread| thread.join().unwrap());
            self.answers()
        }
    }

    #[test]
    fn a_full_disk_waits_for_space_and_goes_on_by_itself() {
        let mut story = Story::begin(OnError::Enospc, OnError::Report);
        assert_eq!(story.hear(), Trouble::WaitsForSpace);
        assert_eq!((story.answers(), story.standstill.inspect().len()), (vec![], 1));
        story.space.store(true, Ordering::SeqCst);
        assert_eq!(story.hear(), Trouble::Over);
        assert_eq!(story.end(), [(1, Outcome::Ok), (2, Outcome::IoError), (3, Outcome::Ok)]);
        assert!(story.standstill.inspect().is_empty());
    }

    #[test]
    fn errors_are_reported_or_ignored_as_was_said() {
        let mut story = Story::begin(OnError::Report, OnError::Ignore);
        assert_eq!(story.hear(), Trouble::Full);
        assert_eq!(story.end(), [(1, Outcome::NoSpace), (2, Outcome::Ok), (3, Outcome::Ok)]);
        let mut story = Story::begin(OnError::Ignore, OnError::Enospc);
        assert_eq!(story.end(), [(1, Outcome::Ok), (2, Outcome::IoError), (3, Outcome::Ok)]);
    }

    #[test]
    fn a_disk_that_fails_waits_for_somebody() {
        let mut story = Story::begin(OnError::Stop, OnError::Stop);
        assert_eq!(story.hear(), Trouble::WaitsForSpace);
        story.space.store(true, Ordering::SeqCst);
        story.standstill.release();
        assert_eq!((story.hear(), story.hear()), (Trouble::Over, Trouble::Fails));
        std::thread::sleep(GLANCE * 3);
        assert_eq!(story.answers(), [(1, Outcome::Ok)]);
        // Tried again in vain: nothing new is said. The machine's end is an end to waiting.
        story.standstill.release();
        assert_eq!(story.end(), [(1, Outcome::Ok), (2, Outcome::IoError), (3, Outcome::Ok)]);
    }

    #[test]
    fn what_was_taken_before_a_reset_is_not_done_after_it() {
        let mut story = Story::begin(OnError::Enospc, OnError::Report);
        assert_eq!(story.hear(), Trouble::WaitsForSpace);
        drop(story.traffic.hold());
        story.space.store(true, Ordering::SeqCst);
        assert_eq!(story.hear(), Trouble::Over);
        assert_eq!(
            story.end().iter().map(|(_, outcome)| *outcome).collect::<Vec<_>>(),
            [Outcome::BadAddress; 3]
        );
    }

    /// Serves a disk that has space.
    fn worker(rings: &Arc<Mutex<Rings>>, disk: &Scripted) -> Worker {
        Worker {
            controller: rings.clone(),
            disk: Box::new(disk.clone()),
            memory: GuestMemory::new(&[(0, 1 << 16)], Backing::Private).unwrap(),
            traffic: Traffic::default(),
            errors: errors(OnError::Enospc, |_| panic!("there is space")),
        }
    }

    #[test]
    fn a_slow_disk_sees_several_requests_at_a_time() {
        let requests = (0..40).map(|token| first(token, Operation::Read)).collect();
        let rings = Arc::new(Mutex::new(Rings { requests, answers: Vec::new() }));
        let disk = Scripted { slow: true, ..Scripted::default() };
        let worker = worker(&rings, &disk);
        let wake = Wake::default();
        let threads = worker.serve("disk", &wake, 4).unwrap();
        wake.close();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let answers = rings.lock().unwrap().answers.clone();
        assert!(answers.len() == 40 && answers.iter().all(|(_, outcome)| *outcome == Outcome::Ok));
        assert!(disk.most.load(Ordering::SeqCst) > 1);
    }

    #[test]
    fn a_flush_keeps_no_read_waiting() {
        let rings = Arc::new(Mutex::new(Rings { requests: VecDeque::new(), answers: Vec::new() }));
        let disk = Scripted::default();
        disk.stuck.store(true, Ordering::SeqCst);
        let worker = worker(&rings, &disk);
        let wake = Wake::with_ear().unwrap();
        let threads = worker.serve("disk", &wake, 2).unwrap();
        let ring = |requests: &[Request]| {
            rings.lock().unwrap().requests.extend(requests.iter().cloned());
            rustix::io::write(wake.ear().unwrap(), &1u64.to_ne_bytes()).unwrap();
        };
        let until = |count: usize| {
            let began = Instant::now();
            while rings.lock().unwrap().answers.len() < count {
                assert!(began.elapsed() < Duration::from_secs(20), "{count} are not answered");
                thread::sleep(Duration::from_millis(1));
            }
        };
        thread::sleep(Duration::from_millis(50));
        // One behind the flush at once, one while it is under way.
        ring(&[first(1, Operation::Flush), first(2, Operation::Read)]);
        until(1);
        ring(&[first(3, Operation::Read)]);
        until(2);
        disk.stuck.store(false, Ordering::SeqCst);
        until(3);
        let tokens: Vec<u64> = rings.lock().unwrap().answers.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, [2, 3, 1]);
        wake.close();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
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
            errors: errors(OnError::Enospc, |_| panic!("there is space")),
        };
        worker.serve("disk", &wake, 1).unwrap().into_iter().for_each(|thread| thread.join().unwrap());
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
