//! The front end's side: a card's rings as its back end sees them, and the messages that start and stop them.
//!
//! The rings are the front end's own, in a file that is given to the back end together with the guest's memory. Chains are *posted*
//! with a number of the caller's, and *collected* in the order in which the back end gives them back.

use super::channel::{Channel, Error};
use super::memory::{Area, Mapping, RegionAbout, barrier, memory_file};
use super::message::{Body, Header, PROTOCOL_FEATURES, VringAddresses, flag, protocol_feature, request};
use super::{Segment, feature};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest wait for an answer, or for room for a question. A back end that takes longer is as good as dead.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Where the rings are in the guest's address space, so that they have an address at all: beyond all RAM.
const RINGS_AT: u64 = 1 << 46;
/// Bytes from one ring to the next for each entry: descriptor, available and used entry, and room for what surrounds them.
const BYTES_PER_ENTRY: usize = 32;
const BYTES_AROUND: usize = 4096;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// About the rings of the guest's driver, with which those here have nothing to do: these are split, without tables of descriptors, and
/// chains come back in any order.
const OF_OTHER_RINGS: u64 = feature::RING_PACKED | feature::IN_ORDER | feature::INDIRECT_DESC;
/// In the used ring's flags: the device wants no notifications.
const NO_NOTIFY: u16 = 1;

/// Memory of the guest's that the back end may use.
#[derive(Debug)]
pub struct GuestRegion<'a> {
    /// Guest-physical address of its first byte.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// The file that holds it,
    pub file: BorrowedFd<'a>,
    /// from this byte on.
    pub offset: u64,
}

/// A ring, the driver's side.
#[derive(Debug)]
pub struct DriverRing {
    size: u16,
    area: Area,
    available_at: usize,
    used_at: usize,
    event_index: bool,
    /// Descriptors that nobody uses.
    free: Vec<u16>,
    /// What follows each descriptor in its chain. The back end could change what is in the ring.
    next: Vec<Option<u16>>,
    /// The caller's number of the chain that begins at each descriptor.
    owner: Vec<Option<u32>>,
    posted: u16,
    published: u16,
    collected: u16,
    kick: OwnedFd,
    call: OwnedFd,
}

fn slot(index: u16, size: u16) -> usize {
    usize::from(index & size.wrapping_sub(1))
}

impl DriverRing {
    fn new(mapping: &Arc<Mapping>, number: u16, size: u16) -> io::Result<Self> {
        let bytes = ring_bytes(size);
        let area = Area::new(mapping, bytes.saturating_mul(number.into()), bytes)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let entries = usize::from(size);
        let available_at = entries.saturating_mul(16);
        let used_at = available_at.saturating_add(entries.saturating_mul(2)).saturating_add(64) & !63;
        let event = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        Ok(Self {
            size,
            area,
            available_at,
            used_at,
            event_index: false,
            free: (0..size).rev().collect(),
            next: vec![None; entries],
            owner: vec![None; entries],
            posted: 0,
            published: 0,
            collected: 0,
            kick: event()?,
            call: event()?,
        })
    }

    /// Back to empty; what was posted is forgotten.
    fn clear(&mut self) {
        self.free = (0..self.size).rev().collect();
        self.owner.fill(None);
        (self.posted, self.published, self.collected) = (0, 0, 0);
        for at in [self.available_at, self.used_at] {
            self.area.store(at, 0);
            self.area.store(at.wrapping_add(2), 0);
        }
    }

    /// Number of descriptors that are free.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Posts a chain of pieces; `false` if it finds no room, now or (more pieces than the ring has) ever.
    pub fn post(&mut self, number: u32, segments: &[Segment], writable: bool) -> bool {
        if segments.is_empty() || segments.len() > self.free.len() {
            return false;
        }
        let mut after = None;
        let direction = if writable { WRITE } else { 0 };
        for segment in segments.iter().rev() {
            let Some(index) = self.free.pop() else { return false };
            let flags = direction | if after.is_some() { NEXT } else { 0 };
            let entry = u128::from(segment.address)
                | u128::from(segment.len) << 64
                | u128::from(flags) << 96
                | u128::from(after.unwrap_or(0)) << 112;
            self.area.write_u128(usize::from(index).wrapping_mul(16), entry);
            if let Some(next) = self.next.get_mut(usize::from(index)) {
                *next = after;
            }
            after = Some(index);
        }
        let head = after.unwrap_or(0);
        if let Some(owner) = self.owner.get_mut(usize::from(head)) {
            *owner = Some(number);
        }
        let at = slot(self.posted, self.size).wrapping_mul(2).wrapping_add(4);
        self.area.store(self.available_at.wrapping_add(at), head);
        self.posted = self.posted.wrapping_add(1);
        true
    }

