//! The control queue (5.1.6.5): a class, a command, what it is about, and one byte for the answer.

use super::device::NetDevice;
use super::receive::Lane;
use super::rss::Rss;
use super::spec::{self, control, feature};
use crate::queue::RingError;
use crate::transport::Queues;

/// The longest command that is read: tables of more addresses than this holds are refused.
const COMMAND_MAX: usize = 8192;

impl NetDevice {
    /// Answers the commands that wait.
    pub(super) fn serve_control(&mut self, queue: u16, queues: &mut Queues) -> Result<(), RingError> {
        for _ in 0..queues.burst(queue) {
            let Some(chain) = queues.pop(queue)? else { return Ok(()) };
            let mut command = vec![0; COMMAND_MAX];
            let len = chain.readable.read(queues.memory(), 0, &mut command)?;
            let whole = chain.readable.len() == len as u64;
            let command = command.get(..len).unwrap_or_default();
            let done = whole && self.obey(command, queues);
            let answer = if done { control::OK } else { control::ERR };
            if chain.writable.is_empty() {
                return Err(RingError::Request { what: "no room for its answer" });
            }
            chain.writable.write(queues.memory(), 0, &[answer])?;
            queues.push(queue, chain.head, 1)?;
        }
        queues.again(queue);
        Ok(())
    }

    /// Does what a command asks for, if it may be asked.
    fn obey(&mut self, command: &[u8], queues: &Queues) -> bool {
        let &[class, command, ref about @ ..] = command else { return false };
        let byte = about.first().copied();
        let word = about.first_chunk::<2>().copied().map(u16::from_le_bytes);
        match (class, command) {
            (control::RX, _) => {
                let needed =
                    if command > control::RX_ALLMULTI { feature::CTRL_RX_EXTRA } else { feature::CTRL_RX };
                self.agreed(needed) && byte.is_some_and(|on| self.filter.set_mode(command, on != 0))
            }
            (control::MAC, control::MAC_TABLE_SET) => {
                self.agreed(feature::CTRL_RX) && self.filter.set_tables(about)
            }
            (control::MAC, control::MAC_ADDR_SET) if self.agreed(feature::CTRL_MAC_ADDR) => {
                let Some(address) = about.first_chunk::<6>() else { return false };
                self.address = *address;
                true
            }
            (control::VLAN, control::VLAN_ADD | control::VLAN_DEL) => {
                word.is_some_and(|vlan| self.filter.set_vlan(vlan, command == control::VLAN_ADD))
            }
            (control::ANNOUNCE, control::ANNOUNCE_ACK) if self.agreed(feature::GUEST_ANNOUNCE) => {
                self.status &= !spec::status::ANNOUNCE;
                true
            }
            (control::MQ, control::MQ_VQ_PAIRS_SET) if self.agreed(feature::MQ) => {
                let Some(pairs) = word.filter(|&pairs| (1..=self.config.pairs).contains(&pairs)) else {
                    return false;
                };
                let ready = are_ready(pairs, queues);
                if ready {
                    self.spread(pairs, None);
                }
                ready
            }
            (control::MQ, control::MQ_RSS_CONFIG) if self.agreed(feature::RSS) => {
                let rss = Rss::parse(about, self.config.pairs).filter(|rss| are_ready(rss.pairs, queues));
                let Some(rss) = rss else { return false };
                self.spread(rss.pairs, Some(rss));
                true
            }
            (control::GUEST_OFFLOADS, control::GUEST_OFFLOADS_SET)
                if self.agreed(feature::CTRL_GUEST_OFFLOADS) =>
            {
                let Some(wanted) = about.first_chunk::<8>().copied().map(u64::from_le_bytes) else {
                    return false;
                };
                let allowed = self.features & feature::GUEST_OFFLOADS;
                if wanted & !allowed != 0 {
                    return false;
                }
                self.offloads = wanted;
                true
            }
            _ => false,
        }
    }

    /// Spreads what comes over so many pairs. Frames that wait for buffers may have to wait at another pair now, from their beginning.
    fn spread(&mut self, pairs: u16, rss: Option<Rss>) {
        (self.pairs, self.rss) = (pairs, rss);
        self.lanes.iter_mut().for_each(Lane::next_frame);
    }
}

/// Whether the driver has enabled all queues of the first `pairs` pairs.
fn are_ready(pairs: u16, queues: &Queues) -> bool {
    (0..pairs).all(|pair| (0..2).all(|way| queues.enabled(pair.wrapping_mul(2) | way)))
}
