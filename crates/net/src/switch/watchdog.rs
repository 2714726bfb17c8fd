//! Frees the switch's thread from a system call in which a front end lets it wait.
//!
//! A front end's event counters are made non-blocking when they come. But that is a flag of the open file, which the front end has too: it
//! can take the flag away and fill the counter, and then who writes to it waits until somebody reads. So a second thread looks twice a
//! second whether the first still turns; if it does not, a signal ends the wait, and the server sends that front end away.

use crate::sys;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often it looks.
const PERIOD: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Shared {
    /// Another number in each turn; 0 while the thread sleeps.
    pulse: AtomicU64,
    ended: AtomicBool,
}

/// Watches the thread that made it, until it is dropped there.
#[derive(Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    turn: u64,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Begins to watch the current thread.
    pub fn new() -> io::Result<Self> {
        sys::let_calls_be_interrupted()?;
        let watched = sys::Thread::current();
        let shared = Arc::new(Shared::default());
        let seen = shared.clone();
        let look = move || {
            let mut before = 0;
            while !seen.ended.load(Ordering::Acquire) {
                let now = seen.pulse.load(Ordering::Relaxed);
                if now != 0 && now == before {
                    watched.interrupt();
                }
                before = now;
                std::thread::park_timeout(PERIOD);
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(look)?;
        Ok(Self { shared, turn: 0, thread: Some(thread) })
    }

    /// The thread turns.
    #[inline]
    pub fn turn(&mut self) {
        self.turn = self.turn.wrapping_add(1).max(1);
        self.shared.pulse.store(self.turn, Ordering::Relaxed);
    }

    /// The thread is about to sleep, for as long as it likes.
    pub fn sleep(&self) {
        self.shared.pulse.store(0, Ordering::Relaxed);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // Afterwards nobody knows the thread that is watched.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{Errno, write};
    use std::time::Instant;

    #[test]
    fn who_waits_is_woken_and_who_turns_is_not() {
        let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let mut watchdog = Watchdog::new().unwrap();
        watchdog.turn();
        let begin = Instant::now();
        assert_eq!(write(&full, &1u64.to_ne_bytes()), Err(Errno::INTR));
        assert!(begin.elapsed() < Duration::from_secs(20));
        watchdog.sleep();
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        a.set_read_timeout(Some(Duration::from_millis(1200))).unwrap();
        let error = std::io::Read::read(&mut &a, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "nobody disturbs who sleeps");
        drop(b);
    }
}
