//! On which of the host's CPUs the threads of a guest run, and how urgently.
//!
//! Two kinds of threads: vCPUs, and all others. [`Scheduling::prepare`] tries everything while the process still has all its
//! rights, keeps what it will need of them as limits of the process (RLIMIT_NICE, RLIMIT_RTPRIO), and leaves the calling thread with
//! what the others get: they inherit it. vCPUs [take](Scheduling::take) theirs when they start.

use crate::Priority;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;

/// Of one kind of threads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Threads {
    /// The CPUs on which they may run; none: all that yado was given.
    pub cpus: Vec<u32>,
    /// How urgently; `None`: as yado was started.
    pub priority: Option<Priority>,
}

impl Threads {
    fn is_default(&self) -> bool {
        self.cpus.is_empty() && self.priority.is_none()
    }

    fn take(&self) -> Result<(), Error> {
        if !self.cpus.is_empty() {
            set_cpus(&self.cpus)?;
        }
        match self.priority {
            Some(priority) => priority.take().map_err(|source| Error::Priority { priority, source }),
            None => Ok(()),
        }
    }
}

/// Of all threads of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Scheduling {
    /// vCPUs.
    pub vcpus: Threads,
    /// CPUs of single vCPUs, by number.
    pub pinned: BTreeMap<u32, Vec<u32>>,
    /// Everything else.
    pub others: Threads,
}

/// Why threads cannot run so.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// CPUs that there are not.
    #[error("no thread can run on host CPUs {wanted:?} only ({source}); this process has {have:?}")]
    Cpus {
        /// What was asked for.
        wanted: Vec<u32>,
        /// What there is.
        have: Vec<u32>,
        /// The host's answer.
        source: io::Error,
    },
    /// A right is missing.
    #[error(
        "the host does not let this user's threads run at {priority} ({source}): run yado with CAP_SYS_NICE, or raise the user's limit \
         (ulimit -r for real time, ulimit -e for nice below 0; RLIMIT_RTPRIO, RLIMIT_NICE)"
    )]
    Priority {
        /// What was asked for.
        priority: Priority,
        /// The host's answer.
        source: io::Error,
    },
    /// A pinned vCPU that the guest does not have.
    #[error("there is no vCPU {0} to pin; the guest has {1}")]
    Vcpu(u32, u32),
}

impl Scheduling {
    /// Whether there is anything to do.
    pub fn is_default(&self) -> bool {
        self.vcpus.is_default() && self.others.is_default() && self.pinned.is_empty()
    }

    /// See the module page. `cpus` is how many vCPUs there are.
    pub fn prepare(mut self, cpus: u32) -> Result<Self, Error> {
        if self.is_default() {
            return Ok(self);
        }
        if let Some(&none) = self.pinned.keys().find(|&&vcpu| vcpu >= cpus) {
            return Err(Error::Vcpu(none, cpus));
        }
        // What only the others get, vCPUs must be able to get rid of.
        if self.vcpus.cpus.is_empty() && !self.others.cpus.is_empty() {
            self.vcpus.cpus = allowed();
        }
        if self.vcpus.priority.is_none() && self.others.priority.is_some() {
            self.vcpus.priority = Priority::of_this_thread().ok();
        }
        self.raise_limits();
        self.others.take()?;
        self.try_vcpus()?;
        Ok(self)
    }

    /// The calling thread becomes vCPU `index`'s.
    pub fn take(&self, index: u32) -> Result<(), Error> {
        self.vcpus.take()?;
        self.pinned.get(&index).map_or(Ok(()), |cpus| set_cpus(cpus))
    }

