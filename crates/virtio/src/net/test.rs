//! A card's driver, and a cable that ends in a batch.

use super::device::{Net, NetConfig};
use super::spec::{control, feature};
use crate::driver::{Buffer, Driver, EVENT_IDX, INDIRECT_DESC, VERSION_1};
use device::Notify;
use net::{Batch, Checksum, Offload};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BASIC: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | feature::MAC | feature::STATUS;
const CONTROL: u64 = BASIC
    | feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_VLAN
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_MAC_ADDR;

struct Bench {
    driver: Driver<Net>,
    rung: Arc<AtomicUsize>,
    batch: Batch,
}

impl Bench {
    fn new(features: u64, pairs: u16) -> Self {
        let rung = Arc::new(AtomicUsize::new(0));
        let count = rung.clone();
        let notify = Notify::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let config = NetConfig { address: ADDRESS, mtu: 1500, pairs, withheld: 0 };
        let mut driver = Driver::new(|memory, sink| Net::new(memory, sink, notify, config));
        driver.enable_msix();
        driver.start(features);
        rung.store(0, Ordering::Relaxed);
        Self { driver, rung, batch: Batch::new(64, 1 << 20) }
    }

    fn rings(&self) -> usize {
        self.rung.swap(0, Ordering::Relaxed)
    }

    fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        self.driver.send(1, &[Buffer::Out(&header), Buffer::Out(frame)]);
    }

    /// What the guest has sent, by the other end.
    fn taken(&mut self) -> Vec<(Offload, Vec<u8>)> {
        assert!(!self.driver.function.take(&mut self.batch));
        let frames = self.batch.iter().map(|(offload, frame)| (offload, frame.to_vec())).collect();
        self.batch.clear();
        frames
    }

    fn give(&mut self, offload: Offload, frame: &[u8]) -> usize {
        assert!(self.batch.push(offload, &[frame]));
        self.driver.function.give(&mut self.batch);
        self.batch.len()
    }

    /// The next frame with its header, from as many buffers as it says.
    fn received(&mut self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut bytes = self.driver.received(0)?;
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            bytes.extend(self.driver.received(0).expect("all buffers of a frame come at once"));
        }
        let frame = bytes.split_off(12);
        Some((bytes, frame))
    }

    fn command(&mut self, queue: u16, class: u8, command: u8, about: &[u8]) -> u8 {
        let head =
            self.driver.send(queue, &[Buffer::Out(&[class, command]), Buffer::Out(about), Buffer::In(1)]);
        assert_eq!(self.driver.used(queue), Some((head, 1)));
        self.driver.bytes(queue, head, 2)[0]
    }
}

