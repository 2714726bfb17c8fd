//! A driver of packed rings, written from the driver's sections of the specification, and what a device makes of its ring.

use super::super::{QUEUE_SIZE_MAX, RingFeatures};
use super::*;
use memory::Backing;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};

const RING: u64 = 0x1000;
const DRIVER: u64 = 0x2000;
const DEVICE: u64 = 0x2010;
const TABLES: u64 = 0x3000;
const DATA: u64 = 0x8000;
const RAM: u64 = 0x1_0000;
const ALL: RingFeatures = RingFeatures { indirect: true, event_index: true, packed: true };

/// Both sides of a ring.
struct Bench {
    memory: GuestMemory,
    queue: Queue,
    size: u16,
    /// Descriptors made available and seen as used, ever: the place is the remainder, the round the quotient.
    available: u64,
    reaped: u64,
    /// Ids that are the driver's, and descriptors of those that are not.
    free: VecDeque<u16>,
    counts: BTreeMap<u16, u16>,
}

impl Bench {
    fn new(size: u16, features: RingFeatures) -> Self {
        let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
        let mut queue = Queue::new(64);
        (queue.size, queue.descriptors, queue.available, queue.used) = (size, RING, DRIVER, DEVICE);
        queue.set_features(features);
        queue.enable(&memory, 0).unwrap();
        let free = (0..size).rev().collect();
        Self { memory, queue, size, available: 0, reaped: 0, free, counts: BTreeMap::new() }
    }

    fn wrap(&self, place: u64) -> bool {
        (place / u64::from(self.size)).is_multiple_of(2)
    }

    fn put(&self, at: u64, address: u64, len: u32, id: u16, flags: u16) {
        let raw =
            u128::from(address) | u128::from(len) << 64 | u128::from(id) << 96 | u128::from(flags) << 112;
        self.memory.write(at, &raw.to_le_bytes()).unwrap();
    }

    fn room(&self) -> u16 {
        self.size - self.counts.values().sum::<u16>()
    }

    /// Makes a buffer of pieces (address, length, whether the device writes it) available; `false`: there is no room.
    fn add(&mut self, pieces: &[(u64, u32, bool)], indirect: bool) -> Option<u16> {
        let count = if indirect { 1 } else { pieces.len() as u16 };
        if self.room() < count {
            return None;
        }
        let id = self.free.pop_front()?;
        let write = |write: bool| if write { WRITE } else { 0 };
        let mut first = 0;
        let table = [(TABLES + u64::from(id) * 128, pieces.len() as u32 * 16, false)];
        let own = if indirect { &table[..] } else { pieces };
        if indirect {
            for (entry, &(address, len, written)) in (0u64..).zip(pieces) {
                self.put(table[0].0 + entry * 16, address, len, 0x7777, write(written));
            }
        }
        for (number, &(address, len, written)) in (0u64..).zip(own) {
            let place = self.available + number;
            let last = number + 1 == own.len() as u64;
            let kind = if indirect { INDIRECT } else { write(written) | if last { 0 } else { NEXT } };
            let flags = kind | if self.wrap(place) { AVAIL } else { USED };
            // Only the last one's id counts.
            let id = if last { id } else { 0x5555 };
            let at = RING + place % u64::from(self.size) * 16;
            if number == 0 {
                first = flags;
                self.put(at, address, len, id, flags ^ AVAIL ^ USED);
            } else {
                self.put(at, address, len, id, flags);
            }
        }
        let at = RING + self.available % u64::from(self.size) * 16;
        self.memory.write(at + 14, &first.to_le_bytes()).unwrap();
        self.available += u64::from(count);
        self.counts.insert(id, count);
        Some(id)
    }

    /// The next used buffer: its id, and the length if anything was written.
    fn reap(&mut self) -> Option<(u16, Option<u32>)> {
        let at = RING + self.reaped % u64::from(self.size) * 16;
        let raw = u128::from_le_bytes(self.memory.read_array(at).unwrap());
        let (len, id, flags) = ((raw >> 64) as u32, (raw >> 96) as u16, (raw >> 112) as u16);
        let wrap = self.wrap(self.reaped);
        if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
            return None;
        }
        self.reaped += u64::from(self.counts.remove(&id).expect("an id that was with the device"));
        self.free.push_back(id);
        Some((id, (flags & WRITE != 0).then_some(len)))
    }

    /// Wants an interrupt when the place `at` is used.
    fn wish(&self, at: u64) {
        let wrap = if self.wrap(at) { 1 << 15 } else { 0 };
        let place = (at % u64::from(self.size)) as u16 | wrap;
        self.memory.write(DRIVER, &[place.to_le_bytes(), 2u16.to_le_bytes()].concat()).unwrap();
    }

    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        self.queue.pop(&self.memory)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Add(Vec<(u64, u32, bool)>, bool),
    Pop,
    /// Gives back so many, beginning with this one of those that are out.
    Push(usize, usize, u32),
    Reap,
    /// An interrupt is wanted so many places on.
    Wish(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let piece = (DATA..RAM - 100, 1u32..64, any::<bool>());
    let pieces = prop::collection::vec(piece, 1..5).prop_map(|mut pieces| {
        pieces.sort_by_key(|piece| piece.2);
        pieces
    });
    let step = prop_oneof![
        3 => (pieces, any::<bool>()).prop_map(|(pieces, indirect)| Step::Add(pieces, indirect)),
        3 => Just(Step::Pop),
        2 => (0usize..8, 1usize..4, 0u32..3).prop_map(|(first, count, len)| Step::Push(first, count, len)),
        2 => Just(Step::Reap),
        1 => (0u64..10).prop_map(Step::Wish),
    ];
    prop::collection::vec(step, 0..300)
}

