//! The entropy device: fills what the driver offers. It has no state of its own.

use super::spec;
use crate::queue::RingError;
use crate::transport::{Device, Pci, Queues};
use device::MsiSink;
use memory::GuestMemory;
use serde_json::{Value, json};

/// Fills a buffer with random bytes.
pub type EntropySource = Box<dyn FnMut(&mut [u8]) + Send>;

/// Entries of the queue.
const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request gets; the driver asks again for more.
const REQUEST_MAX: u64 = 4096;

/// An entropy device on the PCI bus.
pub type Rng = Pci<RngDevice>;

/// What is behind the queue of an [`Rng`].
pub struct RngDevice {
    source: EntropySource,
    given: u64,
}

impl Pci<RngDevice> {
    /// An entropy device that draws from `source`.
    pub fn new(memory: GuestMemory, sink: MsiSink, source: EntropySource) -> Self {
        Self::with_device(RngDevice { source, given: 0 }, memory, sink)
    }
}

impl Device for RngDevice {
    const NAME: &'static str = "virtio-rng";
    const TYPE: u16 = spec::TYPE;
    const CLASS: (u8, u8) = (0x00, 0xff);

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn notified(&mut self, _queue: u16, queues: &mut Queues) -> Result<(), RingError> {
        for _ in 0..queues.burst(spec::REQUESTS) {
            let Some(chain) = queues.pop(spec::REQUESTS)? else { return Ok(()) };
            let len = usize::try_from(chain.writable.len().min(REQUEST_MAX)).unwrap_or(0);
            let mut bytes = vec![0; len];
            (self.source)(&mut bytes);
            let written = chain.writable.write(queues.memory(), 0, &bytes)?;
            self.given = self.given.saturating_add(written as u64);
            queues.push(spec::REQUESTS, chain.head, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        queues.again(spec::REQUESTS);
        Ok(())
    }

    fn reset(&mut self) {}

    fn inspect(&self) -> Value {
        json!({ "bytes_given": self.given })
    }
}
