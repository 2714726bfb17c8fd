//! Looking at a socket for a moment before sleeping on it.
//!
//! To be woken costs a thread tens of microseconds; a client with one request at a time pays that for each. So who waits
//! looks first, for as long as lately would have been enough, and at most [`LONGEST`]. After a sleep that took longer,
//! as every sleep of an idle connection does, nobody looks; nor for a while after others wanted the CPU meanwhile. No
//! more threads look than the host has CPUs to spare.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest look.
const LONGEST: Duration = Duration::from_micros(100);
/// First look that is tried.
const SHORTEST: Duration = Duration::from_micros(20);
/// Somebody else has run on this CPU if giving it away took longer.
const GIVEN_AWAY: Duration = Duration::from_micros(30);
/// Sleeps without a look after that: on a busy host who sleeps is woken sooner than who looks gets his turn.
const REST: u32 = 256;

static LOOKING: AtomicUsize = AtomicUsize::new(0);

fn lookers_max() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    let cpus = CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    cpus.saturating_sub(1)
}

/// What one waiting thread has learnt.
#[derive(Debug, Default)]
pub struct Poll {
    window: Duration,
    /// Sleeps until the next look.
    rest: u32,
}

impl Poll {
    /// Tries now, and for a while if that is worth it; `None` if nothing came.
    pub fn look(
        &mut self,
        mut attempt: impl FnMut() -> io::Result<Option<usize>>,
    ) -> io::Result<Option<usize>> {
        let first = attempt()?;
        if first.is_some() || self.window.is_zero() {
            return Ok(first);
        }
        if LOOKING.fetch_add(1, Ordering::Relaxed) >= lookers_max() {
            LOOKING.fetch_sub(1, Ordering::Relaxed);
            return Ok(None);
        }
        let began = Instant::now();
        let found = loop {
            // Whoever has something to do on this CPU, the client above all, goes first.
            let before = Instant::now();
            std::thread::yield_now();
            if before.elapsed() > GIVEN_AWAY {
                (self.window, self.rest) = (Duration::ZERO, REST);
                break attempt();
            }
            match attempt() {
                Ok(None) if began.elapsed() < self.window => {}
                other => break other,
            }
        };
        LOOKING.fetch_sub(1, Ordering::Relaxed);
        found
    }

    /// Sleeps, and learns from how long.
    pub fn sleep<T>(&mut self, wait: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let began = Instant::now();
        let result = wait();
        self.learn(began.elapsed());
        result
    }

    fn learn(&mut self, slept: Duration) {
        self.rest = self.rest.saturating_sub(1);
        self.window = if slept <= LONGEST && self.rest == 0 {
            self.window.saturating_mul(2).clamp(SHORTEST, LONGEST)
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn looks_grow_where_answers_come_soon_and_end_where_they_do_not() {
        let mut poll = Poll::default();
        poll.learn(Duration::from_micros(3));
        assert_eq!(poll.window, SHORTEST);
        poll.learn(Duration::from_micros(60));
        assert_eq!(poll.window, SHORTEST * 2);
        poll.sleep(|| {
            std::thread::sleep(LONGEST * 3);
            Ok(())
        })
        .unwrap();
        assert_eq!(poll.window, Duration::ZERO);
        poll.rest = 2;
        poll.learn(Duration::from_micros(3));
        assert_eq!(poll.window, Duration::ZERO);
        poll.learn(Duration::from_micros(3));
        assert_eq!(poll.window, SHORTEST);
        poll.window = Duration::ZERO;
        let mut attempts = 0;
        let nothing = poll.look(|| {
            attempts += 1;
            Ok(None)
        });
        assert_eq!((nothing.unwrap(), attempts), (None, 1));
    }
}
