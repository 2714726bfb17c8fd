//! A guest's network card as those see it who carry its frames, and the bell by which it calls them.

use crate::batch::Batch;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long frames that find no room may keep all others out.
pub const STALL: Duration = Duration::from_millis(100);

/// Nobody waits longer for a bell.
const LONG: Duration = Duration::from_secs(3600);

/// Since when a batch is full of frames that find no room.
#[derive(Debug, Default)]
pub struct Stall(Option<Instant>);

impl Stall {
    /// Gives frames to a card, and gives them up after [`STALL`]; answers how long may be slept until then, if the batch is full.
    pub fn give(&mut self, card: &dyn Card, batch: &mut Batch) -> Option<Duration> {
        card.give(batch);
        if batch.has_room() {
            self.0 = None;
            return None;
        }
        let now = Instant::now();
        let left = STALL.saturating_sub(now.duration_since(*self.0.get_or_insert(now)));
        if !left.is_zero() {
            return Some(left);
        }
        card.give_up(batch);
        // If they stay, they keep nobody out, and the bell tells of room for them.
        (!batch.has_room()).then_some(LONG)
    }
}

/// A network card, or whatever else sends and receives frames.
pub trait Card: Send + Sync {
    /// Moves frames that the guest has sent into `batch` while it has room; answers whether there may be more.
    fn take(&self, batch: &mut Batch) -> bool;
    /// Moves frames from `batch` to the guest, those of each of its queues in order; those that find no room stay, and the bell rings
    /// when there is.
    fn give(&self, batch: &mut Batch);
    /// Says that `batch` is full of frames that have found no room for [`STALL`]: they are lost, if others could find some.
    fn give_up(&self, _batch: &mut Batch) {}
    /// A file that is readable when there are frames, for cards that do not ring the bell themselves.
    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct Inner {
    event: OwnedFd,
    /// Something has happened that nobody has looked at.
    rung: AtomicBool,
    /// Somebody sleeps on `event`.
    asleep: AtomicBool,
    closed: AtomicBool,
    /// Somebody rings by `event` alone.
    hung: AtomicBool,
}

/// Rung by a card that has frames, or room for them again. Costs a system call only if somebody sleeps.
#[derive(Clone)]
pub struct Bell(Arc<Inner>);

impl Bell {
    /// A bell that nobody has rung.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let (rung, asleep, closed) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
        let hung = AtomicBool::new(false);
        Ok(Self(Arc::new(Inner { event, rung, asleep, closed, hung })))
    }

    /// Its event counter, for whoever rings by that alone (an engine's doorbell): from now on everybody who answers looks at it.
    pub fn hang(&self) -> BorrowedFd<'_> {
        self.0.hung.store(true, Ordering::SeqCst);
        self.as_fd()
    }

    /// Whether the event counter had counted; it is at its beginning then.
    fn counted(&self) -> bool {
        rustix::io::read(&self.0.event, &mut [0; 8]).is_ok()
    }

    /// Rings.
    pub fn ring(&self) {
        self.0.rung.store(true, Ordering::SeqCst);
        if self.0.asleep.swap(false, Ordering::SeqCst) {
            // Fails only if the count is at its end, and then it is readable anyway.
            let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
        }
    }

    /// The machine is gone: whoever serves the card ends.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Whether the machine is gone.
    pub fn closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// Whether it was rung since it was asked last.
    pub fn answer(&self) -> bool {
        let counted = self.0.hung.load(Ordering::SeqCst) && self.counted();
        self.0.rung.swap(false, Ordering::SeqCst) || counted
    }

    /// Says that the caller is about to sleep until [`Self::fd`] is readable; `false`: it was rung meanwhile, do not.
    pub fn doze(&self) -> bool {
        self.0.asleep.store(true, Ordering::SeqCst);
        if self.0.rung.load(Ordering::SeqCst) {
            self.wake();
            return false;
        }
        true
    }

    /// Says that the caller sleeps no longer.
    pub fn wake(&self) {
        let woken = !self.0.asleep.swap(false, Ordering::SeqCst);
        if (woken || self.0.hung.load(Ordering::SeqCst)) && self.counted() {
            self.0.rung.store(true, Ordering::SeqCst);
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn readable(bell: &Bell) -> bool {
        let none = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&none)).unwrap() == 1
    }

    #[test]
    fn who_sleeps_is_woken_and_who_works_is_not_disturbed() {
        let bell = Bell::new().unwrap();
        bell.ring();
        assert!(!readable(&bell), "nobody sleeps");
        assert!(!bell.doze(), "it was rung");
        assert!(bell.answer() && !bell.answer());
        assert!(bell.doze());
        bell.ring();
        assert!(readable(&bell));
        bell.wake();
        assert!(!readable(&bell) && bell.answer());
        assert!(bell.doze());
        bell.close();
        assert!(readable(&bell) && bell.closed());
    }

    #[test]
    fn who_rings_by_the_counter_alone_is_heard_asleep_and_awake() {
        let bell = Bell::new().unwrap();
        let ring = || rustix::io::write(bell.hang(), &1u64.to_ne_bytes()).unwrap();
        ring();
        assert!(bell.answer() && !bell.answer(), "awake");
        assert!(bell.doze());
        ring();
        assert!(readable(&bell));
        bell.wake();
        assert!(!readable(&bell) && bell.answer() && !bell.answer(), "asleep");
        // Both ways at once are one ring.
        assert!(bell.doze());
        ring();
        bell.ring();
        bell.wake();
        assert!(!readable(&bell) && bell.answer() && !bell.answer());
    }
}
