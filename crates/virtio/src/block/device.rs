//! The block device: turns chains into requests for the worker, and its outcomes into status bytes.
//!
//! A request is *queued* in the guest's ring until the worker asks, then *pending* until it is answered. A device reset
//! makes pending requests *lost*: their answers go nowhere, but the reset is not over before the last of them, since
//! the worker may still write to RAM that the guest would take back.

use super::spec::{self, HEADER_LEN, ID_LEN, RANGE_LEN, SECTOR, Status, request};
use crate::queue::{Chain, RingError};
use crate::transport::{Device, Pci, Queues};
use device::block::{Controller, Geometry, Operation, Outcome, Request};
use device::{MsiSink, Notify};
use memory::GuestMemory;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Entries of a queue, and so the most requests pending for each.
const QUEUE_SIZE: u16 = 256;
/// Most queues of a disk.
pub const QUEUES_MAX: u16 = 64;
/// Data segments of a request: what a queue holds without header and status.
const SEGMENTS_MAX: u32 = 254;
/// Sectors of one discard or write-zeroes request: 1 GiB, so that a worker is not lost in one for long.
const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// A disk on the PCI bus.
pub type Block = Pci<BlockDevice>;

/// What is behind the queues of a [`Block`].
#[derive(Debug)]
pub struct BlockDevice {
    geometry: Geometry,
    id: [u8; ID_LEN],
    /// Request queues.
    count: u16,
    /// The queue that is looked at next.
    turn: u16,
    /// The driver flushes; if it does not, every write is durable when it completes (5.2.6.2).
    flushes: bool,
    /// The driver may switch the cache.
    switches: bool,
    /// The cache is on: writes are durable after a flush.
    write_cache: bool,
    /// With the queue that they came from.
    pending: BTreeMap<u64, (u16, Chain)>,
    lost: BTreeSet<u64>,
    /// Done, and not yet given back: the function may be no bus master just now.
    answered: Vec<(u16, Chain, Status)>,
    next_token: u64,
    completed: u64,
    notify: Notify,
}

/// What a chain asks for.
enum Parsed {
    /// Work for the worker.
    Request(Request),
    /// Answered at once.
    Answer(Status),
}

impl Pci<BlockDevice> {
    /// A disk with so many queues, at most [`QUEUES_MAX`]. `notify` wakes the worker that serves it; `serial` is cut to 20
    /// bytes.
    pub fn new(
        memory: GuestMemory,
        sink: MsiSink,
        notify: Notify,
        geometry: Geometry,
        serial: &str,
        queues: u16,
    ) -> Self {
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let device = BlockDevice {
            geometry,
            id,
            count: queues.clamp(1, QUEUES_MAX),
            turn: 0,
            flushes: false,
            switches: false,
            write_cache: geometry.write_cache,
            pending: BTreeMap::new(),
            lost: BTreeSet::new(),
            answered: Vec::new(),
            next_token: 0,
            completed: 0,
            notify,
        };
        Self::with_device(device, memory, sink)
    }
}

impl Controller for Pci<BlockDevice> {
    fn next_request(&mut self) -> Option<Request> {
        self.run(BlockDevice::next).flatten()
    }

    fn complete(&mut self, token: u64, outcome: Outcome) {
        let device = self.device_mut();
        if device.lost.remove(&token) {
            return;
        }
        let Some((queue, chain)) = device.pending.remove(&token) else { return };
        device.answered.push((queue, chain, outcome.into()));
        self.run(BlockDevice::answer_all);
    }
}

impl BlockDevice {
    /// Whether writes are durable when they complete.
    fn writes_through(&self) -> bool {
        !self.flushes || !self.write_cache
    }

    /// The next chain of any queue, each in its turn.
    fn pop(&mut self, queues: &mut Queues) -> Result<Option<(u16, Chain)>, RingError> {
        for _ in 0..self.count {
            let queue = self.turn;
            self.turn = queue.saturating_add(1).checked_rem(self.count).unwrap_or(0);
            if let Some(chain) = queues.pop(queue)? {
                return Ok(Some((queue, chain)));
            }
        }
        Ok(None)
    }

