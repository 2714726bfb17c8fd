//! A disk's driver, and a worker that answers from a vector.

use super::device::Block;
use crate::driver::{Buffer, Driver, EVENT_IDX, INDIRECT_DESC, VERSION_1};
use chipset::pci::command;
use device::Notify;
use device::block::{Controller, Geometry, Operation, Outcome, Request};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const GEOMETRY: Geometry =
    Geometry { capacity: 1 << 20, block_size: 512, read_only: false, discard: true, write_cache: true };
const FLUSH: u64 = 1 << 9;
const ALL: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | FLUSH;

struct Bench {
    driver: Driver<Block>,
    stirred: Arc<AtomicUsize>,
    disk: Vec<u8>,
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    (u128::from(kind) | u128::from(sector) << 64).to_le_bytes()
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
}

impl Bench {
    fn new(geometry: Geometry, features: u64) -> Self {
        Self::with_queues(geometry, features, 1)
    }

    fn with_queues(geometry: Geometry, features: u64, queues: u16) -> Self {
        let stirred = Arc::new(AtomicUsize::new(0));
        let count = stirred.clone();
        let notify = Notify::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let mut driver = Driver::new(|memory, sink| {
            Block::new(memory, sink, notify, geometry, "a serial number too long", queues)
        });
        driver.enable_msix();
        driver.start(features);
        stirred.store(0, Ordering::Relaxed);
        Self { driver, stirred, disk: vec![0; 1 << 20] }
    }

    /// The worker: serves what there is, and says what it was asked.
    fn work(&mut self) -> Vec<Request> {
        let mut served = vec![];
        while let Some(request) = self.driver.function.next_request() {
            let mut at = request.offset as usize;
            for segment in &request.segments {
                let part = &mut self.disk[at..at + segment.len as usize];
                match request.operation {
                    Operation::Read => self.driver.memory.write(segment.address, part).unwrap(),
                    Operation::Write { .. } => self.driver.memory.read(segment.address, part).unwrap(),
                    other => panic!("{other:?} has no data"),
                }
                at += part.len();
            }
            self.driver.function.complete(request.token, Outcome::Ok);
            served.push(request);
        }
        served
    }

    /// Sends a request without data for the driver; answers status and operation.
    fn ask(&mut self, out: &[&[u8]]) -> (u8, Option<Operation>) {
        let mut buffers: Vec<_> = out.iter().map(|&bytes| Buffer::Out(bytes)).collect();
        buffers.push(Buffer::In(1));
        let head = self.driver.send(0, &buffers);
        let served = self.work();
        assert_eq!(self.driver.used(0).unwrap(), (head, 1));
        (self.driver.bytes(0, head, out.len())[0], served.first().map(|request| request.operation))
    }
}

#[test]
fn what_is_written_is_read_whatever_the_framing() {
    let mut bench = Bench::new(GEOMETRY, ALL);
    let text: Vec<u8> = (0..1536u32).map(|i| (i % 253) as u8).collect();
    let whole: Vec<u8> = header(1, 3).iter().chain(&text[..700]).copied().collect();
    let head = bench.driver.send(0, &[Buffer::Out(&whole), Buffer::Out(&text[700..]), Buffer::In(1)]);
    assert_eq!(bench.stirred.load(Ordering::Relaxed), 1);
    let served = bench.work();
    assert_eq!(served[0].operation, Operation::Write { fua: false });
    assert_eq!((served[0].offset, served[0].len), (1536, 1536));
    assert_eq!(bench.driver.used(0), Some((head, 1)));
    assert_eq!(bench.driver.interrupts(), [0]);
    assert!(bench.disk[1536..3072] == text);

    let header = header(0, 3);
    let buffers = [Buffer::Out(&header[..5]), Buffer::Out(&header[5..]), Buffer::In(1000), Buffer::In(537)];
    let head = bench.driver.send(0, &buffers);
    bench.work();
    assert_eq!(bench.driver.used(0), Some((head, 1537)));
    let tail = bench.driver.bytes(0, head, 3);
    assert!(bench.driver.bytes(0, head, 2) == text[..1000] && tail[..536] == text[1000..]);
    assert_eq!(tail[536], 0, "status");
}

