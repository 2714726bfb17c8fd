//! Entropy as Linux's driver asks for it.

use super::device::Rng;
use crate::driver::{Buffer, Driver, EVENT_IDX, VERSION_1};
use chipset::pci::Function;
use device::VmTime;

fn driver() -> Driver<Rng> {
    let mut next = 0u8;
    let source = move |bytes: &mut [u8]| {
        for byte in bytes {
            next = next.wrapping_add(1);
            *byte = next;
        }
    };
    Driver::new(|memory, sink| Rng::new(memory, sink, Box::new(source)))
}

#[test]
fn buffers_are_filled() {
    let mut driver = driver();
    assert_eq!(driver.device, None, "no configuration space");
    driver.enable_msix();
    driver.start(VERSION_1 | EVENT_IDX);
    driver.send(0, &[Buffer::In(4)]);
    assert_eq!(driver.received(0).unwrap(), [1, 2, 3, 4]);
    assert_eq!(driver.interrupts(), [0]);
    driver.send(0, &[Buffer::Out(b"?"), Buffer::In(3)]);
    assert_eq!(driver.used(0).unwrap().1, 3);
    driver.send(0, &[Buffer::In(100_000)]);
    assert_eq!(driver.received(0).unwrap().len(), 4096);
}

#[test]
fn more_than_a_ringful_is_done_in_turns() {
    let mut driver = driver();
    driver.start(VERSION_1);
    for _ in 0..64 {
        driver.add(0, &[Buffer::In(1)]);
    }
    assert_eq!(driver.function.deadline(), None);
    driver.kick(0);
    assert_eq!(std::iter::from_fn(|| driver.used(0)).count(), 64);
    assert_eq!(driver.function.deadline(), Some(VmTime(0)), "there may be more");
    driver.add(0, &[Buffer::In(1)]);
    driver.function.tick(VmTime(0));
    assert!(driver.used(0).is_some());
    assert_eq!(driver.function.deadline(), None);
}
