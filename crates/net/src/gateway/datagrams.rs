//! The guest's UDP flows, each with a socket, and those that come in by forwards.

use super::Gateway;
use super::config::Transport;
use super::dns::Query;
use super::flows::{Ages, Kind, Token};
use super::outbox::{self, Ends, Unreachable};
use super::socket;
use super::splice::Key;
use crate::offload::{Checksum, Offload};
use crate::sys;
use crate::wire::checksum::Sum;
use crate::wire::layers::Layers;
use crate::wire::{be16, protocol};
use rustix::event::epoll::EventFlags;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a flow lives after its last datagram (RFC 4787, REQ-5).
const IDLE: Duration = Duration::from_secs(120);
/// Datagrams that one turn of a flow takes.
const TURN_MAX: usize = 32;
/// Bytes and datagrams that leave in one system call. The kernel's own limit is 64 datagrams.
const RUN_BYTES_MAX: usize = 60_000;
const RUN_COUNT_MAX: usize = 60;

/// Through what a flow's datagrams go.
#[derive(Debug)]
enum Path {
    /// A socket of its own.
    Own(OwnedFd),
    /// A forward's socket, to this client.
    Forward { listener: u32, client: SocketAddr },
}

/// Who makes flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Own,
    Forwarded,
}

impl Path {
    fn side(&self) -> Side {
        match self {
            Self::Own(_) => Side::Own,
            Self::Forward { .. } => Side::Forwarded,
        }
    }
}

/// All flows by age: those that the guest makes, and those that anybody makes.
#[derive(Debug, Default)]
pub struct UdpAges {
    pub(super) own: Ages,
    pub(super) forwarded: Ages,
}

impl UdpAges {
    fn of(&mut self, side: Side) -> &mut Ages {
        match side {
            Side::Own => &mut self.own,
            Side::Forwarded => &mut self.forwarded,
        }
    }
}

/// One flow of datagrams.
#[derive(Debug)]
pub struct UdpFlow {
    mac: [u8; 6],
    path: Path,
    last: Instant,
    /// Its place among flows of its side.
    aged: Instant,
    queued: bool,
    timer: Option<Instant>,
    /// A question to a name server that was not answered yet.
    pub(super) query: Option<Query>,
}

/// Datagrams of one flow and one size that wait to leave together.
#[derive(Debug, Default)]
pub struct Run {
    flow: Option<Token>,
    size: usize,
    bytes: Vec<u8>,
    count: usize,
    /// A shorter one has ended it.
    ended: bool,
}

impl Gateway {
    /// A datagram of the guest's, or many that are sent as one.
    pub(super) fn udp_input(&mut self, mac: [u8; 6], layers: &Layers, offload: Offload, frame: &[u8]) {
        let body = frame.get(layers.transport..layers.end).unwrap_or_default();
        let (Some(from), Some(to), Some(len)) = (be16(body, 0), be16(body, 2), be16(body, 4)) else {
            self.monitor.broken();
            return;
        };
        let whole = if offload.segments.is_some() { body.len() } else { len.into() };
        let (Some(datagram), Some(payload)) = (body.get(..whole), body.get(8..whole)) else {
            self.monitor.broken();
            return;
        };
        let none = layers.source.is_ipv4() && be16(body, 6) == Some(0);
        if matches!(offload.checksum, Checksum::Unknown) && !none {
            let sum = Sum::default().pseudo(layers.source, layers.destination, protocol::UDP, whole);
            if sum.add(datagram).checksum() != 0 {
                self.monitor.broken();
                return;
            }
        }
        let key = Key {
            guest: SocketAddr::new(layers.source, from),
            other: SocketAddr::new(layers.destination, to),
        };
        if self.local_service(mac, &key, payload) {
            return;
        }
        let token = match self.udp.find(&key) {
            Some(token) => Some(token),
            None => self.udp_open(mac, key),
        };
        let Some(token) = token else {
            self.complain(mac, layers, frame, Unreachable::Prohibited);
            return;
        };
        let size = offload.segments.map_or(payload.len(), |segments| segments.size.into());
        for part in payload.chunks(size.max(1)) {
            self.run_push(token, part);
        }
        if payload.is_empty() {
            self.run_push(token, payload);
        }
    }

    fn udp_open(&mut self, mac: [u8; 6], key: Key) -> Option<Token> {
        let Some(to) = self.outside(Transport::Udp, key.other) else {
            self.monitor.refused();
            return None;
        };
        let socket = socket::connect_udp(to).ok()?;
        self.udp_insert(mac, key, Path::Own(socket))
    }

