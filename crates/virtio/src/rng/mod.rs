//! virtio-rng (5.4): random bytes from the host, so that a fresh guest does not wait for entropy.

mod device;
mod spec;
#[cfg(test)]
mod test;

pub use device::{EntropySource, Rng, RngDevice};
