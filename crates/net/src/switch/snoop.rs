//! Who wants which group of multicast (RFC 4541): its frames go to those who asked for them, and to routers, not to all.
//!
//! Hosts say what they want when they join, and again when a router asks (IGMP, RFC 9776; MLD, RFC 9777). So this is in force in a VLAN
//! only while a router asks there, as on Linux's bridge: before, and afterwards, all get everything. Routers are behind trusted ports only.
//! What belongs to the link (224.0.0.0/24, ff02::/16) always goes to all: hosts need not ask for it (RFC 4541, 2.1.2), or lose each other
//! if somebody misses that they did.

use super::table::PortNumber;
use crate::wire::{array, be16, ether, protocol};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// How long a host's wish lasts: two questions unanswered, and the time that answers have (RFC 9776, 8.4), in seconds.
const MEMBER_SECONDS: u32 = 260;
/// How long a router is believed to be there without a question (8.5).
const ROUTER_SECONDS: u32 = 255;
/// How long somebody else behind the port has to say that he still wants what one has left (8.8, 8.9).
const LEAVE_SECONDS: u32 = 3;
/// Until who wants something has answered a first question: the default of Max Resp Time (RFC 3376, 8.3).
const ANSWER_SECONDS: u32 = 10;
/// Groups of one port.
const GROUPS_PER_PORT: usize = 256;
/// Records of one report that are listened to.
const RECORDS_MAX: u16 = 512;
/// Of IP.
const IGMP: u8 = 2;
const PIM: u8 = 103;
/// The most extension headers in front of MLD: the router alert's.
const EXTENSIONS_MAX: usize = 4;

/// Whether a frame for a group may say something about groups, by its first header.
#[inline]
pub fn may_speak(head: &[u8]) -> bool {
    match be16(head, 12) {
        Some(ether::IPV4) => matches!(head.get(23), Some(&(IGMP | PIM))),
        // MLD has a router alert in front (RFC 9777, 5).
        Some(ether::IPV6) => matches!(head.get(20), Some(&(protocol::HOP_BY_HOP | PIM))),
        _ => false,
    }
}

/// What is said about groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A router asks who wants what.
    Query,
    /// A router is there.
    Router,
    /// Somebody wants some groups, and others no more.
    Wishes(Vec<(IpAddr, bool)>),
}

/// The group that a frame is for, if it is for one of IP's.
#[inline]
pub fn group(head: &[u8]) -> Option<IpAddr> {
    match (head.first_chunk::<3>()?, be16(head, 12)?) {
        ([0x01, 0x00, 0x5e], ether::IPV4) => {
            Some(IpAddr::V4(Ipv4Addr::from(array::<4>(head, 30)?))).filter(IpAddr::is_multicast)
        }
        ([0x33, 0x33, _], ether::IPV6) => {
            Some(IpAddr::V6(Ipv6Addr::from(array::<16>(head, 38)?))).filter(IpAddr::is_multicast)
        }
        _ => None,
    }
}

/// Whether a group is the link's own.
pub fn is_of_link(group: IpAddr) -> bool {
    match group {
        IpAddr::V4(v4) => matches!(v4.octets(), [224, 0, 0, _]),
        IpAddr::V6(v6) => v6.segments().first().is_some_and(|first| first & 0xf == 2 || first & 0xf == 1),
    }
}

/// What a frame says about groups; `None`: it is about something else, or nonsense.
pub fn message(frame: &[u8]) -> Option<Message> {
    match be16(frame, 12)? {
        ether::IPV4 => {
            let first = *frame.get(14)?;
            let at = usize::from(first & 15).checked_mul(4)?.checked_add(ether::LEN)?;
            // Such messages are short: a fragment is none.
            if be16(frame, 20)? & 0x3fff != 0 {
                return None;
            }
            match *frame.get(23)? {
                IGMP => igmp(frame.get(at..)?),
                PIM => Some(Message::Router),
                _ => None,
            }
        }
        ether::IPV6 => {
            let (mut next, mut at) = (*frame.get(20)?, 54usize);
            for _ in 0..EXTENSIONS_MAX {
                match next {
                    protocol::HOP_BY_HOP | protocol::DESTINATION => {
                        next = *frame.get(at)?;
                        let size =
                            usize::from(*frame.get(at.checked_add(1)?)?).checked_add(1)?.checked_mul(8)?;
                        at = at.checked_add(size)?;
                    }
                    protocol::ICMPV6 => return mld(frame.get(at..)?),
                    PIM => return Some(Message::Router),
                    _ => return None,
                }
            }
            None
        }
        _ => None,
    }
}