proptest! {
    /// What the driver adds comes out, in order; what is given back, in any order and in batches, the driver sees in that
    /// order; the driver is interrupted when the place that it named is passed, and at no other.
    #[test]
    fn both_sides_agree(size in 1u16..20, steps in steps()) {
        let mut bench = Bench::new(size, ALL);
        let (mut added, mut out, mut given) = (VecDeque::new(), vec![], VecDeque::new());
        let (mut used, mut wish) = (0u64, 0u64);
        bench.wish(wish);
        for step in steps {
            match step {
                Step::Add(pieces, indirect) => {
                    if let Some(id) = bench.add(&pieces, indirect) {
                        added.push_back((id, pieces));
                    }
                }
                Step::Pop => match (bench.pop().unwrap(), added.pop_front()) {
                    (None, None) => {
                        let place: [u8; 4] = bench.memory.read_array(DEVICE).unwrap();
                        let wrap = if bench.wrap(bench.available) { 1 << 15 } else { 0 };
                        let next = (bench.available % u64::from(size)) as u16 | wrap;
                        prop_assert_eq!(place, [next as u8, (next >> 8) as u8, 2, 0]);
                    }
                    (Some(chain), Some((id, pieces))) => {
                        prop_assert_eq!(chain.head, id);
                        let of = |write: bool| {
                            let pieces = pieces.iter().filter(move |piece| piece.2 == write);
                            pieces.map(|&(address, len, _)| device::block::Segment { address, len }).collect::<Vec<_>>()
                        };
                        prop_assert_eq!(chain.readable.slice(0, u64::MAX), of(false));
                        prop_assert_eq!(chain.writable.slice(0, u64::MAX), of(true));
                        out.push(id);
                    }
                    (chain, added) => prop_assert!(false, "{chain:?} {added:?}"),
                },
                Step::Push(first, count, len) => {
                    let first = first.min(out.len());
                    let some: Vec<_> = out.drain(first..(first + count).min(out.len())).map(|id| (id, len)).collect();
                    let before = used;
                    used += some.iter().map(|(id, _)| u64::from(bench.counts[id])).sum::<u64>();
                    bench.queue.push_all(&bench.memory, &some).unwrap();
                    given.extend(some);
                    let told = bench.queue.take_interrupt(&bench.memory).unwrap();
                    // A place has the same name every other round: an old wish comes true again.
                    let name = |place: u64| place % (2 * u64::from(size));
                    let passed = (before..used).any(|place| name(place) == name(wish));
                    prop_assert_eq!(told, passed, "{} {} {}", before, wish, used);
                }
                Step::Reap => {
                    let expected = given.pop_front().map(|(id, len)| (id, (len > 0).then_some(len)));
                    prop_assert_eq!(bench.reap(), expected);
                }
                // A driver names places that are not used yet, and not further on than a round.
                Step::Wish(on) => {
                    wish = used + on % u64::from(size);
                    bench.wish(wish);
                }
            }
        }
    }

    /// Whatever a ring says, what comes out of it is RAM, and never more than the ring holds.
    #[test]
    fn hostile_rings_are_bounded(
        words in prop::collection::vec((any::<u64>(), 0u32..80, 0u16..10, any::<u16>()), 1..40),
        size in 1u16..9,
    ) {
        let mut bench = Bench::new(size, ALL);
        let mut out = 0;
        for (number, (address, len, id, flags)) in (0u64..).zip(words) {
            let at = if number % 3 == 2 { TABLES } else { RING } + number % u64::from(size) * 16;
            let address = if address & 3 == 0 { TABLES } else { address % (RAM + 50) };
            bench.put(at, address, len & !15, id, flags & 0x8087);
            match bench.pop() {
                Ok(Some(chain)) => {
                    out += 1;
                    for segment in chain.readable.slice(0, u64::MAX).iter().chain(&chain.writable.slice(0, u64::MAX)) {
                        prop_assert!(bench.memory.contains(segment.address, segment.len.into()));
                    }
                    prop_assert!(chain.head < size && out <= size);
                    if number % 2 == 0 {
                        bench.queue.push(&bench.memory, chain.head, 1).unwrap();
                        out -= 1;
                    }
                    bench.queue.take_interrupt(&bench.memory).unwrap();
                }
                Ok(None) => {}
                Err(_) => return Ok(()),
            }
        }
    }
}

