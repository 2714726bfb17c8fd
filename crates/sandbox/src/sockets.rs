//! What the sockets that are open tell: where they lead, the process may connect again.
//!
//! Unsafe, because descriptors are found by their numbers, whoever owns them. They are only asked, and one that is no socket
//! or closed says so.

#![allow(unsafe_code)]

use crate::{Grant, May, Plan};
use rustix::net::{AddressFamily, SocketAddrUnix, getpeername, sockopt};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;

impl Plan {
    /// Adds what the process's open sockets need: the network for those to it, and the paths of other processes' sockets.
    /// Standard input and output, whatever they are, need nothing.
    pub fn add_open_sockets(&mut self) {
        const FIRST: RawFd = 3;
        let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
        let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
        for number in numbers.filter(|&number| number >= FIRST).collect::<Vec<_>>() {
            // SAFETY: one that is closed meanwhile only makes these calls fail.
            self.add(unsafe { BorrowedFd::borrow_raw(number) });
        }
    }

    fn add(&mut self, socket: BorrowedFd<'_>) {
        match sockopt::socket_domain(socket) {
            Ok(AddressFamily::INET | AddressFamily::INET6) => self.internet = true,
            Ok(AddressFamily::UNIX) => {
                let Ok(Some(peer)) = getpeername(socket) else { return };
                let Ok(peer) = SocketAddrUnix::try_from(peer) else { return };
                self.add_peer(&peer);
            }
            _ => {}
        }
    }

    fn add_peer(&mut self, peer: &SocketAddrUnix) {
        use std::os::unix::ffi::OsStrExt;
        if let Some(path) = peer.path() {
            self.local_sockets = true;
            let path = PathBuf::from(std::ffi::OsStr::from_bytes(path.to_bytes()));
            self.grants.push(Grant { path, may: May::Connect });
        } else if peer.abstract_name().is_some_and(|name| !name.is_empty()) {
            // A name of the network's namespace.
            (self.local_sockets, self.abstract_sockets) = (true, true);
        }
    }
}