fn igmp(body: &[u8]) -> Option<Message> {
    let group = |at| Some(IpAddr::V4(Ipv4Addr::from(array::<4>(body, at)?)));
    Some(match *body.first()? {
        0x11 => Message::Query,
        0x12 | 0x16 => Message::Wishes(vec![(group(4)?, true)]),
        0x17 => Message::Wishes(vec![(group(4)?, false)]),
        0x22 => Message::Wishes(records(body, 4, group)),
        _ => return None,
    })
}

fn mld(body: &[u8]) -> Option<Message> {
    let group = |at| Some(IpAddr::V6(Ipv6Addr::from(array::<16>(body, at)?)));
    Some(match *body.first()? {
        130 => Message::Query,
        131 => Message::Wishes(vec![(group(8)?, true)]),
        132 => Message::Wishes(vec![(group(8)?, false)]),
        143 => Message::Wishes(records(body, 16, group)),
        _ => return None,
    })
}

/// The records of a report of IGMPv3 (4.2) or MLDv2 (5.2), whose addresses have so many bytes.
fn records(body: &[u8], len: usize, group: impl Fn(usize) -> Option<IpAddr>) -> Vec<(IpAddr, bool)> {
    let mut list = Vec::new();
    let mut at = 8usize;
    for _ in 0..be16(body, 6).unwrap_or(0).min(RECORDS_MAX) {
        let next = || -> Option<(IpAddr, Option<bool>, usize)> {
            let (kind, more) = (*body.get(at)?, *body.get(at.checked_add(1)?)?);
            let sources = usize::from(be16(body, at.checked_add(2)?)?);
            let address = group(at.checked_add(4)?)?;
            // "From these only", of nobody: not at all. Who wants it from some gets it from all.
            let wish = match kind {
                1 | 3 => Some(sources > 0),
                2 | 4 | 5 => Some(true),
                _ => None,
            };
            let size = sources.checked_mul(len)?.checked_add(usize::from(more).checked_mul(4)?)?;
            Some((address, wish, at.checked_add(4)?.checked_add(len)?.checked_add(size)?))
        };
        let Some((address, wish, end)) = next() else { break };
        list.extend(wish.map(|wish| (address, wish)));
        at = end;
    }
    list
}

/// Somebody who wants a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Member {
    port: PortNumber,
    until: u32,
}

/// Who wants what.
#[derive(Debug, Default)]
pub struct Groups {
    list: HashMap<(u16, IpAddr), Vec<Member>>,
    counts: HashMap<PortNumber, usize>,
    /// Until when there are routers in a VLAN behind a port.
    routers: BTreeMap<(u16, PortNumber), u32>,
    /// Until when a port gets all groups of a VLAN, because it wants more of them than are remembered.
    greedy: BTreeMap<(u16, PortNumber), u32>,
    /// From and until when what is wished is known, in a VLAN, for IPv6 or not: somebody asks.
    asked: HashMap<(u16, bool), (u32, u32)>,
    swept: Option<u32>,
    /// When routers that are silent were looked for.
    routers_swept: u32,
}

/// The ports of a VLAN that are in a list for longer than now.
fn of_vlan(list: &BTreeMap<(u16, PortNumber), u32>, vlan: u16, now: u32) -> impl Iterator<Item = PortNumber> {
    let entries = list.range((vlan, PortNumber::MIN)..=(vlan, PortNumber::MAX));
    entries.filter(move |(_, until)| **until > now).map(|((_, port), _)| *port)
}

