//! The guest's TCP connections and the sockets they end in.

use super::Gateway;
use super::config::Transport;
use super::flows::{Kind, Token};
use super::outbox::{Ends, Outbox};
use super::socket::{self, TcpStream};
use super::tcp::header::{Header, Segment, flag};
use super::tcp::{Connection, Link, State, Verdict};
use crate::wire::checksum::Sum;
use crate::wire::layers::Layers;
use crate::wire::{be16, protocol};
use crate::{Checksum, Offload};
use rustix::event::epoll::EventFlags;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// Names a flow: the guest's end and the other as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest: SocketAddr,
    pub other: SocketAddr,
}

/// One connection with its socket.
#[derive(Debug)]
pub struct TcpFlow {
    mac: [u8; 6],
    connection: Connection,
    stream: TcpStream,
    /// It is in the list of those with work.
    queued: bool,
    timer: Option<Instant>,
}

/// The way of one flow to the guest.
struct Way<'a> {
    outbox: &'a mut Outbox,
    ends: Ends,
    ports: (u16, u16),
}

impl<'a> Way<'a> {
    fn new(outbox: &'a mut Outbox, mac: [u8; 6], key: &Key) -> Self {
        let ends = Ends { mac, from: key.other.ip(), to: key.guest.ip() };
        Self { outbox, ends, ports: (key.other.port(), key.guest.port()) }
    }
}

impl Link for Way<'_> {
    fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.outbox.room(&self.ends, super::tcp::header::LEN, len)
    }

    fn send(&mut self, header: Header, len: usize, mss: u16) -> bool {
        self.outbox.tcp(&self.ends, self.ports, header, len, mss)
    }
}

impl Gateway {
    /// A TCP segment of the guest's.
    pub(super) fn tcp_input(&mut self, mac: [u8; 6], layers: &Layers, offload: Offload, frame: &[u8]) {
        let body = frame.get(layers.transport..layers.end).unwrap_or_default();
        // A checksum that the guest leaves to be completed was never made; nothing on the way can have changed it.
        if matches!(offload.checksum, Checksum::Unknown) {
            let sum = Sum::default().pseudo(layers.source, layers.destination, protocol::TCP, body.len());
            if sum.add(body).checksum() != 0 {
                self.monitor.broken();
                return;
            }
        }
        let ports = be16(body, 0).zip(be16(body, 2));
        let (Some((from, to)), Some(segment)) = (ports, Segment::parse(body)) else {
            self.monitor.broken();
            return;
        };
        let key = Key {
            guest: SocketAddr::new(layers.source, from),
            other: SocketAddr::new(layers.destination, to),
        };
        match self.tcp.find(&key) {
            Some(token) => self.tcp_segment(token, &segment),
            None => self.tcp_stranger(mac, key, &segment),
        }
    }

    fn tcp_segment(&mut self, token: Token, segment: &Segment<'_>) {
        let now = self.now;
        let Some((_, flow)) = self.tcp.get_mut(token) else { return };
        let verdict = flow.connection.receive(segment, &mut flow.stream, &mut self.budget, now);
        self.tcp_settle(token, verdict);
    }

    /// A segment of no connection: a call, or a remainder.
    fn tcp_stranger(&mut self, mac: [u8; 6], key: Key, segment: &Segment<'_>) {
        if segment.has(flag::RST) {
            return;
        }
        let call = segment.has(flag::SYN) && !segment.has(flag::ACK);
        if !call || !self.tcp_call(mac, key, segment) {
            // RFC 9293, 3.5.2: how a closed port answers.
            let len = segment.payload.len() as u32;
            let ends_too = u32::from(segment.has(flag::SYN)).wrapping_add(u32::from(segment.has(flag::FIN)));
            let acknowledged = segment.sequence.wrapping_add(len).wrapping_add(ends_too);
            let reset = Header { acknowledged, flags: flag::RST | flag::ACK, ..Header::default() };
            let sure = Header { sequence: segment.acknowledged, flags: flag::RST, ..Header::default() };
            let header = if segment.has(flag::ACK) { sure } else { reset };
            Way::new(&mut self.outbox, mac, &key).send(header, 0, 0);
        }
    }

