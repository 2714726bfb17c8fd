//! The gate that every request passes through, in place of a lock on the image.
//!
//! A request holds one of many shards for reading while it lasts; different threads use different shards, so requests do
//! not wait for each other and share no cache line. Whoever must know that requests are over has two ways:
//!
//! * [`Gate::grace`] returns when all requests that had begun before have ended; new ones go on meanwhile. After a
//!   cluster is referenced by nothing, one grace later nobody reads or writes it, and it can have a new owner.
//! * [`Gate::close`] returns when no request is in the image, and keeps it so: for snapshots and resizing.
//!
//! Lock order: only the flush's lock comes before the gate. A thread that is inside must not call either.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

const SHARDS: usize = 16;

/// One shard on its own cache lines.
#[derive(Default)]
#[repr(align(128))]
struct Shard(RwLock<()>);

/// See the module.
#[derive(Default)]
pub struct Gate {
    shards: [Shard; SHARDS],
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHARD: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
}

impl Gate {
    /// Enters; the request lasts as long as the result.
    pub fn pass(&self) -> RwLockReadGuard<'_, ()> {
        let [first, ..] = &self.shards;
        let shard = self.shards.get(SHARD.get()).unwrap_or(first);
        shard.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when every request that had begun has ended.
    pub fn grace(&self) {
        for shard in &self.shards {
            drop(shard.0.write().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Returns when no request is inside; none enters as long as the result lives.
    pub fn close(&self) -> Vec<RwLockWriteGuard<'_, ()>> {
        self.shards.iter().map(|shard| shard.0.write().unwrap_or_else(PoisonError::into_inner)).collect()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    #[test]
    fn grace_waits_for_those_inside_and_close_for_all() {
        let gate = Arc::new(Gate::default());
        let (inside, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let guest = {
            let (gate, inside, over) = (gate.clone(), inside.clone(), over.clone());
            std::thread::spawn(move || {
                let passed = gate.pass();
                inside.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(30));
                over.store(true, Ordering::SeqCst);
                drop(passed);
            })
        };
        while !inside.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        gate.grace();
        assert!(over.load(Ordering::SeqCst));
        guest.join().unwrap();
        let closed = gate.close();
        let late = {
            let gate = gate.clone();
            std::thread::spawn(move || drop(gate.pass()))
        };
        std::thread::sleep(Duration::from_millis(10));
        assert!(!late.is_finished());
        drop(closed);
        late.join().unwrap();
    }
}
