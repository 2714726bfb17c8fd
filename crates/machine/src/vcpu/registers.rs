//! Model-specific registers that neither the engine nor the local APIC holds, and that kernels touch all the same.
//!
//! Everything not named here is #GP, as on a processor without it; kernels probe with that in mind.

use cpu::msr;

const IA32_PLATFORM_ID: u32 = 0x17;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MTRR_PHYSICAL_FIRST: u32 = 0x200;
const MTRR_PHYSICAL_LAST: u32 = 0x20f;
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const AMD_PERFORMANCE_FIRST: u32 = 0xc001_0000;
const AMD_PERFORMANCE_LAST: u32 = 0xc001_0007;
const AMD_SYSCFG: u32 = 0xc001_0010;
const AMD_HWCR: u32 = 0xc001_0015;
const AMD_NB_CFG: u32 = 0xc001_001f;
const AMD_INT_PENDING: u32 = 0xc001_0055;
const AMD_LS_CFG: u32 = 0xc001_1020;
const AMD_DC_CFG: u32 = 0xc001_1022;
const AMD_DE_CFG: u32 = 0xc001_1029;
const AMD_BU_CFG2: u32 = 0xc001_102a;

/// Memory type of everything: write-back, MTRRs enabled.
const MTRR_DEFAULT: u64 = 1 << 11 | 6;
/// LFENCE is serialising (AMD's DE_CFG).
const DE_CFG_LFENCE: u64 = 1 << 1;
/// The TSC counts at P0 frequency (AMD's HWCR).
const HWCR_TSC_FREQ: u64 = 1 << 24;
/// No microcode update is ever newer than this.
const UCODE: u64 = 0xffff_fff0 << 32 | 0xffff_fff0;

/// What a vCPU keeps of such registers.
#[derive(Debug, Clone)]
pub(super) struct Remaining {
    mtrr_default: u64,
    mtrr_fixed: [u64; 11],
    misc_enable: u64,
}

impl Default for Remaining {
    fn default() -> Self {
        Self { mtrr_default: MTRR_DEFAULT, mtrr_fixed: [0x0606_0606_0606_0606; 11], misc_enable: 1 }
    }
}

impl Remaining {
    /// Reads one; `None` is #GP.
    pub(super) fn read(&self, index: u32) -> Option<u64> {
        if let Some(at) = MTRR_FIXED.iter().position(|&fixed| fixed == index) {
            return self.mtrr_fixed.get(at).copied();
        }
        Some(match index {
            // Fixed ranges and write-combining, no variable ranges.
            msr::MTRR_CAP => 1 << 8 | 1 << 10,
            msr::MTRR_DEF_TYPE => self.mtrr_default,
            msr::MISC_ENABLE => self.misc_enable,
            msr::UCODE_REV => UCODE,
            AMD_DE_CFG => DE_CFG_LFENCE,
            AMD_HWCR => HWCR_TSC_FREQ,
            IA32_PLATFORM_ID | MCG_CAP | MCG_STATUS => 0,
            MTRR_PHYSICAL_FIRST..=MTRR_PHYSICAL_LAST => 0,
            AMD_PERFORMANCE_FIRST..=AMD_PERFORMANCE_LAST => 0,
            AMD_SYSCFG | AMD_NB_CFG | AMD_INT_PENDING | AMD_BU_CFG2 => 0,
            AMD_LS_CFG..=AMD_DC_CFG => 0,
            _ => return None,
        })
    }

    /// Writes one; `None` is #GP.
    pub(super) fn write(&mut self, index: u32, value: u64) -> Option<()> {
        if let Some(at) = MTRR_FIXED.iter().position(|&fixed| fixed == index) {
            *self.mtrr_fixed.get_mut(at)? = value;
            return Some(());
        }
        match index {
            // Memory is write-back whatever the guest says.
            msr::MTRR_DEF_TYPE => self.mtrr_default = value & 0xcff,
            msr::MISC_ENABLE => self.misc_enable = value,
            msr::UCODE_REV | MCG_STATUS | AMD_DE_CFG | AMD_HWCR | AMD_SYSCFG => {}
            AMD_PERFORMANCE_FIRST..=AMD_PERFORMANCE_LAST | AMD_NB_CFG | AMD_INT_PENDING | AMD_BU_CFG2 => {}
            AMD_LS_CFG..=AMD_DC_CFG => {}
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn known_registers_hold_and_unknown_ones_fault() {
        let mut registers = Remaining::default();
        assert_eq!(registers.read(msr::MTRR_DEF_TYPE), Some(0x806));
        assert_eq!(registers.write(0x250, 5), Some(()));
        assert_eq!(registers.read(0x250), Some(5));
        assert_eq!(registers.read(0xc001_1029), Some(2));
        assert_eq!(registers.read(0x1234), None);
        assert_eq!(registers.write(msr::MTRR_CAP, 0), None);
    }
}
