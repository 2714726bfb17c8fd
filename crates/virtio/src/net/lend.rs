//! Buffers lent to a carrier that reaches guest RAM by itself (a back end in another process): chains go out checked, and come back
//! with what was written to them, which is noted at the gate before the driver sees it.
//!
//! A buffer is *with the driver*, *lent*, or *recalled*: after a reset the carrier has to say that nobody writes to the buffers any more
//! ([`Net::recalled`]); until then the reset is not over.

use super::device::{Net, NetDevice};
use super::spec::{self, feature};
use crate::queue::{Chain, RingError};
use crate::transport::Queues;
use net::vhost::Segment;

/// A buffer that is lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loan {
    /// Its number, for its return.
    pub token: u32,
    /// Where it is in guest RAM.
    pub segments: Vec<Segment>,
}

/// What a carrier has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lending {
    /// Counts the times that a driver was ready.
    pub session: u64,
    /// A driver is, and keeps the rules.
    pub live: bool,
    /// Buffers are to be given up.
    pub recall: bool,
    /// What driver and card have agreed on.
    pub features: u64,
    /// Queue pairs in use.
    pub pairs: u16,
}

/// All that is lent.
#[derive(Debug, Default)]
pub(super) struct Lent {
    session: u64,
    chains: Vec<Option<(u16, Chain)>>,
    free: Vec<u32>,
    recall: bool,
    /// Of each pair: buffers that the frame which is coming in still has.
    buffers_left: Vec<u16>,
}

impl Lent {
    pub(super) fn begin(&mut self) {
        self.session = self.session.wrapping_add(1);
        self.buffers_left.clear();
    }

    pub(super) fn count(&self) -> usize {
        self.chains.len().saturating_sub(self.free.len())
    }

    /// Answers whether there is something to be recalled.
    pub(super) fn recall(&mut self) -> bool {
        self.recall = self.count() > 0;
        self.recall
    }

    fn add(&mut self, queue: u16, chain: Chain) -> u32 {
        if let Some(token) = self.free.pop()
            && let Some(place) = self.chains.get_mut(token as usize)
        {
            *place = Some((queue, chain));
            return token;
        }
        self.chains.push(Some((queue, chain)));
        u32::try_from(self.chains.len().saturating_sub(1)).unwrap_or(u32::MAX)
    }

    fn take(&mut self, queue: u16, token: u32) -> Option<Chain> {
        let place = self.chains.get_mut(token as usize)?;
        if place.as_ref()?.0 != queue {
            return None;
        }
        self.free.push(token);
        place.take().map(|(_, chain)| chain)
    }
}

impl Net {
    /// What a carrier has to know now.
    pub fn lending(&self) -> Lending {
        let (live, device) = (self.live(), self.device());
        let Lent { session, recall, .. } = device.lent;
        Lending { session, live, recall, features: device.features, pairs: device.pairs }
    }

    /// Lends up to `count` buffers of a queue: even ones take frames, odd ones have them. Those of another session than the one that the
    /// carrier works for are not lent: what was agreed on then says nothing of them.
    pub fn lend(&mut self, session: u64, queue: u16, count: usize, loans: &mut Vec<Loan>) {
        if session == self.device().lent.session {
            self.run(|device, queues| device.lend(queue, count, loans, queues));
        }
    }

    /// Buffers of a queue come back, with so many bytes written to each. The driver sees all of them at once.
    pub fn give_back(&mut self, queue: u16, returns: &[(u32, u32)]) {
        let done = self.run(|device, queues| device.give_back(queue, returns, queues));
        if done.is_none() {
            // The driver is gone, or has broken the rules: nobody waits for them.
            let lent = &mut self.device_mut().lent;
            returns.iter().for_each(|(token, _)| drop(lent.take(queue, *token)));
        }
    }

    /// The carrier says that it has, and will have, no buffer of those that were lent before the reset.
    pub fn recalled(&mut self) {
        let lent = &mut self.device_mut().lent;
        lent.chains.clear();
        lent.free.clear();
        lent.recall = false;
    }
}

impl NetDevice {
    fn lend(
        &mut self,
        queue: u16,
        count: usize,
        loans: &mut Vec<Loan>,
        queues: &mut Queues,
    ) -> Result<(), RingError> {
        if self.lent.recall || queue >= self.pairs.wrapping_mul(2) {
            return Ok(());
        }
        let sends = queue & 1 == 1;
        for _ in 0..count {
            let Some(chain) = queues.pop(queue)? else { break };
            let piece = if sends { &chain.readable } else { &chain.writable };
            if !sends {
                super::check_receive(&chain)?;
            } else if piece.len() < spec::HEADER_LEN as u64 || !chain.writable.is_empty() {
                self.counters.sent_broken = self.counters.sent_broken.wrapping_add(1);
                queues.push(queue, chain.head, 0)?;
                continue;
            }
            let segments = piece.slice(0, piece.len());
            let segments =
                segments.iter().map(|part| Segment { address: part.address, len: part.len }).collect();
            if sends {
                let bytes = piece.len().saturating_sub(spec::HEADER_LEN as u64);
                self.counters.sent = self.counters.sent.wrapping_add(1);
                self.counters.sent_bytes = self.counters.sent_bytes.wrapping_add(bytes);
            }
            let token = self.lent.add(queue, chain);
            loans.push(Loan { token, segments });
        }
        Ok(())
    }

    fn give_back(
        &mut self,
        queue: u16,
        returns: &[(u32, u32)],
        queues: &mut Queues,
    ) -> Result<(), RingError> {
        let receives = queue & 1 == 0;
        let mut parts = std::mem::take(&mut self.parts);
        parts.clear();
        for (token, written) in returns {
            let Some(chain) = self.lent.take(queue, *token) else { continue };
            let room = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
            let written = (*written).min(room);
            if receives {
                for part in chain.writable.slice(0, written.into()) {
                    queues.memory().written(part.address, part.len.into());
                }
                self.count_received(queue, &chain, written, queues)?;
            }
            parts.push((chain.head, written));
        }
        let done = queues.push_all(queue, &parts);
        self.parts = parts;
        done
    }

    /// Only the first buffer of a frame has a header, which says how many more there are.
    fn count_received(
        &mut self,
        queue: u16,
        chain: &Chain,
        written: u32,
        queues: &Queues,
    ) -> Result<(), RingError> {
        let mut bytes = u64::from(written);
        let pair = usize::from(queue / 2);
        let mut left = self.lent.buffers_left.get(pair).copied().unwrap_or(0);
        if left == 0 {
            let mut header = [0; spec::HEADER_LEN];
            chain.writable.read(queues.memory(), 0, &mut header)?;
            let count = header.get(spec::NUM_BUFFERS..).and_then(|count| count.first_chunk::<2>().copied());
            let count = count.map_or(1, u16::from_le_bytes);
            let merged = self.agreed(feature::MRG_RXBUF);
            left = if merged { count.max(1) } else { 1 };
            self.counters.received = self.counters.received.wrapping_add(1);
            bytes = bytes.saturating_sub(spec::HEADER_LEN as u64);
        }
        if self.lent.buffers_left.len() <= pair {
            self.lent.buffers_left.resize(pair.saturating_add(1), 0);
        }
        if let Some(slot) = self.lent.buffers_left.get_mut(pair) {
            *slot = left.wrapping_sub(1);
        }
        self.counters.received_bytes = self.counters.received_bytes.wrapping_add(bytes);
        Ok(())
    }
}
