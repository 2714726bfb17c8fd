//! Control and debug registers, and what acts on translations (Intel SDM 3, 2.5 and 4.10).

use super::feature;
use crate::cpu_core::{Core, attention};
use crate::debug::{DR6_BD, DR6_FIXED, DR7_GD};
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::mmu::Mmu;
use cpu::{attr, cr0, cr4, efer};
use iced_x86::{CpuidFeature, OpKind, Register};

/// CR0 bits that exist.
const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

fn require_cpl0(core: &Core) -> Result<(), Trap> {
    if core.state.cpl() == 0 { Ok(()) } else { Err(Exception::GP.into()) }
}

/// MOV to or from a control register.
pub(crate) fn mov_cr(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let (to, from) = (i.op0_register(), i.op1_register());
    if from.is_cr() {
        if !matches!(from, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8) {
            return Err(Exception::UD.into());
        }
        require_cpl0(core)?;
        let value = match from {
            Register::CR0 => core.state.cr0,
            Register::CR2 => core.state.cr2,
            Register::CR3 => core.state.cr3,
            Register::CR4 => core.state.cr4,
            _ => core.state.cr8,
        };
        core.set_gpr(to, value);
        return Ok(());
    }
    let value = core.gpr(from);
    if !matches!(to, Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8) {
        return Err(Exception::UD.into());
    }
    require_cpl0(core)?;
    match to {
        Register::CR0 => core.set_cr0(value),
        Register::CR2 => {
            core.state.cr2 = value;
            Ok(())
        }
        Register::CR3 => core.set_cr3(value),
        Register::CR4 => core.set_cr4(value),
        _ if value >> 4 != 0 => Err(Exception::GP.into()),
        _ => {
            if std::mem::replace(&mut core.state.cr8, value) != value {
                // The machine's local APIC has to know before the next instruction.
                core.state.doorbell.ring(crate::peers::kick::LEAVE);
            }
            core.state.attention |= attention::MODE;
            Ok(())
        }
    }
}

impl Core {
    /// The CR4 bits that the CPU model has.
    pub(crate) fn cr4_known(&self) -> u64 {
        let leaf1 = self.cpuid.query(1, 0);
        let leaf7 = self.cpuid.query(7, 0);
        let mut known = 0;
        for (value, bit, flag) in [
            (leaf1.edx, 1, cr4::VME | cr4::PVI),
            (leaf1.edx, 4, cr4::TSD),
            (leaf1.edx, 2, cr4::DE),
            (leaf1.edx, 3, cr4::PSE),
            (leaf1.edx, 6, cr4::PAE),
            (leaf1.edx, 7, cr4::MCE),
            (leaf1.edx, 13, cr4::PGE),
            (leaf1.edx, 24, cr4::OSFXSR),
            (leaf1.edx, 25, cr4::OSXMMEXCPT),
            (leaf1.ecx, 17, cr4::PCIDE),
            (leaf1.ecx, 26, cr4::OSXSAVE),
            (leaf7.ebx, 0, cr4::FSGSBASE),
            (leaf7.ebx, 7, cr4::SMEP),
            (leaf7.ebx, 20, cr4::SMAP),
            (leaf7.ecx, 2, cr4::UMIP),
        ] {
            if value >> bit & 1 != 0 {
                known |= flag;
            }
        }
        known | cr4::PCE
    }

    pub(crate) fn set_cr0(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.state.cr0;
        let has = |bit: u64| value & bit != 0;
        if value >> 32 != 0 || has(cr0::PG) && !has(cr0::PE) || has(cr0::NW) && !has(cr0::CD) {
            return Err(Exception::GP.into());
        }
        let value = value & CR0_KNOWN | cr0::ET;
        let long_code = self.state.segments[crate::state::seg::CS].attr & attr::L != 0;
        let mut efer = self.state.efer;
        if value & !old & cr0::PG != 0 && efer & efer::LME != 0 {
            if !self.state.cr4_has(cr4::PAE)
                || long_code
                || self.state.tr.attr & 0xf <= 3 && self.state.tr.selector != 0
            {
                return Err(Exception::GP.into());
            }
            efer |= efer::LMA;
        }
        if old & !value & cr0::PG != 0 {
            if self.state.code64() || self.state.cr4_has(cr4::PCIDE) {
                return Err(Exception::GP.into());
            }
            efer &= !efer::LMA;
        }
        self.state.cr0 = value;
        self.state.efer = efer;
        if (old ^ value) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.mmu.flush_all(&mut self.state);
        }
        self.state.attention |= attention::MODE;
        Ok(())
    }

    pub(crate) fn set_cr3(&mut self, value: u64) -> Result<(), Trap> {
        let pcid = self.state.cr4_has(cr4::PCIDE);
        let mut value = value;
        let mut keep = false;
        if pcid && value >> 63 != 0 {
            value &= !(1 << 63);
            keep = true;
        }
        if self.state.long_mode() {
            if value >> self.mmu.physical_bits != 0 {
                return Err(Exception::GP.into());
            }
        } else {
            value &= u64::from(u32::MAX);
        }
        self.state.cr3 = value;
        let number = if pcid { value & 0xfff } else { 0 };
        self.mmu.load(&mut self.state, number as u16, keep);
        Ok(())
    }

    pub(crate) fn set_cr4(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.state.cr4;
        if value & !self.cr4_known() != 0 {
            return Err(Exception::GP.into());
        }
        let gained = value & !old;
        if self.state.long_mode() && value & cr4::PAE == 0 {
            return Err(Exception::GP.into());
        }
        if gained & cr4::PCIDE != 0 && (!self.state.long_mode() || self.state.cr3 & 0xfff != 0) {
            return Err(Exception::GP.into());
        }
        self.state.cr4 = value;
        let paging = cr4::PGE | cr4::PAE | cr4::PSE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
        if (old ^ value) & paging != 0 {
            self.mmu.flush_all(&mut self.state);
        }
        self.state.attention |= attention::MODE;
        Ok(())
    }
}

