//! Exceptions as data, and what stops an instruction.

use crate::mmu::PageFault;
use cpu::{Error, Exit};

/// Exception vectors (Intel SDM 3, table 7-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// An exception of the guest, not yet delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Vector, see [`vector`].
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error: Option<u32>,
    /// The faulting address (#PF), or the DR6 bits to set (#DB).
    pub detail: u64,
}

impl Exception {
    /// Invalid opcode.
    pub const UD: Self = Self::plain(vector::UD);
    /// Device not available.
    pub const NM: Self = Self::plain(vector::NM);
    /// Divide error.
    pub const DE: Self = Self::plain(vector::DE);
    /// General protection with error code 0.
    pub const GP: Self = Self::coded(vector::GP, 0);
    /// Stack fault with error code 0.
    pub const SS: Self = Self::coded(vector::SS, 0);

    /// One without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, detail: 0 }
    }

    /// One with an error code.
    pub const fn coded(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), detail: 0 }
    }

    /// #GP for a selector.
    pub const fn gp(selector: u16) -> Self {
        Self::coded(vector::GP, selector as u32 & 0xfffc)
    }

    /// #TS for a selector.
    pub const fn ts(selector: u16) -> Self {
        Self::coded(vector::TS, selector as u32 & 0xfffc)
    }

    /// #NP for a selector.
    pub const fn np(selector: u16) -> Self {
        Self::coded(vector::NP, selector as u32 & 0xfffc)
    }

    /// #SS for a selector.
    pub const fn ss(selector: u16) -> Self {
        Self::coded(vector::SS, selector as u32 & 0xfffc)
    }

    /// #DB with the DR6 bits that tell why.
    pub const fn debug(dr6: u64) -> Self {
        Self { vector: vector::DB, error: None, detail: dr6 }
    }

    /// #AC, always with error code 0.
    pub const AC: Self = Self::coded(vector::AC, 0);

    /// Contributory exceptions make a double fault of a contributory one before them (Intel SDM 3, table 7-5).
    pub fn contributory(&self) -> bool {
        matches!(self.vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
    }
}

impl From<PageFault> for Exception {
    fn from(fault: PageFault) -> Self {
        Self { vector: vector::PF, error: Some(fault.code), detail: fault.address }
    }
}

/// What keeps an instruction from completing.
#[derive(Debug)]
pub enum Trap {
    /// The guest's exception; the instruction has had no effect.
    Exception(Exception),
    /// The machine must act first; the instruction runs again afterwards.
    Exit(Exit),
    /// The engine cannot go on.
    Fail(Error),
}

impl From<Exception> for Trap {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

impl From<PageFault> for Trap {
    fn from(fault: PageFault) -> Self {
        Self::Exception(fault.into())
    }
}

/// How [`crate::step::step`] and the delivery of events end.
#[derive(Debug)]
pub enum Stop {
    /// Go on at the state's RIP.
    Continue,
    /// Tell the machine.
    Exit(Exit),
    /// The engine cannot go on.
    Fail(Error),
}
