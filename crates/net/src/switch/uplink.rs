//! Ways out of a switch that are no guests.

use crate::batch::Batch;
use crate::card::Card;
use crate::offload::Offload;
use crate::tap::Tap;
use crate::vxlan::Vxlan;
use std::os::fd::{AsFd, BorrowedFd};

/// A way out.
#[derive(Debug)]
pub enum Uplink {
    /// An interface of the host's.
    Tap(Tap),
    /// A tunnel to another host.
    Vxlan(Vxlan),
}

impl Uplink {
    /// Moves frames that have come into a batch while it has room; answers whether there may be more.
    pub fn take(&self, batch: &mut Batch) -> bool {
        match self {
            Self::Tap(tap) => tap.take(batch),
            Self::Vxlan(tunnel) => tunnel.take(batch),
        }
    }

    /// Sends one frame; answers whether it was taken, or never will be.
    pub fn send(&self, offload: &Offload, frame: &[u8]) -> bool {
        match self {
            Self::Tap(tap) => tap.send(offload, frame),
            Self::Vxlan(tunnel) => tunnel.send(offload, frame),
        }
    }

    /// What it is, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tap(_) => "tap",
            Self::Vxlan(_) => "vxlan",
        }
    }

    /// What is wrong, for people.
    pub fn complaints(&self) -> Vec<String> {
        match self {
            Self::Vxlan(tunnel) if tunnel.strange() > 0 => {
                vec![format!("{} datagrams were not of this tunnel", tunnel.strange())]
            }
            _ => Vec::new(),
        }
    }
}

impl AsFd for Uplink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.file(),
            Self::Vxlan(tunnel) => tunnel.as_fd(),
        }
    }
}