impl Groups {
    /// A router is behind a port; it has asked for wishes of IPv6 or not.
    pub fn router(&mut self, vlan: u16, port: PortNumber, asks: Option<bool>, now: u32) {
        if std::mem::replace(&mut self.routers_swept, now) != now {
            self.routers.retain(|_, until| *until > now);
            self.greedy.retain(|_, until| *until > now);
            self.asked.retain(|_, (_, until)| *until > now);
        }
        let until = now.saturating_add(ROUTER_SECONDS);
        self.routers.insert((vlan, port), until);
        if let Some(six) = asks {
            // Who joined before the first question says so again when it has been asked.
            let known = self.asked.get(&(vlan, six)).filter(|(_, until)| *until > now);
            let from = known.map_or(now.saturating_add(ANSWER_SECONDS), |(from, _)| *from);
            self.asked.insert((vlan, six), (from, until));
        }
    }

    /// Somebody behind a port wants a group, or does no more.
    pub fn wish(&mut self, vlan: u16, group: IpAddr, port: PortNumber, wants: bool, now: u32) {
        if !group.is_multicast() || is_of_link(group) {
            return;
        }
        let members = self.list.get_mut(&(vlan, group));
        let member = members.and_then(|list| list.iter_mut().find(|member| member.port == port));
        match member {
            Some(member) if wants => member.until = now.saturating_add(MEMBER_SECONDS),
            Some(member) => member.until = member.until.min(now.saturating_add(LEAVE_SECONDS)),
            None if wants => self.add(vlan, group, port, now),
            None => {}
        }
    }

    fn add(&mut self, vlan: u16, group: IpAddr, port: PortNumber, now: u32) {
        if self.count(port) >= GROUPS_PER_PORT && self.swept != Some(now) {
            self.swept = Some(now);
            self.retain(|member| member.until > now);
        }
        if self.count(port) >= GROUPS_PER_PORT {
            // What it wants it must get: with it, what it does not want.
            self.greedy.insert((vlan, port), now.saturating_add(MEMBER_SECONDS));
            return;
        }
        let until = now.saturating_add(MEMBER_SECONDS);
        self.list.entry((vlan, group)).or_default().push(Member { port, until });
        let count = self.counts.entry(port).or_default();
        *count = count.saturating_add(1);
    }

    fn count(&self, port: PortNumber) -> usize {
        self.counts.get(&port).copied().unwrap_or(0)
    }

    fn retain(&mut self, keep: impl Fn(&Member) -> bool) {
        let counts = &mut self.counts;
        self.list.retain(|_, members| {
            members.retain(|member| {
                let stays = keep(member);
                if !stays && let Some(count) = counts.get_mut(&member.port) {
                    *count = count.saturating_sub(1);
                }
                stays
            });
            !members.is_empty()
        });
    }

    /// A port is gone.
    pub fn forget(&mut self, port: PortNumber) {
        self.retain(|member| member.port != port);
        self.counts.remove(&port);
        self.routers.retain(|(_, other), _| *other != port);
        self.greedy.retain(|(_, other), _| *other != port);
        self.asked.retain(|(vlan, _), _| self.routers.keys().any(|(other, _)| other == vlan));
    }

    fn knows(&self, vlan: u16, six: bool, now: u32) -> bool {
        self.asked.get(&(vlan, six)).is_some_and(|(from, until)| (*from..*until).contains(&now))
    }

    /// Ports that get a group's frames; `None`: all. Routers get everything, and what hosts wish is for routers only.
    pub fn receivers(
        &self,
        vlan: u16,
        group: Option<IpAddr>,
        six: bool,
        now: u32,
    ) -> Option<Vec<PortNumber>> {
        if group.is_some_and(is_of_link) || !self.knows(vlan, six, now) {
            return None;
        }
        let mut list: Vec<PortNumber> = of_vlan(&self.routers, vlan, now).collect();
        if group.is_some() {
            list.extend(of_vlan(&self.greedy, vlan, now));
        }
        let members = group.and_then(|group| self.list.get(&(vlan, group))).into_iter().flatten();
        list.extend(members.filter(|member| member.until > now).map(|member| member.port));
        list.sort_unstable();
        list.dedup();
        Some(list)
    }

