//! Other guests of the same user on this host, found by name.
//!
//! ```text
//!  guest "web" --packet to 10.77.1.N--> gateway --datagram--> DIRECTORY/db.SUFFIX: gateway --packet from 10.77.1.M--> guest "db"
//! ```
//!
//! Each gateway has a datagram socket of its own, and sends from it to the sockets of others. Whose socket a datagram comes from is
//! the kernel's word, so nobody speaks in another's name. Guests keep the addresses that they have, all the same ones: each gateway
//! gives those that its guest meets addresses of its own making, the same ones every time unless too many meet, and writes them
//! into what comes. Packets go through whole, with large segments and incomplete checksums; what the other side says of them is
//! checked as a guest's word is.
//!
//! A receiver whose socket is full gets what comes when it has room again, up to [`WAITING_MAX`]; then packets are lost, as on any
//! wire. Nobody can make a sender wait for longer than that.

use super::Gateway;
use super::config::{Error, GATEWAY_MAC, Meeting, Network};
use super::flows::{Kind, Token};
use super::outbox::{Ends, Unreachable};
use crate::batch::FRAME_MAX;
use crate::offload::{Checksum, HEADER_LEN, Offload};
use crate::segment;
use crate::wire::checksum::Sum;
use crate::wire::layers::{self, Layers};
use crate::wire::{array, be16, ether, protocol, put};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// The most guests that one guest knows at a time: one for each address of the network that they have in its view.
const PEERS_MAX: usize = 254;
/// What every datagram begins with: "yp", and the version of what follows.
pub(super) const MAGIC: [u8; 4] = *b"yp\0\x01";
/// Bytes that wait for one peer.
const WAITING_MAX: usize = 1 << 20;
/// How often a peer without room is tried again, and for how long.
const AGAIN: Duration = Duration::from_micros(250);
const PATIENCE: Duration = Duration::from_secs(1);
/// Datagrams that one turn takes.
const TURN_MAX: usize = 64;
/// The longest name: that of a guest, and one label of DNS.
const NAME_MAX: usize = 63;
/// Bytes of a socket's buffer, where the host allows it.
const BUFFER: usize = 4 << 20;
/// Bytes of an IP header without options: packets with some go nowhere.
const IP_LEN: usize = 20;

/// Somebody that the guest has met.
#[derive(Debug)]
struct Peer {
    name: String,
    used: Instant,
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    /// Since when it has had no room.
    since: Instant,
}

/// The others.
#[derive(Debug)]
pub struct Peers {
    meeting: Meeting,
    socket: OwnedFd,
    /// By the last byte of their addresses, less one.
    list: Vec<Option<Peer>>,
    /// When those without room are tried again.
    pub again_at: Option<Instant>,
    queued: bool,
    scratch: Vec<u8>,
}

/// How sending went.
#[derive(Debug, PartialEq, Eq)]
enum Sent {
    Gone,
    Full,
    NobodyThere,
}

impl Peers {
    /// Opens the own socket, in place of one that a dead process has left.
    pub fn new(meeting: Meeting) -> Result<Self, Error> {
        let host = |source: std::io::Error| Error::Host { what: "a socket for other guests", source };
        let path =
            meeting.path(&meeting.name).ok_or_else(|| host(std::io::ErrorKind::InvalidFilename.into()))?;
        let _ = std::fs::remove_file(&path);
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
        let socket = socket.map_err(|error| host(error.into()))?;
        // Less, where the host allows no more.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, BUFFER);
        let own = SocketAddrUnix::new(&path).map_err(|error| host(error.into()))?;
        rustix::net::bind(&socket, &own).map_err(|error| host(error.into()))?;
        let list = (0..PEERS_MAX).map(|_| None).collect();
        let scratch = vec![0; FRAME_MAX.saturating_add(64)];
        Ok(Self { meeting, socket, list, again_at: None, queued: false, scratch })
    }

    /// The address of a guest, if there is one of this name.
    pub fn find(&mut self, name: &str, network: &Network, now: Instant) -> Option<Ipv4Addr> {
        let lower = name.to_ascii_lowercase();
        [name, &lower].into_iter().find_map(|name| {
            if name == self.meeting.name {
                return Some(network.guest4);
            }
            // A datagram of nothing: does anybody have the socket?
            (self.send(name, &[]) != Sent::NobodyThere)
                .then(|| self.number(name, now))?
                .map(|number| network.peer(number))
        })
    }

