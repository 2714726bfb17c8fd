//! The forwarding core: from a port's frames to other ports' buffers.
//!
//! ```text
//! ring --burst--> [admit: port open? whole? VLAN, address, guards, storm] --> [up limit] --> [find: table, or flood]
//!                                                                                                 |
//!                 ring <-- one copy <-- [down limit, fair queue, bad line: only if there is one, or no buffer]
//! ```
//!
//! Single-threaded: no locks. A port whose frames are worked on is taken out of the list, so that it cannot be its own receiver.

use super::capture::{Capture, Direction};
use super::emulation::Emulator;
use super::fill::Filler;
use super::guard::{self, Claims};
use super::packet::{Burst, Origin, Packet};
use super::port::{Known, Link, Port, PortSpec};
use super::reason::Reason;
use super::share::Shares;
use super::snoop::Groups;
use super::table::{self, Key, Learnt, PortNumber, Speaker, Table};
use super::vlan::Vlans;
use super::wait;
use crate::Batch;
use crate::vhost::RingError;
use std::sync::Arc;

/// The most ports.
pub const PORTS_MAX: usize = 1024;
/// Queues of one port that a turn takes frames from: all others wait meanwhile.
pub(super) const QUEUES_PER_TURN: usize = 4;
/// Frames that a tap brings at a time.
const TAP_FRAMES: usize = super::packet::BURST;

/// Addresses that bridges keep to themselves (802.1Q, table 8-1): 01-80-C2-00-00-0x.
const RESERVED: [u8; 5] = [0x01, 0x80, 0xc2, 0x00, 0x00];

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    To(PortNumber),
    Flood,
}

/// What is known of frames of a burst that begin with the same addresses and kind, and have no tag: most are like the one before them.
struct Like {
    header: [u8; 14],
    vlan: u16,
    priority: u8,
    receiver: PortNumber,
}

/// What works on bursts, used again and again.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) burst: Burst,
    /// For each port, which frames of the burst are for it.
    pub(super) out: Vec<Vec<u16>>,
    /// The ports among them that have any.
    pub(super) touched: Vec<PortNumber>,
    pub(super) filler: Filler,
    pub(super) batch: Batch,
    pub(super) lost: Vec<PortNumber>,
    pub(super) bytes: Vec<u8>,
    pub(super) scratch: Vec<u8>,
    /// What frames were cut into on the way, or are on the host's.
    pub(super) cut: usize,
}

/// A switch.
#[derive(Debug)]
pub struct Switch {
    pub(super) ports: Vec<Option<Box<Port>>>,
    /// Which of them are open.
    pub(super) table: Table,
    pub(super) claims: Claims,
    pub(super) captures: Vec<Capture>,
    pub(super) shares: Shares,
    pub(super) groups: Groups,
    pub(super) workspace: Option<Box<Workspace>>,
    /// Nanoseconds since some moment, and whole seconds of them.
    pub(super) now: u64,
    pub(super) second: u32,
    /// Turns that were taken.
    pub(super) turns: u64,
    pub(super) active: Vec<PortNumber>,
    pub(super) pending: Vec<PortNumber>,
    /// Ports that have broken their rings since somebody asked.
    pub broken: Vec<(PortNumber, RingError)>,
}

impl Default for Switch {
    fn default() -> Self {
        Self::new(table::ADDRESSES_MAX, table::AGEING_SECONDS)
    }
}

impl Switch {
    /// A switch without ports.
    pub fn new(addresses_max: usize, ageing_seconds: u32) -> Self {
        let workspace = Workspace {
            burst: Burst::new(),
            out: Vec::new(),
            touched: Vec::new(),
            filler: Filler::default(),
            batch: Batch::new(TAP_FRAMES, 256 << 10),
            lost: Vec::new(),
            bytes: Vec::new(),
            scratch: Vec::new(),
            cut: 0,
        };
        Self {
            ports: Vec::new(),
            table: Table::new(addresses_max, ageing_seconds),
            claims: Claims::default(),
            captures: Vec::new(),
            shares: Shares::default(),
            groups: Groups::default(),
            workspace: Some(Box::new(workspace)),
            now: 0,
            second: 0,
            turns: 0,
            active: Vec::new(),
            pending: Vec::new(),
            broken: Vec::new(),
        }
    }

