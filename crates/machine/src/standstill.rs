//! Why a machine stands still: somebody has asked for it, or disks wait for something of the host.
//!
//! The machine stands as long as there is any reason, and goes on with the last one. Whoever lets it go on by hand also nudges
//! the disks that wait: they try again at once, and the machine goes on if they succeed.
//!
//! Lock order: the reasons' lock, held while vCPUs come to a stop, then the lifecycle's. No vCPU takes it.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// What makes a machine stand, and go on.
pub(crate) trait Brakes: Send + Sync {
    /// All vCPUs and clocks stand when this returns; `false` if the machine has ended.
    fn stand(&self) -> bool;
    /// They run again.
    fn go_on(&self);
}

#[derive(Default)]
struct Reasons {
    /// Somebody wants it.
    asked: bool,
    /// Disks that wait, by their numbers, and how many of their requests do.
    disks: BTreeMap<usize, usize>,
    /// How often those that wait were asked to try again.
    nudges: u64,
}

impl Reasons {
    fn none(&self) -> bool {
        !self.asked && self.disks.is_empty()
    }
}

#[derive(Default)]
struct Shared {
    reasons: Mutex<Reasons>,
    nudged: Condvar,
    brakes: OnceLock<Box<dyn Brakes>>,
}

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub struct Standstill(Arc<Shared>);

impl Standstill {
    /// Names the machine's brakes, once there is a machine.
    pub(crate) fn set_brakes(&self, brakes: impl Brakes + 'static) {
        let _ = self.0.brakes.set(Box::new(brakes));
    }

    fn reasons(&self) -> MutexGuard<'_, Reasons> {
        self.0.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stand(&self, reasons: &mut Reasons, add: impl FnOnce(&mut Reasons)) -> bool {
        let stood = !reasons.none();
        add(reasons);
        stood || self.0.brakes.get().is_some_and(|brakes| brakes.stand())
    }

    fn go_on(&self, reasons: &mut Reasons, remove: impl FnOnce(&mut Reasons)) {
        let stood = !reasons.none();
        remove(reasons);
        if let Some(brakes) = self.0.brakes.get().filter(|_| stood && reasons.none()) {
            brakes.go_on();
        }
    }

    /// Somebody wants the machine to stand; answers whether it does.
    pub(crate) fn ask(&self) -> bool {
        self.stand(&mut self.reasons(), |reasons| reasons.asked = true)
    }

    /// Nobody wants it any more; disks that wait try again.
    pub(crate) fn release(&self) {
        let mut reasons = self.reasons();
        reasons.nudges = reasons.nudges.wrapping_add(1);
        self.go_on(&mut reasons, |reasons| reasons.asked = false);
        self.0.nudged.notify_all();
    }

    /// A request of a disk waits.
    pub fn hold_for_disk(&self, disk: usize) {
        self.stand(&mut self.reasons(), |reasons| {
            let requests = reasons.disks.entry(disk).or_insert(0);
            *requests = requests.saturating_add(1);
        });
    }

    /// It waits no more.
    pub fn release_for_disk(&self, disk: usize) {
        self.go_on(&mut self.reasons(), |reasons| {
            if let Some(requests) = reasons.disks.get_mut(&disk) {
                *requests = requests.saturating_sub(1);
            }
            reasons.disks.retain(|_, requests| *requests > 0);
        });
    }

    /// How often those that wait were asked to try again.
    pub fn nudges(&self) -> u64 {
        self.reasons().nudges
    }

    /// Waits for the next nudge after `seen`, at most `limit`.
    pub fn wait_nudge(&self, seen: u64, limit: Duration) {
        let waits = |reasons: &mut Reasons| reasons.nudges == seen;
        let waited = self.0.nudged.wait_timeout_while(self.reasons(), limit, waits);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// The reasons, for people.
    pub(crate) fn inspect(&self) -> Vec<String> {
        let reasons = self.reasons();
        let asked = reasons.asked.then(|| "paused by hand".to_owned());
        let disks = reasons.disks.keys().map(|disk| format!("disk{disk} waits for the host"));
        asked.into_iter().chain(disks).collect()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Lever(Arc<AtomicBool>);

    impl Brakes for Lever {
        fn stand(&self) -> bool {
            assert!(!self.0.swap(true, Ordering::SeqCst), "it stood already");
            true
        }
        fn go_on(&self) {
            assert!(self.0.swap(false, Ordering::SeqCst), "it ran already");
        }
    }

    #[test]
    fn it_stands_as_long_as_there_is_a_reason() {
        let stands = Arc::new(AtomicBool::new(false));
        let standstill = Standstill::default();
        standstill.set_brakes(Lever(stands.clone()));
        let now = || stands.load(Ordering::SeqCst);
        // What nobody asked for may be released, and asked for twice.
        standstill.release();
        assert!(!now() && standstill.ask() && standstill.ask() && now());
        standstill.hold_for_disk(1);
        standstill.hold_for_disk(0);
        standstill.hold_for_disk(0);
        let seen = standstill.nudges();
        standstill.release();
        assert!(now() && standstill.nudges() != seen, "disks wait, and are told to try");
        assert_eq!(standstill.inspect(), ["disk0 waits for the host", "disk1 waits for the host"]);
        standstill.release_for_disk(1);
        standstill.release_for_disk(0);
        assert!(now());
        standstill.release_for_disk(0);
        assert!(!now() && standstill.inspect().is_empty());
        // By hand it stays, whatever disks do.
        standstill.hold_for_disk(0);
        standstill.ask();
        standstill.release_for_disk(0);
        assert!(now());
        standstill.release();
        assert!(!now());
    }
}
