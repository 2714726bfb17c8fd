//! Entry points for fuzzers: a front end that says anything, and a driver whose frames, rings and memory are anything.
//!
//! One thread plays both sides: messages are written to one end of a socket and served at the other.

use super::port::{Link, Mac, PortSpec};
use super::{Switch, Vlans};
use crate::vhost::message::{BODY_MAX, Header, VringAddresses, flag, request};
use crate::vhost::{Backend, Channel, feature};
use crate::wire::be16;
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

/// A guest's memory: rings in the first page, buffers behind.
const MEMORY: u64 = 64 << 10;
const GUEST: u64 = 0x10_0000;
const SIZE: u16 = 8;
/// Of each ring: descriptors, available, used.
const RING_STEP: u64 = 0x800;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const BUFFERS: u64 = 0x1000;
const BUFFER_STEP: u64 = 0x800;

/// A front end without a thread.
struct Front {
    channel: Channel,
    memory: File,
    event: OwnedFd,
}

impl Front {
    fn new() -> Option<(Self, Backend)> {
        let (front, back) = UnixStream::pair().ok()?;
        let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
        rustix::fs::ftruncate(&file, MEMORY).ok()?;
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).ok()?;
        let front = Self { channel: Channel::new(front), memory: File::from(file), event };
        Some((front, Backend::new(back)))
    }

    fn send(&self, request: u32, flags: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let _ = self.channel.send(Header { request, flags: flag::VERSION | flags, size }, body, files);
    }

    /// What a driver says that brings its card up.
    fn bring_up(&self, backend: &mut Backend, features: u64) {
        self.send(request::SET_FEATURES, 0, &features.to_ne_bytes(), &[]);
        let mut table = [1u32.to_ne_bytes(), [0; 4]].concat();
        for word in [GUEST, MEMORY, GUEST, 0] {
            table.extend(word.to_ne_bytes());
        }
        self.send(request::SET_MEM_TABLE, 0, &table, &[self.memory.as_fd()]);
        for index in 0..2u32 {
            let at = GUEST.wrapping_add(RING_STEP.wrapping_mul(index.into()));
            let state = |value: u32| [index.to_ne_bytes(), value.to_ne_bytes()].concat();
            let (available, used) = (at.wrapping_add(AVAILABLE), at.wrapping_add(USED));
            let addresses = VringAddresses { index, descriptors: at, used, available };
            self.send(request::SET_VRING_NUM, 0, &state(SIZE.into()), &[]);
            self.send(request::SET_VRING_BASE, 0, &state(0), &[]);
            self.send(request::SET_VRING_ADDR, 0, &addresses.encode(), &[]);
            for what in [request::SET_VRING_CALL, request::SET_VRING_KICK] {
                self.send(what, 0, &u64::from(index).to_ne_bytes(), &[self.event.as_fd()]);
            }
            self.send(request::SET_VRING_ENABLE, 0, &state(1), &[]);
            let _ = backend.serve();
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write_all_at(bytes, at % MEMORY);
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _ = self.memory.read_at(&mut bytes, at % MEMORY);
        bytes
    }

    /// Offers a chain of one descriptor as the `turn`th of a ring.
    fn offer(&self, ring: u64, turn: u16, len: u32, flags: u16, address: u64) {
        let at = ring.wrapping_mul(RING_STEP);
        let slot = u64::from(turn % SIZE);
        let raw = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96;
        self.write(at.wrapping_add(slot.wrapping_mul(16)), &raw.to_le_bytes());
        let entry = at.wrapping_add(AVAILABLE).wrapping_add(4).wrapping_add(slot.wrapping_mul(2));
        self.write(entry, &(turn % SIZE).to_le_bytes());
        self.write(at.wrapping_add(AVAILABLE).wrapping_add(2), &turn.wrapping_add(1).to_le_bytes());
    }
}

fn buffer(slot: u16) -> u64 {
    BUFFERS.wrapping_add(BUFFER_STEP.wrapping_mul((slot % SIZE).into()))
}

