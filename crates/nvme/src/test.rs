//! A guest driver's view: set the controller up, make queues, move blocks.

use crate::{Nvme, NvmeConfig, fuzz};
use chipset::pci::{Function, command};
use device::block::{Controller, Geometry, Operation, Outcome, Segment};
use device::{MsiSink, Notify, VmTime};
use memory::{Backing, GuestMemory};
use proptest::prelude::*;

const NOW: VmTime = VmTime(0);
const ADMIN_SQ: u64 = 0x1000;
const ADMIN_CQ: u64 = 0x2000;
const IO_SQ: u64 = 0x3000;
const IO_CQ: u64 = 0x4000;
const DATA: u64 = 0x10000;

struct Driver {
    nvme: Nvme,
    memory: GuestMemory,
    tails: [u32; 2],
    heads: [u32; 2],
}

fn disk(read_only: bool) -> NvmeConfig {
    let geometry =
        Geometry { capacity: 1 << 20, block_size: 512, read_only, discard: true, write_cache: true };
    NvmeConfig { geometry, serial: "serial".into(), uuid: *b"0123456789abcdef" }
}

impl Driver {
    fn new(read_only: bool) -> Self {
        Self::with_disk(disk(read_only))
    }

    fn with_disk(disk: NvmeConfig) -> Self {
        let memory = GuestMemory::new(&[(0, 1 << 20)], Backing::Private).unwrap();
        let nvme = Nvme::new(memory.clone(), MsiSink::unconnected(), Notify::unconnected(), disk);
        let mut driver = Self { nvme, memory, tails: [0; 2], heads: [0; 2] };
        driver.set_bus_master(true);
        driver.write(0x24, 4, 7 << 16 | 7);
        driver.write(0x28, 8, ADMIN_SQ);
        driver.write(0x30, 4, ADMIN_CQ);
        driver.write(0x34, 4, 0);
        driver.write(0x14, 4, 0x0046_0001);
        assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW), 1, "ready");
        driver
    }

    fn set_bus_master(&mut self, on: bool) {
        let bits = command::MEMORY | if on { command::BUS_MASTER } else { 0 };
        self.nvme.config_mut().write(4, 2, bits.into());
        self.nvme.config_written(4);
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        self.nvme.bar_write(0, offset, size, value, NOW);
    }

    /// Puts a command into queue 0 or 1 (8 entries each) and rings.
    fn submit(&mut self, queue: usize, dwords: [u32; 16]) {
        let base = [ADMIN_SQ, IO_SQ][queue] + u64::from(self.tails[queue]) * 64;
        self.memory.write(base, &dwords.map(u32::to_le_bytes).concat()).unwrap();
        self.tails[queue] = (self.tails[queue] + 1) % 8;
        self.write(0x1000 + queue as u64 * 8, 4, u64::from(self.tails[queue]));
    }

    /// The next completion of a queue: result and status (without phase), if its phase says there is one.
    fn completion(&mut self, queue: usize) -> Option<(u32, u32)> {
        let head = self.heads[queue];
        let at = [ADMIN_CQ, IO_CQ][queue] + u64::from(head % 8) * 16;
        let last = self.memory.load_u32(at + 12).unwrap();
        let expected = (head / 8).is_multiple_of(2);
        if (last >> 16 & 1 == 1) != expected {
            return None;
        }
        self.heads[queue] += 1;
        self.write(0x1004 + queue as u64 * 8, 4, u64::from(self.heads[queue] % 8));
        Some((self.memory.load_u32(at).unwrap(), last >> 17))
    }

    fn admin(&mut self, opcode: u32, namespace: u32, prp: u64, ten: u32, eleven: u32) -> (u32, u32) {
        let mut dwords = [0; 16];
        dwords[0] = opcode | 0x1234 << 16;
        (dwords[1], dwords[6], dwords[7]) = (namespace, prp as u32, (prp >> 32) as u32);
        (dwords[10], dwords[11]) = (ten, eleven);
        self.submit(0, dwords);
        self.completion(0).expect("an admin command completes at once")
    }

    fn make_queues(&mut self) {
        assert_eq!(self.admin(5, 0, IO_CQ, 7 << 16 | 1, 1 << 16 | 3), (0, 0));
        assert_eq!(self.admin(1, 0, IO_SQ, 7 << 16 | 1, 1 << 16 | 1), (0, 0));
    }

    fn io(&mut self, opcode: u32, prps: [u64; 2], block: u64, blocks: u32) {
        let mut dwords = [0; 16];
        dwords[0] = opcode;
        dwords[1] = 1;
        for (index, prp) in prps.into_iter().enumerate() {
            (dwords[6 + index * 2], dwords[7 + index * 2]) = (prp as u32, (prp >> 32) as u32);
        }
        (dwords[10], dwords[11], dwords[12]) = (block as u32, (block >> 32) as u32, blocks.wrapping_sub(1));
        self.submit(1, dwords);
    }
}

