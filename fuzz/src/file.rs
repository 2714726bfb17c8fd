//! A file in memory, for images.

use crate::Input;
use image::Buffers;
use image::storage::{Extent, Storage};
use std::io;
use std::sync::{Mutex, PoisonError};

/// A file that grows beyond this is full.
const FILE_MAX: u64 = 16 << 20;

/// A file in memory.
#[derive(Default)]
pub struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody changes bytes of what was sound.
    pub fn spoil(&self, input: &mut Input<'_>) {
        for _ in 0..input.u8() & 15 {
            let (at, value) = (input.u16(), input.u8());
            let mut bytes = self.bytes();
            let len = bytes.len().max(1);
            // Most of it near the beginning, where tables are.
            let place = if value & 1 == 0 { usize::from(at) % len } else { (usize::from(at) * 8) % len };
            if let Some(byte) = bytes.get_mut(place) {
                *byte = input.u8();
            }
        }
    }

    fn with(&self, offset: u64, len: u64, f: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= FILE_MAX).ok_or(io::ErrorKind::StorageFull)?
            as usize;
        let mut bytes = self.bytes();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        f(&mut bytes[offset as usize..end])
    }
}

impl Storage for Memory {
    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let bytes = self.bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let to = from.saturating_add(len as usize).min(bytes.len());
        let mut piece = bytes[from..to].to_vec();
        piece.resize(len as usize, 0);
        buffers.put(at, &piece)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |bytes| buffers.get(at, bytes))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > FILE_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes().resize(len as usize, 0);
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_range(offset, len)
    }
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |bytes| {
            bytes.fill(0);
            Ok(())
        })
    }
    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn extent(&self, _: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { len, hole: false })
    }
    fn allocated(&self) -> Option<u64> {
        None
    }
}
