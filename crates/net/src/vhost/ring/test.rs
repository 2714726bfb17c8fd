//! Both sides of a ring in one process: what goes in comes out, once and in order, whatever the indices; and rings of any bytes.

use super::super::memory::{Mapping, RegionAbout, memory_file};
use super::*;
use proptest::prelude::*;
use std::sync::Arc;

const BYTES: u64 = 1 << 16;

fn memory() -> (Memory, Area) {
    let file = memory_file(BYTES).unwrap();
    let mut memory = Memory::default();
    memory.add(RegionAbout { guest: 0, len: BYTES, user: 0, offset: 0 }, &file).unwrap();
    let mapping = Arc::new(Mapping::new(&file, BYTES, &Arc::default()).unwrap());
    (memory, Area::new(&mapping, 0, BYTES as usize).unwrap())
}

fn places(size: u16) -> Places {
    Places { size, descriptors: 0, available: 0x2000, used: 0x3000 }
}

/// Offers descriptor `index` as the `turn`th chain.
fn offer(area: &Area, size: u16, turn: u16, index: u16, entry: u128) {
    area.write_u128(usize::from(index) * 16, entry);
    area.store(0x2000 + 4 + usize::from(turn % size) * 2, index);
    area.store(0x2002, turn.wrapping_add(1));
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let (memory, _area) = memory();
    for bad in [
        Places { size: 0, ..places(8) },
        Places { size: 6, ..places(8) },
        Places { descriptors: 8, ..places(8) },
        Places { used: 0x3002, ..places(8) },
        Places { available: 0xfff8, ..places(8) },
        Places { used: u64::MAX - 3, ..places(8) },
    ] {
        assert!(Ring::new(&memory, bad, 0, 0).is_err(), "{bad:?}");
    }
}

#[test]
fn pieces_without_bytes_are_refused() {
    let (memory, area) = memory();
    let ring = Ring::new(&memory, places(8), 0, 0).unwrap();
    let refused = |index| ring.chain(&memory, index, true, &mut Vec::new()).is_err();
    offer(&area, 8, 0, 0, 0x4000 | u128::from(WRITE) << 96);
    assert!(refused(0));
    // The second of two.
    offer(&area, 8, 0, 1, 0x4000 | 8 << 64 | u128::from(WRITE | NEXT) << 96);
    assert!(refused(1));
}

#[test]
fn the_driver_is_told_as_it_wants() {
    let (memory, area) = memory();
    let mut ring = Ring::new(&memory, places(8), 0, 0).unwrap();
    assert!(!ring.publish(), "nothing came back");
    ring.give(0, 0);
    assert!(ring.publish());
    area.store(0x2000, 1);
    ring.give(0, 0);
    assert!(!ring.publish());
    ring.quiet();
    assert_eq!(area.load(0x3000), 1);
    assert!(!ring.listen(0).unwrap() && area.load(0x3000) == 0);
    // By index: at the third from now on.
    let mut ring = Ring::new(&memory, places(8), 0, super::super::feature::EVENT_IDX).unwrap();
    area.store(0x2004 + 16, 4);
    let told: Vec<bool> = (0..4)
        .map(|_| {
            ring.give(0, 0);
            ring.publish()
        })
        .collect();
    assert_eq!(told, [false, false, true, false]);
    offer(&area, 8, 0, 0, 16 << 64);
    assert!(ring.listen(0).unwrap(), "one is there");
    assert!(!ring.listen(1).unwrap());
    assert_eq!(area.load(0x3004 + 64), 1);
}

#[test]
fn an_index_that_cannot_be_is_never_believed() {
    let (memory, area) = memory();
    let mut ring = Ring::new(&memory, places(8), 0, 0).unwrap();
    area.store(0x2002, 9);
    for _ in 0..3 {
        assert_eq!(ring.available(4), Err(Error::Index { ahead: 9, size: 8 }));
    }
    area.store(0x2002, 8);
    assert_eq!(ring.available(4), Ok(8));
}

proptest! {
    #[test]
    fn what_goes_in_comes_out(start in any::<u16>(), steps in prop::collection::vec((0u16..9, 0u16..9), 1..60)) {
        let (memory, area) = memory();
        area.store(0x2002, start);
        area.store(0x3002, start);
        let mut ring = Ring::new(&memory, places(8), start, 0).unwrap();
        let (mut offered, mut taken) = (start, start);
        let mut segments = Vec::new();
        for (offers, takes) in steps {
            for _ in 0..offers.min(8 - offered.wrapping_sub(taken)) {
                let entry = u128::from(0x8000 + u64::from(offered % 64) * 16) | u128::from(offered % 16 + 1) << 64;
                offer(&area, 8, offered, offered % 8, entry);
                offered = offered.wrapping_add(1);
            }
            let has = ring.available(8).unwrap();
            prop_assert_eq!(has, offered.wrapping_sub(taken));
            for ahead in 0..takes.min(has) {
                let turn = taken.wrapping_add(ahead);
                segments.clear();
                let head = ring.head(ahead);
                prop_assert_eq!(head, turn % 8);
                let len = ring.chain(&memory, head, false, &mut segments).unwrap();
                prop_assert_eq!(len, u32::from(turn % 16 + 1));
                ring.give(head, len);
            }
            ring.take(takes.min(has));
            taken = taken.wrapping_add(takes.min(has));
            ring.publish();
            prop_assert_eq!((area.load(0x3002), ring.base()), (taken, taken));
        }
    }

    #[test]
    fn any_bytes_are_a_chain_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 128),
        head: u16,
        writable: bool,
        features: u64,
    ) {
        let (memory, area) = memory();
        for (index, part) in bytes.chunks(16).enumerate() {
            let mut entry = u128::from_le_bytes(part.try_into().unwrap());
            // Often inside the memory, often chained.
            if entry & 1 << 40 != 0 {
                entry &= !(0xffff_ffff_ffff_0000 | 0xffff_f000 << 64 | 0xfff8 << 96 | 0xfff8 << 112);
            }
            area.write_u128(index * 16, entry);
        }
        let ring = Ring::new(&memory, places(8), 0, features).unwrap();
        let mut segments = Vec::new();
        if let Ok(total) = ring.chain(&memory, head, writable, &mut segments) {
            prop_assert_eq!(segments.iter().map(|segment| u64::from(segment.len)).sum::<u64>(), u64::from(total));
            prop_assert!(segments.iter().all(|segment| segment.address + u64::from(segment.len) <= BYTES));
        }
    }
}
