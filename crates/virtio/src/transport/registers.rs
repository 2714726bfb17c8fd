//! The common configuration structure (4.1.4.3), register by register.

use super::pci::NO_VECTOR;
use super::{Device, Pci, status};

/// Bytes of the structure without the parts of features not offered.
pub(super) const COMMON_LEN: u32 = 56;

const DEVICE_FEATURE_SELECT: u64 = 0;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESCRIPTORS: u64 = 32;
const QUEUE_AVAILABLE: u64 = 40;
const QUEUE_USED: u64 = 48;

/// `size` bytes at `offset` of an image of registers, zeroes beyond its end.
pub(super) fn pick(image: &[u8], offset: u64, size: u8) -> u64 {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let bytes = image.iter().skip(from).take(usize::from(size.min(8)));
    bytes.rev().fold(0, |value, &byte| (value << 8) | u64::from(byte))
}

/// One 32-bit half of a 64-bit register, by the driver's choice (4.1.3.1).
fn set_half(register: &mut u64, high: bool, value: u64) {
    let value = value & 0xffff_ffff;
    *register =
        if high { (*register & 0xffff_ffff) | (value << 32) } else { (*register & !0xffff_ffff) | value };
}

impl<D: Device> Pci<D> {
    pub(super) fn read_common(&mut self, offset: u64, size: u8) -> u64 {
        let status = self.read_status();
        let driver = &self.negotiation;
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut image = Vec::with_capacity(COMMON_LEN as usize);
        image.extend(driver.device_feature_select.to_le_bytes());
        image.extend(half(self.offered(), driver.device_feature_select).to_le_bytes());
        image.extend(driver.driver_feature_select.to_le_bytes());
        image.extend(half(driver.driver_features, driver.driver_feature_select).to_le_bytes());
        image.extend(driver.config_vector.to_le_bytes());
        image.extend(self.queues.len().to_le_bytes());
        image.extend([status, self.generation]);
        image.extend(driver.queue_select.to_le_bytes());
        // A queue that does not exist has size 0.
        if let Some(queue) = self.queues.get(driver.queue_select) {
            image.extend(queue.size.to_le_bytes());
            image.extend(queue.vector.to_le_bytes());
            image.extend(u16::from(queue.enabled()).to_le_bytes());
            image.extend(driver.queue_select.to_le_bytes());
            for area in [queue.descriptors, queue.available, queue.used] {
                image.extend(area.to_le_bytes());
            }
        }
        pick(&image, offset, size)
    }

    /// Accesses of a width other than the register's are ignored (4.1.3.1 forbids them to the driver).
    pub(super) fn write_common(&mut self, offset: u64, size: u8, value: u64) {
        let vector = self.checked_vector(value);
        let driver = &mut self.negotiation;
        match (offset, size) {
            (DEVICE_FEATURE_SELECT, 4) => driver.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => driver.driver_feature_select = value as u32,
            // What was agreed on stays agreed on.
            (DRIVER_FEATURE, 4) if driver.status & status::FEATURES_OK == 0 => {
                match driver.driver_feature_select {
                    0 => set_half(&mut driver.driver_features, false, value),
                    1 => set_half(&mut driver.driver_features, true, value),
                    _ => {}
                }
            }
            (CONFIG_VECTOR, 2) => driver.config_vector = vector,
            (DEVICE_STATUS, 1) => self.write_status(value as u8),
            (QUEUE_SELECT, 2) => driver.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => {
                if let Some(queue) = self.queues.get_mut(self.negotiation.queue_select) {
                    queue.vector = vector;
                }
            }
            (QUEUE_ENABLE, 2) if value as u16 == 1 => self.enable_queue(),
            _ => self.write_queue(offset, size, value),
        }
    }

    /// 4.1.5.1.2: a vector that does not exist reads back as none.
    fn checked_vector(&self, value: u64) -> u16 {
        let vector = value as u16;
        if vector < self.msix.len() { vector } else { NO_VECTOR }
    }

    /// Size and areas of the selected queue, fixed once it is enabled.
    fn write_queue(&mut self, offset: u64, size: u8, value: u64) {
        let select = self.negotiation.queue_select;
        let Some(queue) = self.queues.get_mut(select).filter(|queue| !queue.enabled()) else { return };
        let high = offset & 4 != 0;
        let register = match offset & !7 {
            QUEUE_SIZE if offset == QUEUE_SIZE && size == 2 => {
                queue.size = value as u16;
                return;
            }
            QUEUE_DESCRIPTORS => &mut queue.descriptors,
            QUEUE_AVAILABLE => &mut queue.available,
            QUEUE_USED => &mut queue.used,
            _ => return,
        };
        match size {
            8 if offset & 7 == 0 => *register = value,
            4 if offset & 3 == 0 => set_half(register, high, value),
            _ => {}
        }
    }
}