#[test]
fn rings_that_break_the_rules_are_refused() {
    type Make = fn(&Bench);
    let cases: [(&str, Make); 8] = [
        ("more descriptors than allowed", |b| {
            (0..4).for_each(|at| b.put(RING + at * 16, DATA, 1, 0, NEXT | AVAIL));
        }),
        ("a readable piece after a writable one", |b| {
            b.put(RING + 16, DATA, 1, 0, AVAIL);
            b.put(RING, DATA, 1, 0, NEXT | WRITE | AVAIL);
        }),
        ("an id that the queue does not have", |b| b.put(RING, DATA, 1, 4, AVAIL)),
        ("an id that is with the device already", |b| {
            (0..2).for_each(|at| b.put(RING + at * 16, DATA, 1, 3, AVAIL));
        }),
        ("an indirect table that is not whole descriptors", |b| b.put(RING, TABLES, 17, 0, INDIRECT | AVAIL)),
        ("an indirect table that is not the last", |b| b.put(RING, TABLES, 16, 0, INDIRECT | NEXT | AVAIL)),
        ("more descriptors than allowed", |b| b.put(RING, TABLES, 65 * 16, 0, INDIRECT | AVAIL)),
        ("an indirect table where none may be", |b| {
            b.put(TABLES, TABLES, 16, 0, INDIRECT);
            b.put(RING, TABLES, 16, 0, INDIRECT | AVAIL);
        }),
    ];
    for (expected, make) in cases {
        let mut bench = Bench::new(4, ALL);
        make(&bench);
        let found = (0..2).find_map(|_| bench.pop().err());
        assert!(
            matches!(found, Some(RingError::Chain { why, .. }) if why == expected),
            "{expected}: {found:?}"
        );
    }
    let mut bench = Bench::new(4, RingFeatures { indirect: false, ..ALL });
    bench.put(RING, TABLES, 16, 0, INDIRECT | AVAIL);
    assert!(matches!(bench.pop(), Err(RingError::Chain { why: "an indirect table where none may be", .. })));
    for (address, len) in [(RAM, 1), (u64::MAX, 2), (0, u32::MAX)] {
        let mut bench = Bench::new(4, ALL);
        bench.put(RING, address, len, 0, AVAIL);
        assert!(matches!(bench.pop(), Err(RingError::Memory(_))), "{address:#x}");
    }
    // More than a round without one that was given back.
    let mut bench = Bench::new(2, ALL);
    bench.add(&[(DATA, 1, false), (DATA, 1, false)], false).unwrap();
    bench.pop().unwrap().unwrap();
    bench.put(RING, DATA, 1, 0, USED);
    assert!(bench.pop().is_err());
    // Nobody's ids are not given back.
    let mut bench = Bench::new(4, ALL);
    bench.queue.push_all(&bench.memory, &[(0, 1), (9, 1)]).unwrap();
    assert!(bench.reap().is_none() && !bench.queue.take_interrupt(&bench.memory).unwrap());
}

#[test]
fn the_driver_is_told_always_or_never_where_it_says_so() {
    for (features, flags, told) in [
        (ALL, 0u16, true),
        (ALL, 1, false),
        (RingFeatures { event_index: false, ..ALL }, 0, true),
        (RingFeatures { event_index: false, ..ALL }, 1, false),
        // Without the feature there are no places.
        (RingFeatures { event_index: false, ..ALL }, 2, true),
    ] {
        let mut bench = Bench::new(4, features);
        bench.memory.write(DRIVER, &[3u16.to_le_bytes(), flags.to_le_bytes()].concat()).unwrap();
        let id = bench.add(&[(DATA, 1, true)], false).unwrap();
        bench.pop().unwrap().unwrap();
        bench.queue.push(&bench.memory, id, 1).unwrap();
        assert_eq!(bench.queue.take_interrupt(&bench.memory).unwrap(), told, "{features:?} {flags}");
        assert_eq!(bench.pop().unwrap(), None);
        let asked = bench.memory.load_u16(DEVICE + 2).unwrap();
        assert_eq!(asked, if features.event_index { 2 } else { 0 });
    }
}

#[test]
fn areas_and_sizes_are_checked() {
    let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
    let good = (6, RING, DRIVER, DEVICE);
    let bad = [
        (0, RING, DRIVER, DEVICE),
        (65, RING, DRIVER, DEVICE),
        (6, RING + 8, DRIVER, DEVICE),
        (6, RING, DRIVER + 2, DEVICE),
        (6, RING, DRIVER, DEVICE + 2),
        (6, RAM - 80, DRIVER, DEVICE),
        (6, RING, RAM, DEVICE),
        (6, RING, DRIVER, !3),
    ];
    for (case, fine) in std::iter::once((good, true)).chain(bad.map(|case| (case, false))) {
        let mut queue = Queue::new(64);
        (queue.size, queue.descriptors, queue.available, queue.used) = case;
        queue.set_features(ALL);
        assert_eq!(queue.enable(&memory, 0).is_ok(), fine, "{case:?}");
    }
    const { assert!(QUEUE_SIZE_MAX <= 1 << 15, "a place has 15 bits") };
}
