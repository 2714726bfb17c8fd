//! Limits that ports share, and who goes first where they do not suffice for all.
//!
//! ```text
//!  switch --- group --- port        each with a most, which is never exceeded; those below the switch also
//!        \------------- port        with a least, which is served first, and a weight for what is left
//! ```
//!
//! Start-time fair queueing (Goyal, Vin and Cheng, 1996): each has a virtual time, which moves on by its bytes divided by its weight as it
//! is served; who is furthest behind is next. Who had nothing to send goes on at the time of the others, so that nobody saves up.

use super::forward::Switch;
use super::limit::{Limit, Limiter, meter};
use super::meter::Meter;
use super::packet::BURST;
use super::port::{Port, Shaper};
use super::table::PortNumber;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The most groups of a switch.
pub const GROUPS_MAX: usize = 256;
/// The largest weight.
pub const WEIGHT_MAX: u32 = 1000;
/// Virtual time of a byte at weight 1.
const BYTE: u128 = 1 << 16;
/// The same of a byte that was promised, at a promise of one bit each second.
const PROMISED_BYTE: u128 = 1 << 60;

/// One of two directions, as ports see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What ports send.
    Up,
    /// What they get.
    Down,
}

/// What a port, or a group, has of what it shares with others.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShareSpec {
    /// Its part of what is left over, beside others' weights; 1 if it does not say.
    pub weight: Option<u32>,
    /// Bits each second that go before all others' that have no such promise: of what it sends,
    pub min_up: Option<u64>,
    /// and of what it gets.
    pub min_down: Option<u64>,
}

/// What a group of ports is allowed together.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupSpec {
    /// Of what they send.
    pub up: Option<Limit>,
    /// Of what they get.
    pub down: Option<Limit>,
    /// Beside other groups, and ports of none, within the limits of the switch.
    pub share: ShareSpec,
}

/// Who has been served how far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Turn {
    min: Option<Meter>,
    /// Bits each second of it.
    min_bits: u64,
    /// 0: as 1.
    weight: u32,
    time: Times,
}

/// Virtual times: of what was promised, and of what is left. Promises that are more than there is are kept in part, by their sizes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Times {
    promised: u128,
    left: u128,
}

impl Turn {
    /// Changes what it has; how far it was served stays.
    pub fn set(&mut self, weight: Option<u32>, min: Option<u64>, now: u64) {
        self.weight = weight.unwrap_or(1);
        self.min_bits = min.unwrap_or(0);
        self.min = min.map(|bits| meter(self.min, bits, None, now));
    }

    /// Smaller is sooner: who has less than was promised, then who is furthest behind.
    fn rank(&self, floor: Times, now: u64) -> (bool, u128) {
        let promised = self.min.as_ref().is_some_and(|min| min.ready(now));
        let time =
            if promised { self.time.promised.max(floor.promised) } else { self.time.left.max(floor.left) };
        (!promised, time)
    }

    /// It was served; answers the others' virtual time then. What was promised is not weighed: weights are for what is left.
    fn charge(&mut self, floor: Times, bytes: usize, now: u64) -> Times {
        if let Some(min) = &mut self.min
            && min.pass(bytes as u64, now)
        {
            let begin = self.time.promised.max(floor.promised);
            let cost = (bytes as u128).saturating_mul(PROMISED_BYTE).checked_div(self.min_bits.max(1).into());
            self.time.promised = begin.saturating_add(cost.unwrap_or(0));
            return Times { promised: begin, ..floor };
        }
        let begin = self.time.left.max(floor.left);
        let cost = (bytes as u128).saturating_mul(BYTE).checked_div(self.weight.max(1).into());
        self.time.left = begin.saturating_add(cost.unwrap_or(0));
        Times { left: begin, ..floor }
    }
}

/// One direction of a group.
#[derive(Debug, Default)]
struct Lane {
    limit: Limiter,
    turn: Turn,
    /// The virtual times of whom it served last.
    floor: Times,
}

/// A group, or all of a switch.
#[derive(Debug, Default)]
pub(super) struct Group {
    name: String,
    /// No other has it, ever.
    id: u64,
    spec: GroupSpec,
    up: Lane,
    down: Lane,
}

