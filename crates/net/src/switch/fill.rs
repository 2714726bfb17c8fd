//! Frames into a guest's receive buffers, many at a time.

use super::packet::{Burst, HEADER_LEN, Origin, Packet, Rest};
use super::port::Counters;
use super::reason::Reason;
use super::vlan::Vlans;
use crate::offload::{Checksum, HEADER_LEN as OFFLOAD_LEN, Offload, SegmentKind};
use crate::vhost::{Backend, Memory, Ring, RingError, Segment, feature};

/// Whether a driver with these features takes a frame unfinished.
#[inline]
pub fn accepts(features: u64, offload: &Offload) -> bool {
    let agreed = |feature| features & feature == feature;
    if matches!(offload.checksum, Checksum::Partial { .. }) && !agreed(feature::GUEST_CSUM) {
        return false;
    }
    let Some(segments) = offload.segments else { return true };
    let kind = match segments.kind {
        SegmentKind::Tcp4 => feature::GUEST_TSO4,
        SegmentKind::Tcp6 => feature::GUEST_TSO6,
        SegmentKind::Udp4 => feature::GUEST_USO4,
        SegmentKind::Udp6 => feature::GUEST_USO6,
    };
    agreed(kind) && (!segments.ecn || agreed(feature::GUEST_ECN))
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    /// There are not enough buffers.
    Later,
    /// There never will be.
    TooLong,
}

/// A chain of a receive ring that was looked at.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    head: u16,
    len: u32,
    /// Where it begins, if it is in one piece.
    address: Option<u64>,
    /// Its pieces.
    segments: (usize, usize),
}

/// Buffers of one ring that are being filled.
#[derive(Debug, Default)]
pub struct Filler {
    buffers: Vec<Buffer>,
    segments: Vec<Segment>,
    /// Buffers that are full.
    full: usize,
}

impl Filler {
    /// Lays those frames of a burst that are in `list` into the buffers of a guest; answers how many of them are there or dropped: the
    /// others have to wait for buffers. Frames that the driver does not take as they are, and those behind them, have to wait too.
    pub fn fill(
        &mut self,
        backend: &mut Backend,
        vlans: &Vlans,
        counters: &mut Counters,
        list: &[u16],
        burst: &mut Burst,
        origin: Origin<'_>,
    ) -> Result<usize, RingError> {
        let features = backend.features();
        let (memory, queues) = backend.parts();
        let running = queues.iter().step_by(2).filter(|queue| queue.runs()).count();
        if running == 0 {
            (0..list.len()).for_each(|_| counters.dropped_out.count(Reason::NoReceiver));
            return Ok(list.len());
        }
        let mut done = 0;
        while let Some(first) = list.get(done) {
            // Most guests have one queue; with more, frames of a flow stay in one.
            let chosen = if running == 1 { 0 } else { choose(burst, *first, running) };
            let mut same = |index: &u16| running == 1 || choose(burst, *index, running) == chosen;
            let rest = list.get(done..).unwrap_or_default();
            let run = rest.iter().take_while(|index| same(index)).count();
            let rest = rest.get(..run).unwrap_or_default();
            let mut rings = queues.iter_mut().step_by(2).filter(|queue| queue.runs());
            let Some(queue) = rings.nth(chosen) else { return Ok(list.len()) };
            let Some(ring) = queue.ring() else { return Ok(list.len()) };
            let result = self.fill_ring(memory, ring, features, vlans, counters, rest, burst, origin);
            match result {
                Ok(count) => {
                    if queue.ring().is_some_and(|ring| self.finish(ring)) {
                        queue.call()?;
                    }
                    done = done.saturating_add(count);
                    if count < run {
                        return Ok(done);
                    }
                }
                Err(why) => {
                    queue.fail(why);
                    return Err(why);
                }
            }
        }
        Ok(done)
    }

