//! Entry points for fuzzers: a gateway whose guest sends whatever bytes say, and one TCP connection.
//!
//! The gateway has no room for flows, so that nothing leaves this host: what is fuzzed is everything up to the sockets, and what
//! the gateway answers itself. What happens behind a connection is fuzzed with a socket in memory.

use super::tcp::header::{Header, Segment, flag};
use super::tcp::{Budget, Connection, Link, Stream, Verdict};
use super::*;
use crate::wire::put;
use std::io;

/// Frames that the gateway understands; bytes then change them.
fn template(kind: u8, network: &Network) -> Vec<u8> {
    let mut frame = config::GATEWAY_MAC.to_vec();
    frame.extend([2, 0, 0, 0, 0, 9]);
    let ports: [u8; 4] = match kind & 7 {
        0 => {
            frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 9]);
            frame.extend(network.guest4.octets());
            frame.extend([0; 6]);
            frame.extend(network.gateway4.octets());
            return frame;
        }
        1 => [0, 68, 0, 67],
        2 => [2, 34, 2, 35],
        3 => [9, 9, 0, 53],
        _ => [9, 9, 0, 80],
    };
    let protocol = match kind >> 3 & 3 {
        _ if kind & 7 < 4 => protocol::UDP,
        0 => protocol::TCP,
        1 => protocol::UDP,
        _ if kind & 0x80 == 0 => protocol::ICMP,
        _ => protocol::ICMPV6,
    };
    if kind & 0x80 == 0 {
        let fragment = if kind & 0x60 == 0x60 { 0x20 } else { 0 };
        frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, fragment, 0, 64, protocol, 0, 0]);
        frame.extend(network.guest4.octets());
        frame.extend(network.gateway4.octets());
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, protocol, 255]);
        frame.extend(network.guest6.octets());
        frame.extend(network.gateway6.octets());
    }
    frame.extend(ports);
    frame
}

/// Plays frames on a gateway. Everything that it answers must be a sound frame.
pub fn fuzz_gateway(data: &[u8]) {
    thread_local!(static GATEWAY: std::cell::RefCell<Option<Gateway>> = const { std::cell::RefCell::new(None) });
    GATEWAY.with_borrow_mut(|slot| {
        let fresh = || {
            let config = Config { flows_max: 0, ..Config::new([2, 0, 0, 0, 0, 9]) };
            let mut gateway = Gateway::new(config).ok()?;
            gateway.resolvers = Resolvers::new("/nonexistent");
            Some(gateway)
        };
        if slot.is_none() {
            *slot = fresh();
        }
        let Some(gateway) = slot else { return };
        let mut rest = data;
        while let Some((&[kind, len, whole], after)) = rest.split_first_chunk::<3>() {
            let (bytes, after) = after.split_at(usize::from(len).min(after.len()));
            rest = after;
            let mut frame = template(kind, &gateway.network);
            let start = frame.len();
            // Behind the headers, or over them.
            if whole & 1 == 0 {
                frame.extend_from_slice(bytes);
            } else {
                put(&mut frame, usize::from(whole >> 1).checked_rem(start).unwrap_or(0), bytes);
            }
            if whole & 2 == 0 {
                lengths(&mut frame);
            }
            // A checksum that was left to be completed is not looked at.
            let checksum = crate::Checksum::Partial { start: 34, offset: 16 };
            gateway.input(Offload { checksum, segments: None }, &frame);
            if whole & 4 != 0 && be16(&frame, 12) == Some(ether::IPV4) {
                // The same from another guest, whose process says of it what it likes.
                let said = rest.first_chunk::<10>().copied().unwrap_or_default();
                let packet = frame.get(ether::LEN..).unwrap_or_default();
                gateway.peer_input(whole, &[&peers::MAGIC[..], &said, packet].concat());
                gateway.peer_input(kind, bytes);
            }
            gateway.run_flush();
            for (_, frame) in gateway.outbox.batch.iter() {
                let ip = matches!(be16(frame, 12), Some(ether::IPV4 | ether::IPV6));
                assert!(!ip || layers::parse(frame, true).is_some_and(|layers| layers.end == frame.len()));
            }
            gateway.outbox.batch.clear();
        }
        assert!(gateway.leases.len() <= leases::LEASES_MAX && gateway.ready.is_empty());
    });
}

/// Writes the lengths that a frame has into its headers.
fn lengths(frame: &mut [u8]) {
    let word = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    let len = frame.len();
    match be16(frame, 12) {
        Some(ether::IPV4) => {
            put(frame, 16, &word(len.saturating_sub(14)));
            put(frame, 38, &word(len.saturating_sub(34)));
        }
        Some(ether::IPV6) => {
            put(frame, 18, &word(len.saturating_sub(54)));
            put(frame, 58, &word(len.saturating_sub(54)));
        }
        _ => {}
    }
}

/// A socket in memory, and the way to the guest.
struct Ends {
    left: u32,
    room: usize,
    frames: usize,
    scratch: Vec<u8>,
    sent: u64,
}

