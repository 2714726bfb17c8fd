//! A switch with guests that are real front ends in this process: rings, memory, sockets and all.

use super::control::{self, PortKind, Request};
use super::server::{Config, Server};
use super::{Emulation, Limit, PortSpec, Vlans};
use crate::vhost::{Frontend, GuestRegion, Segment, feature};
use serde_json::Value;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

mod turns;

const BUFFERS: u32 = 64;
const BUFFER_LEN: u32 = 2048;
const HEADER: usize = 12;
const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const MAC_C: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
const ALL: [u8; 6] = [0xff; 6];

/// A switch's process, as a thread.
struct Running {
    path: PathBuf,
    directory: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("yado-switch-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("control.sock");
        let config = Config {
            control: path.clone(),
            ports: directory.clone(),
            spin: Duration::from_micros(20),
            addresses_max: 1000,
            ageing_seconds: 300,
        };
        let server = Server::new(config).unwrap();
        let thread = std::thread::spawn(move || server.run(&mut |_| ()).unwrap());
        Self { path, directory, thread: Some(thread) }
    }

    fn ask(&self, request: &Request) -> Value {
        control::ask(&self.path, request).unwrap()
    }

    fn port(&self, name: &str) -> Value {
        let tree = self.ask(&Request::Inspect);
        tree["ports"].as_array().unwrap().iter().find(|port| port["name"] == name).unwrap().clone()
    }

    fn dropped(&self, name: &str, reason: &str) -> u64 {
        self.port(name)["dropped"][reason].as_u64().unwrap_or(0)
    }

    fn guest(&self, name: &str, spec: PortSpec) -> Guest {
        self.guest_with(name, spec, u64::MAX)
    }

    fn guest_with(&self, name: &str, spec: PortSpec, features: u64) -> Guest {
        let request = Request::Attach { name: name.to_owned(), spec };
        Guest::new(control::open(&self.path, &request).unwrap().1, features)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = control::ask(&self.path, &Request::Stop);
        let ended = self.thread.take().map(JoinHandle::join);
        let _ = std::fs::remove_dir_all(&self.directory);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
    }
}

/// A driver with a little memory.
struct Guest {
    front: Frontend,
    memory: File,
    next: u32,
}

impl Guest {
    fn new(stream: UnixStream, features: u64) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 1 << 20).unwrap();
        let memory = File::from(file);
        let mut front = Frontend::new(stream, 2, 128).unwrap();
        let region = GuestRegion { guest: 0x10_0000, len: 1 << 20, file: memory.as_fd(), offset: 0 };
        let wanted = feature::VERSION_1 | feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
        front.start(wanted & features, &[region], 2).unwrap();
        (0..2).for_each(|ring| front.enable(ring, true).unwrap());
        // An answer comes after all that was said before.
        front.rings_max().unwrap();
        let mut guest = Self { front, memory, next: 0 };
        (0..BUFFERS).for_each(|number| guest.post(number));
        guest.front.ring(0).unwrap().publish();
        guest
    }

    fn post(&mut self, number: u32) {
        let address = 0x10_0000 + u64::from(number * BUFFER_LEN);
        assert!(self.front.ring(0).unwrap().post(number, &[Segment { address, len: BUFFER_LEN }], true));
    }

    fn send(&mut self, frame: &[u8]) {
        self.send_with([0; 10], frame);
    }

    /// In two pieces, somewhere in the upper half of the memory.
    fn send_with(&mut self, header: [u8; 10], frame: &[u8]) {
        let bytes = [&header[..], &[0; 2], frame].concat();
        let place = (1 << 19) + u64::from(self.next % 4) * 0x1_8000;
        self.next += 1;
        self.memory.write_all_at(&bytes, place).unwrap();
        let address = 0x10_0000 + place;
        let first = 20.min(bytes.len() as u32);
        let mut pieces = vec![Segment { address, len: first }];
        if bytes.len() as u32 > first {
            pieces.push(Segment { address: address + u64::from(first), len: bytes.len() as u32 - first });
        }
        let ring = self.front.ring(1).unwrap();
        let until = Instant::now() + Duration::from_secs(5);
        assert!(ring.post(0, &pieces, false));
        ring.publish();
        while ring.collect().unwrap().is_none() {
            assert!(Instant::now() < until, "the switch does not take frames");
            std::thread::yield_now();
        }
    }

    /// All at once, so that they come in one burst.
    fn send_all(&mut self, frames: &[Vec<u8>]) {
        for (number, frame) in (0u64..).zip(frames) {
            let (place, bytes) = ((1 << 19) + number * 0x1000, [&[0; HEADER][..], frame].concat());
            self.memory.write_all_at(&bytes, place).unwrap();
            let piece = Segment { address: 0x10_0000 + place, len: bytes.len() as u32 };
            assert!(self.front.ring(1).unwrap().post(0, &[piece], false));
        }
        self.front.ring(1).unwrap().publish();
    }

    /// The next frame with its header, if there is one within a time.
    fn receive_within(&mut self, wait: Duration) -> Option<(Vec<u8>, Vec<u8>)> {
        let until = Instant::now() + wait;
        let mut frame = Vec::new();
        let mut missing = 1;
        while missing > 0 {
            let Some((number, written)) = self.front.ring(0).unwrap().collect().unwrap() else {
                if Instant::now() > until {
                    assert!(frame.is_empty(), "part of a frame");
                    return None;
                }
                std::thread::sleep(Duration::from_micros(100));
                continue;
            };
            let mut bytes = vec![0; written as usize];
            self.memory.read_exact_at(&mut bytes, u64::from(number * BUFFER_LEN)).unwrap();
            if frame.is_empty() {
                missing = u32::from(u16::from_le_bytes([bytes[10], bytes[11]]));
            }
            missing -= 1;
            frame.extend(bytes);
            self.post(number);
        }
        self.front.ring(0).unwrap().publish();
        let rest = frame.split_off(HEADER);
        Some((frame, rest))
    }

    fn receive(&mut self) -> Vec<u8> {
        self.receive_within(Duration::from_secs(5)).expect("a frame").1
    }

    fn silent(&mut self) -> bool {
        self.receive_within(Duration::from_millis(30)).is_none()
    }
}

