//! What a port that is not trusted must not say: that it has somebody else's address, that it is a router, or a DHCP server.
//!
//! Only what the first bytes of a frame show is looked at. Those bytes are delivered as they were looked at, whatever the sender does
//! to its memory meanwhile; a frame that hides what it is behind them is dropped (RFC 7113).

use super::reason::Reason;
use super::table::PortNumber;
use crate::offload::Checksum;
use crate::wire::{array, be16, ether, protocol};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Seconds after which an address that nobody claimed belongs to nobody.
const CLAIM_SECONDS: u32 = 300;
/// Claims of one port.
const CLAIMS_PER_PORT: usize = 256;
/// The most extension headers of IPv6 that are looked through.
const EXTENSIONS_MAX: usize = 8;

/// Ports of DHCP's servers and clients (RFC 2131, 4.1), and of DHCPv6's (RFC 8415, 7.2).
const DHCP: [u16; 2] = [67, 68];
const DHCP6: [u16; 2] = [547, 546];
const AUTHENTICATION: u8 = 51;

/// Types of ICMPv6 (RFC 4861, 4).
mod discovery {
    pub const ROUTER_SOLICITATION: u8 = 133;
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    pub const REDIRECT: u8 = 137;
    /// Options with the sender's, and the target's, link-layer address.
    pub const SOURCE: u8 = 1;
    pub const TARGET: u8 = 2;
}

/// Bytes of the ports that UDP begins with.
const PORTS_LEN: usize = 4;

/// IGMP's protocol number, and a question of its (RFC 3376, 4); MLD's (RFC 3810, 5).
const IGMP: u8 = 2;
const MEMBERSHIP_QUERY: u8 = 0x11;
const LISTENER_QUERY: u8 = 130;

/// Looks at a frame without tags, of `len` bytes of which the first are at hand; answers which address its sender says to have.
#[inline]
pub fn claim(head: &[u8], len: usize) -> Result<Option<IpAddr>, Reason> {
    match be16(head, 12) {
        Some(ether::ARP) => arp(head),
        Some(ether::IPV4) => ipv4(head).map(|()| None),
        Some(ether::IPV6) => ipv6(head, len),
        _ => Ok(None),
    }
}

/// Whether a frame without tags is of a kind that claims nothing and is seen to be no server's: most are.
#[inline]
pub fn is_harmless(head: &[u8], checksum: Checksum) -> bool {
    let harmless = match be16(head, 12) {
        Some(ether::IPV4) => ipv4(head).is_ok(),
        Some(ether::ARP | ether::IPV6) | None => false,
        Some(_) => true,
    };
    harmless && may_complete(head, checksum)
}

/// Whether who completes a frame's checksum, as its sender wants it, changes nothing that is looked at here, or by who listens to groups:
/// two bytes in a place of the sender's choice are, with padding that he chooses as well, whatever he likes.
#[inline]
pub fn may_complete(head: &[u8], checksum: Checksum) -> bool {
    let Checksum::Partial { start, offset } = checksum else { return true };
    let field = usize::from(start).saturating_add(offset.into());
    let looked_at = match be16(head, 12) {
        Some(ether::ARP) => return false,
        Some(ether::IPV4) => match (head.get(23), ipv4_payload(head)) {
            (Some(&IGMP), _) => return false,
            (Some(&protocol::UDP), at) => at.saturating_add(PORTS_LEN),
            (_, at) => at,
        },
        Some(ether::IPV6) => match ipv6_payload(head) {
            Err(_) => return false,
            Ok(Carried { next: protocol::ICMPV6, at, part }) if part != Part::Later => {
                return field == at.saturating_add(2);
            }
            Ok(Carried { next: protocol::UDP, at, part }) if part != Part::Later => {
                at.saturating_add(PORTS_LEN)
            }
            Ok(Carried { at, .. }) => at,
        },
        _ => ether::LEN,
    };
    field >= looked_at
}