impl Stream for Ends {
    fn peek(&mut self, offset: u32, into: &mut [u8]) -> io::Result<usize> {
        let len = self.left.checked_sub(offset).ok_or(io::ErrorKind::WouldBlock)?;
        Ok(into.len().min(len as usize))
    }

    fn discard(&mut self, len: u32) -> io::Result<bool> {
        assert!(len <= self.left, "more is taken than was there");
        self.left = self.left.saturating_sub(len);
        Ok(false)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.room);
        self.room = self.room.saturating_sub(len);
        if len == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(len) }
    }

    fn shutdown(&mut self) {}
}

struct Wire<'a>(&'a mut usize, &'a mut Vec<u8>, &'a mut u64);

impl Link for Wire<'_> {
    fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        assert!(len > 0 && len < 65_536, "a segment of {len} bytes");
        self.1.resize(len, 0);
        (*self.0 > 0).then_some(self.1.as_mut_slice())
    }

    fn send(&mut self, _: Header, len: usize, _: u16) -> bool {
        let room = *self.0 > 0;
        *self.0 = self.0.saturating_sub(1);
        *self.2 = self.2.saturating_add(len as u64);
        room
    }
}

/// Plays segments on one connection. Its memory is bounded by its budget, which it gives back.
pub fn fuzz_tcp(data: &[u8]) {
    const BUDGET: usize = 5000;
    let Some((&[first, scale, mss_high, mss_low], rest)) = data.split_first_chunk::<4>() else { return };
    let now = Instant::now();
    let mut ends = Ends { left: 20_000, room: 1000, frames: 0, scratch: Vec::new(), sent: 0 };
    let mut budget = Budget::new(BUDGET);
    let mss = u16::from_be_bytes([mss_high, mss_low]);
    let call = Segment {
        sequence: 1000,
        acknowledged: 0,
        flags: flag::SYN,
        window: 3000,
        mss: Some(mss),
        scale: Some(scale),
        payload: &[],
    };
    let mut connection =
        if first & 1 == 0 { Connection::called(&call, 5000, mss) } else { Connection::calling(5000, mss) };
    let payload = [7; 1024];
    for action in rest.chunks_exact(8) {
        let &[kind, flags, s_high, s_low, a_high, a_low, window, len] = action else { continue };
        let near = |high, low| u32::from(u16::from_be_bytes([high, low]));
        let segment = Segment {
            sequence: near(s_high, s_low).wrapping_add(if kind & 1 == 0 { 1001 } else { 900 }),
            acknowledged: 5001u32.wrapping_add(if kind & 2 == 0 { near(a_high, a_low) } else { 0 }),
            flags,
            window: u16::from(window) << 6,
            payload: payload.get(..usize::from(len) << 2).unwrap_or_default(),
            ..call
        };
        ends.frames = usize::from(kind >> 6);
        let mut verdict = match kind >> 2 & 7 {
            0 => {
                connection.connected();
                Verdict::Keep
            }
            1 => {
                ends.room = 700;
                connection.writable(&mut ends, &mut budget)
            }
            2 => connection.time_out(now),
            3 => {
                connection.readable();
                Verdict::Keep
            }
            _ => connection.receive(&segment, &mut ends, &mut budget, now),
        };
        if verdict == Verdict::Keep {
            let (mut frames, mut scratch) = (ends.frames, std::mem::take(&mut ends.scratch));
            let mut sent = ends.sent;
            let mut wire = Wire(&mut frames, &mut scratch, &mut sent);
            verdict = connection.advance(&mut ends, &mut wire, now);
            (ends.scratch, ends.sent) = (scratch, sent);
        }
        if verdict != Verdict::Keep {
            break;
        }
    }
    connection.drop_pending(&mut budget);
    assert_eq!(format!("{budget:?}"), format!("{:?}", Budget::new(BUDGET)));
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn bytes_never_break_a_gateway(data in prop::collection::vec(any::<u8>(), 0..1500)) {
            fuzz_gateway(&data);
            fuzz_tcp(&data);
        }
    }

    /// The fuzzer is of use only if what it sends is understood.
    #[test]
    fn templates_are_answered() {
        let config = Config { flows_max: 0, ..Config::new([2, 0, 0, 0, 0, 9]) };
        let mut gateway = Gateway::new(config).unwrap();
        let mut answers = |kind: u8, bytes: &[u8]| {
            let mut frame = template(kind, &gateway.network);
            frame.extend(bytes);
            lengths(&mut frame);
            let checksum = crate::Checksum::Partial { start: 34, offset: 16 };
            gateway.input(Offload { checksum, segments: None }, &frame);
            let count = gateway.outbox.batch.len();
            gateway.outbox.batch.clear();
            count
        };
        assert_eq!(answers(0, &[]), 1, "ARP");
        let mut question = vec![0, 0, 0, 0, 7, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        question.extend(b"\x04host\x04yado\x00\x00\x01\x00\x01");
        assert_eq!(answers(3, &question), 1, "DNS");
        assert_eq!(answers(0x83, &question), 1, "DNS over IPv6");
        assert_eq!(answers(4, &[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 1, 0, 0, 0, 0, 0]), 1, "a reset");
    }
}
