//! Messages of the vhost-user protocol (QEMU's `docs/interop/vhost-user.rst`, the protocol's specification), as bytes.

use super::memory::RegionAbout;
use crate::wire::array;

/// Bytes of a header: request, flags, size of the body.
pub const HEADER_LEN: usize = 12;
/// The longest body that is read: a table of all regions.
pub const BODY_MAX: usize = 4096;
/// The most files with one message.
pub const FILES_MAX: usize = 32;

/// Requests of the front end.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Bits of a header's flags.
pub mod flag {
    pub const VERSION: u32 = 1;
    pub const VERSION_MASK: u32 = 3;
    pub const REPLY: u32 = 4;
    pub const NEED_REPLY: u32 = 8;
}

/// Bits of protocol features.
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const MTU: u64 = 1 << 4;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// The bit of virtio's features that says that protocol features are spoken.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// In the number of a ring: no file comes with it.
pub const NO_FILE: u64 = 1 << 8;

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What is asked.
    pub request: u32,
    /// See [`flag`].
    pub flags: u32,
    /// Bytes of the body.
    pub size: u32,
}

impl Header {
    /// From bytes.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Self {
        let word = |at| u32::from_ne_bytes(array(&bytes, at).unwrap_or_default());
        Self { request: word(0), flags: word(4), size: word(8) }
    }

    /// To bytes.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let words = [self.request, self.flags, self.size];
        bytes
            .iter_mut()
            .zip(words.iter().flat_map(|word| word.to_ne_bytes()))
            .for_each(|(to, from)| *to = from);
        bytes
    }
}

/// Reads a body's numbers in order; beyond the end there is nothing.
#[derive(Debug, Clone, Copy)]
pub struct Body<'a>(pub &'a [u8]);

impl Body<'_> {
    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        let (first, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*first))
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        let (first, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*first))
    }

    /// The description of a region.
    pub fn region(&mut self) -> Option<RegionAbout> {
        Some(RegionAbout { guest: self.u64()?, len: self.u64()?, user: self.u64()?, offset: self.u64()? })
    }
}

/// The addresses of a ring's parts in the front end's own address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddresses {
    /// Number of the ring.
    pub index: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
}

impl VringAddresses {
    /// From a body.
    pub fn decode(mut body: Body<'_>) -> Option<Self> {
        let (index, _flags) = (body.u32()?, body.u32()?);
        let (descriptors, used, available, _log) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
        Some(Self { index, descriptors, used, available })
    }

    /// To a body.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.index.to_ne_bytes().to_vec();
        body.extend([0; 4]);
        for address in [self.descriptors, self.used, self.available, 0] {
            body.extend(address.to_ne_bytes());
        }
        body
    }
}