    /// Shows the back end what was posted, and wakes it if it wants that.
    pub fn publish(&mut self) {
        if self.posted == self.published {
            return;
        }
        self.area.store(self.available_at.wrapping_add(2), self.posted);
        let old = std::mem::replace(&mut self.published, self.posted);
        barrier();
        let wanted = if self.event_index {
            let at = usize::from(self.size).wrapping_mul(8).wrapping_add(4);
            let event = self.area.load(self.used_at.wrapping_add(at));
            self.posted.wrapping_sub(event).wrapping_sub(1) < self.posted.wrapping_sub(old)
        } else {
            self.area.load(self.used_at) & NO_NOTIFY == 0
        };
        if wanted {
            // Fails only if the count is at its end, and then it is readable anyway.
            let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
        }
    }

    /// The next chain that came back: its number and how many bytes were written.
    pub fn collect(&mut self) -> Result<Option<(u32, u32)>, Error> {
        if self.area.load(self.used_at.wrapping_add(2)) == self.collected {
            return Ok(None);
        }
        let at = slot(self.collected, self.size).wrapping_mul(8).wrapping_add(4);
        let element = self.area.read_u64(self.used_at.wrapping_add(at));
        let (head, written) = (element as u32 as usize, (element >> 32) as u32);
        let owner = self.owner.get_mut(head).and_then(Option::take);
        let number = owner.ok_or(Error::Protocol("a chain came back that was not there"))?;
        let mut index = u16::try_from(head).ok();
        while let Some(free) = index {
            self.free.push(free);
            index = self.next.get(usize::from(free)).copied().flatten();
        }
        self.collected = self.collected.wrapping_add(1);
        Ok(Some((number, written)))
    }

    /// Asks to be told of the next chain that comes back; answers whether one has already.
    pub fn listen(&mut self) -> bool {
        let at = usize::from(self.size).wrapping_mul(2).wrapping_add(4);
        self.area.store(self.available_at.wrapping_add(at), self.collected);
        barrier();
        self.area.load(self.used_at.wrapping_add(2)) != self.collected
    }

    /// The event that tells of chains that came back.
    pub fn call(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Forgets that it was called.
    pub fn clear_call(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.call, &mut count);
    }

    /// Numbers of all chains that are with the back end.
    pub fn outstanding(&self) -> impl Iterator<Item = u32> {
        self.owner.iter().flatten().copied()
    }
}

fn ring_bytes(size: u16) -> usize {
    usize::from(size).saturating_mul(BYTES_PER_ENTRY).saturating_add(BYTES_AROUND).next_multiple_of(4096)
}

