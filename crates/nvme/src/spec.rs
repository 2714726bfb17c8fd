//! Registers, commands and status codes (NVM Express Base Specification 1.4), as data.
#![allow(missing_docs)]

/// Register offsets (section 3.1).
pub mod register {
    pub const CAP: u64 = 0x00;
    pub const VS: u64 = 0x08;
    pub const INTMS: u64 = 0x0c;
    pub const INTMC: u64 = 0x10;
    pub const CC: u64 = 0x14;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
    pub const DOORBELLS: u64 = 0x1000;
}

/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;
/// Entries per queue at most.
pub const QUEUE_ENTRIES_MAX: u16 = 1024;
/// Ready within 10 s (500 ms units), contiguous queues, NVM command set, 4 KiB pages.
pub const CAPABILITIES: u64 = (QUEUE_ENTRIES_MAX as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;

pub mod cc {
    pub const ENABLE: u32 = 1;
    pub const SHUTDOWN: u32 = 3 << 14;
}

pub mod csts {
    pub const READY: u32 = 1;
    pub const FATAL: u32 = 1 << 1;
    pub const SHUTDOWN_OCCURRING: u32 = 1 << 2;
    pub const SHUTDOWN_COMPLETE: u32 = 2 << 2;
    pub const SHUTDOWN: u32 = 3 << 2;
}

/// Admin opcodes (section 5).
pub mod admin {
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT: u8 = 0x0c;
}

/// NVM opcodes (section 6).
pub mod nvm {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// A completion's status: code in bits 0-7, type in 8-10, "do not retry" in 14 (section 4.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

const DO_NOT_RETRY: u16 = 1 << 14;
const COMMAND: u16 = 1 << 8;
const MEDIA: u16 = 2 << 8;

impl Status {
    pub const SUCCESS: Self = Self(0);
    pub const INVALID_OPCODE: Self = Self(0x01 | DO_NOT_RETRY);
    pub const INVALID_FIELD: Self = Self(0x02 | DO_NOT_RETRY);
    pub const DATA_TRANSFER: Self = Self(0x04);
    pub const ABORTED_QUEUE_DELETED: Self = Self(0x08);
    pub const INVALID_NAMESPACE: Self = Self(0x0b | DO_NOT_RETRY);
    pub const INVALID_PRP: Self = Self(0x13 | DO_NOT_RETRY);
    pub const WRITE_PROTECTED: Self = Self(0x20 | DO_NOT_RETRY);
    pub const LBA_OUT_OF_RANGE: Self = Self(0x80 | DO_NOT_RETRY);
    pub const CAPACITY_EXCEEDED: Self = Self(0x81);
    pub const INVALID_CQ: Self = Self(COMMAND | DO_NOT_RETRY);
    pub const INVALID_QUEUE: Self = Self(0x01 | COMMAND | DO_NOT_RETRY);
    pub const INVALID_QUEUE_SIZE: Self = Self(0x02 | COMMAND | DO_NOT_RETRY);
    pub const ASYNC_EVENT_LIMIT: Self = Self(0x05 | COMMAND | DO_NOT_RETRY);
    pub const INVALID_VECTOR: Self = Self(0x08 | COMMAND | DO_NOT_RETRY);
    pub const INVALID_LOG_PAGE: Self = Self(0x09 | COMMAND | DO_NOT_RETRY);
    pub const INVALID_QUEUE_DELETION: Self = Self(0x0c | COMMAND | DO_NOT_RETRY);
    pub const WRITE_FAULT: Self = Self(0x80 | MEDIA);
    pub const READ_ERROR: Self = Self(0x81 | MEDIA);
}

/// A submission queue entry: 64 bytes (section 4.2).
#[derive(Debug, Clone, Copy)]
pub struct Command(pub [u8; 64]);

impl Command {
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }
    pub fn id(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }
    pub fn namespace(&self) -> u32 {
        self.dword::<1>()
    }
    pub fn prp1(&self) -> u64 {
        u64::from(self.dword::<6>()) | u64::from(self.dword::<7>()) << 32
    }
    pub fn prp2(&self) -> u64 {
        u64::from(self.dword::<8>()) | u64::from(self.dword::<9>()) << 32
    }
    /// Flags of byte 1: fused operation, and SGLs instead of PRPs.
    pub fn unsupported_flags(&self) -> bool {
        self.0[1] & 0xc3 != 0
    }
    /// Command dword `N` (0-15).
    pub fn dword<const N: usize>(&self) -> u32 {
        const { assert!(N < 16) };
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(self.0.iter().skip(N.wrapping_mul(4))) {
            *to = *from;
        }
        u32::from_le_bytes(bytes)
    }
}
