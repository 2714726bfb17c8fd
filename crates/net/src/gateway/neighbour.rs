//! The link's own talk: ARP (RFC 826), neighbour and router discovery (RFC 4861, 8106).

use super::Gateway;
use super::config::GATEWAY_MAC;
use super::outbox::Ends;
use crate::wire::layers::Layers;
use crate::wire::{array, ether};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Types of ICMPv6.
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// All nodes, and their Ethernet address (RFC 2464, 7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// Seconds that the gateway stays a default router without being heard of: the most that is allowed (RFC 4861, 6.2.1).
/// It is heard of at a third of that.
const ROUTER_LIFETIME: u16 = 9000;

impl Gateway {
    /// Who has this address?
    pub(super) fn arp_input(&mut self, packet: &[u8]) {
        // Ethernet, IPv4, a request.
        if packet.get(..8) != Some(&[0, 1, 8, 0, 6, 4, 0, 1]) {
            return;
        }
        let (Some(mac), Some(from)) = (array::<6>(packet, 8), array::<4>(packet, 14)) else { return };
        let Some(wanted) = array::<4>(packet, 24) else { return };
        let gateway = self.network.gateway4;
        self.learn(mac, Ipv4Addr::from(from).into());
        if wanted != gateway.octets() {
            return;
        }
        let mut reply = vec![0, 1, 8, 0, 6, 4, 0, 2];
        reply.extend(GATEWAY_MAC);
        reply.extend(gateway.octets());
        reply.extend(mac);
        reply.extend(from);
        self.outbox.frame(mac, ether::ARP, &reply);
    }

    /// Discovery of routers and neighbours; answers whether it was that.
    pub(super) fn discovery_input(&mut self, mac: [u8; 6], layers: &Layers, frame: &[u8]) -> bool {
        let message = frame.get(layers.transport..layers.end).unwrap_or_default();
        match message.first() {
            Some(&ROUTER_SOLICITATION) if layers.hops == 255 => {
                self.advertise_router();
                true
            }
            Some(&NEIGHBOUR_SOLICITATION) if layers.hops == 255 => {
                if let Some(target) = array::<16>(message, 8).map(Ipv6Addr::from) {
                    self.advertise_neighbour(mac, layers.source, target);
                }
                true
            }
            Some(&(ROUTER_SOLICITATION..=137)) => true,
            _ => false,
        }
    }

    fn advertise_neighbour(&mut self, mac: [u8; 6], asker: IpAddr, target: Ipv6Addr) {
        if target != self.network.gateway6 && target != self.network.link_local {
            return;
        }
        // Who asks without an address looks whether it is taken (RFC 4862, 5.4).
        let anonymous = asker.is_unspecified();
        let flags = if anonymous { 0xa0 } else { 0xe0 };
        let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
        message.extend(target.octets());
        message.extend([2, 1]);
        message.extend(GATEWAY_MAC);
        let (mac, to) = if anonymous { (ALL_NODES_MAC, ALL_NODES.into()) } else { (mac, asker) };
        self.outbox.icmp(&Ends { mac, from: target.into(), to }, &mut message);
    }

    /// Tells the guest its prefix, its router and its name server.
    pub(super) fn advertise_router(&mut self) {
        // Without a way for IPv6 out of this host, the guest shall not try one.
        let lifetime = if super::has_ipv6_route() { ROUTER_LIFETIME } else { 0 };
        let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
        message.extend(lifetime.to_be_bytes());
        message.extend([0; 8]);
        // Source link-layer address; MTU.
        message.extend([1, 1]);
        message.extend(GATEWAY_MAC);
        message.extend([5, 1, 0, 0]);
        message.extend(u32::from(self.config.mtu).to_be_bytes());
        // The prefix, on the link and for addresses of one's own making, for ever.
        message.extend([3, 4, 64, 0xc0]);
        message.extend([0xff; 8]);
        message.extend([0; 4]);
        message.extend(self.network.prefix6.octets());
        // The name server (RFC 8106, 5.1), for ever.
        message.extend([25, 3, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        message.extend(self.network.gateway6.octets());
        let ends = Ends { mac: ALL_NODES_MAC, from: self.network.link_local.into(), to: ALL_NODES.into() };
        self.outbox.icmp(&ends, &mut message);
        let again = std::time::Duration::from_secs(u64::from(ROUTER_LIFETIME) / 3);
        self.advertise_at = self.now.checked_add(again);
    }

    /// Remembers where an address of the guest's is: forwards lead there.
    pub(super) fn learn(&mut self, mac: [u8; 6], address: IpAddr) {
        if address == self.network.guest4 {
            self.guest_mac = mac;
            self.leases.seen(mac, self.network.guest4);
        }
    }
}
