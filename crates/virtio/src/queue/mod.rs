//! Virtqueues, the device's side: split ones (2.7), and packed ones (2.8, [`packed`]) where the driver wants those.
//!
//! A queue is *disabled* until the driver has said where its three areas are and enabled it; it is *running* until the
//! next device reset. [`Queue::pop`] takes a whole, checked [`Chain`] or none; [`Queue::push`] gives it back. Nothing of
//! a chain is kept in guest RAM: once popped, the driver can no longer change what it describes.
//!
//! Ordering: the driver's index is loaded before the ring entries it covers, our index is stored (release) after them;
//! a full fence stands between storing an index and loading the other side's wish to be told about it (2.7.7, 2.7.10).

mod chain;
mod packed;
#[cfg(test)]
mod test;

pub use chain::{Chain, Piece};

use device::block::Segment;
use memory::{AccessError, GuestMemory};
use packed::Packed;
use std::sync::atomic::{Ordering, fence};

/// The largest queue the specification allows (2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;
/// The driver wants no interrupts (2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// A ring that breaks the rules. The device stops until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// An area or a buffer is not guest RAM.
    #[error(
        "a ring or buffer is not guest RAM ({0}): the guest's driver is at fault and has to reset the device"
    )]
    Memory(#[from] AccessError),
    /// The driver offers more chains than the queue holds.
    #[error(
        "the available index went {ahead} ahead in a queue of {size}: the guest's driver has to reset the device"
    )]
    Index {
        /// How far it is ahead.
        ahead: u16,
        /// Queue size.
        size: u16,
    },
    /// A chain that does not follow 2.7.5.
    #[error("descriptor chain {head} is malformed ({why}): the guest's driver has to reset the device")]
    Chain {
        /// Its first descriptor.
        head: u16,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The queue was enabled with an impossible size or address.
    #[error("queue {index} was enabled with {what}: the guest's driver has to reset the device")]
    Setup {
        /// Which queue.
        index: u16,
        /// What is impossible.
        what: &'static str,
    },
    /// A request too short to answer.
    #[error("a request has {what}: the guest's driver has to reset the device")]
    Request {
        /// What it lacks.
        what: &'static str,
    },
}

/// Features of rings that driver and device have agreed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Queue {
    size_max: u16,
    /// Entries, a power of two once enabled.
    pub(crate) size: u16,
    /// Descriptor area.
    pub(crate) descriptors: u64,
    /// Driver area ("available ring"; of packed queues what the driver wants to be told).
    pub(crate) available: u64,
    /// Device area ("used ring"; of packed queues what the device wants to be told).
    pub(crate) used: u64,
    /// MSI-X vector.
    pub(crate) vector: u16,
    enabled: bool,
    features: RingFeatures,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was last told, or decided not to be.
    told: u16,
    /// Chains were given back since the last [`Self::take_interrupt`].
    returned: bool,
    /// Where a packed queue is, instead of the indexes above.
    packed: Packed,
}

impl Queue {
    /// A disabled queue of at most `size_max` entries.
    pub fn new(size_max: u16) -> Self {
        let size_max = size_max.clamp(1, QUEUE_SIZE_MAX);
        let size_max = if size_max.is_power_of_two() { size_max } else { size_max.next_power_of_two() >> 1 };
        Self {
            size_max,
            size: size_max,
            descriptors: 0,
            available: 0,
            used: 0,
            vector: u16::MAX,
            enabled: false,
            features: RingFeatures::default(),
            next_available: 0,
            next_used: 0,
            told: 0,
            returned: false,
            packed: Packed::default(),
        }
    }

    /// Back to disabled.
    pub fn reset(&mut self) {
        *self = Self::new(self.size_max);
    }