fn to(address: [u8; 6]) -> Vec<u8> {
    let mut frame = address.to_vec();
    frame.extend([2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    frame.extend([7; 50]);
    frame
}

/// A TCP segment of IPv4 with `len` bytes of payload, and the offload that says so.
fn large(len: usize, size: u16) -> (Offload, Vec<u8>) {
    let mut frame = to(ADDRESS)[..12].to_vec();
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((len as u16 + 40).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.extend((0..len).map(|byte| byte as u8));
    let mut header = [1, 1, 0, 0, 0, 0, 34, 0, 16, 0];
    header[4..6].copy_from_slice(&size.to_le_bytes());
    (Offload::checked(header, &frame).unwrap(), frame)
}

#[test]
fn the_configuration_says_what_the_card_is() {
    let mut bench = Bench::new(BASIC, 4);
    let at = bench.driver.device.unwrap();
    let bytes: Vec<u8> = (0..12).map(|byte| bench.driver.read(at + byte, 1) as u8).collect();
    assert_eq!(bytes, [2, 0, 0, 0, 0, 1, 1, 0, 4, 0, 0xdc, 5]);
    bench.driver.function.set_link(false);
    assert_eq!(bench.driver.read(at + 6, 2), 0);
    assert_eq!(bench.driver.interrupts().len(), 1, "the driver is told");
}

#[test]
fn frames_leave_with_what_is_said_of_them() {
    let mut bench = Bench::new(BASIC | feature::CSUM | feature::HOST_TSO4, 1);
    bench.send([0; 12], &to([0xff; 6]));
    assert_eq!(bench.rings(), 1);
    let (offload, frame) = large(3000, 1460);
    let mut header = [0; 12];
    header[..10].copy_from_slice(&offload.encode());
    bench.send(header, &frame);
    assert_eq!(bench.taken(), [(Offload::default(), to([0xff; 6])), (offload, frame)]);
    assert_eq!(bench.driver.used(1), Some((0, 0)));
    assert_eq!(bench.driver.used(1), Some((2, 0)));
    assert!(!bench.driver.interrupts().is_empty());
    bench.send([0; 12], &[1; 13]);
    bench.send([1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], &[1; 60]);
    bench.send([0; 12], &vec![1; 70_000]);
    bench.driver.send(1, &[Buffer::Out(&[0; 5])]);
    assert_eq!(bench.taken(), [], "what is broken goes nowhere");
    assert_eq!(bench.driver.function.device().counters.sent_broken, 4);
    assert_eq!((0..4).filter_map(|_| bench.driver.used(1)).count(), 4, "but the buffers come back");
}

#[test]
fn a_frame_lies_in_as_many_buffers_as_it_needs() {
    let all = BASIC | feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
    let mut bench = Bench::new(all, 1);
    let (offload, frame) = large(5000, 1460);
    for _ in 0..3 {
        bench.driver.send(0, &[Buffer::In(1500)]);
    }
    assert_eq!(bench.give(offload, &frame), 1, "it waits for a fourth buffer");
    assert_eq!(bench.driver.used(0), None);
    bench.rings();
    bench.driver.send(0, &[Buffer::In(1500)]);
    assert_eq!(bench.rings(), 1, "there is room again");
    bench.driver.function.give(&mut bench.batch);
    assert!(bench.batch.is_empty());
    let (header, got) = bench.received().unwrap();
    assert_eq!((&header[..10], &header[10..]), (&offload.encode()[..], &[4, 0][..]));
    assert_eq!(got, frame);
    assert_eq!(bench.received(), None);
}

#[test]
fn what_the_driver_does_not_take_is_done_for_it() {
    let mut bench = Bench::new(BASIC | feature::MRG_RXBUF, 1);
    for _ in 0..8 {
        bench.driver.send(0, &[Buffer::In(2000)]);
    }
    let (offload, frame) = large(3000, 1460);
    assert_eq!(bench.give(offload, &frame), 0);
    let mut payload = vec![];
    for len in [1460, 1460, 80] {
        let (header, got) = bench.received().unwrap();
        assert_eq!(&header[..10], &[0; 10], "nothing is left to do");
        assert_eq!(got.len(), 54 + len);
        payload.extend_from_slice(&got[54..]);
    }
    assert_eq!(payload, &frame[54..]);
    let (offload, frame) = large(100, 1460);
    assert!(matches!(offload.checksum, Checksum::Partial { .. }));
    bench.give(offload, &frame);
    let (header, got) = bench.received().unwrap();
    assert_eq!(&header[..10], &[0; 10]);
    assert_ne!(got[50..52], frame[50..52], "the checksum is completed");
}

#[test]
fn frames_that_no_buffer_can_hold_are_lost_alone() {
    let mut bench = Bench::new(BASIC, 1);
    bench.driver.send(0, &[Buffer::In(100)]);
    bench.driver.send(0, &[Buffer::In(100)]);
    assert_eq!(bench.give(Offload::default(), &[1; 200]), 0);
    assert_eq!(bench.give(Offload::default(), &to(ADDRESS)), 0);
    assert_eq!(bench.received().unwrap().1, to(ADDRESS));
    assert_eq!(bench.driver.function.device().counters.receive_too_long, 1);
}

#[test]
fn only_what_the_driver_wants_comes_through() {
    let mut bench = Bench::new(CONTROL, 1);
    for _ in 0..30 {
        bench.driver.send(0, &[Buffer::In(200)]);
    }
    let hears = |bench: &mut Bench, frame: &[u8]| {
        assert_eq!(bench.give(Offload::default(), frame), 0);
        bench.received().is_some_and(|(_, got)| got == frame)
    };
    let (other, group, all) = (to([2, 9, 9, 9, 9, 9]), to([1, 0, 0x5e, 0, 0, 1]), to([0xff; 6]));
    assert!(hears(&mut bench, &other), "nothing is filtered at first");
    assert_eq!(bench.command(2, control::RX, control::RX_PROMISC, &[0]), 0);
    assert!(!hears(&mut bench, &other) && !hears(&mut bench, &group));
    assert!(hears(&mut bench, &to(ADDRESS)) && hears(&mut bench, &all));
    let mut tables = vec![1, 0, 0, 0, 2, 9, 9, 9, 9, 9, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1];
    assert_eq!(bench.command(2, control::MAC, control::MAC_TABLE_SET, &tables), 0);
    assert!(hears(&mut bench, &other) && hears(&mut bench, &group));
    assert!(!hears(&mut bench, &to([1, 0, 0x5e, 0, 0, 2])));
    tables[0] = 200;
    assert_eq!(bench.command(2, control::MAC, control::MAC_TABLE_SET, &tables), 1, "a table that lies");
    assert_eq!(bench.command(2, control::RX, control::RX_NOBCAST, &[1]), 0);
    assert!(!hears(&mut bench, &all));
    assert_eq!(bench.command(2, control::MAC, control::MAC_ADDR_SET, &[2, 7, 7, 7, 7, 7]), 0);
    assert!(hears(&mut bench, &to([2, 7, 7, 7, 7, 7])) && !hears(&mut bench, &to(ADDRESS)));
    let mut tagged = to([2, 7, 7, 7, 7, 7]);
    tagged.splice(12..12, [0x81, 0, 0x20, 5]);
    assert!(!hears(&mut bench, &tagged));
    assert_eq!(bench.command(2, control::VLAN, control::VLAN_ADD, &[5, 0]), 0);
    assert!(hears(&mut bench, &tagged));
    assert_eq!(bench.command(2, control::VLAN, control::VLAN_ADD, &[0, 0x10]), 1, "no such VLAN");
    assert_eq!(bench.command(2, 77, 0, &[0]), 1, "no such class");
    assert_eq!(bench.command(2, control::MQ, 0, &[1, 0]), 1, "not agreed on");
}

#[test]
fn queue_pairs_are_used_once_they_are_set() {
    let mut bench = Bench::new(CONTROL | feature::MQ, 2);
    assert_eq!(bench.command(4, control::MQ, control::MQ_VQ_PAIRS_SET, &[3, 0]), 1);
    bench.driver.send(3, &[Buffer::Out(&[0; 12]), Buffer::Out(&to([0xff; 6]))]);
    assert_eq!(bench.taken(), [], "the second pair is not in use");
    assert_eq!(bench.command(4, control::MQ, control::MQ_VQ_PAIRS_SET, &[2, 0]), 0);
    assert_eq!(bench.taken().len(), 1);
    for queue in [0, 2] {
        for _ in 0..40 {
            bench.driver.send(queue, &[Buffer::In(1000)]);
        }
    }
    for port in 0..40 {
        let (_, mut frame) = large(10, 1460);
        frame[35] = port;
        assert_eq!(bench.give(Offload::default(), &frame), 0);
    }
    let first = std::iter::from_fn(|| bench.driver.used(0)).count();
    let second = std::iter::from_fn(|| bench.driver.used(2)).count();
    assert_eq!(first + second, 40);
    assert!(first > 5 && second > 5, "flows are spread: {first} and {second}");
}

#[test]
fn the_driver_says_which_flows_go_to_which_queue() {
    let mut bench = Bench::new(CONTROL | feature::RSS, 2);
    let at = bench.driver.device.unwrap();
    let about: Vec<u8> = (12..24).map(|byte| bench.driver.read(at + byte, 1) as u8).collect();
    assert_eq!(about, [0xff, 0xff, 0xff, 0xff, 0xff, 40, 128, 0, 0x3f, 0, 0, 0]);
    // All of TCP over IPv4 to the second pair, all else to the first; a key with one bit, which nothing moves to the front.
    let config =
        |types: u8, pair: u8| [&[types, 0, 0, 0, 0, 0, 0, 0, pair, 0, 2, 0, 4, 0x80, 0, 0, 0][..]].concat();
    assert_eq!(bench.command(4, control::MQ, control::MQ_RSS_CONFIG, &config(2, 2)), 1, "no such pair");
    assert_eq!(bench.command(4, control::MQ, control::MQ_RSS_CONFIG, &config(0x40, 1)), 1, "no such hash");
    assert_eq!(bench.command(4, control::MQ, control::MQ_VQ_PAIRS_SET, &[2, 0]), 1, "not agreed on");
    assert_eq!(bench.command(4, control::MQ, control::MQ_RSS_CONFIG, &config(2, 1)), 0);
    for queue in [0, 2] {
        for _ in 0..10 {
            bench.driver.send(queue, &[Buffer::In(1600)]);
        }
    }
    let (_, tcp) = large(10, 1460);
    for frame in [&tcp, &to(ADDRESS), &tcp] {
        assert_eq!(bench.give(Offload::default(), frame), 0);
    }
    let counts = [0, 2].map(|queue| std::iter::from_fn(|| bench.driver.used(queue)).count());
    assert_eq!(counts, [1, 2]);
}

#[test]
fn offloads_change_at_run_time() {
    let all = CONTROL | feature::CTRL_GUEST_OFFLOADS | feature::GUEST_CSUM | feature::GUEST_TSO4;
    let mut bench = Bench::new(all | feature::MRG_RXBUF, 1);
    let set = |bench: &mut Bench, offloads: u64| bench.command(2, 5, 0, &offloads.to_le_bytes());
    assert_eq!(set(&mut bench, feature::GUEST_TSO6), 1, "not agreed on");
    assert_eq!(set(&mut bench, feature::GUEST_CSUM), 0);
    for _ in 0..4 {
        bench.driver.send(0, &[Buffer::In(4000)]);
    }
    let (offload, frame) = large(2000, 1460);
    bench.give(offload, &frame);
    assert_eq!(bench.received().unwrap().1.len(), 1514);
    assert_eq!(bench.received().unwrap().1.len(), 594);
}

#[test]
fn a_guest_is_asked_to_announce_itself_until_it_has() {
    let mut bench = Bench::new(CONTROL | feature::GUEST_ANNOUNCE, 1);
    let at = bench.driver.device.unwrap() + 6;
    bench.driver.function.announce();
    assert_eq!(bench.driver.read(at, 2), 3);
    assert_eq!(bench.command(2, control::ANNOUNCE, control::ANNOUNCE_ACK, &[]), 0);
    assert_eq!(bench.driver.read(at, 2), 1);
}

#[test]
fn without_a_driver_frames_are_lost_and_after_a_reset_nothing_is_kept() {
    let mut bench = Bench::new(BASIC | feature::MRG_RXBUF, 1);
    bench.driver.send(0, &[Buffer::In(100)]);
    assert_eq!(bench.give(Offload::default(), &[1; 300]), 1);
    bench.driver.set_status(0);
    bench.driver.function.give(&mut bench.batch);
    assert!(bench.batch.is_empty());
    bench.driver.start(BASIC);
    assert_eq!(bench.give(Offload::default(), &to(ADDRESS)), 1, "the old buffer is not used");
    assert_eq!(bench.driver.used(0), None);
    bench.driver.function.set_link(false);
    bench.driver.function.give(&mut bench.batch);
    assert!(bench.batch.is_empty(), "nothing comes through a cable that is not plugged in");
}

#[test]
fn lent_buffers_come_back_with_what_was_written_or_are_recalled() {
    let mut bench = Bench::new(BASIC | feature::MRG_RXBUF, 1);
    let mut loans = Vec::new();
    bench.send([0; 12], &to([9; 6]));
    bench.send([0; 12], &[]);
    let session = bench.driver.function.lending().session;
    bench.driver.function.lend(session, 1, 8, &mut loans);
    let len: u32 = loans[0].segments.iter().map(|segment| segment.len).sum();
    assert_eq!((loans.len(), len), (2, 76));
    bench.driver.function.give_back(1, &[(loans[1].token, 0), (loans[0].token, 9), (77, 0)]);
    assert!(
        bench.driver.used(1).is_some() && bench.driver.used(1).is_some() && bench.driver.used(1).is_none()
    );
    loans.clear();
    for _ in 0..2 {
        bench.driver.send(0, &[Buffer::In(40)]);
    }
    bench.driver.function.lend(session, 0, 8, &mut loans);
    assert_eq!(loans.len(), 2);
    // A frame in two buffers, written by somebody else.
    let memory = bench.driver.memory.clone();
    let mut header = [0; 12];
    header[10] = 2;
    memory.write(loans[0].segments[0].address, &[&header[..], &[5; 28]].concat()).unwrap();
    memory.write(loans[1].segments[0].address, &[6; 40]).unwrap();
    memory.take_modified(loans[0].segments[0].address);
    // Of another queue: not its own.
    bench.driver.function.give_back(1, &[(loans[0].token, 40)]);
    bench.driver.function.give_back(0, &[(loans[0].token, 40), (loans[1].token, 40)]);
    assert!(memory.take_modified(loans[0].segments[0].address), "it is noted at the gate");
    let (_, frame) = bench.received().unwrap();
    assert_eq!(frame, [&[5; 28][..], &[6; 40]].concat());
    assert_eq!(bench.driver.function.device().counters.received, 1);
    // A reset is over only when the buffers are given up.
    loans.clear();
    bench.driver.send(0, &[Buffer::In(100)]);
    bench.driver.function.lend(session, 0, 8, &mut loans);
    let before = bench.driver.function.lending();
    bench.rings();
    bench.driver.set_status(0);
    assert_ne!(bench.driver.status(), 0);
    assert!(bench.rings() > 0 && bench.driver.function.lending().recall);
    bench.driver.function.give_back(0, &[(loans[0].token, 40)]);
    bench.driver.function.recalled();
    assert_eq!(bench.driver.status(), 0);
    let after = bench.driver.function.lending();
    assert!(before.live && !after.live && !after.recall);
}

#[test]
fn a_large_frame_comes_piece_by_piece_to_who_posts_a_few_buffers_at_a_time() {
    let mut bench = Bench::new(BASIC, 1);
    let (offload, frame) = large(3000, 1460);
    bench.driver.send(0, &[Buffer::In(2000)]);
    bench.driver.send(0, &[Buffer::In(2000)]);
    assert_eq!(bench.give(offload, &frame), 1, "its last piece waits");
    let mut payload = vec![];
    for _ in 0..2 {
        payload.extend_from_slice(&bench.received().unwrap().1[54..]);
    }
    bench.driver.send(0, &[Buffer::In(2000)]);
    bench.driver.function.give(&mut bench.batch);
    assert!(bench.batch.is_empty());
    payload.extend_from_slice(&bench.received().unwrap().1[54..]);
    assert_eq!(payload, &frame[54..], "each piece once");
    // And the next frame from its beginning.
    for _ in 0..3 {
        bench.driver.send(0, &[Buffer::In(2000)]);
    }
    assert_eq!(bench.give(offload, &frame), 0);
    assert_eq!(std::iter::from_fn(|| bench.received()).count(), 3);
}

#[test]
fn a_queue_that_is_always_full_does_not_keep_the_others_waiting() {
    let mut bench = Bench::new(CONTROL | feature::MQ, 2);
    assert_eq!(bench.command(4, control::MQ, control::MQ_VQ_PAIRS_SET, &[2, 0]), 0);
    let alone = to([3; 6]);
    bench.driver.send(3, &[Buffer::Out(&[0; 12]), Buffer::Out(&alone)]);
    let mut batch = Batch::new(8, 1 << 20);
    let mut came = false;
    for _ in 0..2 {
        for _ in 0..16 {
            bench.send([0; 12], &to([5; 6]));
        }
        bench.driver.function.take(&mut batch);
        came |= batch.iter().any(|(_, frame)| frame == alone);
        batch.clear();
    }
    assert!(came, "the frame of the second queue");
}

/// A frame of a flow that goes to the first pair, and one of the second.
fn flows() -> [Vec<u8>; 2] {
    [0u32, 1].map(|pair| {
        let frames = (0..=255).map(|port| {
            let (_, mut frame) = large(10, 1460);
            frame[35] = port;
            frame
        });
        frames.into_iter().find(|frame| net::flow_hash(frame) % 2 == pair).unwrap()
    })
}

#[test]
fn a_pair_without_buffers_keeps_nobody_elses_frames() {
    let mut bench = Bench::new(CONTROL | feature::MQ, 2);
    assert_eq!(bench.command(4, control::MQ, control::MQ_VQ_PAIRS_SET, &[2, 0]), 0);
    let [first, second] = flows();
    for _ in 0..2 {
        bench.driver.send(0, &[Buffer::In(1600)]);
    }
    for (frame, wait) in [(&second, 1), (&first, 1), (&second, 2), (&first, 2)] {
        assert_eq!(bench.give(Offload::default(), frame), wait);
    }
    assert_eq!(std::iter::from_fn(|| bench.driver.used(0)).count(), 2);
    for _ in 0..2 {
        bench.driver.send(2, &[Buffer::In(1600)]);
    }
    bench.driver.function.give(&mut bench.batch);
    assert!(bench.batch.is_empty() && std::iter::from_fn(|| bench.driver.used(2)).count() == 2);
    // What waits for too long is lost where others may be behind it, and only there.
    assert_eq!(bench.give(Offload::default(), &second), 1);
    bench.driver.function.give_up(&mut bench.batch);
    assert!(bench.batch.is_empty());
    assert_eq!(bench.driver.function.device().counters.receive_lost, 1);
    assert_eq!(bench.command(4, control::MQ, control::MQ_VQ_PAIRS_SET, &[1, 0]), 0);
    assert_eq!(bench.give(Offload::default(), &second), 1);
    bench.driver.function.give_up(&mut bench.batch);
    assert_eq!(bench.batch.len(), 1);
}

#[test]
fn receive_buffers_have_nothing_to_be_read() {
    let mut bench = Bench::new(BASIC, 1);
    bench.driver.send(0, &[Buffer::Out(&[0; 16]), Buffer::In(2000)]);
    bench.give(Offload::default(), &to(ADDRESS));
    assert_eq!(bench.driver.status() & 64, 64, "the device needs a reset");
    bench.batch.clear();
    bench.driver.start(BASIC);
    let session = bench.driver.function.lending().session;
    bench.driver.send(0, &[Buffer::Out(&[0; 16]), Buffer::In(2000)]);
    bench.driver.function.lend(session, 0, 8, &mut Vec::new());
    assert_eq!(bench.driver.status() & 64, 64);
}

#[test]
fn a_promiscuous_card_hears_tagged_frames_too() {
    let mut bench = Bench::new(CONTROL, 1);
    let mut tagged = to([2, 7, 7, 7, 7, 7]);
    tagged.splice(12..12, [0x81, 0, 0x20, 5]);
    for _ in 0..2 {
        bench.driver.send(0, &[Buffer::In(200)]);
    }
    bench.give(Offload::default(), &tagged);
    assert_eq!(bench.received().unwrap().1, tagged);
    assert_eq!(bench.command(2, control::RX, control::RX_PROMISC, &[0]), 0);
    bench.give(Offload::default(), &tagged);
    assert_eq!(bench.received(), None);
}

#[test]
fn the_address_that_is_set_is_the_one_that_is_shown() {
    let mut bench = Bench::new(CONTROL, 1);
    let at = bench.driver.device.unwrap();
    let shown =
        |bench: &mut Bench| -> Vec<u8> { (0..6).map(|byte| bench.driver.read(at + byte, 1) as u8).collect() };
    assert_eq!(bench.command(2, control::MAC, control::MAC_ADDR_SET, &[2, 7, 7, 7, 7, 7]), 0);
    assert_eq!(shown(&mut bench), [2, 7, 7, 7, 7, 7]);
    bench.driver.set_status(0);
    assert_eq!(shown(&mut bench), ADDRESS);
}

#[test]
fn buffers_of_a_new_session_are_not_lent_to_an_old_one() {
    let mut bench = Bench::new(BASIC, 1);
    let old = bench.driver.function.lending();
    bench.driver.start(BASIC | feature::MRG_RXBUF);
    bench.driver.send(0, &[Buffer::In(100)]);
    let mut loans = Vec::new();
    bench.driver.function.lend(old.session, 0, 8, &mut loans);
    assert_eq!(loans, []);
    let new = bench.driver.function.lending();
    bench.driver.function.lend(new.session, 0, 8, &mut loans);
    assert_eq!(loans.len(), 1);
}
