//! Debug registers, breakpoints and single-stepping (Intel SDM 3, chapter 18).

use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};

/// DR6: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// DR6: debug-register access while DR7.GD.
pub(crate) const DR6_BD: u64 = 1 << 13;
/// DR7: general detect.
pub(crate) const DR7_GD: u64 = 1 << 13;
/// Bits of DR6 that read as one.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;

impl Core {
    /// A #DB is being delivered: DR6 says why, and further accesses to debug registers are allowed.
    pub(crate) fn note_debug(&mut self, bits: u64) {
        self.state.dr6 |= bits;
        self.state.dr7 &= !DR7_GD;
    }

    fn breakpoint(&self, n: usize) -> Option<(u64, u64, u64)> {
        let dr7 = self.state.dr7;
        if dr7 >> (2 * n) & 3 == 0 {
            return None;
        }
        let field = dr7 >> (16 + 4 * n);
        let len = match field >> 2 & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        Some((field & 3, self.state.dr[n] & !(len - 1), len))
    }

    /// Whether any breakpoint is enabled.
    pub fn breakpoints_enabled(&self) -> bool {
        self.state.dr7 & 0xff != 0
    }

    /// An instruction breakpoint at `linear` is a fault before it.
    pub(crate) fn check_instruction_breakpoints(&self, linear: u64) -> Result<(), Trap> {
        let mut hit = 0;
        for n in 0..4 {
            if let Some((EXECUTE, _, _)) = self.breakpoint(n)
                && self.state.dr[n] == linear
            {
                hit |= 1 << n;
            }
        }
        if hit != 0 { Err(Exception::debug(hit).into()) } else { Ok(()) }
    }

    /// Data breakpoints are traps: noted here, delivered after the instruction.
    pub(crate) fn check_data_breakpoints(&mut self, linear: u64, len: usize, write: bool) {
        if !self.breakpoints_enabled() {
            return;
        }
        for n in 0..4 {
            let Some((kind, start, extent)) = self.breakpoint(n) else { continue };
            if kind == EXECUTE || kind == PORT || kind == WRITE && !write {
                continue;
            }
            let apart = linear.wrapping_sub(start);
            if apart < extent || start.wrapping_sub(linear) < len as u64 {
                self.pending.debug |= 1 << n;
            }
        }
    }

    /// I/O breakpoints, with CR4.DE.
    pub(crate) fn check_port_breakpoints(&mut self, port: u64, len: usize) {
        if !self.breakpoints_enabled() || !self.state.cr4_has(cpu::cr4::DE) {
            return;
        }
        for n in 0..4 {
            if let Some((PORT, start, extent)) = self.breakpoint(n)
                && (port.wrapping_sub(start) < extent || start.wrapping_sub(port) < len as u64)
            {
                self.pending.debug |= 1 << n;
            }
        }
    }
}