#[test]
fn the_controller_and_namespace_are_identified() {
    let mut driver = Driver::new(false);
    assert_eq!(driver.admin(6, 0, DATA, 1, 0), (0, 0));
    assert_eq!(&driver.memory.read_array::<10>(DATA + 4).unwrap(), b"serial    ");
    assert_eq!(driver.admin(6, 1, DATA, 0, 0), (0, 0));
    assert_eq!(driver.memory.load_u64(DATA).unwrap(), 2048);
    assert_eq!(driver.memory.read_array::<4>(DATA + 128).unwrap(), [0, 0, 9, 0]);
    assert_eq!(driver.admin(6, 0, DATA, 2, 0), (0, 0));
    assert_eq!(driver.memory.load_u64(DATA).unwrap(), 1);
    assert_eq!(driver.admin(6, 5, DATA, 0, 0).1 & 0xff, 0x0b);
    assert_eq!(driver.admin(0x7f, 0, 0, 0, 0).1 & 0xff, 0x01);
    assert_eq!(driver.admin(9, 0, 0, 7, 0xffff_ffff), (15 << 16 | 15, 0));
    // A buffer that is not RAM.
    assert_eq!(driver.admin(6, 0, 1 << 40, 1, 0).1 & 0xff, 0x04);
}

#[test]
fn a_controller_that_is_no_bus_master_leaves_memory_alone() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    driver.io(2, [DATA, 0], 3, 1);
    let taken = driver.nvme.next_request().unwrap();
    driver.io(2, [DATA, 0], 4, 1);
    driver.set_bus_master(false);
    assert_eq!(driver.nvme.next_request(), None, "a command was read from the ring");
    driver.nvme.complete(taken.token, Outcome::Ok);
    assert_eq!(driver.completion(1), None, "a completion was written");
    let mut identify = [0; 16];
    (identify[0], identify[6], identify[10]) = (6, DATA as u32, 1);
    driver.submit(0, identify);
    assert_eq!(driver.completion(0), None, "an admin command was answered");
    driver.set_bus_master(true);
    assert_eq!(driver.completion(0), Some((0, 0)));
    assert_eq!(driver.completion(1), Some((0, 0)));
    assert_eq!(driver.nvme.next_request().unwrap().offset, 4 * 512);
}

#[test]
fn reads_and_writes_reach_the_worker_with_their_pages() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    driver.io(2, [DATA + 0x200, 0], 3, 1);
    let request = driver.nvme.next_request().unwrap();
    assert_eq!((request.operation, request.offset, request.len), (Operation::Read, 1536, 512));
    assert_eq!(request.segments, [Segment { address: DATA + 0x200, len: 512 }]);
    assert_eq!(driver.completion(1), None);
    driver.nvme.complete(request.token, Outcome::Ok);
    assert_eq!(driver.completion(1), Some((0, 0)));

    // Three pages by a list: the first starts in mid-page, the others are apart.
    driver.memory.write(0x8000, &[0x20000u64, 0x30000].map(u64::to_le_bytes).concat()).unwrap();
    driver.io(1, [DATA + 0x800, 0x8000], 0, 20);
    let request = driver.nvme.next_request().unwrap();
    assert_eq!(request.operation, Operation::Write { fua: false });
    let expected = [(DATA + 0x800, 0x800), (0x20000, 0x1000), (0x30000, 0x1000)];
    assert_eq!(request.segments, expected.map(|(address, len)| Segment { address, len }));
    driver.nvme.complete(request.token, Outcome::NoSpace);
    assert_eq!(driver.completion(1).unwrap().1 & 0xff, 0x81);
}

#[test]
fn the_driver_switches_the_write_cache() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    for (on, fua) in [(1, false), (0, true), (1, false)] {
        assert_eq!(driver.admin(0x09, 0, 0, 6, on).1, 0, "set features");
        assert_eq!(driver.admin(0x0a, 0, 0, 6, 0), (on, 0), "get features");
        driver.io(1, [DATA, 0], 0, 1);
        let request = driver.nvme.next_request().unwrap();
        assert_eq!(request.operation, Operation::Write { fua });
        driver.nvme.complete(request.token, Outcome::Ok);
        assert_eq!(driver.completion(1), Some((0, 0)));
    }
}

