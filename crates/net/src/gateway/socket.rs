//! Sockets of the host's.

use super::tcp::Stream;
use crate::sys;
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, ipproto};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Bytes that are read over where the kernel cannot peek at an offset.
const SKIP_MAX: usize = 256 << 10;
/// Bytes thrown away at a time.
const SCRATCH: usize = 1 << 20;
const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

fn family(of: IpAddr) -> AddressFamily {
    if of.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// A connection that is being made to `to`.
pub fn connect_tcp(to: SocketAddr) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(family(to.ip()), SocketType::STREAM, FLAGS, Some(ipproto::TCP))?;
    prepare_tcp(&socket)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// What holds for every connection: no delay of ours (the guest has its own), a sign of life now and then, and urgent bytes in their places
/// (RFC 6093, 3): Linux counts those that it leaves out as if they had been peeked at.
pub fn prepare_tcp(socket: impl AsFd) -> io::Result<()> {
    sockopt::set_socket_oobinline(&socket, true)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(sockopt::set_socket_keepalive(&socket, true)?)
}

/// A socket that exchanges datagrams with `to`.
pub fn connect_udp(to: SocketAddr) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(family(to.ip()), SocketType::DGRAM, FLAGS, Some(ipproto::UDP))?;
    // Without it, datagrams arrive one by one: slower, not wrong.
    let _ = sys::set_udp_gro(&socket);
    rustix::net::connect(&socket, &to)?;
    Ok(socket)
}

/// A socket that sends echo requests to `to` without privilege (ping_group_range, icmp(7)).
pub fn connect_ping(to: IpAddr) -> io::Result<OwnedFd> {
    let protocol = if to.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
    let socket = rustix::net::socket_with(family(to), SocketType::DGRAM, FLAGS, Some(protocol))?;
    rustix::net::connect(&socket, &SocketAddr::new(to, 0))?;
    Ok(socket)
}

/// A socket that listens, or takes datagrams, at `at`.
pub fn listen(at: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(family(at.ip()), kind, FLAGS, None)?;
    if kind == SocketType::STREAM {
        // Connections that have ended do not keep the port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &at)?;
    if kind == SocketType::STREAM {
        rustix::net::listen(&socket, 1024)?;
    }
    Ok(socket)
}

/// Where a socket is bound.
pub fn local_address(socket: impl AsFd) -> Option<SocketAddr> {
    SocketAddr::try_from(rustix::net::getsockname(socket).ok()?).ok()
}

/// The next connection of a listening socket, and who made it.
pub fn accept(socket: impl AsFd) -> io::Result<(OwnedFd, SocketAddr)> {
    let (connection, from) = rustix::net::acceptfrom_with(socket, FLAGS)?;
    let from = from.and_then(|from| SocketAddr::try_from(from).ok());
    Ok((connection, from.ok_or(io::ErrorKind::InvalidData)?))
}

/// The next datagram of an unconnected socket.
pub fn receive_from(socket: impl AsFd, into: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    let (len, _, from) = rustix::net::recvfrom(socket, into, RecvFlags::DONTWAIT)?;
    let from = from.and_then(|from| SocketAddr::try_from(from).ok());
    Ok((len, from.ok_or(io::ErrorKind::InvalidData)?))
}

/// Sends on a connected socket.
pub fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
}

/// Receives from a connected socket.
pub fn receive(socket: impl AsFd, into: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::net::recv(socket, into, RecvFlags::DONTWAIT)?.0)
}

/// The host's own address of a kind: from where it would reach the world.
pub fn own_address(v4: bool) -> Option<IpAddr> {
    // Addresses of documentation (RFC 5737, RFC 3849). Connecting sends nothing.
    let far: IpAddr = if v4 {
        Ipv4Addr::new(198, 51, 100, 1).into()
    } else {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()
    };
    let socket = connect_udp(SocketAddr::new(far, 9)).ok()?;
    local_address(&socket).map(|address| address.ip()).filter(|address| !address.is_loopback())
}

/// The host's end of a TCP connection.
#[derive(Debug)]
pub struct TcpStream {
    socket: OwnedFd,
    /// Where the kernel peeks next; `None`: it peeks at the beginning only (before Linux 6.9).
    offset: Option<u32>,
    peeks: bool,
}

