//! Echo requests of the guest's: answered here for the gateway, sent on through unprivileged sockets for others.

use super::Gateway;
use super::config::is_outside;
use super::flows::{Kind, Token};
use super::outbox::{Ends, Unreachable};
use super::socket;
use crate::wire::layers::Layers;
use crate::wire::{be16, put};
use rustix::event::epoll::EventFlags;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long replies are waited for.
const IDLE: Duration = Duration::from_secs(30);
/// The longest message.
const MESSAGE_MAX: usize = 65_507;
const TURN_MAX: usize = 16;

/// Types of messages (RFC 792, RFC 4443).
const ECHO4: u8 = 8;
const ECHO_REPLY4: u8 = 0;
const ECHO6: u8 = 128;
const ECHO_REPLY6: u8 = 129;

/// Who pings whom, with the guest's identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    guest: IpAddr,
    to: IpAddr,
    id: u16,
}

/// One run of echo requests.
#[derive(Debug)]
pub struct PingFlow {
    mac: [u8; 6],
    socket: OwnedFd,
    last: Instant,
    queued: bool,
    timer: Option<Instant>,
}

impl Gateway {
    /// An ICMP message of the guest's that is no neighbour discovery.
    pub(super) fn ping_input(&mut self, mac: [u8; 6], layers: &Layers, frame: &[u8]) {
        let message = frame.get(layers.transport..layers.end).unwrap_or_default();
        let v4 = layers.source.is_ipv4();
        let (asks, replies) = if v4 { (ECHO4, ECHO_REPLY4) } else { (ECHO6, ECHO_REPLY6) };
        let (&[kind, 0, _, _, ..], Some(id)) = (message, be16(message, 4)) else { return };
        if kind != asks || message.len() < 8 {
            return;
        }
        let ends = Ends { mac, from: layers.destination, to: layers.source };
        if self.network.is_gateway(layers.destination) || layers.destination == self.network.link_local {
            let mut reply = message.to_vec();
            put(&mut reply, 0, &[replies]);
            self.outbox.icmp(&ends, &mut reply);
            return;
        }
        let reachable = is_outside(layers.destination) && !self.network.on_link(layers.destination);
        let key = Key { guest: layers.source, to: layers.destination, id };
        let sent = reachable && self.ping_send(mac, key, message);
        if !sent {
            let why = if reachable { Unreachable::Prohibited } else { Unreachable::Host };
            self.complain(mac, layers, frame, why);
        }
    }

    fn ping_send(&mut self, mac: [u8; 6], key: Key, message: &[u8]) -> bool {
        let token = match self.ping.find(&key) {
            Some(token) => token,
            None => {
                if self.ping.is_full() {
                    self.ping_evict();
                }
                let Ok(socket) = socket::connect_ping(key.to) else { return false };
                let flow = PingFlow { mac, socket, last: self.now, queued: false, timer: None };
                let Some(token) = self.ping.insert(key, flow) else { return false };
                let Some((_, flow)) = self.ping.get_mut(token) else { return false };
                if self.poll.add(&flow.socket, token, EventFlags::IN | EventFlags::ET).is_err() {
                    self.ping.remove(token);
                    return false;
                }
                token
            }
        };
        let end = self.now.checked_add(IDLE).unwrap_or(self.now);
        let Some((_, flow)) = self.ping.get_mut(token) else { return false };
        flow.last = self.now;
        self.timers.by(end, token, &mut flow.timer);
        // The kernel puts in its own identifier and checksum.
        match socket::send(&flow.socket, message) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }

    fn ping_evict(&mut self) {
        let oldest = self.ping.iter().min_by_key(|(_, _, flow)| flow.last).map(|(token, _, _)| token);
        if let Some(token) = oldest {
            self.ping_remove(token);
        }
    }

    fn ping_remove(&mut self, token: Token) {
        if let Some((_, mut flow)) = self.ping.remove(token) {
            self.timers.cancel(token, &mut flow.timer);
            self.unqueue(flow.queued);
        }
    }

    pub(super) fn ping_event(&mut self, token: Token) {
        if let Some((_, flow)) = self.ping.get_mut(token)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.ready.push_back(token);
        }
    }

    /// Moves replies to the guest.
    pub(super) fn ping_work(&mut self, token: Token) {
        let Some((&key, flow)) = self.ping.get_mut(token) else { return };
        flow.queued = false;
        let ends = Ends { mac: flow.mac, from: key.to, to: key.guest };
        let replies = if key.to.is_ipv4() { ECHO_REPLY4 } else { ECHO_REPLY6 };
        for _ in 0..TURN_MAX {
            if !self.outbox.has_room() {
                break;
            }
            let mut message = vec![0; MESSAGE_MAX];
            match socket::receive(&flow.socket, &mut message) {
                Ok(len) => {
                    message.truncate(len);
                    if message.first() == Some(&replies) && len >= 8 {
                        put(&mut message, 4, &key.id.to_be_bytes());
                        self.outbox.icmp(&ends, &mut message);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {}
            }
        }
        flow.queued = true;
        self.ready.push_back(token);
    }

    pub(super) fn ping_due(&mut self, token: Token) {
        let now = self.now;
        let Some((_, flow)) = self.ping.get_mut(token) else { return };
        flow.timer = None;
        match flow.last.checked_add(IDLE) {
            Some(at) if at > now => self.timers.by(at, token, &mut flow.timer),
            _ => self.ping_remove(token),
        }
    }
}

/// Tokens of runs of echo requests.
pub(super) const KIND: Kind = Kind::Ping;
