//! Numbers of the block device (5.2).

use device::block::Outcome;

/// Device ID (5).
pub const TYPE: u16 = 2;

/// The most data segments of a request are known (5.2.3).
pub const F_SEG_MAX: u64 = 1 << 2;
/// Writes fail.
pub const F_RO: u64 = 1 << 5;
/// The logical block size is known.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// There is a cache, and a request that flushes it.
pub const F_FLUSH: u64 = 1 << 9;
/// The driver can switch the cache.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// There are several queues.
pub const F_MQ: u64 = 1 << 12;
/// There is a discard request.
pub const F_DISCARD: u64 = 1 << 13;
/// There is a request that writes zeroes.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of a request's header: type, reserved, sector.
pub const HEADER_LEN: usize = 16;
/// Where the driver switches the cache, in the configuration space (5.2.4).
pub const WRITEBACK: u64 = 32;
/// Bytes of a range of a discard or write-zeroes request.
pub const RANGE_LEN: usize = 16;
/// Bytes of the name that a get-id request asks for (5.2.6).
pub const ID_LEN: usize = 20;
/// Bytes of a sector, whatever the block size.
pub const SECTOR: u64 = 512;

/// Request types (5.2.6).
pub mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Flag of a write-zeroes range: it may be deallocated.
pub const RANGE_UNMAP: u32 = 1;

/// The byte that ends a request (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<Outcome> for Status {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Ok,
            Outcome::IoError | Outcome::NoSpace | Outcome::BadAddress => Self::IoError,
            Outcome::Unsupported => Self::Unsupported,
        }
    }
}
