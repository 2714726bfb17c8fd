//! Receive-side scaling (5.1.6.5.7): the driver says by a hash of which addresses, and by which table, flows go to queues.

use serde_json::{Value, json};
use std::net::IpAddr;

/// Bytes of the longest key: what the longest hashed addresses and ports need (36), and what everybody uses.
pub const KEY_MAX: usize = 40;
/// The longest table.
pub const TABLE_MAX: u16 = 128;

/// What can be hashed (5.1.6.4.3.1).
pub mod hash {
    pub const IPV4: u32 = 1 << 0;
    pub const TCPV4: u32 = 1 << 1;
    pub const UDPV4: u32 = 1 << 2;
    pub const IPV6: u32 = 1 << 3;
    pub const TCPV6: u32 = 1 << 4;
    pub const UDPV6: u32 = 1 << 5;
    /// All of them.
    pub const SUPPORTED: u32 = IPV4 | TCPV4 | UDPV4 | IPV6 | TCPV6 | UDPV6;
}

const TCP: u8 = 6;
const UDP: u8 = 17;

/// How the driver wants flows to be spread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rss {
    types: u32,
    /// Queue pairs by the last bits of the hash; as many as a power of two.
    table: Vec<u16>,
    /// For frames without a hash.
    unclassified: u16,
    /// Queue pairs that are used at all.
    pub pairs: u16,
    key: [u8; KEY_MAX],
}

impl Rss {
    /// Reads `struct virtio_net_rss_config` for a card with `pairs` queue pairs; `None`: it cannot be.
    pub fn parse(about: &[u8], pairs: u16) -> Option<Self> {
        let (types, rest) = about.split_first_chunk::<4>()?;
        let types = u32::from_le_bytes(*types);
        let (mask, rest) = word(rest)?;
        let (unclassified, mut rest) = word(rest)?;
        let len = mask.checked_add(1).filter(|len| len.is_power_of_two() && *len <= TABLE_MAX)?;
        let mut table = Vec::with_capacity(len.into());
        for _ in 0..len {
            let (pair, after) = word(rest)?;
            table.push(pair);
            rest = after;
        }
        let (sending, rest) = word(rest)?;
        let (&key_len, key_bytes) = rest.split_first()?;
        let key_bytes = key_bytes.get(..key_len.into())?;
        let mut key = [0; KEY_MAX];
        key.get_mut(..key_bytes.len())?.copy_from_slice(key_bytes);
        let highest = table.iter().copied().chain([unclassified]).max()?;
        let used = highest.checked_add(1)?.max(sending);
        let sound = types & !hash::SUPPORTED == 0 && sending > 0 && used <= pairs;
        sound.then_some(Self { types, table, unclassified, pairs: used, key })
    }

    /// The queue pair of a frame.
    pub fn steer(&self, frame: &[u8]) -> u16 {
        let Some(hash) = self.hash(frame) else { return self.unclassified };
        let mask = self.table.len().wrapping_sub(1);
        self.table.get(hash as usize & mask).copied().unwrap_or(self.unclassified)
    }

    /// The hash of what of a frame the driver wants hashed, the most telling of it first.
    fn hash(&self, frame: &[u8]) -> Option<u32> {
        let flow = net::flow(frame)?;
        let (ip, tcp, udp) = match flow.source {
            IpAddr::V4(_) => (hash::IPV4, hash::TCPV4, hash::UDPV4),
            IpAddr::V6(_) => (hash::IPV6, hash::TCPV6, hash::UDPV6),
        };
        let with_ports = match flow.protocol {
            TCP => self.types & tcp != 0,
            UDP => self.types & udp != 0,
            _ => false,
        };
        let ports = flow.ports.filter(|_| with_ports);
        if ports.is_none() && self.types & ip == 0 {
            return None;
        }
        let mut input = Vec::with_capacity(36);
        for address in [flow.source, flow.destination] {
            match address {
                IpAddr::V4(v4) => input.extend(v4.octets()),
                IpAddr::V6(v6) => input.extend(v6.octets()),
            }
        }
        if let Some((from, to)) = ports {
            input.extend(from.to_be_bytes());
            input.extend(to.to_be_bytes());
        }
        Some(toeplitz(&self.key, &input))
    }

    /// For people.
    pub fn inspect(&self) -> Value {
        json!({ "hash_types": format!("{:#x}", self.types), "table": self.table.len(),
            "unclassified": self.unclassified })
    }
}

fn word(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (word, rest) = bytes.split_first_chunk::<2>()?;
    Some((u16::from_le_bytes(*word), rest))
}

