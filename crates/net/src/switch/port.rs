//! A port: what it is allowed, what is connected to it, and what has gone through it.

use super::emulation::{Emulation, Emulator};
use super::limit::{Limit, Limiter};
use super::meter::Meter;
use super::queue::{FairQueue, Room, Waiting};
use super::reason::{Drops, Reason};
use super::share::{ShareSpec, Turn};
use super::table::{Key, PortNumber};
use super::uplink::Uplink;
use super::vlan::Vlans;
use crate::vhost::Backend;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::net::IpAddr;

/// Addresses that a port may have unless said otherwise.
const MACS_DEFAULT: usize = 16;
/// Floods that a port may cause each second unless said otherwise.
const STORM_DEFAULT: u64 = 20_000;
/// What may wait for a port.
const ROOM: Room = Room { bytes: 4 << 20, frames: 4096 };

/// An Ethernet address as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        match bytes.as_deref().and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(Self(mac)),
            Some(_) => Err(format!("{text}: a card's own address has an even first byte and is not zero")),
            None => Err(format!("{text:?}: six bytes in hexadecimal, such as 02:00:00:00:00:01")),
        }
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a port is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PortSpec {
    /// Its VLANs.
    pub vlans: Vlans,
    /// Priority of frames that come without one.
    pub priority: u8,
    /// The only addresses that it may have; none: any, up to `macs_max`.
    pub macs: Vec<Mac>,
    /// How many addresses may be learnt behind it.
    pub macs_max: Option<usize>,
    /// IP addresses that are its own; none: any that nobody else has.
    pub addresses: Vec<IpAddr>,
    /// It may be a router, a DHCP server, and have any address.
    pub trusted: bool,
    /// It reaches no other private port.
    pub private: bool,
    /// A bridge's message turns the port off; else such messages are dropped.
    pub bpdu_guard: bool,
    /// Frames each second that it may have flooded.
    pub storm: Option<u64>,
    /// Limit of what it sends.
    pub up: Option<Limit>,
    /// Limit of what it gets.
    pub down: Option<Limit>,
    /// The group whose limits it shares, beside those of the switch,
    pub group: Option<String>,
    /// and what it has of them.
    pub share: ShareSpec,
    /// How bad its line is.
    pub emulation: Emulation,
    /// It carries nothing.
    pub disabled: bool,
}

impl PortSpec {
    /// How many addresses may be learnt.
    pub fn macs_max(&self) -> usize {
        let default = if self.trusted { usize::MAX } else { MACS_DEFAULT };
        self.macs_max.unwrap_or(default)
    }
}

/// A limit at work, with what waits for it.
#[derive(Debug)]
pub struct Shaper {
    limit: Limiter,
    /// It shares limits with others; and whether those cut large segments.
    shared: bool,
    shared_cuts: bool,
    /// How far it was served beside them.
    pub turn: Turn,
    /// What waits.
    pub queue: FairQueue,
    /// Taken from the queue, and not yet gone.
    pub held: Option<Waiting>,
    /// Losses of the queue that were counted: late ones, and those without room.
    counted: (u64, u64),
}

impl Shaper {
    fn new() -> Self {
        Self {
            limit: Limiter::default(),
            shared: false,
            shared_cuts: false,
            turn: Turn::default(),
            queue: FairQueue::new(ROOM),
            held: None,
            counted: (0, 0),
        }
    }

    /// Changes the limit; what waits goes on waiting.
    fn set(&mut self, limit: Option<Limit>, weight: Option<u32>, min: Option<u64>, now: u64) {
        self.limit.set(limit, now);
        self.turn.set(weight, min, now);
    }

    /// Says whether there are limits that it shares, and whether those cut large segments.
    pub fn share(&mut self, shared: bool, cuts: bool) {
        (self.shared, self.shared_cuts) = (shared, cuts);
    }

    /// Whether it shares limits.
    pub fn shared(&self) -> bool {
        self.shared
    }

    /// Whether there is a limit.
    #[inline]
    pub fn limited(&self) -> bool {
        self.shared || self.limit.limited()
    }

    /// Whether large segments are to be cut.
    pub fn cuts(&self) -> bool {
        self.shared_cuts || self.limit.cuts()
    }

    /// Counts what the queue has lost since it was asked last.
    pub fn count_losses(&mut self, drops: &mut Drops) {
        let (late, full) = std::mem::replace(&mut self.counted, (self.queue.late, self.queue.full));
        (late..self.queue.late).for_each(|_| drops.count(Reason::Late));
        (full..self.queue.full).for_each(|_| drops.count(Reason::Full));
    }

    /// What waits is for nobody any more.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.held = None;
    }

    /// Nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.held.is_none() && self.queue.is_empty()
    }

    /// When its own limit lets something through: a moment, maybe past.
    pub fn ready_at(&self) -> u64 {
        self.limit.ready_at()
    }

    /// Something was let through.
    pub fn charge(&mut self, bytes: usize, frames: u64, now: u64) {
        self.limit.charge(bytes, frames, now);
    }
}

/// What is connected.
#[derive(Debug)]
pub enum Link {
    /// Nobody.
    Nothing,
    /// A guest.
    Guest(Box<Backend>),
    /// A way out.
    Uplink(Uplink),
}