#[test]
fn requests_that_need_no_worker_are_answered_at_once() {
    let mut bench = Bench::new(GEOMETRY, ALL);
    let head = bench.driver.send(0, &[Buffer::Out(&header(8, 0)), Buffer::In(20), Buffer::In(1)]);
    assert_eq!(bench.work(), []);
    assert_eq!(bench.driver.used(0), Some((head, 21)));
    assert_eq!(bench.driver.bytes(0, head, 1), b"a serial number too ");
    assert_eq!(bench.ask(&[&header(4, 0)]), (0, Some(Operation::Flush)));
    assert_eq!(bench.ask(&[&header(99, 0)]), (2, None));
    let sector = [0; 512];
    let past = GEOMETRY.capacity / 512;
    assert_eq!(bench.ask(&[&header(1, past), &sector]), (1, None));
    assert_eq!(bench.ask(&[&header(1, past - 1), &sector]), (0, Some(Operation::Write { fua: false })));
    assert_eq!(bench.ask(&[&header(1, u64::MAX), &sector]), (1, None));
    assert_eq!(bench.ask(&[&header(1, u64::MAX / 512), &sector]), (1, None));
    assert_eq!(bench.ask(&[&header(1, 0), &sector[1..]]), (1, None));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut bench = Bench::new(GEOMETRY, ALL | 1 << 13 | 1 << 14);
    assert_eq!(bench.ask(&[&header(11, 0), &range(8, 16, 0)]), (0, Some(Operation::Discard)));
    assert_eq!(bench.ask(&[&header(11, 0), &range(8, 16, 1)]), (2, None));
    let zeroes = |unmap| (0, Some(Operation::WriteZeroes { unmap, fua: false }));
    assert_eq!(bench.ask(&[&header(13, 0), &range(8, 16, 0)]), zeroes(false));
    assert_eq!(bench.ask(&[&header(13, 0), &range(0, 2048, 1)]), zeroes(true));
    assert_eq!(bench.ask(&[&header(13, 0), &range(1, 2048, 0)]), (1, None));
    assert_eq!(bench.ask(&[&header(13, 0), &range(0, 8, 2)]), (2, None));
    assert_eq!(bench.ask(&[&header(13, 0), &range(0, 8, 0), &range(8, 8, 0)]), (1, None));
    let mut bench = Bench::new(Geometry { discard: false, ..GEOMETRY }, ALL);
    assert_eq!(bench.driver.features() & (1 << 13 | 1 << 14), 0);
    assert_eq!(bench.ask(&[&header(11, 0), &range(8, 16, 0)]), (2, None));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut bench = Bench::new(Geometry { read_only: true, ..GEOMETRY }, ALL);
    assert_eq!(bench.driver.features() & (1 << 5 | 1 << 13), 1 << 5);
    assert_eq!(bench.ask(&[&header(1, 0), &[0; 512]]), (1, None));
    assert_eq!(bench.ask(&[&header(13, 0), &range(0, 8, 0)]), (1, None));
}

#[test]
fn a_driver_that_never_flushes_gets_durable_writes() {
    let mut bench = Bench::new(GEOMETRY, ALL & !FLUSH);
    assert_eq!(bench.ask(&[&header(1, 0), &[0; 512]]), (0, Some(Operation::Write { fua: true })));
}

#[test]
fn several_queues_are_served_in_turn_and_answered_where_they_asked() {
    const MQ: u64 = 1 << 12;
    assert_eq!(Bench::new(GEOMETRY, ALL).driver.features() & MQ, 0);
    let mut bench = Bench::with_queues(GEOMETRY, ALL | MQ, 3);
    let config = bench.driver.device.unwrap();
    assert_eq!(bench.driver.read(config + 34, 2), 3);
    let mut heads = Vec::new();
    for queue in [2, 0, 2, 1] {
        let read = header(0, u64::from(queue) * 8);
        heads.push((queue, bench.driver.send(queue, &[Buffer::Out(&read), Buffer::In(512), Buffer::In(1)])));
    }
    let sectors: Vec<u64> = bench.work().iter().map(|request| request.offset / 4096).collect();
    assert_eq!(sectors, [0, 1, 2, 2]);
    for (queue, head) in heads {
        assert_eq!(bench.driver.used(queue), Some((head, 513)), "queue {queue}");
    }
    let vectors = bench.driver.interrupts();
    assert!([0, 1, 2].iter().all(|vector| vectors.contains(vector)), "{vectors:?}");
}

#[test]
fn a_driver_switches_the_cache_and_a_reset_switches_it_back() {
    const CONFIG_WCE: u64 = 1 << 11;
    let write = |bench: &mut Bench| bench.ask(&[&header(1, 0), &[0; 512]]).1;
    for write_cache in [true, false] {
        let mut bench = Bench::new(Geometry { write_cache, ..GEOMETRY }, ALL | CONFIG_WCE | 1 << 14);
        let place = bench.driver.device.unwrap() + 32;
        assert_eq!(bench.driver.read(place, 1), u64::from(write_cache));
        assert_eq!(write(&mut bench), Some(Operation::Write { fua: !write_cache }));
        bench.driver.write(place, 1, u64::from(!write_cache));
        assert_eq!(bench.driver.read(place, 1), u64::from(!write_cache));
        assert_eq!(write(&mut bench), Some(Operation::Write { fua: write_cache }));
        let zeroes = bench.ask(&[&header(13, 0), &range(8, 16, 0)]).1;
        assert_eq!(zeroes, Some(Operation::WriteZeroes { unmap: false, fua: write_cache }));
        // A driver that has not asked for the switch has none.
        bench.driver.start(ALL);
        assert_eq!(bench.driver.read(place, 1), u64::from(write_cache));
        bench.driver.write(place, 1, u64::from(!write_cache));
        assert_eq!(write(&mut bench), Some(Operation::Write { fua: !write_cache }));
    }
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let mut bench = Bench::new(Geometry { block_size: 4096, ..GEOMETRY }, ALL);
    let config = bench.driver.device.unwrap();
    for (offset, size, value) in
        [(0, 8, 2048), (8, 4, 0), (12, 4, 254), (20, 4, 4096), (34, 2, 1), (40, 4, 1), (44, 4, 8), (56, 1, 1)]
    {
        assert_eq!(bench.driver.read(config + offset, size), value, "at {offset}");
    }
    assert_eq!(bench.ask(&[&header(1, 0), &[0; 512]]), (1, None), "half a block");
}

