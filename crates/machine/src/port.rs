//! A byte stream into the guest: one port of a UART or virtio console, held from outside by any number of threads.
//!
//! Lock order: the device's lock is taken alone; the wake-up counter's lock is never held while calling a device.

use device::Notify;
use device::serial::Endpoint;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many bytes one [`Port::receive`] takes at most.
const CHUNK: usize = 64 * 1024;

/// How long [`Port::receive`] lets bytes gather once the first has come.
const GATHER: Duration = Duration::from_micros(500);

/// Wakes the holders of a device's ports; made before the device, which gets [`Wake::notify`].
///
/// One with an *ear*, an event counter, is woken by whatever counts that up, too: one of those who wait listens to it, the others wait
/// for a nudge. When the listener leaves to work, the ear is deaf until somebody waits again, for rings are not lost meanwhile.
#[derive(Clone, Default)]
pub struct Wake(Arc<Shared>);

#[derive(Default)]
struct Shared {
    turn: Mutex<Turn>,
    changed: Condvar,
    ear: Option<OwnedFd>,
}

#[derive(Default)]
struct Turn {
    count: u64,
    closed: bool,
    /// Threads that wait: without any, a nudge is no system call.
    waiting: usize,
    /// Another one listens to the ear.
    listening: bool,
}

/// Whom a change concerns.
#[derive(PartialEq, Eq)]
enum Whom {
    One,
    All,
}

impl Wake {
    /// One with an ear.
    pub fn with_ear() -> io::Result<Self> {
        let ear = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self(Arc::new(Shared { ear: Some(ear), ..Shared::default() })))
    }

    /// The event counter that it listens to.
    pub fn ear(&self) -> Option<BorrowedFd<'_>> {
        self.0.ear.as_ref().map(OwnedFd::as_fd)
    }

    /// The nudge to give to the device.
    pub fn notify(&self) -> Notify {
        let wake = self.clone();
        Notify::new(move || wake.change(Whom::All, |turn| turn.count = turn.count.wrapping_add(1)))
    }

    /// The nudge to give to a device whose holders all do the same: one of them is enough.
    pub fn notify_one(&self) -> Notify {
        let wake = self.clone();
        Notify::new(move || wake.nudge_one())
    }

    /// Wakes one of those that wait.
    pub fn nudge_one(&self) {
        self.change(Whom::One, |turn| turn.count = turn.count.wrapping_add(1));
    }

    /// The machine is gone: nobody waits any longer.
    pub fn close(&self) {
        self.change(Whom::All, |turn| turn.closed = true);
    }

    /// Changes something, and tells those that wait.
    fn change(&self, whom: Whom, change: impl FnOnce(&mut Turn)) {
        let mut turn = self.turn();
        change(&mut turn);
        let (waiting, listening) = (turn.waiting > 0, turn.listening);
        drop(turn);
        match whom {
            Whom::One if waiting => self.0.changed.notify_one(),
            Whom::All if waiting => self.0.changed.notify_all(),
            _ => {}
        }
        if listening
            && (whom == Whom::All || !waiting)
            && let Some(ear) = &self.0.ear
        {
            // Fails only if the count is at its end, and then it is readable anyway.
            let _ = rustix::io::write(ear, &1u64.to_ne_bytes());
        }
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.0.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often the device has stirred, and whether the machine is gone.
    pub fn count(&self) -> (u64, bool) {
        let turn = self.turn();
        (turn.count, turn.closed)
    }

    /// Waits until the count differs from `seen`, or the machine is gone (or now and then for no reason).
    pub fn wait_change(&self, seen: u64) {
        let now = Instant::now();
        self.wait(seen, now.checked_add(Duration::from_secs(3600)).unwrap_or(now));
    }

    /// Waits until the count differs from `seen`, the machine is gone, or `until`.
    fn wait(&self, seen: u64, until: Instant) {
        let mut turn = self.turn();
        while turn.count == seen && !turn.closed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            if let Some(ear) = self.0.ear.as_ref().filter(|_| !turn.listening) {
                turn.listening = true;
                drop(turn);
                let rung = listen(ear, left);
                turn = self.turn();
                turn.listening = false;
                if rung {
                    turn.count = turn.count.wrapping_add(1);
                }
                continue;
            }
            turn.waiting = turn.waiting.saturating_add(1);
            turn = self.0.changed.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
            turn.waiting = turn.waiting.saturating_sub(1);
        }
    }
}

