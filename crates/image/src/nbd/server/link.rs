//! A connection as its threads share it: the one that receives, and those that do what takes long.
//!
//! The receiving thread does most requests itself, at once: from the page cache that is the fastest. Reads that the host
//! knows to have to wait for a disk, what must wait for stable storage, and everything else for as long as the image proves
//! to be slow, goes to threads that are made as they are
//! needed, so that requests do not wait for each other. A client can only make its own connection wait.

use super::export::{Contexts, Export};
use super::perform::{Now, Subject};
use super::reply::Output;
use crate::nbd::stream::Stream;
use crate::nbd::wire::{Mode, Request, command};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Threads of one connection.
const THREADS_MAX: usize = 64;
/// Bytes of payloads and replies that wait in one connection; one request may always.
const BYTES_MAX: u64 = 64 << 20;
/// How long a thread stays without work.
const IDLE: Duration = Duration::from_secs(5);
/// Room for replies of a thread.
const ROOM: usize = 64 << 10;
/// Time that a request takes at most where the image is fast, beside what its bytes take.
const QUICK: Duration = Duration::from_micros(40);
/// Quick requests after which a slow image is a fast one.
const QUICK_IN_ROW: u32 = 64;

/// Whether so many requests with so many bytes took no longer than memory does.
pub fn was_quick(took: Duration, requests: u32, bytes: u64) -> bool {
    // A gigabyte each second is a nanosecond each byte.
    took <= QUICK.saturating_mul(requests).saturating_add(Duration::from_nanos(bytes))
}

/// What was done, since the beginning.
#[derive(Debug, Default)]
pub struct Counters {
    pub requests: AtomicU64,
    pub read: AtomicU64,
    pub written: AtomicU64,
}

struct Job {
    request: Request,
    payload: Vec<u8>,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// Requests that wait or are being done, and their bytes.
    requests: usize,
    bytes: u64,
    threads: usize,
    idle: usize,
    over: bool,
}

/// See the module.
pub struct Link {
    pub stream: Stream,
    pub export: Arc<Export>,
    pub mode: Mode,
    pub contexts: Contexts,
    pub counters: Counters,
    jobs: Mutex<Jobs>,
    /// Work has come, or no more will: for the threads.
    work_came: Condvar,
    /// Work is done, or a thread gone: for the one that receives.
    work_done: Condvar,
    slow: AtomicBool,
    quick: AtomicU32,
    /// The last read said beforehand whether it would wait.
    tells: AtomicBool,
    /// The server stops.
    ending: AtomicBool,
}

impl Link {
    pub fn new(stream: Stream, export: Arc<Export>, mode: Mode, contexts: Contexts) -> Self {
        Self {
            stream,
            export,
            mode,
            contexts,
            counters: Counters::default(),
            jobs: Mutex::default(),
            work_came: Condvar::new(),
            work_done: Condvar::new(),
            slow: AtomicBool::new(false),
            quick: AtomicU32::new(0),
            tells: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        }
    }