fn arp(head: &[u8]) -> Result<Option<IpAddr>, Reason> {
    // RFC 826: Ethernet, IPv4, 6 and 4 bytes.
    if array::<6>(head, 14) != Some([0, 1, 8, 0, 6, 4]) {
        return Err(Reason::ArpSpoofed);
    }
    let source = array::<6>(head, 6);
    if array::<6>(head, 22) != source {
        return Err(Reason::ArpSpoofed);
    }
    let address = Ipv4Addr::from(array::<4>(head, 28).ok_or(Reason::ArpSpoofed)?);
    // Who asks for an address before having it claims nothing (RFC 5227, 2.1.1).
    Ok((!address.is_unspecified()).then_some(IpAddr::V4(address)))
}

/// Where what an IPv4 packet carries begins: not before the end of its shortest header.
#[inline]
fn ipv4_payload(head: &[u8]) -> usize {
    let words = usize::from(head.get(14).copied().unwrap_or(0) & 15).max(5);
    words.saturating_mul(4).saturating_add(ether::LEN)
}

#[inline]
fn ipv4(head: &[u8]) -> Result<(), Reason> {
    let next = head.get(23);
    let fragment = be16(head, 20).unwrap_or(0);
    if !matches!(next, Some(&protocol::UDP | &IGMP)) || fragment & 0x1fff != 0 {
        return Ok(());
    }
    let at = ipv4_payload(head);
    if next == Some(&IGMP) {
        // A router that hears another ask asks no more, wherever the question was sent.
        let asks = *head.get(at).ok_or(Reason::Hidden)? == MEMBERSHIP_QUERY;
        return if asks { Err(Reason::Router) } else { Ok(()) };
    }
    no_server(head, at, DHCP)
}

/// A datagram must not come from a server's port, nor go to a client's: that is all by which clients know a server (RFC 7610, 3).
#[inline]
fn no_server(head: &[u8], at: usize, [server, client]: [u16; 2]) -> Result<(), Reason> {
    match be16(head, at).zip(be16(head, at.saturating_add(2))) {
        Some((from, to)) if from == server || to == client => Err(Reason::DhcpServer),
        Some(_) => Ok(()),
        None => Err(Reason::Hidden),
    }
}

/// Which part of a packet a frame has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    First,
    /// What it carries is said in the first one.
    Later,
}

/// What an IPv6 packet carries, and where it begins.
struct Carried {
    next: u8,
    at: usize,
    part: Part,
}

/// Looks through the extension headers.
fn ipv6_payload(head: &[u8]) -> Result<Carried, Reason> {
    let byte = |at: usize| head.get(at).copied().ok_or(Reason::Hidden);
    let mut next = byte(20)?;
    let mut at = 54usize;
    let mut part = Part::Whole;
    for _ in 0..EXTENSIONS_MAX {
        let size = match next {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION => {
                usize::from(byte(at.saturating_add(1))?).saturating_add(1).saturating_mul(8)
            }
            AUTHENTICATION => usize::from(byte(at.saturating_add(1))?).saturating_add(2).saturating_mul(4),
            protocol::FRAGMENT => {
                let offset = be16(head, at.saturating_add(2)).ok_or(Reason::Hidden)? & 0xfff8;
                part = if offset == 0 { Part::First } else { Part::Later };
                8
            }
            _ => return Ok(Carried { next, at, part }),
        };
        next = byte(at)?;
        at = at.saturating_add(size);
        if part == Part::Later {
            return Ok(Carried { next, at, part });
        }
    }
    Err(Reason::Hidden)
}

fn ipv6(head: &[u8], len: usize) -> Result<Option<IpAddr>, Reason> {
    match ipv6_payload(head)? {
        Carried { part: Part::Later, .. } => Ok(None),
        Carried { next: protocol::UDP, at, .. } => no_server(head, at, DHCP6).map(|()| None),
        Carried { next: protocol::ICMPV6, at, part } => icmpv6(head, len, at, part == Part::First),
        _ => Ok(None),
    }
}