    #[expect(clippy::too_many_arguments, reason = "all of them are borrowed apart from one another")]
    fn fill_ring(
        &mut self,
        memory: &Memory,
        ring: &mut Ring,
        features: u64,
        vlans: &Vlans,
        counters: &mut Counters,
        list: &[u16],
        burst: &mut Burst,
        origin: Origin<'_>,
    ) -> Result<usize, RingError> {
        self.buffers.clear();
        self.segments.clear();
        self.full = 0;
        self.look(memory, ring, list.len())?;
        let mergeable = features & feature::MRG_RXBUF != 0;
        // The VLAN whose frames go out without a tag.
        let plain_vlan = match vlans {
            Vlans::Access(vlan) | Vlans::Tunnel(vlan) => Some(*vlan),
            Vlans::Trunk { native, .. } => *native,
        };
        let (mut done, mut sent, mut sent_bytes) = (list.len(), 0u64, 0u64);
        for (place, index) in list.iter().enumerate() {
            let Some((packet, rest)) = burst.with_rest(usize::from(*index), origin) else { continue };
            // Nearly all frames: a short one as it is, into a buffer in one piece.
            if plain_vlan == Some(packet.vlan)
                && let Some(buffer) = self.buffers.get(self.full)
                && let Some(address) = buffer.address
                && let Some(bytes) = packet.short_and_plain()
                && bytes.len() <= buffer.len as usize
                && let Some(span) = memory.span(address, buffer.len)
            {
                span.write(bytes);
                ring.give(buffer.head, bytes.len() as u32);
                self.full = self.full.wrapping_add(1);
                sent = sent.wrapping_add(1);
                sent_bytes = sent_bytes.wrapping_add(bytes.len().saturating_sub(HEADER_LEN) as u64);
                continue;
            }
            if !accepts(features, &packet.offload) {
                done = place;
                break;
            }
            let tag = vlans.egress(packet.vlan).flatten();
            if let Some(kind) = tag {
                packet.push(kind);
            }
            let len = packet.len();
            let fate = self.put(memory, ring, mergeable, packet, rest);
            if tag.is_some() {
                packet.strip();
            }
            match fate? {
                Fate::Later => {
                    done = place;
                    break;
                }
                Fate::TooLong => counters.dropped_out.count(Reason::TooLong),
                Fate::Done => {
                    sent = sent.wrapping_add(1);
                    sent_bytes = sent_bytes.wrapping_add(len as u64);
                }
            }
        }
        counters.sent = counters.sent.wrapping_add(sent);
        counters.sent_bytes = counters.sent_bytes.wrapping_add(sent_bytes);
        Ok(done)
    }

    /// Looks at up to `count` buffers more; answers whether there was one.
    #[inline]
    fn look(&mut self, memory: &Memory, ring: &mut Ring, count: usize) -> Result<bool, RingError> {
        let begin = self.buffers.len();
        let want = u16::try_from(begin.saturating_add(count)).unwrap_or(u16::MAX).min(ring.size());
        let has = usize::from(ring.available(want)?.min(want));
        for ahead in begin..has {
            let head = ring.head(u16::try_from(ahead).unwrap_or(u16::MAX));
            self.buffers.push(Buffer { head, len: 0, address: None, segments: (0, 0) });
        }
        for buffer in self.buffers.iter_mut().skip(begin) {
            let first = self.segments.len();
            buffer.len = ring.chain(memory, buffer.head, true, &mut self.segments)?;
            buffer.segments = (first, self.segments.len());
            buffer.address = match self.segments.get(first..) {
                Some([only]) => Some(only.address),
                _ => None,
            };
        }
        Ok(self.buffers.len() > begin)
    }

