//! The network card: takes the guest's frames out of its queues, and lays others into them.
//!
//! The link is *up* or *down*. Frames to the guest wait with whoever brings them while the driver has no buffers, and are
//! lost while there is no driver: nobody listens at a cable that is not plugged in.
//!
//! Large segments and incomplete checksums go through as they are where the driver agrees, and are cut and completed
//! where it does not. What a guest says about its frames is checked against the frames ([`net::Offload::checked`]).

use super::filter::Filter;
use super::lend::Lent;
use super::receive::{Fate, Lane};
use super::rss::{self, Rss};
use super::spec::{self, feature};
use crate::queue::RingError;
use crate::transport::{Device, Pci, Queues};
use device::{MsiSink, Notify};
use memory::GuestMemory;
use net::offload::{HEADER_LEN as OFFLOAD_LEN, Offload};
use net::{Batch, FRAME_MAX, FRAME_MIN};
use serde_json::{Value, json};

/// Entries of the queues: 64 KiB segments in buffers of 1.5 KiB need 44 each.
const QUEUE_SIZE: u16 = 1024;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The most queue pairs: as many as vCPUs that a machine may usefully have.
const PAIRS_MAX: u16 = 64;

/// A network card on the PCI bus.
pub type Net = Pci<NetDevice>;

/// What a card is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub address: [u8; 6],
    /// The longest packet without its Ethernet header, in bytes.
    pub mtu: u16,
    /// Queue pairs, at most 64.
    pub pairs: u16,
    /// Features that are not offered, because whoever carries the frames cannot do its part.
    pub withheld: u64,
}

/// Frames and bytes since the card was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub sent: u64,
    pub sent_bytes: u64,
    pub received: u64,
    pub received_bytes: u64,
    /// The guest's frames that were too short, too long, or not what their header said.
    pub sent_broken: u64,
    pub receive_filtered: u64,
    pub receive_too_long: u64,
    /// Frames that came while nobody listened.
    pub receive_lost: u64,
}

/// What is behind the queues of a [`Net`].
#[derive(Debug)]
pub struct NetDevice {
    pub(super) config: NetConfig,
    pub(super) address: [u8; 6],
    pub(super) status: u16,
    pub(super) features: u64,
    /// Those of [`feature::GUEST_OFFLOADS`] that the driver wants now.
    pub(super) offloads: u64,
    /// Queue pairs in use.
    pub(super) pairs: u16,
    /// How frames are spread over them, if the driver says so.
    pub(super) rss: Option<Rss>,
    pub(super) filter: Filter,
    /// Of each pair.
    pub(super) lanes: Vec<Lane>,
    /// The pair that is looked at first for what the guest has sent.
    turn: u16,
    /// The last frame found no buffer.
    pub(super) starved: bool,
    pub(super) counters: Counters,
    pub(super) scratch: Vec<u8>,
    /// The buffers of one frame: heads and lengths.
    pub(super) parts: Vec<(u16, u32)>,
    pub(super) lent: Lent,
    pub(super) notify: Notify,
}

impl Pci<NetDevice> {
    /// A card whose link is up. `notify` tells that the guest has sent, or has room again.
    pub fn new(memory: GuestMemory, sink: MsiSink, notify: Notify, config: NetConfig) -> Self {
        let config = NetConfig { pairs: config.pairs.clamp(1, PAIRS_MAX), ..config };
        let device = NetDevice {
            config,
            address: config.address,
            status: spec::status::LINK_UP,
            features: 0,
            offloads: 0,
            pairs: 1,
            rss: None,
            filter: Filter::new(false),
            lanes: (0..config.pairs).map(|_| Lane::default()).collect(),
            turn: 0,
            starved: false,
            counters: Counters::default(),
            scratch: Vec::new(),
            parts: Vec::new(),
            lent: Lent::default(),
            notify,
        };
        Self::with_device(device, memory, sink)
    }

    /// Moves frames that the guest has sent into `batch` while it has room; answers whether there may be more.
    pub fn take(&mut self, batch: &mut Batch) -> bool {
        self.run(|device, queues| device.collect(batch, queues)).unwrap_or(false)
    }

