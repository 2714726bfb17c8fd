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

pub use device::{Net, NetConfig, NetDevice};
pub use lend::{Lending, Loan};