fn icmpv6(head: &[u8], len: usize, at: usize, fragmented: bool) -> Result<Option<IpAddr>, Reason> {
    let kind = head.get(at).copied().ok_or(Reason::Hidden)?;
    if kind == LISTENER_QUERY {
        return Err(Reason::Router);
    }
    if !(discovery::ROUTER_SOLICITATION..=discovery::REDIRECT).contains(&kind) {
        return Ok(None);
    }
    // RFC 6980: discovery is never in fragments.
    if fragmented || matches!(kind, discovery::ROUTER_ADVERTISEMENT | discovery::REDIRECT) {
        return Err(Reason::Router);
    }
    let address = |at| array::<16>(head, at).map(Ipv6Addr::from).ok_or(Reason::Hidden);
    let source = address(22)?;
    let target = || address(at.saturating_add(8));
    let (claimed, option, options) = match kind {
        discovery::NEIGHBOUR_ADVERTISEMENT => (target()?, discovery::TARGET, at.saturating_add(24)),
        // Duplicate address detection: who asks wants the address.
        discovery::NEIGHBOUR_SOLICITATION if source.is_unspecified() => {
            (target()?, discovery::SOURCE, at.saturating_add(24))
        }
        discovery::NEIGHBOUR_SOLICITATION => (source, discovery::SOURCE, at.saturating_add(24)),
        _ => (source, discovery::SOURCE, at.saturating_add(8)),
    };
    let mut rest = head.get(options..).unwrap_or_default();
    while let Some((&[kind, len], _)) = rest.split_first_chunk::<2>() {
        let size = usize::from(len).saturating_mul(8);
        if size == 0 {
            return Err(Reason::ArpSpoofed);
        }
        if kind == option && array::<6>(rest, 2) != array::<6>(head, 6) {
            return Err(Reason::ArpSpoofed);
        }
        rest = rest.get(size..).unwrap_or_default();
    }
    // All options were seen only if all of the frame was.
    if len > head.len() {
        return Err(Reason::Hidden);
    }
    Ok((!claimed.is_unspecified()).then_some(IpAddr::V6(claimed)))
}

/// Whose an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    port: PortNumber,
    fixed: bool,
    seen: u32,
}

/// Who has which address, by who said so first.
#[derive(Debug, Default)]
pub struct Claims {
    list: HashMap<(u16, IpAddr), Claim>,
    counts: HashMap<PortNumber, usize>,
    /// When claims that are too old were removed last.
    swept: Option<u32>,
}

impl Claims {
    /// A port says that it has an address; answers whether it may. Trusted ports are always believed.
    pub fn claim(
        &mut self,
        vlan: u16,
        address: IpAddr,
        port: PortNumber,
        trusted: bool,
        now: u32,
    ) -> Result<(), Reason> {
        let fresh = Claim { port, fixed: false, seen: now };
        if self.count(port) >= CLAIMS_PER_PORT && self.swept != Some(now) {
            // At most once a second, whatever ports claim.
            self.swept = Some(now);
            self.sweep(now);
        }
        let count = self.count(port);
        match self.list.get_mut(&(vlan, address)) {
            Some(claim) if claim.port == port => {
                claim.seen = now;
                Ok(())
            }
            Some(claim) if claim.fixed && !trusted => Err(Reason::ArpSpoofed),
            Some(claim) if claim.fixed => Ok(()),
            Some(claim) if trusted || now.wrapping_sub(claim.seen) > CLAIM_SECONDS => {
                let before = std::mem::replace(claim, fresh).port;
                self.count_down(before);
                self.count_up(port);
                Ok(())
            }
            Some(_) => Err(Reason::ArpSpoofed),
            // Beyond its quota a port that is not trusted is silent; one that is has no claims to defend.
            None if count >= CLAIMS_PER_PORT => {
                if trusted {
                    Ok(())
                } else {
                    Err(Reason::Quota)
                }
            }
            None => {
                self.list.insert((vlan, address), fresh);
                self.count_up(port);
                Ok(())
            }
        }
    }

