//! Frames to the guest: made such that its driver takes them, and laid into its buffers.

use super::device::NetDevice;
use super::spec::{self, feature};
use crate::queue::{Chain, RingError};
use crate::transport::Queues;
use net::offload::{SegmentKind, Segments};
use net::{Checksum, Offload, segment};
use std::collections::VecDeque;

/// What is in hand of a pair's receive queue.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// Chains taken from it that no frame is in yet.
    spare: VecDeque<Chain>,
    /// Pieces that the guest has already of the frame that waits for buffers.
    pieces_done: usize,
}

impl Lane {
    /// The frame that waited is one no longer.
    pub(super) fn next_frame(&mut self) {
        self.pieces_done = 0;
    }
}

/// Whether there are buffers for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Enough,
    /// Not yet.
    Later,
    /// Not even all buffers of the queue would do.
    Never,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The guest has it, or does not want it.
    Done,
    /// This pair has no buffer: later.
    Later(u16),
}

impl NetDevice {
    /// Gives one frame, cut and completed as far as the driver does not do that itself. The pairs of the bits `starved` are known to have
    /// no buffers.
    pub(super) fn deliver(
        &mut self,
        offload: Offload,
        frame: &[u8],
        starved: u64,
        queues: &mut Queues,
    ) -> Result<Fate, RingError> {
        let pair = self.steer(frame);
        if starved.wrapping_shr(pair.into()) & 1 != 0 {
            return Ok(Fate::Later(pair));
        }
        let fate = match offload.segments {
            _ if !self.filter.passes(frame, self.address) => {
                self.counters.receive_filtered = self.counters.receive_filtered.wrapping_add(1);
                Fate::Done
            }
            Some(segments) if !self.takes(segments) => self.deliver_cut(pair, frame, segments, queues)?,
            _ => self.deliver_whole(pair, offload, frame, queues)?,
        };
        if fate == Fate::Done
            && let Some(lane) = self.lanes.get_mut(usize::from(pair))
        {
            lane.next_frame();
        }
        Ok(fate)
    }

    /// The queue pair of a frame's flow.
    fn steer(&self, frame: &[u8]) -> u16 {
        if self.pairs <= 1 {
            return 0;
        }
        if let Some(rss) = &self.rss {
            return rss.steer(frame);
        }
        u16::try_from(net::flow_hash(frame).checked_rem(self.pairs.into()).unwrap_or(0)).unwrap_or(0)
    }

    /// Whether the driver takes a large frame as it is.
    fn takes(&self, segments: Segments) -> bool {
        let needed = match segments.kind {
            SegmentKind::Tcp4 => feature::GUEST_TSO4,
            SegmentKind::Tcp6 => feature::GUEST_TSO6,
            SegmentKind::Udp4 => feature::GUEST_USO4,
            SegmentKind::Udp6 => feature::GUEST_USO6,
        };
        let ecn = !segments.ecn || self.offloads & feature::GUEST_ECN != 0;
        ecn && self.offloads & needed != 0 && self.offloads & feature::GUEST_CSUM != 0
    }

    /// As many pieces as there are buffers for: a driver that posts a few, and more only when one has come back, gets all in the end.
    fn deliver_cut(
        &mut self,
        pair: u16,
        frame: &[u8],
        segments: Segments,
        queues: &mut Queues,
    ) -> Result<Fate, RingError> {
        let mut done = self.lanes.get(usize::from(pair)).map_or(0, |lane| lane.pieces_done);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut result = Ok(Fate::Done);
        segment::cut_from(frame, segments, done, &mut scratch, &mut |offload, piece| {
            result = self.deliver_piece(pair, offload, piece, queues);
            let goes_on = result == Ok(Fate::Done);
            done = done.saturating_add(goes_on.into());
            goes_on
        });
        self.scratch = scratch;
        if let Some(lane) = self.lanes.get_mut(usize::from(pair)) {
            lane.pieces_done = done;
        }
        result
    }

    fn deliver_piece(
        &mut self,
        pair: u16,
        offload: Offload,
        frame: &mut [u8],
        queues: &mut Queues,
    ) -> Result<Fate, RingError> {
        let mut offload = offload;
        if self.offloads & feature::GUEST_CSUM == 0 {
            if let Checksum::Partial { start, offset } = offload.checksum {
                segment::complete_checksum(frame, start, offset);
            }
            offload.checksum = Checksum::Unknown;
        }
        self.put(pair, offload, frame, queues)
    }

