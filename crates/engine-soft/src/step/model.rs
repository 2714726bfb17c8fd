//! CPUID, time-stamp counter and model-specific registers.

use super::feature;
use crate::cpu_core::{Core, attention};
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::mmu::Mmu;
use crate::peers::kick;
use crate::state::{reg, seg};
use cpu::cpuid::Leaf;
use cpu::{cr4, efer, msr};
use iced_x86::{CpuidFeature, OpKind};

/// MTRRs (Intel SDM 3, 12.11): IA32_MTRR_PHYSBASE0 and on, and the fixed ranges.
const MTRR_VARIABLE: u32 = 0x200;
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// MTRR storage: what is written is read back; guest RAM is always write-back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mtrrs {
    fixed: [u64; 11],
    variable: [u64; 16],
}

/// Why a register is not read or written here.
enum Refused {
    /// The machine holds it, or nobody.
    Elsewhere,
    /// #GP.
    Fault,
}

impl Core {
    /// The guest's TSC now.
    pub fn tsc(&self) -> u64 {
        self.tsc_at(host_tsc())
    }

    /// The guest's TSC when the host's is that.
    pub(crate) fn tsc_at(&self, host: u64) -> u64 {
        host.checked_div(self.state.tsc_divisor).unwrap_or(0).wrapping_add(self.state.tsc_offset)
    }

    /// What the guest's TSC is an offset from.
    fn ticks(&self) -> u64 {
        host_tsc().checked_div(self.state.tsc_divisor).unwrap_or(0)
    }

    /// What CPUID answers at this moment.
    pub(crate) fn cpuid_now(&self, function: u32, index: u32) -> Leaf {
        let mut leaf = self.cpuid.query(function, index);
        match (function, index) {
            (1, _) => {
                leaf.ebx = leaf.ebx & 0x00ff_ffff | self.index << 24;
                leaf.ecx &= !(1 << 27);
                if self.state.cr4_has(cr4::OSXSAVE) {
                    leaf.ecx |= 1 << 27;
                }
            }
            (0xb | 0x1f, _) => leaf.edx = self.index,
            (0x8000_001e, _) => leaf.eax = self.index,
            // Size of the XSAVE area for what XCR0 enables now; the compacted form is the same but for nothing else.
            (0xd, 0) => leaf.ebx = super::xstate::area_size(self.state.xcr0),
            (0xd, 1) if leaf.eax != 0 => {
                leaf.ebx = super::xstate::area_size(self.state.xcr0 | self.state.msrs.xss);
            }
            _ => {}
        }
        leaf
    }