    /// Adds a port; `None` if there are too many.
    pub fn add(&mut self, name: &str, spec: PortSpec) -> Option<PortNumber> {
        let free = self.ports.iter().position(Option::is_none).unwrap_or(self.ports.len());
        let number = PortNumber::try_from(free).ok().filter(|_| free < PORTS_MAX)?;
        let port = Box::new(Port::new(name.to_owned(), number, spec));
        match self.ports.get_mut(free) {
            Some(slot) => *slot = Some(port),
            None => self.ports.push(Some(port)),
        }
        if let Some(workspace) = &mut self.workspace {
            workspace.out.resize_with(self.ports.len(), Vec::new);
        }
        self.claim_all(number);
        self.share_all();
        Some(number)
    }

    /// Removes a port with all that is known of it.
    pub fn remove(&mut self, number: PortNumber) {
        self.groups.forget(number);
        self.forget(number);
        if let Some(slot) = self.ports.get_mut(usize::from(number)) {
            *slot = None;
        }
        self.active.retain(|other| *other != number);
        self.pending.retain(|other| *other != number);
        self.captures.iter_mut().for_each(|capture| capture.forget(number));
    }

    /// Who was connected to a port is gone: nothing is known of it but what its spec says.
    pub fn clear(&mut self, number: PortNumber) {
        self.groups.forget(number);
        self.forget(number);
        self.claim_all(number);
        if let Some(port) = self.port_mut(number) {
            port.up.clear();
            port.down.clear();
            port.emulator.iter_mut().for_each(Emulator::clear);
        }
    }

