//! Frames on their way through the switch: many at a time, the first bytes of each in the switch's own memory.
//!
//! What is decided of a frame is decided by those bytes, and those bytes are what is delivered: a sender that changes its memory
//! meanwhile changes only what follows. That is copied once, from the sender's memory to the receiver's.

use super::reason::Reason;
use super::vlan::{self, Tag};
use crate::offload::{Checksum, HEADER_LEN as OFFLOAD_LEN, Offload};
use crate::vhost::{Memory, Ring, RingError, Segment};
use crate::wire::{array, be16};
use crate::{Batch, FRAME_MAX, FRAME_MIN};

/// Bytes of `struct virtio_net_hdr_v1` in front of each frame (5.1.6).
pub const HEADER_LEN: usize = 12;
/// A header of a frame in one buffer to which nothing is left to do.
const HEADER_OF_ONE: [u8; HEADER_LEN] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// First bytes of a frame that the switch has to itself.
pub const HEAD_MAX: usize = 256;
/// Room in front of them: the header, and tags that are put on.
const FRONT: usize = 32;
/// Frames of a burst.
pub const BURST: usize = 32;
/// What a burst's frames may be cut into: what as many of TCP's longest are, in segments of the usual size. Where a sender's segments are
/// smaller, its bursts are.
const PIECES_MAX: usize = BURST * 46;

/// One frame. What is said of it is in one cache line, and its first bytes begin another.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Packet {
    /// Where the frame begins in `bytes`.
    start: usize,
    /// How many of its bytes are there.
    head: usize,
    /// How many it has.
    len: usize,
    /// What is left to do to it.
    pub offload: Offload,
    /// The VLAN that it is in.
    pub vlan: u16,
    /// Its priority, 0 to 7.
    pub priority: u8,
    /// Its pieces among the burst's.
    segments: (usize, usize),
    /// Bytes of those pieces that are in `bytes`, the header's among them.
    skip: usize,
    /// Nothing is left to do to it.
    plain: bool,
    bytes: [u8; FRONT + HEAD_MAX],
}

impl Packet {
    const fn new() -> Self {
        Self {
            bytes: [0; FRONT + HEAD_MAX],
            start: FRONT,
            head: 0,
            len: 0,
            offload: Offload { checksum: Checksum::Unknown, segments: None },
            vlan: 0,
            priority: 0,
            segments: (0, 0),
            skip: 0,
            plain: true,
        }
    }

    /// All of it, with a header in front that says only that it is in one buffer; `None`: there is more of it, or to be said of it.
    #[inline]
    pub fn short_and_plain(&mut self) -> Option<&[u8]> {
        if !self.plain || self.head != self.len {
            return None;
        }
        let from = self.start.checked_sub(HEADER_LEN)?;
        let all = self.bytes.get_mut(from..self.start.wrapping_add(self.head))?;
        *all.first_chunk_mut()? = HEADER_OF_ONE;
        Some(all)
    }

    /// Bytes of the whole frame.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its first bytes.
    #[inline]
    pub fn head(&self) -> &[u8] {
        self.bytes.get(self.start..self.start.wrapping_add(self.head)).unwrap_or_default()
    }

    /// Room for a header, and the first bytes after it.
    #[inline]
    pub fn head_with_header(&mut self) -> &mut [u8] {
        let from = self.start.saturating_sub(HEADER_LEN);
        self.bytes.get_mut(from..self.start.wrapping_add(self.head)).unwrap_or_default()
    }

    /// Its tag, if it has one.
    #[inline]
    pub fn tag(&self) -> Option<Tag> {
        let head = self.head();
        if !vlan::is_tag(be16(head, 12)?) {
            return None;
        }
        let control = be16(head, 14)?;
        Some(Tag { priority: (control >> 13) as u8, vlan: control & 0xfff })
    }

    /// Takes its tag off.
    pub fn strip(&mut self) {
        if self.head < FRAME_MIN.wrapping_add(4) {
            return;
        }
        self.bytes.copy_within(self.start..self.start.wrapping_add(12), self.start.wrapping_add(4));
        self.start = self.start.wrapping_add(4);
        self.head = self.head.wrapping_sub(4);
        self.len = self.len.wrapping_sub(4);
        self.offload = self.offload.moved(-4);
    }

    /// Puts a tag with its VLAN and priority on.
    pub fn push(&mut self, kind: u16) {
        let Some(start) = self.start.checked_sub(4).filter(|start| *start >= HEADER_LEN) else { return };
        self.bytes.copy_within(self.start..self.start.wrapping_add(12), start);
        let control = self.vlan & 0xfff | u16::from(self.priority) << 13;
        let [a, b] = kind.to_be_bytes();
        let [c, d] = control.to_be_bytes();
        crate::wire::put(&mut self.bytes, start.wrapping_add(12), &[a, b, c, d]);
        self.start = start;
        self.head = self.head.wrapping_add(4);
        self.len = self.len.wrapping_add(4);
        self.offload = self.offload.moved(4);
    }

