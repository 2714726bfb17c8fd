//! A guest's driver for tests: finds the structures through the capabilities, sets queues up, and plays the rings.

use chipset::pci::{ConfigSpace, Function, MSIX_CAPABILITY, VENDOR_CAPABILITY, command};
use device::{Msi, MsiSink, VmTime};
use memory::{Backing, GuestMemory};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

pub const RAM: u64 = 4 << 20;
const RINGS: u64 = 0x1_0000;
const RING_STEP: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
const NOW: VmTime = VmTime(0);

pub const INDIRECT_DESC: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const RING_PACKED: u64 = 1 << 34;

/// A buffer of a chain.
pub enum Buffer<'a> {
    Out(&'a [u8]),
    In(u32),
}

#[derive(Clone, Copy, Default)]
pub struct Ring {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    next_descriptor: u16,
    available_index: u16,
    used_index: u16,
}

pub struct Driver<F: Function> {
    pub function: F,
    pub memory: GuestMemory,
    pub rings: Vec<Ring>,
    pub sent: Arc<Mutex<Vec<Msi>>>,
    pub common: u64,
    pub notify: u64,
    notify_step: u64,
    pub isr: u64,
    pub device: Option<u64>,
    pub access: u16,
    msix: u16,
    data: u64,
    /// Where the buffers of each chain are.
    buffers: BTreeMap<(u16, u16), Vec<(u64, u32)>>,
}

pub fn capabilities(config: &ConfigSpace) -> Vec<(u8, u16)> {
    let mut found = vec![];
    let mut at = config.read(0x34, 1) as u16;
    while at != 0 {
        found.push((config.read(at, 1) as u8, at));
        at = config.read(at + 1, 1) as u16;
    }
    found
}

