//! Frames for several: for all, for groups of multicast, and for those of whom nobody knows where they are.

use super::forward::{Switch, Workspace, note};
use super::packet::Origin;
use super::port::Port;
use super::reason::Reason;
use super::snoop::{self, Message};
use super::table::PortNumber;
use super::wait;
use crate::wire::{be16, ether};

/// Bytes of a frame that count as one flood.
const FLOOD_UNIT: u64 = 1515;
/// Receivers of a group's frame that make it a flood, at least: what goes to fewer counts as the part of a flood that it is.
const RECEIVERS_OF_FLOOD: u64 = 64;

impl Switch {
    /// A frame for all, or for a group, or for somebody whom nobody knows.
    pub(super) fn flood(
        &mut self,
        port: &mut Port,
        workspace: &mut Workspace,
        index: usize,
        origin: Origin<'_>,
    ) -> Result<(), Reason> {
        let packet = workspace.burst.packet(index)?;
        let (vlan, tagged, len) = (packet.vlan, packet.tag().is_some(), packet.len() as u64);
        let pieces = packet.offload.pieces(packet.len()) as u64;
        let group = snoop::group(packet.head());
        let speaks = group.is_some() && snoop::may_speak(packet.head());
        let mut receivers = match group {
            Some(group) if !speaks => self.groups.receivers(vlan, Some(group), group.is_ipv6(), self.second),
            _ => None,
        };
        // A large segment costs those who get it as much as what it is cut into.
        let units = (len / FLOOD_UNIT).saturating_add(1).max(pieces);
        let floods = match &receivers {
            None => units,
            Some(receivers) => {
                let copies = units.saturating_mul(receivers.len() as u64).saturating_add(port.copies);
                port.copies = copies % RECEIVERS_OF_FLOOD;
                copies / RECEIVERS_OF_FLOOD
            }
        };
        if floods > 0 && !port.storm.as_mut().is_none_or(|meter| meter.pass(floods, self.now)) {
            return Err(Reason::Storm);
        }
        if speaks {
            receivers = self.hear(port, workspace, index, origin)?;
        }
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        let mut offer = |receiver| {
            if self.may_go(port, receiver, vlan, tagged).is_ok() {
                note(workspace, receiver, number);
            }
        };
        match receivers {
            Some(receivers) => receivers.into_iter().for_each(offer),
            None => {
                (0..self.ports.len())
                    .for_each(|place| offer(PortNumber::try_from(place).unwrap_or(PortNumber::MAX)));
                port.counters.flooded = port.counters.flooded.wrapping_add(1);
            }
        }
        Ok(())
    }

    /// Listens to what is said about groups of multicast; answers who else is to hear it, if not all.
    #[cold]
    fn hear(
        &mut self,
        port: &Port,
        workspace: &mut Workspace,
        index: usize,
        origin: Origin<'_>,
    ) -> Result<Option<Vec<PortNumber>>, Reason> {
        let (packet, rest) = workspace.burst.with_rest(index, origin).ok_or(Reason::Broken)?;
        let (vlan, now) = (packet.vlan, self.second);
        let six = be16(packet.head(), 12) == Some(ether::IPV6);
        let frame = wait::whole(packet, rest, self.now);
        match snoop::message(&frame.bytes) {
            Some(Message::Query | Message::Router) if !port.spec.trusted => Err(Reason::Router),
            Some(message @ (Message::Query | Message::Router)) => {
                let asks = (message == Message::Query).then_some(six);
                self.groups.router(vlan, port.number, asks, now);
                Ok(None)
            }
            Some(Message::Wishes(wishes)) => {
                for (group, wants) in wishes {
                    self.groups.wish(vlan, group, port.number, wants, now);
                }
                Ok(self.groups.receivers(vlan, None, six, now))
            }
            None => Ok(None),
        }
    }

    /// Who wants which groups of multicast, for people.
    pub fn inspect_multicast(&self) -> serde_json::Value {
        let name = |number| self.port(number).map_or("", |port| port.name.as_str());
        let members = self.groups.members(self.second).map(|(vlan, group, port, left)| {
            serde_json::json!({ "vlan": vlan, "group": group, "port": name(port), "seconds": left })
        });
        let routers = self.groups.routers(self.second).map(
            |(vlan, port, left)| serde_json::json!({ "vlan": vlan, "port": name(port), "seconds": left }),
        );
        serde_json::json!({ "members": members.collect::<Vec<_>>(), "routers": routers.collect::<Vec<_>>() })
    }
}
