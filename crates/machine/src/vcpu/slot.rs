//! How other threads reach a vCPU: a flag that it looks at before it runs the guest, and the way to make it look.
//!
//! States of the vCPU's thread: running the guest (woken by a kick), asleep in HLT (woken by the condition
//! variable), or busy in the loop (it will look anyway). The flag is set before the state is read, and the state
//! before the flag, so no wake-up is lost.

use super::report::Report;
use cpu::{HostCode, Kick};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// What others want to know of a vCPU: bits of what [`Slot::take_questions`] answers.
pub(crate) mod question {
    /// A [`super::Report`].
    pub(crate) const REPORT: u8 = 1 << 0;
    /// A sample of the profile under way.
    pub(crate) const SAMPLE: u8 = 1 << 1;
    /// The host's code that its engine has made, together with a report.
    pub(crate) const CODE: u8 = 1 << 2;
}

/// The last report, and how many there were.
#[derive(Default)]
struct Reports {
    count: u64,
    last: Option<Report>,
    code: Vec<HostCode>,
}

/// How long a vCPU looks for a wake-up before it sleeps: to be woken by the host takes tens of microseconds on both sides, and
/// CPUs of a guest that talk to each other answer sooner. It grows while that is so and shrinks when it is not.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    time: Duration,
    /// The guest has patience of its own (MSR_KVM_POLL_CONTROL).
    pub(crate) forbidden: bool,
}

impl Patience {
    const FIRST: Duration = Duration::from_micros(10);
    const MAX: Duration = Duration::from_micros(200);
    /// A look takes longer only if the host has other work for its CPU.
    const LOOK_MAX: Duration = Duration::from_micros(30);

    /// Waits for `come`, until `end` at the latest.
    fn wait(&self, come: impl Fn() -> bool, end: Option<Instant>) {
        let began = Instant::now();
        let mut now = began;
        while !come() && now.duration_since(began) < self.time && end.is_none_or(|end| now < end) {
            // Whoever is to wake it may need this CPU.
            std::thread::yield_now();
            let before = std::mem::replace(&mut now, Instant::now());
            if now.duration_since(before) > Self::LOOK_MAX {
                break;
            }
        }
    }

    /// What came took so long.
    pub(crate) fn learn(&mut self, took: Duration) {
        let twice = |time: Duration| time.saturating_add(time).clamp(Self::FIRST, Self::MAX);
        let time = match took {
            _ if self.forbidden => Duration::ZERO,
            _ if took > Self::MAX => self.time.div_f32(2.0),
            _ if took > self.time => twice(self.time),
            _ => self.time,
        };
        self.time = if time < Self::FIRST { Duration::ZERO } else { time };
    }
}

/// One vCPU as other threads see it.
#[derive(Default)]
pub(crate) struct Slot {
    attention: AtomicBool,
    asleep: AtomicBool,
    /// KVM_HC_KICK_CPU: HLT ends without an interrupt.
    unhalt: AtomicBool,
    questions: AtomicU8,
    reports: Mutex<Reports>,
    reported: Condvar,
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

    /// Asks the vCPU for a report, and for its code; answers its number for [`Self::report`].
    pub(crate) fn ask_report(&self, code: bool) -> u64 {
        let number = self.reports().count.wrapping_add(1);
        let questions = question::REPORT | if code { question::CODE } else { 0 };
        self.questions.fetch_or(questions, Ordering::SeqCst);
        self.wake();
        number
    }

    /// The report of this number or a later one; after `limit` the last there is (of a vCPU that stands still).
    pub(crate) fn report(&self, number: u64, limit: Duration) -> Option<Report> {
        let missing = |reports: &mut Reports| reports.count < number;
        let waited = self.reported.wait_timeout_while(self.reports(), limit, missing);
        waited.unwrap_or_else(PoisonError::into_inner).0.last.clone()
    }

    /// Takes the code that came with a report.
    pub(crate) fn take_code(&self) -> Vec<HostCode> {
        std::mem::take(&mut self.reports().code)
    }

    /// The vCPU tells what code its engine has made, before it reports.
    pub(crate) fn tell_code(&self, code: Vec<HostCode>) {
        self.reports().code = code;
    }

    /// The vCPU tells about itself.
    pub(crate) fn tell(&self, report: Report) {
        let mut reports = self.reports();
        reports.count = reports.count.wrapping_add(1);
        reports.last = Some(report);
        self.reported.notify_all();
    }

    fn reports(&self) -> std::sync::MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a vCPU that is awake for a sample; `None` if it sleeps, `Some(false)` if it still owes the last one.
    pub(crate) fn ask_sample(&self) -> Option<bool> {
        if self.asleep.load(Ordering::SeqCst) {
            return None;
        }
        let before = self.questions.fetch_or(question::SAMPLE, Ordering::SeqCst);
        self.wake();
        Some(before & question::SAMPLE == 0)
    }

    /// Takes what others want to know.
    pub(crate) fn take_questions(&self) -> u8 {
        match self.questions.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.questions.swap(0, Ordering::SeqCst),
        }
    }

    /// The vCPU's thread has changed what it should look at.
    pub(crate) fn note(&self) {
        self.attention.store(true, Ordering::Relaxed);
    }

    /// Whether there is something to look at; asking clears it.
    pub(crate) fn take_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until [`Self::wake`], or for `limit`, after some patience.
    pub(crate) fn sleep(&self, limit: Option<Duration>, patience: &Patience) {
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        patience.wait(|| self.attention.load(Ordering::Relaxed), until);
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
            slot.sleep(None, &Patience::default());
            assert!(slot.take_attention());
        }
        thread.join().unwrap();
        let before = Instant::now();
        slot.sleep(Some(Duration::from_millis(5)), &Patience::default());
        assert!(before.elapsed() >= Duration::from_millis(5) && !slot.take_attention());
    }

    #[test]
    fn patience_follows_what_comes() {
        let mut patience = Patience::default();
        patience.learn(Duration::from_millis(4));
        assert_eq!(patience.time, Duration::ZERO);
        for _ in 0..9 {
            patience.learn(Duration::from_micros(150));
        }
        assert_eq!(patience.time, Duration::from_micros(160));
        let began = Instant::now();
        patience.wait(|| false, Some(began + Duration::from_micros(20)));
        patience.wait(|| true, None);
        assert!(began.elapsed() >= Duration::from_micros(20));
        for _ in 0..5 {
            patience.learn(Duration::from_millis(4));
        }
        assert_eq!(patience.time, Duration::ZERO);
    }
}