/// Waits until `ear` has counted, at most so long; whether it has.
fn listen(ear: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // Whatever ends it, the caller looks again.
    let _ = poll(&mut [PollFd::new(ear, PollFlags::IN)], Some(&limit));
    rustix::io::read(ear, &mut [0; 8]).is_ok()
}

/// One end of a byte stream; the guest's driver holds the other. Cheap to clone.
#[derive(Clone)]
pub struct Port {
    device: Arc<Mutex<dyn Endpoint>>,
    number: u32,
    wake: Wake,
}

impl Port {
    /// Port `number` of `device`, which notifies `wake`.
    pub fn new(device: Arc<Mutex<dyn Endpoint>>, number: u32, wake: Wake) -> Self {
        Self { device, number, wake }
    }

    /// Waits up to `timeout` for bytes from the guest, or for the device to stir (it may have room again), and appends
    /// what the guest has sent. Answers `false` once the machine is gone and everything it sent has been taken.
    pub fn receive(&self, into: &mut Vec<u8>, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout).unwrap_or_else(Instant::now);
        let before = into.len();
        let (seen, closed) = self.wake.count();
        self.lock().take(self.number, into, CHUNK);
        if into.len() == before && !closed {
            self.wake.wait(seen, until);
            // A guest that prints does so byte by byte: a moment's patience saves it a wake-up of us for each.
            std::thread::sleep(GATHER);
            self.lock().take(self.number, into, CHUNK);
        }
        !closed || into.len() > before
    }

    /// Offers bytes to the guest, waiting up to `timeout` for it to take at least one; answers how many it took.
    pub fn send(&self, bytes: &[u8], timeout: Duration) -> usize {
        let until = Instant::now().checked_add(timeout).unwrap_or_else(Instant::now);
        loop {
            let (seen, closed) = self.wake.count();
            let taken = self.lock().offer(self.number, bytes);
            if taken > 0 || bytes.is_empty() || closed || Instant::now() >= until {
                return taken;
            }
            self.wake.wait(seen, until);
        }
    }

    /// Tells the guest whether somebody holds this end.
    pub fn connect(&self, connected: bool) {
        self.lock().connect(self.number, connected);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, dyn Endpoint + 'static> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Workers that take work from one place, as a disk's do.
    struct Crew {
        work: Arc<AtomicUsize>,
        done: Arc<AtomicUsize>,
        threads: Vec<std::thread::JoinHandle<()>>,
    }

    impl Crew {
        fn new(wake: &Wake, threads: usize) -> Self {
            let (work, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let one = || {
                let (wake, work, done) = (wake.clone(), work.clone(), done.clone());
                std::thread::spawn(move || {
                    loop {
                        let (seen, closed) = wake.count();
                        let taken =
                            work.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
                        match taken {
                            Ok(_) => _ = done.fetch_add(1, Ordering::SeqCst),
                            Err(_) if closed => return,
                            Err(_) => wake.wait_change(seen),
                        }
                    }
                })
            };
            let threads = (0..threads).map(|_| one()).collect();
            Self { work, done, threads }
        }

        fn until(&self, done: usize) {
            let began = Instant::now();
            while self.done.load(Ordering::SeqCst) < done {
                assert!(began.elapsed() < Duration::from_secs(20), "{done} are not done");
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn rings_and_nudges_are_all_heard_whoever_listens() {
        for threads in [1, 3] {
            let wake = Wake::with_ear().unwrap();
            let crew = Crew::new(&wake, threads);
            for turn in 1..=2000 {
                crew.work.fetch_add(1, Ordering::SeqCst);
                match turn % 3 {
                    0 => wake.nudge_one(),
                    1 => wake.notify().notify(),
                    _ => _ = rustix::io::write(wake.ear().unwrap(), &1u64.to_ne_bytes()).unwrap(),
                }
                if turn % 7 != 0 {
                    crew.until(turn);
                }
            }
            crew.until(2000);
            wake.close();
            crew.threads.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }

    #[test]
    fn one_without_an_ear_has_none_and_waits_no_longer_than_it_may() {
        assert!(Wake::default().ear().is_none());
        for wake in [Wake::default(), Wake::with_ear().unwrap()] {
            let began = Instant::now();
            wake.wait(0, began + Duration::from_millis(5));
            assert!((Duration::from_millis(5)..Duration::from_secs(5)).contains(&began.elapsed()));
        }
    }
}
