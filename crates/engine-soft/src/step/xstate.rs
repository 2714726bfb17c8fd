//! The XSAVE family (Intel SDM 1, chapter 13), executed by the host on the live state through a buffer.
//!
//! XSAVEOPT and XSAVES run as XSAVE and XSAVEC: the host's optimisation for state unchanged since the last XRSTOR
//! goes by the address of the area, and all areas share one buffer here. Leaving out what is unchanged is optional.

use super::{feature, native};
use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::mmu::Access;
use crate::state::reg;
use cpu::{cr0, cr4};
use iced_x86::{CpuidFeature, Mnemonic};

/// Legacy region, header and AVX state.
pub(crate) const AREA: usize = 832;
const COMPACT: u64 = 1 << 63;

/// Bytes of a standard area for these components; offsets are the architecture's for x87, SSE and AVX.
pub(crate) fn area_size(components: u64) -> u32 {
    if components & 4 != 0 { AREA as u32 } else { 576 }
}

/// A buffer aligned as the instructions demand.
#[repr(C, align(64))]
pub(crate) struct Area(pub [u8; AREA]);

impl Area {
    fn quad(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }
}

/// XSAVE, XSAVEC, XSAVEOPT, XSAVES, XRSTOR, XRSTORS and their 64-bit forms.
pub(crate) fn execute(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let (needs, save, compact, supervisor) = match i.mnemonic() {
        Mnemonic::Xsave | Mnemonic::Xsave64 => (CpuidFeature::XSAVE, true, false, false),
        Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => (CpuidFeature::XSAVEOPT, true, false, false),
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => (CpuidFeature::XSAVEC, true, true, false),
        Mnemonic::Xsaves | Mnemonic::Xsaves64 => (CpuidFeature::XSAVES, true, true, true),
        Mnemonic::Xrstors | Mnemonic::Xrstors64 => (CpuidFeature::XSAVES, false, true, true),
        _ => (CpuidFeature::XSAVE, false, false, false),
    };
    if !feature::supported(needs, &core.cpuid) || !core.state.cr4_has(cr4::OSXSAVE) {
        return Err(Exception::UD.into());
    }
    if supervisor && core.state.cpl() != 0 {
        return Err(Exception::GP.into());
    }
    if core.state.cr0 & cr0::TS != 0 {
        return Err(Exception::NM.into());
    }
    let asked = core.state.gpr[reg::RAX] & u64::from(u32::MAX) | core.state.gpr[reg::RDX] << 32;
    let components = asked & core.state.xcr0 & 7;
    // The header and legacy region always; AVX state only where it is asked for.
    let len = if save { area_size(components) as usize } else { 576 };
    let linear = core.memory_operand(i, len, save)?;
    if linear & 63 != 0 {
        return Err(Exception::GP.into());
    }
    if save {
        store(core, linear, len, components, compact)
    } else {
        load(core, linear, components, supervisor)
    }
}

fn store(core: &mut Core, linear: u64, len: usize, components: u64, compact: bool) -> Result<(), Trap> {
    let privilege = core.privilege();
    core.probe(linear, len, Access::Write, privilege)?;
    let mut area = Area([0; AREA]);
    core.read(linear, &mut area.0[..len], privilege)?;
    let before = Area(area.0);
    native::save_area(core, &mut area, components, compact);
    if !core.state.code64() {
        // XMM8-15 and their upper halves are out of reach of other modes.
        area.0[288..416].copy_from_slice(&before.0[288..416]);
        area.0[704..832].copy_from_slice(&before.0[704..832]);
    }
    if components & 1 != 0 {
        // FIP and FDP would be the addresses of our stubs.
        area.0[8..24].fill(0);
    }
    core.write(linear, &area.0[..len], privilege)
}

fn load(core: &mut Core, linear: u64, components: u64, supervisor: bool) -> Result<(), Trap> {
    let privilege = core.privilege();
    let mut area = Area([0; AREA]);
    core.read(linear, &mut area.0[..576], privilege)?;
    let (present, format) = (area.quad(512), area.quad(520));
    let reserved = area.0[528..576].iter().any(|&byte| byte != 0);
    let compact = format & COMPACT != 0;
    let valid = if compact {
        format & !COMPACT & !core.state.xcr0 == 0 && present & !format == 0 && !reserved
    } else {
        !supervisor
            && present & !core.state.xcr0 == 0
            && format == 0
            && area.0[528..536].iter().all(|&b| b == 0)
    };
    if !valid {
        return Err(Exception::GP.into());
    }
    if components & present & 4 != 0 {
        core.read(linear, &mut area.0, privilege)?;
    }
    let vectors = core.state.ymm;
    if !native::load_area(core, &area, components) {
        return Err(Exception::GP.into());
    }
    if !core.state.code64() {
        core.state.ymm.0[8..].copy_from_slice(&vectors.0[8..]);
    }
    Ok(())
}