#[test]
fn outcomes_become_statuses_in_any_order() {
    let mut bench = Bench::new(GEOMETRY, ALL);
    let outcomes =
        [Outcome::Ok, Outcome::IoError, Outcome::NoSpace, Outcome::Unsupported, Outcome::BadAddress];
    let heads: Vec<_> = outcomes
        .iter()
        .map(|_| bench.driver.send(0, &[Buffer::Out(&header(0, 0)), Buffer::In(512), Buffer::In(1)]))
        .collect();
    let requests: Vec<_> = std::iter::from_fn(|| bench.driver.function.next_request()).collect();
    let ask = |bench: &mut Bench, i: usize| {
        bench.driver.function.complete(requests[i].token, outcomes[i]);
        bench.driver.function.complete(requests[i].token, Outcome::Ok);
        let (head, len) = bench.driver.used(0).unwrap();
        assert_eq!(head, heads[i]);
        assert!(bench.driver.used(0).is_none(), "answered once");
        (bench.driver.bytes(0, head, 2)[0], len)
    };
    assert_eq!([4, 2, 0, 1, 3].map(|i| ask(&mut bench, i)), [(1, 0), (1, 0), (0, 513), (1, 0), (2, 0)]);
}

#[test]
fn a_reset_waits_for_the_worker() {
    let mut bench = Bench::new(GEOMETRY, ALL);
    for _ in 0..2 {
        bench.driver.send(0, &[Buffer::Out(&header(0, 0)), Buffer::In(512), Buffer::In(1)]);
    }
    let tokens: Vec<_> =
        std::iter::from_fn(|| bench.driver.function.next_request()).map(|r| r.token).collect();
    bench.driver.set_status(0);
    assert_ne!(bench.driver.status(), 0);
    bench.driver.set_status(1);
    bench.driver.function.complete(tokens[1], Outcome::Ok);
    assert_ne!(bench.driver.status(), 0);
    bench.driver.function.complete(tokens[0], Outcome::Ok);
    assert_eq!(bench.driver.status(), 0);
    bench.driver.interrupts();
    bench.driver.start(ALL);
    bench.driver.function.complete(tokens[0], Outcome::Ok);
    assert!(bench.driver.used(0).is_none() && bench.driver.interrupts().is_empty());
    assert_eq!(bench.ask(&[&header(4, 0)]), (0, Some(Operation::Flush)));
}

#[test]
fn requests_that_cannot_be_answered_stop_the_device() {
    for out in [15, 16] {
        let mut bench = Bench::new(GEOMETRY, ALL);
        let header = header(4, 0);
        let mut buffers = vec![Buffer::Out(&header[..out])];
        if out == 15 {
            buffers.push(Buffer::In(1));
        }
        bench.driver.send(0, &buffers);
        bench.driver.interrupts();
        assert_eq!(bench.work(), []);
        assert_eq!(bench.driver.status(), 15 | 64);
        assert_eq!(bench.driver.interrupts(), [1], "the configuration vector");
        bench.driver.start(ALL);
        assert_eq!(bench.ask(&[&header]), (0, Some(Operation::Flush)));
    }
}

#[test]
fn a_ring_cannot_make_more_pending_requests_than_it_has_entries() {
    let mut bench = Bench::new(GEOMETRY, VERSION_1);
    let header = header(4, 0);
    let head = bench.driver.add(0, &[Buffer::Out(&header), Buffer::In(1)]);
    let mut tokens = vec![];
    for _ in 0..300 {
        tokens.extend(bench.driver.function.next_request().map(|request| request.token));
        if tokens.len() == 256 && bench.driver.status() == 15 {
            bench.driver.function.complete(tokens.remove(7), Outcome::Ok);
        }
        if tokens.len() > 255 {
            break;
        }
        bench.driver.publish(0, head);
    }
    assert_eq!((tokens.len(), bench.driver.status()), (255, 15), "there was room for one more");
}

#[test]
fn what_is_done_while_the_function_is_no_bus_master_comes_back_later() {
    let mut bench = Bench::new(GEOMETRY, ALL);
    let head = bench.driver.send(0, &[Buffer::Out(&header(0, 3)), Buffer::In(512), Buffer::In(1)]);
    let request = bench.driver.function.next_request().unwrap();
    bench.driver.set_command(command::MEMORY);
    bench.driver.function.complete(request.token, Outcome::Ok);
    assert_eq!(bench.driver.used(0), None);
    bench.driver.set_command(command::MEMORY | command::BUS_MASTER);
    assert_eq!(bench.driver.used(0), Some((head, 513)));
    assert_eq!(bench.driver.interrupts(), [0]);
}
