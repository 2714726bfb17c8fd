//! Work on whole images. Each job hears of progress through [`Progress`] and ends early, with an error of the kind
//! [`std::io::ErrorKind::Interrupted`], when it is told to.

mod bench;
mod compare;
mod convert;
pub mod dedup;
mod merge;
mod share;

pub use bench::{Load, bench};
pub use compare::{Difference, compare};
pub use convert::{ConvertOptions, Target, convert, convert_over, measure, measure_qed, measure_vhd};
pub use merge::{commit, rebase};

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How far a job is, seen from any thread.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Bytes of the disk that are dealt with.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends the job as soon as it looks.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) -> io::Result<()> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.cancelled.load(Ordering::Relaxed) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Sixteen bytes at a time, which the compiler makes wider.
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Calls `work` from several threads with pieces of `capacity` bytes, each of `piece` bytes at most, in about their
/// order; ends with the first error.
pub(crate) fn in_pieces<W>(
    capacity: u64,
    piece: u64,
    threads: usize,
    worker: impl Fn() -> io::Result<W> + Sync,
    work: impl Fn(&mut W, u64, u64) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let run = || {
        let mut state = worker()?;
        loop {
            let at = next.fetch_add(piece, Ordering::Relaxed);
            if at >= capacity || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let done = work(&mut state, at, piece.min(capacity.saturating_sub(at)));
            if done.is_err() {
                failed.store(true, Ordering::Relaxed);
                return done;
            }
        }
    };
    if threads <= 1 || capacity <= piece {
        return run();
    }
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut result = run();
        for other in others {
            let done = other.join().unwrap_or_else(|_| Err(io::Error::other("a worker has failed")));
            result = result.and(done);
        }
        result
    })
}

/// Threads that a job uses where nobody says how many.
pub fn usual_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}
