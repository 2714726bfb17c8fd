//! Fragments of the guest's datagrams, put together again (RFC 791, 3.2; RFC 8200, 4.5).

use crate::wire::layers::Layers;
use crate::wire::{be16, be32, ether, put};
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Packets that are put together at a time: half of what a frame may have, each.
const PACKETS_MAX: usize = 16;
/// How long parts are waited for (RFC 8200, 4.5).
const PATIENCE: Duration = Duration::from_secs(30);
const PAYLOAD_MAX: usize = 65_535;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    id: u32,
}

#[derive(Debug)]
struct Packet {
    begun: Instant,
    payload: Vec<u8>,
    /// Ranges of the payload that are there, in order, not touching.
    have: Vec<(usize, usize)>,
    len: Option<usize>,
}

/// Packets of which parts are missing.
#[derive(Debug, Default)]
pub struct Reassembly(HashMap<Key, Packet>);

/// Where a fragment belongs: its packet, offset, whether more follow, and where in the frame its bytes begin.
fn place(layers: &Layers, frame: &[u8]) -> Option<(Key, usize, bool, usize)> {
    let key = |protocol, id| Key { source: layers.source, destination: layers.destination, protocol, id };
    if layers.source.is_ipv4() {
        let word = be16(frame, layers.network.checked_add(6)?)?;
        let id = be16(frame, layers.network.checked_add(4)?)?;
        let offset = usize::from(word & 0x1fff).saturating_mul(8);
        return Some((key(layers.protocol, id.into()), offset, word & 0x2000 != 0, layers.transport));
    }
    let next = *frame.get(layers.transport)?;
    let word = be16(frame, layers.transport.checked_add(2)?)?;
    let id = be32(frame, layers.transport.checked_add(4)?)?;
    Some((key(next, id), usize::from(word & 0xfff8), word & 1 != 0, layers.transport.checked_add(8)?))
}

impl Reassembly {
    /// Takes a fragment; answers the frame of the whole packet when it was the last that missed.
    pub fn take(&mut self, layers: &Layers, frame: &[u8], now: Instant) -> Option<Vec<u8>> {
        let (key, offset, more, at) = place(layers, frame)?;
        let bytes = frame.get(at..layers.end)?;
        let end = offset.checked_add(bytes.len()).filter(|&end| end <= PAYLOAD_MAX)?;
        if more && (bytes.is_empty() || bytes.len() % 8 != 0) {
            return None;
        }
        self.0.retain(|_, packet| now.saturating_duration_since(packet.begun) < PATIENCE);
        if self.0.len() >= PACKETS_MAX && !self.0.contains_key(&key) {
            let oldest = self.0.iter().min_by_key(|(_, packet)| packet.begun).map(|(key, _)| *key);
            oldest.and_then(|oldest| self.0.remove(&oldest));
        }
        let fresh = || Packet { begun: now, payload: Vec::new(), have: Vec::new(), len: None };
        let packet = self.0.entry(key).or_insert_with(fresh);
        let done = packet.add(offset, end, more, bytes);
        match done {
            Some(false) => None,
            Some(true) => {
                let packet = self.0.remove(&key)?;
                Some(whole(layers, frame, &key, &packet.payload))
            }
            // RFC 5722: fragments that overlap are nobody's honest work.
            None => {
                self.0.remove(&key);
                None
            }
        }
    }
}

impl Packet {
    /// Adds a part; answers whether the packet is whole, `None` if the part contradicts others.
    fn add(&mut self, offset: usize, end: usize, more: bool, bytes: &[u8]) -> Option<bool> {
        if self.have.contains(&(offset, end)) {
            // The same part again.
            return Some(false);
        }
        if self.have.iter().any(|&(from, to)| offset < to && from < end) {
            return None;
        }
        if !more && self.len.replace(end).is_some_and(|len| len != end) {
            return None;
        }
        self.have.push((offset, end));
        self.payload.resize(self.payload.len().max(end), 0);
        put(&mut self.payload, offset, bytes);
        let sum =
            self.have.iter().fold(0usize, |sum, (from, to)| sum.saturating_add(to.saturating_sub(*from)));
        let Some(len) = self.len else { return Some(false) };
        if self.payload.len() > len { None } else { Some(sum == len) }
    }
}

/// The frame that would have come in one piece: Ethernet, the IP header without options, the payload.
fn whole(layers: &Layers, frame: &[u8], key: &Key, payload: &[u8]) -> Vec<u8> {
    let v4 = layers.source.is_ipv4();
    let ip = if v4 { 20 } else { 40 };
    let mut bytes = frame.get(..12).unwrap_or_default().to_vec();
    bytes.extend(if v4 { ether::IPV4 } else { ether::IPV6 }.to_be_bytes());
    let header = frame.get(layers.network..).unwrap_or_default();
    bytes.extend(header.iter().take(ip));
    if v4 {
        let len = u16::try_from(payload.len().saturating_add(20)).unwrap_or(u16::MAX);
        put(&mut bytes, 14, &[0x45]);
        put(&mut bytes, 16, &len.to_be_bytes());
        put(&mut bytes, 20, &[0, 0]);
    } else {
        let len = u16::try_from(payload.len()).unwrap_or(u16::MAX);
        put(&mut bytes, 18, &len.to_be_bytes());
        put(&mut bytes, 20, &[key.protocol]);
    }
    bytes.extend_from_slice(payload);
    bytes
}
