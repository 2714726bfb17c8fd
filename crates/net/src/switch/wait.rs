//! What cannot go at once: frames that wait for a limit, for a receiver's buffers, or on a bad line.

use super::fill::accepts;
use super::forward::{QUEUES_PER_TURN, Switch, Workspace};
use super::packet::{BURST, Origin, Packet, Rest};
use super::port::{Link, Port, Shaper};
use super::queue::Waiting;
use super::reason::Reason;
use super::share::Way;
use super::table::PortNumber;
use crate::offload::{Checksum, Offload};
use crate::{FRAME_MAX, segment};

/// What frames of one port are cut into in a turn is about as much work as the frames that another's turn has.
const PIECES_PER_TURN: usize = QUEUES_PER_TURN * BURST;

impl Switch {
    /// A frame that cannot be delivered at once waits for its receiver, in a form that the receiver takes.
    pub(super) fn enqueue(
        &mut self,
        receiver: &mut Port,
        workspace: &mut Workspace,
        index: usize,
        origin: Origin<'_>,
    ) {
        let Some((packet, rest)) = workspace.burst.with_rest(index, origin) else { return };
        let frame = whole(packet, rest, self.now);
        if let Some(emulator) = &mut receiver.emulator {
            if !emulator.push(frame, self.now) {
                receiver.counters.dropped_out.count(Reason::Emulated);
            }
            return;
        }
        if matches!(receiver.link, Link::Uplink(_)) {
            workspace.cut = workspace.cut.saturating_add(cut_into(&frame.offload, frame.bytes.len()));
        }
        let takes = takes(receiver);
        prepare(&mut receiver.down, frame, &takes, workspace);
    }

    /// A frame waits for the limit of its sender.
    pub(super) fn hold(
        &mut self,
        port: &mut Port,
        workspace: &mut Workspace,
        index: usize,
        origin: Origin<'_>,
    ) {
        let Some((packet, rest)) = workspace.burst.with_rest(index, origin) else { return };
        let frame = whole(packet, rest, self.now);
        let cuts = port.up.cuts();
        prepare(&mut port.up, frame, &|offload| !(cuts && offload.segments.is_some()), workspace);
    }

    /// A port's frames were cut on their ways: it rests for the turns that all others' frames would have taken as long as.
    pub(super) fn charge_cuts(&self, port: &mut Port, workspace: &Workspace) {
        let turns = (workspace.cut / PIECES_PER_TURN) as u64;
        port.rests_until = port.rests_until.max(self.turns).saturating_add(turns);
    }

    pub(super) fn rests(&self, number: PortNumber) -> bool {
        self.port(number).is_some_and(|port| port.rests_until > self.turns)
    }

    pub(super) fn pend(&mut self, number: PortNumber) {
        let Some(port) = self.port_mut(number) else { return };
        if !std::mem::replace(&mut port.pending, true) {
            self.pending.push(number);
        }
    }

    /// Lets go what waits, as far as it may.
    pub(super) fn drain_all(&mut self) {
        self.serve_shared(Way::Up);
        self.serve_shared(Way::Down);
        let mut index = 0;
        while let Some(number) = self.pending.get(index).copied() {
            let shared = self.port(number).map(|port| (port.up.shared(), port.down.shared()));
            let (up, down) = shared.unwrap_or_default();
            if !up {
                self.release(number, BURST);
            }
            self.arrive(number);
            self.drain(number, if down { 0 } else { BURST });
            let Some(port) = self.port_mut(number) else {
                self.pending.swap_remove(index);
                continue;
            };
            if port.up.is_empty()
                && port.down.is_empty()
                && port.emulator.as_ref().is_none_or(|e| e.next_at().is_none())
            {
                port.pending = false;
                self.pending.swap_remove(index);
            } else {
                index = index.saturating_add(1);
            }
        }
    }

