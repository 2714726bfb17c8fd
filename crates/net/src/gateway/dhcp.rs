//! DHCP (RFC 2131, 2132) and stateless and stateful DHCPv6 (RFC 8415): one guest, one address of each kind.

use super::config::{Network, ZONE};
use crate::wire::{array, put};
use std::net::Ipv4Addr;

/// Ports of servers and clients.
pub const SERVER: u16 = 67;
pub const CLIENT: u16 = 68;
pub const SERVER6: u16 = 547;
pub const CLIENT6: u16 = 546;

/// Seconds that an address is lent for. It stays the guest's anyway.
const LEASE: u32 = 86_400;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Where the options begin, after the cookie.
const OPTIONS: usize = 240;
/// A message is at least so long (RFC 951): some clients insist.
const MESSAGE_MIN: usize = 300;

/// Message types.
mod message {
    pub const DISCOVER: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const ACK: u8 = 5;
    pub const NAK: u8 = 6;
    pub const INFORM: u8 = 8;
}

/// What the guest is told beside its address.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    pub network: &'a Network,
    pub mtu: u16,
    pub name: Option<&'a str>,
}

/// Options by number, the first of each kind.
fn option(options: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut rest = options;
    loop {
        match rest {
            [0, after @ ..] => rest = after,
            [255, ..] | [] => return None,
            [kind, len, after @ ..] => {
                let (value, after) = after.split_at_checked(usize::from(*len))?;
                if *kind == wanted {
                    return Some(value);
                }
                rest = after;
            }
            _ => return None,
        }
    }
}

/// The answer to a request. `lend` is asked for an address for who asks, preferably the one that he says.
pub fn answer(
    request: &[u8],
    lend: &mut dyn FnMut(Option<Ipv4Addr>) -> Option<Ipv4Addr>,
    about: &About<'_>,
) -> Option<Vec<u8>> {
    let fixed: [u8; OPTIONS] = array(request, 0)?;
    // BOOTREQUEST over Ethernet.
    if fixed.get(..3)? != [1, 1, 6] || fixed.get(236..)? != COOKIE {
        return None;
    }
    let options = request.get(OPTIONS..)?;
    let [kind] = *option(options, 53)? else { return None };
    let server = option(options, 54);
    let ours = about.network.gateway4.octets();
    if server.is_some_and(|server| server != ours) {
        return None;
    }
    let client = array::<4>(&fixed, 12)?;
    let wanted = option(options, 50).and_then(|wanted| array::<4>(wanted, 0)).unwrap_or(client);
    let lent = match kind {
        message::DISCOVER | message::REQUEST => lend(Some(wanted.into()))?,
        // It has one (RFC 2131, 4.3.5).
        message::INFORM => client.into(),
        _ => return None,
    };
    let reply = match kind {
        message::DISCOVER => message::OFFER,
        message::REQUEST if wanted == lent.octets() => message::ACK,
        message::REQUEST => message::NAK,
        message::INFORM => message::ACK,
        _ => return None,
    };
    let mut bytes = vec![0; OPTIONS];
    put(&mut bytes, 0, &[2, 1, 6, 0]);
    put(&mut bytes, 4, fixed.get(4..8)?);
    put(&mut bytes, 10, fixed.get(10..12)?);
    if kind == message::INFORM {
        put(&mut bytes, 12, &client);
    } else if reply != message::NAK {
        put(&mut bytes, 16, &lent.octets());
    }
    put(&mut bytes, 28, fixed.get(28..44)?);
    put(&mut bytes, 236, &COOKIE);
    bytes.extend([53, 1, reply, 54, 4]);
    bytes.extend(ours);
    if reply != message::NAK {
        if kind != message::INFORM {
            bytes.extend([51, 4]);
            bytes.extend(LEASE.to_be_bytes());
        }
        bytes.extend([1, 4, 255, 255, 255, 0]);
        // Router and name server.
        for kind in [3, 6] {
            bytes.extend([kind, 4]);
            bytes.extend(ours);
        }
        bytes.extend([26, 2]);
        bytes.extend(about.mtu.to_be_bytes());
        text(&mut bytes, 15, ZONE);
        if let Some(name) = about.name {
            text(&mut bytes, 12, name);
        }
    }
    bytes.push(255);
    bytes.resize(bytes.len().max(MESSAGE_MIN), 0);
    Some(bytes)
}

fn text(bytes: &mut Vec<u8>, kind: u8, text: &str) {
    let text = text.as_bytes();
    if let Ok(len) = u8::try_from(text.len()) {
        bytes.extend([kind, len]);
        bytes.extend_from_slice(text);
    }
}

/// Message types and options of DHCPv6 (RFC 8415, 7.3 and 21).
mod six {
    pub const SOLICIT: u8 = 1;
    pub const ADVERTISE: u8 = 2;
    pub const REPLY: u8 = 7;
    /// Request, confirm, renew, rebind; release and decline; information-request.
    pub const ASKED: [u8; 7] = [3, 4, 5, 6, 8, 9, 11];
    pub const CLIENT_ID: u16 = 1;
    pub const SERVER_ID: u16 = 2;
    pub const IA_NA: u16 = 3;
    pub const IA_ADDRESS: u16 = 5;
    pub const RAPID_COMMIT: u16 = 14;
    pub const DNS: u16 = 23;
}

