//! Segments: descriptors, their checks, and the way from a logical to a linear address (Intel SDM 3, chapters 3, 5).

use crate::cpu_core::{Core, attention};
use crate::exception::{Exception, Trap};
use crate::mmu::{Mmu, Privilege};
use crate::state::seg;
use cpu::{Segment, attr, cr0, rflags};

/// The low eight bytes of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor(pub u64);

/// System descriptor types (Intel SDM 3, table 3-2).
pub(crate) mod system {
    pub const TSS16: u16 = 1;
    pub const LDT: u16 = 2;
    pub const TSS16_BUSY: u16 = 3;
    pub const CALL_GATE16: u16 = 4;
    pub const TASK_GATE: u16 = 5;
    pub const INTERRUPT_GATE16: u16 = 6;
    pub const TRAP_GATE16: u16 = 7;
    pub const TSS: u16 = 9;
    pub const TSS_BUSY: u16 = 11;
    pub const CALL_GATE: u16 = 12;
    pub const INTERRUPT_GATE: u16 = 14;
    pub const TRAP_GATE: u16 = 15;
}

impl Descriptor {
    pub(crate) fn attr(self) -> u16 {
        (self.0 >> 40) as u16 & 0xf0ff
    }

    pub(crate) fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }

    pub(crate) fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.attr() & attr::G != 0 { raw << 12 | 0xfff } else { raw }
    }

    pub(crate) fn present(self) -> bool {
        self.attr() & attr::P != 0
    }

    pub(crate) fn dpl(self) -> u8 {
        (self.attr() >> attr::DPL_SHIFT & 3) as u8
    }

    /// Code or data, not system.
    pub(crate) fn segment(self) -> bool {
        self.attr() & attr::S != 0
    }

    pub(crate) fn code(self) -> bool {
        self.segment() && self.attr() & attr::CODE != 0
    }

    /// A data segment that may be written.
    pub(crate) fn writable(self) -> bool {
        self.segment() && self.attr() & (attr::CODE | attr::WRITABLE) == attr::WRITABLE
    }

    /// Data, or code that may be read.
    pub(crate) fn readable(self) -> bool {
        self.segment() && (!self.code() || self.attr() & attr::WRITABLE != 0)
    }

    /// A conforming code segment (the bit means expand-down in data).
    pub(crate) fn conforming(self) -> bool {
        self.code() && self.attr() & 4 != 0
    }

    /// Type field of a system descriptor.
    pub(crate) fn kind(self) -> u16 {
        self.attr() & 0xf
    }

    /// Loaded under `selector`.
    pub(crate) fn load(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), selector, attr: self.attr() }
    }
}

impl Core {
    /// Protected mode, and not virtual-8086.
    pub(crate) fn protected(&self) -> bool {
        self.state.cr0 & cr0::PE != 0 && self.state.rflags & rflags::VM == 0
    }

    /// The vendor whose manual is followed where the two differ.
    pub(crate) fn amd(&self) -> bool {
        self.amd
    }

