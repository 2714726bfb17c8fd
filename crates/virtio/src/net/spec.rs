//! Numbers of the network card (5.1).

/// Device ID (5).
pub const TYPE: u16 = 1;

/// Feature bits (5.1.3).
pub mod feature {
    /// The device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames whose checksum is not complete.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver changes at run time what it takes.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device says the MTU.
    pub const MTU: u64 = 1 << 3;
    /// The device says the address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes large segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes large segments.
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    /// A frame may lie in several receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device says whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue,
    pub const CTRL_VQ: u64 = 1 << 17;
    /// which sets receive modes,
    pub const CTRL_RX: u64 = 1 << 18;
    /// filters VLANs,
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// sets more receive modes,
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// hears that the guest has announced itself,
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// sets the number of queue pairs,
    pub const MQ: u64 = 1 << 22;
    /// and sets the address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// The driver takes large UDP datagrams to be cut.
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes large UDP datagrams to be cut.
    pub const HOST_USO: u64 = 1 << 56;

    /// The driver says by which hash frames are spread over its queues.
    pub const RSS: u64 = 1 << 60;

    /// What [`CTRL_GUEST_OFFLOADS`] changes (5.1.6.5.6).
    pub const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
}

/// Bytes of `struct virtio_net_hdr` in front of each frame (5.1.6), which ends with the number of buffers.
pub const HEADER_LEN: usize = 12;
/// Where the number of buffers is.
pub const NUM_BUFFERS: usize = 10;

/// Bits of the status field (5.1.4).
pub mod status {
    pub const LINK_UP: u16 = 1;
    pub const ANNOUNCE: u16 = 2;
}

/// Classes and commands of the control queue (5.1.6.5).
pub mod control {
    pub const RX: u8 = 0;
    pub const RX_PROMISC: u8 = 0;
    pub const RX_ALLMULTI: u8 = 1;
    pub const RX_ALLUNI: u8 = 2;
    pub const RX_NOMULTI: u8 = 3;
    pub const RX_NOUNI: u8 = 4;
    pub const RX_NOBCAST: u8 = 5;
    pub const MAC: u8 = 1;
    pub const MAC_TABLE_SET: u8 = 0;
    pub const MAC_ADDR_SET: u8 = 1;
    pub const VLAN: u8 = 2;
    pub const VLAN_ADD: u8 = 0;
    pub const VLAN_DEL: u8 = 1;
    pub const ANNOUNCE: u8 = 3;
    pub const ANNOUNCE_ACK: u8 = 0;
    pub const MQ: u8 = 4;
    pub const MQ_VQ_PAIRS_SET: u8 = 0;
    pub const MQ_RSS_CONFIG: u8 = 1;
    pub const GUEST_OFFLOADS: u8 = 5;
    pub const GUEST_OFFLOADS_SET: u8 = 0;
    /// Answers.
    pub const OK: u8 = 0;
    pub const ERR: u8 = 1;
}