    /// The number of a name: the one it had before, the one it wants, or that of whom nobody has heard of longest.
    fn number(&mut self, name: &str, now: Instant) -> Option<u8> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let wanted = usize::try_from(hasher.finish().checked_rem(PEERS_MAX as u64)?).ok()?;
        let known = self.list.iter().position(|peer| peer.as_ref().is_some_and(|peer| peer.name == name));
        let free = || {
            (0..PEERS_MAX)
                .map(|step| wanted.wrapping_add(step) % PEERS_MAX)
                .find(|at| matches!(self.list.get(*at), Some(None)))
        };
        let oldest = || {
            let used = self.list.iter().enumerate().filter_map(|(at, peer)| Some((peer.as_ref()?.used, at)));
            used.min().map(|(_, at)| at)
        };
        let at = known.or_else(free).or_else(oldest)?;
        let place = self.list.get_mut(at)?;
        match place {
            Some(peer) if peer.name == name => peer.used = now,
            _ => {
                *place = Some(Peer {
                    name: name.to_owned(),
                    used: now,
                    waiting: VecDeque::new(),
                    waiting_bytes: 0,
                    since: now,
                })
            }
        }
        u8::try_from(at.saturating_add(1)).ok()
    }

    /// Who has sent from a socket.
    fn name_of(&self, from: &SocketAddrUnix) -> Option<String> {
        let path = Path::new(std::ffi::OsStr::from_bytes(from.path_bytes()?));
        let rest = path.strip_prefix(&self.meeting.directory).ok()?.to_str()?;
        let name = rest.strip_suffix(&self.meeting.suffix)?;
        (is_name(name) && name != self.meeting.name).then(|| name.to_owned())
    }

    fn send(&self, name: &str, bytes: &[u8]) -> Sent {
        let Some(to) = self.meeting.path(name).and_then(|path| SocketAddrUnix::new(path).ok()) else {
            return Sent::NobodyThere;
        };
        match rustix::net::sendto(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &to) {
            Ok(_) => Sent::Gone,
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => Sent::Full,
            Err(_) => Sent::NobodyThere,
        }
    }

    /// Sends a datagram to a number, or lets it wait; `None`: there is nobody.
    fn pass(&mut self, number: u8, bytes: &[u8], now: Instant) -> Option<()> {
        let at = usize::from(number).checked_sub(1)?;
        let name = self.list.get(at)?.as_ref()?.name.clone();
        let waits = self.list.get(at)?.as_ref().is_some_and(|peer| !peer.waiting.is_empty());
        let sent = if waits { Sent::Full } else { self.send(&name, bytes) };
        let peer = self.list.get_mut(at)?.as_mut()?;
        peer.used = now;
        match sent {
            Sent::Gone => Some(()),
            Sent::NobodyThere => None,
            Sent::Full => {
                if peer.waiting.is_empty() {
                    peer.since = now;
                }
                let bytes_now = peer.waiting_bytes.saturating_add(bytes.len());
                if bytes_now <= WAITING_MAX {
                    peer.waiting_bytes = bytes_now;
                    peer.waiting.push_back(bytes.to_vec());
                }
                let at = now.checked_add(AGAIN);
                self.again_at = self.again_at.or(at);
                Some(())
            }
        }
    }

    /// Tries those again who had no room.
    pub fn again(&mut self, now: Instant) {
        self.again_at = None;
        for at in 0..self.list.len() {
            let Some(mut peer) = self.list.get_mut(at).and_then(Option::take) else { continue };
            let mut stuck = false;
            while let Some(bytes) = peer.waiting.front() {
                match self.send(&peer.name, bytes) {
                    Sent::Gone => peer.since = now,
                    Sent::Full => {
                        stuck = true;
                        break;
                    }
                    Sent::NobodyThere => {}
                }
                peer.waiting_bytes = peer.waiting_bytes.saturating_sub(bytes.len());
                peer.waiting.pop_front();
            }
            if stuck && now.saturating_duration_since(peer.since) > PATIENCE {
                // It stands still. Who wants it to have what it lost sends it again.
                peer.waiting.clear();
                peer.waiting_bytes = 0;
            } else if stuck {
                self.again_at = self.again_at.or(now.checked_add(AGAIN));
            }
            if let Some(place) = self.list.get_mut(at) {
                *place = Some(peer);
            }
        }
    }
}

