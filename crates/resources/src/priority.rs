//! How urgently a thread runs (sched(7)).
//!
//! Unsafe for one system call that no crate in use has: the class of a thread.
#![allow(unsafe_code)]

use serde::Serialize;
use std::fmt;
use std::io;
use std::str::FromStr;

/// A thread's class, and its place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// As most threads are: from -20, urgent, to 19.
    Nice(i8),
    /// As 0, but never at the cost of others' latency.
    Batch,
    /// When nobody else wants the CPU.
    Idle,
    /// Before all of these, until it sleeps; 1 to 99, the highest.
    Fifo(u8),
    /// The same, in turn with others of its number.
    RoundRobin(u8),
}

impl Priority {
    /// The real-time priority that it needs.
    pub(crate) fn real_time(self) -> u8 {
        match self {
            Self::Fifo(number) | Self::RoundRobin(number) => number,
            _ => 0,
        }
    }

    /// The nice value that it needs.
    pub(crate) fn nice(self) -> i8 {
        match self {
            Self::Nice(nice) => nice,
            _ => 0,
        }
    }

    /// The calling thread's.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        // SAFETY: plain calls about the calling thread.
        let class = unsafe { libc::sched_getscheduler(0) };
        let mut parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: fills a structure of ours.
        unsafe { libc::sched_getparam(0, &mut parameters) };
        let number = u8::try_from(parameters.sched_priority).unwrap_or(0);
        Ok(match class {
            libc::SCHED_FIFO => Self::Fifo(number),
            libc::SCHED_RR => Self::RoundRobin(number),
            libc::SCHED_BATCH => Self::Batch,
            libc::SCHED_IDLE => Self::Idle,
            -1 => return Err(io::Error::last_os_error()),
            _ => Self::Nice(i8::try_from(rustix::process::getpriority_process(None)?).unwrap_or(0)),
        })
    }

    /// Makes it the calling thread's, and that of threads which it starts.
    pub(crate) fn take(self) -> io::Result<()> {
        let (class, number) = match self {
            Self::Nice(_) => (libc::SCHED_OTHER, 0),
            Self::Batch => (libc::SCHED_BATCH, 0),
            Self::Idle => (libc::SCHED_IDLE, 0),
            Self::Fifo(number) => (libc::SCHED_FIFO, number),
            Self::RoundRobin(number) => (libc::SCHED_RR, number),
        };
        let parameters = libc::sched_param { sched_priority: number.into() };
        // SAFETY: about the calling thread, with a structure of ours that is only read. musl's function is a stub: the call itself.
        let done = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, class, &parameters) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        if let Self::Nice(nice) = self {
            rustix::process::setpriority_process(None, nice.into())?;
        }
        Ok(())
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nice(nice) => write!(f, "nice:{nice}"),
            Self::Batch => write!(f, "batch"),
            Self::Idle => write!(f, "idle"),
            Self::Fifo(number) => write!(f, "fifo:{number}"),
            Self::RoundRobin(number) => write!(f, "rr:{number}"),
        }
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (class, number) = text.split_once(':').unwrap_or((text, ""));
        let real_time = || number.parse().ok().filter(|number| (1..=99).contains(number));
        let found = match class {
            "nice" => number.parse().ok().filter(|nice| (-20..=19).contains(nice)).map(Self::Nice),
            "batch" if number.is_empty() => Some(Self::Batch),
            "idle" if number.is_empty() => Some(Self::Idle),
            "fifo" => real_time().map(Self::Fifo),
            "rr" => real_time().map(Self::RoundRobin),
            _ => None,
        };
        found.ok_or_else(|| format!("{text:?} is no priority; there are nice:-20 to nice:19, batch, idle, fifo:1 to fifo:99, rr:1 to rr:99"))
    }
}