    /// A frame of which all is known.
    pub fn set(&mut self, offload: Offload, frame: &[u8]) -> Result<(), Reason> {
        (self.vlan, self.priority) = (0, 0);
        self.start = FRONT;
        self.len = frame.len();
        self.head = self.len.min(HEAD_MAX);
        self.offload = offload;
        self.plain = offload == Offload::default();
        self.segments = (0, 0);
        self.skip = self.head;
        let (Some(to), Some(from)) =
            (self.bytes.get_mut(FRONT..FRONT.wrapping_add(self.head)), frame.get(..self.head))
        else {
            return Err(Reason::Broken);
        };
        to.copy_from_slice(from);
        if (FRAME_MIN..=FRAME_MAX).contains(&self.len) { Ok(()) } else { Err(Reason::Broken) }
    }

    /// Reads header and first bytes of a chain of `total` bytes.
    #[inline]
    fn load(&mut self, memory: &Memory, segments: &[Segment], total: u32) -> Result<(), Reason> {
        // Those of the frame that was here before are not its own: not even for who only sees why it is dropped.
        (self.vlan, self.priority) = (0, 0);
        self.start = FRONT;
        let total = total as usize;
        let want = total.min(HEADER_LEN + HEAD_MAX);
        let from = FRONT - HEADER_LEN;
        let Some(mut room) = self.bytes.get_mut(from..from.wrapping_add(want)) else {
            return Err(Reason::Broken);
        };
        for segment in segments {
            let Some(span) = memory.span(segment.address, segment.len) else { return Err(Reason::Broken) };
            let done = span.read(room);
            room = room.get_mut(done..).unwrap_or_default();
            if room.is_empty() {
                break;
            }
        }
        self.skip = want;
        self.len = total.wrapping_sub(HEADER_LEN);
        self.head = want.saturating_sub(HEADER_LEN);
        if total < HEADER_LEN || !(FRAME_MIN..=FRAME_MAX).contains(&self.len) {
            return Err(Reason::Broken);
        }
        let header: [u8; OFFLOAD_LEN] = array(&self.bytes, from).unwrap_or_default();
        // Neither a flag nor a kind of segment: nothing is said.
        self.plain = header.first_chunk() == Some(&[0, 0]);
        self.offload = if self.plain {
            Offload::default()
        } else {
            Offload::checked_start(header, self.head(), self.len).map_err(|_| Reason::Broken)?
        };
        Ok(())
    }
}

/// Where the rest of a frame is, behind its first bytes.
#[derive(Debug, Clone, Copy)]
pub enum Rest<'a> {
    /// In the memory of its sender, from byte `skip` of its pieces on.
    Guest {
        /// The memory.
        memory: &'a Memory,
        /// The pieces.
        segments: &'a [Segment],
        /// Bytes to pass over.
        skip: usize,
    },
    /// Here.
    Bytes(&'a [u8]),
}

impl<'a> Rest<'a> {
    /// Appends all of it to `bytes`.
    pub fn append(&self, bytes: &mut Vec<u8>) {
        match *self {
            Self::Bytes(rest) => bytes.extend_from_slice(rest),
            Self::Guest { memory, segments, mut skip } => {
                for segment in segments {
                    let len = segment.len as usize;
                    if skip >= len {
                        skip = skip.wrapping_sub(len);
                        continue;
                    }
                    let Some(span) = memory.span(segment.address, segment.len) else { return };
                    let span = span.skip(std::mem::take(&mut skip));
                    let begin = bytes.len();
                    bytes.resize(begin.saturating_add(span.len()), 0);
                    span.read(bytes.get_mut(begin..).unwrap_or_default());
                }
            }
        }
    }
}

/// Frames that are worked on together, all of one port's.
#[derive(Debug)]
pub struct Burst {
    packets: Vec<Packet>,
    /// Why a frame is none.
    broken: Vec<Option<Reason>>,
    heads: Vec<u16>,
    segments: Vec<Segment>,
    count: usize,
}

impl Burst {
    /// Room for a burst.
    pub fn new() -> Self {
        Self {
            packets: vec![Packet::new(); BURST],
            broken: vec![None; BURST],
            heads: vec![0; BURST],
            segments: Vec::with_capacity(BURST * 4),
            count: 0,
        }
    }

    /// Number of frames.
    #[inline]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Looks at the next chains of a ring, which are taken only by [`Self::finish`].
    #[inline]
    pub fn look(&mut self, memory: &Memory, ring: &mut Ring) -> Result<usize, RingError> {
        self.count = 0;
        self.segments.clear();
        let count = usize::from(ring.available(BURST as u16)?).min(BURST);
        for (ahead, head) in (0u16..).zip(self.heads.iter_mut().take(count)) {
            *head = ring.head(ahead);
        }
        // Descriptors were asked for above; frames are asked for here, and read below.
        for (packet, head) in self.packets.iter_mut().zip(&self.heads).take(count) {
            let begin = self.segments.len();
            packet.len = ring.chain(memory, *head, false, &mut self.segments)? as usize;
            packet.segments = (begin, self.segments.len());
        }
        let mut pieces = 0usize;
        for (packet, broken) in self.packets.iter_mut().zip(&mut self.broken).take(count) {
            let segments = self.segments.get(packet.segments.0..packet.segments.1).unwrap_or_default();
            let total = u32::try_from(packet.len).unwrap_or(u32::MAX);
            *broken = packet.load(memory, segments, total).err();
            self.count = self.count.wrapping_add(1);
            pieces = pieces.saturating_add(packet.offload.pieces(packet.len));
            if pieces >= PIECES_MAX {
                break;
            }
        }
        Ok(self.count)
    }

