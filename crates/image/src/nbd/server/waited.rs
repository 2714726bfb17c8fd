//! How long a thread has waited for something other than a CPU: on a busy host the clock alone takes any image for a slow
//! one.

use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// What the host's scheduler says of the thread that made this.
pub struct Scheduler(Option<File>);

impl Scheduler {
    /// Of this thread; says nothing on hosts that do not tell.
    pub fn of_this_thread() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    /// How long the thread has run, or wanted to, since it began.
    pub fn ran(&self) -> Option<Duration> {
        let mut bytes = [0; 96];
        let count = self.0.as_ref()?.read_at(&mut bytes, 0).ok()?;
        // Time on a CPU (as of the last tick), time spent waiting for one, turns.
        let text = std::str::from_utf8(bytes.get(..count)?).ok()?;
        let wanted = text.split_whitespace().nth(1)?.parse().ok()?;
        let run = clock_gettime(ClockId::ThreadCPUTime);
        let run = Duration::new(run.tv_sec.try_into().ok()?, run.tv_nsec.try_into().ok()?);
        run.checked_add(Duration::from_nanos(wanted))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::time::Instant;

    #[test]
    fn to_compute_is_not_to_wait() {
        let scheduler = Scheduler::of_this_thread();
        let Some(before) = scheduler.ran() else { return };
        let began = Instant::now();
        let mut sum = 0u64;
        while began.elapsed() < Duration::from_millis(50) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let computed = began.elapsed().saturating_sub(scheduler.ran().unwrap() - before);
        assert!(computed < Duration::from_millis(15), "{computed:?} of computing was taken for waiting");
        let (before, began) = (scheduler.ran().unwrap(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let slept = began.elapsed().saturating_sub(scheduler.ran().unwrap() - before);
        assert!(slept > Duration::from_millis(40), "{slept:?} of 50 ms of sleep");
    }
}
