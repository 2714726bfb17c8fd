//! The end of a file, where blocks that are new get their place.
//!
//! What is handed out lies beyond everything that was ever written there, and so reads as zeroes: the file is cut before it
//! grows over bytes that mean nothing any more.

use crate::storage::Storage;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

struct Inside {
    /// Where the last thing of use ends.
    end: u64,
    /// Nothing lies beyond: what the file gets there reads as zeroes.
    bare: bool,
    /// A format's own last sector is beyond.
    sealed: bool,
}

/// See the module.
pub struct Tail(Mutex<Inside>);

impl Tail {
    /// What is of use ends at `end`.
    pub fn new(end: u64) -> Self {
        Self(Mutex::new(Inside { end, bare: false, sealed: false }))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the last thing of use ends.
    pub fn end(&self) -> u64 {
        self.inside().end
    }

    /// Everything of use ends at another place: nothing may be in use beyond.
    pub fn reset(&self, end: u64) {
        *self.inside() = Inside { end, bare: false, sealed: false };
    }

    /// A new row of `len` bytes, zeroes, whose byte `skip` lies at a multiple of `align` (a power of two).
    pub fn append(&self, storage: &dyn Storage, len: u64, skip: u64, align: u64) -> io::Result<u64> {
        let full = || io::Error::from(io::ErrorKind::FileTooLarge);
        let mut inside = self.inside();
        if !inside.bare {
            if storage.len() > inside.end {
                storage.set_len(inside.end)?;
            }
            (inside.bare, inside.sealed) = (true, false);
        }
        let first = inside.end.checked_add(skip).and_then(|at| at.checked_next_multiple_of(align));
        let start = first.and_then(|at| at.checked_sub(skip)).ok_or_else(full)?;
        let end = start.checked_add(len).filter(|end| i64::try_from(*end).is_ok()).ok_or_else(full)?;
        storage.set_len(end)?;
        if storage.len() > end {
            // A device, which cannot be cut.
            storage.zero_range(start, len)?;
        }
        inside.end = end;
        Ok(start)
    }

    /// Takes back a row that nobody has seen, if it is the last one.
    pub fn give_back(&self, storage: &dyn Storage, start: u64, len: u64) {
        let mut inside = self.inside();
        if inside.end == start.saturating_add(len) && storage.set_len(start).is_ok() {
            inside.end = start;
        }
    }

    /// Writes a format's last bytes beyond everything, unless they are there.
    pub fn seal(&self, storage: &dyn Storage, last: &[u8]) -> io::Result<()> {
        let mut inside = self.inside();
        if !inside.sealed {
            if storage.len() > inside.end {
                storage.set_len(inside.end)?;
            }
            storage.write_bytes(inside.end, last)?;
            (inside.bare, inside.sealed) = (false, true);
        }
        Ok(())
    }

    /// The format's last bytes are there already.
    pub fn set_sealed(&self) {
        self.inside().sealed = true;
    }

    /// The format's last bytes have changed.
    pub fn unseal(&self) {
        let mut inside = self.inside();
        (inside.bare, inside.sealed) = (false, false);
    }
}