    /// In a thread of its own, as each vCPU will: this one may have no way back.
    fn try_vcpus(&self) -> Result<(), Error> {
        let attempt = || {
            self.vcpus.take()?;
            self.pinned.values().try_for_each(|cpus| set_cpus(cpus))
        };
        std::thread::scope(|scope| scope.spawn(attempt).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// So far as the process may: what it may not shows when it is tried.
    fn raise_limits(&self) {
        let all = [self.vcpus.priority, self.others.priority];
        let nice = all.into_iter().flatten().map(Priority::nice).min().unwrap_or(0);
        let real_time = all.into_iter().flatten().map(Priority::real_time).max().unwrap_or(0);
        // getrlimit(2): a limit of n allows a nice value of 20 - n.
        let nice = 20i64.saturating_sub(nice.into()).unsigned_abs();
        for (resource, wanted) in [(Resource::Nice, nice), (Resource::Rtprio, real_time.into())] {
            let now = getrlimit(resource);
            if now.current.is_some_and(|current| current < wanted) {
                let maximum = now.maximum.map(|maximum| maximum.max(wanted));
                let _ = setrlimit(resource, Rlimit { current: Some(wanted), maximum });
            }
        }
    }
}

/// CPUs on which the calling thread may run.
fn allowed() -> Vec<u32> {
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).filter_map(|cpu| u32::try_from(cpu).ok()).collect()
}

fn set_cpus(cpus: &[u32]) -> Result<(), Error> {
    let mut set = CpuSet::new();
    let known = cpus.iter().filter_map(|&cpu| usize::try_from(cpu).ok()).filter(|&cpu| cpu < CpuSet::MAX_CPU);
    known.for_each(|cpu| set.set(cpu));
    sched_setaffinity(None, &set).map_err(|errno| Error::Cpus {
        wanted: cpus.to_vec(),
        have: allowed(),
        source: errno.into(),
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn elsewhere<T: Send>(what: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(what).join().unwrap())
    }

    #[test]
    fn others_and_vcpus_get_their_own() {
        elsewhere(|| {
            let (all, own) = (allowed(), Priority::of_this_thread().unwrap());
            let one = vec![all[0]];
            let scheduling = Scheduling {
                others: Threads { cpus: one.clone(), priority: Some(Priority::Batch) },
                pinned: BTreeMap::from([(1, vec![*all.last().unwrap()])]),
                ..Scheduling::default()
            };
            let prepared = scheduling.prepare(2).unwrap();
            assert_eq!((allowed(), Priority::of_this_thread().unwrap()), (one.clone(), Priority::Batch));
            elsewhere(|| {
                assert_eq!(allowed(), one, "inherited");
                prepared.take(0).unwrap();
                assert_eq!(allowed(), all);
                assert_eq!(Priority::of_this_thread().unwrap(), own);
                prepared.take(1).unwrap();
                assert_eq!(allowed(), [*all.last().unwrap()]);
            });
        });
    }

    #[test]
    fn nothing_asked_for_changes_nothing() {
        elsewhere(|| {
            let before = (allowed(), Priority::of_this_thread().unwrap());
            assert!(Scheduling::default().prepare(1).unwrap().is_default());
            assert_eq!((allowed(), Priority::of_this_thread().unwrap()), before);
        });
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        elsewhere(|| {
            let pin = |vcpu, cpu| Scheduling {
                pinned: BTreeMap::from([(vcpu, vec![cpu])]),
                ..Scheduling::default()
            };
            let missing = pin(0, 1023).prepare(1).unwrap_err().to_string();
            assert!(missing.contains("[1023]") && missing.contains("this process has [0"), "{missing}");
            assert!(matches!(pin(2, 0).prepare(2), Err(Error::Vcpu(2, 2))));
        });
    }

    #[test]
    fn real_time_needs_a_right_or_is_taken() {
        elsewhere(|| {
            let own = Priority::of_this_thread().unwrap();
            let vcpus = Threads { priority: Some(Priority::Fifo(3)), ..Threads::default() };
            let scheduling = Scheduling { vcpus, ..Scheduling::default() };
            match scheduling.prepare(1) {
                Ok(prepared) => {
                    assert_eq!(Priority::of_this_thread().unwrap(), own);
                    elsewhere(|| {
                        prepared.take(0).unwrap();
                        assert_eq!(Priority::of_this_thread().unwrap(), Priority::Fifo(3));
                    });
                }
                Err(error) => assert!(error.to_string().contains("CAP_SYS_NICE"), "{error}"),
            }
        });
    }

    #[test]
    fn priorities_are_read_as_they_are_written() {
        for text in ["nice:-20", "nice:19", "batch", "idle", "fifo:1", "rr:99"] {
            assert_eq!(text.parse::<Priority>().unwrap().to_string(), text);
        }
        for text in ["", "nice", "nice:20", "fifo:0", "rr:100", "batch:1", "urgent"] {
            assert!(text.parse::<Priority>().is_err(), "{text}");
        }
    }
}
