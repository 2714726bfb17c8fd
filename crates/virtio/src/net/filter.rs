//! Which frames the driver wants to see (5.1.6.5.1 to 5.1.6.5.3).

use super::spec::control;
use serde_json::{Value, json};

/// Addresses that are remembered of each kind; with more, all of the kind are let through (5.1.6.5.2 leaves it open).
const ADDRESSES_MAX: usize = 64;
/// 802.1Q has so many VLANs.
const VLANS: usize = 4096;
/// Tag protocol identifiers.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

/// The addresses of one kind.
#[derive(Debug, Clone, Default)]
struct Addresses {
    list: Vec<[u8; 6]>,
    /// There were too many.
    all: bool,
}

/// The filter. A fresh one lets everything through.
#[derive(Debug, Clone)]
pub struct Filter {
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Addresses,
    multicast: Addresses,
    /// `None`: the driver does not filter VLANs.
    vlans: Option<Box<[u64; VLANS / 64]>>,
}

impl Filter {
    /// What holds until the driver says otherwise.
    pub fn new(filter_vlans: bool) -> Self {
        Self {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: filter_vlans.then(|| Box::new([0; VLANS / 64])),
        }
    }

    /// Sets a mode; answers whether there is such a mode.
    pub fn set_mode(&mut self, command: u8, on: bool) -> bool {
        let mode = match command {
            control::RX_PROMISC => &mut self.promiscuous,
            control::RX_ALLMULTI => &mut self.all_multicast,
            control::RX_ALLUNI => &mut self.all_unicast,
            control::RX_NOMULTI => &mut self.no_multicast,
            control::RX_NOUNI => &mut self.no_unicast,
            control::RX_NOBCAST => &mut self.no_broadcast,
            _ => return false,
        };
        *mode = on;
        true
    }

    /// Replaces both address tables by those of a command: each a count and as many addresses (5.1.6.5.2).
    pub fn set_tables(&mut self, command: &[u8]) -> bool {
        let Some((unicast, rest)) = table(command) else { return false };
        let Some((multicast, _)) = table(rest) else { return false };
        (self.unicast, self.multicast) = (unicast, multicast);
        true
    }

    /// Lets a VLAN through, or no longer.
    pub fn set_vlan(&mut self, vlan: u16, through: bool) -> bool {
        let Some(word) = self.vlans.as_mut().and_then(|vlans| vlans.get_mut(usize::from(vlan / 64))) else {
            return false;
        };
        let bit = 1u64 << (vlan % 64);
        *word = if through { *word | bit } else { *word & !bit };
        true
    }

    /// Whether a frame for the card at `address` is let through.
    pub fn passes(&self, frame: &[u8], address: [u8; 6]) -> bool {
        let Some(to @ [first, ..]) = frame.first_chunk::<6>() else { return false };
        // All that comes, tagged or not, whatever else is set.
        if self.promiscuous {
            return true;
        }
        if let (Some(vlans), Some(kind)) = (&self.vlans, frame.get(12..14))
            && TAGS.iter().any(|tag| tag == kind)
        {
            let tag = frame.get(14..).and_then(<[u8]>::first_chunk).copied().map_or(0, u16::from_be_bytes);
            let vlan = tag & 0xfff;
            let word = vlans.get(usize::from(vlan / 64)).copied().unwrap_or(0);
            if word >> (vlan % 64) & 1 == 0 {
                return false;
            }
        }
        if *to == [0xff; 6] {
            return !self.no_broadcast;
        }
        if first & 1 != 0 {
            let listed = self.all_multicast || self.multicast.has(to);
            return !self.no_multicast && listed;
        }
        !self.no_unicast && (*to == address || self.all_unicast || self.unicast.has(to))
    }

    /// For people.
    pub fn inspect(&self) -> Value {
        json!({ "promiscuous": self.promiscuous, "all_multicast": self.all_multicast,
            "unicast": self.unicast.list.len(), "multicast": self.multicast.list.len(),
            "vlans": self.vlans.as_ref().map(|vlans| vlans.iter().map(|word| word.count_ones()).sum::<u32>()) })
    }
}

impl Addresses {
    fn has(&self, address: &[u8; 6]) -> bool {
        self.all || self.list.contains(address)
    }
}

/// One table, and what follows it.
fn table(bytes: &[u8]) -> Option<(Addresses, &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let (addresses, _) = addresses.as_chunks::<6>();
    let all = addresses.len() > ADDRESSES_MAX;
    let list = if all { Vec::new() } else { addresses.to_vec() };
    Some((Addresses { list, all }, rest))
}