    pub fn subject(&self) -> Subject<'_> {
        Subject { export: &self.export, mode: self.mode, contexts: self.contexts, ending: &self.ending }
    }

    /// No more requests are taken, and long ones come to an end.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.stream.end_receiving();
    }

    /// Whether the server stops.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request is for other threads.
    pub fn takes_long(&self, request: &Request) -> bool {
        let moves = matches!(request.kind, command::READ | command::WRITE);
        let stable = request.kind == command::WRITE && request.flags & command::FLAG_FUA != 0;
        !moves || stable || self.slow.load(Ordering::Relaxed)
    }

    /// Whether a read may be tried where it came: the image is quick, or its reads are known beforehand not to be.
    pub fn reads_now(&self) -> bool {
        self.tells.load(Ordering::Relaxed) || !self.slow.load(Ordering::Relaxed)
    }

    /// Notes what became of a read that was tried.
    pub fn note_now(&self, now: Now) {
        let tells = now != Now::MayHaveWaited;
        if self.tells.load(Ordering::Relaxed) != tells {
            self.tells.store(tells, Ordering::Relaxed);
        }
    }

    /// Notes how long requests took that were done where they came.
    pub fn note(&self, took: Duration, requests: u32, bytes: u64) {
        if !was_quick(took, requests, bytes) {
            self.quick.store(0, Ordering::Relaxed);
            self.slow.store(true, Ordering::Relaxed);
        }
    }

    /// Hands a request to another thread; waits while too many are under way.
    pub fn hand_over(self: &Arc<Self>, request: Request, payload: Vec<u8>) -> io::Result<()> {
        let bytes = if request.kind == command::READ { request.len } else { payload.len() as u64 };
        let mut jobs = self.jobs();
        let crowded = |jobs: &mut Jobs| {
            let full = jobs.requests >= THREADS_MAX || jobs.bytes.saturating_add(bytes) > BYTES_MAX;
            full && jobs.requests > 0
        };
        jobs = self.work_done.wait_while(jobs, |jobs| crowded(jobs)).unwrap_or_else(PoisonError::into_inner);
        jobs.requests = jobs.requests.saturating_add(1);
        jobs.bytes = jobs.bytes.saturating_add(bytes);
        jobs.waiting.push_back(Job { request, payload });
        if jobs.idle < jobs.waiting.len() && jobs.threads < THREADS_MAX {
            jobs.threads = jobs.threads.saturating_add(1);
            drop(jobs);
            let this = self.clone();
            let spawned = std::thread::Builder::new().name("nbd-work".into()).spawn(move || this.work());
            if let Err(error) = spawned {
                let mut jobs = self.jobs();
                jobs.threads = jobs.threads.saturating_sub(1);
                if jobs.threads == 0 {
                    return Err(error);
                }
            }
        }
        self.work_came.notify_one();
        Ok(())
    }

    fn next(&self) -> Option<Job> {
        let mut jobs = self.jobs();
        jobs.idle = jobs.idle.saturating_add(1);
        let nothing = |jobs: &mut Jobs| jobs.waiting.is_empty() && !jobs.over;
        let (mut jobs, _) =
            self.work_came.wait_timeout_while(jobs, IDLE, nothing).unwrap_or_else(PoisonError::into_inner);
        jobs.idle = jobs.idle.saturating_sub(1);
        let job = jobs.waiting.pop_front();
        if job.is_none() {
            jobs.threads = jobs.threads.saturating_sub(1);
            self.work_done.notify_all();
        }
        job
    }

    fn work(&self) {
        let mut buffer = Vec::new();
        while let Some(job) = self.next() {
            let mut output = Output::new(&self.stream, self.mode, ROOM, buffer);
            let began = Instant::now();
            let performed = self.subject().perform(&job.request, &job.payload, &mut output);
            self.note_worked(&job.request, began.elapsed().saturating_sub(output.take_sending()));
            if performed.and_then(|()| output.send()).is_err() {
                // Nobody hears answers any more: nothing further is asked.
                self.stream.end_receiving();
            }
            buffer = output.into_buffer();
            let bytes =
                if job.request.kind == command::READ { job.request.len } else { job.payload.len() as u64 };
            let mut jobs = self.jobs();
            jobs.requests = jobs.requests.saturating_sub(1);
            jobs.bytes = jobs.bytes.saturating_sub(bytes);
            self.work_done.notify_all();
        }
    }

    fn note_worked(&self, request: &Request, took: Duration) {
        if !matches!(request.kind, command::READ | command::WRITE) || request.flags & command::FLAG_FUA != 0 {
            return;
        }
        if !was_quick(took, 1, request.len) {
            self.quick.store(0, Ordering::Relaxed);
        } else if self.quick.fetch_add(1, Ordering::Relaxed) >= QUICK_IN_ROW {
            self.slow.store(false, Ordering::Relaxed);
        }
    }

    /// Waits until all requests are answered and all threads gone.
    pub fn finish(&self) {
        let mut jobs = self.jobs();
        jobs.over = true;
        self.work_came.notify_all();
        while jobs.threads > 0 {
            jobs = self.work_done.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