    /// Whether the driver has enabled it.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn set_features(&mut self, features: RingFeatures) {
        self.features = features;
    }

    /// Checks size and areas and starts the queue. `index` is for the error.
    pub fn enable(&mut self, memory: &GuestMemory, index: u16) -> Result<(), RingError> {
        let wrong = |what| RingError::Setup { index, what };
        if self.features.packed {
            self.enable_packed(memory).map_err(wrong)?;
            self.enabled = true;
            return Ok(());
        }
        if !self.size.is_power_of_two() || self.size > self.size_max {
            return Err(wrong("a size that is no power of two or too large"));
        }
        if self.descriptors & 15 != 0 || self.available & 1 != 0 || self.used & 3 != 0 {
            return Err(wrong("an area that is not aligned (2.7)"));
        }
        // Sizes by 2.7, each with the trailing event index.
        let size = u64::from(self.size);
        let areas = [
            (self.descriptors, size.wrapping_mul(16)),
            (self.available, size.wrapping_mul(2).wrapping_add(6)),
            (self.used, size.wrapping_mul(8).wrapping_add(6)),
        ];
        if areas.iter().any(|&(at, len)| !memory.contains(at, len)) {
            return Err(wrong("an area that is not guest RAM"));
        }
        self.enabled = true;
        Ok(())
    }

    /// Takes the next chain. When there is none the driver is asked to notify the device of the next one.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingError> {
        if !self.enabled {
            return Ok(None);
        }
        if self.features.packed {
            return self.pop_packed(memory);
        }
        if self.available_ahead(memory)? == 0 {
            if !self.features.event_index {
                // Notifications are never suppressed by flag, so a later chain is announced.
                return Ok(None);
            }
            let next = self.next_available;
            memory.atomic_u16(self.avail_event(), |cell| cell.store(next.to_le(), Ordering::Release))?;
            fence(Ordering::SeqCst);
            if self.available_ahead(memory)? == 0 {
                return Ok(None);
            }
        }
        let slot = u64::from(self.next_available & self.size.wrapping_sub(1));
        let entry = self.available.wrapping_add(4).wrapping_add(slot.wrapping_mul(2));
        let head = memory.load_u16(entry)?;
        let table = chain::Table { address: self.descriptors, len: self.size, size_max: self.size_max };
        let chain = chain::parse(memory, table, head, self.features.indirect)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// How many chains there are to take. With those that the device has, they are no more than the queue has entries: a driver that
    /// makes one available again and again has them all counted.
    fn available_ahead(&self, memory: &GuestMemory) -> Result<u16, RingError> {
        let index = memory.load_u16(self.available.wrapping_add(2))?;
        let ahead = index.wrapping_sub(self.next_available);
        let outstanding = index.wrapping_sub(self.next_used);
        if ahead > self.size || outstanding > self.size {
            return Err(RingError::Index { ahead: ahead.max(outstanding), size: self.size });
        }
        Ok(ahead)
    }

    /// Gives the chain that starts at `head` back, with `written` bytes in its writable pieces.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), RingError> {
        self.push_all(memory, &[(head, written)])
    }

    /// Gives chains back, as [`Self::push`] does each, in one step: the driver sees all of them or none.
    pub fn push_all(&mut self, memory: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), RingError> {
        if !self.enabled {
            return Ok(());
        }
        if self.features.packed {
            return self.push_packed(memory, chains);
        }
        for &(head, written) in chains {
            let slot = u64::from(self.next_used & self.size.wrapping_sub(1));
            let entry = self.used.wrapping_add(4).wrapping_add(slot.wrapping_mul(8));
            let element = u64::from(head) | (u64::from(written) << 32);
            memory.write(entry, &element.to_le_bytes())?;
            self.next_used = self.next_used.wrapping_add(1);
        }
        let next = self.next_used;
        memory.atomic_u16(self.used.wrapping_add(2), |cell| cell.store(next.to_le(), Ordering::Release))?;
        self.returned = true;
        Ok(())
    }

    /// Whether chains were given back since the last call and the driver wants an interrupt for them.
    pub fn take_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        if !std::mem::take(&mut self.returned) {
            return Ok(false);
        }
        fence(Ordering::SeqCst);
        if self.features.packed {
            return self.wants_packed(memory);
        }
        let old = std::mem::replace(&mut self.told, self.next_used);
        if self.features.event_index {
            let at = u64::from(self.size).wrapping_mul(2).wrapping_add(4);
            let event = memory.load_u16(self.available.wrapping_add(at))?;
            // 2.7.7.2: has the index passed `event` since the driver was last told?
            let since_event = self.next_used.wrapping_sub(event).wrapping_sub(1);
            Ok(since_event < self.next_used.wrapping_sub(old))
        } else {
            Ok(memory.load_u16(self.available)? & AVAIL_NO_INTERRUPT == 0)
        }
    }

    fn avail_event(&self) -> u64 {
        self.used.wrapping_add(4).wrapping_add(u64::from(self.size).wrapping_mul(8))
    }

    /// For people.
    pub fn inspect(&self) -> serde_json::Value {
        serde_json::json!({
            "enabled": self.enabled, "size": self.size, "vector": self.vector,
            "descriptors": format!("{:#x}", self.descriptors),
            "available": format!("{:#x}", self.available), "used": format!("{:#x}", self.used),
            "next_available": self.next_available, "next_used": self.next_used,
            "packed": self.features.packed.then(|| self.packed.inspect()),
        })
    }
}

/// The bytes of all segments together.
pub(crate) fn total(segments: &[Segment]) -> u64 {
    segments.iter().fold(0u64, |sum, segment| sum.saturating_add(segment.len.into()))
}