fn frame(to: [u8; 6], from: [u8; 6], body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x88, 0xb5], body].concat()
}

fn access(vlan: u16) -> PortSpec {
    PortSpec { vlans: Vlans::Access(vlan), ..PortSpec::default() }
}

fn trunk(tagged: &str, native: Option<u16>) -> PortSpec {
    let vlans = Vlans::Trunk { tagged: tagged.parse().unwrap(), native, service: false };
    PortSpec { vlans, ..PortSpec::default() }
}

fn tagged(to: [u8; 6], from: [u8; 6], vlan: u16, body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x81, 0], &vlan.to_be_bytes(), &[0x88, 0xb5], body].concat()
}

#[test]
fn frames_go_to_all_until_it_is_known_who_is_where() {
    let switch = Running::new();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|name| switch.guest(name, PortSpec::default()));
    let first = frame(MAC_B, MAC_A, b"who is b?");
    a.send(&first);
    assert_eq!((b.receive(), c.receive()), (first.clone(), first));
    let answer = frame(MAC_A, MAC_B, &[7; 1400]);
    b.send(&answer);
    assert_eq!(a.receive(), answer);
    assert!(c.silent() && b.silent(), "c must not see it, and b not its own");
    a.send(&frame(MAC_A, MAC_A, b"to myself"));
    assert!(b.silent() && switch.dropped("a", "returned") == 1);
    let known = switch.ask(&Request::Addresses);
    assert_eq!(known.as_array().unwrap().len(), 2, "{known}");
    // Who leaves is forgotten.
    drop(b);
    let until = Instant::now() + Duration::from_secs(5);
    while switch.ask(&Request::Inspect)["ports"].as_array().unwrap().len() != 2 {
        assert!(Instant::now() < until);
    }
    a.send(&frame(MAC_B, MAC_A, b"are you there?"));
    assert_eq!(c.receive()[14..], *b"are you there?");
}