/// Says anything to a back end: requests and bodies as bytes say, with files of several kinds, and memory full of bytes.
pub fn fuzz_vhost(data: &[u8]) {
    let Some((front, backend)) = Front::new() else { return };
    let mut switch = Switch::new(64, 300);
    let Some(port) = switch.add("fuzz", PortSpec::default()) else { return };
    if let Some(port) = switch.port_mut(port) {
        port.link = Link::Guest(Box::new(backend));
    }
    let small = rustix::fs::memfd_create("small", rustix::fs::MemfdFlags::CLOEXEC).ok();
    let mut rest = data;
    let mut now = 0u64;
    while let Some((&[what, flags, files, len], after)) = rest.split_first_chunk::<4>() {
        let (bytes, after) = after.split_at(usize::from(len).min(after.len()));
        rest = after;
        let Some(Link::Guest(backend)) = switch.port_mut(port).map(|port| &mut port.link) else { return };
        match what {
            0xff => front.bring_up(backend, feature::VERSION_1 | feature::MRG_RXBUF),
            0xfe => {
                let at = u64::from(flags) << 8 | u64::from(files);
                front.write(at, bytes);
            }
            0xfd => {
                let _ = rustix::fs::ftruncate(&front.memory, u64::from(flags) << 8);
            }
            _ => {
                let mut list: Vec<BorrowedFd<'_>> = Vec::new();
                for kind in 0..files & 3 {
                    match (files >> 2).rotate_right(u32::from(kind)) & 3 {
                        0 => list.push(front.memory.as_fd()),
                        1 => list.push(front.event.as_fd()),
                        _ => list.extend(small.as_ref().map(AsFd::as_fd)),
                    }
                }
                let body = bytes.get(..bytes.len().min(BODY_MAX)).unwrap_or_default();
                front.send(u32::from(what) % 44, u32::from(flags) & flag::NEED_REPLY, body, &list);
                if backend.serve().is_err() {
                    return;
                }
            }
        }
        now = now.wrapping_add(1000);
        switch.waken(port);
        switch.turn(now, 0);
        switch.broken.clear();
    }
}

/// What three ports are, by a byte.
fn spec(kind: u8, own: [u8; 6]) -> PortSpec {
    let vlans = match kind & 3 {
        0 => Vlans::Access(1),
        1 => Vlans::Trunk {
            tagged: "1-9".parse().unwrap_or_default(),
            native: Some(1),
            service: kind & 4 != 0,
        },
        2 => Vlans::Tunnel(1),
        _ => Vlans::Access(5),
    };
    let macs = if kind & 8 != 0 { vec![Mac(own)] } else { Vec::new() };
    let mut spec =
        PortSpec { vlans, macs, trusted: kind & 16 != 0, private: kind & 32 != 0, ..PortSpec::default() };
    if kind & 64 != 0 {
        let _ = spec.apply_all("rate=1M,pps=1k,burst=4k");
    }
    if kind & 128 != 0 {
        let _ = spec.apply_all("delay=1ms,loss=10,duplicate=10");
    }
    spec
}

