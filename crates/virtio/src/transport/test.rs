//! The registers as a driver sees them, on the simplest device.

use crate::Rng;
use crate::driver::{Buffer, Driver, EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1, capabilities};
use chipset::pci::{Function, VENDOR_CAPABILITY, command};
use device::Line;
use std::sync::{Arc, Mutex};

fn driver() -> Driver<Rng> {
    Driver::new(|memory, sink| Rng::new(memory, sink, Box::new(|bytes| bytes.fill(7))))
}

#[test]
fn capabilities_name_the_structures() {
    let driver = driver();
    let config = driver.function.config();
    assert_eq!(config.read(2, 2), 0x1040 + 4);
    let kinds: Vec<_> = capabilities(config)
        .iter()
        .filter(|&&(id, _)| id == VENDOR_CAPABILITY)
        .map(|&(_, at)| (config.read(at + 3, 1), config.read(at + 2, 1), config.read(at + 12, 4)))
        .collect();
    assert_eq!(kinds, [(1, 16, 56), (2, 20, 4), (3, 16, 1), (5, 20, 0)]);
}

#[test]
fn features_have_to_be_offered_and_modern() {
    let mut driver = driver();
    assert_eq!(driver.features(), VERSION_1 | EVENT_IDX | INDIRECT_DESC | RING_PACKED);
    for (features, agreed) in
        [(EVENT_IDX, false), (VERSION_1 | 1, false), (VERSION_1 | 1 << 40, false), (VERSION_1, true)]
    {
        driver.set_status(0);
        driver.set_status(3);
        driver.set_features(features);
        driver.set_status(11);
        assert_eq!(driver.status() & 8 != 0, agreed, "{features:#x}");
        driver.set_status(15);
        assert_eq!(driver.status() & 4 != 0, agreed, "no DRIVER_OK without FEATURES_OK");
    }
    driver.set_features(0);
    driver.write(driver.common + 8, 4, 1);
    assert_eq!(driver.read(driver.common + 12, 4), 1, "what was agreed on stays");
    driver.set_status(1);
    assert_eq!(driver.status(), 15, "bits are never taken away");
    driver.set_status(64);
    assert_eq!(driver.status(), 15, "that bit is the device's");
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = driver();
    driver.enable_msix();
    driver.start(VERSION_1);
    driver.set_status(0);
    for (offset, size, value) in
        [(20, 1, 0), (16, 2, 0xffff), (26, 2, 0xffff), (28, 2, 0), (32, 8, 0), (24, 2, 64)]
    {
        assert_eq!(driver.read(driver.common + offset, size), value, "common + {offset}");
    }
    driver.add(0, &[Buffer::In(4)]);
    driver.kick(0);
    assert!(driver.used(0).is_none());
    driver.start(VERSION_1);
    driver.function.reset();
    assert_eq!(driver.function.config().command(), 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn queues_are_fixed_once_enabled_and_absent_ones_have_no_size() {
    let mut driver = driver();
    driver.start(VERSION_1);
    let before = driver.read(driver.common + 32, 8);
    driver.write(driver.common + 32, 8, 0x5000);
    driver.write(driver.common + 24, 2, 4);
    assert_eq!(driver.read(driver.common + 32, 8), before);
    assert_eq!(driver.read(driver.common + 24, 2), 64);
    driver.write(driver.common + 22, 2, 1);
    assert_eq!(driver.read(driver.common + 24, 2), 0);
    driver.write(driver.common + 28, 2, 1);
    driver.write(driver.common + 26, 2, 9);
    assert_eq!(driver.status(), 15);
    driver.write(driver.common + 16, 2, 2);
    assert_eq!(driver.read(driver.common + 16, 2), 0xffff, "there are two vectors");
}

#[test]
fn without_msix_the_wire_is_raised_until_the_isr_is_read() {
    let mut driver = driver();
    let levels = Arc::new(Mutex::new(vec![]));
    let log = levels.clone();
    let line = Line::new(move |high| log.lock().unwrap().push(high));
    driver.function.config_mut().connect_interrupt(0, 16, line);
    driver.start(VERSION_1);
    levels.lock().unwrap().clear();
    driver.send(0, &[Buffer::In(4)]);
    assert_eq!(levels.lock().unwrap().last(), Some(&true));
    assert_eq!(driver.read(driver.isr, 1), 1);
    assert_eq!(levels.lock().unwrap().last(), Some(&false));
    assert_eq!(driver.read(driver.isr, 1), 0);
    driver.send(0, &[Buffer::In(4)]);
    assert_eq!(levels.lock().unwrap().last(), Some(&true));
    driver.enable_msix();
    assert_eq!(levels.lock().unwrap().last(), Some(&false), "MSI-X silences the wire");
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let mut driver = driver();
    driver.enable_msix();
    driver.start(VERSION_1);
    let ring = driver.rings[0];
    driver.put_descriptor(ring.descriptors, 0, u64::MAX - 3, 4, 2, 0);
    driver.publish(0, 0);
    driver.kick(0);
    assert_eq!(driver.status(), 15 | 64);
    assert_eq!(driver.interrupts(), [1], "the driver is told by the configuration vector");
    assert!(driver.function.inspect()["error"].as_str().unwrap().contains("not guest RAM"));
    driver.put_descriptor(ring.descriptors, 0, 0x8000, 4, 2, 0);
    driver.kick(0);
    assert!(driver.used(0).is_none());
    driver.start(VERSION_1);
    driver.send(0, &[Buffer::In(4)]);
    assert!(driver.used(0).is_some());
}

#[test]
fn a_queue_enabled_with_nonsense_stops_the_device() {
    let mut driver = driver();
    driver.set_status(3);
    driver.set_features(VERSION_1);
    driver.set_status(11);
    driver.write(driver.common + 24, 2, 3);
    driver.write(driver.common + 28, 2, 1);
    assert_eq!(driver.read(driver.common + 28, 2), 0);
    assert_eq!(driver.status(), 11 | 64);
}

#[test]
fn memory_is_touched_only_by_a_bus_master() {
    let mut driver = driver();
    driver.start(VERSION_1);
    driver.set_command(command::MEMORY);
    driver.send(0, &[Buffer::In(4)]);
    assert!(driver.used(0).is_none());
    driver.set_command(command::MEMORY | command::BUS_MASTER);
    assert!(driver.used(0).is_some(), "what waited is done");
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let mut driver = driver();
    let (access, common, isr) = (driver.access, driver.common as u32, driver.isr as u32);
    let point = |driver: &mut Driver<Rng>, offset: u32, size: u32| {
        driver.write_config(access + 4, 1, 0);
        driver.write_config(access + 8, 4, offset);
        driver.write_config(access + 12, 4, size);
    };
    point(&mut driver, common + 20, 1);
    driver.write_config(access + 16, 4, 3);
    assert_eq!(driver.status(), 3);
    point(&mut driver, common + 18, 2);
    driver.function.config_reading(access + 16);
    assert_eq!(driver.function.config().read(access + 16, 4), 1);
    for (offset, size) in [(common + 20, 3), (common + 21, 2), (0x8000, 1), (u32::MAX, 1), (isr, 0)] {
        point(&mut driver, offset, size);
        driver.write_config(access + 16, 4, 0);
        driver.function.config_reading(access + 16);
        assert_eq!(driver.status(), 3, "{offset:#x} is not followed");
    }
}

#[test]
fn bells_hang_where_the_driver_rings_and_only_while_it_does() {
    use device::Notify;
    use device::block::Geometry;
    let geometry =
        Geometry { capacity: 1 << 20, block_size: 512, read_only: false, discard: true, write_cache: true };
    let mut driver =
        Driver::new(|memory, sink| crate::Block::new(memory, sink, Notify::new(|| {}), geometry, "s", 2));
    let hung = Arc::new(Mutex::new(std::collections::BTreeSet::new()));
    let told = hung.clone();
    driver.function.set_bell(Box::new(move |address, wanted| {
        let mut told = told.lock().unwrap();
        assert!(if wanted { told.insert(address) } else { told.remove(&address) }, "{address:#x} twice");
    }));
    let now = || hung.lock().unwrap().iter().copied().collect::<Vec<_>>();
    assert!(now().is_empty(), "nobody drives it");
    driver.function.config_mut().set_bar_base(0, 0xfe00_0000);
    driver.set_command(command::MEMORY | command::BUS_MASTER);
    driver.start(VERSION_1);
    let notify = driver.notify;
    let at = |base: u64| vec![base + notify, base + notify + 4];
    assert_eq!(now(), at(0xfe00_0000));
    // The guest moves the BAR, as kernels do: with its decoding off meanwhile.
    driver.set_command(command::BUS_MASTER);
    assert!(now().is_empty());
    driver.function.config_mut().set_bar_base(0, 0xfd00_0000);
    driver.set_command(command::MEMORY | command::BUS_MASTER);
    assert_eq!(now(), at(0xfd00_0000));
    // A broken or reset device hears nothing.
    driver.set_status(0);
    assert!(now().is_empty());
    driver.start(VERSION_1);
    assert_eq!(now(), at(0xfd00_0000));
    driver.function.reset();
    assert!(now().is_empty());
}

#[test]
fn a_queue_whose_notification_does_more_than_wake_has_no_bell() {
    let mut driver = driver();
    driver.function.config_mut().set_bar_base(0, 0xfe00_0000);
    driver.function.set_bell(Box::new(|address, _| panic!("{address:#x}")));
    driver.start(VERSION_1);
    driver.send(0, &[Buffer::In(4)]);
    assert!(driver.used(0).is_some());
}