/// A connection to a back end.
#[derive(Debug)]
pub struct Frontend {
    channel: Channel,
    /// How long messages and answers are waited for.
    wait: Duration,
    offered: u64,
    protocols: u64,
    file: OwnedFd,
    bytes: u64,
    rings: Vec<DriverRing>,
    started: u16,
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Frontend {
    /// Connects to the back end that listens at `path`, for at most so many rings of `size` entries (a power of two).
    pub fn connect(path: &Path, rings: u16, size: u16) -> Result<Self, Error> {
        Self::connect_within(path, rings, size, ANSWER_MAX)
    }

    /// The same for who waits for the connection, and for each answer to a first question, for so long only.
    pub fn connect_within(path: &Path, rings: u16, size: u16, wait: Duration) -> Result<Self, Error> {
        Self::new_within(crate::switch::control::connect_within(path, wait)?, rings, size, wait)
    }

    /// The same over a socket that is connected.
    pub fn new(socket: UnixStream, rings: u16, size: u16) -> Result<Self, Error> {
        Self::new_within(socket, rings, size, ANSWER_MAX)
    }

    /// The same for who waits for so long only.
    pub fn new_within(socket: UnixStream, rings: u16, size: u16, wait: Duration) -> Result<Self, Error> {
        let size = size.clamp(2, 1 << 14).next_power_of_two();
        let bytes = ring_bytes(size).saturating_mul(rings.max(1).into()) as u64;
        let file = memory_file(bytes)?;
        let mapping = Arc::new(Mapping::new(&file, bytes, &Arc::default())?);
        let list =
            (0..rings).map(|number| DriverRing::new(&mapping, number, size)).collect::<io::Result<_>>()?;
        let channel = Channel::new(socket);
        let (offered, protocols, started) = (0, 0, 0);
        let mut this = Self { channel, wait, offered, protocols, file, bytes, rings: list, started };
        this.send(request::SET_OWNER, &[], &[])?;
        this.offered = this.ask(request::GET_FEATURES, &[])?;
        if this.offered & PROTOCOL_FEATURES != 0 {
            let known = protocol_feature::REPLY_ACK | protocol_feature::MQ;
            this.protocols = this.ask(request::GET_PROTOCOL_FEATURES, &[])? & known;
            this.send(request::SET_PROTOCOL_FEATURES, &this.protocols.to_ne_bytes(), &[])?;
        }
        this.wait = ANSWER_MAX;
        Ok(this)
    }

    /// Features that the back end offers.
    pub fn offered(&self) -> u64 {
        self.offered & !PROTOCOL_FEATURES
    }

    /// How many rings the back end serves.
    pub fn rings_max(&mut self) -> Result<u16, Error> {
        let own = u16::try_from(self.rings.len()).unwrap_or(u16::MAX);
        if self.protocols & protocol_feature::MQ == 0 {
            return Ok(own.min(2));
        }
        let pairs = self.ask(request::GET_QUEUE_NUM, &[])?;
        Ok(own.min(u16::try_from(pairs.saturating_mul(2)).unwrap_or(u16::MAX)))
    }

    /// Starts the first `rings` rings, empty, with these of the features that the back end offers.
    pub fn start(&mut self, features: u64, guest: &[GuestRegion<'_>], rings: u16) -> Result<(), Error> {
        let features = features & self.offered & !OF_OTHER_RINGS
            | self.offered & (PROTOCOL_FEATURES | feature::EVENT_IDX);
        self.send(request::SET_FEATURES, &features.to_ne_bytes(), &[])?;
        self.send_memory(guest)?;
        let bytes = self.rings.first().map_or(0, |ring| ring_bytes(ring.size)) as u64;
        self.started = rings.min(u16::try_from(self.rings.len()).unwrap_or(u16::MAX));
        for number in 0..self.started {
            let Some(ring) = self.rings.get_mut(usize::from(number)) else { break };
            ring.clear();
            ring.event_index = features & feature::EVENT_IDX != 0;
            let at = RINGS_AT.saturating_add(bytes.saturating_mul(number.into()));
            let index = u32::from(number);
            let addresses = VringAddresses {
                index,
                descriptors: at,
                available: at.saturating_add(ring.available_at as u64),
                used: at.saturating_add(ring.used_at as u64),
            };
            let state = |value: u32| [index.to_ne_bytes(), value.to_ne_bytes()].concat();
            let (size, file) = (ring.size, u64::from(number).to_ne_bytes());
            self.send(request::SET_VRING_NUM, &state(size.into()), &[])?;
            self.send(request::SET_VRING_BASE, &state(0), &[])?;
            self.send(request::SET_VRING_ADDR, &addresses.encode(), &[])?;
            let Some(ring) = self.rings.get(usize::from(number)) else { break };
            self.send(request::SET_VRING_CALL, &file, &[ring.call.as_fd()])?;
            self.send(request::SET_VRING_KICK, &file, &[ring.kick.as_fd()])?;
        }
        Ok(())
    }

    /// Says which rings the back end is to use.
    pub fn enable(&mut self, number: u16, enabled: bool) -> Result<(), Error> {
        if self.offered & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        let body = [u32::from(number).to_ne_bytes(), u32::from(enabled).to_ne_bytes()].concat();
        self.send(request::SET_VRING_ENABLE, &body, &[])
    }

    /// Stops all rings: when it returns, the back end uses none of them, nor the guest's memory.
    pub fn stop(&mut self) -> Result<(), Error> {
        for number in 0..std::mem::take(&mut self.started) {
            let body = [u32::from(number).to_ne_bytes(), [0; 4]].concat();
            self.ask(request::GET_VRING_BASE, &body)?;
        }
        Ok(())
    }

    /// A ring.
    pub fn ring(&mut self, number: u16) -> Option<&mut DriverRing> {
        self.rings.get_mut(usize::from(number))
    }

    /// All rings.
    pub fn rings(&self) -> &[DriverRing] {
        &self.rings
    }

    /// Whether the back end is still there. It has nothing to say by itself.
    pub fn alive(&mut self) -> bool {
        matches!(self.channel.receive(), Ok(None))
    }

    fn send_memory(&mut self, guest: &[GuestRegion<'_>]) -> Result<(), Error> {
        let count = u32::try_from(guest.len().saturating_add(1)).unwrap_or(u32::MAX);
        let mut body = [count.to_ne_bytes(), [0; 4]].concat();
        let mut add = |about: RegionAbout| {
            for word in [about.guest, about.len, about.user, about.offset] {
                body.extend(word.to_ne_bytes());
            }
        };
        for region in guest {
            let GuestRegion { guest, len, offset, .. } = *region;
            add(RegionAbout { guest, len, user: guest, offset });
        }
        add(RegionAbout { guest: RINGS_AT, len: self.bytes, user: RINGS_AT, offset: 0 });
        let mut files: Vec<BorrowedFd<'_>> = guest.iter().map(|region| region.file).collect();
        files.push(self.file.as_fd());
        let header = Header { request: request::SET_MEM_TABLE, flags: flag::VERSION, size: 0 };
        let header = Header { size: u32::try_from(body.len()).unwrap_or(u32::MAX), ..header };
        self.channel.send_within(self.wait, header, &body, &files)
    }

    fn send(&self, request: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.channel.send_within(self.wait, Header { request, flags: flag::VERSION, size }, body, files)
    }

    /// Asks for a number.
    fn ask(&mut self, request: u32, body: &[u8]) -> Result<u64, Error> {
        self.send(request, body, &[])?;
        let until = Instant::now().checked_add(self.wait);
        loop {
            if let Some(message) = self.channel.receive()? {
                if message.header.request != request {
                    return Err(Error::Protocol("an answer to another question"));
                }
                return Body(&message.body).u64().ok_or(Error::Protocol("an answer that is too short"));
            }
            let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Error::Protocol("no answer in time"));
            }
            let wait = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            match poll(&mut [PollFd::new(&self.channel, PollFlags::IN)], Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod test;