/// What has gone through.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// From the port.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// To the port.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames of its own that went to all.
    pub flooded: u64,
    /// Of what came from it.
    pub dropped: Drops,
    /// Of what was for it.
    pub dropped_out: Drops,
}

/// An address that the table knew, and when: believed within the same second and version of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The address.
    pub key: Key,
    /// The second.
    pub second: u32,
    /// The table's version.
    pub version: u64,
}

/// A port.
#[derive(Debug)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: PortNumber,
    /// What it is allowed.
    pub spec: PortSpec,
    /// What is connected.
    pub link: Link,
    /// What has gone through.
    pub counters: Counters,
    /// Why it was turned off, beside its spec.
    pub blocked: Option<&'static str>,
    /// Its group's place, and which group that is.
    pub group: Option<(usize, u64)>,
    /// The pair of queues that is looked at first.
    pub next_queue: usize,
    /// Addresses learnt behind it.
    pub learnt: usize,
    /// The last address that was found to be behind it,
    pub known: Option<Known>,
    /// and the last that it has sent to, with the port that is on.
    pub last: Option<(Known, PortNumber)>,
    /// Against floods.
    pub storm: Option<Meter>,
    /// Copies of frames for groups that were not counted as a flood yet.
    pub copies: u64,
    /// What it sends.
    pub up: Shaper,
    /// What it gets.
    pub down: Shaper,
    /// Its line.
    pub emulator: Option<Emulator>,
    /// The turn in which it is looked at again: what its frames were cut into is as much work as others' frames.
    pub rests_until: u64,
    /// Since when nothing came, in nanoseconds.
    pub idle_since: u64,
    /// It is looked at in turn, not only when it says so.
    pub active: bool,
    /// Something waits for it.
    pub pending: bool,
    /// Somebody captures what goes through.
    pub watched: bool,
}

impl Port {
    /// A port to which nothing is connected.
    pub fn new(name: String, number: PortNumber, spec: PortSpec) -> Self {
        let mut port = Self {
            name,
            number,
            spec: PortSpec::default(),
            link: Link::Nothing,
            counters: Counters::default(),
            blocked: None,
            group: None,
            next_queue: 0,
            learnt: 0,
            known: None,
            last: None,
            storm: None,
            copies: 0,
            up: Shaper::new(),
            down: Shaper::new(),
            emulator: None,
            rests_until: 0,
            idle_since: 0,
            active: false,
            pending: false,
            watched: false,
        };
        port.set(spec, 0);
        port
    }

    /// Changes what it is allowed, while it works.
    pub fn set(&mut self, spec: PortSpec, now: u64) {
        let default = if spec.trusted { None } else { Some(STORM_DEFAULT) };
        let storm = spec.storm.or(default);
        self.storm = storm.map(|rate| match self.storm {
            Some(meter) => meter.changed(rate, (rate / 10).max(1), now),
            None => Meter::new(rate, (rate / 10).max(1)),
        });
        let ShareSpec { weight, min_up, min_down } = spec.share;
        self.up.set(spec.up, weight, min_up, now);
        self.down.set(spec.down, weight, min_down, now);
        if spec.emulation != self.spec.emulation {
            self.emulator = (spec.emulation != Emulation::default()).then(|| Emulator::new(spec.emulation));
        }
        self.blocked = None;
        self.spec = spec;
    }

    /// Whether frames go through.
    #[inline]
    pub fn open(&self) -> bool {
        self.blocked.is_none() && !self.spec.disabled
    }

    /// Whether what is for it must wait behind something.
    #[inline]
    pub fn buffers(&self) -> bool {
        !self.down.is_empty() || self.down.limited() || self.emulator.is_some()
    }

    /// For people.
    pub fn inspect(&self) -> Value {
        let Counters { received, received_bytes, sent, sent_bytes, flooded, dropped, dropped_out } =
            &self.counters;
        let (link, broken): (_, Vec<String>) = match &self.link {
            Link::Nothing => ("nothing", Vec::new()),
            Link::Uplink(uplink) => (uplink.name(), uplink.complaints()),
            Link::Guest(backend) => {
                let why = backend.queues().iter().filter_map(|queue| queue.broken());
                let running = backend.queues().iter().any(|queue| queue.runs());
                (if running { "guest" } else { "connected" }, why.map(|why| why.to_string()).collect())
            }
        };
        let waiting = |shaper: &Shaper| {
            json!({ "frames": shaper.queue.len(), "bytes": shaper.queue.bytes(),
            "late": shaper.queue.late, "full": shaper.queue.full })
        };
        let state = match self.blocked {
            Some(why) => why,
            None if self.spec.disabled => "disabled",
            None => "open",
        };
        json!({ "name": self.name, "number": self.number, "state": state, "link": link, "broken": broken,
            "spec": self.spec, "vlans": self.spec.vlans.to_string(), "learnt": self.learnt,
            "received": received, "received_bytes": received_bytes, "sent": sent, "sent_bytes": sent_bytes,
            "flooded": flooded, "dropped": dropped.inspect(), "dropped_out": dropped_out.inspect(),
            "waiting_up": waiting(&self.up), "waiting_down": waiting(&self.down) })
    }
}
