//! Linux's side of the conversation, as its driver has it.

use super::device::Console;
use crate::driver::{Buffer, Driver, EVENT_IDX, INDIRECT_DESC, VERSION_1};
use chipset::pci::Function;
use device::Notify;
use device::serial::Endpoint;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const AGENT: u32 = 1;
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
const AGENT_RX: u16 = 4;
const AGENT_TX: u16 = 5;
const ALL: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | 7;

struct Bench {
    driver: Driver<Console>,
    stirred: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Self {
        let stirred = Arc::new(AtomicUsize::new(0));
        let count = stirred.clone();
        let notify = Notify::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let driver = Driver::new(|memory, sink| Console::new(memory, sink, notify, &["org.yado.agent.0"]));
        Self { driver, stirred }
    }

    fn started(features: u64) -> Self {
        let mut bench = Self::new();
        bench.driver.enable_msix();
        bench.driver.start(features);
        bench
    }

    /// A console whose driver has set both ports up and opened them.
    fn open() -> Self {
        let mut bench = Self::started(ALL);
        for _ in 0..32 {
            bench.driver.add(CONTROL_RX, &[Buffer::In(64)]);
        }
        bench.driver.kick(CONTROL_RX);
        bench.say(!0, 0, 1);
        for port in [0, AGENT] {
            bench.say(port, 3, 1);
            bench.say(port, 6, 1);
        }
        bench.heard();
        bench.stirred();
        bench
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let word = u64::from(port) | u64::from(event) << 32 | u64::from(value) << 48;
        self.driver.send(CONTROL_TX, &[Buffer::Out(&word.to_le_bytes())]);
        assert!(self.driver.used(CONTROL_TX).is_some(), "the message was taken");
    }

    /// Port, event, value and the rest of each control message.
    fn heard(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        std::iter::from_fn(|| self.driver.received(CONTROL_RX))
            .map(|bytes| {
                let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                (word as u32, (word >> 32) as u16, (word >> 48) as u16, bytes[8..].to_vec())
            })
            .collect()
    }

    fn stirred(&self) -> bool {
        self.stirred.swap(0, Ordering::Relaxed) > 0
    }

    fn take(&mut self, port: u32, max: usize) -> Vec<u8> {
        let mut bytes = vec![];
        self.driver.function.take(port, &mut bytes, max);
        bytes
    }
}

