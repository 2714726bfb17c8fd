//! What a gateway is told: addresses, forwards, what the guest may reach.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

/// The names of the gateway's own zone end with this label.
pub const ZONE: &str = "yado";
/// The name under which the guest finds its host: `host.yado`.
pub const HOST_NAME: &str = "host";
/// The card of the gateway: locally administered, "yado" in the middle.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x79, 0x61, 0x64, 0x6f, 0x01];
/// Bytes of an IPv4 packet when nobody says otherwise.
pub const MTU_DEFAULT: u16 = 1500;

/// Networks to choose from: private ones that are rare.
const SUBNETS: [[u8; 3]; 4] = [[10, 77, 0], [172, 29, 77], [192, 168, 177], [10, 213, 97]];
/// A unique local prefix (RFC 4193), with "yado" in it.
const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd79, 0x6164, 0x6f00, 0, 0, 0, 0, 0);

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host's that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// What is forwarded.
    pub transport: Transport,
    /// Where the host listens. Port 0 lets the host choose.
    pub listen: SocketAddr,
    /// The guest's port.
    pub port: u16,
}

/// Where guests of one user meet: each has a socket there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// A directory that only the user may enter.
    pub directory: PathBuf,
    /// What follows a guest's name in the path of its socket: `.vm/net`.
    pub suffix: String,
    /// The guest's own name.
    pub name: String,
}

impl Meeting {
    /// The socket of the guest called `name`, if that can be a guest's name.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        super::peers::is_name(name).then(|| self.directory.join(format!("{name}{}", self.suffix)))
    }
}

/// What a gateway is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The address of the guest's card.
    pub guest_mac: [u8; 6],
    /// The addresses of the link.
    pub network: Network,
    /// The guest's host name, told by DHCP.
    pub guest_name: Option<String>,
    /// The longest IP packet of the link, in bytes.
    pub mtu: u16,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// Where it meets other guests, and they it; `None`: nowhere.
    pub peers: Option<Meeting>,
    /// The guest reaches what listens on the host's loopback only, as `host.yado`.
    pub host_loopback: bool,
    /// The most connections at a time, and as many flows of datagrams: what the limit on files allows, if less.
    pub flows_max: usize,
}

impl Config {
    /// The default for a card, on a network that this host has no route to.
    pub fn new(guest_mac: [u8; 6]) -> Self {
        Self {
            guest_mac,
            network: Network::here(),
            guest_name: None,
            mtu: MTU_DEFAULT,
            forwards: Vec::new(),
            peers: None,
            host_loopback: false,
            flows_max: 16_384,
        }
    }
}

/// Why there is no gateway.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port that cannot be listened on.
    #[error("cannot listen on {transport} {address} of this host: {source}{}", cure(source))]
    Listen {
        /// TCP or UDP.
        transport: Transport,
        /// Where.
        address: SocketAddr,
        /// The host's reason.
        source: io::Error,
    },
    /// The host refuses something that every host has.
    #[error("the host refuses {what} to the guest's network: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// Its reason.
        source: io::Error,
    },
}

fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; choose another port, or end the program that listens there",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need root, choose a higher one",
        io::ErrorKind::AddrNotAvailable => "; it is no address of this host",
        _ => "",
    }
}

/// The addresses on the link between gateway and guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The gateway, which is also the name server and the host's alias: `.1`.
    pub gateway4: Ipv4Addr,
    /// The guest: `.2`.
    pub guest4: Ipv4Addr,
    /// The first 64 bits of all IPv6 addresses.
    pub prefix6: Ipv6Addr,
    /// The gateway, as for IPv4: `::1`.
    pub gateway6: Ipv6Addr,
    /// The guest, if it asks by DHCPv6: `::2`.
    pub guest6: Ipv6Addr,
    /// The gateway on the link.
    pub link_local: Ipv6Addr,
}

impl Network {
    /// A network that this host has no route to.
    pub fn here() -> Self {
        Self::choose(&std::fs::read_to_string("/proc/net/route").unwrap_or_default())
    }

