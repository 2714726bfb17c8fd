//! vhost-user, both sides: rings and buffers of a guest that another process serves, over a Unix socket.
//!
//! ```text
//!  front end (has the guest)             back end (has the frames)
//!  [Frontend] ---- socket: messages ---- [Backend]
//!      \---- memory of the guest, rings, mapped by both ----/
//!      \---- kick: chains are there; call: chains came back ----/
//! ```
//!
//! The back end believes nothing of what it is sent or finds in the memory. The front end trusts its back end with the guest's
//! memory, but not with its own: an answer that makes no sense ends the connection.

mod backend;
mod channel;
mod frontend;
mod memory;
pub(crate) mod message;
mod quota;
mod ring;

pub use backend::{Backend, Change, Queue};
pub(crate) use channel::Channel;
pub use channel::Error;
pub use frontend::{DriverRing, Frontend, GuestRegion};
pub use memory::{Memory, Span};
pub use ring::{Error as RingError, Ring, Segment};

/// Feature bits of virtio that matter here (5.1.3, 6).
pub mod feature {
    /// The device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames whose checksum is not complete,
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The device tells the MTU.
    pub const MTU: u64 = 1 << 3;
    /// and large segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// See above.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// See above.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes large segments.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// See above.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// See above.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A frame may lie in several receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device tells whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There may be several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The driver wants to be asked to announce itself.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Descriptors may be in a table elsewhere.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are asked for by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Rings are packed.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Chains come back in the order in which they went.
    pub const IN_ORDER: u64 = 1 << 35;
    /// The driver takes large datagrams to be cut.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// See above.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes large datagrams.
    pub const HOST_USO: u64 = 1 << 56;
    /// The driver changes at run time what it takes.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// What a card offers only if its back end does it.
    pub const OF_BACK_ENDS: u64 = CSUM
        | GUEST_CSUM
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | GUEST_USO4
        | GUEST_USO6
        | HOST_USO;
}
