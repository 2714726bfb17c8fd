//! Network block devices: images served to others, and others' images as storage.
//!
//! * [`Server`] serves disks under names, on Unix and TCP sockets, to any client of the protocol: fixed newstyle
//!   negotiation, structured replies, extended headers, block status, several connections to one image, TLS.
//! * [`NbdStorage`] is an export of somebody else's server as storage, on which any format can lie.
//! * [`Uri`] says where an export is.
//!
//! Source: the NBD protocol, doc/proto.md of the reference implementation.

mod client;
mod input;
mod server;
mod stream;
mod tls;
#[cfg(test)]
mod tls_test;
mod uri;
mod wire;

pub use client::NbdStorage;
pub use server::{Export, Limits, Listener, Server, Statistics, bind};
pub use stream::Stream;
pub use tls::{Policy, Tls};
pub use uri::{Place, Uri, UriError};
