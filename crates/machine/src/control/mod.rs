//! The control API of a running machine: a Unix socket, a small framed protocol ([`protocol`]), a server.
//!
//! Whoever may open the socket may do everything to the machine; the directory it lies in is the access control.

pub mod protocol;
mod server;

pub use server::{Listener, Operations, Server};
