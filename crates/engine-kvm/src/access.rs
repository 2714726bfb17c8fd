//! The device accesses of the exit under way: KVM hands over a whole `rep outs` at once, and parts of instructions that
//! cross pages in odd lengths; the machine gets them one natural width at a time.
//!
//! States: *idle*; *pending*, from the exit until its last item has been handed out and answered.

use crate::run_page::RunPage;
use cpu::{Exit, Space};
use kvm_bindings::{
    KVM_EXIT_IO_OUT, kvm_run__bindgen_ty_1__bindgen_ty_4 as Io, kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio,
};

/// Where the answer to the last exit belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// An item of string I/O, at this offset of the run page.
    Data { offset: u64, size: u8 },
    /// Bytes of `mmio.data`.
    Mmio { at: u8, size: u8 },
}

/// See the module page.
#[derive(Debug, Default)]
pub(crate) struct Accesses {
    /// What is still to be handed out, last first.
    waiting: Vec<(Exit, Option<Place>)>,
    awaited: Option<Place>,
}

/// The widest natural access at `address` in `left` bytes.
fn width(address: u64, left: u64) -> u8 {
    [8u8, 4, 2]
        .into_iter()
        .find(|&size| left >= size.into() && address.is_multiple_of(size.into()))
        .unwrap_or(1)
}

impl Accesses {
    /// Takes over KVM_EXIT_IO; `false` if it is of no width that ports have.
    pub(crate) fn port(&mut self, page: &RunPage) -> bool {
        let Io { direction, size, port, count, data_offset } = page.detail();
        if !matches!(size, 1 | 2 | 4) {
            return false;
        }
        let address = u64::from(port);
        // No more than the page can hold, whatever a kernel says.
        let count = u64::from(count).min(4096);
        self.waiting.clear();
        for item in (0..count).rev() {
            let offset = data_offset.saturating_add(item.saturating_mul(size.into()));
            self.waiting.push(if u32::from(direction) == KVM_EXIT_IO_OUT {
                let value = page.data(offset, size);
                (Exit::Write { space: Space::Port, address, size, value }, None)
            } else {
                (Exit::Read { space: Space::Port, address, size }, Some(Place::Data { offset, size }))
            });
        }
        true
    }

    /// Takes over KVM_EXIT_MMIO.
    pub(crate) fn mmio(&mut self, page: &RunPage) {
        let Mmio { phys_addr, data, len, is_write } = page.detail();
        let whole = u64::from(len.min(8));
        self.waiting.clear();
        // A natural width is one access wherever it lies: the device sees what the guest did.
        let natural = matches!(whole, 1 | 2 | 4 | 8);
        let mut done = 0u64;
        while done < whole {
            let address = phys_addr.wrapping_add(done);
            let size = if natural { whole as u8 } else { width(address, whole.wrapping_sub(done)) };
            self.waiting.push(if is_write != 0 {
                let bytes = data.iter().skip(done as usize).take(size.into()).rev();
                let value = bytes.fold(0, |value, byte| value << 8 | u64::from(*byte));
                (Exit::Write { space: Space::Mmio, address, size, value }, None)
            } else {
                let at = done as u8;
                (Exit::Read { space: Space::Mmio, address, size }, Some(Place::Mmio { at, size }))
            });
            done = done.wrapping_add(size.into());
        }
        self.waiting.reverse();
    }

    /// The next access, if one is left.
    pub(crate) fn next(&mut self) -> Option<Exit> {
        let (exit, place) = self.waiting.pop()?;
        self.awaited = place;
        Some(exit)
    }

    /// The machine's answer to the last access; `false` if there was none to answer.
    pub(crate) fn complete(&mut self, page: &RunPage, value: u64) -> bool {
        match self.awaited.take() {
            None => return false,
            Some(Place::Data { offset, size }) => page.set_data(offset, size, value),
            Some(Place::Mmio { at, size }) => {
                let mut mmio: Mmio = page.detail();
                let bytes = mmio.data.iter_mut().skip(at.into()).take(size.into());
                for (byte, value) in bytes.zip(value.to_le_bytes()) {
                    *byte = value;
                }
                page.set_detail(mmio);
            }
        }
        true
    }

    /// What is left is not wanted any more: the vCPU is reset.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }
}