    /// All wishes that last: VLAN, group, port, seconds left.
    pub fn members(&self, now: u32) -> impl Iterator<Item = (u16, IpAddr, PortNumber, u32)> {
        self.list.iter().flat_map(move |((vlan, group), members)| {
            let lasting = members.iter().filter(move |member| member.until > now);
            lasting.map(move |member| (*vlan, *group, member.port, member.until.saturating_sub(now)))
        })
    }

    /// All routers: VLAN, port, seconds left.
    pub fn routers(&self, now: u32) -> impl Iterator<Item = (u16, PortNumber, u32)> {
        let all = self.routers.iter().filter(move |(_, until)| **until > now);
        all.map(move |((vlan, port), until)| (*vlan, *port, until.saturating_sub(now)))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::switch::{PortSpec, Reason, Switch};
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn frame4(to: [u8; 4], protocol: u8, body: &[u8]) -> Vec<u8> {
        let [_, b, c, d] = to;
        let mut frame = vec![1, 0, 0x5e, b & 0x7f, c, d, 2, 0, 0, 0, 0, 1, 8, 0];
        // With a router alert, as IGMP has.
        frame.extend([0x46, 0, 0, 0, 0, 0, 0, 0, 1, protocol, 0, 0, 10, 0, 0, 1]);
        frame.extend(to);
        frame.extend([0x94, 4, 0, 0]);
        frame.extend(body);
        frame
    }

    fn frame6(to: &str, first: &[u8], body: &[u8]) -> Vec<u8> {
        let to: Ipv6Addr = to.parse().unwrap();
        let mut frame = [&[0x33, 0x33][..], &to.octets()[12..], &[2, 0, 0, 0, 0, 1, 0x86, 0xdd]].concat();
        let next = if first.is_empty() { 17 } else { 0 };
        frame.extend([0x60, 0, 0, 0, 0, 0, next, 1]);
        frame.extend(ip("fe80::1").to_string().parse::<Ipv6Addr>().unwrap().octets());
        frame.extend(to.octets());
        frame.extend(first);
        frame.extend(body);
        frame
    }

    /// A router's, which has an address of its own.
    fn query() -> Vec<u8> {
        let mut frame = frame4([224, 0, 0, 1], IGMP, &v2(0x11, [0; 4]));
        frame[11] = 9;
        frame
    }

    const ALERT: [u8; 8] = [58, 0, 5, 2, 0, 0, 1, 0];
    const GROUP: [u8; 4] = [239, 1, 2, 3];

    fn v2(kind: u8, group: [u8; 4]) -> Vec<u8> {
        [&[kind, 0, 0, 0][..], &group].concat()
    }

    #[test]
    fn messages_are_understood() {
        let group = ip("239.1.2.3");
        assert_eq!(message(&frame4([224, 0, 0, 1], IGMP, &v2(0x11, [0; 4]))), Some(Message::Query));
        assert_eq!(
            message(&frame4(GROUP, IGMP, &v2(0x16, GROUP))),
            Some(Message::Wishes(vec![(group, true)]))
        );
        assert_eq!(
            message(&frame4([224, 0, 0, 2], IGMP, &v2(0x17, GROUP))),
            Some(Message::Wishes(vec![(group, false)]))
        );
        assert_eq!(message(&frame4([224, 0, 0, 13], PIM, &[0x20, 0])), Some(Message::Router));
        assert_eq!(message(&frame4(GROUP, 17, &[0; 8])), None);
        // IGMPv3: join by "not from nobody", leave by "from nobody", one with a source and more data, and one that is cut off.
        let mut body = vec![0x22, 0, 0, 0, 0, 0, 0, 5];
        body.extend([4, 0, 0, 0, 239, 1, 2, 3]);
        body.extend([3, 0, 0, 0, 239, 1, 2, 4]);
        body.extend([1, 1, 0, 1, 239, 1, 2, 5, 9, 9, 9, 9, 7, 7, 7, 7]);
        body.extend([6, 0, 0, 0, 239, 1, 2, 6]);
        body.extend([4, 0, 0, 9, 239, 1, 2]);
        let wishes = vec![(group, true), (ip("239.1.2.4"), false), (ip("239.1.2.5"), true)];
        assert_eq!(message(&frame4([224, 0, 0, 22], IGMP, &body)), Some(Message::Wishes(wishes)));
        let six = "ff15::1:2";
        let address = six.parse::<Ipv6Addr>().unwrap().octets();
        let mut report = vec![143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0];
        report.extend(address);
        let wishes = |wants| Some(Message::Wishes(vec![(ip(six), wants)]));
        assert_eq!(message(&frame6("ff02::16", &ALERT, &report)), wishes(true));
        let done = [&[132, 0, 0, 0, 0, 0, 0, 0][..], &address].concat();
        assert_eq!(message(&frame6("ff02::2", &ALERT, &done)), wishes(false));
        assert_eq!(message(&frame6("ff02::1", &ALERT, &[130; 24])), Some(Message::Query));
        for link in ["224.0.0.251", "ff02::fb", "ff02::1:ff00:1", "ff01::1"] {
            assert!(is_of_link(ip(link)), "{link}");
        }
        assert!(!is_of_link(group) && !is_of_link(ip(six)));
    }

    /// Ports: a router, two hosts, and one that is hostile.
    fn switch() -> Switch {
        let mut switch = Switch::new(1000, 300);
        let router = PortSpec { trusted: true, ..PortSpec::default() };
        switch.add("router", router).unwrap();
        for name in ["a", "b", "hostile"] {
            switch.add(name, PortSpec::default()).unwrap();
        }
        switch
    }

    fn receivers(switch: &Switch, group: &str) -> Option<Vec<PortNumber>> {
        let group = ip(group);
        switch.groups.receivers(1, Some(group), group.is_ipv6(), switch.second)
    }

    #[test]
    fn who_asked_gets_it_while_a_router_asks() {
        let mut switch = switch();
        let at = |switch: &mut Switch, second: u64| switch.turn(second * 1_000_000_000, 0);
        let query = query();
        let (join, leave) =
            (frame4(GROUP, IGMP, &v2(0x16, GROUP)), frame4([224, 0, 0, 2], IGMP, &v2(0x17, GROUP)));
        at(&mut switch, 1);
        switch.inject(1, &join);
        assert_eq!(receivers(&switch, "239.1.2.3"), None, "nobody asks: all get everything");
        // Not everybody may ask.
        switch.inject(3, &query);
        assert_eq!(switch.port(3).unwrap().counters.dropped.get(Reason::Router), 1);
        assert_eq!(receivers(&switch, "239.1.2.3"), None);
        switch.inject(0, &query);
        assert_eq!(receivers(&switch, "239.1.2.3"), None, "who joined long ago may still have to answer");
        at(&mut switch, 11);
        switch.inject(0, &query);
        assert_eq!(receivers(&switch, "239.1.2.3"), Some(vec![0, 1]));
        assert_eq!(receivers(&switch, "239.1.2.4"), Some(vec![0]), "routers get what nobody asked for");
        assert_eq!(receivers(&switch, "224.0.0.251"), None);
        assert_eq!(receivers(&switch, "ff15::1"), None, "of IPv6 nobody asked");
        switch.inject(2, &join);
        assert_eq!(receivers(&switch, "239.1.2.3"), Some(vec![0, 1, 2]));
        // What has nothing to do with it changes nothing of it.
        let mut spec = switch.port(1).unwrap().spec.clone();
        spec.share.weight = Some(2);
        switch.set(1, spec);
        assert_eq!(receivers(&switch, "239.1.2.3"), Some(vec![0, 1, 2]));
        // Who leaves has three seconds, in which somebody else behind his port may speak.
        at(&mut switch, 20);
        switch.inject(1, &leave);
        switch.inject(2, &leave);
        at(&mut switch, 21);
        switch.inject(2, &join);
        at(&mut switch, 23);
        assert_eq!(receivers(&switch, "239.1.2.3"), Some(vec![0, 2]));
        switch.remove(2);
        assert_eq!(receivers(&switch, "239.1.2.3"), Some(vec![0]));
        at(&mut switch, 266);
        assert_eq!(receivers(&switch, "239.1.2.3"), None, "the router has gone silent");
        assert_eq!(switch.groups.members(switch.second).count(), 0);
    }

    #[test]
    fn frames_for_many_count_as_the_floods_that_they_are() {
        let mut switch = Switch::new(1000, 300);
        switch.add("router", PortSpec { trusted: true, ..PortSpec::default() }).unwrap();
        let sender = switch.add("sender", PortSpec { storm: Some(100), ..PortSpec::default() }).unwrap();
        let join = frame4(GROUP, IGMP, &v2(0x16, GROUP));
        let other = [239, 1, 2, 4];
        for number in 0..128 {
            let port = switch.add(&format!("p{number}"), PortSpec::default()).unwrap();
            switch.inject(port, &join);
            if number == 0 {
                switch.inject(port, &frame4(other, IGMP, &v2(0x16, other)));
            }
        }
        switch.inject(0, &query());
        switch.turn(11_000_000_000, 0);
        let mut dropped = |to: [u8; 4], count: u32| {
            let before = switch.port(sender).unwrap().counters.dropped.get(Reason::Storm);
            (0..count).for_each(|_| switch.inject(sender, &frame4(to, 17, &[0; 40])));
            switch.port(sender).unwrap().counters.dropped.get(Reason::Storm) - before
        };
        // Two receivers, one of which is the router: a thirty-second part each. All: two each.
        assert_eq!(dropped(other, 300), 0);
        assert!(dropped(GROUP, 300) > 280);
    }

    #[test]
    fn nobody_wants_too_much() {
        let mut groups = Groups::default();
        let wish = |groups: &mut Groups, number: u32, now| {
            groups.wish(1, IpAddr::V4((0xef00_0000 + number).into()), 7, true, now);
        };
        (0..1000).for_each(|number| wish(&mut groups, number, 0));
        assert_eq!(groups.members(0).count(), GROUPS_PER_PORT);
        // Beyond them it gets all, for as long as it asks.
        groups.router(1, 2, Some(false), 0);
        let receivers = |groups: &Groups, now| groups.receivers(1, Some(ip("239.9.9.9")), false, now);
        assert_eq!(receivers(&groups, ANSWER_SECONDS), Some(vec![2, 7]));
        assert_eq!(
            groups.receivers(1, None, false, ANSWER_SECONDS),
            Some(vec![2]),
            "reports are for routers"
        );
        groups.router(1, 2, Some(false), 200);
        assert_eq!(receivers(&groups, MEMBER_SECONDS), Some(vec![2]));
        // Those that are over do not count.
        (2000..2003).for_each(|number| wish(&mut groups, number, MEMBER_SECONDS));
        assert_eq!((groups.members(MEMBER_SECONDS).count(), groups.count(7)), (3, 3));
        groups.wish(1, ip("10.0.0.1"), 7, true, MEMBER_SECONDS);
        groups.wish(1, ip("224.0.0.5"), 7, true, MEMBER_SECONDS);
        assert_eq!(groups.count(7), 3, "what is no group, or the link's");
        groups.forget(7);
        assert!(groups.list.is_empty());
        // Routers that are silent are forgotten when another one speaks.
        (0..500).for_each(|vlan| groups.router(vlan, 3, Some(true), 1000));
        assert_eq!(groups.routers.len(), 500);
        groups.router(1, 4, None, 1000 + ROUTER_SECONDS);
        assert_eq!((groups.routers.len(), groups.asked.len()), (1, 0));
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            six: bool,
            kind in prop::sample::select(vec![0x11u8, 0x22, 130, 131, 143]),
        ) {
            let body = [&[kind][..], &bytes].concat();
            let frame = if six { frame6("ff02::16", &ALERT, &body) } else { frame4([224, 0, 0, 22], IGMP, &body) };
            let _ = message(&frame);
            let _ = message(&bytes);
            let _ = group(&bytes);
            let mut switch = switch();
            switch.inject(0, &frame);
            switch.inject(1, &frame);
        }
    }
}