    fn deliver_whole(
        &mut self,
        pair: u16,
        offload: Offload,
        frame: &[u8],
        queues: &mut Queues,
    ) -> Result<Fate, RingError> {
        match offload.checksum {
            _ if self.offloads & feature::GUEST_CSUM != 0 => self.put(pair, offload, frame, queues),
            Checksum::Partial { .. } => {
                let mut copy = std::mem::take(&mut self.scratch);
                copy.clear();
                copy.extend_from_slice(frame);
                let result = self.deliver_piece(pair, offload, &mut copy, queues);
                self.scratch = copy;
                result
            }
            _ => self.put(pair, Offload::default(), frame, queues),
        }
    }

    fn too_long(&mut self) -> Fate {
        self.counters.receive_too_long = self.counters.receive_too_long.wrapping_add(1);
        Fate::Done
    }

    /// Takes chains from the driver until there is one, and all have room for `bytes`; answers whether they do.
    fn gather(&mut self, pair: u16, bytes: usize, queues: &mut Queues) -> Result<Room, RingError> {
        let queue = pair.wrapping_mul(2);
        let Some(Lane { spare, .. }) = self.lanes.get_mut(usize::from(pair)) else { return Ok(Room::Later) };
        let mut room = spare.iter().fold(0u64, |sum, chain| sum.saturating_add(chain.writable.len()));
        while room < bytes as u64 || spare.is_empty() {
            let Some(chain) = queues.pop(queue)? else {
                if spare.len() >= usize::from(queues.burst(queue)) {
                    return Ok(Room::Never);
                }
                self.starved = true;
                return Ok(Room::Later);
            };
            super::check_receive(&chain)?;
            room = room.saturating_add(chain.writable.len());
            spare.push_back(chain);
        }
        Ok(Room::Enough)
    }

    /// Lays a frame into as many buffers as it needs.
    fn put(
        &mut self,
        pair: u16,
        offload: Offload,
        frame: &[u8],
        queues: &mut Queues,
    ) -> Result<Fate, RingError> {
        let mergeable = self.agreed(feature::MRG_RXBUF);
        let need = if mergeable { room_for(frame.len()) } else { spec::HEADER_LEN };
        match self.gather(pair, need, queues)? {
            Room::Enough => {}
            Room::Later => return Ok(Fate::Later(pair)),
            Room::Never => return Ok(self.too_long()),
        }
        let Some(Lane { spare, .. }) = self.lanes.get_mut(usize::from(pair)) else {
            return Ok(Fate::Later(pair));
        };
        if !mergeable
            && spare.front().is_some_and(|chain| chain.writable.len() < room_for(frame.len()) as u64)
        {
            return Ok(self.too_long());
        }
        let memory = queues.memory().clone();
        let mut header = [0; spec::HEADER_LEN];
        header.iter_mut().zip(offload.encode()).for_each(|(to, from)| *to = from);
        self.parts.clear();
        let mut left = frame;
        let mut first = None;
        while let Some(chain) = spare.pop_front() {
            let at = if self.parts.is_empty() { spec::HEADER_LEN as u64 } else { 0 };
            let done = chain.writable.write(&memory, at, left)?;
            left = left.get(done..).unwrap_or_default();
            let written = at.saturating_add(done as u64);
            self.parts.push((chain.head, u32::try_from(written).unwrap_or(u32::MAX)));
            first.get_or_insert(chain);
            if left.is_empty() {
                break;
            }
        }
        let count = u16::try_from(self.parts.len()).unwrap_or(u16::MAX);
        header.iter_mut().skip(spec::NUM_BUFFERS).zip(count.to_le_bytes()).for_each(|(to, from)| *to = from);
        if let Some(first) = first {
            first.writable.write(&memory, 0, &header)?;
        }
        queues.push_all(pair.wrapping_mul(2), &self.parts)?;
        let counters = &mut self.counters;
        counters.received = counters.received.wrapping_add(1);
        counters.received_bytes = counters.received_bytes.wrapping_add(frame.len() as u64);
        Ok(Fate::Done)
    }
}

/// Bytes of buffers that a frame of `len` needs.
fn room_for(len: usize) -> usize {
    len.saturating_add(spec::HEADER_LEN)
}
