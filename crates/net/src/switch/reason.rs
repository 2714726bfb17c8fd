//! Why frames are dropped, each reason with a name and a count.

use serde_json::{Map, Value};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        /// The names of all reasons, in order.
        pub const NAMES: &[&str] = &[$($text,)+];
    };
}

reasons! {
    /// Shorter than a header, longer than any frame, or not what it was said to be.
    Broken = "broken",
    /// A VLAN that the port is not in.
    Vlan = "vlan",
    /// From an address that no card has: a group's, or zero.
    Source = "source",
    /// From an address that is another port's, or not this one's.
    Spoofed = "spoofed",
    /// ARP or neighbour discovery that says what is not so.
    ArpSpoofed = "arp_spoofed",
    /// More addresses than the port may have.
    Quota = "quota",
    /// What it is cannot be seen in its first bytes.
    Hidden = "hidden",
    /// A router's message from who is none.
    Router = "router",
    /// A DHCP server's message from who is none.
    DhcpServer = "dhcp_server",
    /// For bridges (802.1Q, table 8-1): never forwarded.
    Reserved = "reserved",
    /// More floods than the port may cause.
    Storm = "storm",
    /// The port is off.
    Disabled = "disabled",
    /// To where it came from.
    Returned = "returned",
    /// From one private port to another.
    Private = "private",
    /// Nobody is there.
    NoReceiver = "no_receiver",
    /// The receiver has no buffers, and what waits for it is as much as may.
    Full = "full",
    /// It waited too long.
    Late = "late",
    /// No buffer of the receiver's is long enough.
    TooLong = "too_long",
    /// Lost on purpose.
    Emulated = "emulated_loss",
}

/// One count for each reason.
#[derive(Debug, Clone, Copy)]
pub struct Drops([u64; NAMES.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self([0; NAMES.len()])
    }
}

impl Drops {
    /// Counts one.
    pub fn count(&mut self, reason: Reason) {
        if let Some(count) = self.0.get_mut(reason as usize) {
            *count = count.wrapping_add(1);
        }
    }

    /// How many there were for a reason.
    pub fn get(&self, reason: Reason) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// How many there were for all.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// Those that are not zero, by name.
    pub fn inspect(&self) -> Value {
        let named = NAMES.iter().zip(&self.0).filter(|(_, count)| **count > 0);
        Value::Object(named.map(|(name, count)| ((*name).to_owned(), (*count).into())).collect::<Map<_, _>>())
    }
}
