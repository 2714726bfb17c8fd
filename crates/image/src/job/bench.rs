//! How fast requests are served.

use super::Progress;
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::Disk;
use crate::endian::size;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Requests in all.
    pub count: u64,
    /// Requests at a time, each from a thread of its own.
    pub depth: usize,
    /// Where the first one begins.
    pub offset: u64,
    /// Bytes of a request.
    pub len: u64,
    /// Bytes from one to the next; the disk begins anew where it ends.
    pub step: u64,
    /// Writes of this byte, and not reads.
    pub write: Option<u8>,
    /// A flush after so many requests; zero: none.
    pub flush_interval: u64,
}

/// Most requests that a thread takes at a time.
const TAKEN_MAX: u64 = 16;

/// Sends requests; answers how long all of them took.
pub fn bench(disk: &dyn Disk, load: Load, progress: &Progress) -> io::Result<Duration> {
    let room = disk.capacity().checked_sub(load.len).filter(|_| load.offset <= disk.capacity());
    let room = room
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the disk is smaller than a request"))?;
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let began = Instant::now();
    // Threads that took requests one by one would hand each other the counter's cache line for each.
    let share = (load.depth as u64).saturating_mul(4).max(1);
    let taken = load.count.checked_div(share).unwrap_or(1).clamp(1, TAKEN_MAX);
    let worker = || {
        let mut bytes = vec![load.write.unwrap_or(0); size(load.len)];
        loop {
            let first = next.fetch_add(taken, Ordering::Relaxed);
            let end = first.saturating_add(taken).min(load.count);
            if first >= end || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let mut done = (first..end).try_for_each(|number| request(disk, &load, room, number, &mut bytes));
            done = done.and_then(|()| progress.advance(end.saturating_sub(first).saturating_mul(load.len)));
            if done.is_err() {
                failed.store(true, Ordering::Relaxed);
                return done;
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..load.depth.max(1)).map(|_| scope.spawn(worker)).collect();
        let mut result = worker();
        for thread in threads {
            result =
                result.and(thread.join().unwrap_or_else(|_| Err(io::Error::other("a worker has failed"))));
        }
        result
    })?;
    Ok(began.elapsed())
}

/// Does a request by its number, and the flush that is due after it.
fn request(disk: &dyn Disk, load: &Load, room: u64, number: u64, bytes: &mut [u8]) -> io::Result<()> {
    // As qemu-img's: steps wrap around where a request would not fit, and what was aligned stays so.
    let at = load.offset.wrapping_add(number.wrapping_mul(load.step)).checked_rem(room).unwrap_or(0);
    match load.write {
        Some(_) => disk.write(at, &WriteFrom(bytes))?,
        None => disk.read(at, &ReadInto::new(bytes))?,
    }
    let flushes = number.saturating_add(1).checked_rem(load.flush_interval) == Some(0);
    if flushes { disk.flush() } else { Ok(()) }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::VecBuffers;
    use crate::format::Raw;
    use crate::storage::power::Power;
    use std::sync::Arc;

    #[test]
    fn all_requests_are_sent() {
        let disk = Raw::new(Arc::new(Power::new(vec![0; 1 << 20])));
        let load = Load {
            count: 100,
            depth: 4,
            offset: 4096,
            len: 4096,
            step: 4096,
            write: Some(7),
            flush_interval: 10,
        };
        let progress = Progress::default();
        bench(&disk, load, &progress).unwrap();
        assert_eq!(progress.done(), 100 * 4096);
        let buffers = VecBuffers::new(vec![0; 1 << 20]);
        disk.read(0, &buffers).unwrap();
        let bytes = buffers.into_inner();
        assert!(bytes[..4096] == [0; 4096] && bytes[4096..101 * 4096].iter().all(|byte| *byte == 7));
        assert!(bytes[101 * 4096..].iter().all(|byte| *byte == 0));
        // What is aligned is so after the end, too.
        let aligned = Aligned(AtomicU64::new(0));
        bench(&aligned, Load { count: 999, step: 4096 * 77, write: None, ..load }, &progress).unwrap();
        assert_eq!(aligned.0.into_inner(), 999);
        // Around the end, and longer than the disk.
        bench(&disk, Load { count: 1000, write: None, ..load }, &progress).unwrap();
        assert!(bench(&disk, Load { len: 2 << 20, ..load }, &progress).is_err());
    }
    /// A disk of which only whole pages are read.
    struct Aligned(AtomicU64);

    impl Disk for Aligned {
        fn capacity(&self) -> u64 {
            1 << 20
        }
        fn read_only(&self) -> bool {
            true
        }
        fn read(&self, offset: u64, buffers: &dyn crate::Buffers) -> io::Result<()> {
            assert!(offset.is_multiple_of(4096) && offset + buffers.len() <= self.capacity());
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        fn write(&self, _: u64, _: &dyn crate::Buffers) -> io::Result<()> {
            Err(crate::disk::read_only_error())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> io::Result<()> {
            Err(crate::disk::read_only_error())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Err(crate::disk::read_only_error())
        }
        fn block_status(&self, offset: u64, len: u64) -> io::Result<crate::Status> {
            Ok(crate::Status::of_extent(crate::storage::Extent { len, hole: false }, offset))
        }
        fn resize(&self, _: u64) -> io::Result<()> {
            Err(crate::disk::read_only_error())
        }
        fn snapshot(&self, _: &str) -> io::Result<()> {
            Err(crate::disk::read_only_error())
        }
    }
}
