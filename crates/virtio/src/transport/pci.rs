//! Virtio over PCI, modern interface only (4.1): one BAR with the four structures, MSI-X, and INTx as a fallback.
//!
//! States, by the device status register (2.1, 3.1):
//!
//! ```text
//! reset --features agreed--> FEATURES_OK --> DRIVER_OK (live: queues are served, while the function is bus master)
//!   ^                                          |        \--a ring breaks the rules--> DEVICE_NEEDS_RESET (dead)
//!   \--nothing works on guest RAM any more-- draining <--status written 0--/
//! ```

use super::registers::{self, COMMON_LEN};
use super::{Bell, Device, Queues, feature, status};
use crate::queue::RingError;
use chipset::pci::{BarKind, ConfigSpace, Function, Identity, MsiX, VENDOR_CAPABILITY};
use device::{MsiSink, VmTime};
use memory::GuestMemory;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Vendor of all virtio devices (4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device number of device type 0 (4.1.2).
const DEVICE_BASE: u16 = 0x1040;

/// The one BAR and what is where in it.
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x6000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 1 << NOTIFY_SHIFT;
const NOTIFY_SHIFT: u32 = 2;

/// Structure types of the vendor capabilities (4.1.4).
mod structure {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI_ACCESS: u8 = 5;
}

/// No vector (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the driver has set, apart from the queues.
#[derive(Debug)]
pub(super) struct Negotiation {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub config_vector: u16,
    pub status: u8,
}

impl Negotiation {
    fn new() -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
        }
    }
}

/// A virtio device as a PCI function.
pub struct Pci<D: Device> {
    pub(super) device: D,
    pub(super) queues: Queues,
    pub(super) negotiation: Negotiation,
    pub(super) generation: u8,
    config: ConfigSpace,
    pub(super) msix: MsiX,
    isr: u8,
    /// Status was written 0 and the device still works on guest RAM.
    draining: bool,
    /// Offset of the capability that gives access to the BAR through configuration space (4.1.4.9).
    access: u16,
    error: Option<RingError>,
    bell: Option<Bell>,
    /// Where it hangs.
    hung: BTreeSet<u64>,
}