    /// Takes the chains that were looked at and gives them back; answers whether the driver wants to be told.
    #[inline]
    pub fn finish(&mut self, ring: &mut Ring) -> bool {
        for head in self.heads.iter().take(self.count) {
            ring.give(*head, 0);
        }
        ring.take(u16::try_from(self.count).unwrap_or(u16::MAX));
        ring.publish()
    }

    /// Takes frames from a batch.
    pub fn copy(&mut self, batch: &Batch) {
        self.count = 0;
        for (((offload, frame), packet), broken) in batch.iter().zip(&mut self.packets).zip(&mut self.broken)
        {
            *broken = packet.set(offload, frame).err();
            self.count = self.count.wrapping_add(1);
        }
    }

    /// One frame, of which all is known.
    pub fn one(&mut self, offload: Offload, frame: &[u8], vlan: u16, priority: u8) {
        self.count = 1;
        if let (Some(packet), Some(broken)) = (self.packets.first_mut(), self.broken.first_mut()) {
            *broken = packet.set(offload, frame).err();
            (packet.vlan, packet.priority) = (vlan, priority);
        }
    }

    /// A frame, or why it is none.
    #[inline]
    pub fn packet(&mut self, index: usize) -> Result<&mut Packet, Reason> {
        match self.broken.get(index) {
            Some(None) => self.packets.get_mut(index).ok_or(Reason::Broken),
            Some(Some(reason)) => Err(*reason),
            None => Err(Reason::Broken),
        }
    }

    /// A frame with its rest in the memory of a guest.
    #[inline]
    pub fn with_rest<'a>(
        &'a mut self,
        index: usize,
        origin: Origin<'a>,
    ) -> Option<(&'a mut Packet, Rest<'a>)> {
        let packet = self.packets.get_mut(index)?;
        let rest = match origin {
            Origin::Guest(memory) => {
                let segments = self.segments.get(packet.segments.0..packet.segments.1).unwrap_or_default();
                Rest::Guest { memory, segments, skip: packet.skip }
            }
            Origin::Batch(batch) => {
                let frame = batch.get(index).unwrap_or_default();
                Rest::Bytes(frame.get(packet.skip..).unwrap_or_default())
            }
            Origin::Frame(frame) => Rest::Bytes(frame.get(packet.skip..).unwrap_or_default()),
        };
        Some((packet, rest))
    }
}

/// Where a burst's frames came from.
#[derive(Debug, Clone, Copy)]
pub enum Origin<'a> {
    /// A guest's memory.
    Guest(&'a Memory),
    /// A batch.
    Batch(&'a Batch),
    /// One frame.
    Frame(&'a [u8]),
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::offload::{SegmentKind, Segments};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tags_come_off_as_they_went_on(frame in prop::collection::vec(any::<u8>(), 18..600), vlan in 0u16..4095, priority in 0u8..8) {
            let mut packet = Packet::new();
            let offload = Offload {
                checksum: Checksum::Partial { start: 34, offset: 16 },
                segments: Some(Segments { kind: SegmentKind::Tcp4, size: 1448, ecn: false, headers: 66 }),
            };
            packet.set(offload, &frame).unwrap();
            (packet.vlan, packet.priority) = (vlan, priority);
            packet.push(vlan::TAG);
            prop_assert_eq!(packet.tag(), Some(Tag { priority, vlan }));
            prop_assert_eq!(&packet.head()[16..], &frame[12..frame.len().min(HEAD_MAX)]);
            prop_assert_eq!(packet.len(), frame.len() + 4);
            prop_assert_eq!(packet.offload.checksum, Checksum::Partial { start: 38, offset: 16 });
            packet.push(vlan::SERVICE_TAG);
            packet.strip();
            packet.strip();
            prop_assert_eq!(packet.head(), &frame[..frame.len().min(HEAD_MAX)]);
            prop_assert_eq!((packet.len(), packet.offload), (frame.len(), offload));
        }
    }

    #[test]
    fn frames_that_are_none_are_not_taken() {
        let mut packet = Packet::new();
        assert_eq!(packet.set(Offload::default(), &[0; 13]), Err(Reason::Broken));
        assert_eq!(packet.set(Offload::default(), &vec![0; FRAME_MAX + 1]), Err(Reason::Broken));
        packet.set(Offload::default(), &[0; 14]).unwrap();
        packet.strip();
        assert_eq!(packet.len(), 14, "no room for a tag, so there was none");
    }
}
