//! One timer thread for a machine: it sleeps on a timerfd until the earliest deadline of any vCPU or device.
//!
//! Setting a deadline costs a system call only if it changes the earliest, and wakes no thread: idle guests tick
//! without switching threads but to the one that the tick is for. A slot is a number the machine gave out; what is
//! to be done at its deadline is the callback's to know.
//!
//! Lock order: the table's lock alone; callbacks run without it.

use crate::clock::Clock;
use device::VmTime;
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

#[derive(Debug, Default)]
struct Table {
    due: BTreeSet<(VmTime, usize)>,
    slots: Vec<Option<VmTime>>,
    /// What the timerfd is set to.
    armed: Option<VmTime>,
    closed: bool,
}

/// The timers of one machine.
#[derive(Debug)]
pub struct Timers {
    clock: Arc<Clock>,
    table: Mutex<Table>,
    fd: OwnedFd,
}

impl Timers {
    /// Timers with no deadlines, for `slots` slots.
    pub fn new(clock: Arc<Clock>, slots: usize) -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        let table = Table { slots: vec![None; slots], ..Table::default() };
        Ok(Self { clock, table: Mutex::new(table), fd })
    }

    /// Starts the thread: `fire(slot)` is called at each deadline, which is cleared first.
    pub fn spawn(self: &Arc<Self>, fire: impl Fn(usize) + Send + 'static) -> io::Result<JoinHandle<()>> {
        let timers = self.clone();
        std::thread::Builder::new().name("timer".into()).spawn(move || {
            sandbox::narrow(sandbox::Role::Timer);
            timers.serve(&fire);
        })
    }

    /// Sets or clears the deadline of `slot`.
    pub fn set(&self, slot: usize, deadline: Option<VmTime>) {
        let mut table = self.lock();
        let Some(entry) = table.slots.get_mut(slot) else { return };
        let before = std::mem::replace(entry, deadline);
        if before == deadline {
            return;
        }
        if let Some(before) = before {
            table.due.remove(&(before, slot));
        }
        if let Some(deadline) = deadline {
            table.due.insert((deadline, slot));
            // A guest that goes idle first puts its tick off, then halts, which clears it: one system call, not two. If it
            // does not halt, the thread wakes once too early, and sets the timer anew.
            if before.is_some() && table.armed.is_some_and(|armed| armed <= deadline) {
                return;
            }
        }
        self.arm(&mut table);
    }

    /// Looks at the clock again: it was started or stopped.
    pub fn resume(&self) {
        let mut table = self.lock();
        table.armed = None;
        self.arm(&mut table);
    }

    /// Ends the thread.
    pub fn close(&self) {
        let mut table = self.lock();
        table.closed = true;
        table.due.clear();
        self.set_fd(Some(Duration::ZERO));
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<VmTime> {
        self.lock().due.first().map(|&(at, _)| at)
    }

    /// Sets the timerfd to the earliest deadline. Disarming costs a system call, a needless wake-up costs more.
    fn arm(&self, table: &mut Table) {
        let first = table.due.first().map(|&(at, _)| at);
        if table.armed == first {
            return;
        }
        // A standing clock has no future; `resume` comes when it runs.
        match first.map(|first| self.clock.until(first)) {
            None => self.set_fd(None),
            Some(Some(left)) => self.set_fd(Some(left)),
            Some(None) => return,
        }
        table.armed = first;
    }

    fn set_fd(&self, left: Option<Duration>) {
        // Zero disarms.
        let left = left.map_or(Duration::ZERO, |left| left.max(Duration::from_nanos(1)));
        let value = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Fails only for a wrong descriptor or value, neither of which can be.
        let _ = timerfd_settime(
            &self.fd,
            TimerfdTimerFlags::empty(),
            &Itimerspec { it_interval: zero, it_value: value },
        );
    }

    fn serve(&self, fire: &dyn Fn(usize)) {
        let mut ticks = [0; 8];
        loop {
            match rustix::io::read(&self.fd, &mut ticks) {
                Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(_) => return,
            }
            let due = {
                let mut table = self.lock();
                if table.closed {
                    return;
                }
                table.armed = None;
                let due = take_due(&mut table, self.clock.now());
                self.arm(&mut table);
                due
            };
            due.into_iter().for_each(fire);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_due(table: &mut Table, now: VmTime) -> Vec<usize> {
    let mut due = Vec::new();
    while let Some(&(at, slot)) = table.due.first() {
        if at > now {
            break;
        }
        table.due.remove(&(at, slot));
        if let Some(entry) = table.slots.get_mut(slot) {
            *entry = None;
        }
        due.push(slot);
    }
    due
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn deadlines_fire_in_order_and_only_while_time_passes() {
        let clock = Arc::new(Clock::default());
        let timers = Arc::new(Timers::new(clock.clone(), 4).unwrap());
        let (sender, receiver) = channel();
        let thread = timers.spawn(move |slot| sender.send(slot).unwrap()).unwrap();
        timers.set(2, Some(VmTime(3_000_000)));
        timers.set(1, Some(VmTime(1_000_000)));
        timers.set(3, Some(VmTime(2_000_000)));
        timers.set(3, None);
        timers.set(99, Some(VmTime(1)));
        assert!(receiver.recv_timeout(Duration::from_millis(20)).is_err());
        clock.run();
        timers.resume();
        let wait = Duration::from_secs(5);
        assert_eq!(receiver.recv_timeout(wait), Ok(1));
        assert_eq!(receiver.recv_timeout(wait), Ok(2));
        assert!(clock.now() >= VmTime(3_000_000));
        assert_eq!(timers.next(), None);
        // One that is put off comes late, and once.
        let later = |by| Some(VmTime(clock.now().0 + by));
        timers.set(0, later(3_000_000));
        let late = later(30_000_000);
        timers.set(0, late);
        assert_eq!(receiver.recv_timeout(wait), Ok(0));
        assert!(clock.now() >= late.unwrap());
        timers.set(0, Some(VmTime(u64::MAX)));
        timers.set(1, Some(VmTime(0)));
        assert_eq!(receiver.recv_timeout(wait), Ok(1));
        timers.close();
        thread.join().unwrap();
    }
}