/// Whether a guest may have this name: nothing that leads elsewhere in the file system.
pub fn is_name(name: &str) -> bool {
    let sound = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(sound) && !name.starts_with(['.', '-'])
}

/// A packet for a peer: what is known of it, and itself.
fn pack(offload: Offload, packet: &[u8]) -> Vec<u8> {
    // What a guest says is right nobody has looked at.
    let checksum = if offload.checksum == Checksum::Valid { Checksum::Unknown } else { offload.checksum };
    [&MAGIC[..], &Offload { checksum, ..offload }.encode(), packet].concat()
}

/// A frame for the guest from what a peer has sent, as it comes from `from`; `None`: it is not sound.
pub fn unpack(
    datagram: &[u8],
    guest: (Ipv4Addr, [u8; 6]),
    from: Ipv4Addr,
) -> Option<(Offload, Layers, Vec<u8>)> {
    let packet = datagram.strip_prefix(&MAGIC)?;
    let (header, packet) = packet.split_first_chunk::<HEADER_LEN>()?;
    let mut frame = [&guest.1[..], &GATEWAY_MAC, &ether::IPV4.to_be_bytes(), packet].concat();
    let offload = Offload::checked(*header, &frame).ok()?;
    let layers = layers::parse(&frame, offload.segments.is_none())?;
    let len = u16::try_from(layers.end.checked_sub(layers.network)?).ok()?;
    let plain = layers.source.is_ipv4() && layers.transport.checked_sub(layers.network)? == IP_LEN;
    if !plain || layers.fragment || layers.hops <= 1 {
        return None;
    }
    frame.truncate(layers.end);
    let field = match layers.protocol {
        protocol::TCP | protocol::UDP => {
            layers.transport_header(&frame)?;
            Some(layers.transport.checked_add(layers.checksum_offset()?)?)
        }
        // Echo, and its answer. Errors are about packets that nobody here has sent.
        protocol::ICMP if matches!(frame.get(layers.transport), Some(0 | 8)) => None,
        _ => return None,
    };
    let new = [from.octets(), guest.0.octets()].concat();
    let old: [u8; 8] = array(&frame, layers.network.checked_add(12)?)?;
    match (offload.checksum, field) {
        (Checksum::Partial { start, offset }, Some(field)) => {
            let place = usize::from(start).checked_add(offset.into())?;
            if usize::from(start) != layers.transport || place != field {
                return None;
            }
            let len = layers.end.checked_sub(layers.transport)?;
            let sum = Sum::default().pseudo(from.into(), guest.0.into(), layers.protocol, len);
            put(&mut frame, field, &sum.folded().to_be_bytes());
        }
        (Checksum::Partial { .. }, None) => return None,
        (_, Some(field)) => {
            let sum = be16(&frame, field)?;
            // A datagram without one stays so.
            if sum != 0 || layers.protocol != protocol::UDP {
                // RFC 1624, 3: what the old addresses gave is taken away, what the new ones give is added.
                let complement = old.map(|byte| !byte);
                let sum = Sum::default().word(!sum).add(&complement).add(&new).checksum();
                let sum = if sum == 0 && layers.protocol == protocol::UDP { 0xffff } else { sum };
                put(&mut frame, field, &sum.to_be_bytes());
            }
        }
        (_, None) => {}
    }
    // Of a large segment the field may say anything.
    put(&mut frame, layers.network.checked_add(2)?, &len.to_be_bytes());
    put(&mut frame, layers.network.checked_add(8)?, &[layers.hops.saturating_sub(1)]);
    put(&mut frame, layers.network.checked_add(12)?, &new);
    put(&mut frame, layers.network.checked_add(10)?, &[0, 0]);
    let sum = Sum::default().add(frame.get(layers.network..layers.transport)?).checksum();
    put(&mut frame, layers.network.checked_add(10)?, &sum.to_be_bytes());
    Some((offload, Layers { source: from.into(), destination: guest.0.into(), ..layers }, frame))
}