    /// Moves frames from `batch` to the guest, those of each queue pair in order. Those that find no buffers stay until it has some, of
    /// which the notification tells; those of other pairs do not wait for them.
    pub fn give(&mut self, batch: &mut Batch) {
        let result = self.run(|device, queues| {
            if device.status & spec::status::LINK_UP == 0 {
                return Ok(false);
            }
            let (mut index, mut starved) = (0usize, 0u64);
            while let Some((offload, frame)) = batch.frame(index) {
                match device.deliver(offload, frame, starved, queues)? {
                    Fate::Done => batch.remove(index),
                    Fate::Later(pair) => {
                        starved |= 1u64.wrapping_shl(pair.into());
                        index = index.saturating_add(1);
                    }
                }
            }
            Ok(true)
        });
        if result != Some(true) {
            self.lose(batch);
        }
    }

    /// Loses frames that have found no buffers for long, so that those of other queue pairs are not kept out. With one pair nobody is.
    pub fn give_up(&mut self, batch: &mut Batch) {
        if self.device().pairs > 1 {
            self.lose(batch);
        }
    }

    fn lose(&mut self, batch: &mut Batch) {
        let device = self.device_mut();
        device.counters.receive_lost = device.counters.receive_lost.wrapping_add(batch.len() as u64);
        device.lanes.iter_mut().for_each(Lane::next_frame);
        batch.clear();
    }

    /// Plugs the cable in or out.
    pub fn set_link(&mut self, up: bool) {
        let status = &mut self.device_mut().status;
        *status = if up { *status | spec::status::LINK_UP } else { *status & !spec::status::LINK_UP };
        self.config_changed();
    }

    /// Asks the guest to tell its neighbours where it is (5.1.6.5.4).
    pub fn announce(&mut self) {
        self.device_mut().status |= spec::status::ANNOUNCE;
        self.config_changed();
    }
}

impl NetDevice {
    pub(super) fn agreed(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// The control queue follows the queue pairs that the driver knows of (5.1.2).
    fn control_queue(&self) -> u16 {
        if self.agreed(feature::MQ) || self.agreed(feature::RSS) {
            self.config.pairs.wrapping_mul(2)
        } else {
            2
        }
    }

    fn collect(&mut self, batch: &mut Batch, queues: &mut Queues) -> Result<bool, RingError> {
        for _ in 0..self.pairs {
            let pair = self.turn.checked_rem(self.pairs).unwrap_or(0);
            // Whoever fills the batch is the last to be looked at the next time.
            self.turn = pair.wrapping_add(1);
            let queue = pair.wrapping_mul(2) | 1;
            for _ in 0..queues.burst(queue) {
                if !batch.has_room() {
                    return Ok(true);
                }
                let Some(chain) = queues.pop(queue)? else { break };
                let mut header = [0; spec::HEADER_LEN];
                let whole = chain.readable.read(queues.memory(), 0, &mut header)? == header.len();
                let len = chain.readable.len().saturating_sub(spec::HEADER_LEN as u64);
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                if !whole || !(FRAME_MIN..=FRAME_MAX).contains(&len) {
                    self.counters.sent_broken = self.counters.sent_broken.wrapping_add(1);
                    queues.push(queue, chain.head, 0)?;
                    continue;
                }
                let room = batch.room(len);
                chain.readable.read(queues.memory(), spec::HEADER_LEN as u64, room)?;
                let offload = header.first_chunk::<OFFLOAD_LEN>().copied().unwrap_or_default();
                match Offload::checked(offload, room) {
                    Ok(offload) => {
                        batch.commit(offload, len);
                        self.counters.sent = self.counters.sent.wrapping_add(1);
                        self.counters.sent_bytes = self.counters.sent_bytes.wrapping_add(len as u64);
                    }
                    Err(_) => self.counters.sent_broken = self.counters.sent_broken.wrapping_add(1),
                }
                queues.push(queue, chain.head, 0)?;
            }
        }
        Ok(false)
    }
}

impl NetDevice {
    /// What has gone through, told as of a port that the card is plugged into: what it has sent, the port has received.
    pub fn about_as_port(&self, name: &str, link: &str) -> Value {
        let address = self.address.map(|byte| format!("{byte:02x}")).join(":");
        let counted = &self.counters;
        json!({ "name": name, "link": link, "address": address,
            "received": counted.sent, "received_bytes": counted.sent_bytes,
            "sent": counted.received, "sent_bytes": counted.received_bytes,
            "dropped": { "broken": counted.sent_broken },
            "dropped_out": { "filtered": counted.receive_filtered, "too long": counted.receive_too_long,
                "nobody listened": counted.receive_lost } })
    }
}

impl Device for NetDevice {
    const NAME: &'static str = "virtio-net";
    const TYPE: u16 = spec::TYPE;
    const CLASS: (u8, u8) = (0x02, 0x00);