impl<D: Device> Pci<D> {
    /// A function for `device`, interrupting through `sink`.
    pub fn with_device(device: D, memory: GuestMemory, sink: MsiSink) -> Self {
        let number = DEVICE_BASE.saturating_add(D::TYPE);
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: number,
            class: D::CLASS.0,
            subclass: D::CLASS.1,
            prog_if: 0,
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: number,
        });
        let queues = Queues::new(memory, &device.queue_sizes());
        config.add_bar(BAR, BarKind::Memory64 { prefetchable: false }, BAR_SIZE);
        let notify_len = u32::from(queues.len()).saturating_mul(NOTIFY_STEP);
        let config_len = u32::try_from(device.config().len()).unwrap_or(0);
        add_structure(&mut config, structure::COMMON, COMMON, COMMON_LEN, &[]);
        add_structure(&mut config, structure::NOTIFY, NOTIFY, notify_len, &NOTIFY_STEP.to_le_bytes());
        add_structure(&mut config, structure::ISR, ISR, 1, &[]);
        if config_len > 0 {
            add_structure(&mut config, structure::DEVICE, DEVICE_CONFIG, config_len, &[]);
        }
        let access = add_structure(&mut config, structure::PCI_ACCESS, 0, 0, &[0; 4]);
        config.set_writable(access.saturating_add(4), &[0xff]);
        config.set_writable(access.saturating_add(8), &[0xff; 12]);
        // One vector per queue and one for configuration changes.
        let vectors = queues.len().saturating_add(1);
        let msix = MsiX::new(&mut config, sink, vectors, BAR, MSIX_TABLE, MSIX_PENDING);
        Self {
            device,
            queues,
            negotiation: Negotiation::new(),
            generation: 0,
            config,
            msix,
            isr: 0,
            draining: false,
            access,
            error: None,
            bell: None,
            hung: BTreeSet::new(),
        }
    }

    /// Names who hears where the driver rings, of queues whose notifications only wake somebody.
    pub fn set_bell(&mut self, bell: Bell) {
        self.bell = Some(bell);
        self.place_bell();
    }

    /// Hangs the bell where the driver would ring now, and nowhere else: not over the addresses of another function, nor of a device
    /// that is reset.
    fn place_bell(&mut self) {
        let Some(bell) = &mut self.bell else { return };
        let status = self.negotiation.status;
        let rings = status & status::DRIVER_OK != 0 && status & status::NEEDS_RESET == 0 && !self.draining;
        let base = self.config.bar_address(BAR).filter(|_| rings);
        let (device, queues) = (&self.device, &self.queues);
        let wanted: BTreeSet<u64> = base.map_or_else(BTreeSet::new, |base| {
            let first = base.saturating_add(NOTIFY);
            (0..queues.len())
                .filter(|&queue| queues.enabled(queue) && device.only_wakes(queue))
                .map(|queue| first.saturating_add(u64::from(queue) << NOTIFY_SHIFT))
                .collect()
        });
        for &gone in self.hung.difference(&wanted) {
            bell(gone, false);
        }
        for &new in wanted.difference(&self.hung) {
            bell(new, true);
        }
        self.hung = wanted;
    }

    /// The device. What it does to guest memory goes through [`Self::run`].
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, for changes that need no queue.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Whether the device may use its queues now.
    pub fn live(&self) -> bool {
        let status = self.negotiation.status;
        status & status::DRIVER_OK != 0
            && status & status::NEEDS_RESET == 0
            && !self.draining
            && self.config.bus_master()
    }

    /// Works on the queues and interrupts as needed; `None` if the device may not use them, or may no longer.
    pub fn run<R>(&mut self, work: impl FnOnce(&mut D, &mut Queues) -> Result<R, RingError>) -> Option<R> {
        if !self.live() {
            return None;
        }
        let result = work(&mut self.device, &mut self.queues);
        let interrupts = self.interrupt_for_queues();
        match result.and_then(|result| interrupts.map(|()| result)) {
            Ok(result) => Some(result),
            Err(error) => {
                self.negotiation.status |= status::NEEDS_RESET;
                self.error = Some(error);
                self.raise(self.negotiation.config_vector, ISR_CONFIG);
                None
            }
        }
    }

    /// The device configuration space has changed (2.5).
    pub fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.live() {
            self.raise(self.negotiation.config_vector, ISR_CONFIG);
        }
    }

    /// Features that are offered.
    pub(super) fn offered(&self) -> u64 {
        let rings = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::RING_PACKED;
        self.device.features() | feature::VERSION_1 | rings
    }

    fn interrupt_for_queues(&mut self) -> Result<(), RingError> {
        let mut vectors = Vec::new();
        let Queues { memory, list, .. } = &mut self.queues;
        for queue in list {
            if queue.take_interrupt(memory)? && !vectors.contains(&queue.vector) {
                vectors.push(queue.vector);
            }
        }
        for vector in vectors {
            self.raise(vector, ISR_QUEUE);
        }
        Ok(())
    }

    fn raise(&mut self, vector: u16, isr: u8) {
        if self.msix.enabled() {
            // NO_VECTOR is beyond every table and so interrupts nobody.
            self.msix.notify(vector);
        } else {
            self.isr |= isr;
            self.config.set_interrupt(true);
        }
    }

    fn read_isr(&mut self) -> u8 {
        let isr = std::mem::take(&mut self.isr);
        self.config.set_interrupt(false);
        isr
    }

    /// The driver notifies (4.1.5.2), or a device asked to be called again.
    fn notify(&mut self, queue: u16) {
        if queue < self.queues.len() {
            self.run(|device, queues| device.notified(queue, queues));
        }
    }

    fn notify_all(&mut self) {
        for queue in 0..self.queues.len() {
            self.notify(queue);
        }
    }

    /// The status register as it reads now: a reset is over when nothing works on guest RAM any more.
    pub(super) fn read_status(&mut self) -> u8 {
        if self.draining && !self.device.draining() {
            self.draining = false;
            self.negotiation.status = 0;
        }
        self.negotiation.status
    }

    /// The driver writes the status register (3.1.1).
    pub(super) fn write_status(&mut self, value: u8) {
        let before = self.read_status();
        if value == 0 {
            self.reset_device();
            if self.device.draining() {
                self.draining = true;
                self.negotiation.status = before;
            }
            return;
        }
        if self.draining {
            // 2.4.2: the driver has to wait for 0 before it begins anew.
            return;
        }
        let mut added = value & !before & !status::NEEDS_RESET;
        let features = self.negotiation.driver_features;
        if features & !self.offered() != 0 || features & feature::VERSION_1 == 0 {
            added &= !status::FEATURES_OK;
        }
        if (before | added) & status::FEATURES_OK == 0 {
            added &= !status::DRIVER_OK;
        }
        self.negotiation.status |= added;
        if added & status::FEATURES_OK != 0 {
            self.queues.set_features(features);
        }
        if added & status::DRIVER_OK != 0 {
            self.device.activate(features);
            // First: what is rung for from now on is heard, and what was before is looked at here.
            self.place_bell();
            self.notify_all();
        }
    }

    /// Enables the selected queue.
    pub(super) fn enable_queue(&mut self) {
        let index = self.negotiation.queue_select;
        let Queues { memory, list, .. } = &mut self.queues;
        let Some(queue) = list.get_mut(usize::from(index)).filter(|queue| !queue.enabled()) else { return };
        if let Err(error) = queue.enable(memory, index) {
            self.negotiation.status |= status::NEEDS_RESET;
            self.error = Some(error);
        } else if self.live() {
            self.place_bell();
            self.notify(index);
        }
    }

    fn reset_device(&mut self) {
        self.queues.reset();
        self.device.reset();
        self.negotiation = Negotiation::new();
        self.error = None;
        self.draining = false;
        self.read_isr();
        self.place_bell();
    }

    /// Where a PCI configuration access points to: offset in the BAR and width.
    fn access_target(&self) -> Option<(u64, u8)> {
        let bar = self.config.read(self.access.wrapping_add(4), 1);
        let offset = self.config.read(self.access.wrapping_add(8), 4);
        let size = self.config.read(self.access.wrapping_add(12), 4);
        let valid = bar == u32::from(BAR)
            && matches!(size, 1 | 2 | 4)
            && offset.is_multiple_of(size)
            && u64::from(offset) < BAR_SIZE;
        valid.then_some((offset.into(), size as u8))
    }

    fn is_access_data(&self, offset: u16) -> bool {
        offset & !3 == self.access.wrapping_add(16)
    }
}

