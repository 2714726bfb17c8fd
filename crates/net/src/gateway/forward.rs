//! Ports of the host that lead into the guest.

use super::Gateway;
use super::config::{Error, Forward, Transport, is_outside};
use super::flows::{Kind, Token};
use super::socket;
use super::splice::Key;
use rustix::event::epoll::EventFlags;
use rustix::net::SocketType;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Connections and datagrams that one turn of a listener takes.
const TURN_MAX: usize = 64;
/// Other ports that are tried when the client's own is taken by another client.
const PORTS_TRIED: u16 = 64;

/// What accept(2) says when there is too little of something, and when those that wait are looked at again then.
const SCARCE: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A forward with its socket.
#[derive(Debug)]
pub struct Listener {
    forward: Forward,
    socket: OwnedFd,
    queued: bool,
}

/// Listens at all of `forwards`, or says which cannot be.
pub fn listen(forwards: &[Forward]) -> Result<Vec<Listener>, Error> {
    let open = |forward: &Forward| {
        let kind = match forward.transport {
            Transport::Tcp => SocketType::STREAM,
            Transport::Udp => SocketType::DGRAM,
        };
        let socket = socket::listen(forward.listen, kind).map_err(|source| Error::Listen {
            transport: forward.transport,
            address: forward.listen,
            source,
        })?;
        let listen = socket::local_address(&socket).unwrap_or(forward.listen);
        Ok(Listener { forward: Forward { listen, ..*forward }, socket, queued: false })
    };
    forwards.iter().map(open).collect()
}

impl Gateway {
    /// The forwards, with the ports that the host chose.
    pub fn forwards(&self) -> Vec<Forward> {
        self.listeners.iter().map(|listener| listener.forward).collect()
    }

    pub(super) fn poll_listeners(&mut self) -> rustix::io::Result<()> {
        for (index, listener) in (0u32..).zip(&self.listeners) {
            let token = Token::new(Kind::Listener, index);
            self.poll.add(&listener.socket, token, EventFlags::IN | EventFlags::ET)?;
        }
        Ok(())
    }

    pub(super) fn listener_event(&mut self, token: Token) {
        if let Some(listener) = self.listeners.get_mut(token.index as usize)
            && !std::mem::replace(&mut listener.queued, true)
        {
            self.ready.push_back(token);
        }
    }

    /// Looks again for connections for which there were no files.
    pub(super) fn accept_again(&mut self) {
        self.accept_again_at = None;
        for (index, listener) in (0u32..).zip(0..self.listeners.len()) {
            let tcp = |listener: &Listener| listener.forward.transport == Transport::Tcp;
            if self.listeners.get(listener).is_some_and(tcp) {
                self.listener_event(Token::new(Kind::Listener, index));
            }
        }
    }

    /// Takes what has come to a listener.
    pub(super) fn listener_work(&mut self, token: Token) {
        let Some(listener) = self.listeners.get_mut(token.index as usize) else { return };
        listener.queued = false;
        let transport = listener.forward.transport;
        for _ in 0..TURN_MAX {
            let done = match transport {
                Transport::Tcp => self.take_connection(token.index),
                Transport::Udp if !self.outbox.has_room() => break,
                Transport::Udp => self.take_datagram(token.index),
            };
            if done.is_none() {
                return;
            }
        }
        self.listener_event(token);
    }

    fn take_connection(&mut self, index: u32) -> Option<()> {
        let listener = self.listeners.get(index as usize)?;
        let port = listener.forward.port;
        match socket::accept(&listener.socket) {
            Ok((socket, client)) => {
                // A connection too many is closed again, which the client sees.
                if let Some(key) = self.key_for(client, port, |gateway, key| gateway.tcp.find(key).is_some())
                {
                    self.tcp_accept(key, socket);
                }
                Some(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            // Nothing will say when the host has files, or memory, again.
            Err(error) if error.raw_os_error().is_some_and(|error| SCARCE.contains(&error)) => {
                self.accept_again_at = self.now.checked_add(ACCEPT_AGAIN);
                None
            }
            Err(_) => Some(()),
        }
    }

    fn take_datagram(&mut self, index: u32) -> Option<()> {
        let listener = self.listeners.get(index as usize)?;
        let port = listener.forward.port;
        let mut bytes = vec![0; 65_507];
        match socket::receive_from(&listener.socket, &mut bytes) {
            Ok((len, client)) => {
                let key = self.key_for(client, port, |gateway, key| gateway.udp_taken(key, client))?;
                self.udp_forwarded(index, key, client, bytes.get(..len).unwrap_or_default());
                Some(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(_) => Some(()),
        }
    }

    /// How the guest sees a client: as itself where its answers find their way back, else as the gateway.
    fn key_for(
        &mut self,
        client: SocketAddr,
        port: u16,
        taken: impl Fn(&mut Self, &Key) -> bool,
    ) -> Option<Key> {
        let itself = client.is_ipv4() && is_outside(client.ip()) && !self.network.on_link(client.ip());
        let ip = if itself { client.ip() } else { self.network.gateway4.into() };
        let guest = SocketAddr::new(self.network.guest4.into(), port);
        (0..PORTS_TRIED).find_map(|more| {
            let other = SocketAddr::new(ip, client.port().wrapping_add(more).max(1));
            let key = Key { guest, other };
            (!taken(self, &key)).then_some(key)
        })
    }

    /// Sends a datagram of the guest's back to a client.
    pub(super) fn forward_send(&mut self, index: u32, client: SocketAddr, payload: &[u8]) {
        if let Some(listener) = self.listeners.get(index as usize) {
            let flags = rustix::net::SendFlags::DONTWAIT;
            // Lost if the socket is full, as on any wire.
            let _ = rustix::net::sendto(&listener.socket, payload, flags, &client);
        }
    }

    /// Where in the world something of the guest's goes; `None`: nowhere.
    pub(super) fn outside(&mut self, transport: Transport, other: SocketAddr) -> Option<SocketAddr> {
        let (ip, port) = (other.ip(), other.port());
        if !self.network.is_gateway(ip) {
            return (port != 0 && is_outside(ip) && !self.network.on_link(ip)).then_some(other);
        }
        if port == super::dns::PORT {
            let first = self.resolvers.first(self.now).map(|(_, server)| server);
            // Questions by datagram never come here.
            return first.filter(|_| transport == Transport::Tcp);
        }
        let host = if self.config.host_loopback {
            let loopback: IpAddr =
                if ip.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            Some(loopback)
        } else {
            socket::own_address(ip.is_ipv4())
        };
        host.map(|host| SocketAddr::new(host, port))
    }

    /// Datagrams that the gateway answers itself; answers whether this is one.
    pub(super) fn local_service(&mut self, mac: [u8; 6], key: &Key, payload: &[u8]) -> bool {
        if !self.network.is_gateway(key.other.ip()) || key.other.port() != super::dns::PORT {
            return false;
        }
        let (peers, network, now) = (&mut self.peers, self.network, self.now);
        let mut guest = |name: &str| peers.as_mut()?.find(name, &network, now);
        match super::dns::answer(payload, &network, &mut guest) {
            Some(reply) => {
                let ends = super::outbox::Ends { mac, from: key.other.ip(), to: key.guest.ip() };
                self.outbox.datagram(&ends, (key.other.port(), key.guest.port()), &reply);
            }
            None => self.ask(mac, *key, payload),
        }
        true
    }
}