    /// The first of the networks that the host's routes, as in `/proc/net/route`, do not lead to.
    pub fn choose(routes: &str) -> Self {
        let taken = |subnet: &[u8; 3]| {
            let [a, b, c] = *subnet;
            let (ours, peers) = (u32::from_le_bytes([a, b, c, 0]), u32::from_le_bytes([a, b, c ^ 1, 0]));
            routes.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(1);
                let hex = |field: Option<&str>| u32::from_str_radix(field?, 16).ok();
                let (to, mask) = (hex(fields.next()), hex(fields.nth(5)));
                // The table prints addresses in memory order. The default route leads everywhere.
                let within = |ours: u32, mask: u32, to: u32| mask != 0 && ours & mask == to & mask;
                matches!((to, mask), (Some(to), Some(mask)) if within(ours, mask, to) || within(peers, mask, to))
            })
        };
        let [a, b, c] = *SUBNETS.iter().find(|subnet| !taken(subnet)).unwrap_or(&SUBNETS[0]);
        Self {
            gateway4: Ipv4Addr::new(a, b, c, 1),
            guest4: Ipv4Addr::new(a, b, c, 2),
            prefix6: PREFIX,
            gateway6: Ipv6Addr::from(u128::from(PREFIX) | 1),
            guest6: Ipv6Addr::from(u128::from(PREFIX) | 2),
            link_local: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        }
    }

    /// Whether the guest may send from an address.
    pub fn is_guest(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.in_subnet(v4) && v4 != self.gateway4,
            IpAddr::V6(v6) => self.in_prefix(v6) && v6 != self.gateway6,
        }
    }

    /// Whether an address is the gateway's.
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        address == self.gateway4 || address == self.gateway6
    }

    /// The address under which the guest knows another one of its host: in the network beside its own.
    pub fn peer(&self, number: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.gateway4.octets();
        Ipv4Addr::new(a, b, c ^ 1, number)
    }

    /// The number of such an address.
    pub fn peer_number(&self, address: IpAddr) -> Option<u8> {
        let IpAddr::V4(v4) = address else { return None };
        let [.., number] = v4.octets();
        (v4 == self.peer(number) && (1..=254).contains(&number)).then_some(number)
    }

    /// Whether an address is on the link.
    pub fn on_link(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.in_subnet(v4),
            IpAddr::V6(v6) => self.in_prefix(v6),
        }
    }

    /// Whether an address is that of many.
    pub fn is_for_many(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => {
                let [.., last] = v4.octets();
                v4.is_multicast() || v4.is_broadcast() || (self.in_subnet(v4) && last == 255)
            }
            IpAddr::V6(v6) => v6.is_multicast(),
        }
    }

    fn in_subnet(&self, address: Ipv4Addr) -> bool {
        u32::from(address) >> 8 == u32::from(self.gateway4) >> 8
    }

    fn in_prefix(&self, address: Ipv6Addr) -> bool {
        u128::from(address) >> 64 == u128::from(self.prefix6) >> 64
    }

    /// The gateway's address of the kind of `like`.
    pub fn gateway(&self, like: IpAddr) -> IpAddr {
        if like.is_ipv4() { self.gateway4.into() } else { self.gateway6.into() }
    }
}

/// Whether an address outside may be reached at all: not the host's own loopback, nobody's multicast, and nothing that
/// means something else to the host than to the guest (link-local services tell a cloud machine's secrets).
pub fn is_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, ..] = v4.octets();
            let reserved = first == 0 || first >= 240;
            !(reserved || v4.is_loopback() || v4.is_multicast() || v4.is_link_local() || v4.is_broadcast())
        }
        IpAddr::V6(v6) => {
            // ::/96 and ::ffff:0:0/96: loopback, nothing, and IPv4 in disguise.
            let low = u128::from(v6) >> 48 == 0;
            !(low || v6.is_multicast() || v6.is_unicast_link_local())
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_network_of_the_host_is_not_the_guests() {
        let header = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let line = |to: &str, mask: &str| format!("eth0\t{to}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n");
        let choose = |lines: &str| Network::choose(&format!("{header}{lines}")).guest4;
        assert_eq!(choose(""), Ipv4Addr::new(10, 77, 0, 2));
        assert_eq!(choose(&line("00000000", "00000000")), Ipv4Addr::new(10, 77, 0, 2));
        assert_eq!(choose(&line("00004D0A", "00FFFFFF")), Ipv4Addr::new(172, 29, 77, 2));
        assert_eq!(choose(&line("0000000A", "000000FF")), Ipv4Addr::new(172, 29, 77, 2));
        assert_eq!(
            choose(&line("00014D0A", "00FFFFFF")),
            Ipv4Addr::new(172, 29, 77, 2),
            "other guests' network"
        );
    }

    #[test]
    fn what_is_the_hosts_own_is_not_outside() {
        for inside in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.251",
            "169.254.169.254",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::7f00:1",
            "ff02::1",
            "fe80::1",
        ] {
            assert!(!is_outside(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["1.1.1.1", "10.0.0.1", "192.168.0.1", "2001:db8::1", "fd00::1", "64:ff9b::1"] {
            assert!(is_outside(outside.parse().unwrap()), "{outside}");
        }
    }
}