#[test]
fn commands_wait_while_the_guest_leaves_completions_lying() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    let mut submitted = 0;
    for turn in 0..1000u64 {
        // An unknown opcode ends at once; the ring is full again every time, and nobody takes completions.
        let entry = IO_SQ + turn % 8 * 64;
        driver.memory.write(entry, &[0x55]).unwrap();
        driver.write(0x1008, 4, (turn + 1) % 8);
        assert_eq!(driver.nvme.next_request(), None);
        submitted += 1;
    }
    driver.tails[1] = submitted % 8;
    // Seven were posted, one waits; all others are still in the submission ring.
    let mut taken = 0;
    while driver.completion(1).is_some() {
        assert_eq!(driver.nvme.next_request(), None);
        taken += 1;
        assert!(taken < 20);
    }
    assert!(taken >= 8, "{taken} completions");
    // And the queue still works.
    driver.io(0, [0, 0], 0, 1);
    let request = driver.nvme.next_request().unwrap();
    driver.nvme.complete(request.token, Outcome::Ok);
    assert_eq!(driver.completion(1), Some((0, 0)));
}

#[test]
fn asking_for_a_shutdown_again_and_again_flushes_once_at_a_time() {
    let mut driver = Driver::new(false);
    for _ in 0..100 {
        driver.write(0x14, 4, 0x0046_4001);
        driver.write(0x14, 4, 0x0046_0001);
    }
    driver.write(0x14, 4, 0x0046_4001);
    let requests: Vec<_> = std::iter::from_fn(|| driver.nvme.next_request()).collect();
    assert_eq!(requests.iter().map(|request| request.operation).collect::<Vec<_>>(), [Operation::Flush]);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW) >> 2 & 3, 1);
    driver.nvme.complete(requests[0].token, Outcome::Ok);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW) >> 2 & 3, 2);
}

#[test]
fn a_failed_enable_can_be_taken_back() {
    let mut driver = Driver::new(false);
    driver.write(0x14, 4, 0);
    driver.write(0x24, 4, 0);
    driver.write(0x14, 4, 0x0046_0001);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW), 2, "fatal, not ready");
    driver.write(0x14, 4, 0);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW), 0);
}

#[test]
fn nonsense_gets_a_status() {
    let mut driver = Driver::new(true);
    driver.make_queues();
    for (opcode, prps, block, blocks, status) in [
        (2, [DATA, 0], 2048, 1, 0x80),
        (2, [DATA, 0], u64::MAX, 2, 0x80),
        (2, [DATA + 1, 0], 0, 1, 0x13),
        (2, [DATA, DATA + 8], 0, 16, 0x13),
        (2, [DATA, 1 << 50], 0, 32, 0x04),
        (1, [DATA, 0], 0, 1, 0x20),
        (0x55, [DATA, 0], 0, 1, 0x01),
    ] {
        driver.io(opcode, prps, block, blocks);
        assert_eq!(driver.nvme.next_request(), None);
        assert_eq!(driver.completion(1).unwrap().1 & 0xff, status, "opcode {opcode:#x} at {block}");
    }
}

#[test]
fn a_discard_of_two_ranges_completes_once_both_are_done() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    let range = |blocks: u32, first: u64| [&[0; 4][..], &blocks.to_le_bytes(), &first.to_le_bytes()].concat();
    driver.memory.write(DATA, &[range(8, 16), range(4, 100)].concat()).unwrap();
    let mut dwords = [0; 16];
    (dwords[0], dwords[1], dwords[6], dwords[10], dwords[11]) = (9, 1, DATA as u32, 1, 4);
    driver.submit(1, dwords);
    let first = driver.nvme.next_request().unwrap();
    let second = driver.nvme.next_request().unwrap();
    assert_eq!((first.operation, first.offset, first.len), (Operation::Discard, 8192, 4096));
    driver.nvme.complete(second.token, Outcome::Ok);
    assert_eq!(driver.completion(1), None);
    driver.nvme.complete(first.token, Outcome::Ok);
    assert_eq!(driver.completion(1), Some((0, 0)));
}

#[test]
fn a_long_discard_is_many_requests_of_which_few_are_out_at_a_time() {
    let mut disk = disk(false);
    disk.geometry.capacity = 1 << 40;
    let mut driver = Driver::with_disk(disk);
    driver.make_queues();
    // 100 GiB and a block, at a block.
    let blocks = (100u32 << 21) + 1;
    let range = [&[0; 4][..], &blocks.to_le_bytes(), &1u64.to_le_bytes()].concat();
    driver.memory.write(DATA, &range).unwrap();
    let mut dwords = [0; 16];
    (dwords[0], dwords[1], dwords[6], dwords[11]) = (9, 1, DATA as u32, 4);
    driver.submit(1, dwords);
    let mut out: Vec<_> = std::iter::from_fn(|| driver.nvme.next_request()).collect();
    assert!(out.len() < 100);
    let mut next = 512;
    while !out.is_empty() {
        let request = out.remove(0);
        assert_eq!((request.operation, request.offset), (Operation::Discard, next));
        assert!(request.len <= 1 << 30);
        next += request.len;
        assert_eq!(driver.completion(1), None);
        driver.nvme.complete(request.token, Outcome::Ok);
        out.extend(std::iter::from_fn(|| driver.nvme.next_request()));
    }
    assert_eq!(next, 512 + (u64::from(blocks) << 9));
    assert_eq!(driver.completion(1), Some((0, 0)));
}