/// CLTS.
pub(crate) fn clts(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    require_cpl0(core)?;
    core.state.cr0 &= !cr0::TS;
    core.state.attention |= attention::MODE;
    Ok(())
}

/// LMSW: sets PE, MP, EM and TS, but cannot clear PE.
pub(crate) fn lmsw(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    require_cpl0(core)?;
    let value = core.operand(&d.instruction, 0)?;
    let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let old = core.state.cr0;
    core.set_cr0(old & !(low & !cr0::PE) | value & low)
}

fn umip(core: &Core) -> Result<(), Trap> {
    if core.state.cr4_has(cr4::UMIP) && core.state.cpl() != 0 { Err(Exception::GP.into()) } else { Ok(()) }
}

/// SMSW, SLDT, STR.
pub(crate) fn store_system(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    use iced_x86::Mnemonic;
    let i = &d.instruction;
    let value = match i.mnemonic() {
        Mnemonic::Smsw => core.state.cr0,
        other => {
            if !core.protected() {
                return Err(Exception::UD.into());
            }
            let register = if other == Mnemonic::Sldt { core.state.ldtr } else { core.state.tr };
            u64::from(register.selector)
        }
    };
    umip(core)?;
    if i.op0_kind() == OpKind::Register {
        core.set_gpr(i.op0_register(), value);
        return Ok(());
    }
    let linear = core.memory_operand(i, 2, true)?;
    core.write_uint(linear, value, 2, core.privilege())
}

/// LLDT and LTR.
pub(crate) fn load_system(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !core.protected() {
        return Err(Exception::UD.into());
    }
    require_cpl0(core)?;
    let i = &d.instruction;
    let selector = match i.op0_kind() {
        OpKind::Register => core.gpr(i.op0_register()) as u16,
        _ => {
            let linear = core.memory_operand(i, 2, false)?;
            core.read_uint(linear, 2, core.privilege())? as u16
        }
    };
    if i.mnemonic() == iced_x86::Mnemonic::Lldt { core.load_ldtr(selector) } else { core.load_tr(selector) }
}

/// LGDT and LIDT.
pub(crate) fn load_table(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    require_cpl0(core)?;
    let i = &d.instruction;
    let size = if core.code_bits() == 64 { 8 } else { 4 };
    let linear = core.memory_operand(i, size + 2, false)?;
    let mut bytes = [0; 10];
    core.read(linear, &mut bytes[..size + 2], core.privilege())?;
    let mut base = [0; 8];
    base[..size].copy_from_slice(&bytes[2..size + 2]);
    let mut base = u64::from_le_bytes(base);
    if size == 8 && !Mmu::canonical(base) {
        return Err(Exception::GP.into());
    }
    if matches!(i.code(), iced_x86::Code::Lgdt_m1632_16 | iced_x86::Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    let table = cpu::DescriptorTable { base, limit: u16::from_le_bytes([bytes[0], bytes[1]]) };
    if i.mnemonic() == iced_x86::Mnemonic::Lgdt {
        core.state.gdtr = table;
    } else {
        core.state.idtr = table;
    }
    Ok(())
}

/// SGDT and SIDT.
pub(crate) fn store_table(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    umip(core)?;
    let i = &d.instruction;
    let size = if core.code_bits() == 64 { 8 } else { 4 };
    let table = if i.mnemonic() == iced_x86::Mnemonic::Sgdt { core.state.gdtr } else { core.state.idtr };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let linear = core.memory_operand(i, size + 2, true)?;
    core.write(linear, &bytes[..size + 2], core.privilege())
}

/// MOV to or from a debug register.
pub(crate) fn mov_dr(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let i = &d.instruction;
    let (to, from) = (i.op0_register(), i.op1_register());
    let (register, load) = if from.is_dr() { (from, false) } else { (to, true) };
    let mut number = (register as u32).wrapping_sub(Register::DR0 as u32);
    require_cpl0(core)?;
    if number == 4 || number == 5 {
        if core.state.cr4_has(cr4::DE) {
            return Err(Exception::UD.into());
        }
        number += 2;
    }
    if number > 7 {
        return Err(Exception::UD.into());
    }
    if core.state.dr7 & DR7_GD != 0 {
        return Err(Exception::debug(DR6_BD).into());
    }
    if !load {
        let value = match number {
            6 => core.state.dr6,
            7 => core.state.dr7,
            n => core.state.dr[n as usize & 3],
        };
        core.set_gpr(to, value);
        return Ok(());
    }
    let value = core.gpr(from);
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::GP.into());
    }
    match number {
        6 => core.state.dr6 = value & 0xe00f | DR6_FIXED | value & 0x1_0000,
        7 => core.state.dr7 = value & 0xffff_2bff | 0x400,
        n => core.state.dr[n as usize & 3] = value,
    }
    core.state.attention |= attention::MODE;
    Ok(())
}