    /// An MSR of the engine's own.
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.engine_msr(index).ok()
    }

    fn engine_msr(&self, index: u32) -> Result<u64, Refused> {
        let s = &self.state;
        Ok(match index {
            msr::TSC => self.tsc(),
            msr::TSC_ADJUST => s.msrs.tsc_adjust,
            msr::EFER => s.efer,
            msr::STAR => s.msrs.star,
            msr::LSTAR => s.msrs.lstar,
            msr::CSTAR => s.msrs.cstar,
            msr::SFMASK => s.msrs.sfmask,
            msr::FS_BASE => s.segments[seg::FS].base,
            msr::GS_BASE => s.segments[seg::GS].base,
            msr::KERNEL_GS_BASE => s.msrs.kernel_gs_base,
            msr::TSC_AUX => s.msrs.tsc_aux,
            msr::SYSENTER_CS => s.msrs.sysenter_cs,
            msr::SYSENTER_ESP => s.msrs.sysenter_esp,
            msr::SYSENTER_EIP => s.msrs.sysenter_eip,
            msr::PAT => s.msrs.pat,
            msr::MISC_ENABLE => s.msrs.misc_enable,
            msr::SPEC_CTRL => s.msrs.spec_ctrl,
            msr::XSS => s.msrs.xss,
            msr::MTRR_DEF_TYPE => s.msrs.mtrr_def_type,
            // Fixed ranges and write combining, no variable ranges: nothing of it matters to RAM that is always
            // write-back, and a kernel that finds none does not reshuffle them.
            msr::MTRR_CAP => 0x500,
            msr::PRED_CMD => return Err(Refused::Fault),
            _ => return self.mtrr(index).copied().ok_or(Refused::Elsewhere),
        })
    }

    fn mtrr(&self, index: u32) -> Option<&u64> {
        if let Some(place) = MTRR_FIXED.iter().position(|&m| m == index) {
            return self.mtrrs.fixed.get(place);
        }
        self.mtrrs.variable.get(index.checked_sub(MTRR_VARIABLE)? as usize)
    }

    fn mtrr_mut(&mut self, index: u32) -> Option<&mut u64> {
        if let Some(place) = MTRR_FIXED.iter().position(|&m| m == index) {
            return self.mtrrs.fixed.get_mut(place);
        }
        self.mtrrs.variable.get_mut(index.checked_sub(MTRR_VARIABLE)? as usize)
    }

    /// Sets an MSR of the engine's own, as WRMSR or (`host`) as the machine restoring state does.
    pub fn set_msr(&mut self, index: u32, value: u64, host: bool) -> bool {
        self.set_engine_msr(index, value, host).is_ok()
    }

    fn set_engine_msr(&mut self, index: u32, value: u64, host: bool) -> Result<(), Refused> {
        let canonical = Mmu::canonical(value);
        let ticks = self.ticks();
        let s = &mut self.state;
        match index {
            // The machine's local APIC, whose deadline is a TSC, has to know before the next instruction.
            msr::TSC => {
                let offset = value.wrapping_sub(ticks);
                if !host {
                    let by = offset.wrapping_sub(s.tsc_offset);
                    s.msrs.tsc_adjust = s.msrs.tsc_adjust.wrapping_add(by);
                    s.doorbell.ring(kick::LEAVE);
                }
                s.tsc_offset = offset;
            }
            msr::TSC_ADJUST => {
                if !host {
                    s.tsc_offset = s.tsc_offset.wrapping_add(value.wrapping_sub(s.msrs.tsc_adjust));
                    s.doorbell.ring(kick::LEAVE);
                }
                s.msrs.tsc_adjust = value;
            }
            msr::EFER => return self.set_efer(value, host),
            msr::STAR => s.msrs.star = value,
            msr::SFMASK => s.msrs.sfmask = value & u64::from(u32::MAX),
            msr::LSTAR if canonical => s.msrs.lstar = value,
            msr::CSTAR if canonical => s.msrs.cstar = value,
            msr::FS_BASE if canonical => s.segments[seg::FS].base = value,
            msr::GS_BASE if canonical => s.segments[seg::GS].base = value,
            msr::KERNEL_GS_BASE if canonical => s.msrs.kernel_gs_base = value,
            msr::SYSENTER_ESP if canonical => s.msrs.sysenter_esp = value,
            msr::SYSENTER_EIP if canonical => s.msrs.sysenter_eip = value,
            msr::TSC_AUX if value >> 32 == 0 => s.msrs.tsc_aux = value,
            msr::SYSENTER_CS => s.msrs.sysenter_cs = value & u64::from(u32::MAX),
            // Memory types 2 and 3 do not exist (Intel SDM 3, table 12-10).
            msr::PAT if value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)) => s.msrs.pat = value,
            msr::MISC_ENABLE => s.msrs.misc_enable = value,
            msr::SPEC_CTRL if value & !0x487 == 0 => s.msrs.spec_ctrl = value,
            // IBPB and its like: there is no predictor state of the guest's own to flush.
            msr::PRED_CMD if value & !0x81 == 0 => {}
            // No supervisor states are offered.
            msr::XSS if value == 0 => s.msrs.xss = value,
            msr::MTRR_DEF_TYPE if value & !0xcff == 0 => s.msrs.mtrr_def_type = value,
            msr::LSTAR
            | msr::CSTAR
            | msr::FS_BASE
            | msr::GS_BASE
            | msr::KERNEL_GS_BASE
            | msr::SYSENTER_ESP
            | msr::SYSENTER_EIP
            | msr::TSC_AUX
            | msr::PAT
            | msr::SPEC_CTRL
            | msr::PRED_CMD
            | msr::XSS
            | msr::MTRR_DEF_TYPE
            | msr::MTRR_CAP => return Err(Refused::Fault),
            _ => {
                *self.mtrr_mut(index).ok_or(Refused::Elsewhere)? = value;
                return Ok(());
            }
        }
        Ok(())
    }

    fn set_efer(&mut self, value: u64, host: bool) -> Result<(), Refused> {
        let extended = self.cpuid.query(0x8000_0001, 0);
        let mut known = efer::LMA;
        for (value, bit, flag) in [
            (extended.edx, 11, efer::SCE),
            (extended.edx, 29, efer::LME),
            (extended.edx, 20, efer::NXE),
            (extended.edx, 25, efer::FFXSR),
        ] {
            if value >> bit & 1 != 0 {
                known |= flag;
            }
        }
        let old = self.state.efer;
        // AMD: AutoIBRS (CPUID 8000_0021h EAX[8]) is EFER bit 21.
        if self.cpuid.query(0x8000_0021, 0).eax & 1 << 8 != 0 {
            known |= 1 << 21;
        }
        if value & !known != 0 && !host {
            return Err(Refused::Fault);
        }
        if self.state.paging() && (old ^ value) & efer::LME != 0 && !host {
            return Err(Refused::Fault);
        }
        let lma = if host { value } else { old } & efer::LMA;
        self.state.efer = value & !efer::LMA | lma;
        self.mmu.flush_all(&mut self.state);
        self.state.attention |= attention::MODE;
        Ok(())
    }
}