#[test]
fn the_handshake_names_the_agents_port() {
    let mut bench = Bench::started(ALL);
    let config = bench.driver.device.unwrap();
    assert_eq!(bench.driver.read(config + 4, 4), 2, "two ports");
    assert_eq!(bench.driver.read(bench.driver.common + 18, 2), 6, "a pair for each and one for control");
    bench.driver.function.resize(132, 43);
    bench.driver.function.connect(AGENT, true);
    bench.say(!0, 0, 1);
    assert_eq!(bench.heard(), [], "the driver has no buffers yet");
    for _ in 0..16 {
        bench.driver.add(CONTROL_RX, &[Buffer::In(64)]);
    }
    bench.driver.kick(CONTROL_RX);
    assert_eq!(bench.heard(), [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
    bench.say(0, 3, 1);
    assert_eq!(bench.heard(), [(0, 4, 1, vec![]), (0, 5, 1, vec![43, 0, 132, 0])]);
    bench.say(AGENT, 3, 1);
    let name = b"org.yado.agent.0".to_vec();
    assert_eq!(bench.heard(), [(AGENT, 7, 1, name), (AGENT, 6, 1, vec![])]);
    bench.driver.function.connect(AGENT, false);
    bench.driver.function.connect(AGENT, false);
    assert_eq!(bench.heard(), [(AGENT, 6, 0, vec![])]);
    assert!(bench.driver.interrupts().contains(&u32::from(CONTROL_RX)));
    bench.say(7, 3, 1);
    bench.say(!0, 6, 1);
    assert_eq!(bench.heard(), [], "no such port");
}

#[test]
fn size_changes_are_told() {
    let mut bench = Bench::open();
    let config = bench.driver.device.unwrap();
    let generation = bench.driver.read(bench.driver.common + 21, 1);
    bench.driver.interrupts();
    bench.driver.function.resize(80, 25);
    assert_ne!(bench.driver.read(bench.driver.common + 21, 1), generation);
    assert_eq!(bench.driver.read(config, 4), 25 << 16 | 80);
    assert_eq!(bench.heard(), [(0, 5, 1, vec![25, 0, 80, 0])]);
    assert!(bench.driver.interrupts().contains(&6), "the vector for configuration changes");
}

#[test]
fn bytes_go_to_open_ports_and_into_as_many_buffers_as_there_are() {
    let mut bench = Bench::open();
    bench.say(AGENT, 6, 0);
    for _ in 0..3 {
        bench.driver.send(AGENT_RX, &[Buffer::In(4)]);
    }
    assert_eq!(bench.driver.function.offer(AGENT, b"lost?"), 0, "nobody would read it");
    bench.stirred();
    bench.say(AGENT, 6, 1);
    assert!(bench.stirred(), "now somebody does");
    bench.driver.interrupts();
    assert_eq!(bench.driver.function.offer(AGENT, b"Hello"), 5);
    assert_eq!(bench.driver.interrupts(), [u32::from(AGENT_RX)]);
    assert_eq!(bench.driver.function.offer(AGENT, b", world"), 4);
    assert!(!bench.stirred());
    bench.driver.send(AGENT_RX, &[Buffer::In(4096)]);
    assert!(bench.stirred(), "there is room again");
    assert_eq!(bench.driver.function.offer(AGENT, b"rld"), 3);
    let texts: Vec<_> = std::iter::from_fn(|| bench.driver.received(AGENT_RX)).collect();
    assert_eq!(texts.concat(), b"Hello, world");
    assert_eq!(bench.driver.function.offer(9, b"x"), 0);
}

#[test]
fn a_full_buffer_leaves_the_rest_in_the_guests_queue() {
    let mut bench = Bench::open();
    bench.driver.function.connect(AGENT, true);
    let text: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    for part in text.chunks(30_000) {
        bench.driver.send(AGENT_TX, &[Buffer::Out(part)]);
    }
    assert!(bench.stirred());
    assert!(bench.driver.used(AGENT_TX).is_some());
    assert!(bench.driver.used(AGENT_TX).is_some());
    assert!(bench.driver.used(AGENT_TX).is_none(), "the third does not fit");
    let mut got = bench.take(AGENT, 30_000);
    assert!(bench.driver.used(AGENT_TX).is_some(), "there was room");
    assert!(bench.driver.used(AGENT_TX).is_none());
    while got.len() < text.len() {
        let part = bench.take(AGENT, 7_777);
        assert!(!part.is_empty() && part.len() <= 7_777);
        got.extend(part);
    }
    assert!(got == text);
    assert!(bench.driver.used(AGENT_TX).is_some());
    assert_eq!(bench.take(AGENT, 10), b"");
}

#[test]
fn an_unattended_console_keeps_the_end_and_never_blocks() {
    let mut bench = Bench::open();
    for line in 0..20_000u32 {
        bench.driver.add(1, &[Buffer::Out(format!("{line:07}\n").as_bytes())]);
        if line % 50 == 49 {
            bench.driver.kick(1);
            assert_eq!(std::iter::from_fn(|| bench.driver.used(1)).count(), 50);
        }
    }
    let text = bench.take(0, usize::MAX);
    assert_eq!(text.len(), 65536);
    assert!(text.starts_with(b"0011808\n") && text.ends_with(b"0019999\n"));
    bench.driver.send(1, &[Buffer::Out(&[b'x'; 70_000]), Buffer::Out(b"end")]);
    assert!(bench.driver.used(1).is_some());
    let text = bench.take(0, usize::MAX);
    assert!(text.len() == 65536 && text.ends_with(b"xend"));
}

#[test]
fn letting_go_of_a_port_frees_a_blocked_guest() {
    let mut bench = Bench::open();
    bench.driver.function.connect(0, true);
    bench.driver.send(1, &[Buffer::Out(&[b'x'; 80_000])]);
    assert!(bench.driver.used(1).is_none());
    bench.driver.function.connect(0, false);
    assert!(bench.driver.used(1).is_some());
}

#[test]
fn a_driver_without_ports_has_a_console() {
    let mut bench = Bench::started(VERSION_1);
    assert!(bench.stirred());
    bench.driver.send(0, &[Buffer::In(16)]);
    assert_eq!(bench.driver.function.offer(0, b"root\n"), 5);
    assert_eq!(bench.driver.received(0).unwrap(), b"root\n");
    bench.driver.send(1, &[Buffer::Out(b"login: ")]);
    assert_eq!(bench.take(0, 100), b"login: ");
    let config = bench.driver.device.unwrap();
    bench.driver.write(config + 8, 4, u64::from(b'!'));
    assert_eq!(bench.take(0, 100), b"!");
}

#[test]
fn a_reset_closes_ports_and_keeps_last_words() {
    let mut bench = Bench::open();
    bench.driver.function.connect(AGENT, true);
    bench.driver.send(1, &[Buffer::Out(b"panic: no init")]);
    bench.driver.send(AGENT_RX, &[Buffer::In(16)]);
    assert!(bench.driver.function.guest_open(AGENT));
    bench.driver.set_status(0);
    assert_eq!(bench.driver.status(), 0);
    assert!(!bench.driver.function.guest_open(AGENT));
    assert_eq!(bench.driver.function.offer(AGENT, b"?"), 0);
    assert_eq!(bench.take(0, 100), b"panic: no init");
    bench.driver.start(ALL);
    for _ in 0..16 {
        bench.driver.add(CONTROL_RX, &[Buffer::In(64)]);
    }
    bench.say(AGENT, 3, 1);
    assert_eq!(bench.heard().last().unwrap(), &(AGENT, 6, 1, vec![]), "we still hold the port");
}

#[test]
fn a_driver_that_only_talks_is_not_heard_for_ever() {
    let mut bench = Bench::started(ALL);
    let ready = (1u64 << 48).to_le_bytes();
    let mut taken = 0;
    for _ in 0..200 {
        bench.driver.send(CONTROL_TX, &[Buffer::Out(&ready)]);
        taken += usize::from(bench.driver.used(CONTROL_TX).is_some());
        if taken < 30 {
            continue;
        }
        break;
    }
    let waiting = bench.driver.function.inspect()["device"]["control_waiting"].as_u64().unwrap();
    assert!(waiting >= 60);
    for _ in 0..30 {
        bench.driver.send(CONTROL_TX, &[Buffer::Out(&ready)]);
    }
    let waiting = bench.driver.function.inspect()["device"]["control_waiting"].as_u64().unwrap();
    assert!(waiting < 70, "{waiting} messages wait");
    for _ in 0..60 {
        bench.driver.add(CONTROL_RX, &[Buffer::In(64)]);
    }
    bench.driver.kick(CONTROL_RX);
    assert!(bench.heard().len() >= 60);
    assert!(std::iter::from_fn(|| bench.driver.used(CONTROL_TX)).count() > 0, "and is heard again");
}