impl Gateway {
    pub(super) fn poll_peers(&mut self) -> rustix::io::Result<()> {
        match &self.peers {
            Some(peers) => self.poll.add(&peers.socket, TOKEN, EventFlags::IN | EventFlags::ET),
            None => Ok(()),
        }
    }

    /// The guest sends to another one.
    pub(super) fn peer_output(
        &mut self,
        mac: [u8; 6],
        number: u8,
        layers: &Layers,
        offload: Offload,
        frame: &[u8],
    ) {
        let packet = frame.get(layers.network..layers.end).unwrap_or_default();
        let plain = layers.transport.saturating_sub(layers.network) == IP_LEN && layers.network == ether::LEN;
        if layers.source != self.network.guest4 || !plain {
            self.monitor.spoofed();
            return;
        }
        let now = self.now;
        let passed = self.peers.as_mut().and_then(|peers| peers.pass(number, &pack(offload, packet), now));
        if passed.is_none() {
            self.complain(mac, layers, frame, Unreachable::Host);
        }
    }

    /// Others have sent something.
    pub(super) fn peers_event(&mut self) {
        if let Some(peers) = &mut self.peers
            && !std::mem::replace(&mut peers.queued, true)
        {
            self.ready.push_back(TOKEN);
        }
    }

    /// Moves what others have sent to the guest.
    pub(super) fn peers_work(&mut self) {
        let Some(peers) = &mut self.peers else { return };
        peers.queued = false;
        for _ in 0..TURN_MAX {
            if !self.outbox.has_room() {
                break;
            }
            let Some(peers) = &mut self.peers else { return };
            let (len, from) =
                match rustix::net::recvfrom(&peers.socket, &mut peers.scratch, RecvFlags::DONTWAIT) {
                    Ok((len, _, from)) => (len, from),
                    Err(Errno::INTR) => continue,
                    Err(_) => return,
                };
            let datagram = peers.scratch.get(..len).unwrap_or_default().to_vec();
            let from = from.and_then(|from| SocketAddrUnix::try_from(from).ok());
            // An empty one asks whether anybody is here.
            let name = from.filter(|_| len > 0).and_then(|from| peers.name_of(&from));
            if let Some(number) = name.and_then(|name| peers.number(&name, self.now)) {
                self.peer_input(number, &datagram);
            }
        }
        self.peers_event();
    }

    /// A packet from another guest.
    pub(super) fn peer_input(&mut self, number: u8, datagram: &[u8]) {
        let from = self.network.peer(number);
        let guest = (self.network.guest4, self.guest_mac);
        let Some((offload, layers, mut frame)) = unpack(datagram, guest, from) else {
            self.monitor.broken();
            return;
        };
        let mtu = usize::from(self.config.mtu);
        let longest = match offload.segments {
            Some(segments) => usize::from(segments.size).saturating_add(segments.headers.into()),
            None => frame.len(),
        };
        if longest <= mtu.saturating_add(ether::LEN) {
            self.outbox.batch.push(offload, &[&frame]);
        } else if offload.segments.is_none() {
            // The guest's link takes it in parts only.
            if let Checksum::Partial { start, offset } = offload.checksum {
                segment::complete_checksum(&mut frame, start, offset);
            }
            let ends = Ends { mac: guest.1, from: IpAddr::V4(from), to: IpAddr::V4(guest.0) };
            let body = frame.get(layers.transport..).unwrap_or_default();
            self.outbox.whole(&ends, layers.protocol, body);
        } else {
            self.monitor.broken();
        }
    }
}

