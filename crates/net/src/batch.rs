//! Frames on their way, one after the other in one piece of memory that is used again and again.

use crate::offload::Offload;
use std::collections::VecDeque;
use std::ops::Range;

/// The longest frame: the longest IP packet, an Ethernet header with two tags.
pub const FRAME_MAX: usize = 65_535 + 14 + 8;
/// The shortest frame: an Ethernet header.
pub const FRAME_MIN: usize = 14;

/// Frames in order.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    /// Where the next frame goes.
    used: usize,
    /// Bytes of all frames.
    live: usize,
    frames: VecDeque<(Offload, Range<usize>)>,
    frames_max: usize,
}

impl Batch {
    /// Room for `frames_max` frames of `bytes_max` bytes together, and one frame of any length more.
    pub fn new(frames_max: usize, bytes_max: usize) -> Self {
        Self {
            bytes: vec![0; bytes_max.saturating_add(FRAME_MAX)],
            used: 0,
            live: 0,
            frames: VecDeque::with_capacity(frames_max),
            frames_max,
        }
    }

    /// Whether another frame of any length finds room.
    pub fn has_room(&self) -> bool {
        self.frames.len() < self.frames_max && self.bytes.len().saturating_sub(self.live) >= FRAME_MAX
    }

    /// Room for one frame of at most `len` bytes, to be filled and then [`Self::commit`]ted; shorter or empty if there
    /// is none.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len().saturating_sub(self.used) < len {
            self.close_up();
        }
        let end = self.used.saturating_add(len).min(self.bytes.len());
        self.bytes.get_mut(self.used..end).unwrap_or_default()
    }

    /// The first `len` bytes of the room are a frame.
    pub fn commit(&mut self, offload: Offload, len: usize) {
        let end = self.used.saturating_add(len).min(self.bytes.len());
        self.live = self.live.saturating_add(end.saturating_sub(self.used));
        self.frames.push_back((offload, self.used..end));
        self.used = end;
    }

    /// Moves the frames together, so that what is free is in one piece.
    fn close_up(&mut self) {
        let mut to = 0usize;
        for (_, range) in &mut self.frames {
            let end = to.saturating_add(range.len());
            self.bytes.copy_within(range.clone(), to);
            *range = to..end;
            to = end;
        }
        self.used = to;
    }

    /// Appends a frame made of `parts`; answers whether it found room.
    pub fn push(&mut self, offload: Offload, parts: &[&[u8]]) -> bool {
        let len = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
        if len > FRAME_MAX || !self.has_room() {
            return false;
        }
        let mut room = self.room(len);
        for part in parts {
            let Some((to, rest)) = room.split_at_mut_checked(part.len()) else { return false };
            to.copy_from_slice(part);
            room = rest;
        }
        self.commit(offload, len);
        true
    }

    /// The first frame.
    pub fn first(&self) -> Option<(Offload, &[u8])> {
        self.frame(0)
    }

    /// All frames in order.
    pub fn iter(&self) -> impl Iterator<Item = (Offload, &[u8])> {
        self.frames.iter().filter_map(|(offload, range)| Some((*offload, self.bytes.get(range.clone())?)))
    }

    /// The bytes of the frame that is so many behind the first.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        self.bytes.get(self.frames.get(index)?.1.clone())
    }

    /// The frame that is so many behind the first.
    pub fn frame(&self, index: usize) -> Option<(Offload, &[u8])> {
        Some((self.frames.get(index)?.0, self.get(index)?))
    }

    /// Forgets the frame that is so many behind the first.
    pub fn remove(&mut self, index: usize) {
        let Some((_, range)) = self.frames.remove(index) else { return };
        self.live = self.live.saturating_sub(range.len());
        if self.frames.is_empty() {
            self.used = 0;
        }
    }

    /// Forgets the first frame.
    pub fn pop(&mut self) {
        self.remove(0);
    }

    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.frames.clear();
        (self.used, self.live) = (0, 0);
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// No frames.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn frames_that_stay_do_not_keep_the_room_of_those_that_went() {
        let mut batch = Batch::new(8, FRAME_MAX);
        let frame = |byte: u8| vec![byte; FRAME_MAX / 4];
        for byte in 0..4 {
            assert!(batch.push(Offload::default(), &[&frame(byte)]));
        }
        batch.remove(2);
        batch.remove(0);
        for byte in 4..6 {
            assert!(batch.push(Offload::default(), &[&frame(byte)]));
        }
        let left: Vec<Vec<u8>> = batch.iter().map(|(_, bytes)| bytes.to_vec()).collect();
        assert_eq!(left, [frame(1), frame(3), frame(4), frame(5)]);
        assert!(!batch.push(Offload::default(), &[&[1; FRAME_MAX], &[1]]), "too long for any frame");
        for left in (0..4).rev() {
            batch.pop();
            assert_eq!(batch.len(), left);
        }
        assert!(batch.is_empty() && batch.has_room());
    }
}
