//! A byte stream into the guest: one port of a UART or virtio console, held from outside by any number of threads.
//!
//! Lock order: the device's lock is taken alone; the wake-up counter's lock is never held while calling a device.

use device::Notify;
use device::serial::Endpoint;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many bytes one [`Port::receive`] takes at most.
const CHUNK: usize = 64 * 1024;

/// How long [`Port::receive`] lets bytes gather once the first has come.
const GATHER: Duration = Duration::from_micros(500);

/// Wakes the holders of a device's ports; made before the device, which gets [`Wake::notify`].
#[derive(Clone, Default)]
pub struct Wake(Arc<(Mutex<Turn>, Condvar)>);

#[derive(Default)]
struct Turn {
    count: u64,
    closed: bool,
    /// Threads that wait: without any, a nudge is no system call.
    waiting: usize,
}

impl Wake {
    /// The nudge to give to the device.
    pub fn notify(&self) -> Notify {
        let wake = self.clone();
        Notify::new(move || {
            if wake.turn(|turn| turn.count = turn.count.wrapping_add(1)) {
                wake.0.1.notify_all();
            }
        })
    }

    /// The nudge to give to a device whose holders all do the same: one of them is enough.
    pub fn notify_one(&self) -> Notify {
        let wake = self.clone();
        Notify::new(move || wake.nudge_one())
    }

    /// Wakes one of those that wait.
    pub fn nudge_one(&self) {
        if self.turn(|turn| turn.count = turn.count.wrapping_add(1)) {
            self.0.1.notify_one();
        }
    }

    /// The machine is gone: nobody waits any longer.
    pub fn close(&self) {
        if self.turn(|turn| turn.closed = true) {
            self.0.1.notify_all();
        }
    }

    /// Changes something; whether somebody waits.
    fn turn(&self, change: impl FnOnce(&mut Turn)) -> bool {
        let mut turn = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut turn);
        turn.waiting > 0
    }

    /// How often the device has stirred, and whether the machine is gone.
    pub fn count(&self) -> (u64, bool) {
        let turn = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        (turn.count, turn.closed)
    }

    /// Waits until the count differs from `seen`, or the machine is gone (or now and then for no reason).
    pub fn wait_change(&self, seen: u64) {
        let now = Instant::now();
        self.wait(seen, now.checked_add(Duration::from_secs(3600)).unwrap_or(now));
    }

    /// Waits until the count differs from `seen`, the machine is gone, or `until`.
    fn wait(&self, seen: u64, until: Instant) {
        let mut turn = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while turn.count == seen && !turn.closed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            turn.waiting = turn.waiting.saturating_add(1);
            turn = self.0.1.wait_timeout(turn, left).unwrap_or_else(PoisonError::into_inner).0;
            turn.waiting = turn.waiting.saturating_sub(1);
        }
    }
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
