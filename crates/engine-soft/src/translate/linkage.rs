//! The part of the CPU state that belongs to translated code: how it is entered, left, and finds its next block.

use crate::state::SPACES;

/// Entries of the jump cache.
pub const JUMP_ENTRIES: usize = 16384;

/// Direct jumps to other pages, of all translated code.
pub const BRIDGES: usize = 1 << 17;

/// Fields that translated code reaches through RSP.
#[derive(Debug)]
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
    /// RAX and RCX while the stub behind a hint looks into the TLB.
    pub kept: [u64; 2],
    /// The bytes of a read from two pages.
    pub gathered: [u8; 64],
    /// PEXT masks of what must be zero in an offset from a hint's page, by log2 of the alignment asked for.
    pub tag_masks: [u64; 7],
    /// PEXT mask of the jump cache's index.
    pub jump_mask: u64,
    /// Which translator's code the jump cache points to.
    pub owner: u64,
    /// The jump cache's keys, negated, so that adding the key gives zero without touching flags. A key is a linear
    /// address plus a random salt that changes whenever a translation may have ended: entries of the past, or of
    /// another privilege, match only by guessing 64 bits, and nothing needs to be cleared.
    pub jump_keys: [u64; JUMP_ENTRIES],
    /// Host addresses of the blocks' entries for jumps that leave the linear address in the address register.
    pub jump_hosts: [u64; JUMP_ENTRIES],
    /// Offset in the state of the user's bridges that are in force.
    pub user_bridges: u64,
    /// Where direct jumps to other pages lead: the host address of a block, or of the stub that looks for it. For the
    /// supervisor, and for the user by address space.
    pub bridges: [[u64; BRIDGES]; 1 + SPACES],
}

/// How translated code was left: fields of [`Linkage`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub reason: u32,
    pub payload: [u64; 3],
    pub page_base: u64,
}

impl Linkage {
    pub(super) fn left(&self) -> Left {
        Left { reason: self.reason, payload: self.payload, page_base: self.page_base }
    }

    /// Offset of an array of bridges.
    pub(crate) fn bridges_offset(array: usize) -> usize {
        std::mem::offset_of!(Self, bridges) + array * BRIDGES * 8
    }

    /// Sets up a linkage that is all zero.
    pub(crate) fn start(&mut self) {
        for (log, mask) in self.tag_masks.iter_mut().enumerate() {
            *mask = !0xfff | ((1 << log) - 1);
        }
        self.jump_mask = (JUMP_ENTRIES as u64 - 1) << 1;
    }
}
