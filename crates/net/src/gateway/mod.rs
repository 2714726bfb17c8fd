//! The user-mode gateway: a router, name server and address server for one guest, made of ordinary sockets.
//!
//! ```text
//!  guest's card --frames--> [neighbour | dhcp | dns]  answered here
//!                           [splice]     TCP: a connection of the guest's ends here, a socket's goes on
//!                           [datagrams]  UDP: a socket for each flow
//!                           [ping]       ICMP echo: a socket for each run
//!                           [peers]      other guests of the user's: packets, from gateway to gateway
//!  host's ports ----------> [forward]    TCP and UDP into the guest
//! ```
//!
//! No privilege is needed, and the guest can do nothing that a program of the user's could not: less, for the host's
//! loopback, link-local and multicast addresses are out of reach ([`config::is_outside`]).
//!
//! One thread does everything ([`Gateway::serve`]); it sleeps when nothing happens. Frames to the guest are made only
//! while there is room for them, so a guest that takes none costs nothing but waiting sockets.

mod config;
mod datagrams;
mod dhcp;
mod dns;
mod flows;
mod forward;
mod fuzz;
mod leases;
mod monitor;
mod neighbour;
mod outbox;
mod peers;
mod ping;
mod reassembly;
mod socket;
mod splice;
mod tcp;
#[cfg(test)]
mod test;

pub use config::{Config, Error, Forward, HOST_NAME, MTU_DEFAULT, Meeting, Network, Transport, ZONE};
#[doc(hidden)]
pub use fuzz::{fuzz_gateway, fuzz_tcp};
pub use monitor::Monitor;

use crate::batch::Batch;
use crate::card::{Bell, Card, Stall};
use crate::offload::Offload;
use crate::wire::layers::{self, Layers};
use crate::wire::{array, be16, ether, protocol};
use datagrams::{Run, UdpAges, UdpFlow};
use dns::Resolvers;
use flows::{Flows, Kind, Timers, Token};
use forward::Listener;
use leases::Leases;
use outbox::{Ends, Outbox, Unreachable};
use peers::Peers;
use ping::PingFlow;
use reassembly::Reassembly;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::Timespec;
use splice::{Key, TcpFlow};
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of all connections that wait for sockets to take them.
const PENDING_MAX: usize = 64 << 20;
/// Runs of echo requests at a time.
const PINGS_MAX: usize = 64;
/// Flows that one turn of the loop works on, before it looks at the guest again.
const WORK_MAX: usize = 64;
/// Files that are left to others.
const FILES_SPARE: u64 = 256;

/// The kernel's list of things to be told about.
struct Poll(OwnedFd);

impl Poll {
    fn add(&self, source: impl AsFd, token: Token, flags: EventFlags) -> rustix::io::Result<()> {
        epoll::add(&self.0, source, EventData::new_u64(token.encode()), flags)
    }
}

/// A gateway. See the module.
pub struct Gateway {
    config: Config,
    network: Network,
    outbox: Outbox,
    poll: Poll,
    tcp: Flows<Key, TcpFlow>,
    udp: Flows<Key, UdpFlow>,
    ping: Flows<ping::Key, PingFlow>,
    listeners: Vec<Listener>,
    peers: Option<Peers>,
    udp_ages: UdpAges,
    /// Those that have something to do, in turn; and how many of them are gone, at most.
    ready: VecDeque<Token>,
    ready_gone: usize,
    timers: Timers,
    budget: tcp::Budget,
    run: Run,
    reassembly: Reassembly,
    resolvers: Resolvers,
    /// Where the guest's address was seen last.
    guest_mac: [u8; 6],
    leases: Leases,
    advertise_at: Option<Instant>,
    /// When listeners are looked at again for whose callers there were no files.
    accept_again_at: Option<Instant>,
    monitor: Arc<Monitor>,
    random: RandomState,
    now: Instant,
}