/// Plays frames, rings and time on a switch with three ports. Every frame is delivered sound, or counted.
pub fn fuzz_switch(data: &[u8]) {
    let Some((kinds, mut rest)) = data.split_first_chunk::<3>() else { return };
    let mut switch = Switch::new(64, 300);
    let mut fronts = Vec::new();
    for (number, kind) in (0u8..).zip(kinds) {
        let Some((front, mut backend)) = Front::new() else { return };
        let optional = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::MRG_RXBUF;
        let features = feature::VERSION_1 | if kind & 4 != 0 { optional } else { 0 };
        front.bring_up(&mut backend, features);
        let Some(port) = switch.add(&format!("p{number}"), spec(*kind, [2, 0, 0, 0, 0, number])) else {
            return;
        };
        if let Some(port) = switch.port_mut(port) {
            port.link = Link::Guest(Box::new(backend));
        }
        for turn in 0..SIZE {
            front.offer(0, turn, 0x800, 2, GUEST.wrapping_add(buffer(turn)));
        }
        fronts.push((front, port, 0u16));
    }
    let mut now = 0u64;
    while let Some((&[who, shape, pass, len], after)) = rest.split_first_chunk::<4>() {
        let (bytes, after) = after.split_at(usize::from(len).min(after.len()));
        rest = after;
        let Some((front, port, turn)) = fronts.get_mut(usize::from(who % 3)) else { return };
        // A header, addresses that the others have, and whatever comes.
        let mut frame = vec![0; 12];
        if shape & 1 != 0 {
            frame.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        }
        frame.extend([2, 0, 0, 0, 0, shape >> 1 & 3, 2, 0, 0, 0, 0, who % 3]);
        frame.extend_from_slice(bytes);
        let place = MEMORY / 2;
        front.write(place, &frame);
        let len = u32::try_from(frame.len()).unwrap_or(0);
        let flags = if shape & 8 != 0 { u16::from(shape >> 4) } else { 0 };
        front.offer(1, *turn, len, flags, GUEST.wrapping_add(place));
        *turn = turn.wrapping_add(1);
        now = now.wrapping_add(u64::from(pass) << 12);
        switch.waken(*port);
        switch.turn(now, 0);
        switch.broken.clear();
    }
    for (front, port, _) in &fronts {
        let Some(port) = switch.port(*port) else { continue };
        check(front, port.counters.sent);
    }
}

/// What is in a port's buffers are frames, as many as were counted.
fn check(front: &Front, sent: u64) {
    let used = u16::from_le_bytes(front.read::<2>(USED.wrapping_add(2)));
    assert!(u64::from(used) >= sent.min(1), "frames were counted that are nowhere");
    for slot in 0..used.min(SIZE) {
        let element = u64::from_le_bytes(
            front.read::<8>(USED.wrapping_add(4).wrapping_add(u64::from(slot).wrapping_mul(8))),
        );
        let (head, written) = (element as u16, (element >> 32) as u32);
        assert!(
            head < SIZE && (12..=0x800).contains(&written),
            "a buffer came back that is none: {element:#x}"
        );
        let header = front.read::<12>(buffer(head));
        let first = be16(&header, 10).map_or(0, u16::swap_bytes) >= 1;
        assert!(first && written >= 12 + 14 || sent == 0, "a frame without a header");
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn bytes_never_break_a_switch(data in prop::collection::vec(any::<u8>(), 0..800)) {
            fuzz_vhost(&data);
            fuzz_switch(&data);
        }
    }

    /// The fuzzers are of use only if bytes reach what is behind the rings.
    #[test]
    fn bytes_reach_the_other_side() {
        let mut switch = Switch::new(64, 300);
        let mut fronts = Vec::new();
        for number in 0..2u8 {
            let (front, mut backend) = Front::new().unwrap();
            front.bring_up(&mut backend, feature::VERSION_1);
            let port = switch.add(&format!("p{number}"), spec(0, [2, 0, 0, 0, 0, number])).unwrap();
            assert!(backend.queues().iter().all(crate::vhost::Queue::runs), "{backend:?}");
            switch.port_mut(port).unwrap().link = Link::Guest(Box::new(backend));
            (0..SIZE).for_each(|turn| front.offer(0, turn, 0x800, 2, GUEST + buffer(turn)));
            fronts.push((front, port));
        }
        let frame = [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 9, 0x88, 0xb5, 1, 2, 3]].concat();
        fronts[0].0.write(MEMORY / 2, &frame);
        fronts[0].0.offer(1, 0, frame.len() as u32, 0, GUEST + MEMORY / 2);
        switch.waken(fronts[0].1);
        switch.turn(1, 0);
        assert_eq!(fronts[1].0.read::<2>(USED + 2), [1, 0], "{}", switch.inspect());
        assert_eq!(fronts[1].0.read::<17>(buffer(0) + 12), frame[12..]);
        check(&fronts[1].0, 1);
    }
}