impl TcpStream {
    pub fn new(socket: OwnedFd) -> Self {
        let peeks = sys::set_peek_offset(&socket, 0).is_ok();
        Self { socket, offset: peeks.then_some(0), peeks }
    }

    /// Breaks the connection: the other end is told that it did not end well.
    pub fn abort(&self) {
        let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    /// Why the connection failed, if it did.
    pub fn error(&self) -> Result<(), io::Error> {
        match sockopt::socket_error(&self.socket)? {
            Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn peek_over(&self, offset: usize, into: &mut [u8]) -> io::Result<usize> {
        let mut skipped = vec![0; offset];
        let mut parts = [IoSliceMut::new(&mut skipped), IoSliceMut::new(into)];
        let mut control = rustix::net::RecvAncillaryBuffer::default();
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let got = rustix::net::recvmsg(&self.socket, &mut parts, &mut control, flags)?.bytes;
        match got.checked_sub(offset) {
            Some(len) if len > 0 || got == 0 => Ok(len),
            // All there is was seen before. Whether that is the end shows only once it has been taken.
            _ if got > 0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(0),
        }
    }
}

impl AsFd for TcpStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Stream for TcpStream {
    fn peek(&mut self, offset: u32, into: &mut [u8]) -> io::Result<usize> {
        if !self.peeks {
            if offset as usize > SKIP_MAX {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            return self.peek_over(offset as usize, into);
        }
        if self.offset != Some(offset) {
            sys::set_peek_offset(&self.socket, i32::try_from(offset).unwrap_or(i32::MAX))?;
            self.offset = Some(offset);
        }
        let len = rustix::net::recv(&self.socket, into, RecvFlags::PEEK | RecvFlags::DONTWAIT)?.0;
        self.offset = self.offset.and_then(|offset| offset.checked_add(u32::try_from(len).ok()?));
        Ok(len)
    }

    fn discard(&mut self, len: u32) -> io::Result<bool> {
        // MSG_TRUNC takes bytes without copying them (tcp(7)), so nothing is ever written here.
        thread_local!(static SCRATCH_BYTES: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; SCRATCH]));
        let mut left = len as usize;
        while left > 0 {
            let got = SCRATCH_BYTES.with_borrow_mut(|scratch| {
                let part = scratch.get_mut(..left.min(SCRATCH)).unwrap_or_default();
                rustix::net::recv(&self.socket, part, RecvFlags::TRUNC | RecvFlags::DONTWAIT).map(|got| got.1)
            })?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left = left.saturating_sub(got);
        }
        // The kernel moves its place back by what was taken.
        self.offset = self.offset.map(|offset| offset.saturating_sub(len));
        Ok(!self.peeks)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send(&self.socket, bytes)
    }

    fn shutdown(&mut self) {
        // A connection that is gone already says so when it is read.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::net::{TcpListener, TcpStream as HostStream};
    use std::time::Instant;

    #[test]
    fn urgent_bytes_are_in_their_places() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::new(connect_tcp(listener.local_addr().unwrap()).unwrap());
        let far: HostStream = listener.accept().unwrap().0;
        let parts: [&[u8]; 4] = [&[b'a'; 100], b"!", &[b'b'; 100], b"c"];
        let (mut got, mut sent) = (Vec::new(), 0);
        for (number, part) in parts.into_iter().enumerate() {
            let flags = if number == 1 { SendFlags::OOB } else { SendFlags::empty() };
            sent += rustix::net::send(&far, part, flags).unwrap();
            // Nothing is discarded meanwhile: the guest has acknowledged nothing.
            let end = Instant::now() + Duration::from_secs(5);
            while got.len() < sent {
                assert!(Instant::now() < end, "{} of {sent}", got.len());
                let mut room = [0; 64];
                if let Ok(len) = stream.peek(got.len() as u32, &mut room) {
                    got.extend(&room[..len]);
                }
            }
        }
        assert_eq!(String::from_utf8(got).unwrap().as_bytes(), parts.concat());
    }
}
