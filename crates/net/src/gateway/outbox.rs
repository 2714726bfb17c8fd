//! Frames to the guest, as they are made.

use super::config::GATEWAY_MAC;
use super::tcp::header::Header;
use crate::batch::Batch;
use crate::offload::{Checksum, Offload, SegmentKind, Segments};
use crate::wire::checksum::Sum;
use crate::wire::{ether, protocol, put};
use std::net::{IpAddr, SocketAddr};

/// Frames and bytes that wait for the guest at most.
const FRAMES_MAX: usize = 256;
const BYTES_MAX: usize = 512 << 10;
/// Hops that packets to the guest have left.
const HOPS: u8 = 64;
/// Bytes of an IPv6 fragment header.
const FRAGMENT_LEN: usize = 8;

/// Who a packet to the guest is from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The guest's card.
    pub mac: [u8; 6],
    /// Where it comes from, as the guest sees it.
    pub from: IpAddr,
    /// The guest.
    pub to: IpAddr,
}

impl Ends {
    /// Bytes of the Ethernet and IP headers.
    pub fn headers(&self) -> usize {
        if self.to.is_ipv4() { 34 } else { 54 }
    }
}

/// The headers in front of a packet's payload.
struct Prefix {
    bytes: [u8; 62],
    len: usize,
}

impl Prefix {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// A part of a packet.
#[derive(Clone, Copy)]
struct Fragment {
    id: u32,
    offset: usize,
    more: bool,
}

/// What waits for the guest.
#[derive(Debug)]
pub struct Outbox {
    pub batch: Batch,
    mtu: usize,
    id: u32,
    scratch: Vec<u8>,
}

impl Outbox {
    pub fn new(mtu: u16) -> Self {
        Self { batch: Batch::new(FRAMES_MAX, BYTES_MAX), mtu: mtu.into(), id: 0, scratch: Vec::new() }
    }

    /// Whether another packet finds room.
    pub fn has_room(&self) -> bool {
        self.batch.has_room()
    }

    fn prefix(ends: &Ends, kind: u8, len: usize, fragment: Option<Fragment>) -> Prefix {
        let mut prefix = Prefix { bytes: [0; 62], len: ends.headers() };
        let bytes = &mut prefix.bytes;
        put(bytes, 0, &ends.mac);
        put(bytes, 6, &GATEWAY_MAC);
        let word = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_be_bytes();
        match (ends.from, ends.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                put(bytes, 12, &ether::IPV4.to_be_bytes());
                put(bytes, 14, &[0x45, 0]);
                put(bytes, 16, &word(len.saturating_add(20)));
                let (id, place) = match fragment {
                    None => (0, 0x4000),
                    Some(part) => (part.id, (part.offset / 8) | (usize::from(part.more) << 13)),
                };
                put(bytes, 18, &(id as u16).to_be_bytes());
                put(bytes, 20, &word(place));
                put(bytes, 22, &[HOPS, kind]);
                put(bytes, 26, &from.octets());
                put(bytes, 30, &to.octets());
                let sum = Sum::default().add(bytes.get(14..34).unwrap_or_default()).checksum();
                put(bytes, 24, &sum.to_be_bytes());
            }
            (from, to) => {
                put(bytes, 12, &ether::IPV6.to_be_bytes());
                put(bytes, 14, &[0x60]);
                let more = if fragment.is_some() { FRAGMENT_LEN } else { 0 };
                put(bytes, 18, &word(len.saturating_add(more)));
                // Neighbour discovery is believed only from neighbours (RFC 4861, 6.1).
                let hops = if kind == protocol::ICMPV6 { 255 } else { HOPS };
                let next = if fragment.is_some() { protocol::FRAGMENT } else { kind };
                put(bytes, 20, &[next, hops]);
                let octets = |address| match address {
                    IpAddr::V6(v6) => v6.octets(),
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                };
                put(bytes, 22, &octets(from));
                put(bytes, 38, &octets(to));
                if let Some(part) = fragment {
                    put(bytes, 54, &[kind, 0]);
                    put(bytes, 56, &word(part.offset | usize::from(part.more)));
                    put(bytes, 58, &part.id.to_be_bytes());
                    prefix.len = prefix.len.saturating_add(FRAGMENT_LEN);
                }
            }
        }
        prefix
    }

