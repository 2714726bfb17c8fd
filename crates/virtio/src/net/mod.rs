//! virtio-net (5.1): a network card.

mod control;
mod device;
mod filter;
mod lend;
mod receive;
mod rss;
mod spec;
#[cfg(test)]
mod test;

use crate::queue::{Chain, RingError};

/// Receive buffers are all the device's to write (5.1.6.3), and have room for the header.
fn check_receive(chain: &Chain) -> Result<(), RingError> {
    if !chain.readable.is_empty() {
        return Err(RingError::Request { what: "a piece to be read among receive buffers" });
    }
    if chain.writable.len() < spec::HEADER_LEN as u64 {
        return Err(RingError::Request { what: "no room for its header" });
    }
    Ok(())
}

pub use device::{Net, NetConfig, NetDevice};
pub use lend::{Lending, Loan};
