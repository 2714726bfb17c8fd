//! VLANs (IEEE 802.1Q): which of them a port is in, and what a frame's tag means there.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The largest VLAN (9.6: 4095 is reserved).
pub const VLAN_MAX: u16 = 4094;
/// The VLAN of ports that name none.
pub const VLAN_DEFAULT: u16 = 1;
/// EtherType of a customer's tag.
pub const TAG: u16 = 0x8100;
/// EtherType of a service provider's tag.
pub const SERVICE_TAG: u16 = 0x88a8;
/// Service tags as they were before there was a standard.
const SERVICE_TAG_OLD: u16 = 0x9100;

/// Whether an EtherType is a tag's.
#[inline]
pub fn is_tag(kind: u16) -> bool {
    matches!(kind, TAG | SERVICE_TAG | SERVICE_TAG_OLD)
}

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// None.
    pub fn new() -> Self {
        Self(Box::new([0; 64]))
    }

    /// Whether a VLAN is in it.
    #[inline]
    pub fn contains(&self, vlan: u16) -> bool {
        self.0.get(usize::from(vlan >> 6)).is_some_and(|word| word >> (vlan & 63) & 1 != 0)
    }

    /// Adds one.
    pub fn insert(&mut self, vlan: u16) {
        if let Some(word) = self.0.get_mut(usize::from(vlan >> 6)) {
            *word |= 1 << (vlan & 63);
        }
    }
}

impl Default for VlanSet {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// `1-4+10`
impl fmt::Display for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        let mut next = 1;
        while let Some(start) = (next..=VLAN_MAX).find(|&vlan| self.contains(vlan)) {
            let end = (start..=VLAN_MAX).take_while(|&vlan| self.contains(vlan)).last().unwrap_or(start);
            let plus = if std::mem::replace(&mut first, false) { "" } else { "+" };
            if start == end {
                write!(f, "{plus}{start}")?
            } else {
                write!(f, "{plus}{start}-{end}")?
            }
            next = end.saturating_add(1);
        }
        Ok(())
    }
}

/// A VLAN's number.
pub fn vlan(text: &str) -> Result<u16, String> {
    let number = text.parse().ok().filter(|number| (1..=VLAN_MAX).contains(number));
    number.ok_or_else(|| format!("{text:?} is no VLAN: a number from 1 to {VLAN_MAX}"))
}

impl FromStr for VlanSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut set = Self::new();
        for part in text.split('+') {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to) = (vlan(from)?, vlan(to)?);
            if from > to {
                return Err(format!("{part:?}: the first VLAN is beyond the last"));
            }
            (from..=to).for_each(|vlan| set.insert(vlan));
        }
        Ok(set)
    }
}

impl Serialize for VlanSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VlanSet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(Self::new());
        }
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// What a port makes of VLANs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Vlans {
    /// One VLAN, without tags. Frames with the tag of a VLAN are refused: nobody hops.
    Access(u16),
    /// Many, with tags; frames without one are in the native VLAN, if there is one.
    Trunk {
        /// Those with tags.
        tagged: VlanSet,
        /// That without.
        native: Option<u16>,
        /// EtherType of tags that are sent.
        service: bool,
    },
    /// One VLAN, in which whatever tags frames have are carried unseen (802.1ad, "QinQ").
    Tunnel(u16),
}

impl Default for Vlans {
    fn default() -> Self {
        Self::Access(VLAN_DEFAULT)
    }
}

/// A frame's tag as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// Priority, 0 to 7.
    pub priority: u8,
    /// VLAN; 0: priority only.
    pub vlan: u16,
}

/// What to do with a frame that came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ingress {
    /// Its VLAN.
    pub vlan: u16,
    /// Its tag is to be taken off.
    pub strip: bool,
}