    /// A frame that carries no IP.
    pub fn frame(&mut self, to: [u8; 6], kind: u16, payload: &[u8]) {
        self.batch.push(Offload::default(), &[&to, &GATEWAY_MAC, &kind.to_be_bytes(), payload]);
    }

    /// A datagram, in fragments if it is longer than the link allows. Lost if there is no room.
    pub fn datagram(&mut self, ends: &Ends, ports: (u16, u16), payload: &[u8]) {
        let len = payload.len().saturating_add(8);
        let mut header = [0; 8];
        put(&mut header, 0, &ports.0.to_be_bytes());
        put(&mut header, 2, &ports.1.to_be_bytes());
        put(&mut header, 4, &u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
        let sum = Sum::default().pseudo(ends.from, ends.to, protocol::UDP, len).add(&header).add(payload);
        let sum = if sum.checksum() == 0 { 0xffff } else { sum.checksum() };
        put(&mut header, 6, &sum.to_be_bytes());
        self.packet(ends, protocol::UDP, &header, payload);
    }

    /// An ICMP message, whose checksum is made here (bytes 2 and 3). Lost if there is no room.
    pub fn icmp(&mut self, ends: &Ends, message: &mut [u8]) {
        put(message, 2, &[0, 0]);
        let (kind, sum) = if ends.to.is_ipv4() {
            (protocol::ICMP, Sum::default())
        } else {
            let sum = Sum::default().pseudo(ends.from, ends.to, protocol::ICMPV6, message.len());
            (protocol::ICMPV6, sum)
        };
        let sum = sum.add(message).checksum();
        put(message, 2, &sum.to_be_bytes());
        self.packet(ends, kind, message, &[]);
    }

    /// A packet of any kind whose checksum is right, in parts if need be.
    pub fn whole(&mut self, ends: &Ends, kind: u8, body: &[u8]) {
        self.packet(ends, kind, body, &[]);
    }

    fn packet(&mut self, ends: &Ends, kind: u8, header: &[u8], payload: &[u8]) {
        let len = header.len().saturating_add(payload.len());
        let ip = ends.headers().saturating_sub(ether::LEN);
        if len.saturating_add(ip) <= self.mtu {
            let prefix = Self::prefix(ends, kind, len, None);
            self.batch.push(Offload::default(), &[prefix.bytes(), header, payload]);
            return;
        }
        let more = if ends.to.is_ipv4() { 0 } else { FRAGMENT_LEN };
        let room = self.mtu.saturating_sub(ip.saturating_add(more)) & !7;
        self.id = self.id.wrapping_add(1);
        self.scratch.clear();
        self.scratch.extend_from_slice(header);
        self.scratch.extend_from_slice(payload);
        let mut offset = 0usize;
        for part in self.scratch.chunks(room.max(8)) {
            let end = offset.saturating_add(part.len());
            let fragment = Fragment { id: self.id, offset, more: end < len };
            let prefix = Self::prefix(ends, kind, part.len(), Some(fragment));
            self.batch.push(Offload::default(), &[prefix.bytes(), part]);
            offset = end;
        }
    }

    /// Room for the payload of a packet behind `header` bytes of transport header.
    pub fn room(&mut self, ends: &Ends, header: usize, len: usize) -> Option<&mut [u8]> {
        if !self.batch.has_room() {
            return None;
        }
        let before = ends.headers().saturating_add(header);
        self.batch.room(before.saturating_add(len)).get_mut(before..)
    }

    /// Sends a TCP segment whose payload is in the first `len` bytes of the room.
    pub fn tcp(&mut self, ends: &Ends, ports: (u16, u16), header: Header, len: usize, mss: u16) -> bool {
        if !self.batch.has_room() {
            return false;
        }
        let transport = header.len().saturating_add(len);
        let prefix = Self::prefix(ends, protocol::TCP, transport, None);
        let pseudo = Sum::default().pseudo(ends.from, ends.to, protocol::TCP, transport).folded();
        let total = prefix.len.saturating_add(transport);
        let room = self.batch.room(total);
        put(room, 0, prefix.bytes());
        header.write(ports, pseudo, room.get_mut(prefix.len..).unwrap_or_default());
        let headers = prefix.len.saturating_add(header.len());
        let kind = if ends.to.is_ipv4() { SegmentKind::Tcp4 } else { SegmentKind::Tcp6 };
        let offload = large(kind, prefix.len, 16, headers, mss, len);
        self.batch.commit(offload, total);
        true
    }

    /// Sends datagrams of `size` bytes each (the last may be shorter) that are the first `len` bytes of the room.
    pub fn datagrams(&mut self, ends: &Ends, ports: (u16, u16), len: usize, size: usize) {
        let transport = len.saturating_add(8);
        let limit = self.mtu.saturating_sub(ends.headers().saturating_sub(ether::LEN).saturating_add(8));
        if size > limit {
            let payload = self.room(ends, 8, len).map(|room| room.to_vec()).unwrap_or_default();
            payload.chunks(size).for_each(|part| self.datagram(ends, ports, part));
            return;
        }
        let prefix = Self::prefix(ends, protocol::UDP, transport, None);
        let pseudo = Sum::default().pseudo(ends.from, ends.to, protocol::UDP, transport).folded();
        let total = prefix.len.saturating_add(transport);
        let room = self.batch.room(total);
        put(room, 0, prefix.bytes());
        let [from, to] = [ports.0.to_be_bytes(), ports.1.to_be_bytes()];
        put(room, prefix.len, &from);
        put(room, prefix.len.saturating_add(2), &to);
        let length = u16::try_from(transport).unwrap_or(u16::MAX).to_be_bytes();
        put(room, prefix.len.saturating_add(4), &length);
        put(room, prefix.len.saturating_add(6), &pseudo.to_be_bytes());
        let kind = if ends.to.is_ipv4() { SegmentKind::Udp4 } else { SegmentKind::Udp6 };
        let size = u16::try_from(size).unwrap_or(u16::MAX);
        let offload = large(kind, prefix.len, 6, prefix.len.saturating_add(8), size, len);
        self.batch.commit(offload, total);
    }

    /// An error about a packet of the guest's: its IP header and the first bytes behind it follow.
    pub fn unreachable(&mut self, ends: &Ends, why: Unreachable, packet: &[u8]) {
        let v4 = ends.to.is_ipv4();
        let (kind, code) = match (why, v4) {
            (Unreachable::Port, true) => (3, 3),
            (Unreachable::Port, false) => (1, 4),
            (Unreachable::Host, true) => (3, 1),
            (Unreachable::Host, false) => (1, 3),
            (Unreachable::Prohibited, true) => (3, 13),
            (Unreachable::Prohibited, false) => (1, 1),
            (Unreachable::Hops, true) => (11, 0),
            (Unreachable::Hops, false) => (3, 0),
        };
        // RFC 1812, 4.3.2.3 and RFC 4443, 3.1: as much as fits into the least packet that everybody takes.
        let most = if v4 { 548 } else { 1232 };
        let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
        message.extend(packet.iter().take(most));
        self.icmp(ends, &mut message);
    }
}

/// Why a packet went nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    Port,
    Host,
    Prohibited,
    Hops,
}

fn large(kind: SegmentKind, start: usize, offset: u16, headers: usize, size: u16, len: usize) -> Offload {
    let word = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
    let segments = Segments { kind, size, ecn: false, headers: word(headers) };
    Offload {
        checksum: Checksum::Partial { start: word(start), offset },
        segments: (len > usize::from(size)).then_some(segments),
    }
}

/// The start of the packet that a datagram was, for errors about it that come later.
pub fn original(guest: SocketAddr, other: SocketAddr, len: usize) -> Vec<u8> {
    let ends = Ends { mac: [0; 6], from: guest.ip(), to: other.ip() };
    let transport = len.saturating_add(8);
    let prefix = Outbox::prefix(&ends, protocol::UDP, transport, None);
    let mut packet = prefix.bytes().get(ether::LEN..).unwrap_or_default().to_vec();
    packet.extend(guest.port().to_be_bytes());
    packet.extend(other.port().to_be_bytes());
    packet.extend(u16::try_from(transport).unwrap_or(u16::MAX).to_be_bytes());
    packet.extend([0, 0]);
    packet
}
