//! TCP: the guest's connections, each spliced to a socket of the host's.

mod connection;
pub mod header;
#[cfg(test)]
mod test;

pub use connection::{Budget, Connection, Link, State, Stream, Verdict};