impl<F: Function> Driver<F> {
    pub fn new(make: impl FnOnce(GuestMemory, MsiSink) -> F) -> Self {
        let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).unwrap();
        let sent = Arc::new(Mutex::new(vec![]));
        let log = sent.clone();
        let function = make(memory.clone(), MsiSink::new(move |msi| log.lock().unwrap().push(msi)));
        let mut driver = Self {
            function,
            memory,
            rings: vec![],
            sent,
            common: 0,
            notify: 0,
            notify_step: 0,
            isr: 0,
            device: None,
            access: 0,
            msix: 0,
            data: DATA,
            buffers: BTreeMap::new(),
        };
        driver.probe();
        driver
    }

    fn probe(&mut self) {
        let config = self.function.config();
        assert_eq!(config.read(0, 2), 0x1af4);
        assert!(config.read(8, 1) >= 1, "a modern device has revision 1");
        for (id, at) in capabilities(config) {
            if id == MSIX_CAPABILITY {
                self.msix = at;
            } else if id == VENDOR_CAPABILITY {
                assert_eq!(config.read(at + 4, 1), 0, "all structures are in BAR 0");
                let offset = u64::from(config.read(at + 8, 4));
                match config.read(at + 3, 1) {
                    1 => self.common = offset,
                    2 => {
                        self.notify = offset;
                        self.notify_step = config.read(at + 16, 4).into();
                    }
                    3 => self.isr = offset,
                    4 => self.device = Some(offset),
                    5 => self.access = at,
                    other => panic!("structure {other}"),
                }
            }
        }
        self.set_command(command::MEMORY | command::BUS_MASTER);
    }

    pub fn write_config(&mut self, offset: u16, size: u8, value: u32) {
        self.function.config_mut().write(offset, size, value);
        self.function.config_written(offset);
    }

    pub fn set_command(&mut self, value: u16) {
        self.write_config(4, 2, value.into());
    }

    pub fn read(&mut self, offset: u64, size: u8) -> u64 {
        self.function.bar_read(0, offset, size, NOW)
    }

    pub fn write(&mut self, offset: u64, size: u8, value: u64) {
        self.function.bar_write(0, offset, size, value, NOW);
    }

    pub fn status(&mut self) -> u8 {
        self.read(self.common + 20, 1) as u8
    }

    pub fn set_status(&mut self, value: u8) {
        self.write(self.common + 20, 1, value.into());
    }

    pub fn features(&mut self) -> u64 {
        self.write(self.common, 4, 0);
        let low = self.read(self.common + 4, 4);
        self.write(self.common, 4, 1);
        low | self.read(self.common + 4, 4) << 32
    }

    pub fn set_features(&mut self, features: u64) {
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(self.common + 8, 4, select);
            self.write(self.common + 12, 4, half);
        }
    }

    /// MSI-X on: vector `i` sends data `i`.
    pub fn enable_msix(&mut self) {
        let table = u64::from(self.function.config().read(self.msix + 4, 4)) & !7;
        let vectors = (self.function.config().read(self.msix + 2, 2) & 0x7ff) + 1;
        for vector in 0..u64::from(vectors) {
            self.write(table + vector * 16, 8, 0xfee0_0000);
            self.write(table + vector * 16 + 8, 8, vector);
        }
        self.write_config(self.msix + 2, 2, 0x8000);
    }

    /// Everything up to DRIVER_OK; queue `i` gets vector `i` and changes of configuration the one after the last.
    pub fn start(&mut self, features: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        assert_eq!(features & !self.features(), 0);
        self.set_features(features);
        self.set_status(11);
        assert_eq!(self.status(), 11, "features are accepted");
        self.set_up_queues();
        self.set_status(15);
        assert_eq!(self.status(), 15);
    }

    pub fn set_up_queues(&mut self) {
        let count = self.read(self.common + 18, 2);
        self.rings.clear();
        self.buffers.clear();
        self.data = DATA;
        for index in 0..count {
            self.write(self.common + 22, 2, index);
            // What has room in RING_STEP.
            let size = self.read(self.common + 24, 2).min(256) as u16;
            self.write(self.common + 24, 2, size.into());
            let base = RINGS + RING_STEP * index;
            self.memory.fill(base, RING_STEP, 0).unwrap();
            let ring = Ring {
                size,
                descriptors: base,
                available: base + 0x2000,
                used: base + 0x3000,
                ..Ring::default()
            };
            for (at, value) in [(32, ring.descriptors), (40, ring.available), (48, ring.used)] {
                self.write(self.common + at, 4, value & 0xffff_ffff);
                self.write(self.common + at + 4, 4, value >> 32);
            }
            self.write(self.common + 26, 2, index);
            assert_eq!(self.read(self.common + 26, 2), index);
            self.write(self.common + 28, 2, 1);
            self.rings.push(ring);
        }
        self.write(self.common + 16, 2, count);
        assert_eq!(self.read(self.common + 16, 2), count);
    }

    pub fn put_descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let raw =
            u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.memory.write(table + u64::from(index) * 16, &raw.to_le_bytes()).unwrap();
    }

    /// Publishes the chain that starts at `head`.
    pub fn publish(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = u64::from(ring.available_index % ring.size);
        self.memory.write(ring.available + 4 + slot * 2, &head.to_le_bytes()).unwrap();
        ring.available_index = ring.available_index.wrapping_add(1);
        self.memory.write(ring.available + 2, &ring.available_index.to_le_bytes()).unwrap();
    }

    /// Places the buffers in RAM and publishes a chain of them, without a notification.
    pub fn add(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> u16 {
        let ring = self.rings[usize::from(queue)];
        let head = ring.next_descriptor;
        let mut places = vec![];
        for (i, buffer) in (0u16..).zip(buffers) {
            let (len, flags) = match buffer {
                Buffer::Out(bytes) => {
                    self.memory.write(self.data, bytes).unwrap();
                    (bytes.len() as u32, 0)
                }
                Buffer::In(len) => (*len, 2),
            };
            let last = usize::from(i) + 1 == buffers.len();
            let index = (head + i) % ring.size;
            let next = (index + 1) % ring.size;
            self.put_descriptor(ring.descriptors, index, self.data, len, flags | u16::from(!last), next);
            places.push((self.data, len));
            self.data += u64::from(len).next_multiple_of(16);
        }
        self.rings[usize::from(queue)].next_descriptor = (head + buffers.len() as u16) % ring.size;
        self.buffers.insert((queue, head), places);
        self.publish(queue, head);
        head
    }

    pub fn kick(&mut self, queue: u16) {
        self.write(self.notify + u64::from(queue) * self.notify_step, 2, queue.into());
    }

    pub fn send(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> u16 {
        let head = self.add(queue, buffers);
        self.kick(queue);
        head
    }

    /// The next chain given back: its head and how many bytes were written.
    pub fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let ring = &mut self.rings[usize::from(queue)];
        if self.memory.load_u16(ring.used + 2).unwrap() == ring.used_index {
            return None;
        }
        let slot = u64::from(ring.used_index % ring.size);
        let head = self.memory.load_u32(ring.used + 4 + slot * 8).unwrap() as u16;
        let len = self.memory.load_u32(ring.used + 8 + slot * 8).unwrap();
        ring.used_index = ring.used_index.wrapping_add(1);
        Some((head, len))
    }

    /// The bytes of buffer `index` of a chain.
    pub fn bytes(&self, queue: u16, head: u16, index: usize) -> Vec<u8> {
        let (at, len) = self.buffers[&(queue, head)][index];
        let mut bytes = vec![0; len as usize];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    /// The next chain given back as the bytes written to its first buffer.
    pub fn received(&mut self, queue: u16) -> Option<Vec<u8>> {
        let (head, len) = self.used(queue)?;
        let mut bytes = self.bytes(queue, head, 0);
        bytes.truncate(len as usize);
        Some(bytes)
    }

    /// Data values of the messages sent since the last call.
    pub fn interrupts(&mut self) -> Vec<u32> {
        std::mem::take(&mut *self.sent.lock().unwrap()).iter().map(|msi| msi.data).collect()
    }
}