#[test]
fn a_queue_is_deleted_once_nobody_works_on_its_commands() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    driver.io(2, [DATA, 0], 0, 1);
    let taken = driver.nvme.next_request().unwrap();
    driver.io(9, [DATA, 0], 0, 1);
    driver.io(2, [DATA, 0], 1, 1);
    let (mut delete, mut delete_cq) = ([0; 16], [0; 16]);
    (delete[0], delete[10], delete_cq[0], delete_cq[10]) = (0, 1, 4, 1);
    driver.submit(0, delete);
    assert_eq!(driver.nvme.next_request(), None, "its ring is not looked at any more");
    assert_eq!((driver.completion(0), driver.completion(1)), (None, None), "a request is being worked on");
    driver.submit(0, delete_cq);
    assert_eq!(driver.completion(0).unwrap().1 & 0xff, 0x0c, "the completion queue is in use");
    driver.nvme.complete(taken.token, Outcome::Ok);
    assert_eq!((driver.completion(1), driver.completion(0)), (Some((0, 0)), Some((0, 0))));
    driver.submit(0, delete_cq);
    assert_eq!(driver.completion(0), Some((0, 0)));
    driver.submit(0, delete);
    assert_eq!(driver.completion(0).unwrap().1 & 0xff, 0x01, "it is gone");
}

#[test]
fn what_nobody_has_begun_is_aborted_with_its_queue() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    let range = |first: u64| [&[0; 4][..], &8u32.to_le_bytes(), &first.to_le_bytes()].concat();
    driver.memory.write(DATA, &[range(16), range(100)].concat()).unwrap();
    let mut discard = [0; 16];
    (discard[0], discard[1], discard[6], discard[10], discard[11]) = (9, 1, DATA as u32, 1, 4);
    driver.submit(1, discard);
    let taken = driver.nvme.next_request().unwrap();
    let mut delete = [0; 16];
    delete[10] = 1;
    driver.submit(0, delete);
    assert_eq!(driver.nvme.next_request(), None, "the second part");
    assert_eq!(driver.completion(0), None);
    driver.nvme.complete(taken.token, Outcome::Ok);
    assert_eq!(driver.completion(1).unwrap().1 & 0xff, 0x08, "done in part only");
    assert_eq!(driver.completion(0), Some((0, 0)));
}

#[test]
fn a_full_completion_queue_loses_nothing() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    let mut tokens = Vec::new();
    for _ in 0..14 {
        driver.io(2, [DATA, 0], 0, 1);
        tokens.push(driver.nvme.next_request().unwrap().token);
    }
    for token in tokens {
        driver.nvme.complete(token, Outcome::Ok);
    }
    for _ in 0..14 {
        assert_eq!(driver.completion(1), Some((0, 0)));
    }
    assert_eq!(driver.completion(1), None);
}

#[test]
fn a_disable_waits_for_the_worker() {
    let mut driver = Driver::new(false);
    driver.make_queues();
    driver.io(2, [DATA, 0], 0, 1);
    let request = driver.nvme.next_request().unwrap();
    driver.io(2, [DATA, 0], 1, 1);
    driver.write(0x14, 4, 0);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW) & 1, 1, "still draining");
    assert_eq!(driver.nvme.next_request(), None);
    driver.nvme.complete(request.token, Outcome::Ok);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW), 0);
}

#[test]
fn a_shutdown_flushes_first() {
    let mut driver = Driver::new(false);
    driver.write(0x14, 4, 0x0046_4001);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW) >> 2 & 3, 1);
    let request = driver.nvme.next_request().unwrap();
    assert_eq!(request.operation, Operation::Flush);
    driver.nvme.complete(request.token, Outcome::Ok);
    assert_eq!(driver.nvme.bar_read(0, 0x1c, 4, NOW) >> 2 & 3, 2);
}

proptest! {
    #[test]
    fn a_guest_out_of_its_mind_hurts_only_itself(data in prop::collection::vec(any::<u8>(), 0..4096)) {
        fuzz(&data);
    }
}