    /// Lays a frame into as many buffers as it needs.
    #[inline]
    fn put(
        &mut self,
        memory: &Memory,
        ring: &mut Ring,
        mergeable: bool,
        packet: &mut Packet,
        rest: Rest<'_>,
    ) -> Result<Fate, RingError> {
        let need = packet.len().saturating_add(HEADER_LEN);
        let (mut room, mut count) = (0usize, 0usize);
        while room < need {
            let place = self.full.saturating_add(count);
            if place >= self.buffers.len() && !self.look(memory, ring, 1)? {
                let never = count >= usize::from(ring.size());
                return Ok(if never { Fate::TooLong } else { Fate::Later });
            }
            let Some(buffer) = self.buffers.get(place) else { return Ok(Fate::Later) };
            room = room.saturating_add(buffer.len as usize);
            count = count.saturating_add(1);
            if !mergeable && room < need {
                return Ok(Fate::TooLong);
            }
        }
        let header = packet.offload.encode();
        let buffers = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        let head = packet.head_with_header();
        if let Some((room, _)) = head.split_first_chunk_mut::<HEADER_LEN>()
            && let Some((offload, number)) = room.split_first_chunk_mut::<OFFLOAD_LEN>()
        {
            *offload = header;
            number.copy_from_slice(&buffers);
        }
        let filled = self.buffers.get(self.full..self.full.saturating_add(count)).unwrap_or_default();
        write(memory, ring, filled, &self.segments, head, rest, need);
        self.full = self.full.saturating_add(count);
        Ok(Fate::Done)
    }

    /// Takes the buffers that were filled; answers whether the driver wants to be told.
    #[inline]
    fn finish(&mut self, ring: &mut Ring) -> bool {
        ring.take(u16::try_from(self.full).unwrap_or(u16::MAX));
        ring.publish()
    }
}

/// Which of so many queues a frame is for.
fn choose(burst: &mut Burst, index: u16, queues: usize) -> usize {
    let hash = burst.packet(usize::from(index)).map_or(0, |packet| crate::flow_hash(packet.head()));
    (hash as usize).checked_rem(queues).unwrap_or(0)
}

/// Writes a frame of `need` bytes, header and all, into buffers that have room, and gives them back.
#[inline]
fn write(
    memory: &Memory,
    ring: &mut Ring,
    buffers: &[Buffer],
    segments: &[Segment],
    head: &[u8],
    rest: Rest<'_>,
    need: usize,
) {
    let (mut head, mut rest, mut left) = (head, Reader::new(rest), need);
    for buffer in buffers {
        let mut written = 0usize;
        for segment in segments.get(buffer.segments.0..buffer.segments.1).unwrap_or_default() {
            let Some(mut span) = memory.span(segment.address, segment.len) else { break };
            let done = span.write(head);
            head = head.get(done..).unwrap_or_default();
            span = span.skip(done);
            let done = done.saturating_add(rest.copy(span, left.saturating_sub(done)));
            written = written.saturating_add(done);
            left = left.saturating_sub(done);
            if left == 0 {
                break;
            }
        }
        ring.give(buffer.head, u32::try_from(written).unwrap_or(u32::MAX));
    }
}

/// Reads the rest of a frame piece by piece.
struct Reader<'a> {
    rest: Rest<'a>,
}

impl<'a> Reader<'a> {
    fn new(rest: Rest<'a>) -> Self {
        Self { rest }
    }

    /// Copies the next bytes, at most `left`, into a piece of memory; answers how many.
    fn copy(&mut self, mut to: crate::vhost::Span<'_>, left: usize) -> usize {
        let room = to.len().min(left);
        let mut done = 0usize;
        match &mut self.rest {
            Rest::Bytes(bytes) => {
                let (now, later) = bytes.split_at(room.min(bytes.len()));
                *bytes = later;
                done = to.write(now);
            }
            Rest::Guest { memory, segments, skip } => {
                while done < room {
                    let Some((segment, later)) = segments.split_first() else { break };
                    let len = segment.len as usize;
                    if *skip >= len {
                        *skip = skip.saturating_sub(len);
                        *segments = later;
                        continue;
                    }
                    let Some(from) = memory.span(segment.address, segment.len) else { break };
                    let from = from.skip(*skip).first(room.saturating_sub(done));
                    let copied = to.copy_from(&from);
                    to = to.skip(copied);
                    *skip = skip.saturating_add(copied);
                    done = done.saturating_add(copied);
                }
            }
        }
        done
    }
}