    fn next(&mut self, queues: &mut Queues) -> Result<Option<Request>, RingError> {
        for _ in 0..QUEUE_SIZE {
            let Some((queue, chain)) = self.pop(queues)? else { return Ok(None) };
            match self.parse(&chain, queues.memory())? {
                Parsed::Request(request) => {
                    self.next_token = self.next_token.wrapping_add(1);
                    self.pending.insert(request.token, (queue, chain));
                    return Ok(Some(request));
                }
                Parsed::Answer(status) => self.answer(queue, &chain, status, queues)?,
            }
        }
        // Nothing but requests answered here: let others have the device, then come back.
        self.notify.notify();
        Ok(None)
    }

    /// Gives back all that is done.
    fn answer_all(&mut self, queues: &mut Queues) -> Result<(), RingError> {
        let mut answered = std::mem::take(&mut self.answered);
        for (queue, chain, status) in answered.drain(..) {
            self.answer(queue, &chain, status, queues)?;
        }
        self.answered = answered;
        Ok(())
    }

    /// Writes the status byte, the last of the chain, and gives the chain back.
    fn answer(
        &mut self,
        queue: u16,
        chain: &Chain,
        status: Status,
        queues: &mut Queues,
    ) -> Result<(), RingError> {
        let len = chain.writable.len();
        let last = len.saturating_sub(1);
        chain.writable.write(queues.memory(), last, &[status as u8])?;
        // Only bytes written from the start on count (2.7.8.2): after an error there may be a gap before the status.
        let written = if status == Status::Ok || last == 0 { len } else { 0 };
        self.completed = self.completed.wrapping_add(1);
        queues.push(queue, chain.head, u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn parse(&self, chain: &Chain, memory: &GuestMemory) -> Result<Parsed, RingError> {
        let mut header = [0; HEADER_LEN];
        if chain.readable.read(memory, 0, &mut header)? < HEADER_LEN {
            return Err(RingError::Request { what: "no whole header" });
        }
        if chain.writable.is_empty() {
            return Err(RingError::Request { what: "no room for its status" });
        }
        let header = u128::from_le_bytes(header);
        let (kind, sector) = (header as u32, (header >> 64) as u64);
        let sent = chain.readable.len().saturating_sub(HEADER_LEN as u64);
        let wanted = chain.writable.len().saturating_sub(1);
        Ok(match kind {
            request::IN => {
                let segments = chain.writable.slice(0, wanted);
                self.transfer(Operation::Read, sector, wanted, segments)
            }
            request::OUT => {
                let segments = chain.readable.slice(HEADER_LEN as u64, sent);
                self.transfer(Operation::Write { fua: self.writes_through() }, sector, sent, segments)
            }
            request::FLUSH => Parsed::Request(Request {
                token: self.next_token,
                operation: Operation::Flush,
                offset: 0,
                len: 0,
                segments: Vec::new(),
            }),
            request::GET_ID => {
                let room = usize::try_from(wanted).unwrap_or(ID_LEN).min(ID_LEN);
                chain.writable.write(memory, 0, self.id.get(..room).unwrap_or_default())?;
                Parsed::Answer(Status::Ok)
            }
            request::DISCARD | request::WRITE_ZEROES if self.geometry.discard => {
                let mut range = [0; RANGE_LEN];
                if sent == RANGE_LEN as u64 {
                    chain.readable.read(memory, HEADER_LEN as u64, &mut range)?;
                    self.range(kind, u128::from_le_bytes(range))
                } else {
                    // One range per request is what the configuration space allows.
                    Parsed::Answer(Status::IoError)
                }
            }
            _ => Parsed::Answer(Status::Unsupported),
        })
    }

    /// A discard or write-zeroes request (5.2.6.2).
    fn range(&self, kind: u32, range: u128) -> Parsed {
        let (sector, sectors, flags) = (range as u64, (range >> 64) as u32, (range >> 96) as u32);
        let unmap = flags & spec::RANGE_UNMAP != 0;
        if flags & !spec::RANGE_UNMAP != 0 || (kind == request::DISCARD && unmap) {
            return Parsed::Answer(Status::Unsupported);
        }
        if sectors > RANGE_SECTORS_MAX {
            return Parsed::Answer(Status::IoError);
        }
        let operation = match kind {
            request::DISCARD => Operation::Discard,
            _ => Operation::WriteZeroes { unmap, fua: self.writes_through() },
        };
        self.transfer(operation, sector, u64::from(sectors).saturating_mul(SECTOR), Vec::new())
    }

    /// A request about a range of the disk, if that is on the disk and in whole blocks.
    fn transfer(
        &self,
        operation: Operation,
        sector: u64,
        len: u64,
        segments: Vec<device::block::Segment>,
    ) -> Parsed {
        let block = u64::from(self.geometry.block_size.max(1));
        let range = sector.checked_mul(SECTOR).and_then(|offset| Some((offset, offset.checked_add(len)?)));
        let Some((offset, end)) = range else { return Parsed::Answer(Status::IoError) };
        let whole = offset.is_multiple_of(block) && len.is_multiple_of(block);
        if end > self.geometry.capacity || !whole {
            return Parsed::Answer(Status::IoError);
        }
        if self.geometry.read_only && operation != Operation::Read {
            return Parsed::Answer(Status::IoError);
        }
        if len == 0 {
            return Parsed::Answer(Status::Ok);
        }
        Parsed::Request(Request { token: self.next_token, operation, offset, len, segments })
    }
}

impl Device for BlockDevice {
    const NAME: &'static str = "virtio-blk";
    const TYPE: u16 = spec::TYPE;
    const CLASS: (u8, u8) = (0x01, 0x00);

    fn features(&self) -> u64 {
        let mut features = spec::F_SEG_MAX | spec::F_BLK_SIZE | spec::F_FLUSH | spec::F_CONFIG_WCE;
        if self.count > 1 {
            features |= spec::F_MQ;
        }
        if self.geometry.read_only {
            features |= spec::F_RO;
        } else if self.geometry.discard {
            features |= spec::F_DISCARD | spec::F_WRITE_ZEROES;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.count.into()]
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut image = Vec::with_capacity(60);
        let alignment = u32::try_from(u64::from(self.geometry.block_size) / SECTOR).unwrap_or(1).max(1);
        image.extend((self.geometry.capacity / SECTOR).to_le_bytes());
        image.extend([0; 4]); // size_max
        image.extend(SEGMENTS_MAX.to_le_bytes());
        image.extend([0; 4]); // cylinders, heads, sectors
        image.extend(self.geometry.block_size.to_le_bytes());
        image.extend([0; 8]); // topology
        image.extend([u8::from(self.write_cache), 0]); // writeback, unused
        image.extend(self.count.to_le_bytes()); // num_queues
        for limit in [RANGE_SECTORS_MAX, 1, alignment, RANGE_SECTORS_MAX, 1] {
            image.extend(limit.to_le_bytes());
        }
        image.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
        image
    }

    fn config_written(&mut self, offset: u64, bytes: &[u8]) {
        if let (true, spec::WRITEBACK, Some(on)) = (self.switches, offset, bytes.first()) {
            self.write_cache = *on != 0;
        }
    }

    fn activate(&mut self, features: u64) {
        self.flushes = features & spec::F_FLUSH != 0;
        self.switches = features & spec::F_CONFIG_WCE != 0;
    }

    fn notified(&mut self, _queue: u16, queues: &mut Queues) -> Result<(), RingError> {
        self.notify.notify();
        self.answer_all(queues)
    }

    fn only_wakes(&self, _queue: u16) -> bool {
        true
    }

    fn reset(&mut self) {
        self.lost.extend(std::mem::take(&mut self.pending).into_keys());
        self.answered.clear();
        (self.flushes, self.switches) = (false, false);
        self.write_cache = self.geometry.write_cache;
    }

    fn draining(&self) -> bool {
        !self.lost.is_empty()
    }

    fn inspect(&self) -> Value {
        json!({ "capacity": self.geometry.capacity, "block_size": self.geometry.block_size,
            "read_only": self.geometry.read_only, "flushes": self.flushes, "write_cache": self.write_cache, "pending": self.pending.len(),
            "lost": self.lost.len(), "completed": self.completed })
    }
}
