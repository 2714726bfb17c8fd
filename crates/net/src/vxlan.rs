//! A VXLAN tunnel to one other host (RFC 7348): two switches as one segment, over UDP.
//!
//! Both ends have the same network identifier. What comes from another address, has another identifier, or no valid header is dropped
//! and counted; nothing proves who has sent it, as with everybody's VXLAN: the network between the two has to be trusted. Large segments
//! are cut and checksums completed before frames leave, since nobody on the way would. Packets that are longer than the way takes are
//! fragmented by the host's kernel.

use crate::batch::{Batch, FRAME_MAX, FRAME_MIN};
use crate::offload::{Checksum, Offload};
use crate::segment;
use crate::sys;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// The port that IANA gave it.
pub const PORT: u16 = 4789;
/// Bytes of its header.
const HEADER_LEN: usize = 8;
/// The identifier is valid.
const VALID: u8 = 8;
/// Bytes of the socket's buffers, where the host allows it.
const BUFFER: usize = 4 << 20;
/// Datagrams that are read at a time, whoever sent them: anybody may send what is not of this tunnel, as fast as it is thrown away.
const READS: usize = 32;

/// What a tunnel is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The other host, and its port.
    pub remote: SocketAddr,
    /// The network identifier: 24 bits.
    pub vni: u32,
    /// The own address and port; port 0 is any that is free.
    pub local: SocketAddr,
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option that cannot be.
    #[error(
        "{text:?} is no tunnel: ADDRESS[:PORT],vni=NUMBER[,local=ADDRESS[:PORT]], numbers up to 16777215"
    )]
    Text {
        /// As it was written.
        text: String,
    },
    /// The address cannot be had.
    #[error("cannot take UDP {local} for a tunnel: {source}; local=ADDRESS:PORT says another one")]
    Bind {
        /// Where.
        local: SocketAddr,
        /// The host's reason.
        source: io::Error,
    },
}

fn address(text: &str, port: u16) -> Option<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port)).or_else(|_| text.parse()).ok()
}

impl std::str::FromStr for Config {
    type Err = Error;

    /// `ADDRESS[:PORT],vni=NUMBER[,local=ADDRESS[:PORT]]`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let mut parts = text.split(',');
            let remote = address(parts.next()?, PORT)?;
            let any: IpAddr =
                if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let (mut vni, mut local) = (None, SocketAddr::new(any, PORT));
            for part in parts {
                match part.split_once('=')? {
                    ("vni", number) => vni = number.parse().ok().filter(|vni| *vni < 1 << 24),
                    ("local", own) => local = address(own, PORT)?,
                    _ => return None,
                }
            }
            let sound =
                remote.is_ipv4() == local.is_ipv4() && !remote.ip().is_unspecified() && remote.port() != 0;
            sound.then_some(Self { remote, vni: vni?, local })
        };
        parse().ok_or_else(|| Error::Text { text: text.to_owned() })
    }
}

/// One end of a tunnel.
#[derive(Debug)]
pub struct Vxlan {
    socket: OwnedFd,
    remote: SocketAddr,
    header: [u8; HEADER_LEN],
    /// Datagrams that were not of this tunnel.
    strange: AtomicU64,
}