impl Gateway {
    /// Makes a gateway and listens for its forwards.
    pub fn new(config: Config) -> Result<Self, Error> {
        let host = |what| move |error: rustix::io::Errno| Error::Host { what, source: error.into() };
        let listeners = forward::listen(&config.forwards)?;
        let peers = config.peers.clone().map(Peers::new).transpose()?;
        let poll = Poll(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("event queue"))?);
        // Connections get three files of four: who has many of them has few flows of datagrams.
        let files = if config.flows_max == 0 { 0 } else { files_max() };
        let flows_max = config.flows_max.min(files);
        let tcp_max = config.flows_max.min(files.saturating_sub(files / 4));
        let udp_max = config.flows_max.min(files / 4);
        let gateway = Self {
            network: config.network,
            outbox: Outbox::new(config.mtu),
            poll,
            tcp: Flows::new(splice::KIND, tcp_max),
            udp: Flows::new(datagrams::KIND, udp_max),
            ping: Flows::new(ping::KIND, flows_max.min(PINGS_MAX)),
            listeners,
            peers,
            udp_ages: UdpAges::default(),
            ready: VecDeque::new(),
            ready_gone: 0,
            timers: Timers::default(),
            budget: tcp::Budget::new(PENDING_MAX),
            run: Run::default(),
            reassembly: Reassembly::default(),
            resolvers: Resolvers::new("/etc/resolv.conf"),
            guest_mac: config.guest_mac,
            leases: Leases::default(),
            advertise_at: None,
            accept_again_at: None,
            monitor: Arc::default(),
            random: RandomState::new(),
            now: Instant::now(),
            config,
        };
        Ok(gateway)
    }

    /// The addresses of the link.
    pub fn network(&self) -> Network {
        self.network
    }

    /// What to look at while it works.
    pub fn monitor(&self) -> Arc<Monitor> {
        self.monitor.clone()
    }

    /// Serves a card until its bell is closed.
    pub fn serve(mut self, card: &dyn Card, bell: &Bell) -> Result<(), Error> {
        let host = |what| move |error: rustix::io::Errno| Error::Host { what, source: error.into() };
        self.poll.add(bell, Token::new(Kind::Bell, 0), EventFlags::IN).map_err(host("event queue"))?;
        if let Some(file) = card.readiness() {
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
            self.poll.add(file, Token::new(Kind::Bell, 1), flags).map_err(host("event queue"))?;
        }
        self.poll_listeners().map_err(host("event queue"))?;
        self.poll_peers().map_err(host("event queue"))?;
        let mut inbound = Batch::new(64, 512 << 10);
        let mut events = Vec::with_capacity(256);
        let (mut more, mut stall) = (true, Stall::default());
        loop {
            if bell.closed() {
                return Ok(());
            }
            if bell.answer() || more {
                more = card.take(&mut inbound);
                for (offload, frame) in inbound.iter() {
                    self.input(offload, frame);
                }
                inbound.clear();
                self.run_flush();
            }
            self.work();
            // What the guest does not take now it will ring for.
            let stalled = stall.give(card, &mut self.outbox.batch);
            let busy = more || (stalled.is_none() && !self.ready.is_empty());
            self.sleep(bell, busy, stalled, &mut events).map_err(host("events"))?;
        }
    }

    /// Waits for something to happen, if there is nothing to do, but not longer than `most`, and notes what has.
    fn sleep(
        &mut self,
        bell: &Bell,
        busy: bool,
        most: Option<Duration>,
        events: &mut Vec<epoll::Event>,
    ) -> rustix::io::Result<()> {
        let again = self.peers.as_ref().and_then(|peers| peers.again_at);
        let set = [self.timers.next(), self.advertise_at, self.accept_again_at, again];
        let next = set.into_iter().flatten().min();
        let wait = if busy || !bell.doze() {
            Some(Timespec { tv_sec: 0, tv_nsec: 0 })
        } else {
            let next = next.map(|at| at.saturating_duration_since(Instant::now()));
            next.into_iter().chain(most).min().map(|wait| {
                let secs = i64::try_from(wait.as_secs()).unwrap_or(i64::MAX);
                Timespec { tv_sec: secs, tv_nsec: wait.subsec_nanos().into() }
            })
        };
        events.clear();
        match epoll::wait(&self.poll.0, rustix::buffer::spare_capacity(events), wait.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        bell.wake();
        self.now = Instant::now();
        for event in events.iter() {
            let token = Token::decode(event.data.u64());
            match token.kind {
                Kind::Bell if token.index == 1 => bell.ring(),
                Kind::Bell => {}
                Kind::Tcp => self.tcp_event(token, event.flags),
                Kind::Udp => self.udp_event(token),
                Kind::Ping => self.ping_event(token),
                Kind::Listener => self.listener_event(token),
                Kind::Peers => self.peers_event(),
            }
        }
        while let Some(token) = self.timers.due(self.now) {
            match token.kind {
                Kind::Tcp => self.tcp_due(token),
                Kind::Udp => self.udp_due(token),
                Kind::Ping => self.ping_due(token),
                Kind::Bell | Kind::Listener | Kind::Peers => {}
            }
        }
        if self.advertise_at.is_some_and(|at| at <= self.now) {
            self.advertise_router();
        }
        if self.accept_again_at.is_some_and(|at| at <= self.now) {
            self.accept_again();
        }
        if let Some(peers) = &mut self.peers
            && peers.again_at.is_some_and(|at| at <= self.now)
        {
            peers.again(self.now);
        }
        Ok(())
    }

    /// Lets those who have something to do do it, while there is room for what they send.
    fn work(&mut self) {
        for _ in 0..self.ready.len().min(WORK_MAX) {
            if !self.outbox.has_room() {
                return;
            }
            let Some(token) = self.ready.pop_front() else { return };
            match token.kind {
                Kind::Tcp => self.tcp_work(token),
                Kind::Udp => self.udp_work(token),
                Kind::Ping => self.ping_work(token),
                Kind::Listener => self.listener_work(token),
                Kind::Peers => self.peers_work(),
                Kind::Bell => {}
            }
        }
    }

    /// A flow is gone, maybe from those that have something to do. While the guest takes nothing nobody works on these, however many come
    /// and go: they are looked through once half of them are gone.
    fn unqueue(&mut self, queued: bool) {
        self.ready_gone = self.ready_gone.saturating_add(queued.into());
        if self.ready_gone <= (self.ready.len() / 2).saturating_add(64) {
            return;
        }
        let (tcp, udp, ping) = (&self.tcp, &self.udp, &self.ping);
        self.ready.retain(|token| match token.kind {
            Kind::Tcp => tcp.has(*token),
            Kind::Udp => udp.has(*token),
            Kind::Ping => ping.has(*token),
            Kind::Listener | Kind::Peers | Kind::Bell => true,
        });
        self.ready_gone = 0;
    }

    /// Tells the guest why a packet of its goes nowhere: but nothing about an error, nor about what is for many (RFC 1122, 3.2.2; RFC 4443,
    /// 2.4).
    fn complain(&mut self, mac: [u8; 6], layers: &Layers, frame: &[u8], why: Unreachable) {
        let kind = frame.get(layers.transport).copied().unwrap_or(0);
        let error = match layers.protocol {
            protocol::ICMP => matches!(kind, 3 | 4 | 5 | 11 | 12),
            protocol::ICMPV6 => kind < 128,
            _ => false,
        };
        if error || self.network.is_for_many(layers.destination) {
            return;
        }
        let ends = Ends { mac, from: self.network.gateway(layers.source), to: layers.source };
        let packet = frame.get(layers.network..layers.end).unwrap_or_default();
        self.outbox.unreachable(&ends, why, packet);
    }

    /// A frame of the guest's.
    fn input(&mut self, offload: Offload, frame: &[u8]) {
        let (Some(mac), Some(kind)) = (array::<6>(frame, 6), be16(frame, 12)) else { return };
        match kind {
            ether::ARP => self.arp_input(frame.get(ether::LEN..).unwrap_or_default()),
            ether::IPV4 | ether::IPV6 => match layers::parse(frame, offload.segments.is_none()) {
                Some(layers) if layers.fragment => {
                    if let Some(whole) = self.reassembly.take(&layers, frame, self.now)
                        && let Some(layers) = layers::parse(&whole, true)
                    {
                        self.packet(mac, &layers, Offload::default(), &whole);
                    }
                }
                Some(layers) => self.packet(mac, &layers, offload, frame),
                None => self.monitor.broken(),
            },
            // The link has no VLANs, and speaks nothing else.
            _ => {}
        }
    }

    fn packet(&mut self, mac: [u8; 6], layers: &Layers, offload: Offload, frame: &[u8]) {
        let body = frame.get(layers.transport..layers.end).unwrap_or_default();
        let ports = be16(body, 0).zip(be16(body, 2));
        let unnamed = layers.source.is_unspecified() || is_link_local(layers.source);
        if layers.protocol == protocol::UDP && self.configures(mac, layers, ports, body) {
            return;
        }
        if layers.protocol == protocol::ICMPV6 && self.discovery_input(mac, layers, frame) {
            return;
        }
        let neighbour_ping =
            layers.protocol == protocol::ICMPV6 && layers.destination == self.network.link_local;
        let answerable = self.network.is_guest(layers.source) || (unnamed && neighbour_ping);
        if !answerable {
            // Answers would not find back, or find somebody else.
            self.monitor.spoofed();
            return;
        }
        self.learn(mac, layers.source);
        if layers.hops <= 1 && !self.network.is_gateway(layers.destination) && !neighbour_ping {
            self.complain(mac, layers, frame, Unreachable::Hops);
            return;
        }
        if let Some(number) = self.network.peer_number(layers.destination).filter(|_| self.peers.is_some()) {
            self.peer_output(mac, number, layers, offload, frame);
            return;
        }
        match layers.protocol {
            protocol::TCP => self.tcp_input(mac, layers, offload, frame),
            protocol::UDP => self.udp_input(mac, layers, offload, frame),
            protocol::ICMP | protocol::ICMPV6 => self.ping_input(mac, layers, frame),
            _ => self.monitor.refused(),
        }
    }

    /// Requests for addresses; answers whether it was one.
    fn configures(&mut self, mac: [u8; 6], layers: &Layers, ports: Option<(u16, u16)>, body: &[u8]) -> bool {
        let payload = body.get(8..).unwrap_or_default();
        let about = dhcp::About {
            network: &self.network,
            mtu: self.config.mtu,
            name: self.config.guest_name.as_deref(),
        };
        match (layers.source, ports) {
            (IpAddr::V4(_), Some((dhcp::CLIENT, dhcp::SERVER))) => {
                let (leases, network) = (&mut self.leases, &self.network);
                let mut lend = |wanted| leases.lend(mac, wanted, network);
                if let Some(reply) = dhcp::answer(payload, &mut lend, &about) {
                    let to = IpAddr::V4(Ipv4Addr::BROADCAST);
                    let ends = Ends { mac: [0xff; 6], from: self.network.gateway4.into(), to };
                    self.outbox.datagram(&ends, (dhcp::SERVER, dhcp::CLIENT), &reply);
                }
                true
            }
            (IpAddr::V6(_), Some((dhcp::CLIENT6, dhcp::SERVER6))) if is_link_local(layers.source) => {
                if let Some(reply) = dhcp::answer6(payload, &about) {
                    let ends = Ends { mac, from: self.network.link_local.into(), to: layers.source };
                    self.outbox.datagram(&ends, (dhcp::SERVER6, dhcp::CLIENT6), &reply);
                }
                true
            }
            _ => false,
        }
    }

    /// A first sequence number that nobody outside can guess (RFC 9293, 3.4.1).
    fn initial_sequence(&self) -> u32 {
        self.random.hash_one(self.now) as u32
    }
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Whether this host has a way out for IPv6: a default route that is not a refusal.
fn has_ipv6_route() -> bool {
    const REJECT: u32 = 0x200;
    let routes = std::fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    routes.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [to, "00", _, _, _, _, _, _, flags, device] = fields.as_slice() else { return false };
        let flags = u32::from_str_radix(flags, 16).unwrap_or(REJECT);
        to.bytes().all(|digit| digit == b'0') && *device != "lo" && flags & REJECT == 0
    })
}

/// How many sockets there may be: the limit on files, raised as far as it goes.
fn files_max() -> usize {
    let files = crate::sys::raise_files_max().saturating_sub(FILES_SPARE);
    usize::try_from(files).unwrap_or(usize::MAX).max(16)
}
