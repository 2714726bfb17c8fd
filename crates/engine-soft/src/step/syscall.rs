//! Fast system calls: SYSCALL, SYSRET, SYSENTER, SYSEXIT (AMD APM 2, 6.1; Intel SDM 2).

use crate::cpu_core::{Core, attention};
use crate::exception::{Exception, Trap};
use crate::fetch::Decoded;
use crate::mmu::Mmu;
use crate::state::{reg, seg};
use cpu::{Segment, attr, efer, rflags};
use iced_x86::Code;

fn flat(selector: u16, bits: u16, dpl: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attr: bits | dpl << attr::DPL_SHIFT }
}

fn enabled(core: &Core) -> bool {
    core.state.efer & efer::SCE != 0
}

/// SYSCALL.
pub(crate) fn syscall(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    let long = core.state.long_mode();
    // Intel has it in 64-bit mode only.
    if !enabled(core) || !core.protected() || !core.amd() && !core.state.code64() {
        return Err(Exception::UD.into());
    }
    let selector = (core.state.msrs.star >> 32) as u16;
    let back = d.instruction.next_ip();
    if long {
        let from64 = core.state.code64();
        core.state.gpr[reg::RCX] = back;
        // RF is clear in what R11 keeps.
        core.state.gpr[11] = core.state.rflags & !rflags::RF;
        core.state.rip = if from64 { core.state.msrs.lstar } else { core.state.msrs.cstar };
        let mask = core.state.msrs.sfmask;
        core.state.rflags = core.state.rflags & !mask & !rflags::RF | rflags::FIXED;
        core.state.segments[seg::CS] = flat(selector & !3, attr::CODE64, 0);
    } else {
        core.set_gpr_sized(reg::RCX, back, 4);
        core.state.rip = core.state.msrs.star & u64::from(u32::MAX);
        core.state.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        core.state.segments[seg::CS] = flat(selector & !3, attr::CODE32, 0);
    }
    core.state.segments[seg::SS] = flat((selector & !3).wrapping_add(8), attr::DATA, 0);
    core.state.attention |= attention::MODE;
    core.before.late = true;
    Ok(())
}

/// SYSRET.
pub(crate) fn sysret(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if !enabled(core) || !core.protected() || !core.amd() && !core.state.code64() {
        return Err(Exception::UD.into());
    }
    if core.state.cpl() != 0 {
        return Err(Exception::GP.into());
    }
    let wide = d.instruction.code() == Code::Sysretq;
    let rcx = core.state.gpr[reg::RCX];
    // Intel refuses a non-canonical target while still at CPL 0; AMD lets the fetch at CPL 3 fault.
    if wide && !core.amd() && !Mmu::canonical(rcx) {
        return Err(Exception::GP.into());
    }
    let selector = (core.state.msrs.star >> 48) as u16;
    let long = core.state.long_mode();
    if long {
        const KEPT: u64 = 0x003c_7fd7;
        core.state.rflags = core.state.gpr[11] & KEPT | rflags::FIXED;
    } else {
        core.state.rflags |= rflags::IF;
    }
    if wide {
        core.state.segments[seg::CS] = flat(selector.wrapping_add(16) | 3, attr::CODE64, 3);
        core.state.rip = rcx;
    } else {
        core.state.segments[seg::CS] = flat(selector | 3, attr::CODE32, 3);
        core.state.rip = rcx & u64::from(u32::MAX);
    }
    let stack = selector.wrapping_add(8) | 3;
    core.state.segments[seg::SS] = if core.amd() {
        // AMD changes only the selector and the level of SS; its other attributes stay.
        let old = core.state.segments[seg::SS];
        Segment { selector: stack, attr: old.attr | 3 << attr::DPL_SHIFT, ..old }
    } else {
        flat(stack, attr::DATA, 3)
    };
    core.state.attention |= attention::MODE;
    core.before.late = true;
    Ok(())
}

/// SYSENTER.
pub(crate) fn sysenter(core: &mut Core, _: &Decoded) -> Result<(), Trap> {
    // AMD has it in legacy mode only.
    if core.amd() && core.state.long_mode() {
        return Err(Exception::UD.into());
    }
    let selector = core.state.msrs.sysenter_cs as u16;
    if !core.protected() && core.state.cr0 & cpu::cr0::PE == 0 || selector & !3 == 0 {
        return Err(Exception::GP.into());
    }
    let long = core.state.long_mode();
    let code = if long { attr::CODE64 } else { attr::CODE32 };
    core.state.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    core.state.segments[seg::CS] = flat(selector & !3, code, 0);
    core.state.segments[seg::SS] = flat((selector & !3).wrapping_add(8), attr::DATA, 0);
    let narrow = if long { u64::MAX } else { u64::from(u32::MAX) };
    core.state.gpr[reg::RSP] = core.state.msrs.sysenter_esp & narrow;
    core.state.rip = core.state.msrs.sysenter_eip & narrow;
    core.state.attention |= attention::MODE;
    Ok(())
}

/// SYSEXIT.
pub(crate) fn sysexit(core: &mut Core, d: &Decoded) -> Result<(), Trap> {
    if core.amd() && core.state.long_mode() {
        return Err(Exception::UD.into());
    }
    let selector = core.state.msrs.sysenter_cs as u16;
    if !core.protected() || core.state.cpl() != 0 || selector & !3 == 0 {
        return Err(Exception::GP.into());
    }
    let (rcx, rdx) = (core.state.gpr[reg::RCX], core.state.gpr[reg::RDX]);
    let wide = d.instruction.code() == Code::Sysexitq;
    if wide && (!Mmu::canonical(rcx) || !Mmu::canonical(rdx)) {
        return Err(Exception::GP.into());
    }
    let (first, code) = if wide { (32, attr::CODE64) } else { (16, attr::CODE32) };
    let base = selector & !3;
    core.state.segments[seg::CS] = flat(base.wrapping_add(first) | 3, code, 3);
    core.state.segments[seg::SS] = flat(base.wrapping_add(first + 8) | 3, attr::DATA, 3);
    let narrow = if wide { u64::MAX } else { u64::from(u32::MAX) };
    core.state.gpr[reg::RSP] = rcx & narrow;
    core.state.rip = rdx & narrow;
    core.state.attention |= attention::MODE;
    Ok(())
}
