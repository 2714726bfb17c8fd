//! How much of the one thread a port has in a turn. The switch's turns are taken here, one by one.

use super::{BUFFER_LEN, Guest, MAC_A, MAC_B, PortSpec, frame, large};
use crate::Offload;
use crate::switch::port::Link;
use crate::switch::table::PortNumber;
use crate::switch::{Limit, Reason, Switch};
use crate::vhost::{Backend, Segment, feature};
use std::os::unix::net::UnixStream;

/// A guest on a switch that nobody runs.
fn connect(switch: &mut Switch, name: &str, spec: PortSpec, features: u64) -> (PortNumber, Guest) {
    let (front, back) = UnixStream::pair().unwrap();
    let mut backend = Backend::new(back);
    let driver = std::thread::spawn(move || Guest::new(front, features));
    while !driver.is_finished() {
        backend.serve().unwrap();
        std::thread::yield_now();
    }
    let number = switch.add(name, spec).unwrap();
    switch.port_mut(number).unwrap().link = Link::Guest(Box::new(backend));
    (number, driver.join().unwrap())
}

/// A frame of 64000 bytes that stands for a thousand, so many times at once.
fn send_tiny_segments(guest: &mut Guest, count: usize) {
    use std::os::unix::fs::FileExt;
    let (mut header, mut bytes) = large();
    header[4..6].copy_from_slice(&64u16.to_le_bytes());
    bytes.resize(54 + 64_000, 1);
    let bytes = [&header[..], &[0; 2], &bytes].concat();
    let place = u64::from(BUFFER_LEN) * 300;
    guest.memory.write_all_at(&bytes, place).unwrap();
    let piece = Segment { address: 0x10_0000 + place, len: bytes.len() as u32 };
    let ring = guest.front.ring(1).unwrap();
    (0..count).for_each(|_| assert!(ring.post(0, &[piece], false)));
    ring.publish();
}

/// Frames of which a receiver, or the sender's own limit, wants the pieces cost who sends them their turns.
#[test]
fn who_has_frames_cut_waits_for_those_who_have_not() {
    let limit = Limit { bits_per_second: 10_000_000, burst_bytes: None, frames_per_second: None };
    let limited = PortSpec { up: Some(limit), ..PortSpec::default() };
    let finished = feature::VERSION_1 | feature::MRG_RXBUF;
    for (spec, features) in [(limited, u64::MAX), (PortSpec::default(), finished)] {
        let mut switch = Switch::default();
        let (a, mut a_driver) = connect(&mut switch, "a", spec, u64::MAX);
        let (b, mut b_driver) = connect(&mut switch, "b", PortSpec::default(), features);
        b_driver.send_all(&[frame(MAC_A, MAC_B, b"")]);
        switch.waken(b);
        switch.turn(0, 0);
        send_tiny_segments(&mut a_driver, 60);
        switch.waken(a);
        let taken = |switch: &Switch| switch.port(a).unwrap().counters.received;
        let mut frames = vec![0];
        for turn in 1..=60u64 {
            switch.turn(turn * 1000, 0);
            frames.push(taken(&switch));
        }
        let most = frames.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert_eq!(most, 2, "as much as a burst of whole segments would be cut into");
        // A thousand for a frame, 128 in a turn.
        assert!((6..=12).contains(&frames[60]), "{frames:?}");
        // It is not forgotten: all go in the end.
        (0..1000).for_each(|turn| switch.turn(100_000 + turn * 1000, 0));
        assert_eq!(taken(&switch), 60);
    }
}

/// Nothing is cut for who takes it as it is.
#[test]
fn whole_segments_go_in_whole_bursts() {
    let mut switch = Switch::default();
    let (a, mut a_driver) = connect(&mut switch, "a", PortSpec::default(), u64::MAX);
    let (_, _b) = connect(&mut switch, "b", PortSpec::default(), u64::MAX);
    send_tiny_segments(&mut a_driver, 6);
    switch.waken(a);
    (1..=3).for_each(|turn| switch.turn(turn, 0));
    assert_eq!(switch.port(a).unwrap().counters.received, 6);
}

#[test]
fn a_flood_counts_as_what_it_is_cut_into() {
    let mut switch = Switch::default();
    let port = switch.add("a", PortSpec { storm: Some(1000), ..PortSpec::default() }).unwrap();
    let (header, mut bytes) = large();
    bytes[..6].fill(0xff);
    let mut tiny = header;
    tiny[4..6].copy_from_slice(&29u16.to_le_bytes());
    let tiny = Offload::checked(tiny, &bytes).unwrap();
    assert_eq!(tiny.pieces(bytes.len()), 104);
    let storms = |switch: &Switch| switch.port(port).unwrap().counters.dropped.get(Reason::Storm);
    switch.inject_with(port, tiny, &bytes);
    assert_eq!(storms(&switch), 0);
    // A tenth of a second's were there.
    switch.inject_with(port, Offload::checked(header, &bytes).unwrap(), &bytes);
    assert_eq!(storms(&switch), 1);
}
