//! A port: what it is allowed, what is connected to it, and what has gone through it.

use super::emulation::{Emulation, Emulator};
use super::meter::Meter;
use super::queue::{FairQueue, Room, Waiting};
use super::reason::{Drops, Reason};
use super::table::PortNumber;
use super::vlan::Vlans;
use crate::tap::Tap;
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
/// What a limit lets through at once, if it does not say: this long at its rate, and at least one large segment.
const BURST_MICROSECONDS: u64 = 1000;
const BURST_BYTES_MIN: u64 = 3028;
/// Below this rate large segments are cut, so that no other frame waits long for one.
const CUT_BELOW_BITS: u64 = 1_000_000_000;

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

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Bits each second.
    pub bits_per_second: u64,
    /// Bytes at once.
    #[serde(default)]
    pub burst_bytes: Option<u64>,
    /// Frames each second; large segments count as what they are cut into.
    #[serde(default)]
    pub frames_per_second: Option<u64>,
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
    bytes: Option<Meter>,
    frames: Option<Meter>,
    cut: bool,
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
            bytes: None,
            frames: None,
            cut: false,
            queue: FairQueue::new(ROOM),
            held: None,
            counted: (0, 0),
        }
    }

    /// Changes the limit; what waits goes on waiting.
    fn set(&mut self, limit: Option<Limit>, now: u64) {
        let meter = |old: Option<Meter>, rate: u64, burst: u64| {
            Some(old.map_or_else(|| Meter::new(rate, burst), |meter| meter.changed(rate, burst, now)))
        };
        self.cut = limit.is_some_and(|limit| limit.bits_per_second < CUT_BELOW_BITS);
        self.bytes = limit.and_then(|limit| {
            let rate = (limit.bits_per_second / 8).max(1);
            let short = (rate / 1_000_000).saturating_mul(BURST_MICROSECONDS).max(BURST_BYTES_MIN);
            meter(self.bytes, rate, limit.burst_bytes.unwrap_or(short))
        });
        self.frames = limit
            .and_then(|limit| limit.frames_per_second)
            .and_then(|rate| meter(self.frames, rate, (rate / 1000).max(1)));
    }

    /// Whether there is a limit.
    #[inline]
    pub fn limited(&self) -> bool {
        self.bytes.is_some() || self.frames.is_some()
    }

    /// Whether large segments are to be cut.
    pub fn cuts(&self) -> bool {
        self.cut
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

    /// When the limit lets something through: a moment, maybe past.
    pub fn ready_at(&self) -> u64 {
        let at = |meter: &Option<Meter>| meter.as_ref().map_or(0, Meter::ready_at);
        at(&self.bytes).max(at(&self.frames))
    }

    /// Something was let through.
    pub fn charge(&mut self, bytes: usize, frames: u64, now: u64) {
        if let Some(meter) = &mut self.bytes {
            meter.charge(bytes as u64, now);
        }
        if let Some(meter) = &mut self.frames {
            meter.charge(frames, now);
        }
    }
}

/// What is connected.
#[derive(Debug)]
pub enum Link {
    /// Nobody.
    Nothing,
    /// A guest.
    Guest(Box<Backend>),
    /// An interface of the host's.
    Tap(Tap),
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
    /// Addresses learnt behind it.
    pub learnt: usize,
    /// Against floods.
    pub storm: Option<Meter>,
    /// What it sends.
    pub up: Shaper,
    /// What it gets.
    pub down: Shaper,
    /// Its line.
    pub emulator: Option<Emulator>,
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
            learnt: 0,
            storm: None,
            up: Shaper::new(),
            down: Shaper::new(),
            emulator: None,
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
        self.up.set(spec.up, now);
        self.down.set(spec.down, now);
        self.emulator = (spec.emulation != Emulation::default()).then(|| Emulator::new(spec.emulation));
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
            Link::Tap(_) => ("tap", Vec::new()),
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
