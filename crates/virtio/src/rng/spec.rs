//! Numbers of the entropy device (5.4).

/// Device ID (5).
pub const TYPE: u16 = 4;
/// The one queue.
pub const REQUESTS: u16 = 0;