    fn udp_insert(&mut self, mac: [u8; 6], key: Key, path: Path) -> Option<Token> {
        let side = path.side();
        self.udp_make_room(side);
        let now = self.now;
        let flow = UdpFlow { mac, path, last: now, aged: now, queued: false, timer: None, query: None };
        let token = self.udp.insert(key, flow)?;
        let (_, flow) = self.udp.get_mut(token)?;
        if let Path::Own(socket) = &flow.path
            && self.poll.add(socket, token, EventFlags::IN | EventFlags::ET).is_err()
        {
            self.udp.remove(token);
            return None;
        }
        self.udp_ages.of(side).insert(now, token);
        self.timers.by(now.checked_add(IDLE)?, token, &mut flow.timer);
        Some(token)
    }

    /// Where there is none, the flow goes that was idle longest. Strangers, who make flows by forwards, have half of the table at most, and
    /// take nothing of the other half.
    fn udp_make_room(&mut self, side: Side) {
        let half = self.udp.max().div_ceil(2);
        let most = side == Side::Forwarded && self.udp_ages.forwarded.len() >= half;
        if !self.udp.is_full() && !most {
            return;
        }
        let from = if most || self.udp_ages.own.len() == 0 { Side::Forwarded } else { Side::Own };
        let udp = &mut self.udp;
        let oldest = self.udp_ages.of(from).oldest(|token| {
            let (_, flow) = udp.get_mut(token)?;
            flow.aged = flow.last;
            Some(flow.last)
        });
        if let Some(token) = oldest {
            self.monitor.full();
            self.udp_remove(token);
        }
    }

    pub(super) fn udp_remove(&mut self, token: Token) {
        if let Some((_, mut flow)) = self.udp.remove(token) {
            self.timers.cancel(token, &mut flow.timer);
            self.udp_ages.of(flow.path.side()).remove(flow.aged, token);
            self.unqueue(flow.queued);
        }
    }

    /// A datagram that came to a forward.
    pub(super) fn udp_forwarded(&mut self, listener: u32, key: Key, client: SocketAddr, payload: &[u8]) {
        let token = match self.udp.find(&key) {
            Some(token) => Some(token),
            None => self.udp_insert(self.guest_mac, key, Path::Forward { listener, client }),
        };
        let Some((key, flow)) = token.and_then(|token| self.udp.get_mut(token)) else { return };
        flow.last = self.now;
        let ends = Ends { mac: flow.mac, from: key.other.ip(), to: key.guest.ip() };
        self.outbox.datagram(&ends, (key.other.port(), key.guest.port()), payload);
    }

    /// Whether a flow with this key is another client's.
    pub(super) fn udp_taken(&mut self, key: &Key, by: SocketAddr) -> bool {
        let Some(token) = self.udp.find(key) else { return false };
        let path = self.udp.get_mut(token).map(|(_, flow)| &flow.path);
        !matches!(path, Some(Path::Forward { client, .. }) if *client == by)
    }

    /// Sends to the outside, together with others of the same flow and size.
    fn run_push(&mut self, token: Token, payload: &[u8]) {
        let run = &self.run;
        let fits = run.flow == Some(token)
            && !run.ended
            && payload.len() <= run.size
            && !payload.is_empty()
            && run.count < RUN_COUNT_MAX
            && run.bytes.len().saturating_add(payload.len()) <= RUN_BYTES_MAX;
        if !fits {
            self.run_flush();
            self.run.flow = Some(token);
            self.run.size = payload.len();
        }
        self.run.ended = payload.len() < self.run.size;
        self.run.count = self.run.count.saturating_add(1);
        self.run.bytes.extend_from_slice(payload);
    }

    /// Sends what was gathered.
    pub(super) fn run_flush(&mut self) {
        let mut run = std::mem::take(&mut self.run);
        if let Some(token) = run.flow.take() {
            self.udp_send(token, &run);
        }
        run.bytes.clear();
        self.run = Run { bytes: run.bytes, ..Run::default() };
    }

