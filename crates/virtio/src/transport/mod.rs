//! What a virtio device is, whatever carries it, and the transport that carries it.

mod pci;
mod registers;
#[cfg(test)]
mod test;

pub use pci::Pci;

use crate::queue::{Chain, Queue, RingError, RingFeatures};
use memory::GuestMemory;
use std::collections::BTreeSet;

/// Device status bits (2.1).
pub(crate) mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// Feature bits of rings and transport (6).
pub(crate) mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// A kind of virtio device. It is a value: driven by its transport, it reaches the guest through [`Queues`] only.
pub trait Device: Send {
    /// Name for people.
    const NAME: &'static str;
    /// Device ID (5).
    const TYPE: u16;
    /// PCI class and subclass.
    const CLASS: (u8, u8);

    /// Feature bits of this kind of device that are offered.
    fn features(&self) -> u64;
    /// The largest size of each virtqueue; their number is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// The device configuration space as it reads now.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration space.
    fn config_written(&mut self, _offset: u64, _bytes: &[u8]) {}
    /// The driver is ready, with these features agreed on.
    fn activate(&mut self, features: u64);
    /// The driver says that `queue` has new chains (or may have). A device that stops before the queue is empty says
    /// [`Queues::again`].
    fn notified(&mut self, queue: u16, queues: &mut Queues) -> Result<(), RingError>;
    /// Whether a notification of `queue` does nothing but wake whoever serves the device, so that an engine may wake them itself
    /// ([`Bell`]).
    fn only_wakes(&self, _queue: u16) -> bool {
        false
    }
    /// Forgets everything the driver has told it. Chains not given back are lost with their queue.
    fn reset(&mut self);
    /// After a reset: work is still being done on guest RAM, so the reset is not over.
    fn draining(&self) -> bool {
        false
    }
    /// The live state, for people.
    fn inspect(&self) -> serde_json::Value;
}

/// Hears at which guest-physical addresses the driver rings for a device's workers, so that an engine may let them hear it
/// themselves: `hang` there, or take it down again.
pub type Bell = Box<dyn FnMut(u64, bool) + Send>;

/// The virtqueues of a device and the RAM they are in.
#[derive(Debug)]
pub struct Queues {
    memory: GuestMemory,
    list: Vec<Queue>,
    again: BTreeSet<u16>,
}

impl Queues {
    fn new(memory: GuestMemory, sizes: &[u16]) -> Self {
        Self { memory, list: sizes.iter().map(|&size| Queue::new(size)).collect(), again: BTreeSet::new() }
    }

    fn reset(&mut self) {
        self.list.iter_mut().for_each(Queue::reset);
        self.again.clear();
    }

    fn set_features(&mut self, features: u64) {
        let features = RingFeatures {
            indirect: features & feature::INDIRECT_DESC != 0,
            event_index: features & feature::EVENT_IDX != 0,
            packed: features & feature::RING_PACKED != 0,
        };
        self.list.iter_mut().for_each(|queue| queue.set_features(features));
    }

    fn len(&self) -> u16 {
        u16::try_from(self.list.len()).unwrap_or(u16::MAX)
    }

    fn get(&self, queue: u16) -> Option<&Queue> {
        self.list.get(usize::from(queue))
    }

    fn get_mut(&mut self, queue: u16) -> Option<&mut Queue> {
        self.list.get_mut(usize::from(queue))
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the driver has enabled a queue.
    pub fn enabled(&self, queue: u16) -> bool {
        self.get(queue).is_some_and(Queue::enabled)
    }

    /// How many chains one notification may cost at most before the device lets go of its lock.
    pub fn burst(&self, queue: u16) -> u16 {
        self.get(queue).map_or(0, Queue::size)
    }

    /// Takes the next chain of a queue, if it is running and has one.
    pub fn pop(&mut self, queue: u16) -> Result<Option<Chain>, RingError> {
        match self.list.get_mut(usize::from(queue)) {
            Some(queue) => queue.pop(&self.memory),
            None => Ok(None),
        }
    }

    /// Gives a chain back; the transport interrupts once the device is done.
    pub fn push(&mut self, queue: u16, head: u16, written: u32) -> Result<(), RingError> {
        match self.list.get_mut(usize::from(queue)) {
            Some(queue) => queue.push(&self.memory, head, written),
            None => Ok(()),
        }
    }

    /// Gives chains back in one step: the driver sees all of them or none.
    pub fn push_all(&mut self, queue: u16, chains: &[(u16, u32)]) -> Result<(), RingError> {
        match self.list.get_mut(usize::from(queue)) {
            Some(queue) => queue.push_all(&self.memory, chains),
            None => Ok(()),
        }
    }

    /// Asks for another [`Device::notified`] soon: the queue has more than one call should do.
    pub fn again(&mut self, queue: u16) {
        self.again.insert(queue);
    }
}