    /// Up to `most` frames that a port sent, and its limit lets go now; answers whether there may be more.
    pub(super) fn release(&mut self, number: PortNumber, most: usize) -> bool {
        for _ in 0..most {
            if self.rests(number) {
                return false;
            }
            let now = self.now;
            let Some(mut port) = self.ports.get_mut(usize::from(number)).and_then(Option::take) else {
                return false;
            };
            let ready = !port.up.is_empty() && port.up.ready_at() <= now;
            let frame = if ready { port.up.queue.pop(now) } else { None };
            if let Some(frame) = &frame
                && let Some(mut workspace) = self.workspace.take()
            {
                let (len, segments) = (frame.bytes.len(), segments_of(frame));
                workspace.cut = 0;
                port.up.charge(len, segments, now);
                if port.up.shared() {
                    self.shares.charge(&mut port, Way::Up, len, segments, now);
                }
                workspace.burst.one(frame.offload, &frame.bytes, frame.vlan, frame.priority);
                self.route(&mut port, &mut workspace, 0, Origin::Frame(&frame.bytes));
                self.deliver_all(&mut workspace, Origin::Frame(&frame.bytes));
                self.charge_cuts(&mut port, &workspace);
                self.workspace = Some(workspace);
            }
            port.up.count_losses(&mut port.counters.dropped);
            if let Some(slot) = self.ports.get_mut(usize::from(number)) {
                *slot = Some(port);
            }
            if frame.is_none() {
                return false;
            }
        }
        true
    }

    /// What comes off a port's bad line waits for it now.
    fn arrive(&mut self, number: PortNumber) {
        let now = self.now;
        let Some(mut workspace) = self.workspace.take() else { return };
        workspace.cut = 0;
        if let Some(port) = self.port_mut(number) {
            while workspace.cut < PIECES_PER_TURN
                && let Some(frame) = port.emulator.as_mut().and_then(|emulator| emulator.pop(now))
            {
                let takes = takes(port);
                let frame = Waiting { since: now, ..frame };
                prepare(&mut port.down, frame, &takes, &mut workspace);
            }
        }
        self.workspace = Some(workspace);
    }

    /// Up to `most` frames that wait for a port go to it, as far as its limit and its buffers let them; answers whether there may be more.
    pub(super) fn drain(&mut self, number: PortNumber, most: usize) -> bool {
        let now = self.now;
        let Some(mut workspace) = self.workspace.take() else { return false };
        let Some(mut port) = self.ports.get_mut(usize::from(number)).and_then(Option::take) else {
            self.workspace = Some(workspace);
            return false;
        };
        let mut sent = 0;
        workspace.cut = 0;
        while sent < most && workspace.cut < PIECES_PER_TURN && port.down.ready_at() <= now {
            let Some(frame) = port.down.held.take().or_else(|| port.down.queue.pop(now)) else { break };
            sent = sent.saturating_add(1);
            workspace.burst.one(frame.offload, &frame.bytes, frame.vlan, frame.priority);
            match self.deliver_now(&mut port, &mut workspace, &[0], Origin::Frame(&frame.bytes)) {
                Ok(0) => {
                    port.down.held = Some(frame);
                    break;
                }
                Ok(_) => {
                    let (len, segments) = (frame.bytes.len(), segments_of(&frame));
                    port.down.charge(len, segments, now);
                    if port.down.shared() {
                        self.shares.charge(&mut port, Way::Down, len, segments, now);
                    }
                }
                Err(why) => self.broken.push((number, why)),
            }
        }
        // A guest without a driver gets nothing, later either.
        if matches!(port.link, Link::Nothing) {
            port.down.clear();
        }
        port.down.count_losses(&mut port.counters.dropped_out);
        self.workspace = Some(workspace);
        let starved = port.down.held.is_some();
        let more = sent == most && !starved;
        if let Some(slot) = self.ports.get_mut(usize::from(number)) {
            *slot = Some(port);
        }
        if starved && self.listen_for_buffers(number) {
            self.waken(number);
        }
        more
    }