#[test]
fn frames_that_begin_alike_are_all_looked_at() {
    let switch = Running::new();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|name| switch.guest(name, PortSpec::default()));
    b.send(&frame(ALL, MAC_B, b""));
    c.send(&frame(ALL, MAC_C, b""));
    for guest in [&mut a, &mut b, &mut c] {
        while !guest.silent() {}
    }
    let packet = |to: [u8; 6], port: u8, number: u8| {
        let mut packet = [&to[..], &MAC_A, &[8, 0, 0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
        packet.extend([10, 0, 0, 1, 10, 0, 0, 2, 0, port, 0, 9, 0, 9, 0, 0, number]);
        packet
    };
    let mut frames =
        vec![packet(MAC_B, 5, 1), packet(MAC_B, 67, 2), packet(MAC_B, 5, 3), packet(MAC_C, 5, 4)];
    frames.extend([packet(MAC_B, 5, 5), tagged(MAC_B, MAC_A, 7, b"hop"), vec![9; 4], packet(MAC_B, 5, 6)]);
    a.send_all(&frames);
    assert_eq!([1, 3, 5, 6].map(|_| b.receive()[42]), [1, 3, 5, 6]);
    assert_eq!(c.receive()[42], 4);
    assert!(b.silent() && c.silent());
    assert_eq!(["dhcp_server", "vlan", "broken"].map(|reason| switch.dropped("a", reason)), [1, 1, 1]);
    assert_eq!(switch.port("a")["received"], 7);
}

#[test]
fn long_frames_lie_in_many_buffers_and_short_ones_in_order() {
    let switch = Running::new();
    let [mut a, mut b] = ["a", "b"].map(|name| switch.guest(name, PortSpec::default()));
    let long: Vec<u8> = (0..60_000u32).map(|byte| byte as u8).collect();
    a.send(&frame(MAC_B, MAC_A, &long));
    assert_eq!(b.receive()[14..], long);
    for number in 0..500u16 {
        a.send(&frame(MAC_B, MAC_A, &number.to_be_bytes()));
        assert_eq!(b.receive()[14..], number.to_be_bytes());
    }
}

#[test]
fn who_has_no_buffers_gets_frames_when_there_are_some() {
    let switch = Running::new();
    let [mut a, mut b] = ["a", "b"].map(|name| switch.guest(name, PortSpec::default()));
    for number in 0..u16::try_from(BUFFERS).unwrap() * 3 {
        a.send(&frame(MAC_B, MAC_A, &number.to_be_bytes()));
    }
    for number in 0..u16::try_from(BUFFERS).unwrap() * 3 {
        assert_eq!(b.receive()[14..], number.to_be_bytes());
    }
}

/// A TCP segment of 3000 bytes that stands for three.
fn large() -> ([u8; 10], Vec<u8>) {
    let mut large = [&MAC_B[..], &MAC_A, &[8, 0, 0x45, 0]].concat();
    large.extend(3040u16.to_be_bytes());
    large.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    large.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
    large.extend((0..3000u32).map(|byte| byte as u8));
    let mut header = [1, 1, 0, 0, 0, 0, 34, 0, 16, 0];
    header[4..6].copy_from_slice(&1000u16.to_le_bytes());
    (header, large)
}

#[test]
fn large_segments_stay_whole_for_who_takes_them_and_are_cut_for_others() {
    let switch = Running::new();
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest("b", PortSpec::default());
    let mut plain = switch.guest_with("plain", PortSpec::default(), feature::VERSION_1);
    let (header, large) = large();
    a.send_with(header, &large);
    let (got, body) = b.receive_within(Duration::from_secs(5)).unwrap();
    assert_eq!(got[0..2], [1, 1]);
    assert!(body == large);
    let mut payload = Vec::new();
    for _ in 0..3 {
        let (header, piece) = plain.receive_within(Duration::from_secs(5)).unwrap();
        assert_eq!(header[..10], [0; 10]);
        let layers = crate::wire::layers::parse(&piece, true).unwrap();
        let sum = crate::wire::checksum::Sum::default()
            .pseudo(layers.source, layers.destination, 6, piece.len() - 34)
            .add(&piece[34..]);
        assert_eq!(sum.checksum(), 0);
        payload.extend_from_slice(&piece[54..]);
    }
    assert!(payload == large[54..]);
    // What is not what its header says is lost, and nothing else.
    let mut lie = header;
    lie[8] = 60;
    a.send_with(lie, &large);
    a.send_with([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0], &large);
    a.send(&[0; 5]);
    assert!(b.silent());
    assert_eq!(switch.dropped("a", "broken"), 3);
}

#[test]
fn vlans_are_apart_and_nobody_hops() {
    let switch = Running::new();
    let mut five = switch.guest("five", access(5));
    let mut five_too = switch.guest("five-too", access(5));
    let mut six = switch.guest("six", access(6));
    let mut up = switch.guest("up", trunk("5-6+9", Some(9)));
    five.send(&frame(ALL, MAC_A, b"five"));
    assert_eq!(five_too.receive(), frame(ALL, MAC_A, b"five"));
    assert_eq!(up.receive(), tagged(ALL, MAC_A, 5, b"five"));
    assert!(six.silent());
    // The same address in another VLAN is somebody else.
    six.send(&frame(ALL, MAC_A, b"six"));
    assert_eq!(up.receive(), tagged(ALL, MAC_A, 6, b"six"));
    up.send(&tagged(MAC_A, MAC_C, 6, b"to six"));
    assert_eq!(six.receive(), frame(MAC_A, MAC_C, b"to six"));
    assert!(five.silent() && five_too.silent());
    // Tags of one's own or another VLAN, one behind the other, are refused; a priority is not.
    five.send(&tagged(ALL, MAC_A, 6, b"hop"));
    five.send(&tagged(ALL, MAC_A, 5, b"hop"));
    let double = [&ALL[..], &MAC_A, &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6, 0x88, 0xb5], b"hop"].concat();
    five.send(&double);
    assert_eq!(switch.dropped("five", "vlan"), 3);
    five.send(&tagged(ALL, MAC_A, 3 << 13, b"priority"));
    assert_eq!(five_too.receive(), frame(ALL, MAC_A, b"priority"));
    assert_eq!(up.receive(), tagged(ALL, MAC_A, 3 << 13 | 5, b"priority"));
    assert!(six.silent());
    // Behind a tag that only says a priority, and behind that of a VLAN that has none on the way out.
    let mut native = switch.guest("native", trunk("6", Some(5)));
    let behind = |first: u16| {
        [&ALL[..], &MAC_A, &[0x81, 0], &first.to_be_bytes(), &[0x81, 0, 0, 6, 0x88, 0xb5], b"hop"].concat()
    };
    five.send(&behind(0));
    assert_eq!(switch.dropped("five", "vlan"), 4);
    up.send(&behind(5));
    assert!(native.silent() && six.silent());
    // Nor to a guest, which takes a tag without a VLAN for none: nobody has looked at what is behind it.
    up.send(&behind(5));
    assert!(five.silent() && five_too.silent());
    five.send(&frame(ALL, MAC_A, b"plain"));
    assert_eq!(native.receive(), frame(ALL, MAC_A, b"plain"));
    while !five_too.silent() || !up.silent() {}
    // Without a tag: the native VLAN, in which nobody else is.
    up.send(&frame(ALL, MAC_C, b"native"));
    up.send(&tagged(ALL, MAC_C, 7, b"not mine"));
    assert!(five.silent() && six.silent());
    assert_eq!(switch.dropped("up", "vlan"), 1);
}