impl Group {
    fn lane(&self, way: Way) -> &Lane {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    fn lane_mut(&mut self, way: Way) -> &mut Lane {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }

    fn set(&mut self, spec: GroupSpec, now: u64) {
        let GroupSpec { up, down, share: ShareSpec { weight, min_up, min_down } } = spec;
        self.up.limit.set(up, now);
        self.down.limit.set(down, now);
        self.up.turn.set(weight, min_up, now);
        self.down.turn.set(weight, min_down, now);
        self.spec = spec;
    }
}

/// All shared limits of a switch.
#[derive(Debug, Default)]
pub(super) struct Shares {
    all: Group,
    groups: Vec<Group>,
    /// Groups that were ever made.
    made: u64,
}

impl Port {
    fn shaper(&self, way: Way) -> &Shaper {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    fn shaper_mut(&mut self, way: Way) -> &mut Shaper {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

impl Shares {
    fn group_of(&self, port: &Port) -> Option<(usize, u64)> {
        let name = port.spec.group.as_deref()?;
        let mut groups = self.groups.iter().enumerate();
        groups.find(|(_, group)| group.name == name).map(|(place, group)| (place, group.id))
    }

    fn lane(&self, port: &Port, way: Way) -> Option<&Lane> {
        Some(self.groups.get(port.group?.0)?.lane(way))
    }

    /// When all that a port shares lets something through.
    fn ready_at(&self, port: &Port, way: Way) -> u64 {
        let group = self.lane(port, way).map_or(0, |lane| lane.limit.ready_at());
        group.max(self.all.lane(way).limit.ready_at())
    }

    /// Something of a port's was let through.
    pub fn charge(&mut self, port: &mut Port, way: Way, bytes: usize, frames: u64, now: u64) {
        let all = self.all.lane_mut(way);
        all.limit.charge(bytes, frames, now);
        let group = port.group;
        let turn = &mut port.shaper_mut(way).turn;
        match group.and_then(|(group, _)| self.groups.get_mut(group)) {
            None => all.floor = turn.charge(all.floor, bytes, now),
            Some(group) => {
                let lane = group.lane_mut(way);
                lane.limit.charge(bytes, frames, now);
                lane.floor = turn.charge(lane.floor, bytes, now);
                all.floor = lane.turn.charge(all.floor, bytes, now);
            }
        }
    }

    /// In which order ports are served.
    fn rank(&self, port: &Port, way: Way, now: u64) -> impl Ord + use<> {
        let (all, turn) = (self.all.lane(way), &port.shaper(way).turn);
        match self.lane(port, way) {
            None => (turn.rank(all.floor, now), usize::MAX, (false, 0)),
            Some(lane) => {
                let outer = lane.turn.rank(all.floor, now);
                (outer, port.group.map_or(usize::MAX, |group| group.0), turn.rank(lane.floor, now))
            }
        }
    }
}

impl Switch {
    /// Says what a group is allowed, or (without a name) all of the switch. A group that is not there is made.
    pub fn set_group(&mut self, name: Option<&str>, spec: GroupSpec) -> Result<(), String> {
        let now = self.now;
        let Shares { all, groups, made } = &mut self.shares;
        match name {
            None if spec.share != ShareSpec::default() => {
                return Err(
                    "a switch has nobody to share with: weight and min are for groups and ports".to_owned()
                );
            }
            None => all.set(spec, now),
            Some(name) => match groups.iter().position(|group| group.name == name) {
                Some(place) => {
                    if let Some(group) = groups.get_mut(place) {
                        group.set(spec, now);
                    }
                }
                None if groups.len() >= GROUPS_MAX => {
                    return Err(format!("all {GROUPS_MAX} groups are taken"));
                }
                None => {
                    *made = made.saturating_add(1);
                    let mut group = Group { name: name.to_owned(), id: *made, ..Group::default() };
                    group.set(spec, now);
                    groups.push(group);
                }
            },
        }
        self.share_all();
        Ok(())
    }

    /// Removes a group; its ports are in none until it is there again.
    pub fn remove_group(&mut self, name: &str) -> Result<(), String> {
        let groups = &mut self.shares.groups;
        let place = groups.iter().position(|group| group.name == name);
        groups.remove(place.ok_or_else(|| format!("there is no group {name}"))?);
        self.share_all();
        Ok(())
    }

    /// What a group, or the switch, is allowed.
    pub fn group(&self, name: Option<&str>) -> Option<&GroupSpec> {
        let Shares { all, groups, .. } = &self.shares;
        match name {
            None => Some(&all.spec),
            Some(name) => groups.iter().find(|group| group.name == name).map(|group| &group.spec),
        }
    }

    /// Finds anew what each port shares.
    pub(super) fn share_all(&mut self) {
        let shares = &self.shares;
        let mut waiting = Vec::new();
        for port in self.ports.iter_mut().flatten() {
            let group = shares.group_of(port);
            let before = std::mem::replace(&mut port.group, group);
            let moved = before.map(|group| group.1) != port.group.map(|group| group.1);
            for way in [Way::Up, Way::Down] {
                if moved {
                    // The virtual time of where it was is not that of where it is.
                    port.shaper_mut(way).turn.time = Times::default();
                }
                let all = shares.all.lane(way);
                let lane = shares.lane(port, way);
                let shared = all.limit.limited() || lane.is_some_and(|lane| lane.limit.limited());
                let cut = all.limit.cuts() || lane.is_some_and(|lane| lane.limit.cuts());
                port.shaper_mut(way).share(shared, cut);
            }
            waiting.push(port.number);
        }
        // What waited for a limit that is gone waits no longer.
        waiting.into_iter().for_each(|number| self.pend(number));
    }

    /// Serves the ports that share a limit, in order, for as long as it lets them.
    pub(super) fn serve_shared(&mut self, way: Way) {
        let waits = |number: &PortNumber| {
            let shaper = self.port(*number).map(|port| port.shaper(way));
            shaper.is_some_and(|shaper| shaper.shared() && !shaper.is_empty())
        };
        let mut waiting: Vec<PortNumber> = self.pending.iter().copied().filter(waits).collect();
        for _ in 0..waiting.len().saturating_mul(BURST) {
            let now = self.now;
            let ready = |number: &&PortNumber| {
                self.port(**number).is_some_and(|port| {
                    let own = port.shaper(way).ready_at();
                    own.max(self.shares.ready_at(port, way)) <= now
                })
            };
            let rank =
                |number: &&PortNumber| self.port(**number).map(|port| self.shares.rank(port, way, now));
            let Some(next) = waiting.iter().filter(ready).min_by_key(rank).copied() else { return };
            let more = match way {
                Way::Up => self.release(next, 1),
                Way::Down => self.drain(next, 1),
            };
            if !more {
                waiting.retain(|number| *number != next);
            }
        }
    }

    /// When something of a port's may go on; see [`super::wait::next_at`].
    pub(super) fn shared_at(&self, port: &Port, way: Way) -> u64 {
        if port.shaper(way).shared() { self.shares.ready_at(port, way) } else { 0 }
    }

    /// For people.
    pub(super) fn inspect_groups(&self) -> (Value, Value) {
        let Shares { all, groups, .. } = &self.shares;
        let about = |group: &Group| {
            let members = self.ports().filter(|port| port.spec.group.as_deref() == Some(&group.name));
            let names: Vec<&str> = members.map(|port| port.name.as_str()).collect();
            json!({ "name": group.name, "spec": group.spec, "ports": names })
        };
        (json!(all.spec), Value::Array(groups.iter().map(about).collect()))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::switch::PortSpec;
    use proptest::prelude::*;

    const MILLISECOND: u64 = 1_000_000;
    const FRAME: usize = 1000;

    /// Kilobytes each second that ports get through when all send as fast as they can, for two seconds in virtual time.
    fn served(groups: &[(&str, &str)], ports: &[&str]) -> Vec<u64> {
        let mut switch = Switch::default();
        for (name, options) in groups {
            let mut spec = GroupSpec::default();
            spec.apply_all(options).unwrap();
            switch.set_group(Some(*name).filter(|name| !name.is_empty()), spec).unwrap();
        }
        let numbers: Vec<PortNumber> = ports
            .iter()
            .map(|options| {
                let mut spec = PortSpec { trusted: true, ..PortSpec::default() };
                spec.apply_all(options).unwrap();
                switch.add("p", spec).unwrap()
            })
            .collect();
        for step in 0..2000 {
            for number in &numbers {
                let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, *number as u8, 0x88, 0xb5]].concat();
                frame.resize(FRAME, 0);
                (0..4).for_each(|_| switch.inject(*number, &frame));
            }
            switch.turn(step * MILLISECOND, 0);
        }
        // Each frame that gets through goes to all.
        let frames = numbers.iter().map(|number| switch.port(*number).unwrap().counters.flooded);
        frames.map(|frames| frames * FRAME as u64 / 2000).collect()
    }

    fn near(got: &[u64], expected: &[u64]) -> bool {
        got.iter().zip(expected).all(|(got, expected)| got.abs_diff(*expected) * 20 <= *expected.max(&40))
    }

    #[test]
    fn what_is_left_is_shared_by_weight() {
        let got = served(&[("g", "up=8M")], &["group=g", "group=g,weight=3", ""]);
        assert!(near(&got, &[250, 750, 4000]), "{got:?}: 1 MB/s for two, and no limit for the third");
        let got = served(&[("", "up=8M"), ("g", "weight=1")], &["group=g", "group=g", "weight=2"]);
        assert!(near(&got, &[167, 167, 667]), "{got:?}: groups share what the switch has");
    }

    #[test]
    fn a_promise_goes_before_weights_and_no_limit_is_exceeded() {
        let got = served(&[("g", "up=8M")], &["group=g,min-up=4M", "group=g,weight=1000"]);
        assert!(near(&got, &[500, 500]), "{got:?}");
        let got = served(&[("", "up=8M"), ("g", "up=2M,weight=9")], &["group=g", "group=g,up=400k", ""]);
        assert!(near(&got, &[200, 50, 750]), "{got:?}: who may have no more leaves the rest to others");
        let got = served(&[("", "up=8M"), ("g", "min-up=6M")], &["group=g", "weight=1000", "weight=1000"]);
        assert!(near(&got, &[750, 125, 125]), "{got:?}");
        // More is promised than there is: nobody is left out, and who was promised more gets more.
        let got = served(&[("g", "up=8M")], &["group=g,min-up=8M", "group=g,min-up=8M"]);
        assert!(near(&got, &[500, 500]), "{got:?}");
        let got =
            served(&[("g", "up=8M")], &["group=g,min-up=6M", "group=g,min-up=18M", "group=g,weight=1000"]);
        assert!(near(&got, &[250, 750, 0]), "{got:?}");
    }

    #[test]
    fn groups_come_and_go_while_they_work() {
        let mut switch = Switch::default();
        let spec = |text: &str| {
            let mut spec = GroupSpec::default();
            spec.apply_all(text).unwrap();
            spec
        };
        let member = PortSpec { group: Some("g".to_owned()), ..PortSpec::default() };
        let port = switch.add("p", member).unwrap();
        let limited = |switch: &Switch| {
            (switch.port(port).unwrap().up.limited(), switch.port(port).unwrap().down.limited())
        };
        assert_eq!(limited(&switch), (false, false), "there is no such group yet");
        switch.set_group(Some("g"), spec("up=1M")).unwrap();
        assert_eq!(limited(&switch), (true, false));
        switch.set_group(None, spec("down=1G")).unwrap();
        assert_eq!(limited(&switch), (true, true));
        assert!(switch.set_group(None, spec("weight=2")).is_err());
        switch.remove_group("g").unwrap();
        assert_eq!(limited(&switch), (false, true));
        assert!(switch.remove_group("g").is_err());
        for number in 0..GROUPS_MAX {
            switch.set_group(Some(&number.to_string()), GroupSpec::default()).unwrap();
        }
        assert!(switch.set_group(Some("more"), GroupSpec::default()).is_err());
    }

    #[test]
    fn who_comes_from_elsewhere_brings_no_time_along() {
        let mut switch = Switch::default();
        let port = switch.add("p", PortSpec::default()).unwrap();
        switch.set_group(Some("g"), GroupSpec::default()).unwrap();
        let late = Times { promised: 5, left: 1 << 80 };
        switch.port_mut(port).unwrap().down.turn.time = late;
        switch.share_all();
        assert_eq!(switch.port(port).unwrap().down.turn.time, late);
        let member = PortSpec { group: Some("g".to_owned()), ..PortSpec::default() };
        switch.set(port, member);
        assert_eq!(switch.port(port).unwrap().down.turn.time, Times::default());
        // The same name, and another group.
        switch.port_mut(port).unwrap().down.turn.time = late;
        switch.remove_group("g").unwrap();
        switch.set_group(Some("g"), GroupSpec::default()).unwrap();
        assert_eq!(switch.port(port).unwrap().down.turn.time, Times::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn shares_are_as_weights(weights in prop::collection::vec(1u64..10, 2..5)) {
            let options: Vec<String> = weights.iter().map(|weight| format!("group=g,weight={weight}")).collect();
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            let got = served(&[("g", "up=8M")], &options);
            let sum: u64 = weights.iter().sum();
            for (got, weight) in got.iter().zip(&weights) {
                let expected = 1000 * weight / sum;
                prop_assert!(got.abs_diff(expected) <= 8 + expected / 20, "{got} of {expected}");
            }
        }
    }
}