    fn features(&self) -> u64 {
        let checksums = feature::CSUM | feature::GUEST_OFFLOADS | feature::CTRL_GUEST_OFFLOADS;
        let segments = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_USO;
        let control = feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_VLAN
            | feature::CTRL_RX_EXTRA
            | feature::GUEST_ANNOUNCE
            | feature::CTRL_MAC_ADDR;
        let pairs = if self.config.pairs > 1 { feature::MQ | feature::RSS } else { 0 };
        let about = feature::MAC | feature::MTU | feature::STATUS | feature::MRG_RXBUF;
        (checksums | segments | control | pairs | about) & !self.config.withheld
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; usize::from(self.config.pairs).saturating_mul(2)];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    /// `struct virtio_net_config` (5.1.4); the address is the one that the driver has set, if it has (5.1.6.5.2).
    /// Speed and duplex, which are not offered, are unknown.
    fn config(&self) -> Vec<u8> {
        let mut image = self.address.to_vec();
        for word in [self.status, self.config.pairs, self.config.mtu] {
            image.extend(word.to_le_bytes());
        }
        image.extend([0xff; 5]);
        image.push(rss::KEY_MAX as u8);
        image.extend(rss::TABLE_MAX.to_le_bytes());
        image.extend(rss::hash::SUPPORTED.to_le_bytes());
        image
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.offloads = features & feature::GUEST_OFFLOADS;
        self.filter = Filter::new(self.agreed(feature::CTRL_VLAN));
        self.lent.begin();
        self.notify.notify();
    }

    fn notified(&mut self, queue: u16, queues: &mut Queues) -> Result<(), RingError> {
        if queue == self.control_queue() {
            return if self.agreed(feature::CTRL_VQ) { self.serve_control(queue, queues) } else { Ok(()) };
        }
        if queue & 1 == 1 || std::mem::take(&mut self.starved) {
            self.notify.notify();
        }
        Ok(())
    }

    fn only_wakes(&self, queue: u16) -> bool {
        queue != self.control_queue()
    }

    fn reset(&mut self) {
        self.features = 0;
        self.offloads = 0;
        self.pairs = 1;
        self.rss = None;
        self.filter = Filter::new(false);
        self.lanes.iter_mut().for_each(|lane| *lane = Lane::default());
        self.turn = 0;
        self.starved = false;
        self.address = self.config.address;
        self.status &= !spec::status::ANNOUNCE;
        if self.lent.recall() {
            self.notify.notify();
        }
    }

    /// Buffers are with a carrier that may still write to them.
    fn draining(&self) -> bool {
        self.lent.count() > 0
    }

    fn inspect(&self) -> Value {
        let address = self.address.map(|byte| format!("{byte:02x}")).join(":");
        let Counters {
            sent,
            sent_bytes,
            received,
            received_bytes,
            sent_broken,
            receive_filtered,
            receive_too_long,
            receive_lost,
        } = &self.counters;
        json!({ "address": address, "mtu": self.config.mtu, "pairs": self.pairs,
            "rss": self.rss.as_ref().map(Rss::inspect), "link_up": self.status & spec::status::LINK_UP != 0, "offloads": format!("{:#x}", self.offloads),
            "filter": self.filter.inspect(), "starved": self.starved,
            "lent": self.lent.count(), "sent": sent, "sent_bytes": sent_bytes, "received": received, "received_bytes": received_bytes,
            "sent_broken": sent_broken, "receive_filtered": receive_filtered,
            "receive_too_long": receive_too_long, "receive_lost": receive_lost })
    }
}
