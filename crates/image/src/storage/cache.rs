//! What stands between a guest's writes and stable storage: QEMU's five names, with QEMU's meanings.
//!
//! | mode | page cache of the host | a write is stable | a flush |
//! |---|---|---|---|
//! | `writeback` | used | after a flush | reaches the disk |
//! | `none` | passed by | after a flush | reaches the disk |
//! | `writethrough` | used | when it is done | reaches the disk |
//! | `directsync` | passed by | when it is done | reaches the disk |
//! | `unsafe` | used | when the host likes | is ignored |

use crate::buffers::Buffers;
use crate::disk::{Disk, Status};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Fast, and safe for guests that flush, as all do.
    #[default]
    Writeback,
    /// As `Writeback`, without a copy in the host's memory.
    None,
    /// For guests that never flush.
    Writethrough,
    /// As `Writethrough`, without a copy in the host's memory.
    Directsync,
    /// For images that nobody needs after a crash of the host.
    Unsafe,
}

impl CacheMode {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Writeback, Self::None, Self::Writethrough, Self::Directsync, Self::Unsafe];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Whether the host's page cache is passed by (O_DIRECT).
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether each write is stable when it is done.
    pub fn is_write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// The mode in which writes are stable after a flush, else the same: for whoever follows writes with flushes himself.
    pub fn written_back(self) -> Self {
        match self {
            Self::Writethrough => Self::Writeback,
            Self::Directsync => Self::None,
            other => other,
        }
    }

    /// Whether flushes reach the disk.
    pub fn flushes(self) -> bool {
        self != Self::Unsafe
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CacheMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|mode| mode.name() == name);
        known.ok_or_else(|| format!("cache={name}: {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// A disk whose writes are stable when they are done: each is followed by a flush, through all that a format keeps.
pub struct WriteThrough(pub Arc<dyn Disk>);

impl Disk for WriteThrough {
    fn capacity(&self) -> u64 {
        self.0.capacity()
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.0.read(offset, buffers)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.0.write(offset, buffers)?;
        self.0.flush()
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)?;
        self.0.flush()
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, unmap)?;
        self.0.flush()
    }
    fn zero_quickly(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.zero_quickly(offset, len, unmap)?;
        self.0.flush()
    }
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.0.block_status(offset, len)
    }
    fn resize(&self, capacity: u64) -> io::Result<()> {
        self.0.resize(capacity)?;
        self.0.flush()
    }
    fn snapshot(&self, name: &str) -> io::Result<()> {
        self.0.snapshot(name)?;
        self.0.flush()
    }
}

/// A storage whose flushes are ignored.
pub(super) struct Careless(pub super::StorageFile);

impl super::Storage for Careless {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        self.0.read(offset, buffers, at, len)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        self.0.write(offset, buffers, at, len)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn room(&self, wanted: u64) -> u64 {
        self.0.room(wanted)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch_hole(offset, len)
    }
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero_range(offset, len)
    }
    fn zero_range_quickly(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero_range_quickly(offset, len)
    }
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.reserve(offset, len)
    }
    fn extent(&self, offset: u64, len: u64) -> io::Result<super::Extent> {
        self.0.extent(offset, len)
    }
    fn allocated(&self) -> Option<u64> {
        self.0.allocated()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::WriteFrom;
    use crate::format::Raw;
    use crate::storage::power::Power;

    /// What a disk of zeroes holds after a write and a power cut that keeps nothing it need not keep.
    fn after_a_cut(through: bool) -> Vec<u8> {
        let power = Arc::new(Power::new(vec![0; 4096]));
        let raw: Arc<dyn Disk> = Arc::new(Raw::new(power.clone()));
        let disk: Arc<dyn Disk> = if through { Arc::new(WriteThrough(raw)) } else { raw };
        disk.write(512, &WriteFrom(&[7; 512])).unwrap();
        power.cut(&[0; 4096], power.moment(), || 255)
    }

    #[test]
    fn only_written_through_is_stable_at_once() {
        assert_eq!(after_a_cut(true)[512..1024], [7; 512]);
        assert_eq!(after_a_cut(false)[512..1024], [0; 512]);
    }

    #[test]
    fn modes_are_called_as_qemu_calls_them() {
        for mode in CacheMode::ALL {
            assert_eq!(mode.name().parse(), Ok(mode));
        }
        assert!("write-back".parse::<CacheMode>().is_err());
        let all = |what: fn(CacheMode) -> bool| CacheMode::ALL.map(what);
        assert_eq!(all(CacheMode::is_direct), [false, true, false, true, false]);
        assert!(CacheMode::ALL.iter().all(|mode| !mode.written_back().is_write_through()));
        let backs = CacheMode::ALL.map(CacheMode::written_back);
        assert_eq!(backs.map(CacheMode::is_direct), [false, true, false, true, false]);
        assert_eq!(all(CacheMode::is_write_through), [false, false, true, true, false]);
        assert_eq!(all(CacheMode::flushes), [true, true, true, true, false]);
    }
}