#[test]
fn tunnels_carry_tags_unseen() {
    let switch = Running::new();
    let tunnel = PortSpec { vlans: Vlans::Tunnel(100), ..PortSpec::default() };
    let [mut a, mut b] = ["a", "b"].map(|name| switch.guest(name, tunnel.clone()));
    let vlans = Vlans::Trunk { tagged: "100".parse().unwrap(), native: None, service: true };
    let mut provider = switch.guest("provider", PortSpec { vlans, ..PortSpec::default() });
    let inner = tagged(ALL, MAC_A, 6, b"customer's");
    a.send(&inner);
    assert_eq!(b.receive(), inner);
    let outer = [&inner[..12], &[0x88, 0xa8, 0, 100], &inner[12..]].concat();
    assert_eq!(provider.receive(), outer);
    provider.send(&[&MAC_A[..], &MAC_C, &outer[12..]].concat());
    assert_eq!(a.receive(), [&MAC_A[..], &MAC_C, &inner[12..]].concat());
}

fn arp(from: [u8; 6], sender: [u8; 6], address: [u8; 4]) -> Vec<u8> {
    [&ALL[..], &from, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &sender, &address, &[0; 10]].concat()
}

/// What a hostile guest tries, and what its neighbours see of it: nothing.
#[test]
fn a_hostile_guest_is_alone_with_its_attacks() {
    let switch = Running::new();
    let locked = |mac| PortSpec { macs: vec![super::Mac(mac)], ..PortSpec::default() };
    let mut victim = switch.guest("victim", locked(MAC_A));
    let mut friend = switch.guest("friend", locked(MAC_B));
    let mut hostile = switch.guest("hostile", PortSpec::default());
    victim.send(&arp(MAC_A, MAC_A, [10, 0, 0, 1]));
    assert!(!friend.silent() && !hostile.silent());
    // It says to be the victim: by its address, by ARP with its own and with the victim's.
    hostile.send(&frame(MAC_B, MAC_A, b"I am the victim"));
    hostile.send(&arp(MAC_C, MAC_C, [10, 0, 0, 1]));
    hostile.send(&arp(MAC_C, MAC_A, [10, 0, 0, 1]));
    assert!(friend.silent() && victim.silent());
    assert_eq!((switch.dropped("hostile", "spoofed"), switch.dropped("hostile", "arp_spoofed")), (1, 2));
    // It fills the table.
    for number in 0..3000u16 {
        let [high, low] = number.to_be_bytes();
        hostile.send(&frame(ALL, [2, 9, 9, 9, high, low], b""));
    }
    assert!(switch.dropped("hostile", "quota") >= 2900);
    while !friend.silent() {}
    while !victim.silent() {}
    friend.send(&frame(MAC_A, MAC_B, b"not for others"));
    assert_eq!(victim.receive(), frame(MAC_A, MAC_B, b"not for others"));
    assert!(hostile.silent(), "nobody sniffs");
    // It wants to be the root of all bridges, a router, and a DHCP server.
    let bpdu = [&[1, 0x80, 0xc2, 0, 0, 0][..], &MAC_C, &[0, 38, 0x42, 0x42, 3], &[0; 35]].concat();
    hostile.send(&bpdu);
    let mut advertisement =
        [&[0x33, 0x33, 0, 0, 0, 1][..], &MAC_C, &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 16, 58, 255]].concat();
    advertisement.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    advertisement.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    advertisement.extend([134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    hostile.send(&advertisement);
    let mut offer = [&ALL[..], &MAC_C, &[8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    offer.extend([10, 0, 0, 9, 255, 255, 255, 255, 0, 67, 0, 68, 0, 8, 0, 0]);
    hostile.send(&offer);
    assert!(victim.silent() && friend.silent());
    for reason in ["reserved", "router", "dhcp_server"] {
        assert_eq!(switch.dropped("hostile", reason), 1, "{reason}");
    }
    // It floods.
    let spec = PortSpec { storm: Some(100), ..PortSpec::default() };
    switch.ask(&Request::SetPort { name: "hostile".to_owned(), spec });
    let begin = Instant::now();
    for _ in 0..500 {
        hostile.send(&frame(ALL, MAC_C, b"storm"));
    }
    let storm = switch.dropped("hostile", "storm");
    // Ten at once, and a hundred each second that this took.
    let may = 12 + begin.elapsed().as_millis() as u64 / 10;
    assert!(storm + may >= 500, "{storm}, and {may} may go");
    // With few frames that cost as much as many.
    for _ in 0..20 {
        hostile.send(&frame(ALL, MAC_C, &[0; 60_000]));
    }
    let storm = switch.dropped("hostile", "storm") - storm;
    let may = 2 + begin.elapsed().as_millis() as u64 / 10 / 40;
    assert!(storm + may >= 20, "{storm}, and {may} may go");
    // And with a guard its bridge turns the port off.
    let spec = PortSpec { bpdu_guard: true, ..PortSpec::default() };
    switch.ask(&Request::SetPort { name: "hostile".to_owned(), spec });
    hostile.send(&bpdu);
    hostile.send(&frame(MAC_A, MAC_C, b"still there?"));
    assert_eq!(switch.dropped("hostile", "disabled"), 1);
    assert!(switch.port("hostile")["state"].as_str().unwrap().contains("bridge"));
}

/// Two bytes wherever the sender likes, after everybody has looked.
#[test]
fn what_was_looked_at_is_not_completed() {
    let switch = Running::new();
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest_with("b", PortSpec::default(), !feature::GUEST_CSUM);
    // ARP's sender address; and, behind a tag that goes, the kind of the frame.
    let own = arp(MAC_A, MAC_A, [10, 0, 0, 66]);
    a.send_with([1, 0, 0, 0, 0, 0, 14, 0, 16, 0], &own);
    a.send_with([1, 0, 0, 0, 0, 0, 14, 0, 2, 0], &tagged(ALL, MAC_A, 3 << 13, &[0; 40]));
    assert!(b.silent());
    assert_eq!(switch.dropped("a", "broken"), 2);
    a.send(&own);
    assert_eq!(b.receive(), own);
}

#[test]
fn private_ports_reach_others_only() {
    let switch = Running::new();
    let private = PortSpec { private: true, ..PortSpec::default() };
    let [mut a, mut b] = ["a", "b"].map(|name| switch.guest(name, private.clone()));
    let mut router = switch.guest("router", PortSpec::default());
    a.send(&frame(ALL, MAC_A, b"hello"));
    assert!(b.silent() && router.receive().ends_with(b"hello"));
    b.send(&frame(MAC_A, MAC_B, b"psst"));
    assert!(a.silent() && switch.dropped("b", "private") == 1);
    router.send(&frame(MAC_A, MAC_C, b"yes?"));
    assert!(a.receive().ends_with(b"yes?"));
}

#[test]
fn rings_that_lie_stop_their_own_port() {
    let switch = Running::new();
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest("b", PortSpec::default());
    let mut liar = switch.guest("liar", PortSpec::default());
    let ring = liar.front.ring(1).unwrap();
    // Beyond its memory, and at its end.
    assert!(ring.post(0, &[Segment { address: 0x20_0000, len: 64 }], false));
    ring.publish();
    let until = Instant::now() + Duration::from_secs(5);
    while switch.port("liar")["broken"].as_array().unwrap().is_empty() {
        assert!(Instant::now() < until);
    }
    // A guest that takes its memory away.
    let thief = switch.guest("thief", PortSpec::default());
    thief.memory.set_len(0).unwrap();
    a.send(&frame(ALL, MAC_A, b"going on"));
    assert!(b.receive().ends_with(b"going on"));
    assert!(liar.receive().ends_with(b"going on"), "its other ring still runs");
}

/// Its event counter is full, and no longer says so.
#[test]
fn who_makes_the_switch_wait_is_sent_away() {
    let switch = Running::new();
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest("b", PortSpec::default());
    let kind = PortKind::Socket;
    let answer = switch.ask(&Request::AddPort { name: "vmm".to_owned(), spec: PortSpec::default(), kind });
    let path = PathBuf::from(answer["socket"].as_str().unwrap());
    let mut hostile = Guest::new(UnixStream::connect(&path).unwrap(), u64::MAX);
    let ring = hostile.front.ring(0).unwrap();
    ring.clear_call();
    rustix::fs::fcntl_setfl(ring.call(), rustix::fs::OFlags::RDWR).unwrap();
    rustix::io::write(ring.call(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
    for round in 0..3u8 {
        a.send(&frame(ALL, MAC_A, &[round]));
        assert_eq!(b.receive_within(Duration::from_secs(20)).unwrap().1[14], round);
    }
    assert_eq!(switch.port("vmm")["link"], "nothing");
    // It does not come again before somebody lets it.
    let refused = |path: &PathBuf| Frontend::connect(path, 2, 128).is_err();
    assert!(refused(&path));
    switch.ask(&Request::SetPort { name: "vmm".to_owned(), spec: PortSpec::default() });
    assert!(!refused(&path));
}

#[test]
fn who_does_not_read_answers_delays_nobody() {
    use std::io::{BufRead, BufReader, Write};
    let switch = Running::new();
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest("b", PortSpec::default());
    let mut slow = UnixStream::connect(&switch.path).unwrap();
    let question = serde_json::to_string(&Request::Inspect).unwrap() + "\n";
    let count = 600;
    slow.write_all(question.repeat(count).as_bytes()).unwrap();
    let begin = Instant::now();
    for number in 0..50u8 {
        a.send(&frame(MAC_B, MAC_A, &[number]));
        assert_eq!(b.receive()[14], number);
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let answers = BufReader::new(slow).lines().take(count);
    assert!(answers.map(Result::unwrap).all(|line| line.starts_with("{\"ok\"") && line.ends_with('}')));
}

#[test]
fn addresses_that_are_too_old_do_not_count() {
    let mut switch = super::Switch::new(1000, 300);
    let port = switch.add("a", PortSpec { macs_max: Some(2), ..PortSpec::default() }).unwrap();
    (1..=3).for_each(|last| switch.announce(port, [2, 0, 0, 0, 0, last]));
    let state = |switch: &super::Switch| {
        let port = switch.port(port).unwrap();
        (port.learnt, port.counters.flooded, port.counters.dropped.get(super::Reason::Quota))
    };
    assert_eq!(state(&switch), (2, 2, 1));
    switch.turn(301_500_000_000, 0);
    switch.announce(port, [2, 0, 0, 0, 0, 9]);
    assert_eq!(state(&switch), (1, 3, 1));
}

/// As a tap has it, and what others say of addresses that are behind it.
#[test]
fn addresses_behind_trusted_ports_stay_there() {
    let mut switch = super::Switch::new(1000, 300);
    let trusted = PortSpec { trusted: true, ..PortSpec::default() };
    let up = switch.add("up", trusted.clone()).unwrap();
    let far = switch.add("far", trusted).unwrap();
    let vmm = switch.add("vmm", PortSpec::default()).unwrap();
    let own = PortSpec { macs: vec![super::Mac(MAC_B)], ..trunk("1", None) };
    let given = switch.add("given", own).unwrap();
    let place = |switch: &super::Switch, mac| {
        switch.addresses().find(|entry| entry.key.address() == mac).map(|entry| entry.port)
    };
    switch.announce(up, MAC_A);
    switch.announce(vmm, MAC_A);
    assert_eq!(place(&switch, MAC_A), Some(up));
    assert_eq!(switch.port(vmm).unwrap().counters.dropped.get(super::Reason::Spoofed), 1);
    // Who is believed as well may move it, and who was given it.
    switch.announce(far, MAC_A);
    switch.announce(up, MAC_B);
    let request = tagged(ALL, MAC_B, 1, &[0; 40]);
    switch.inject(given, &request);
    assert_eq!((place(&switch, MAC_A), place(&switch, MAC_B)), (Some(far), Some(given)));
    // Once it is silent it may be anywhere.
    switch.turn(301_500_000_000, 0);
    switch.announce(vmm, MAC_A);
    assert_eq!(place(&switch, MAC_A), Some(vmm));
}

#[test]
fn limits_hold_and_queues_stay_short() {
    let switch = Running::new();
    // 8 Mbit/s: a megabyte a second.
    let limit = Limit { bits_per_second: 8_000_000, burst_bytes: Some(3000), frames_per_second: None };
    let limited = PortSpec { down: Some(limit), ..PortSpec::default() };
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest("b", limited);
    // How many arrive and how fast, until all that were sent have arrived or are counted as lost.
    let mut run = |count: u64, limited: &str, way: &str| {
        let lost = || {
            let queue = &switch.port(limited)[way];
            queue["late"].as_u64().unwrap() + queue["full"].as_u64().unwrap()
        };
        let (before, begin) = (lost(), Instant::now());
        (0..count).for_each(|_| a.send(&frame(MAC_B, MAC_A, &[1; 986])));
        let (mut arrived, mut last) = (0, begin);
        while arrived + lost() - before < count {
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "{arrived} of {count}, {} lost",
                lost() - before
            );
            while let Some((_, frame)) = b.receive_within(Duration::from_millis(10)) {
                assert_eq!(frame.len(), 1000);
                (arrived, last) = (arrived + 1, Instant::now());
            }
        }
        (lost() - before, arrived as f64 * 1000.0 / (last - begin).as_secs_f64())
    };
    let (late, rate) = run(200, "b", "waiting_down");
    assert!(late > 0, "what waits for long is dropped");
    assert!(rate < 1_060_000.0, "{rate} bytes a second");
    // The same of what a port sends, changed while it works.
    switch.ask(&Request::SetPort { name: "b".to_owned(), spec: PortSpec::default() });
    let spec = PortSpec { up: Some(limit), ..PortSpec::default() };
    switch.ask(&Request::SetPort { name: "a".to_owned(), spec });
    let (_, rate) = run(100, "a", "waiting_up");
    assert!(rate < 1_100_000.0, "{rate} bytes a second");
}

#[test]
fn a_line_is_as_slow_as_said() {
    let switch = Running::new();
    let emulation = Emulation { delay_us: 50_000, ..Emulation::default() };
    let mut a = switch.guest("a", PortSpec::default());
    let mut b = switch.guest("b", PortSpec { emulation, ..PortSpec::default() });
    let begin = Instant::now();
    a.send(&frame(MAC_B, MAC_A, b"slow"));
    assert!(b.receive().ends_with(b"slow"));
    assert!((50..5000).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
}

#[test]
fn ports_stay_for_who_comes_again() {
    let switch = Running::new();
    let kind = PortKind::Socket;
    let answer = switch.ask(&Request::AddPort { name: "vmm".to_owned(), spec: access(7), kind });
    let path = PathBuf::from(answer["socket"].as_str().unwrap());
    let mut a = switch.guest("a", access(7));
    for round in 0..3 {
        let mut vmm = Guest::new(UnixStream::connect(&path).unwrap(), u64::MAX);
        let said = format!("round {round}");
        a.send(&frame(ALL, MAC_A, said.as_bytes()));
        assert!(vmm.receive().ends_with(said.as_bytes()));
        vmm.front.stop().unwrap();
        drop(vmm);
        let until = Instant::now() + Duration::from_secs(5);
        while switch.port("vmm")["link"] != "nothing" {
            assert!(Instant::now() < until);
        }
    }
    let twice = Request::AddPort { name: "vmm".to_owned(), spec: access(7), kind: PortKind::Socket };
    assert!(control::ask(&switch.path, &twice).unwrap_err().to_string().contains("already"));
    switch.ask(&Request::RemovePort { name: "vmm".to_owned() });
    assert!(!path.exists());
    assert!(control::ask(&switch.path, &Request::RemovePort { name: "vmm".to_owned() }).is_err());
}

/// Not with what was before it in the same place.
#[test]
fn refused_frames_are_captured_as_they_came() {
    use std::io::Read;
    let switch = Running::new();
    let mut up = switch.guest("up", trunk("6", None));
    let mut a = switch.guest("a", access(5));
    let request = Request::Capture { ports: vec!["a".to_owned()], snap: 96 };
    let (_, mut file) = control::open(&switch.path, &request).unwrap();
    file.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    up.send(&tagged(ALL, MAC_C, 7 << 13 | 6, b"somebody's"));
    let refused = tagged(ALL, MAC_A, 9, b"a tag of another VLAN");
    a.send(&refused);
    let (mut bytes, mut chunk) = (Vec::<u8>::new(), [0; 4096]);
    while !bytes.windows(13).any(|part| part == b"dropped: vlan") {
        let count = file.read(&mut chunk).unwrap();
        assert!(count > 0);
        bytes.extend(&chunk[..count]);
    }
    assert!(bytes.windows(refused.len()).any(|part| part == refused));
}

#[test]
fn captures_are_pcapng() {
    use std::io::Read;
    let switch = Running::new();
    let mut a = switch.guest("a", access(5));
    let mut b = switch.guest("b", access(5));
    let request = Request::Capture { ports: vec!["b".to_owned()], snap: 96 };
    let (_, mut file) = control::open(&switch.path, &request).unwrap();
    a.send(&frame(ALL, MAC_A, &[0x5a; 200]));
    b.receive();
    file.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    while bytes.len() < 220 {
        let count = file.read(&mut chunk).unwrap();
        assert!(count > 0);
        bytes.extend(&chunk[..count]);
    }
    assert_eq!(bytes[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
    let (mut kinds, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        kinds.push(word(at));
        let len = word(at + 4) as usize;
        assert_eq!(word(at + len - 4) as usize, len);
        if word(at) == 6 {
            assert_eq!((word(at + 20), word(at + 24)), (96, 218), "cut, and with its tag");
            assert_eq!(bytes[at + 28 + 12..at + 28 + 16], [0x81, 0, 0, 5]);
        }
        at += len;
    }
    assert_eq!(kinds, [0x0a0d_0d0a, 1, 6]);
}
