//! Storage whose power can be cut: writes that no flush has followed are kept, lost, or torn, in any combination.
//!
//! Every write is logged in pieces of a sector, as a disk keeps them; a flush says which are stable. [`Power::cut`] makes
//! what a disk could hold after a cut at some moment: everything that was stable then, and of the rest each sector's
//! pieces up to some point, independent of other sectors.

use super::{Extent, Storage};
use crate::buffers::{Buffers, put_zeroes};
use std::io;
use std::sync::{Mutex, PoisonError};

const SECTOR: usize = 512;

#[derive(Clone)]
enum Event {
    /// A sector's bytes.
    Write(u64, Box<[u8; SECTOR]>),
    /// Another length.
    Len(u64),
    /// All before is stable.
    Flush,
}

#[derive(Default)]
struct Inside {
    now: Vec<u8>,
    log: Vec<Event>,
    /// Writes fail.
    full: bool,
    /// It cannot grow beyond this.
    end: Option<u64>,
}

/// See the module.
#[derive(Default)]
pub struct Power(Mutex<Inside>);

impl Power {
    /// Storage that holds these bytes, stable.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(Inside { now: bytes, ..Inside::default() }))
    }

    /// Whether there is no space from now on: every write fails.
    pub fn set_full(&self, full: bool) {
        self.inside().full = full;
    }

    /// Storage of a length that cannot be changed, as a device has.
    pub fn device(bytes: Vec<u8>) -> Self {
        let end = Some(bytes.len() as u64);
        Self(Mutex::new(Inside { now: bytes, end, ..Inside::default() }))
    }

    fn inside(&self) -> std::sync::MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has happened so far, as a moment for [`Self::cut`].
    pub fn moment(&self) -> usize {
        self.inside().log.len()
    }

    /// What a disk that began as `start` holds after a cut at `moment`. `random` decides what of the unstable is kept.
    pub fn cut(&self, start: &[u8], moment: usize, mut random: impl FnMut() -> u64) -> Vec<u8> {
        let inside = self.inside();
        let log = inside.log.get(..moment).unwrap_or_default();
        let stable = log.iter().rposition(|event| matches!(event, Event::Flush)).map_or(0, |at| at + 1);
        let mut bytes = start.to_vec();
        // Few, half or most of what is not stable is kept.
        let keep = [20, 128, 235][(random() % 3) as usize];
        let mut lost = std::collections::HashSet::new();
        for (at, event) in log.iter().enumerate() {
            match event {
                Event::Flush => {}
                Event::Len(len) => {
                    // The file system logs lengths in order with what it has told is stable; here they may come early.
                    bytes.resize(*len as usize, 0);
                }
                Event::Write(sector, content) => {
                    let kept = at < stable || (!lost.contains(sector) && random() % 256 < keep);
                    if !kept {
                        lost.insert(*sector);
                        continue;
                    }
                    let place = *sector as usize * SECTOR;
                    if bytes.len() < place + SECTOR {
                        bytes.resize(place + SECTOR, 0);
                    }
                    bytes[place..place + SECTOR].copy_from_slice(&content[..]);
                }
            }
        }
        bytes
    }

    fn change(
        &self,
        offset: u64,
        len: u64,
        with: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mut inside = self.inside();
        if inside.full || inside.end.is_some_and(|end| offset + len > end) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (from, to) = (offset as usize, (offset + len) as usize);
        if inside.now.len() < to.next_multiple_of(SECTOR) {
            inside.now.resize(to.next_multiple_of(SECTOR), 0);
        }
        with(&mut inside.now[from..to])?;
        for sector in from / SECTOR..to.div_ceil(SECTOR) {
            let mut content = Box::new([0; SECTOR]);
            content.copy_from_slice(&inside.now[sector * SECTOR..(sector + 1) * SECTOR]);
            inside.log.push(Event::Write(sector as u64, content));
        }
        Ok(())
    }
}

impl Storage for Power {
    fn len(&self) -> u64 {
        self.inside().now.len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let inside = self.inside();
        let from = (offset as usize).min(inside.now.len());
        let to = ((offset + len) as usize).min(inside.now.len());
        buffers.put(at, &inside.now[from..to])?;
        put_zeroes(buffers, at + (to - from) as u64, len - (to - from) as u64)
    }

    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, |bytes| buffers.get(at, bytes))
    }

    fn flush(&self) -> io::Result<()> {
        self.inside().log.push(Event::Flush);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inside = self.inside();
        if let Some(end) = inside.end {
            return if len <= end { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) };
        }
        inside.now.resize(len as usize, 0);
        inside.log.push(Event::Len(len));
        Ok(())
    }

    fn room(&self, wanted: u64) -> u64 {
        wanted.min(self.inside().end.unwrap_or(u64::MAX))
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_range(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, |bytes| {
            bytes.fill(0);
            Ok(())
        })
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn extent(&self, _offset: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { len, hole: false })
    }

    fn allocated(&self) -> Option<u64> {
        None
    }
}

#[test]
fn what_was_flushed_is_kept_and_the_rest_is_anything() {
    let power = Power::default();
    power.write_bytes(0, &[1; 1024]).unwrap();
    power.flush().unwrap();
    power.write_bytes(512, &[2; 1024]).unwrap();
    let moment = power.moment();
    let mut seen = std::collections::HashSet::new();
    for seed in 0..200u64 {
        let mut state = seed;
        let bytes = power.cut(&[], moment, || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        });
        assert_eq!(bytes[..512], [1; 512]);
        seen.insert((bytes[512], bytes.get(1024).copied().unwrap_or(0)));
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
    assert!(power.cut(&[], 3, || 255)[..] == [1; 1024]);
}
