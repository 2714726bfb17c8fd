//! How other threads reach a vCPU: a flag that it looks at before it runs the guest, and the way to make it look.
//!
//! States of the vCPU's thread: running the guest (woken by a kick), asleep in HLT (woken by the condition
//! variable), or busy in the loop (it will look anyway). The flag is set before the state is read, and the state
//! before the flag, so no wake-up is lost.

use cpu::Kick;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// One vCPU as other threads see it.
#[derive(Default)]
pub(crate) struct Slot {
    attention: AtomicBool,
    asleep: AtomicBool,
    /// KVM_HC_KICK_CPU: HLT ends without an interrupt.
    unhalt: AtomicBool,
    door: Mutex<()>,
    bell: Condvar,
    kick: OnceLock<Arc<dyn Kick>>,
    thread: OnceLock<ThreadId>,
}

impl Slot {
    /// Names the vCPU's kick.
    pub(crate) fn set_kick(&self, kick: Arc<dyn Kick>) {
        let _ = self.kick.set(kick);
    }

    /// The calling thread is the vCPU's.
    pub(crate) fn enter(&self) {
        let _ = self.thread.set(std::thread::current().id());
    }

    /// Makes the vCPU look at its interrupts and at what the machine wants of it.
    pub(crate) fn wake(&self) {
        self.attention.store(true, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            drop(self.door.lock().unwrap_or_else(PoisonError::into_inner));
            self.bell.notify_one();
        } else if self.thread.get().is_none_or(|&thread| thread != std::thread::current().id())
            && let Some(kick) = self.kick.get()
        {
            kick.kick();
        }
    }

    /// Makes the vCPU's next run return at once, from its own thread.
    pub(crate) fn wake_self(&self) {
        self.attention.store(true, Ordering::SeqCst);
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    /// Ends the vCPU's HLT (a paravirtual spinlock was released).
    pub(crate) fn unhalt(&self) {
        self.unhalt.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Takes the end of a HLT, if there was one.
    pub(crate) fn take_unhalt(&self) -> bool {
        self.unhalt.load(Ordering::Relaxed) && self.unhalt.swap(false, Ordering::SeqCst)
    }

    /// The vCPU's thread has changed what it should look at.
    pub(crate) fn note(&self) {
        self.attention.store(true, Ordering::Relaxed);
    }

    /// Whether there is something to look at; asking clears it.
    pub(crate) fn take_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until [`Self::wake`], or for `limit`.
    pub(crate) fn sleep(&self, limit: Option<Duration>) {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.store(true, Ordering::SeqCst);
        while !self.attention.load(Ordering::SeqCst) {
            door = match until {
                None => self.bell.wait(door).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.bell.wait_timeout(door, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        self.asleep.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_wake_is_never_lost() {
        let slot = Arc::new(Slot::default());
        let waker = slot.clone();
        let thread = std::thread::spawn(move || {
            for _ in 0..2000 {
                waker.wake();
                while waker.attention.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            }
        });
        for _ in 0..2000 {
            slot.sleep(None);
            assert!(slot.take_attention());
        }
        thread.join().unwrap();
        let before = Instant::now();
        slot.sleep(Some(Duration::from_millis(5)));
        assert!(before.elapsed() >= Duration::from_millis(5) && !slot.take_attention());
    }
}