/// What the socket's events are about.
const TOKEN: Token = Token::only(Kind::Peers);

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const GUEST: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(10, 77, 0, 2), [2, 0, 0, 0, 0, 9]);
    const FROM: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 5);

    /// A packet with right checksums, from a guest on another network to whom it knows as 172.29.76.9.
    fn packet(kind: u8, payload: &[u8], complete: bool) -> (Offload, Vec<u8>) {
        let (from, to) = (Ipv4Addr::new(172, 29, 77, 2), Ipv4Addr::new(172, 29, 76, 9));
        let (header, field) = if kind == protocol::TCP { (20, 16) } else { (8, 6) };
        let mut body = vec![0; header];
        put(&mut body, 0, &[1, 2, 3, 4]);
        if kind == protocol::TCP {
            put(&mut body, 12, &[0x50, 0x18]);
        }
        body.extend(payload);
        let pseudo = Sum::default().pseudo(from.into(), to.into(), kind, body.len());
        let sum = if complete { pseudo.add(&body).checksum() } else { pseudo.folded() };
        put(&mut body, field, &sum.to_be_bytes());
        let len = (body.len() as u16 + 20).to_be_bytes();
        let mut packet = vec![0x45, 0, len[0], len[1], 0, 0, 0x40, 0, 64, kind, 0, 0];
        packet.extend([from.octets(), to.octets()].concat());
        packet.extend(body);
        let checksum =
            if complete { Checksum::Valid } else { Checksum::Partial { start: 34, offset: field as u16 } };
        (Offload { checksum, segments: None }, packet)
    }

    proptest! {
        #[test]
        fn packets_come_with_new_addresses_and_right_checksums(
            payload in prop::collection::vec(any::<u8>(), 0..50), udp: bool, complete: bool,
        ) {
            let kind = if udp { protocol::UDP } else { protocol::TCP };
            let (offload, packet) = packet(kind, &payload, complete);
            let (offload, layers, mut frame) = unpack(&pack(offload, &packet), GUEST, FROM).unwrap();
            prop_assert_eq!(layers::parse(&frame, true), Some(Layers { hops: 63, ..layers }));
            prop_assert_eq!((layers.source, layers.destination), (FROM.into(), GUEST.0.into()));
            prop_assert_eq!(Sum::default().add(&frame[14..34]).checksum(), 0);
            match offload.checksum {
                Checksum::Partial { start, offset } => segment::complete_checksum(&mut frame, start, offset),
                // The other guest's word that it is right is not passed on.
                checksum => prop_assert_eq!(checksum, Checksum::Unknown),
            }
            let body = &frame[layers.transport..];
            let sum = Sum::default().pseudo(FROM.into(), GUEST.0.into(), kind, body.len());
            prop_assert_eq!(sum.add(body).checksum(), 0);
            prop_assert!(frame.ends_with(&payload));
        }

        #[test]
        fn no_datagram_harms(bytes in prop::collection::vec(any::<u8>(), 0..80), at in 0usize..60, udp: bool) {
            unpack(&bytes, GUEST, FROM);
            let (offload, packet) = packet(if udp { protocol::UDP } else { protocol::TCP }, &[7; 9], true);
            let mut datagram = pack(offload, &packet);
            put(&mut datagram, at, &bytes);
            if let Some((_, layers, frame)) = unpack(&datagram, GUEST, FROM) {
                prop_assert_eq!(layers.end, frame.len());
                prop_assert!(layers::parse(&frame, true).is_some());
            }
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong_and_none_stays_none() {
        let (offload, mut datagram) = packet(protocol::UDP, b"bytes", true);
        datagram[26] ^= 1;
        let (_, layers, frame) = unpack(&pack(offload, &datagram), GUEST, FROM).unwrap();
        let body = &frame[layers.transport..];
        let sum = Sum::default().pseudo(FROM.into(), GUEST.0.into(), protocol::UDP, body.len());
        assert_ne!(sum.add(body).checksum(), 0);
        datagram[26..28].fill(0);
        let (_, layers, frame) = unpack(&pack(offload, &datagram), GUEST, FROM).unwrap();
        assert_eq!(frame[layers.transport + 6..layers.transport + 8], [0, 0]);
    }

    fn meeting(directory: &tempfile::TempDir, name: &str) -> Peers {
        let directory = directory.path().to_owned();
        Peers::new(Meeting { directory, suffix: ".net".into(), name: name.into() }).unwrap()
    }

    #[test]
    fn names_are_those_of_sockets_and_lead_nowhere_else() {
        let place = tempfile::tempdir().unwrap();
        let (mut web, db) = (meeting(&place, "web"), meeting(&place, "db"));
        let (network, now) = (Network::choose(""), Instant::now());
        let address = web.find("db", &network, now).unwrap();
        assert_eq!(web.find("DB", &network, now), Some(address));
        assert_eq!(web.find("web", &network, now), Some(network.guest4));
        for nobody in ["nobody", "../db", "", ".db", "db.net", "d/b", &"x".repeat(64)] {
            assert_eq!(web.find(nobody, &network, now), None, "{nobody}");
        }
        let number = network.peer_number(address.into()).unwrap();
        assert_eq!(web.pass(number, b"something", now), Some(()));
        let mut bytes = [0; 20];
        let (mut lens, mut names) = (vec![], vec![]);
        while let Ok((len, _, from)) = rustix::net::recvfrom(&db.socket, &mut bytes, RecvFlags::DONTWAIT) {
            lens.push(len);
            names.push(db.name_of(&SocketAddrUnix::try_from(from.unwrap()).unwrap()).unwrap());
        }
        assert_eq!((lens, names), (vec![0, 0, 9], vec!["web".to_owned(); 3]));
        let elsewhere = tempfile::tempdir().unwrap();
        let stranger = meeting(&elsewhere, "web");
        let own = SocketAddrUnix::new(stranger.meeting.path("web").unwrap()).unwrap();
        assert_eq!(db.name_of(&own), None, "a socket of another place has no name");
        drop(db);
        assert_eq!(web.find("db", &network, now), None, "who is dead is not there");
        assert_eq!(web.pass(number, b"something", now), None);
    }

    #[test]
    fn who_has_no_room_gets_it_later_and_no_more_than_has_room() {
        let place = tempfile::tempdir().unwrap();
        let (mut web, db) = (meeting(&place, "web"), meeting(&place, "db"));
        let (network, now) = (Network::choose(""), Instant::now());
        let number = network.peer_number(web.find("db", &network, now).unwrap().into()).unwrap();
        let mut next = 0u32;
        let mut send = |web: &mut Peers, bytes: usize| {
            let mut datagram = vec![0; bytes];
            put(&mut datagram, 0, &next.to_be_bytes());
            next += 1;
            assert_eq!(web.pass(number, &datagram, now), Some(()));
        };
        while web.again_at.is_none() {
            send(&mut web, 1000);
        }
        let (mut seen, mut bytes) = (vec![], vec![0; 2000]);
        let mut read = || {
            while let Ok((len, ..)) = rustix::net::recvfrom(&db.socket, &mut bytes, RecvFlags::DONTWAIT) {
                seen.extend((len >= 4).then(|| u32::from_be_bytes(*bytes.first_chunk().unwrap())));
            }
            seen.len() as u32
        };
        send(&mut web, 1000);
        let mut got = read();
        while web.again_at.is_some() {
            web.again(now);
            got = read();
        }
        assert_eq!(got, next);
        assert!(seen.iter().copied().eq(0..next), "in order");
        (0..4000).for_each(|_| {
            web.pass(number, &[7; 1000], now);
        });
        let peer = web.list.iter().flatten().next().unwrap();
        assert!(peer.waiting_bytes <= WAITING_MAX && peer.waiting.len() * 1000 == peer.waiting_bytes);
        web.again(now + PATIENCE * 2);
        assert!(web.again_at.is_none(), "who stands still for long loses what waits");
    }

    #[test]
    fn more_names_than_addresses_push_out_the_oldest() {
        let place = tempfile::tempdir().unwrap();
        let mut web = meeting(&place, "web");
        let now = Instant::now();
        let at = |number: u32| now + Duration::from_millis(number.into());
        let numbers: Vec<u8> =
            (0..254).map(|guest| web.number(&format!("g{guest}"), at(guest)).unwrap()).collect();
        let mut all = numbers.clone();
        all.sort_unstable();
        assert!(all.iter().copied().eq(1..=254), "each has its own");
        assert_eq!(web.number("g0", at(300)), Some(numbers[0]));
        assert_eq!(web.number("new", at(301)), Some(numbers[1]), "g1 was met longest ago");
        assert_eq!(web.number("g0", at(302)), Some(numbers[0]));
    }
}