impl Vxlan {
    /// Opens an end.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let wrong = |source: Errno| Error::Bind { local: config.local, source: source.into() };
        let v4 = config.local.is_ipv4();
        let family = if v4 { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None).map_err(wrong)?;
        if !v4 {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true).map_err(wrong)?;
        }
        // Less, where the host allows no more.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, BUFFER);
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, BUFFER);
        // Frames that are too long for the way go in parts, as the kernel's own tunnels send them.
        let (level, name) = if v4 {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
        } else {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
        };
        let _ = sys::set_option(&socket, level, name, libc::IP_PMTUDISC_DONT);
        rustix::net::bind(&socket, &config.local).map_err(wrong)?;
        let [_, a, b, c] = config.vni.to_be_bytes();
        let header = [VALID, 0, 0, 0, a, b, c, 0];
        Ok(Self { socket, remote: config.remote, header, strange: AtomicU64::new(0) })
    }

    /// Where it is bound.
    pub fn local(&self) -> Option<SocketAddr> {
        SocketAddr::try_from(rustix::net::getsockname(&self.socket).ok()?).ok()
    }

    /// Datagrams that were not of this tunnel.
    pub fn strange(&self) -> u64 {
        self.strange.load(Ordering::Relaxed)
    }

    /// Moves frames that have come into a batch while it has room, for a while; answers whether there may be more.
    pub(crate) fn take(&self, batch: &mut Batch) -> bool {
        let mut bytes = [0; FRAME_MAX];
        for _ in 0..READS {
            if !batch.has_room() {
                break;
            }
            let (len, from) = match rustix::net::recvfrom(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((len, _, from)) => (len, from.and_then(|from| SocketAddr::try_from(from).ok())),
                // What one sent came back as an error of ICMP: the other end is away, and may come.
                Err(Errno::INTR | Errno::CONNREFUSED) => continue,
                Err(_) => return false,
            };
            let datagram = bytes.get(..len).unwrap_or_default();
            // Senders choose their ports by flow (RFC 7348, 5).
            match frame(datagram, &self.header)
                .filter(|_| from.is_some_and(|from| from.ip() == self.remote.ip()))
            {
                Some(frame) => drop(batch.push(Offload::default(), &[frame])),
                None => {
                    self.strange.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        true
    }

    /// Sends one frame; answers whether the host took it, or never will.
    pub(crate) fn send(&self, offload: &Offload, frame: &[u8]) -> bool {
        let mut sent = true;
        let mut scratch = Vec::new();
        let mut put = |offload: Offload, piece: &mut [u8]| {
            if let Checksum::Partial { start, offset } = offload.checksum {
                segment::complete_checksum(piece, start, offset);
            }
            sent &= self.send_piece(piece);
        };
        match offload.segments {
            Some(segments) => {
                segment::cut(frame, segments, &mut scratch, &mut put);
                // Some pieces may be on their way already: the others are lost, as on any wire.
                true
            }
            None => {
                scratch.extend_from_slice(frame);
                put(*offload, &mut scratch);
                sent
            }
        }
    }

    fn send_piece(&self, frame: &[u8]) -> bool {
        let datagram = [&self.header, frame].concat();
        let sent = rustix::net::sendto(&self.socket, &datagram, SendFlags::DONTWAIT, &self.remote);
        !matches!(sent, Err(Errno::AGAIN))
    }
}

/// The frame in a datagram with this header.
fn frame<'a>(datagram: &'a [u8], header: &[u8; HEADER_LEN]) -> Option<&'a [u8]> {
    let (head, frame) = datagram.split_first_chunk::<HEADER_LEN>()?;
    // All other bits are to be ignored (RFC 7348, 5).
    let same = head.first()? & VALID != 0 && head.get(4..7) == header.get(4..7);
    (same && frame.len() >= FRAME_MIN).then_some(frame)
}

impl AsFd for Vxlan {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::offload::{SegmentKind, Segments};
    use proptest::prelude::*;