impl Vlans {
    /// In which VLAN a frame is; `None` if it is in none of the port's.
    #[inline]
    pub fn ingress(&self, tag: Option<Tag>) -> Option<Ingress> {
        match (self, tag) {
            (Self::Access(vlan), None) => Some(Ingress { vlan: *vlan, strip: false }),
            (Self::Access(vlan), Some(Tag { vlan: 0, .. })) => Some(Ingress { vlan: *vlan, strip: true }),
            (Self::Access(_), Some(_)) => None,
            (Self::Tunnel(vlan), _) => Some(Ingress { vlan: *vlan, strip: false }),
            (Self::Trunk { native, .. }, None) => native.map(|vlan| Ingress { vlan, strip: false }),
            (Self::Trunk { native, .. }, Some(Tag { vlan: 0, .. })) => {
                native.map(|vlan| Ingress { vlan, strip: true })
            }
            (Self::Trunk { tagged, .. }, Some(Tag { vlan, .. })) => {
                tagged.contains(vlan).then_some(Ingress { vlan, strip: true })
            }
        }
    }

    /// Whether frames of a VLAN leave by the port, and with the tag of which EtherType, if any.
    #[inline]
    pub fn egress(&self, vlan: u16) -> Option<Option<u16>> {
        match self {
            Self::Access(own) | Self::Tunnel(own) => (*own == vlan).then_some(None),
            Self::Trunk { native: Some(native), .. } if *native == vlan => Some(None),
            Self::Trunk { tagged, service, .. } => {
                tagged.contains(vlan).then_some(Some(if *service { SERVICE_TAG } else { TAG }))
            }
        }
    }
}

impl fmt::Display for Vlans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Access(vlan) => write!(f, "{vlan}"),
            Self::Tunnel(vlan) => write!(f, "tunnel {vlan}"),
            Self::Trunk { tagged, native, service } => {
                write!(f, "trunk {tagged}")?;
                if let Some(native) = native {
                    write!(f, ", native {native}")?;
                }
                if *service { write!(f, ", service tags") } else { Ok(()) }
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sets_read_as_they_are_written() {
        let set: VlanSet = "1-3+10+4000-4094".parse().unwrap();
        assert_eq!(set.to_string(), "1-3+10+4000-4094");
        assert!(
            set.contains(2)
                && set.contains(4094)
                && !set.contains(4)
                && !set.contains(4095)
                && !set.contains(u16::MAX)
        );
        for bad in ["", "0", "4095", "5-4", "1,2", "a"] {
            assert!(bad.parse::<VlanSet>().is_err(), "{bad}");
        }
        let json =
            serde_json::to_string(&Vlans::Trunk { tagged: set, native: Some(7), service: true }).unwrap();
        let back: Vlans = serde_json::from_str(&json).unwrap();
        assert_eq!(back.to_string(), "trunk 1-3+10+4000-4094, native 7, service tags");
    }

    #[test]
    fn nobody_hops() {
        let tag = |vlan| Some(Tag { priority: 3, vlan });
        let access = Vlans::Access(5);
        assert_eq!(access.ingress(None), Some(Ingress { vlan: 5, strip: false }));
        assert_eq!(access.ingress(tag(0)), Some(Ingress { vlan: 5, strip: true }));
        // Not even with the tag of its own VLAN, behind which another one could be.
        assert_eq!((access.ingress(tag(5)), access.ingress(tag(6))), (None, None));
        let trunk = Vlans::Trunk { tagged: "5-6".parse().unwrap(), native: Some(9), service: false };
        assert_eq!(trunk.ingress(None), Some(Ingress { vlan: 9, strip: false }));
        assert_eq!(trunk.ingress(tag(6)), Some(Ingress { vlan: 6, strip: true }));
        assert_eq!(trunk.ingress(tag(7)), None);
        assert_eq!((trunk.egress(9), trunk.egress(5), trunk.egress(1)), (Some(None), Some(Some(TAG)), None));
        let bare = Vlans::Trunk { tagged: "5".parse().unwrap(), native: None, service: true };
        assert_eq!(
            (bare.ingress(None), bare.ingress(tag(0)), bare.egress(5)),
            (None, None, Some(Some(SERVICE_TAG)))
        );
        let tunnel = Vlans::Tunnel(100);
        assert_eq!(tunnel.ingress(tag(6)), Some(Ingress { vlan: 100, strip: false }));
        assert_eq!((tunnel.egress(100), tunnel.egress(6)), (Some(None), None));
    }
}