fn option6(options: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = options;
    loop {
        let (&[kind_high, kind_low, high, low], after) = rest.split_first_chunk::<4>()?;
        let (value, after) = after.split_at_checked(u16::from_be_bytes([high, low]).into())?;
        if u16::from_be_bytes([kind_high, kind_low]) == wanted {
            return Some(value);
        }
        rest = after;
    }
}

fn add6(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
    bytes.extend_from_slice(value);
}

/// The answer to a DHCPv6 message.
pub fn answer6(request: &[u8], about: &About<'_>) -> Option<Vec<u8>> {
    let (&[kind, a, b, c], options) = request.split_first_chunk::<4>()?;
    // A DUID from the link-layer address (RFC 8415, 11.4).
    let mut ours = vec![0, 3, 0, 1];
    ours.extend(super::config::GATEWAY_MAC);
    if option6(options, six::SERVER_ID).is_some_and(|server| server != ours) {
        return None;
    }
    let rapid = option6(options, six::RAPID_COMMIT).is_some();
    let reply = match kind {
        six::SOLICIT if !rapid => six::ADVERTISE,
        six::SOLICIT => six::REPLY,
        kind if six::ASKED.contains(&kind) => six::REPLY,
        _ => return None,
    };
    let mut bytes = vec![reply, a, b, c];
    if let Some(client) = option6(options, six::CLIENT_ID) {
        add6(&mut bytes, six::CLIENT_ID, client.get(..client.len().min(130))?);
    }
    add6(&mut bytes, six::SERVER_ID, &ours);
    if kind == six::SOLICIT && rapid {
        add6(&mut bytes, six::RAPID_COMMIT, &[]);
    }
    if let Some(id) = option6(options, six::IA_NA).and_then(|ia| array::<4>(ia, 0)) {
        let mut address = about.network.guest6.octets().to_vec();
        // Preferred and valid lifetimes; then when to renew and to rebind.
        address.extend(LEASE.to_be_bytes());
        address.extend(LEASE.to_be_bytes());
        let mut ia = id.to_vec();
        ia.extend((LEASE / 2).to_be_bytes());
        ia.extend((LEASE / 4 * 3).to_be_bytes());
        add6(&mut ia, six::IA_ADDRESS, &address);
        add6(&mut bytes, six::IA_NA, &ia);
    }
    add6(&mut bytes, six::DNS, &about.network.gateway6.octets());
    Some(bytes)
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const LENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    fn lend(_: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        Some(LENT)
    }

    fn about(network: &Network) -> About<'_> {
        About { network, mtu: 1500, name: Some("debian-1") }
    }

    fn request(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 236];
        bytes[..8].copy_from_slice(&[1, 1, 6, 0, 9, 9, 9, 9]);
        bytes[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        bytes.extend(COOKIE);
        bytes.extend([53, 1, kind]);
        bytes.extend(more);
        bytes.push(255);
        bytes
    }

    #[test]
    fn a_guest_gets_its_address() {
        let network = Network::choose("");
        let offer = answer(&request(1, &[]), &mut lend, &about(&network)).unwrap();
        assert_eq!((&offer[4..8], &offer[16..20]), (&[9; 4][..], &LENT.octets()[..]));
        let options = &offer[OPTIONS..];
        assert_eq!(option(options, 53), Some(&[2][..]));
        assert_eq!(option(options, 3), Some(&[10, 77, 0, 1][..]));
        assert_eq!(option(options, 12), Some(&b"debian-1"[..]));
        let ask = |address: [u8; 4], server: [u8; 4]| {
            let mut more = vec![50, 4];
            more.extend(address);
            more.extend([54, 4]);
            more.extend(server);
            let reply = answer(&request(3, &more), &mut lend, &about(&network))?;
            option(&reply[OPTIONS..], 53).map(|kind| kind[0])
        };
        assert_eq!(ask(LENT.octets(), [10, 77, 0, 1]), Some(5));
        assert_eq!(ask([10, 0, 2, 15], [10, 77, 0, 1]), Some(6), "an address from elsewhere");
        assert_eq!(ask(LENT.octets(), [10, 0, 0, 1]), None, "another server was chosen");
        assert_eq!(
            answer(&request(7, &[]), &mut lend, &about(&network)),
            None,
            "nothing is said to a release"
        );
    }

    #[test]
    fn a_guest_gets_its_ipv6_address() {
        let network = Network::choose("");
        let mut solicit = vec![1, 1, 2, 3];
        add6(&mut solicit, 1, &[0, 3, 0, 1, 2, 0, 0, 0, 0, 1]);
        add6(&mut solicit, 3, &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        let reply = answer6(&solicit, &about(&network)).unwrap();
        assert_eq!(&reply[..4], &[2, 1, 2, 3]);
        let ia = option6(&reply[4..], 3).unwrap();
        assert_eq!(&option6(&ia[12..], 5).unwrap()[..16], &network.guest6.octets());
        solicit[0] = 11;
        assert_eq!(answer6(&solicit, &about(&network)).unwrap()[0], 7);
        solicit[0] = 7;
        assert_eq!(answer6(&solicit, &about(&network)), None);
    }

    proptest! {
        #[test]
        fn no_message_harms(bytes in prop::collection::vec(any::<u8>(), 0..90), kind: u8) {
            let network = Network::choose("");
            answer(&bytes, &mut lend, &about(&network));
            answer6(&bytes, &about(&network));
            if let Some(reply) = answer(&request(kind, &bytes), &mut lend, &about(&network)) {
                prop_assert!(reply.len() >= MESSAGE_MIN);
            }
        }
    }
}
