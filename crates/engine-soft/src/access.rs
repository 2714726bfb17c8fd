//! Memory as the guest's instructions see it: linear addresses, page crossings, devices, code pages.
//!
//! All checks of an access precede its first byte: an access that crosses a page faults before anything is written.

use crate::cpu_core::{Core, attention};
use crate::exception::Trap;
use crate::host;
use crate::mmu::{Access, Mmu, Privilege, Target};
use cpu::Space;
use memory::PAGE_SIZE;

/// Bytes from `address` to the end of its page.
pub(crate) fn room_in_page(address: u64) -> usize {
    (PAGE_SIZE - (address & (PAGE_SIZE - 1))) as usize
}

impl Core {
    /// The rights of ordinary accesses now.
    pub fn privilege(&self) -> Privilege {
        Privilege::of(&self.state)
    }

    /// Reads guest memory at a linear address.
    pub fn read(&mut self, linear: u64, into: &mut [u8], privilege: Privilege) -> Result<(), Trap> {
        if privilege != Privilege::Implicit
            && let Some(host) =
                Mmu::lookup(&self.state, linear, into.len() as u64, false, privilege == Privilege::User)
        {
            host::read(host, into);
            return Ok(());
        }
        match self.targets(linear, into.len(), Access::Read, privilege)? {
            (first, None) => self.read_target(first, into),
            (first, Some(second)) => {
                let (head, tail) = into.split_at_mut(room_in_page(linear));
                self.read_target(first, head)?;
                self.read_target(second, tail)
            }
        }
    }

    /// Writes guest memory at a linear address.
    pub fn write(&mut self, linear: u64, from: &[u8], privilege: Privilege) -> Result<(), Trap> {
        if privilege != Privilege::Implicit
            && let Some(host) =
                Mmu::lookup(&self.state, linear, from.len() as u64, true, privilege == Privilege::User)
        {
            self.note_write(host, from.len());
            host::write(host, from);
            return Ok(());
        }
        match self.targets(linear, from.len(), Access::Write, privilege)? {
            (first, None) => self.write_target(first, from),
            (first, Some(second)) => {
                let (head, tail) = from.split_at(room_in_page(linear));
                self.write_target(first, head)?;
                self.write_target(second, tail)
            }
        }
    }

    /// Checks that an access would be allowed, without making it.
    pub fn probe(
        &mut self,
        linear: u64,
        len: usize,
        access: Access,
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.targets(linear, len, access, privilege).map(|_| ())
    }

    /// Reads a little-endian number of `size` (1, 2, 4 or 8) bytes.
    pub fn read_uint(&mut self, linear: u64, size: usize, privilege: Privilege) -> Result<u64, Trap> {
        let mut bytes = [0; 8];
        self.read(linear, &mut bytes[..size], privilege)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes the low `size` (1, 2, 4 or 8) bytes of `value`.
    pub fn write_uint(
        &mut self,
        linear: u64,
        value: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<(), Trap> {
        self.write(linear, &value.to_le_bytes()[..size], privilege)
    }

    /// Translates an access of `len` (1 to 4096) bytes; the second target is that of the next page, if it reaches
    /// there.
    pub(crate) fn targets(
        &mut self,
        linear: u64,
        len: usize,
        access: Access,
        privilege: Privilege,
    ) -> Result<(Target, Option<Target>), Trap> {
        let first = self.mmu.resolve(&mut self.state, linear, access, privilege)?;
        if len <= room_in_page(linear) {
            return Ok((first, None));
        }
        let mut next = (linear | (PAGE_SIZE - 1)).wrapping_add(1);
        // What the CPU itself accesses may be above, even if the code that runs cannot be.
        if !self.state.code64() && linear >> 32 == 0 {
            next &= u64::from(u32::MAX);
        }
        let second = self.mmu.resolve(&mut self.state, next, access, privilege)?;
        Ok((first, Some(second)))
    }

    /// Reads within one page.
    pub(crate) fn read_target(&mut self, target: Target, into: &mut [u8]) -> Result<(), Trap> {
        if let Some(host) = target.host {
            host::read(host, into);
            return Ok(());
        }
        let mut physical = target.physical;
        let mut rest = into;
        while !rest.is_empty() {
            let size = device_width(rest.len());
            let value = self.io.read(Space::Mmio, physical, size as u8)?;
            let (now, later) = rest.split_at_mut(size);
            now.copy_from_slice(&value.to_le_bytes()[..size]);
            physical = physical.wrapping_add(size as u64);
            rest = later;
        }
        Ok(())
    }

    /// Writes within one page.
    pub(crate) fn write_target(&mut self, target: Target, from: &[u8]) -> Result<(), Trap> {
        if let Some(host) = target.host {
            self.note_write(host, from.len());
            host::write(host, from);
            if target.code {
                self.notify_code_write(target.physical, from.len() as u64);
            }
            return Ok(());
        }
        let mut physical = target.physical;
        let mut rest = from;
        while !rest.is_empty() {
            let size = device_width(rest.len());
            let (now, later) = rest.split_at(size);
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(now);
            self.io.write(Space::Mmio, physical, size as u8, u64::from_le_bytes(bytes))?;
            physical = physical.wrapping_add(size as u64);
            rest = later;
        }
        Ok(())
    }

    /// RAM is about to be written.
    pub(crate) fn note_write(&mut self, host: *mut u8, len: usize) {
        if let Some(log) = &mut self.writes {
            log.note(host, len);
        }
    }

    /// Bytes of a page that holds translated code were written.
    pub fn notify_code_write(&mut self, physical: u64, len: u64) {
        self.state.attention |= attention::CODE_WRITES;
        self.mmu.news.written(physical);
        if let Some(peers) = &self.peers {
            peers.written(physical, len, &self.mmu.memory);
        }
        if let Some(last) = self.code_writes.last_mut()
            && last.0.wrapping_add(last.1) == physical
        {
            last.1 = last.1.wrapping_add(len);
            return;
        }
        self.code_writes.push((physical, len));
    }

    /// Has all vCPUs drop what they know of a page's code: it is about to be written to for a while.
    pub(crate) fn drop_code(&mut self, physical: u64) {
        if let Some(peers) = &self.peers {
            peers.give_up(physical);
        }
        self.notify_code_write(physical & !0xfff, 0x1000);
    }
}

/// The widest device access that `len` bytes allow.
fn device_width(len: usize) -> usize {
    match len {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}
