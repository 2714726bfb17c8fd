//! A connection between a guest that follows RFC 9293 and a socket in memory, over a link that loses, repeats and delays.

use super::connection::*;
use super::header::{Header, Segment, flag};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

/// A socket: what the far end has sent, and what it was sent.
#[derive(Default)]
struct Socket {
    inbound: Vec<u8>,
    inbound_end: bool,
    taken: usize,
    outbound: Vec<u8>,
    /// Bytes that it takes at once, then not before it is told.
    room: usize,
    shut: bool,
}

impl Stream for Socket {
    fn peek(&mut self, offset: u32, into: &mut [u8]) -> io::Result<usize> {
        let rest = &self.inbound[self.taken + offset as usize..];
        if rest.is_empty() {
            return if self.inbound_end { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn discard(&mut self, len: u32) -> io::Result<bool> {
        self.taken += len as usize;
        assert!(self.taken <= self.inbound.len());
        Ok(false)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        assert!(!self.shut);
        let len = bytes.len().min(self.room);
        if len == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room -= len;
        self.outbound.extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn shutdown(&mut self) {
        assert!(!self.shut);
        self.shut = true;
    }
}

/// A segment on the link, either way.
#[derive(Debug, Clone)]
struct Packet {
    header: Header,
    payload: Vec<u8>,
}

impl Packet {
    fn segment(&self) -> Segment<'_> {
        Segment {
            sequence: self.header.sequence,
            acknowledged: self.header.acknowledged,
            flags: self.header.flags,
            window: self.header.window,
            mss: self.header.options.map(|options| options.0),
            scale: self.header.options.and_then(|options| options.1),
            payload: &self.payload,
        }
    }
}

/// The way to the guest, with room for so many segments at a time.
struct Wire {
    packets: VecDeque<Packet>,
    room: usize,
    scratch: Vec<u8>,
}

impl Link for Wire {
    fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.scratch.resize(len, 0);
        (self.room > 0).then_some(&mut self.scratch[..])
    }

    fn send(&mut self, header: Header, len: usize, _mss: u16) -> bool {
        if self.room == 0 {
            return false;
        }
        self.room -= 1;
        self.packets.push_back(Packet { header, payload: self.scratch[..len].to_vec() });
        true
    }
}

/// The guest's TCP: go back to the first byte that is not acknowledged whenever it times out.
struct Guest {
    initial: u32,
    send: Vec<u8>,
    /// Numbers acknowledged and sent, from the SYN on.
    acknowledged: u32,
    sent: u32,
    window: u32,
    open: bool,
    expected: u32,
    received: Vec<u8>,
    other_end: bool,
    buffer: u32,
    mss: u16,
}

const SCALE: u8 = 2;

impl Guest {
    fn packet(&self, from: u32, len: u32, flags: u8) -> Packet {
        let start = (from.max(1) as usize - 1).min(self.send.len());
        let data = &self.send[start..][..len as usize];
        let syn = flags & flag::SYN != 0;
        let window = self.buffer.min(if syn { 65535 } else { 65535 << SCALE });
        let header = Header {
            sequence: self.initial.wrapping_add(from),
            acknowledged: self.expected,
            flags: if self.open { flags | flag::ACK } else { flags },
            window: if syn { window as u16 } else { (window >> SCALE) as u16 },
            options: syn.then_some((self.mss, Some(SCALE))),
        };
        Packet { header, payload: data.to_vec() }
    }

    /// What it sends now: all that the window lets it, then its end.
    fn output(&mut self, out: &mut VecDeque<Packet>) {
        if !self.open {
            out.push_back(self.packet(0, 0, flag::SYN));
            self.sent = 1;
            return;
        }
        let total = self.send.len() as u32;
        while self.sent <= total && self.sent - self.acknowledged < self.window {
            let room = self.window - (self.sent - self.acknowledged);
            let len = (total + 1 - self.sent).min(room).min(self.mss.into());
            if len == 0 {
                break;
            }
            out.push_back(self.packet(self.sent, len, flag::PSH));
            self.sent += len;
        }
        if self.sent == total + 1 {
            out.push_back(self.packet(self.sent, 0, flag::FIN));
            self.sent += 1;
        }
    }

    fn input(&mut self, packet: &Packet, out: &mut VecDeque<Packet>) {
        let segment = packet.segment();
        assert!(!segment.has(flag::RST), "nobody resets");
        if segment.has(flag::SYN) {
            if !self.open {
                self.open = true;
                self.expected = segment.sequence.wrapping_add(1);
                assert!(segment.payload.is_empty());
            }
            self.acknowledged = self.acknowledged.max(1);
            self.sent = self.sent.max(1);
            self.window = self.window.max(segment.window.into());
            out.push_back(self.packet(self.sent, 0, 0));
            return;
        }
        let number = segment.acknowledged.wrapping_sub(self.initial);
        assert!(number <= self.send.len() as u32 + 2, "acknowledges what was never sent");
        if number >= self.acknowledged {
            self.acknowledged = number;
            self.sent = self.sent.max(number);
            self.window = u32::from(segment.window) << 7;
        }
        let fresh = self.expected.wrapping_sub(segment.sequence) as usize;
        if let Some(fresh) = segment.payload.get(fresh..) {
            assert!(fresh.len() as u32 <= self.buffer, "more than the window");
            self.received.extend_from_slice(fresh);
            self.expected = self.expected.wrapping_add(fresh.len() as u32);
        }
        let end = segment.sequence.wrapping_add(segment.payload.len() as u32);
        if segment.has(flag::FIN) && end == self.expected && !self.other_end {
            self.other_end = true;
            self.expected = self.expected.wrapping_add(1);
        }
        if !segment.payload.is_empty() || segment.has(flag::FIN) || segment.sequence != self.expected {
            out.push_back(self.packet(self.sent, 0, 0));
        }
    }

    fn done(&self) -> bool {
        self.other_end && self.acknowledged == self.send.len() as u32 + 2
    }
}

/// What happens to a packet on the link.
fn weather(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed % 100
}

struct Setup {
    up: usize,
    down: usize,
    buffer: u32,
    mss: u16,
    loss: u64,
    called: bool,
    seed: u64,
    initial: u32,
}

/// Plays a connection to its end; both sides must have what the other sent.
fn play(setup: &Setup) -> Result<(), String> {
    let mut seed = setup.seed | 1;
    let bytes = |len: usize, salt: usize| (0..len).map(|i| (i * 31 + salt) as u8).collect::<Vec<_>>();
    let (mut socket, mut budget) = (Socket { room: 5000, ..Socket::default() }, Budget::new(100_000));
    socket.inbound = bytes(setup.down, 1);
    socket.inbound_end = true;
    let mut guest = Guest {
        initial: setup.initial,
        send: bytes(setup.up, 2),
        acknowledged: 0,
        sent: 0,
        window: 0,
        open: false,
        expected: 0,
        received: vec![],
        other_end: false,
        buffer: setup.buffer,
        mss: setup.mss,
    };
    let mut now = Instant::now();
    let mut wire = Wire { packets: VecDeque::new(), room: 3, scratch: vec![] };
    let mut up = VecDeque::new();
    let mut connection =
        if setup.called { None } else { Some(Connection::calling(setup.initial ^ 0xffff, 1460)) };
    for turn in 0..6000 {
        if (setup.called || guest.open) && turn % 3 == 0 {
            if turn % 12 == 0 {
                // Its timer: back to what is not acknowledged.
                guest.sent = guest.acknowledged.max(u32::from(guest.open));
            }
            guest.output(&mut up);
        }
        for packet in std::mem::take(&mut up) {
            let luck = weather(&mut seed);
            if luck < setup.loss {
                continue;
            }
            let copies = if luck > 100 - setup.loss / 2 { 2 } else { 1 };
            for _ in 0..copies {
                let Some(connection) = connection.as_mut() else {
                    connection = Some(Connection::called(&packet.segment(), setup.initial ^ 0xffff, 1460));
                    continue;
                };
                let verdict = connection.receive(&packet.segment(), &mut socket, &mut budget, now);
                if !matches!(verdict, Verdict::Keep | Verdict::Done) {
                    return Err(format!("{verdict:?} at turn {turn}: {packet:?} {connection:?}"));
                }
            }
        }
        let Some(connection) = connection.as_mut() else { continue };
        if turn >= 5 {
            connection.connected();
        }
        if weather(&mut seed) < 30 {
            socket.room = 3000;
            connection.writable(&mut socket, &mut budget);
        }
        wire.room = 3;
        let verdict = connection.advance(&mut socket, &mut wire, now);
        for packet in std::mem::take(&mut wire.packets) {
            let luck = weather(&mut seed);
            if luck >= setup.loss {
                if !setup.called && packet.header.flags & flag::SYN != 0 && !guest.open {
                    // The guest answers a call.
                    guest.open = true;
                    guest.expected = packet.header.sequence.wrapping_add(1);
                    guest.acknowledged = 0;
                }
                if !setup.called && packet.header.flags & flag::SYN != 0 {
                    guest.sent = guest.sent.max(1);
                    up.push_back(guest.packet(0, 0, flag::SYN | flag::ACK));
                    continue;
                }
                guest.input(&packet, &mut up);
            }
        }
        let over = guest.done() && socket.shut;
        if over && (verdict == Verdict::Done || turn % 50 == 49) {
            assert_eq!(socket.outbound, guest.send);
            assert_eq!(guest.received, socket.inbound);
            return Ok(());
        }
        now += Duration::from_millis(50);
        if connection.deadline().is_some_and(|at| at <= now) {
            let verdict = connection.time_out(now);
            if verdict != Verdict::Keep {
                return Err(format!("given up: {connection:?}"));
            }
        }
    }
    Err(format!("no end: {connection:?}, guest has {} of {}", guest.received.len(), setup.down))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_byte_arrives_once_and_in_order(
        up in 0usize..40_000, down in 0usize..40_000, buffer in 300u32..100_000, mss in 100u16..2000,
        loss in 0u64..12, called: bool, seed: u64, initial: u32,
    ) {
        let setup = Setup { up, down, buffer, mss, loss, called, seed, initial };
        let result = play(&setup);
        prop_assert!(result.is_ok(), "{}", result.unwrap_err());
    }

    /// Whatever both sides say that they take.
    #[test]
    fn segments_of_all_sizes_have_bytes(theirs: u16, ours: u16, window: u16) {
        let call = Packet {
            header: Header { flags: flag::SYN, window, options: Some((theirs, Some(7))), ..Header::default() },
            payload: vec![],
        };
        let now = Instant::now();
        let mut socket = Socket { inbound: vec![1; 9], inbound_end: true, ..Socket::default() };
        let mut wire = Wire { packets: VecDeque::new(), room: 9, scratch: vec![] };
        let mut connection = Connection::called(&call.segment(), 0, ours);
        connection.connected();
        connection.advance(&mut socket, &mut wire, now);
        let answer = Header { sequence: 1, acknowledged: 1, flags: flag::ACK, window: 9, ..Header::default() };
        let packet = Packet { header: answer, payload: vec![] };
        connection.receive(&packet.segment(), &mut socket, &mut Budget::new(0), now);
        connection.advance(&mut socket, &mut wire, now);
        prop_assert_eq!(wire.packets[1].payload.len(), 9);
    }

    /// A guest that has a connection of the same ports from before hears that it is over, and then answers our call.
    #[test]
    fn a_connection_from_before_is_reset(number: u32, initial: u32) {
        let now = Instant::now();
        let mut socket = Socket::default();
        let mut wire = Wire { packets: VecDeque::new(), room: 1, scratch: vec![] };
        let mut budget = Budget::new(0);
        let mut connection = Connection::calling(initial, 1460);
        connection.advance(&mut socket, &mut wire, now);
        let call = wire.packets.pop_front().unwrap().header;
        prop_assert_eq!((call.flags, call.sequence), (flag::SYN, initial));
        let said = |acknowledged, flags| {
            let header = Header { sequence: 7, acknowledged, flags, window: 99, options: None };
            Packet { header, payload: vec![] }
        };
        let ours = initial.wrapping_add(1);
        prop_assume!(number != ours);
        connection.receive(&said(number, flag::ACK).segment(), &mut socket, &mut budget, now);
        // There is no room, then there is.
        connection.advance(&mut socket, &mut wire, now);
        prop_assert!(connection.has_work() && wire.packets.is_empty());
        wire.room = 9;
        connection.advance(&mut socket, &mut wire, now);
        let reset = wire.packets.pop_front().unwrap().header;
        prop_assert_eq!((reset.flags, reset.sequence), (flag::RST, number));
        prop_assert!(!connection.has_work() && wire.packets.is_empty());
        connection.time_out(now);
        connection.advance(&mut socket, &mut wire, now);
        prop_assert_eq!(wire.packets.pop_front().unwrap().header.flags, flag::SYN);
        connection.receive(&said(ours, flag::SYN | flag::ACK).segment(), &mut socket, &mut budget, now);
        prop_assert_eq!(connection.state(), State::Open);
    }

    /// Segments of any content in any state.
    #[test]
    fn no_segment_harms(
        segments in prop::collection::vec((any::<u32>(), any::<u32>(), 0u8..64, any::<u16>(), 0usize..3000, 0u8..6), 0..60),
        close: bool,
    ) {
        let now = Instant::now();
        let mut socket = Socket { room: 2000, inbound: vec![1; 5000], inbound_end: close, ..Socket::default() };
        let mut budget = Budget::new(10_000);
        let mut wire = Wire { packets: VecDeque::new(), room: 0, scratch: vec![] };
        let first = Packet {
            header: Header { sequence: 1000, flags: flag::SYN, window: 9, options: Some((1, Some(99))), ..Header::default() },
            payload: vec![],
        };
        let mut connection = Connection::called(&first.segment(), 5000, 1460);
        let payload = vec![7; 3000];
        let mut sent = 0usize;
        for (sequence, acknowledged, flags, window, len, near) in segments {
            // Mostly near what would be right.
            let (sequence, acknowledged) = if near > 1 {
                (1001u32.wrapping_add(sequence % 3000), 5001u32.wrapping_add(acknowledged % 3000))
            } else {
                (sequence, acknowledged)
            };
            let header = Header { sequence, acknowledged, flags, window, options: None };
            let packet = Packet { header, payload: payload[..len].to_vec() };
            connection.connected();
            if connection.receive(&packet.segment(), &mut socket, &mut budget, now) != Verdict::Keep {
                break;
            }
            wire.room = 2;
            if connection.advance(&mut socket, &mut wire, now) != Verdict::Keep {
                break;
            }
            sent += wire.packets.drain(..).map(|packet| packet.payload.len()).sum::<usize>();
            if near == 5 {
                socket.room = 500;
                connection.writable(&mut socket, &mut budget);
            }
            if near == 4 && connection.time_out(now) != Verdict::Keep {
                break;
            }
        }
        prop_assert!(sent <= 5000 * 70);
        connection.drop_pending(&mut budget);
        prop_assert_eq!(format!("{budget:?}"), "Budget { left: 10000 }");
    }
}
