//! Where the headers of a frame are.

use super::{array, be16, ether, protocol};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The most VLAN tags that are looked through.
const TAGS_MAX: usize = 2;
/// The most extension headers of IPv6 that are looked through.
const EXTENSIONS_MAX: usize = 8;

/// A packet's place in a frame, and what is in it. All ranges are inside the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers {
    /// Byte at which the IP header begins.
    pub network: usize,
    /// Byte at which what the IP packet carries begins.
    pub transport: usize,
    /// Byte after the packet's last: what follows is padding of the frame.
    pub end: usize,
    /// What the packet carries.
    pub protocol: u8,
    /// It is a part of a larger packet.
    pub fragment: bool,
    /// Who sends it.
    pub source: IpAddr,
    /// Who shall have it.
    pub destination: IpAddr,
    /// Hops that are left.
    pub hops: u8,
}

/// What tells one flow from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Who sends.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// What the packets carry (IANA's numbers).
    pub protocol: u8,
    /// From which port to which, if there are some: parts of packets have none.
    pub ports: Option<(u16, u16)>,
}

/// A frame's flow, if it carries IP.
pub fn flow(frame: &[u8]) -> Option<Flow> {
    let layers = parse(frame, false)?;
    let has_ports = matches!(layers.protocol, protocol::TCP | protocol::UDP) && !layers.fragment;
    let at = layers.transport;
    let ports = be16(frame, at).zip(be16(frame, at.saturating_add(2))).filter(|_| has_ports);
    let Layers { source, destination, protocol, .. } = layers;
    Some(Flow { source, destination, protocol, ports })
}

/// A number that is the same for all frames of a flow, in both directions; 0 for frames without IP.
pub fn flow_hash(frame: &[u8]) -> u32 {
    parse(frame, false).map_or(0, |layers| layers.flow_hash(frame))
}

/// The EtherType of a frame behind its VLAN tags, and where what it names begins.
pub fn ether_type(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = ether::LEN;
    let mut kind = be16(frame, 12)?;
    for _ in 0..TAGS_MAX {
        if kind != ether::VLAN && kind != ether::QINQ {
            break;
        }
        kind = be16(frame, at.saturating_add(2))?;
        at = at.saturating_add(ether::TAG);
    }
    Some((kind, at))
}

/// Finds the headers of a frame that carries IP; `None` for others and for broken ones. With `whole` a packet whose
/// length field disagrees with the frame is broken; without, the frame is the packet's length (large segments may be
/// longer than the field can say).
pub fn parse(frame: &[u8], whole: bool) -> Option<Layers> {
    parse_start(frame, frame.len(), whole)
}

/// The same for a frame of `frame_len` bytes of which only the first are at hand.
pub fn parse_start(frame: &[u8], frame_len: usize, whole: bool) -> Option<Layers> {
    let (kind, network) = ether_type(frame)?;
    let packet = frame.get(network..)?;
    let has = frame_len.checked_sub(network)?;
    match kind {
        ether::IPV4 => ipv4(packet, has, network, whole),
        ether::IPV6 => ipv6(packet, has, network, whole),
        _ => None,
    }
}

fn end_of(has: usize, network: usize, len: usize, least: usize, whole: bool) -> Option<usize> {
    let fits = len >= least && len <= has;
    let len = if fits { len } else { (!whole).then_some(has)? };
    network.checked_add(len)
}

fn ipv4(packet: &[u8], has: usize, network: usize, whole: bool) -> Option<Layers> {
    let first = *packet.first()?;
    let header = usize::from(first & 15).saturating_mul(4);
    if first >> 4 != 4 || header < 20 || header > packet.len() {
        return None;
    }
    Some(Layers {
        network,
        transport: network.saturating_add(header),
        end: end_of(has, network, be16(packet, 2)?.into(), header, whole)?,
        protocol: *packet.get(9)?,
        fragment: be16(packet, 6)? & 0x3fff != 0,
        source: IpAddr::V4(Ipv4Addr::from(array::<4>(packet, 12)?)),
        destination: IpAddr::V4(Ipv4Addr::from(array::<4>(packet, 16)?)),
        hops: *packet.get(8)?,
    })
}

fn ipv6(packet: &[u8], has: usize, network: usize, whole: bool) -> Option<Layers> {
    if *packet.first()? >> 4 != 6 {
        return None;
    }
    let len = usize::from(be16(packet, 4)?).saturating_add(40);
    let mut next = *packet.get(6)?;
    let mut at = 40usize;
    let mut fragment = false;
    for _ in 0..EXTENSIONS_MAX {
        let size = match next {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => {
                usize::from(*packet.get(at.saturating_add(1))?).saturating_add(1).saturating_mul(8)
            }
            // What follows the header of a part is known only when all parts are there.
            protocol::FRAGMENT => {
                fragment = true;
                break;
            }
            _ => break,
        };
        next = *packet.get(at)?;
        at = at.saturating_add(size);
    }
    let end = end_of(has, network, len, at, whole)?;
    let transport = network.checked_add(at).filter(|&at| at <= end)?;
    Some(Layers {
        network,
        transport,
        end,
        protocol: next,
        fragment,
        source: IpAddr::V6(Ipv6Addr::from(array::<16>(packet, 8)?)),
        destination: IpAddr::V6(Ipv6Addr::from(array::<16>(packet, 24)?)),
        hops: *packet.get(7)?,
    })
}

impl Layers {
    /// The length of the transport header, if it is TCP's or UDP's and whole.
    pub fn transport_header(&self, frame: &[u8]) -> Option<usize> {
        let body = frame.get(self.transport..self.end.min(frame.len()))?;
        let len = match self.protocol {
            protocol::TCP => usize::from(body.get(12)? >> 4).saturating_mul(4),
            protocol::UDP => 8,
            _ => return None,
        };
        let least = if self.protocol == protocol::TCP { 20 } else { 8 };
        (len >= least && len <= body.len()).then_some(len)
    }

    /// Where in the transport header the checksum is.
    pub fn checksum_offset(&self) -> Option<usize> {
        match self.protocol {
            protocol::TCP => Some(16),
            protocol::UDP => Some(6),
            protocol::ICMPV6 => Some(2),
            _ => None,
        }
    }

    /// A number that is the same for all frames of a flow, in both directions.
    pub fn flow_hash(&self, frame: &[u8]) -> u32 {
        let address = |address: IpAddr| match address {
            IpAddr::V4(v4) => u32::from(v4),
            IpAddr::V6(v6) => {
                let bits = u128::from(v6);
                (bits ^ (bits >> 32) ^ (bits >> 64) ^ (bits >> 96)) as u32
            }
        };
        let ports = match self.protocol {
            protocol::TCP | protocol::UDP if !self.fragment => {
                let at = self.transport;
                be16(frame, at).unwrap_or(0) ^ be16(frame, at.saturating_add(2)).unwrap_or(0)
            }
            _ => 0,
        };
        let mixed = address(self.source) ^ address(self.destination) ^ u32::from(ports);
        // A multiplication spreads neighbouring addresses and ports (Knuth's constant).
        mixed.wrapping_mul(0x9e37_79b1) >> 16
    }
}