/// The Toeplitz hash: for each bit of the input that is set, the 32 bits of the key that begin at its place.
fn toeplitz(key: &[u8; KEY_MAX], input: &[u8]) -> u32 {
    let (first, rest) = key.split_first_chunk::<4>().unwrap_or((&[0; 4], &[]));
    let mut window = u32::from_be_bytes(*first);
    let mut hash = 0;
    for (number, byte) in input.iter().enumerate() {
        let next = rest.get(number).copied().unwrap_or(0);
        for bit in (0..8).rev() {
            if byte >> bit & 1 != 0 {
                hash ^= window;
            }
            window = window << 1 | u32::from(next >> bit & 1);
        }
    }
    hash
}

#[cfg(test)]
mod test {
    use super::*;

    /// The key and the flows by which makers of cards check theirs.
    const KEY: [u8; KEY_MAX] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
        0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
        0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn frame(from: &str, to: &str, protocol: u8, ports: (u16, u16)) -> Vec<u8> {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut frame = vec![2; 12];
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]);
                frame.extend([from.octets(), to.octets()].concat());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
                frame.extend([from.octets(), to.octets()].concat());
            }
            _ => panic!(),
        }
        frame.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
        frame.resize(frame.len() + 16, 0);
        frame
    }

    fn command(types: u32, table: &[u16], unclassified: u16, sending: u16, key: &[u8]) -> Vec<u8> {
        let mut bytes = types.to_le_bytes().to_vec();
        for word in [table.len() as u16 - 1, unclassified].iter().chain(table).chain(&[sending]) {
            bytes.extend(word.to_le_bytes());
        }
        bytes.push(key.len() as u8);
        bytes.extend(key);
        bytes
    }

    #[test]
    fn hashes_are_those_of_other_peoples_cards() {
        let rss = |types| Rss::parse(&command(types, &[0], 0, 1, &KEY), 1).unwrap();
        let v4 = ("66.9.149.187", "161.142.100.80", (2794, 1766), 0x323e_8fc2u32, 0x51cc_c178u32);
        let other = ("199.92.111.2", "65.69.140.83", (14230, 4739), 0xd718_262a, 0xc626_b0ea);
        let v6 = ("3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", (2794, 1766), 0x2cc1_8cd5, 0x4020_7d3d);
        for (from, to, ports, plain, with_ports) in [v4, other, v6] {
            let tcp = frame(from, to, TCP, ports);
            assert_eq!(rss(hash::SUPPORTED).hash(&tcp), Some(with_ports));
            assert_eq!(rss(hash::IPV4 | hash::IPV6).hash(&tcp), Some(plain));
            assert_eq!(rss(hash::UDPV4 | hash::UDPV6).hash(&tcp), None);
            let udp = frame(from, to, UDP, ports);
            assert_eq!(rss(hash::UDPV4 | hash::UDPV6).hash(&udp), Some(with_ports));
            assert_eq!(rss(hash::TCPV4 | hash::IPV4 | hash::TCPV6 | hash::IPV6).hash(&udp), Some(plain));
        }
        let mut part = frame("66.9.149.187", "161.142.100.80", TCP, (2794, 1766));
        part[20] = 0x20;
        assert_eq!(rss(hash::SUPPORTED).hash(&part), Some(0x323e_8fc2), "parts of packets have no ports");
        assert_eq!(rss(hash::SUPPORTED).hash(&[0xff; 60]), None);
    }

    #[test]
    fn the_table_says_which_queue() {
        let rss = Rss::parse(&command(hash::SUPPORTED, &[3, 1, 0, 2], 2, 4, &KEY), 4).unwrap();
        // The last bits of 51ccc178 and c626b0ea are 0 and 2.
        assert_eq!(rss.steer(&frame("66.9.149.187", "161.142.100.80", TCP, (2794, 1766))), 3);
        assert_eq!(rss.steer(&frame("199.92.111.2", "65.69.140.83", TCP, (14230, 4739))), 0);
        assert_eq!((rss.steer(&[0xff; 60]), rss.pairs), (2, 4));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let parse = |bytes: &[u8]| Rss::parse(bytes, 4);
        let good = command(hash::SUPPORTED, &[0, 1, 2, 3], 0, 2, &KEY);
        assert!(parse(&good).is_some());
        (0..good.len()).for_each(|cut| assert_eq!(parse(&good[..cut]), None, "{cut} bytes"));
        let key = [KEY.as_slice(), &[0]].concat();
        let long: Vec<u16> = vec![0; 256];
        for bad in [
            command(1 << 6, &[0], 0, 1, &KEY),
            command(1, &[4], 0, 1, &KEY),
            command(1, &[0], 4, 1, &KEY),
            command(1, &[0], 0, 5, &KEY),
            command(1, &[0], 0, 0, &KEY),
            command(1, &[u16::MAX], 0, 1, &KEY),
            command(1, &[0, 0, 0], 0, 1, &KEY),
            command(1, &long, 0, 1, &KEY),
            command(1, &[0], 0, 1, &key),
        ] {
            assert_eq!(parse(&bad), None);
        }
        assert!(parse(&command(1, &[0], 0, 1, &[])).is_some(), "a key of nothing hashes to nothing");
    }
}
