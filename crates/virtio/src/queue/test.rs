//! Rings as a driver would and as none should write them.

use super::*;
use memory::Backing;
use proptest::prelude::*;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const SIZE: u16 = 8;
const RAM: u64 = 0x1_0000;
const BOTH: RingFeatures = RingFeatures { indirect: true, event_index: true, packed: false };

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Bench {
    memory: GuestMemory,
    queue: Queue,
    published: u16,
}

impl Bench {
    fn new(features: RingFeatures) -> Self {
        let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
        let mut queue = Queue::new(SIZE);
        (queue.descriptors, queue.available, queue.used) = (DESCRIPTORS, AVAILABLE, USED);
        queue.set_features(features);
        queue.enable(&memory, 0).unwrap();
        Self { memory, queue, published: 0 }
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let raw =
            u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.memory.write(table + u64::from(index) * 16, &raw.to_le_bytes()).unwrap();
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.published % SIZE);
        self.memory.write(AVAILABLE + 4 + slot * 2, &head.to_le_bytes()).unwrap();
        self.published = self.published.wrapping_add(1);
        self.memory.write(AVAILABLE + 2, &self.published.to_le_bytes()).unwrap();
    }

    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        self.queue.pop(&self.memory)
    }

    fn why(&mut self) -> &'static str {
        match self.pop() {
            Err(RingError::Chain { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_chain_is_read_and_written_across_its_pieces() {
    let mut bench = Bench::new(RingFeatures::default());
    bench.memory.write(0x5000, b"abcdef").unwrap();
    bench.descriptor(DESCRIPTORS, 6, 0x5000, 2, NEXT, 1);
    bench.descriptor(DESCRIPTORS, 1, 0x5002, 4, NEXT, 3);
    bench.descriptor(DESCRIPTORS, 3, 0x6000, 3, NEXT | WRITE, 4);
    bench.descriptor(DESCRIPTORS, 4, 0x7000, 5, WRITE, 0);
    bench.publish(6);
    let chain = bench.pop().unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (6, 6, 8));
    let mut middle = [0; 4];
    assert_eq!(chain.readable.read(&bench.memory, 1, &mut middle).unwrap(), 4);
    assert_eq!(&middle, b"bcde");
    assert_eq!(chain.readable.read(&bench.memory, 5, &mut middle).unwrap(), 1);
    assert_eq!(chain.writable.write(&bench.memory, 2, b"0123456789").unwrap(), 6);
    assert_eq!(&bench.memory.read_array::<3>(0x6000).unwrap(), b"\0\x000");
    assert_eq!(&bench.memory.read_array::<6>(0x7000).unwrap(), b"12345\0");
    assert_eq!(
        chain.writable.slice(1, 4),
        [Segment { address: 0x6001, len: 2 }, Segment { address: 0x7000, len: 2 }]
    );
    assert_eq!(chain.writable.slice(8, 1), []);
    assert!(bench.pop().unwrap().is_none());
    bench.queue.push(&bench.memory, 6, 8).unwrap();
    assert_eq!(bench.memory.load_u16(USED + 2).unwrap(), 1);
    assert_eq!(bench.memory.load_u64(USED + 4).unwrap(), 8 << 32 | 6);
}

#[test]
fn indirect_tables_may_end_a_chain() {
    let mut bench = Bench::new(BOTH);
    bench.descriptor(DESCRIPTORS, 0, 0x5000, 16, NEXT, 1);
    bench.descriptor(DESCRIPTORS, 1, TABLE, 32, INDIRECT, 0);
    bench.descriptor(TABLE, 0, 0x6000, 512, NEXT | WRITE, 1);
    bench.descriptor(TABLE, 1, 0x7000, 1, WRITE, 0);
    bench.publish(0);
    let chain = bench.pop().unwrap().unwrap();
    assert_eq!((chain.readable.len(), chain.writable.len()), (16, 513));
}

#[test]
fn malformed_chains_are_refused() {
    type Make = fn(&Bench);
    let cases: [(&str, Make); 9] = [
        ("more descriptors than allowed", |b| {
            for i in 0..SIZE {
                b.descriptor(DESCRIPTORS, i, 0x5000, 1, NEXT, (i + 1) % SIZE);
            }
        }),
        ("an index outside the descriptor table", |b| b.descriptor(DESCRIPTORS, 0, 0x5000, 1, NEXT, SIZE)),
        ("a readable piece after a writable one", |b| {
            b.descriptor(DESCRIPTORS, 0, 0x5000, 1, NEXT | WRITE, 1);
            b.descriptor(DESCRIPTORS, 1, 0x5000, 1, 0, 0);
        }),
        ("an indirect table where none may be", |b| {
            b.descriptor(DESCRIPTORS, 0, TABLE, 16, INDIRECT, 0);
            b.descriptor(TABLE, 0, TABLE, 16, INDIRECT, 0);
        }),
        ("an indirect table that is not the last", |b| {
            b.descriptor(DESCRIPTORS, 0, TABLE, 16, INDIRECT | NEXT, 1);
        }),
        ("an indirect table that is not whole descriptors", |b| {
            b.descriptor(DESCRIPTORS, 0, TABLE, 17, INDIRECT, 0);
        }),
        ("an indirect table that is not whole descriptors", |b| {
            b.descriptor(DESCRIPTORS, 0, TABLE, 0, INDIRECT, 0);
        }),
        ("an index outside the descriptor table", |b| {
            b.descriptor(DESCRIPTORS, 0, TABLE, 32, INDIRECT, 0);
            b.descriptor(TABLE, 0, 0x5000, 1, NEXT, 2);
        }),
        ("more descriptors than allowed", |b| {
            b.descriptor(DESCRIPTORS, 0, TABLE, 32, INDIRECT, 0);
            b.descriptor(TABLE, 0, 0x5000, 1, NEXT, 1);
            b.descriptor(TABLE, 1, 0x5000, 1, NEXT, 0);
        }),
    ];
    for (why, make) in cases {
        let mut bench = Bench::new(BOTH);
        make(&bench);
        bench.publish(0);
        assert_eq!(bench.why(), why);
    }
    let mut bench = Bench::new(RingFeatures::default());
    bench.descriptor(DESCRIPTORS, 0, TABLE, 16, INDIRECT, 0);
    bench.publish(0);
    assert_eq!(bench.why(), "an indirect table where none may be");
    for (address, len) in [(RAM - 1, 2), (RAM, 1), (u64::MAX, 1), (0, u32::MAX)] {
        let mut bench = Bench::new(BOTH);
        bench.descriptor(DESCRIPTORS, 0, address, len, WRITE, 0);
        bench.publish(0);
        assert!(matches!(bench.pop(), Err(RingError::Memory(_))), "{address:#x}");
    }
    let mut bench = Bench::new(BOTH);
    bench.descriptor(DESCRIPTORS, 0, RAM - 8, 16, INDIRECT, 0);
    bench.publish(0);
    assert!(matches!(bench.pop(), Err(RingError::Memory(_))));
    let mut bench = Bench::new(BOTH);
    bench.memory.write(AVAILABLE + 2, &(SIZE + 1).to_le_bytes()).unwrap();
    assert_eq!(bench.pop(), Err(RingError::Index { ahead: SIZE + 1, size: SIZE }));
}

#[test]
fn areas_and_sizes_are_checked_when_a_queue_is_enabled() {
    let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
    let good = (SIZE, DESCRIPTORS, AVAILABLE, USED);
    let bad = [
        (0, DESCRIPTORS, AVAILABLE, USED),
        (6, DESCRIPTORS, AVAILABLE, USED),
        (16, DESCRIPTORS, AVAILABLE, USED),
        (SIZE, DESCRIPTORS + 8, AVAILABLE, USED),
        (SIZE, DESCRIPTORS, AVAILABLE + 1, USED),
        (SIZE, DESCRIPTORS, AVAILABLE, USED + 2),
        (SIZE, RAM - 112, AVAILABLE, USED),
        (SIZE, DESCRIPTORS, RAM - 20, USED),
        (SIZE, DESCRIPTORS, AVAILABLE, RAM - 68),
        (SIZE, !15, AVAILABLE, USED),
    ];
    for (case, fine) in std::iter::once((good, true)).chain(bad.map(|case| (case, false))) {
        let mut queue = Queue::new(SIZE);
        (queue.size, queue.descriptors, queue.available, queue.used) = case;
        assert_eq!(queue.enable(&memory, 0).is_ok(), fine, "{case:?}");
        assert_eq!(queue.enabled(), fine);
    }
}

#[test]
fn the_driver_is_told_as_it_wishes() {
    let mut bench = Bench::new(RingFeatures::default());
    assert!(!bench.queue.take_interrupt(&bench.memory).unwrap(), "nothing was returned");
    bench.queue.push(&bench.memory, 0, 0).unwrap();
    assert!(bench.queue.take_interrupt(&bench.memory).unwrap());
    bench.memory.write(AVAILABLE, &[1, 0]).unwrap();
    bench.queue.push(&bench.memory, 0, 0).unwrap();
    assert!(!bench.queue.take_interrupt(&bench.memory).unwrap());

    let mut bench = Bench::new(BOTH);
    bench.memory.write(AVAILABLE, &[1, 0]).unwrap();
    let used_event = AVAILABLE + 4 + u64::from(SIZE) * 2;
    let mut told = vec![];
    for i in 0..20u16 {
        if i == 12 {
            bench.memory.write(used_event, &14u16.to_le_bytes()).unwrap();
        }
        bench.queue.push(&bench.memory, 0, 0).unwrap();
        if bench.queue.take_interrupt(&bench.memory).unwrap() {
            told.push(i);
        }
    }
    assert_eq!(told, [0, 14], "when chain number used_event is returned, and not again");
}

#[test]
fn an_empty_queue_asks_to_be_told_of_the_next_chain() {
    let mut bench = Bench::new(BOTH);
    let avail_event = USED + 4 + u64::from(SIZE) * 8;
    for round in 0..20u16 {
        assert!(bench.pop().unwrap().is_none());
        assert_eq!(bench.memory.load_u16(avail_event).unwrap(), round);
        bench.descriptor(DESCRIPTORS, round % SIZE, 0x5000, 4, 0, 0);
        bench.publish(round % SIZE);
        assert_eq!(bench.pop().unwrap().unwrap().head, round % SIZE);
        bench.queue.push(&bench.memory, round % SIZE, 0).unwrap();
    }
    bench.queue.reset();
    assert!(bench.pop().unwrap().is_none() && !bench.queue.enabled());
}

fn small_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![8 => 0x5000..RAM, 1 => Just(TABLE), 1 => any::<u64>()];
    let len = prop_oneof![6 => 0u32..64, 1 => (0u32..40).prop_map(|n| n * 16), 1 => any::<u32>()];
    (address, len, 0u16..8, 0..SIZE + 1)
}

proptest! {
    /// Whatever the rings say, a chain's pieces are RAM, at most as many as allowed, and exactly those named.
    #[test]
    fn popped_chains_are_sound(
        own in prop::collection::vec(small_descriptor(), usize::from(SIZE)),
        other in prop::collection::vec(small_descriptor(), 40),
        heads in prop::collection::vec(0..SIZE + 2, 1..20),
    ) {
        let mut bench = Bench::new(BOTH);
        for (table, list) in [(DESCRIPTORS, &own), (TABLE, &other)] {
            for (i, &(address, len, flags, next)) in (0u16..).zip(list) {
                bench.descriptor(table, i, address, len, flags, next);
            }
        }
        let named = |segment: &Segment, flag: u16| own.iter().chain(&other).any(|&(address, len, flags, _)| {
            (address, len) == (segment.address, segment.len) && flags & WRITE == flag
        });
        for head in heads {
            bench.publish(head);
            let Ok(popped) = bench.pop() else { break };
            let chain = popped.unwrap();
            let (readable, writable) = (chain.readable.slice(0, u64::MAX), chain.writable.slice(0, u64::MAX));
            prop_assert!(readable.len() + writable.len() <= usize::from(2 * SIZE));
            for segment in readable.iter().chain(&writable) {
                prop_assert!(bench.memory.contains(segment.address, segment.len.into()));
            }
            prop_assert!(readable.iter().all(|segment| named(segment, 0)));
            prop_assert!(writable.iter().all(|segment| named(segment, WRITE)));
            bench.queue.push(&bench.memory, chain.head, 0).unwrap();
        }
    }
}

#[test]
fn chains_that_the_device_has_count() {
    let mut bench = Bench::new(BOTH);
    bench.descriptor(DESCRIPTORS, 0, 0x5000, 2, 0, 0);
    for _ in 0..SIZE {
        bench.publish(0);
        assert!(bench.pop().unwrap().is_some());
    }
    assert_eq!(bench.pop(), Ok(None), "all are with the device");
    bench.publish(0);
    assert_eq!(bench.pop(), Err(RingError::Index { ahead: SIZE + 1, size: SIZE }));
    bench.queue.push(&bench.memory, 0, 0).unwrap();
    assert!(bench.pop().unwrap().is_some());
}