    /// The linear address of `len` bytes at `offset` in a segment, with the segment's checks.
    pub(crate) fn linear(&self, segment: usize, offset: u64, len: usize, write: bool) -> Result<u64, Trap> {
        let fault = if segment == seg::SS { Exception::SS } else { Exception::GP };
        let extent = len.wrapping_sub(1) as u64;
        if self.state.code64() {
            let linear = crate::mmu::linear64(&self.state, segment, offset);
            let last = linear.wrapping_add(extent);
            return if Mmu::canonical(linear) && Mmu::canonical(last) {
                Ok(linear)
            } else {
                Err(fault.into())
            };
        }
        let Segment { base, limit, attr: bits, .. } = self.state.segments[segment];
        let offset = offset & u64::from(u32::MAX);
        let code = bits & attr::CODE != 0;
        if self.protected() {
            if bits & attr::P == 0 {
                return Err(fault.into());
            }
            let allowed = match (code, write) {
                (true, true) => false,
                (true, false) | (false, true) => bits & attr::WRITABLE != 0,
                (false, false) => true,
            };
            if !allowed {
                return Err(Exception::GP.into());
            }
        }
        let last = offset + extent;
        let limit = u64::from(limit);
        let inside = if !code && bits & 4 != 0 && self.protected() {
            // Expand-down: valid offsets lie above the limit.
            let top = if bits & attr::DB != 0 { u64::from(u32::MAX) } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if inside { Ok(base.wrapping_add(offset) & u64::from(u32::MAX)) } else { Err(fault.into()) }
    }

    /// The linear address of a selector's descriptor; #GP (or `fault`) beyond its table.
    pub(crate) fn descriptor_address(
        &self,
        selector: u16,
        len: u64,
        fault: fn(u16) -> Exception,
    ) -> Result<u64, Trap> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        } else {
            if self.state.ldtr.attr & attr::P == 0 {
                return Err(fault(selector).into());
            }
            (self.state.ldtr.base, u64::from(self.state.ldtr.limit))
        };
        if offset + len - 1 > limit {
            return Err(fault(selector).into());
        }
        let address = base.wrapping_add(offset);
        Ok(if self.state.long_mode() { address } else { address & u64::from(u32::MAX) })
    }

    /// Reads a descriptor.
    pub(crate) fn descriptor(
        &mut self,
        selector: u16,
        fault: fn(u16) -> Exception,
    ) -> Result<Descriptor, Trap> {
        let address = self.descriptor_address(selector, 8, fault)?;
        Ok(Descriptor(self.read_uint(address, 8, Privilege::Implicit)?))
    }

    /// Sets the accessed bit of a segment descriptor in memory.
    pub(crate) fn set_accessed(&mut self, selector: u16, descriptor: Descriptor) -> Result<Descriptor, Trap> {
        if descriptor.attr() & attr::ACCESSED != 0 {
            return Ok(descriptor);
        }
        let address = self.descriptor_address(selector, 8, Exception::gp)?;
        let accessed = Descriptor(descriptor.0 | 1 << 40);
        self.write_uint(address.wrapping_add(5), accessed.0 >> 40 & 0xff, 1, Privilege::Implicit)?;
        Ok(accessed)
    }

    /// Loads ES, SS, DS, FS or GS as MOV, POP and LxS do.
    pub(crate) fn load_segment(&mut self, segment: usize, selector: u16) -> Result<(), Trap> {
        let loaded = if !self.protected() {
            self.real_mode_segment(segment, selector)
        } else if segment == seg::SS {
            self.checked_stack(selector, self.state.cpl(), Exception::gp)?
        } else {
            self.checked_data(segment, selector)?
        };
        self.state.segments[segment] = loaded;
        self.state.attention |= attention::MODE;
        Ok(())
    }

    pub(crate) fn real_mode_segment(&self, segment: usize, selector: u16) -> Segment {
        let old = self.state.segments[segment];
        let kind = if segment == seg::CS { 0xb } else { 3 };
        if self.state.rflags & rflags::VM != 0 && self.state.cr0 & cr0::PE != 0 {
            let attr = attr::P | attr::S | kind | 3 << attr::DPL_SHIFT;
            return Segment { base: u64::from(selector) << 4, limit: 0xffff, selector, attr };
        }
        // The limit stays: "unreal" mode.
        let attr = if segment == seg::CS { attr::P | attr::S | kind } else { old.attr | attr::P | attr::S };
        Segment { base: u64::from(selector) << 4, selector, attr, ..old }
    }

    /// A stack segment for `cpl`; `fault` is the exception of a bad selector (#GP, or #TS from a TSS).
    pub(crate) fn checked_stack(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: fn(u16) -> Exception,
    ) -> Result<Segment, Trap> {
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            if self.state.code64() && cpl < 3 && rpl == cpl {
                return Ok(null_stack(selector, cpl));
            }
            return Err(fault(0).into());
        }
        let descriptor = self.descriptor(selector, fault)?;
        if rpl != cpl || !descriptor.writable() || descriptor.dpl() != cpl {
            return Err(fault(selector).into());
        }
        if !descriptor.present() {
            return Err(Exception::ss(selector).into());
        }
        Ok(self.set_accessed(selector, descriptor)?.load(selector))
    }

    fn checked_data(&mut self, segment: usize, selector: u16) -> Result<Segment, Trap> {
        if selector & !3 == 0 {
            return Ok(self.null_segment(segment, selector));
        }
        let descriptor = self.descriptor(selector, Exception::gp)?;
        if !descriptor.readable() {
            return Err(Exception::gp(selector).into());
        }
        let effective = self.state.cpl().max((selector & 3) as u8);
        if !descriptor.conforming() && descriptor.dpl() < effective {
            return Err(Exception::gp(selector).into());
        }
        if !descriptor.present() {
            return Err(Exception::np(selector).into());
        }
        Ok(self.set_accessed(selector, descriptor)?.load(selector))
    }

    /// A null selector makes the segment unusable. Whether the hidden base is cleared is the vendor's choice: Intel
    /// clears it, AMD only with CPUID 8000_0021h EAX[6] (NullSelectorClearsBase).
    pub(crate) fn null_segment(&self, segment: usize, selector: u16) -> Segment {
        let clears = !self.amd() || self.cpuid.get(0x8000_0021, 0).is_some_and(|leaf| leaf.eax & 1 << 6 != 0);
        let base = if clears { 0 } else { self.state.segments[segment].base };
        Segment { base, limit: 0, selector, attr: 0 }
    }

    /// LLDT's load, or the one in a task switch.
    pub(crate) fn load_ldtr(&mut self, selector: u16) -> Result<(), Trap> {
        if selector & !3 == 0 {
            self.state.ldtr = Segment { selector, ..Segment::default() };
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(Exception::gp(selector).into());
        }
        let descriptor = self.descriptor(selector, Exception::gp)?;
        if descriptor.segment() || descriptor.kind() != system::LDT {
            return Err(Exception::gp(selector).into());
        }
        if !descriptor.present() {
            return Err(Exception::np(selector).into());
        }
        self.state.ldtr = self.load_system(selector, descriptor)?;
        Ok(())
    }

    /// LTR.
    pub(crate) fn load_tr(&mut self, selector: u16) -> Result<(), Trap> {
        if selector & !3 == 0 {
            return Err(Exception::GP.into());
        }
        if selector & 4 != 0 {
            return Err(Exception::gp(selector).into());
        }
        let descriptor = self.descriptor(selector, Exception::gp)?;
        let available =
            descriptor.kind() == system::TSS || descriptor.kind() == system::TSS16 && !self.state.long_mode();
        if descriptor.segment() || !available {
            return Err(Exception::gp(selector).into());
        }
        if !descriptor.present() {
            return Err(Exception::np(selector).into());
        }
        let busy = Descriptor(descriptor.0 | 2 << 40);
        let loaded = self.load_system(selector, busy)?;
        let address = self.descriptor_address(selector, 8, Exception::gp)?;
        self.write_uint(address.wrapping_add(5), busy.0 >> 40 & 0xff, 1, Privilege::Implicit)?;
        self.state.tr = loaded;
        Ok(())
    }

    /// A system segment; in long mode its descriptor has 16 bytes and a 64-bit base.
    pub(crate) fn load_system(&mut self, selector: u16, descriptor: Descriptor) -> Result<Segment, Trap> {
        let mut loaded = descriptor.load(selector);
        if self.state.long_mode() {
            let address = self.descriptor_address(selector, 16, Exception::gp)?;
            let high = self.read_uint(address.wrapping_add(8), 8, Privilege::Implicit)?;
            loaded.base |= high << 32;
            if high >> 40 & 0x1f != 0 || !Mmu::canonical(loaded.base) {
                return Err(Exception::gp(selector).into());
            }
        }
        Ok(loaded)
    }

    /// After a change to an outer level: data segments that the new level may not use become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        let cpl = u16::from(self.state.cpl());
        for segment in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let bits = self.state.segments[segment].attr;
            let conforming = bits & (attr::CODE | 4) == attr::CODE | 4;
            let present = bits & attr::P != 0;
            if present && !conforming && bits >> attr::DPL_SHIFT & 3 < cpl {
                self.state.segments[segment] = self.null_segment(segment, 0);
            }
        }
    }
}

/// SS holding a null selector in 64-bit mode: unusable, but its DPL is still the CPL.
pub(crate) fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment { base: 0, limit: 0, selector, attr: u16::from(cpl) << attr::DPL_SHIFT }
}