    #[test]
    fn tunnels_are_written_in_one_way() {
        let parse = |text: &str| {
            text.parse::<Config>()
                .ok()
                .map(|config| (config.remote.to_string(), config.vni, config.local.to_string()))
        };
        let is = |remote: &str, vni, local: &str| Some((remote.to_owned(), vni, local.to_owned()));
        assert_eq!(parse("10.0.0.2,vni=7"), is("10.0.0.2:4789", 7, "0.0.0.0:4789"));
        assert_eq!(
            parse("10.0.0.2:8472,vni=16777215,local=10.0.0.1:99"),
            is("10.0.0.2:8472", 0xff_ffff, "10.0.0.1:99")
        );
        assert_eq!(parse("[fd00::2]:1,vni=0"), is("[fd00::2]:1", 0, "[::]:4789"));
        assert_eq!(parse("fd00::2,vni=0,local=[fd00::1]"), is("[fd00::2]:4789", 0, "[fd00::1]:4789"));
        for bad in [
            "",
            "10.0.0.2",
            "10.0.0.2,vni=16777216",
            "name,vni=1",
            "10.0.0.2,vni=1,x=2",
            "10.0.0.2,vni=1,local=::1",
            "0.0.0.0,vni=1",
            "10.0.0.2:0,vni=1",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    /// Two ends on addresses of the loopback that nobody else has.
    fn ends(vnis: [u32; 2], own: u8) -> [Vxlan; 2] {
        let ip = |host| IpAddr::V4(Ipv4Addr::new(127, 77, own, host));
        let open = |host, other, vni| {
            let (remote, local) = (SocketAddr::new(ip(other), PORT), SocketAddr::new(ip(host), PORT));
            Vxlan::open(&Config { remote, vni, local }).unwrap()
        };
        [open(1, 2, vnis[0]), open(2, 1, vnis[1])]
    }

    #[test]
    fn strangers_do_not_hold_up_who_reads() {
        let [_, b] = ends([5, 5], 9);
        let stranger = std::net::UdpSocket::bind("127.77.9.3:0").unwrap();
        for _ in 0..100 {
            stranger.send_to(&[1; 60], "127.77.9.2:4789").unwrap();
        }
        let mut batch = Batch::new(64, 1 << 20);
        for turn in 1..=3 {
            assert!(b.take(&mut batch));
            assert_eq!((b.strange(), batch.len()), (turn * READS as u64, 0));
        }
        assert!(!b.take(&mut batch));
        assert_eq!(b.strange(), 100);
    }

    fn taken(end: &Vxlan) -> Vec<Vec<u8>> {
        let mut batch = Batch::new(64, 1 << 20);
        assert!(!end.take(&mut batch));
        batch.iter().map(|(_, frame)| frame.to_vec()).collect()
    }

    #[test]
    fn frames_come_out_as_they_went_in_and_strangers_do_not() {
        let [a, b] = ends([5, 5], 1);
        let long: Vec<u8> = (0..9000u32).map(|byte| byte as u8).collect();
        assert!(a.send(&Offload::default(), &[7; 60]) && a.send(&Offload::default(), &long));
        assert_eq!(taken(&b), [vec![7; 60], long]);
        assert!(b.send(&Offload::default(), &[9; 14]));
        assert_eq!(taken(&a), [vec![9; 14]]);
        let stranger = std::net::UdpSocket::bind("127.77.1.3:0").unwrap();
        stranger.send_to(&[&a.header[..], &[1; 60]].concat(), "127.77.1.2:4789").unwrap();
        // Too short for a frame.
        assert!(a.send(&Offload::default(), &[7; 13]));
        assert_eq!((taken(&b), b.strange()), (vec![], 2));
        let [a, b] = ends([5, 6], 2);
        assert!(a.send(&Offload::default(), &[7; 60]));
        assert_eq!((taken(&b), b.strange()), (vec![], 1), "another network's");
    }

    #[test]
    fn large_segments_are_cut_and_checksums_completed() {
        let [a, b] = ends([5, 5], 3);
        let mut frame = [2; 12].to_vec();
        frame.extend([8, 0, 0x45, 0, 11, 224, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0; 12]);
        frame.extend([0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        frame.resize(54 + 3000, 1);
        let segments = Segments { kind: SegmentKind::Tcp4, size: 1460, ecn: false, headers: 54 };
        let offload =
            Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, segments: Some(segments) };
        assert!(a.send(&offload, &frame));
        let frames = taken(&b);
        assert_eq!(frames.iter().map(Vec::len).collect::<Vec<_>>(), [1514, 1514, 134]);
        for frame in frames {
            let body = &frame[34..];
            let (from, to) = (Ipv4Addr::new(10, 0, 0, 1).into(), Ipv4Addr::new(10, 0, 0, 2).into());
            let sum = crate::wire::checksum::Sum::default().pseudo(from, to, 6, body.len()).add(body);
            assert_eq!(sum.checksum(), 0);
        }
    }

    proptest! {
        #[test]
        fn only_datagrams_of_the_network_are_frames(bytes in prop::collection::vec(any::<u8>(), 0..60), flags: u8) {
            let header = [VALID, 0, 0, 0, 1, 2, 3, 0];
            prop_assert!(frame(&bytes, &header).is_none_or(|_| bytes[4..7] == [1, 2, 3]));
            let mut own = [&header[..], &bytes].concat();
            own[0] = flags;
            let whole = flags & VALID != 0 && bytes.len() >= FRAME_MIN;
            prop_assert_eq!(frame(&own, &header), whole.then_some(bytes.as_slice()));
        }
    }
}