    /// A guest that has moved here is behind a port: everybody learns it from a frame that its card could have sent (RFC 903's request, as
    /// hypervisors send it).
    pub fn announce(&mut self, number: PortNumber, address: [u8; 6]) {
        let request: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];
        let ends: [&[u8]; 4] = [&address, &[0; 4], &address, &[0; 4]];
        let mut frame = [&[0xff; 6][..], &address, &[0x80, 0x35], &request, &ends.concat()].concat();
        frame.resize(60, 0);
        self.inject(number, &frame);
    }

    /// A frame comes in at a port, as if who is behind it had sent it.
    pub(super) fn inject(&mut self, number: PortNumber, frame: &[u8]) {
        self.inject_with(number, crate::Offload::default(), frame);
    }

    pub(super) fn inject_with(&mut self, number: PortNumber, offload: crate::Offload, frame: &[u8]) {
        let Some(mut workspace) = self.workspace.take() else { return };
        if let Some(mut port) = self.ports.get_mut(usize::from(number)).and_then(Option::take) {
            workspace.burst.one(offload, frame, 0, 0);
            self.forward(&mut port, &mut workspace, Origin::Frame(frame));
            let waits = !port.up.is_empty();
            if let Some(slot) = self.ports.get_mut(usize::from(number)) {
                *slot = Some(port);
            }
            if waits {
                self.pend(number);
            }
        }
        self.workspace = Some(workspace);
    }

    /// Forgets who is behind a port.
    fn forget(&mut self, number: PortNumber) {
        self.claims.forget(number);
        self.table.retain(|entry| entry.port != number, &mut Vec::new());
        if let Some(port) = self.port_mut(number) {
            port.learnt = 0;
        }
    }

    /// Changes what a port is allowed.
    pub fn set(&mut self, number: PortNumber, spec: PortSpec) {
        let now = self.now;
        let told = |port: &Port| (port.spec.vlans.clone(), port.spec.trusted);
        let before = self.port(number).map(told);
        if before != Some((spec.vlans.clone(), spec.trusted)) {
            self.groups.forget(number);
        }
        self.forget(number);
        if let Some(port) = self.port_mut(number) {
            port.set(spec, now);
        }
        self.claim_all(number);
        self.share_all();
        self.waken(number);
    }

    /// What a port's spec gives it for good.
    fn claim_all(&mut self, number: PortNumber) {
        let Some(port) = self.ports.get(usize::from(number)).and_then(Option::as_deref) else { return };
        // On trunks addresses are checked where they come in, and not kept from others: there are too many VLANs.
        let vlans = match &port.spec.vlans {
            Vlans::Access(vlan) | Vlans::Tunnel(vlan) => vec![*vlan],
            Vlans::Trunk { .. } => Vec::new(),
        };
        let (macs, addresses) = (port.spec.macs.clone(), port.spec.addresses.clone());
        let (second, mut lost, mut learnt) = (self.second, Vec::new(), 0usize);
        for vlan in vlans {
            for mac in &macs {
                let result = self.table.fix(Key::new(mac.0, vlan), number, second, &mut lost);
                learnt = learnt.saturating_add(usize::from(matches!(result, Learnt::New | Learnt::Moved(_))));
                if let Learnt::Moved(before) = result {
                    lost.push(before);
                }
            }
            for address in &addresses {
                self.claims.fix(vlan, *address, number);
            }
        }
        self.count_lost(&mut lost);
        if let Some(port) = self.port_mut(number) {
            port.learnt = learnt;
        }
    }

    /// A port.
    pub fn port(&self, number: PortNumber) -> Option<&Port> {
        self.ports.get(usize::from(number))?.as_deref()
    }

    /// A port.
    pub fn port_mut(&mut self, number: PortNumber) -> Option<&mut Port> {
        self.ports.get_mut(usize::from(number))?.as_deref_mut()
    }

    /// All ports.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter().filter_map(Option::as_deref)
    }

    /// What is known of addresses.
    pub fn addresses(&self) -> impl Iterator<Item = &table::Entry> {
        self.table.entries(self.second)
    }

    /// Captures that run.
    pub fn captures(&mut self) -> &mut Vec<Capture> {
        &mut self.captures
    }

    /// Notes which ports are captured.
    pub fn mark_captured(&mut self) {
        for port in self.ports.iter_mut().flatten() {
            port.watched = self.captures.iter().any(|capture| capture.wants(port.number));
        }
    }

    /// A port may have frames, or room for them.
    pub fn waken(&mut self, number: PortNumber) {
        let now = self.now;
        let Some(port) = self.port_mut(number) else { return };
        port.idle_since = now;
        if !std::mem::replace(&mut port.active, true) {
            self.active.push(number);
        }
    }

    /// Whether some port is looked at in turn.
    pub fn busy(&self) -> bool {
        !self.active.is_empty()
    }

    /// Works on all ports that may have something to do, once. `now` is in nanoseconds and never goes back. Ports that were idle for
    /// longer than `spin` nanoseconds are asked to say when they have frames again.
    pub fn turn(&mut self, now: u64, spin: u64) {
        self.now = now;
        self.second = (now / 1_000_000_000) as u32;
        self.turns = self.turns.wrapping_add(1);
        let mut index = 0;
        while let Some(number) = self.active.get(index).copied() {
            if self.receive(number) {
                index = index.saturating_add(1);
                if let Some(port) = self.port_mut(number) {
                    port.idle_since = now;
                }
                continue;
            }
            let idle = self.port(number).is_none_or(|port| now.saturating_sub(port.idle_since) >= spin);
            if idle && !self.listen(number) {
                self.active.swap_remove(index);
                if let Some(port) = self.port_mut(number) {
                    port.active = false;
                }
            } else {
                index = index.saturating_add(1);
            }
        }
        self.drain_all();
    }

    /// Asks a port's driver to say when there are frames, or (where frames wait) buffers; answers whether there are already.
    fn listen(&mut self, number: PortNumber) -> bool {
        let Some(port) = self.port_mut(number) else { return false };
        let starved = !port.down.is_empty();
        let Link::Guest(backend) = &mut port.link else { return false };
        let (_, queues) = backend.parts();
        let mut more = false;
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(ring) = queue.ring() else { continue };
            if index & 1 == 1 {
                more |= ring.listen(0).unwrap_or(true);
            } else if starved {
                // Buffers that are there already were not enough.
                let seen = ring.known();
                more |= ring.listen(seen).unwrap_or(true);
            }
        }
        more
    }

    /// Takes what a port sends; answers whether there was anything.
    fn receive(&mut self, number: PortNumber) -> bool {
        if self.rests(number) {
            return true;
        }
        let Some(mut workspace) = self.workspace.take() else { return false };
        let Some(mut port) = self.ports.get_mut(usize::from(number)).and_then(Option::take) else {
            self.workspace = Some(workspace);
            return false;
        };
        let mut link = std::mem::replace(&mut port.link, Link::Nothing);
        let worked = match &mut link {
            Link::Nothing => false,
            Link::Guest(backend) => {
                let mut worked = 0;
                let (memory, queues) = backend.parts();
                let memory = Arc::clone(memory);
                let pairs = queues.len() / 2;
                let first = port.next_queue;
                for pair in (first..pairs).chain(0..first.min(pairs)) {
                    if worked == QUEUES_PER_TURN {
                        port.next_queue = pair;
                        break;
                    }
                    let Some(queue) = queues.get_mut(pair.saturating_mul(2).saturating_add(1)) else { break };
                    let Some(ring) = queue.ring() else { continue };
                    match workspace.burst.look(&memory, ring) {
                        Ok(0) => {}
                        Ok(_) => {
                            ring.quiet();
                            self.forward(&mut port, &mut workspace, Origin::Guest(&memory));
                            let Some(ring) = queue.ring() else { continue };
                            if workspace.burst.finish(ring)
                                && let Err(why) = queue.call()
                            {
                                // It makes all others wait: not again at the next queue.
                                self.broken.push((number, why));
                                break;
                            }
                            worked = worked.saturating_add(1);
                            if port.rests_until > self.turns {
                                port.next_queue = pair.saturating_add(1);
                                break;
                            }
                        }
                        Err(why) => {
                            queue.fail(why);
                            self.broken.push((number, why));
                        }
                    }
                }
                worked > 0
            }
            Link::Uplink(uplink) => {
                workspace.batch.clear();
                // What was no frame is work as well: its file says only once that something has come.
                let more = uplink.take(&mut workspace.batch);
                let worked = more || !workspace.batch.is_empty();
                if !workspace.batch.is_empty() {
                    let batch = std::mem::replace(&mut workspace.batch, Batch::new(0, 0));
                    workspace.burst.copy(&batch);
                    self.forward(&mut port, &mut workspace, Origin::Batch(&batch));
                    workspace.batch = batch;
                }
                worked
            }
        };
        port.link = link;
        self.workspace = Some(workspace);
        let waits = !port.up.is_empty();
        if let Some(slot) = self.ports.get_mut(usize::from(number)) {
            *slot = Some(port);
        }
        if waits {
            self.pend(number);
        }
        worked
    }

    /// Sends the frames of a burst on their ways.
    fn forward(&mut self, port: &mut Port, workspace: &mut Workspace, origin: Origin<'_>) {
        let (mut frames, mut bytes) = (0u64, 0u64);
        let limited = port.up.limited();
        workspace.cut = 0;
        let mut last: Option<Like> = None;
        for index in 0..workspace.burst.len() {
            let mut header = None;
            let admitted = match workspace.burst.packet(index) {
                Ok(packet) => {
                    frames = frames.wrapping_add(1);
                    bytes = bytes.wrapping_add(packet.len() as u64);
                    header = packet.head().first_chunk().copied();
                    if let Some(like) = &last
                        && header == Some(like.header)
                        && guard::is_harmless(packet.head(), packet.offload.checksum)
                    {
                        (packet.vlan, packet.priority) = (like.vlan, like.priority);
                        note(workspace, like.receiver, u16::try_from(index).unwrap_or(u16::MAX));
                        continue;
                    }
                    self.admit(port, packet, &mut workspace.lost)
                }
                Err(reason) => Err(reason),
            };
            if port.watched {
                self.capture(port.number, Direction::In, workspace, index, origin, admitted.err());
            }
            match admitted {
                Err(reason) => {
                    port.counters.dropped.count(reason);
                    // It may have turned the port off.
                    last = None;
                }
                Ok(_) if limited => self.hold(port, workspace, index, origin),
                Ok(one) => {
                    let receiver =
                        self.route(port, workspace, index, origin).filter(|_| one && !port.watched);
                    let packet = workspace.burst.packet(index).ok();
                    last = receiver.zip(header).zip(packet).map(|((receiver, header), packet)| Like {
                        header,
                        vlan: packet.vlan,
                        priority: packet.priority,
                        receiver,
                    });
                }
            }
        }
        port.counters.received = port.counters.received.wrapping_add(frames);
        port.counters.received_bytes = port.counters.received_bytes.wrapping_add(bytes);
        self.deliver_all(workspace, origin);
        self.charge_cuts(port, workspace);
        if !workspace.lost.is_empty() {
            self.count_lost_with(port, &mut workspace.lost);
        }
    }

    /// Whether a frame may come in; finds its VLAN and learns its sender. Answers whether it came without a tag.
    #[inline]
    fn admit(
        &mut self,
        port: &mut Port,
        packet: &mut Packet,
        lost: &mut Vec<PortNumber>,
    ) -> Result<bool, Reason> {
        if !port.open() {
            return Err(Reason::Disabled);
        }
        let tag = packet.tag();
        let ingress = port.spec.vlans.ingress(tag).ok_or(Reason::Vlan)?;
        packet.vlan = ingress.vlan;
        packet.priority = tag.map_or(port.spec.priority, |tag| tag.priority);
        if ingress.strip {
            packet.strip();
            // A second tag behind one that only says a priority would be the first one elsewhere.
            if packet.tag().is_some() && !matches!(port.spec.vlans, Vlans::Trunk { .. }) {
                return Err(Reason::Vlan);
            }
        }
        let head = packet.head();
        let Some(([to, from], _)) = head.split_first_chunk::<12>().map(|(macs, rest)| (split(macs), rest))
        else {
            return Err(Reason::Broken);
        };
        if from[0] & 1 != 0 || from == [0; 6] {
            return Err(Reason::Source);
        }
        if to.first_chunk::<5>() == Some(&RESERVED) && to[5] < 0x10 {
            if to[5] == 0 && port.spec.bpdu_guard {
                port.blocked = Some("turned off: a bridge is behind it");
            }
            return Err(Reason::Reserved);
        }
        let key = Key::new(from, packet.vlan);
        let known = Known { key, second: self.second, version: self.table.version() };
        if port.known != Some(known) {
            self.learn(port, key, lost)?;
            port.known = Some(Known { version: self.table.version(), ..known });
        }
        // What is inside a tunnel is somebody else's.
        if !matches!(port.spec.vlans, Vlans::Tunnel(_)) {
            self.check_claim(port, packet)?;
        }
        Ok(tag.is_none())
    }

    /// Learns who is behind a port.
    #[inline(never)]
    fn learn(&mut self, port: &mut Port, key: Key, lost: &mut Vec<PortNumber>) -> Result<(), Reason> {
        let locked = !port.spec.macs.is_empty();
        if locked && !port.spec.macs.iter().any(|mac| mac.0 == key.address()) {
            return Err(Reason::Spoofed);
        }
        let speaker = |port: &Port| {
            let may_add = port.learnt < port.spec.macs_max();
            Speaker { port: port.number, believed: port.spec.trusted || locked, may_add }
        };
        let mut result = self.table.learn(key, speaker(port), self.second, lost);
        // Addresses that are too old do not count.
        if result == Learnt::Full && !speaker(port).may_add && self.table.expire(self.second, lost) {
            self.count_lost_with(port, lost);
            result = self.table.learn(key, speaker(port), self.second, lost);
        }
        match result {
            Learnt::Known => {}
            Learnt::New => port.learnt = port.learnt.saturating_add(1),
            Learnt::Moved(before) => {
                port.learnt = port.learnt.saturating_add(1);
                lost.push(before);
            }
            Learnt::Fixed(_) => return Err(Reason::Spoofed),
            Learnt::Full if !speaker(port).may_add => return Err(Reason::Quota),
            // The table has no room: frames to it are flooded.
            Learnt::Full => {}
        }
        Ok(())
    }

    #[inline]
    fn check_claim(&mut self, port: &Port, packet: &Packet) -> Result<(), Reason> {
        let trusted = port.spec.trusted;
        // What is looked at here is delivered, not what a checksum in its place makes of it.
        if !trusted && !guard::may_complete(packet.head(), packet.offload.checksum) {
            return Err(Reason::Broken);
        }
        let claimed = match guard::claim(packet.head(), packet.len()) {
            Ok(None) => return Ok(()),
            Ok(Some(address)) => address,
            Err(_) if trusted => return Ok(()),
            Err(reason) => return Err(reason),
        };
        let own = &port.spec.addresses;
        if !own.is_empty() && !trusted && !own.contains(&claimed) && !is_link_local(claimed) {
            return Err(Reason::ArpSpoofed);
        }
        self.claims.claim(packet.vlan, claimed, port.number, trusted, self.second)
    }

    /// Finds where an admitted frame goes, and notes it; answers the port, if it is one.
    pub(super) fn route(
        &mut self,
        port: &mut Port,
        workspace: &mut Workspace,
        index: usize,
        origin: Origin<'_>,
    ) -> Option<PortNumber> {
        let packet = workspace.burst.packet(index).ok()?;
        let (vlan, tagged) = (packet.vlan, packet.tag().is_some());
        let to = *packet.head().first_chunk::<6>()?;
        let course = if to[0] & 1 != 0 { Course::Flood } else { self.find(port, to, vlan) };
        let done = match course {
            Course::To(receiver) if receiver == port.number => Err(Reason::Returned),
            Course::To(receiver) => self.may_go(port, receiver, vlan, tagged).map(|()| {
                note(workspace, receiver, u16::try_from(index).unwrap_or(u16::MAX));
                Some(receiver)
            }),
            Course::Flood => self.flood(port, workspace, index, origin).map(|()| None),
        };
        done.unwrap_or_else(|reason| {
            port.counters.dropped.count(reason);
            None
        })
    }

    /// Where an address is, as the table says; most frames go where the one before them went.
    #[inline]
    fn find(&self, port: &mut Port, to: [u8; 6], vlan: u16) -> Course {
        let known = Known { key: Key::new(to, vlan), second: self.second, version: self.table.version() };
        if let Some((last, receiver)) = port.last
            && last == known
        {
            return Course::To(receiver);
        }
        let Some(receiver) = self.table.find(known.key, self.second) else { return Course::Flood };
        port.last = Some((known, receiver));
        Course::To(receiver)
    }

    #[inline]
    pub(super) fn may_go(&self, from: &Port, to: PortNumber, vlan: u16, tagged: bool) -> Result<(), Reason> {
        let Some(receiver) = self.port(to) else { return Err(Reason::NoReceiver) };
        if matches!(receiver.link, Link::Nothing) || !receiver.open() {
            return Err(Reason::NoReceiver);
        }
        if from.spec.private && receiver.spec.private {
            return Err(Reason::Private);
        }
        match receiver.spec.vlans.egress(vlan) {
            // Who is behind a trunk would take the inner tag for the VLAN, and a guest one that says only a priority for none: what is
            // behind it was not looked at.
            Some(None) if tagged && !matches!(receiver.spec.vlans, Vlans::Tunnel(_)) => Err(Reason::Vlan),
            Some(_) => Ok(()),
            None => Err(Reason::Vlan),
        }
    }

    /// Delivers all frames that were noted.
    pub(super) fn deliver_all(&mut self, workspace: &mut Workspace, origin: Origin<'_>) {
        let touched = std::mem::take(&mut workspace.touched);
        for number in &touched {
            let Some(list) = workspace.out.get_mut(usize::from(*number)).map(std::mem::take) else {
                continue;
            };
            let slot = self.ports.get_mut(usize::from(*number));
            if let Some(mut receiver) = slot.and_then(Option::take) {
                self.deliver(&mut receiver, workspace, &list, origin);
                let line = receiver.emulator.as_ref().and_then(Emulator::next_at);
                let waits = !receiver.down.is_empty() || line.is_some();
                if let Some(slot) = self.ports.get_mut(usize::from(*number)) {
                    *slot = Some(receiver);
                }
                if waits {
                    self.pend(*number);
                }
            }
            if let Some(out) = workspace.out.get_mut(usize::from(*number)) {
                *out = list;
                out.clear();
            }
        }
        workspace.touched = touched;
        workspace.touched.clear();
    }

    /// Delivers some frames of a burst to a port: into its buffers if nothing is in the way, else they wait.
    fn deliver(&mut self, receiver: &mut Port, workspace: &mut Workspace, list: &[u16], origin: Origin<'_>) {
        if receiver.watched {
            for index in list {
                self.capture(receiver.number, Direction::Out, workspace, usize::from(*index), origin, None);
            }
        }
        let mut done = 0;
        if !receiver.buffers() {
            done = match self.deliver_now(receiver, workspace, list, origin) {
                Ok(done) => done,
                Err(why) => {
                    self.broken.push((receiver.number, why));
                    list.len()
                }
            };
        }
        for index in list.get(done..).unwrap_or_default() {
            self.enqueue(receiver, workspace, usize::from(*index), origin);
        }
    }

    /// Answers how many frames were delivered, or dropped, without waiting.
    pub(super) fn deliver_now(
        &mut self,
        receiver: &mut Port,
        workspace: &mut Workspace,
        list: &[u16],
        origin: Origin<'_>,
    ) -> Result<usize, RingError> {
        let Port { link, counters, spec, .. } = receiver;
        let Workspace { burst, filler, bytes, cut, .. } = workspace;
        match link {
            Link::Guest(backend) => filler.fill(backend, &spec.vlans, counters, list, burst, origin),
            Link::Uplink(uplink) => {
                for (place, index) in list.iter().enumerate() {
                    let Some((packet, rest)) = burst.with_rest(usize::from(*index), origin) else { continue };
                    let tag = spec.vlans.egress(packet.vlan).flatten();
                    if let Some(kind) = tag {
                        packet.push(kind);
                    }
                    bytes.clear();
                    bytes.extend_from_slice(packet.head());
                    rest.append(bytes);
                    let offload = packet.offload;
                    *cut = cut.saturating_add(wait::cut_into(&offload, packet.len()));
                    if tag.is_some() {
                        packet.strip();
                    }
                    if !uplink.send(&offload, bytes) {
                        return Ok(place);
                    }
                    counters.sent = counters.sent.wrapping_add(1);
                    counters.sent_bytes = counters.sent_bytes.wrapping_add(bytes.len() as u64);
                }
                Ok(list.len())
            }
            Link::Nothing => Ok(list.len()),
        }
    }

    fn count_lost(&mut self, lost: &mut Vec<PortNumber>) {
        for number in lost.drain(..) {
            if let Some(port) = self.port_mut(number) {
                port.learnt = port.learnt.saturating_sub(1);
            }
        }
    }

    fn count_lost_with(&mut self, port: &mut Port, lost: &mut Vec<PortNumber>) {
        let own = lost.iter().filter(|number| **number == port.number).count();
        port.learnt = port.learnt.saturating_sub(own);
        lost.retain(|number| *number != port.number);
        self.count_lost(lost);
    }

    #[cold]
    fn capture(
        &mut self,
        number: PortNumber,
        direction: Direction,
        workspace: &mut Workspace,
        index: usize,
        origin: Origin<'_>,
        dropped: Option<Reason>,
    ) {
        let Some((packet, rest)) = workspace.burst.with_rest(index, origin) else { return };
        if dropped == Some(Reason::Broken) {
            return;
        }
        let frame = wait::whole(packet, rest, self.now);
        for capture in self.captures.iter_mut().filter(|capture| capture.wants(number)) {
            capture.record(number, direction, &frame, dropped);
        }
    }

    /// For people.
    pub fn inspect(&self) -> serde_json::Value {
        let ports: Vec<_> = self.ports().map(Port::inspect).collect();
        let (limits, groups) = self.inspect_groups();
        serde_json::json!({ "ports": ports, "addresses": self.table.count(), "captures": self.captures.iter().map(Capture::inspect).collect::<Vec<_>>(),
            "limits": limits, "groups": groups })
    }
}

fn split(macs: &[u8; 12]) -> [[u8; 6]; 2] {
    let (pair, _) = macs.as_chunks::<6>();
    match pair {
        [to, from] => [*to, *from],
        _ => [[0; 6]; 2],
    }
}

fn is_link_local(address: std::net::IpAddr) -> bool {
    matches!(address, std::net::IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// A frame of the burst is for a port.
#[inline]
pub(super) fn note(workspace: &mut Workspace, receiver: PortNumber, index: u16) {
    let Some(list) = workspace.out.get_mut(usize::from(receiver)) else { return };
    if list.is_empty() {
        workspace.touched.push(receiver);
    }
    list.push(index);
}