    /// The guest calls somebody; answers whether the call is being made.
    fn tcp_call(&mut self, mac: [u8; 6], key: Key, segment: &Segment<'_>) -> bool {
        let Some(to) = self.outside(Transport::Tcp, key.other) else {
            self.monitor.refused();
            return false;
        };
        if self.tcp.is_full() {
            self.monitor.full();
            return false;
        }
        let Ok(socket) = socket::connect_tcp(to) else { return false };
        let connection = Connection::called(segment, self.initial_sequence(), self.own_mss(&key));
        self.tcp_insert(mac, key, connection, socket)
    }

    /// Somebody outside calls the guest through a forward.
    pub(super) fn tcp_accept(&mut self, key: Key, socket: OwnedFd) {
        let connection = Connection::calling(self.initial_sequence(), self.own_mss(&key));
        if socket::prepare_tcp(&socket).is_ok() {
            self.tcp_insert(self.guest_mac, key, connection, socket);
        }
    }

    fn tcp_insert(&mut self, mac: [u8; 6], key: Key, connection: Connection, socket: OwnedFd) -> bool {
        let stream = TcpStream::new(socket);
        let flow = TcpFlow { mac, connection, stream, queued: false, timer: None };
        let Some(token) = self.tcp.insert(key, flow) else { return false };
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let Some((_, flow)) = self.tcp.get_mut(token) else { return false };
        if self.poll.add(&flow.stream, token, interest).is_err() {
            self.tcp.remove(token);
            return false;
        }
        self.monitor.opened();
        self.tcp_settle(token, Verdict::Keep);
        true
    }

    fn own_mss(&self, key: &Key) -> u16 {
        let headers = if key.guest.is_ipv4() { 40 } else { 60 };
        self.config.mtu.saturating_sub(headers).max(536)
    }

    /// The kernel says something of a connection's socket.
    pub(super) fn tcp_event(&mut self, token: Token, flags: EventFlags) {
        let Some((_, flow)) = self.tcp.get_mut(token) else { return };
        let broken = EventFlags::ERR | EventFlags::HUP;
        let mut verdict = Verdict::Keep;
        if flow.connection.state() == State::Connecting {
            if flags.intersects(broken) || flow.stream.error().is_err() {
                verdict = Verdict::Break;
            } else if flags.contains(EventFlags::OUT) {
                flow.connection.connected();
            }
        } else if flags.contains(EventFlags::ERR) {
            verdict = Verdict::Break;
        } else {
            if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP) {
                flow.connection.readable();
            }
            if flags.contains(EventFlags::OUT) {
                verdict = flow.connection.writable(&mut flow.stream, &mut self.budget);
            }
        }
        self.tcp_settle(token, verdict);
    }

    pub(super) fn tcp_due(&mut self, token: Token) {
        let now = self.now;
        let Some((_, flow)) = self.tcp.get_mut(token) else { return };
        flow.timer = None;
        let due = flow.connection.deadline().is_some_and(|at| at <= now);
        let verdict = if due { flow.connection.time_out(now) } else { Verdict::Keep };
        self.tcp_settle(token, verdict);
    }

    /// Sends what a connection has to send now.
    pub(super) fn tcp_work(&mut self, token: Token) {
        let now = self.now;
        let Some((key, flow)) = self.tcp.get_mut(token) else { return };
        flow.queued = false;
        let mut way = Way::new(&mut self.outbox, flow.mac, key);
        let verdict = flow.connection.advance(&mut flow.stream, &mut way, now);
        self.tcp_settle(token, verdict);
    }

    /// Does what a verdict says; remembers work and time-outs of those that are kept.
    fn tcp_settle(&mut self, token: Token, verdict: Verdict) {
        let Some((key, flow)) = self.tcp.get_mut(token) else { return };
        match verdict {
            Verdict::Keep => {
                if flow.connection.has_work() && !std::mem::replace(&mut flow.queued, true) {
                    self.ready.push_back(token);
                }
                if let Some(at) = flow.connection.deadline() {
                    self.timers.by(at, token, &mut flow.timer);
                }
                return;
            }
            Verdict::Done => {}
            Verdict::Break => {
                let header = flow.connection.reset();
                Way::new(&mut self.outbox, flow.mac, key).send(header, 0, 0);
                flow.stream.abort();
            }
            Verdict::Broken => flow.stream.abort(),
        }
        flow.connection.drop_pending(&mut self.budget);
        self.timers.cancel(token, &mut flow.timer);
        let queued = self.tcp.remove(token).is_some_and(|(_, flow)| flow.queued);
        self.unqueue(queued);
        self.monitor.closed();
    }
}

/// Tokens of connections.
pub(super) const KIND: Kind = Kind::Tcp;
