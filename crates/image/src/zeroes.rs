//! Writes of zeroes that become requests to write zeroes: QEMU's `detect-zeroes`.
//!
//! What a guest writes as zeroes then takes no time to store, and with `unmap` no space. A request counts only as a whole,
//! as with QEMU. Looking at what is written costs; a request that begins with anything else is let pass at once.

use crate::buffers::Buffers;
use crate::disk::{Disk, Status};
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

/// Bytes that are looked at in one go.
const LOOK: usize = 4096;

/// What becomes of zeroes that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They are written the quick way, and keep their space.
    On,
    /// They are written the quick way, and their space may be given back.
    Unmap,
}

impl DetectZeroes {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Off, Self::On, Self::Unmap];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Unmap => "unmap",
        }
    }

    /// The disk, or one in front of it that looks for zeroes.
    pub fn on(self, disk: Arc<dyn Disk>) -> Arc<dyn Disk> {
        match self {
            Self::Off => disk,
            Self::On | Self::Unmap => Arc::new(Detecting { disk, unmap: self == Self::Unmap }),
        }
    }
}

impl fmt::Display for DetectZeroes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DetectZeroes {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|what| what.name() == name);
        known.ok_or_else(|| format!("detect-zeroes={name}: {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// See the module.
struct Detecting {
    disk: Arc<dyn Disk>,
    unmap: bool,
}

/// Whether all of a request's bytes are zero.
fn are_zero(buffers: &dyn Buffers) -> io::Result<bool> {
    let mut bytes = [0; LOOK];
    let mut at = 0u64;
    while at < buffers.len() {
        let len = crate::endian::size(buffers.len().saturating_sub(at)).min(LOOK);
        let part = bytes.get_mut(..len).unwrap_or_default();
        buffers.get(at, part)?;
        if part.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at = at.saturating_add(len as u64);
    }
    Ok(!buffers.is_empty())
}

impl Disk for Detecting {
    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }
    fn read_only(&self) -> bool {
        self.disk.read_only()
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        self.disk.read(offset, buffers)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        if are_zero(buffers)? {
            self.disk.write_zeroes(offset, buffers.len(), self.unmap)
        } else {
            self.disk.write(offset, buffers)
        }
    }
    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
    fn zero_quickly(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.zero_quickly(offset, len, unmap)
    }
    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.disk.block_status(offset, len)
    }
    fn resize(&self, capacity: u64) -> io::Result<()> {
        self.disk.resize(capacity)
    }
    fn snapshot(&self, name: &str) -> io::Result<()> {
        self.disk.snapshot(name)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::format::Raw;
    use crate::{Content, ReadInto, WriteFrom};

    fn disk(how: DetectZeroes) -> (tempfile::NamedTempFile, Arc<dyn Disk>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 1 << 20]).unwrap();
        let raw: Arc<dyn Disk> = Arc::new(Raw::open(file.path(), false).unwrap());
        (file, how.on(raw))
    }

    #[test]
    fn zeroes_take_no_space_only_where_that_was_asked_for() {
        for how in DetectZeroes::ALL {
            let (_file, disk) = disk(how);
            disk.write(0, &WriteFrom(&[0; 65536])).unwrap();
            // The last byte of a request counts as much as its first.
            let mut nearly = [0; 65536];
            nearly[65535] = 1;
            disk.write(65536, &WriteFrom(&nearly)).unwrap();
            let mut bytes = vec![1; 1 << 17];
            disk.read(0, &ReadInto::new(&mut bytes)).unwrap();
            assert!(bytes[..131_071].iter().all(|byte| *byte == 0) && bytes[131_071] == 1);
            let hole = disk.block_status(0, 4096).unwrap().content == Content::Zero;
            assert!(!hole || how != DetectZeroes::Off, "{how}");
            assert!(hole || how != DetectZeroes::Unmap, "{how}");
            assert_eq!(disk.block_status(65536, 4096).unwrap().content, Content::Data);
        }
    }

    #[test]
    fn nothing_is_not_zeroes_and_names_are_qemus() {
        let (_file, disk) = disk(DetectZeroes::Unmap);
        disk.write(0, &WriteFrom(&[])).unwrap();
        assert_eq!(disk.block_status(0, 4096).unwrap().content, Content::Data);
        for how in DetectZeroes::ALL {
            assert_eq!(how.name().parse(), Ok(how));
        }
        assert!("always".parse::<DetectZeroes>().is_err());
    }
}