/// Adds a `virtio_pci_cap` (4.1.4) and answers its offset.
fn add_structure(config: &mut ConfigSpace, kind: u8, offset: u64, len: u32, more: &[u8]) -> u16 {
    let total = u8::try_from(more.len()).unwrap_or(0).saturating_add(16);
    let mut body = vec![total, kind, BAR, 0, 0, 0];
    body.extend_from_slice(&u32::try_from(offset).unwrap_or(0).to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(more);
    config.add_capability(VENDOR_CAPABILITY, &body)
}

impl<D: Device> Function for Pci<D> {
    fn name(&self) -> &'static str {
        D::NAME
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn bar_read(&mut self, bar: u8, offset: u64, size: u8, _now: VmTime) -> u64 {
        if bar != BAR {
            return u64::MAX;
        }
        if let Some(value) = self.msix.read(bar, offset, size) {
            return value;
        }
        let within = offset & 0xfff;
        match offset & !0xfff {
            COMMON => self.read_common(within, size),
            ISR if within == 0 => self.read_isr().into(),
            DEVICE_CONFIG => registers::pick(&self.device.config(), within, size),
            _ => 0,
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, size: u8, value: u64, _now: VmTime) {
        if bar != BAR || self.msix.write(bar, offset, size, value) {
            return;
        }
        let within = offset & 0xfff;
        match offset & !0xfff {
            COMMON => self.write_common(within, size, value),
            DEVICE_CONFIG => {
                let bytes = value.to_le_bytes();
                self.device.config_written(within, bytes.get(..usize::from(size)).unwrap_or(&bytes));
            }
            NOTIFY => self.notify(u16::try_from(within >> NOTIFY_SHIFT).unwrap_or(u16::MAX)),
            _ => {}
        }
    }

    fn config_reading(&mut self, offset: u16) {
        if self.is_access_data(offset)
            && let Some((offset, size)) = self.access_target()
        {
            let value = self.bar_read(BAR, offset, size, VmTime::default()) as u32;
            self.config.update(self.access.wrapping_add(16), &value.to_le_bytes());
        }
    }

    fn config_written(&mut self, offset: u16) {
        if self.is_access_data(offset) {
            if let Some((offset, size)) = self.access_target() {
                let value = self.config.read(self.access.wrapping_add(16), size);
                self.bar_write(BAR, offset, size, value.into(), VmTime::default());
            }
            return;
        }
        let live = self.live();
        self.place_bell();
        self.msix.sync(&self.config);
        self.config.set_interrupt(self.isr != 0 && !self.msix.enabled());
        // The command register may have made the function a bus master, with chains waiting since before.
        if live && offset & !3 == 4 {
            self.notify_all();
        }
    }

    fn deadline(&self) -> Option<VmTime> {
        (!self.queues.again.is_empty() && self.live()).then_some(VmTime(0))
    }

    fn tick(&mut self, _now: VmTime) {
        if self.live() {
            for queue in std::mem::take(&mut self.queues.again) {
                self.notify(queue);
            }
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.msix.reset();
        self.generation = 0;
    }

    fn inspect(&self) -> Value {
        let queues: Vec<Value> = self.queues.list.iter().map(crate::queue::Queue::inspect).collect();
        json!({
            "status": format!("{:#04x}", self.negotiation.status),
            "features": format!("{:#x}", self.negotiation.driver_features),
            "draining": self.draining,
            "error": self.error.map(|error| error.to_string()),
            "queues": queues,
            "msix": self.msix.inspect(),
            "pci": self.config.inspect(),
            "device": self.device.inspect(),
        })
    }
}