/// The host's time-stamp counter.
pub(crate) fn host_tsc() -> u64 {
    #[allow(unsafe_code)]
    // SAFETY: reads a counter.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
}

fn set_pair(core: &mut Core, value: u64) {
    core.state.gpr[reg::RAX] = value & u64::from(u32::MAX);
    core.state.gpr[reg::RDX] = value >> 32;
}

fn pair(core: &Core) -> u64 {
    core.state.gpr[reg::RAX] & u64::from(u32::MAX) | core.state.gpr[reg::RDX] << 32
}

/// CPUID.
pub(crate) fn cpuid(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    let leaf = core.cpuid_now(core.state.gpr[reg::RAX] as u32, core.state.gpr[reg::RCX] as u32);
    core.state.gpr[reg::RAX] = u64::from(leaf.eax);
    core.state.gpr[reg::RBX] = u64::from(leaf.ebx);
    core.state.gpr[reg::RCX] = u64::from(leaf.ecx);
    core.state.gpr[reg::RDX] = u64::from(leaf.edx);
    Ok(())
}

fn time_allowed(core: &Core) -> Result<(), Trap> {
    if core.state.cr4_has(cr4::TSD) && core.state.cpl() != 0 { Err(Exception::GP.into()) } else { Ok(()) }
}

/// RDTSC.
pub(crate) fn rdtsc(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    time_allowed(core)?;
    let now = core.tsc();
    set_pair(core, now);
    Ok(())
}

/// RDTSCP.
pub(crate) fn rdtscp(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !feature::supported(CpuidFeature::RDTSCP, &core.cpuid) {
        return Err(Exception::UD.into());
    }
    rdtsc(core, d)?;
    core.state.gpr[reg::RCX] = core.state.msrs.tsc_aux & u64::from(u32::MAX);
    Ok(())
}

/// RDPID.
pub(crate) fn rdpid(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !feature::supported(CpuidFeature::RDPID, &core.cpuid) || d.instruction.op0_kind() != OpKind::Register {
        return Err(Exception::UD.into());
    }
    let aux = core.state.msrs.tsc_aux;
    core.set_gpr(d.instruction.op0_register(), aux);
    Ok(())
}

/// RDPMC: there are no performance counters.
pub(crate) fn rdpmc(_: &mut Core, _: &Decoded) -> Result<(), Trap> {
    Err(Exception::GP.into())
}

/// RDMSR.
pub(crate) fn rdmsr(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    if core.state.cpl() != 0 {
        return Err(Exception::GP.into());
    }
    let index = core.state.gpr[reg::RCX] as u32;
    let value = match core.engine_msr(index) {
        Ok(value) => value,
        Err(Refused::Fault) => return Err(Exception::GP.into()),
        Err(Refused::Elsewhere) => core.io.read_msr(index)?.ok_or(Exception::GP)?,
    };
    set_pair(core, value);
    Ok(())
}

/// WRMSR.
pub(crate) fn wrmsr(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    if core.state.cpl() != 0 {
        return Err(Exception::GP.into());
    }
    let index = core.state.gpr[reg::RCX] as u32;
    let value = pair(core);
    match core.set_engine_msr(index, value, false) {
        Ok(()) => Ok(()),
        Err(Refused::Fault) => Err(Exception::GP.into()),
        Err(Refused::Elsewhere) => {
            core.io.write_msr(index, value)?.ok_or(Exception::GP)?;
            Ok(())
        }
    }
}

/// XGETBV: XCR0, and with index 1 the components of it in use.
pub(crate) fn xgetbv(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    if !core.state.cr4_has(cr4::OSXSAVE) {
        return Err(Exception::UD.into());
    }
    let value = match core.state.gpr[reg::RCX] as u32 {
        0 => core.state.xcr0,
        // All that is enabled counts as in use.
        1 if core.cpuid.query(0xd, 1).eax & 1 << 2 != 0 => core.state.xcr0,
        _ => return Err(Exception::GP.into()),
    };
    set_pair(core, value);
    Ok(())
}

/// XSETBV.
pub(crate) fn xsetbv(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    if !core.state.cr4_has(cr4::OSXSAVE) {
        return Err(Exception::UD.into());
    }
    let value = pair(core);
    let offered = core.cpuid.query(0xd, 0);
    let offered = u64::from(offered.eax) | u64::from(offered.edx) << 32;
    let valid = value & 1 != 0 && value & 6 != 4 && value & !(offered & 7) == 0;
    if core.state.cpl() != 0 || core.state.gpr[reg::RCX] as u32 != 0 || !valid {
        return Err(Exception::GP.into());
    }
    core.state.xcr0 = value;
    core.state.attention |= attention::MODE;
    Ok(())
}
