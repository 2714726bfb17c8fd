//! The part of the CPU state that belongs to translated code: how it is entered, left, and finds its next block.

/// Entries of the jump cache.
pub const JUMP_ENTRIES: usize = 16384;

/// One remembered indirect target.
///
/// The key is the target's linear address plus a random salt that changes whenever a translation may have ended, so
/// entries of the past, or of another privilege, match only by guessing 64 bits, and nothing needs to be cleared.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct JumpEntry {
    /// The key, negated, so that adding the key gives zero without touching flags.
    pub negative_key: u64,
    /// Host address of the block's entry for jumps that leave the key in the address register.
    pub host: u64,
}

/// Fields that translated code reaches through RSP.
#[derive(Debug, Clone)]
#[repr(C)]
pub struct Linkage {
    /// Linear address of the guest page whose code runs: translated code is position independent.
    pub page_base: u64,
    /// Host address at which translated code is entered.
    pub enter: u64,
    /// What translated code says when it leaves: the scratch registers R13, R14, R15. On entry R14 comes from here.
    pub payload: [u64; 3],
    /// Why it left.
    pub reason: u32,
    /// Status flags: OF in bit 0, LAHF's byte in bits 8-15.
    pub flags: u32,
    /// The same, saved over a memory check on hosts without BMI2.
    pub flags_saved: u32,
    /// Page offset of the last division started, for the signal handler.
    pub division: u32,
    /// An event waits for the guest to become interruptible: 1, else 0.
    pub waiting: u32,
    /// Flags that POPF may not set in translated code: TF, and IF while an event waits.
    pub popf_stop: u32,
    /// Where the signal handler sends a division that faults: the exit to the single-step tier.
    pub division_exit: u64,
    /// Temporaries of one instruction.
    pub slots: [u64; 4],
    /// PEXT mask of the TLB's index.
    pub index_mask: u64,
    /// PEXT masks of what must equal a TLB tag, by log2 of the alignment asked for.
    pub tag_masks: [u64; 6],
    /// PEXT mask of the jump cache's index.
    pub jump_mask: u64,
    /// Salts of the jump cache, by privilege class.
    pub salt: [u64; 2],
    /// The same, negated.
    pub unsalt: [u64; 2],
    /// Which translator's code the jump cache points to.
    pub owner: u64,
    /// The jump cache.
    pub jumps: [JumpEntry; JUMP_ENTRIES],
}

impl Default for Linkage {
    fn default() -> Self {
        let mut tag_masks = [0; 6];
        for (log, mask) in tag_masks.iter_mut().enumerate() {
            *mask = !0xfff | ((1 << log) - 1);
        }
        Self {
            page_base: 0,
            enter: 0,
            payload: [0; 3],
            reason: 0,
            flags: 0,
            flags_saved: 0,
            division: 0,
            waiting: 0,
            popf_stop: 0,
            division_exit: 0,
            slots: [0; 4],
            index_mask: (crate::state::TLB_ENTRIES as u64 - 1) << 12,
            tag_masks,
            jump_mask: (JUMP_ENTRIES as u64 - 1) << 1,
            salt: [0; 2],
            unsalt: [0; 2],
            owner: 0,
            jumps: [JumpEntry::default(); JUMP_ENTRIES],
        }
    }
}