    /// Gives an address to a port for good.
    pub fn fix(&mut self, vlan: u16, address: IpAddr, port: PortNumber) {
        let claim = Claim { port, fixed: true, seen: 0 };
        if let Some(before) = self.list.insert((vlan, address), claim) {
            self.count_down(before.port);
        }
        self.count_up(port);
    }

    /// A port is gone.
    pub fn forget(&mut self, port: PortNumber) {
        self.list.retain(|_, claim| claim.port != port);
        self.counts.remove(&port);
    }

    fn count(&self, port: PortNumber) -> usize {
        self.counts.get(&port).copied().unwrap_or(0)
    }

    /// Removes claims that nobody has repeated for long.
    fn sweep(&mut self, now: u32) {
        let mut list = std::mem::take(&mut self.list);
        list.retain(|_, claim| {
            let keep = claim.fixed || now.wrapping_sub(claim.seen) <= CLAIM_SECONDS;
            if !keep {
                self.count_down(claim.port);
            }
            keep
        });
        self.list = list;
    }

    fn count_up(&mut self, port: PortNumber) {
        let count = self.counts.entry(port).or_default();
        *count = count.saturating_add(1);
    }

    fn count_down(&mut self, port: PortNumber) {
        if let Some(count) = self.counts.get_mut(&port) {
            *count = count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn claim(frame: &[u8]) -> Result<Option<IpAddr>, Reason> {
        super::claim(frame, frame.len())
    }

    fn frame(kind: u16, body: &[u8]) -> Vec<u8> {
        [&[0xff; 6][..], &SOURCE, &kind.to_be_bytes(), body].concat()
    }

    fn arp_from(mac: [u8; 6], address: [u8; 4]) -> Vec<u8> {
        frame(0x0806, &[&[0, 1, 8, 0, 6, 4, 0, 2][..], &mac, &address, &[0; 10]].concat())
    }

    fn icmp(kind: u8, extensions: &[u8], options: &[u8]) -> Vec<u8> {
        let first = if extensions.is_empty() { 58 } else { 0 };
        let mut body = vec![0x60, 0, 0, 0, 0, 0, first, 255];
        body.extend("fe80::1".parse::<Ipv6Addr>().unwrap().octets());
        body.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
        body.extend(extensions);
        body.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        body.extend("fe80::2".parse::<Ipv6Addr>().unwrap().octets());
        body.extend(options);
        frame(0x86dd, &body)
    }

    fn udp4((from, to): (u16, u16)) -> Vec<u8> {
        let mut body = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        body.extend([from.to_be_bytes(), to.to_be_bytes(), [0, 8], [0, 0]].concat());
        frame(0x0800, &body)
    }

    fn udp6((from, to): (u16, u16)) -> Vec<u8> {
        let mut body = vec![0x60, 0, 0, 0, 0, 8, protocol::UDP, 255];
        body.extend([0; 32]);
        body.extend([from.to_be_bytes(), to.to_be_bytes(), [0, 8], [0, 0]].concat());
        frame(0x86dd, &body)
    }

    #[test]
    fn what_is_behind_the_first_bytes_claims_nothing_unseen() {
        let own = [2, 1, 2, 0, 0, 0, 0, 1];
        let seen = |kind, extensions: &[u8], options: &[u8]| {
            let frame = icmp(kind, extensions, options);
            super::claim(&frame[..frame.len().min(256)], frame.len())
        };
        // A target behind a long option that hosts pass over (RFC 8200, 4.2), and an address behind one (RFC 3971's nonce).
        let padding = [&[58, 24, 0x1e, 196][..], &[0; 196]].concat();
        assert_eq!(seen(136, &padding, &own), Err(Reason::Hidden));
        let nonce = [&[14, 23][..], &[0; 182], &[2, 1, 2, 0, 0, 0, 0, 9]].concat();
        assert_eq!(seen(136, &[], &nonce), Err(Reason::Hidden));
        let short = [&[14, 1, 0, 0, 0, 0, 0, 0], &own[..]].concat();
        assert_eq!(seen(136, &[], &short), Ok(Some("fe80::2".parse().unwrap())));
        assert_eq!(seen(128, &padding, &[0; 400]), Ok(None));
        // Without room for a target: a question for routers.
        assert_eq!(claim(&icmp(133, &[], &[])[..62]), Ok(Some("fe80::1".parse().unwrap())));
        assert_eq!(claim(&icmp(136, &[], &[])[..62]), Err(Reason::Hidden));
    }

    #[test]
    fn checksums_are_completed_where_nobody_has_looked() {
        let may = |frame: &[u8], start, offset| may_complete(frame, Checksum::Partial { start, offset });
        let arp = arp_from(SOURCE, [10, 0, 0, 66]);
        assert!(!may(&arp, 14, 16) && may_complete(&arp, Checksum::Valid));
        let udp = udp4((9, 9));
        // Its own, one of a packet inside it, and the server's port, the addresses, the kind.
        assert!(may(&udp, 34, 6) && may(&udp, 84, 16));
        assert!(!may(&udp, 34, 3) && !may(&udp, 34, 0) && !may(&udp, 14, 16) && !may(&udp, 10, 2));
        // Another protocol, and a header that says to be shorter than any.
        let mut tcp = udp.clone();
        tcp[23] = 6;
        assert!(may(&tcp, 34, 0) && !may(&tcp, 14, 0));
        tcp[14] = 0x40;
        assert!(!may(&tcp, 14, 9));
        tcp[23] = IGMP;
        assert!(!may(&tcp, 34, 2));
        let udp = udp6((9, 9));
        assert!(may(&udp, 54, 6) && !may(&udp, 54, 2) && !may(&udp, 22, 0));
        let hops = [58, 0, 0, 0, 0, 0, 0, 0];
        assert!(may(&icmp(128, &hops, &[]), 62, 2) && !may(&icmp(128, &hops, &[]), 62, 8));
        assert!(!may(&icmp(128, &hops, &[]), 61, 1) && !may(&icmp(128, &[60, 255], &[]), 62, 2));
        let later = [58, 0, 0, 9, 0, 0, 0, 0];
        let mut part = icmp(0, &later, &[]);
        part[20] = protocol::FRAGMENT;
        assert!(may(&part, 62, 8) && !may(&part, 54, 6));
        assert!(may(&frame(0x8864, &[]), 14, 20) && !may(&frame(0x88b5, &[]), 10, 2));
    }

    #[test]
    fn lies_about_addresses_are_found() {
        assert_eq!(claim(&arp_from(SOURCE, [10, 0, 0, 1])), Ok(Some("10.0.0.1".parse().unwrap())));
        assert_eq!(claim(&arp_from([2; 6], [10, 0, 0, 1])), Err(Reason::ArpSpoofed));
        assert_eq!(claim(&arp_from(SOURCE, [0; 4])), Ok(None));
        assert_eq!(claim(&icmp(136, &[], &[2, 1, 2, 0, 0, 0, 0, 1])), Ok(Some("fe80::2".parse().unwrap())));
        assert_eq!(claim(&icmp(136, &[], &[2, 1, 2, 0, 0, 0, 0, 2])), Err(Reason::ArpSpoofed));
        assert_eq!(claim(&icmp(136, &[], &[9, 0])), Err(Reason::ArpSpoofed), "an option without end");
        assert_eq!(claim(&icmp(135, &[], &[])), Ok(Some("fe80::1".parse().unwrap())));
        assert_eq!(claim(&icmp(128, &[], &[])), Ok(None));
    }

    #[test]
    fn routers_and_servers_are_found_behind_extensions_too() {
        assert_eq!(claim(&icmp(134, &[], &[])), Err(Reason::Router));
        assert_eq!(claim(&icmp(130, &[], &[])), Err(Reason::Router));
        assert_eq!(claim(&icmp(131, &[], &[])), Ok(None));
        assert_eq!(claim(&icmp(134, &[58, 0, 0, 0, 0, 0, 0, 0], &[])), Err(Reason::Router));
        // The first fragment, and what is said to be behind more headers than are there.
        assert_eq!(
            claim(&icmp(135, &[44, 0, 0, 0, 0, 0, 0, 0, 58, 0, 0, 1, 0, 0, 0, 0], &[])),
            Err(Reason::Router)
        );
        assert_eq!(claim(&icmp(134, &[60, 255, 0, 0, 0, 0, 0, 0], &[])), Err(Reason::Hidden));
        let server = Err(Reason::DhcpServer);
        assert_eq!(
            [(67, 9), (68, 67), (999, 68)].map(|ports| claim(&udp4(ports))),
            [server, Ok(None), server]
        );
        assert_eq!(
            [(547, 9), (546, 547), (9, 546)].map(|ports| claim(&udp6(ports))),
            [server, Ok(None), server]
        );
        assert_eq!(claim(&udp4((9, 9))[..37]), Err(Reason::Hidden));
    }

    #[test]
    fn who_came_first_has_the_address_while_it_says_so() {
        let mut claims = Claims::default();
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        assert_eq!(claims.claim(1, address, 1, false, 0), Ok(()));
        assert_eq!(claims.claim(1, address, 2, false, 300), Err(Reason::ArpSpoofed));
        assert_eq!(claims.claim(2, address, 2, false, 0), Ok(()), "another VLAN");
        assert_eq!(claims.claim(1, address, 1, false, 300), Ok(()));
        assert_eq!(claims.claim(1, address, 2, false, 600), Err(Reason::ArpSpoofed));
        assert_eq!(claims.claim(1, address, 2, false, 601), Ok(()));
        assert_eq!(claims.claim(1, address, 3, true, 601), Ok(()), "a trusted port is believed");
        assert_eq!(claims.claim(1, address, 2, false, 601), Err(Reason::ArpSpoofed));
        claims.fix(1, address, 4);
        assert_eq!(claims.claim(1, address, 3, false, 10_000), Err(Reason::ArpSpoofed));
        claims.forget(4);
        assert_eq!(claims.claim(1, address, 1, false, 0), Ok(()));
        for number in 0..CLAIMS_PER_PORT as u32 {
            let _ = claims.claim(9, IpAddr::V4(number.into()), 9, false, 0);
        }
        let other = "1.1.1.1".parse().unwrap();
        assert_eq!(claims.claim(9, other, 9, false, 0), Err(Reason::Quota));
        assert_eq!(claims.claim(9, other, 9, false, 300), Err(Reason::Quota));
        assert_eq!(claims.claim(9, other, 9, false, 301), Ok(()), "those that are too old do not count");
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(
            bytes in prop::collection::vec(any::<u8>(), 0..120),
            kind in prop::sample::select(vec![0x0806u16, 0x0800, 0x86dd]),
            start in 0u16..120,
        ) {
            let whole = frame(kind, &bytes);
            let (_, _) = (claim(&whole), claim(&bytes));
            // Whatever is completed: what was seen of it is what is seen of it.
            let offset = start.rotate_left(7) % 40;
            let mut done = whole.clone();
            crate::segment::complete_checksum(&mut done, start, offset);
            if may_complete(&whole, Checksum::Partial { start, offset }) {
                prop_assert_eq!(claim(&whole), claim(&done));
                prop_assert_eq!(&whole[..14], &done[..14]);
            }
        }
    }
}
