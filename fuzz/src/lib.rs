//! What the fuzz targets share: reading structure out of a fuzzer's bytes, and making the files that they break.

use chipset::pci::{Function, MSIX_CAPABILITY};
use device::VmTime;
use memory::{Backing, GuestMemory};
use std::cell::RefCell;

pub mod file;
pub mod kernels;
pub mod packages;

/// Switches a function's MSI-X on, with all of its vectors unmasked. The table is in BAR 0.
pub fn enable_msix(function: &mut dyn Function) {
    let config = function.config();
    let mut at = config.read(0x34, 1) as u16;
    while at != 0 && config.read(at, 1) != u32::from(MSIX_CAPABILITY) {
        at = config.read(at + 1, 1) as u16;
    }
    let vectors = u64::from(config.read(at + 2, 2) & 0x7ff) + 1;
    let table = u64::from(config.read(at + 4, 4) & !7);
    function.config_mut().write(at + 2, 2, 0x8000);
    function.config_written(at + 2);
    for vector in 0..vectors {
        function.bar_write(0, table + vector * 16, 8, 0xfee0_0000, VmTime(0));
        function.bar_write(0, table + vector * 16 + 8, 8, vector, VmTime(0));
    }
}

/// Zeroed RAM of `len` bytes, mapped once: mapping takes longer than most cases do.
pub fn ram(len: u64) -> GuestMemory {
    thread_local!(static MEMORY: RefCell<Option<GuestMemory>> = const { RefCell::new(None) });
    MEMORY.with_borrow_mut(|memory| {
        let memory = memory.get_or_insert_with(|| {
            GuestMemory::new(&[(0, len)], Backing::Private).expect("memory of the host")
        });
        memory.fill(0, len, 0).expect("in RAM");
        memory.clone()
    })
}

/// A fuzzer's bytes, taken from the front; zeroes where they end.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, or what is left.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// The next bytes as an array.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number from few bytes that is often at an edge: small, a power of two or one less, all ones, or anything.
    pub fn number(&mut self) -> u64 {
        let [kind, value] = self.array();
        let power = 1u64 << (value & 63);
        match kind & 7 {
            0 | 1 => value.into(),
            2 => power,
            3 => power.wrapping_sub(1),
            4 => u64::from(value).wrapping_neg(),
            5 => u64::from(value) << 12,
            6 => self.u32().into(),
            _ => self.u64(),
        }
    }

    /// Overwrites bytes of `file` in as many places as the input says: two bytes of place, a length, the new bytes.
    pub fn patch(&mut self, file: &mut [u8]) {
        while !self.is_empty() && !file.is_empty() {
            let place = usize::from(self.u16()) % file.len();
            let len = usize::from(self.u8() % 9);
            let bytes = self.take(len);
            for (to, from) in file[place..].iter_mut().zip(bytes) {
                *to = *from;
            }
        }
    }
}