/// INVLPG.
pub(crate) fn invlpg(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    require_cpl0(core)?;
    let i = &d.instruction;
    let segment = super::operand::segment_index(i.memory_segment());
    let offset = core.effective(i);
    let linear = if core.state.code64() {
        crate::mmu::linear64(&core.state, segment, offset)
    } else {
        core.state.segments[segment].base.wrapping_add(offset) & u64::from(u32::MAX)
    };
    // Of a non-canonical address: nothing.
    core.mmu.invalidate_page(&mut core.state, linear);
    Ok(())
}

/// INVPCID.
pub(crate) fn invpcid(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !feature::supported(CpuidFeature::INVPCID, &core.cpuid) {
        return Err(Exception::UD.into());
    }
    require_cpl0(core)?;
    let i = &d.instruction;
    let kind = core.gpr(i.op0_register());
    let linear = core.memory_operand(i, 16, false)?;
    let mut bytes = [0; 16];
    core.read(linear, &mut bytes, core.privilege())?;
    let both = u128::from_le_bytes(bytes);
    let (pcid, address) = (both as u64, (both >> 64) as u64);
    let pcids = core.state.cr4_has(cr4::PCIDE);
    if kind > 3 || pcid >> 12 != 0 || kind < 2 && !pcids && pcid != 0 {
        return Err(Exception::GP.into());
    }
    match kind {
        0 if !Mmu::canonical(address) => return Err(Exception::GP.into()),
        // A page is forgotten in all address spaces.
        0 => core.mmu.invalidate_page(&mut core.state, address),
        1 if pcids => core.mmu.flush_pcid(&mut core.state, pcid as u16),
        2 => core.mmu.flush_all(&mut core.state),
        _ => core.mmu.flush_non_global(&mut core.state),
    }
    Ok(())
}

/// HLT.
pub(crate) fn hlt(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    require_cpl0(core)?;
    core.state.halted = true;
    Ok(())
}

/// INVD, WBINVD and WBNOINVD: guest RAM is coherent.
pub(crate) fn cache(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    require_cpl0(core)
}

/// SERIALIZE.
pub(crate) fn serialize(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    if !feature::supported(CpuidFeature::SERIALIZE, &core.cpuid) {
        return Err(Exception::UD.into());
    }
    core.state.attention |= attention::MODE;
    Ok(())
}

/// VMCALL and VMMCALL, in KVM's convention: other levels than 0 get -EPERM.
pub(crate) fn hypercall(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    use crate::state::reg;
    if core.state.cpl() != 0 {
        core.state.gpr[reg::RAX] = (-libc::EPERM) as i64 as u64;
        return Ok(());
    }
    let narrow = if core.state.code64() { u64::MAX } else { u64::from(u32::MAX) };
    let get = |n: usize| core.state.gpr[n] & narrow;
    let args = [get(reg::RBX), get(reg::RCX), get(reg::RDX), get(reg::RSI)];
    let number = get(reg::RAX);
    let result = core.io.hypercall(number, args)?;
    core.state.gpr[reg::RAX] = result & narrow;
    Ok(())
}

/// SWAPGS.
pub(crate) fn swapgs(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    if !core.state.code64() {
        return Err(Exception::UD.into());
    }
    require_cpl0(core)?;
    let state = &mut *core.state;
    std::mem::swap(&mut state.segments[crate::state::seg::GS].base, &mut state.msrs.kernel_gs_base);
    Ok(())
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
pub(crate) fn segment_base(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    use crate::state::seg;
    use iced_x86::Mnemonic;
    let i = &d.instruction;
    if !core.state.code64() || !core.state.cr4_has(cr4::FSGSBASE) {
        return Err(Exception::UD.into());
    }
    let (segment, load) = match i.mnemonic() {
        Mnemonic::Rdfsbase => (seg::FS, false),
        Mnemonic::Rdgsbase => (seg::GS, false),
        Mnemonic::Wrfsbase => (seg::FS, true),
        _ => (seg::GS, true),
    };
    if !load {
        let base = core.state.segments[segment].base;
        core.set_gpr(i.op0_register(), base);
        return Ok(());
    }
    let base = core.gpr(i.op0_register());
    if !Mmu::canonical(base) {
        return Err(Exception::GP.into());
    }
    core.state.segments[segment].base = base;
    Ok(())
}