    /// Asks a driver to say when it has buffers; answers whether it has more already.
    fn listen_for_buffers(&mut self, number: PortNumber) -> bool {
        let Some(Link::Guest(backend)) = self.port_mut(number).map(|port| &mut port.link) else {
            return false;
        };
        let (_, queues) = backend.parts();
        let mut more = false;
        for ring in queues.iter_mut().step_by(2).filter_map(|queue| queue.ring()) {
            let seen = ring.known();
            more |= ring.listen(seen).unwrap_or(false);
        }
        more
    }

    /// When something that waits may go on.
    pub fn next_at(&self) -> Option<u64> {
        let waiting = self.pending.iter().filter_map(|number| self.port(*number));
        waiting.filter_map(|port| self.port_next_at(port)).min()
    }

    /// When something of a port's may go on.
    fn port_next_at(&self, port: &Port) -> Option<u64> {
        let line = port.emulator.as_ref().and_then(super::emulation::Emulator::next_at);
        let up = (!port.up.is_empty()).then(|| port.up.ready_at().max(self.shared_at(port, Way::Up)));
        // What is held waits for buffers, of which its driver tells.
        let waits = !port.down.is_empty() && port.down.held.is_none();
        let down = waits.then(|| port.down.ready_at().max(self.shared_at(port, Way::Down)));
        line.into_iter().chain(up).chain(down).min()
    }
}

/// A frame with all its bytes.
pub(super) fn whole(packet: &Packet, rest: Rest<'_>, now: u64) -> Waiting {
    let mut bytes = Vec::with_capacity(packet.len());
    bytes.extend_from_slice(packet.head());
    rest.append(&mut bytes);
    bytes.truncate(FRAME_MAX);
    Waiting { offload: packet.offload, bytes, vlan: packet.vlan, priority: packet.priority, since: now }
}

/// What a port's driver takes unfinished, of what its limit leaves whole.
fn takes(port: &Port) -> impl Fn(&Offload) -> bool + use<> {
    let features = match &port.link {
        Link::Guest(backend) => Some(backend.features()),
        _ => None,
    };
    let cuts = port.down.cuts();
    move |offload| {
        let finished = features.is_none_or(|features| accepts(features, offload));
        finished && !(cuts && offload.segments.is_some())
    }
}

fn segments_of(frame: &Waiting) -> u64 {
    frame.offload.pieces(frame.bytes.len()) as u64
}

/// Work on a frame of `len` bytes that is cut: none, where it is one.
pub(super) fn cut_into(offload: &Offload, len: usize) -> usize {
    offload.segments.map_or(0, |_| offload.pieces(len))
}

/// Puts a frame into a queue, cut and completed if it is not taken as it is.
fn prepare(shaper: &mut Shaper, frame: Waiting, takes: &dyn Fn(&Offload) -> bool, workspace: &mut Workspace) {
    let hash = crate::flow_hash(&frame.bytes).rotate_left(7) ^ u32::from(frame.vlan);
    if takes(&frame.offload) {
        shaper.queue.push(hash, frame);
        return;
    }
    let finish = |offload: Offload, bytes: &mut [u8]| match offload.checksum {
        Checksum::Partial { start, offset } if !takes(&offload) => {
            segment::complete_checksum(bytes, start, offset);
            Offload::default()
        }
        _ => offload,
    };
    let Waiting { offload, mut bytes, vlan, priority, since } = frame;
    let Workspace { scratch, cut, .. } = workspace;
    *cut = cut.saturating_add(cut_into(&offload, bytes.len()));
    match offload.segments {
        None => {
            let offload = finish(offload, &mut bytes);
            shaper.queue.push(hash, Waiting { offload, bytes, vlan, priority, since });
        }
        Some(segments) => segment::cut(&bytes, segments, scratch, &mut |offload, piece| {
            let offload = finish(offload, piece);
            shaper.queue.push(hash, Waiting { offload, bytes: piece.to_vec(), vlan, priority, since });
        }),
    }
}