    fn udp_send(&mut self, token: Token, run: &Run) {
        let Some((_, flow)) = self.udp.get_mut(token) else { return };
        flow.last = self.now;
        let whole = || run.bytes.chunks(run.size.max(1));
        match &flow.path {
            Path::Own(socket) => {
                let size = u16::try_from(run.size).unwrap_or(u16::MAX);
                let sent = run.count > 1 && sys::send_segments(socket, &run.bytes, size).is_ok();
                if run.bytes.is_empty() {
                    let _ = socket::send(socket, &[]);
                } else if !sent {
                    // Alone, or too long to be cut by the kernel. What a full socket does not take is lost, as on any wire.
                    whole().for_each(|part| {
                        let _ = socket::send(socket, part);
                    });
                }
            }
            Path::Forward { listener, client } => {
                let (listener, client) = (*listener, *client);
                for part in whole() {
                    self.forward_send(listener, client, part);
                }
            }
        }
    }

    /// A flow's socket has something.
    pub(super) fn udp_event(&mut self, token: Token) {
        if let Some((_, flow)) = self.udp.get_mut(token)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.ready.push_back(token);
        }
    }

    /// Moves datagrams to the guest.
    pub(super) fn udp_work(&mut self, token: Token) {
        let Some((&key, flow)) = self.udp.get_mut(token) else { return };
        flow.queued = false;
        flow.last = self.now;
        let ends = Ends { mac: flow.mac, from: key.other.ip(), to: key.guest.ip() };
        let Path::Own(socket) = &flow.path else { return };
        let ports = (key.other.port(), key.guest.port());
        for _ in 0..TURN_MAX {
            let Some(room) = self.outbox.room(&ends, 8, 65_507) else { break };
            match sys::receive_segments(socket, room) {
                Ok((len, size)) => {
                    flow.query = None;
                    self.outbox.datagrams(&ends, ports, len, size);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    let why = match error.kind() {
                        ErrorKind::ConnectionRefused => Unreachable::Port,
                        _ => Unreachable::Host,
                    };
                    let from = self.network.gateway(key.guest.ip());
                    let packet = outbox::original(key.guest, key.other, 0);
                    self.outbox.unreachable(&Ends { from, ..ends }, why, &packet);
                }
            }
        }
        flow.queued = true;
        self.ready.push_back(token);
    }

    pub(super) fn udp_due(&mut self, token: Token) {
        let now = self.now;
        let Some((_, flow)) = self.udp.get_mut(token) else { return };
        flow.timer = None;
        let end = flow.last.checked_add(IDLE);
        let again = flow.query.as_ref().map(|query| query.again_at);
        match (again, end) {
            (Some(at), _) if at <= now => self.ask_again(token),
            (_, Some(at)) if at <= now => self.udp_remove(token),
            (again, Some(end)) => {
                let at = again.map_or(end, |again| again.min(end));
                self.timers.by(at, token, &mut flow.timer);
            }
            (_, None) => {}
        }
    }

    /// A question goes to another name server.
    fn ask_again(&mut self, token: Token) {
        let Some((_, flow)) = self.udp.get_mut(token) else { return };
        let Some(mut query) = flow.query.take() else { return };
        if let Some(server) = self.resolvers.after(query.server, self.now)
            && let Ok(socket) = socket::connect_udp(server.1)
            && self.poll.add(&socket, token, EventFlags::IN | EventFlags::ET).is_ok()
        {
            let _ = socket::send(&socket, &query.message);
            // The old socket is closed with what it may still get.
            flow.path = Path::Own(socket);
            query.server = server.0;
            query.tries = query.tries.saturating_add(1);
            if query.tries < Query::TRIES_MAX {
                query.again_at = self.now.checked_add(Query::PATIENCE).unwrap_or(self.now);
                flow.query = Some(query);
            }
        }
        self.udp_due(token);
    }

    /// The guest asks a name server.
    pub(super) fn ask(&mut self, mac: [u8; 6], key: Key, message: &[u8]) {
        let Some((server, address)) = self.resolvers.first(self.now) else { return };
        let token = match self.udp.find(&key) {
            Some(token) => token,
            None => {
                let Ok(socket) = socket::connect_udp(address) else { return };
                let Some(token) = self.udp_insert(mac, key, Path::Own(socket)) else { return };
                token
            }
        };
        let at = self.now.checked_add(Query::PATIENCE).unwrap_or(self.now);
        let Some((_, flow)) = self.udp.get_mut(token) else { return };
        flow.last = self.now;
        flow.query = Some(Query { message: message.to_vec(), server, tries: 1, again_at: at });
        self.timers.by(at, token, &mut flow.timer);
        if let Path::Own(socket) = &flow.path {
            let _ = socket::send(socket, message);
        }
    }
}

/// Tokens of flows of datagrams.
pub(super) const KIND: Kind = Kind::Udp;
