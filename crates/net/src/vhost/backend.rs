//! The back end's side of a connection: what the front end has said so far, and the rings that run because of it.
//!
//! A ring is *stopped* until it has a size, addresses, a kick and is enabled, and *running* from then until the front end asks for
//! its base, takes its memory away, or breaks its rules. One that broke them is *broken* until it is set up again.

use super::channel::{Channel, Error, Message};
use super::feature;
use super::memory::Memory;
use super::message::{
    Body, Header, NO_FILE, PROTOCOL_FEATURES, VringAddresses, flag, protocol_feature, request,
};
use super::ring::{self, Places, Ring};
use crate::sys;
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The most rings: 64 queue pairs.
const RINGS_MAX: usize = 128;
/// The most regions of memory.
const REGIONS_MAX: usize = 32;
/// Messages that are answered before others get a turn.
const MESSAGES_MAX: usize = 16;

/// Features that are offered to a front end that is a network card.
pub const FEATURES: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::MRG_RXBUF
    | feature::MQ
    | feature::MTU
    | feature::STATUS
    | feature::GUEST_ANNOUNCE
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::IN_ORDER
    | feature::GUEST_USO4
    | feature::GUEST_USO6
    | feature::HOST_USO
    | PROTOCOL_FEATURES;

const PROTOCOLS: u64 = protocol_feature::MQ
    | protocol_feature::RARP
    | protocol_feature::REPLY_ACK
    | protocol_feature::MTU
    | protocol_feature::RESET_DEVICE
    | protocol_feature::CONFIGURE_MEM_SLOTS
    | protocol_feature::STATUS;

/// One ring, and what was said of it.
#[derive(Debug, Default)]
pub struct Queue {
    size: u16,
    addresses: Option<VringAddresses>,
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    /// Counts the events that were ever set.
    kick_version: u32,
    call: Option<OwnedFd>,
    started: bool,
    enabled: bool,
    ring: Option<Ring>,
    broken: Option<ring::Error>,
    waited: Arc<Mutex<Waited>>,
}

/// How long the event counters of a connection, all of them, have made us wait lately.
#[derive(Debug, Default)]
struct Waited {
    since: Option<Instant>,
    all: Duration,
    count: u32,
    /// Until then each write is looked at: after one that took long, and from the beginning.
    looks_until: Option<Instant>,
}

impl Waited {
    /// The most in a period, unless it was one wait: who is stopped by a signal, and goes on, has slept as well.
    const MOST: Duration = Duration::from_millis(500);
    const PERIOD: Duration = Duration::from_secs(10);
    /// What is not worth counting.
    const LITTLE: Duration = Duration::from_millis(5);

    /// Whether the write that begins now is to be looked at.
    fn looks(&mut self, begin: Instant) -> bool {
        let until = self.looks_until.or_else(|| begin.checked_add(Self::PERIOD));
        self.looks_until = until;
        until.is_some_and(|until| begin < until)
    }

    /// A write has taken long. `slept`: whether the thread has slept in it, if that was looked at; without, it was only kept from its CPU,
    /// as a quota does it. Answers whether that is too long.
    fn judge(&mut self, begin: Instant, took: Duration, slept: Option<bool>) -> bool {
        self.looks_until = begin.checked_add(took.saturating_add(Self::PERIOD));
        slept == Some(true) && self.add(begin, took)
    }

    fn add(&mut self, begin: Instant, took: Duration) -> bool {
        if self.since.is_none_or(|since| begin.saturating_duration_since(since) > Self::PERIOD) {
            (self.since, self.all, self.count) = (Some(begin), Duration::ZERO, 0);
        }
        self.all = self.all.saturating_add(took);
        self.count = self.count.saturating_add(1);
        self.all > Self::MOST && self.count > 1
    }
}

impl Queue {
    /// The ring, if it runs.
    #[inline]
    pub fn ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut()
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.ring.is_some()
    }

    /// The event that tells of new chains. Who waits for it keeps it, so that the wait can be ended when the front end sends another.
    pub fn kick(&self) -> Option<Arc<OwnedFd>> {
        self.kick.clone()
    }

    /// Another number for each event that [`Self::kick`] ever was.
    pub fn kick_version(&self) -> u32 {
        self.kick_version
    }

    /// Why it does not run.
    pub fn broken(&self) -> Option<ring::Error> {
        self.broken
    }

    /// The driver broke the rules.
    pub fn fail(&mut self, why: ring::Error) {
        self.stop();
        self.broken = Some(why);
    }

    /// Tells the driver that chains came back.
    #[inline]
    pub fn call(&mut self) -> Result<(), ring::Error> {
        let Some(call) = &self.call else { return Ok(()) };
        let begin = Instant::now();
        let waited = || self.waited.lock().unwrap_or_else(PoisonError::into_inner);
        let before = waited().looks(begin).then(sys::times_slept);
        // If the count is at its end it is readable anyway. An interruption says that the write has waited, and for long.
        let result = rustix::io::write(call, &1u64.to_ne_bytes());
        let took = begin.elapsed();
        let slept = || before.map(|before| sys::times_slept() != before);
        if took >= Waited::LITTLE && waited().judge(begin, took, slept()) || result == Err(Errno::INTR) {
            self.fail(ring::Error::Call);
            return Err(ring::Error::Call);
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(ring) = self.ring.take() {
            self.base = ring.base();
        }
    }
}

/// What a message has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// Rings have started, stopped, or have other events.
    pub rings: bool,
    /// The guest moved here; its address, for others to learn.
    pub announce: Option<[u8; 6]>,
}

/// A connection.
#[derive(Debug)]
pub struct Backend {
    channel: Channel,
    features: u64,
    protocols: u64,
    memory: Arc<Memory>,
    queues: Vec<Queue>,
    waited: Arc<Mutex<Waited>>,
    status: u8,
    mtu: u16,
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Backend {
    /// Serves a socket that a front end is connected to.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            channel: Channel::new(socket),
            features: 0,
            protocols: 0,
            memory: Arc::default(),
            queues: Vec::new(),
            waited: Arc::default(),
            status: 0,
            mtu: 0,
        }
    }

    /// Features that both sides speak.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// All rings that were ever spoken of; even ones take frames to the guest, odd ones bring them (5.1.2).
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// The rings, and the memory that their descriptors point to.
    #[inline]
    pub fn parts(&mut self) -> (&Arc<Memory>, &mut [Queue]) {
        (&self.memory, &mut self.queues)
    }

    /// Serves messages that have come, without waiting.
    pub fn serve(&mut self) -> Result<Change, Error> {
        let mut change = Change::default();
        for _ in 0..MESSAGES_MAX {
            let Some(message) = self.channel.receive()? else { break };
            self.answer(message, &mut change)?;
        }
        Ok(change)
    }

    fn answer(&mut self, message: Message, change: &mut Change) -> Result<(), Error> {
        let Message { header, body, mut files } = message;
        let mut body = Body(&body);
        let wrong = Error::Protocol;
        let short = || wrong("a body that is too short");
        let mut reply: Option<u64> = None;
        let result = match header.request {
            request::GET_FEATURES => {
                reply = Some(FEATURES);
                Ok(())
            }
            request::GET_PROTOCOL_FEATURES => {
                reply = Some(PROTOCOLS);
                Ok(())
            }
            request::GET_QUEUE_NUM => {
                reply = Some((RINGS_MAX / 2) as u64);
                Ok(())
            }
            request::GET_MAX_MEM_SLOTS => {
                reply = Some(REGIONS_MAX as u64);
                Ok(())
            }
            request::GET_STATUS => {
                reply = Some(self.status.into());
                Ok(())
            }
            request::SET_FEATURES => self.set_features(body.u64().ok_or_else(short)?, change),
            request::SET_PROTOCOL_FEATURES => {
                self.protocols = body.u64().ok_or_else(short)? & PROTOCOLS;
                Ok(())
            }
            request::SET_OWNER => Ok(()),
            request::SET_STATUS => {
                self.status = body.u64().ok_or_else(short)? as u8;
                if self.status == 0 {
                    self.reset();
                    change.rings = true;
                }
                Ok(())
            }
            request::RESET_OWNER | request::RESET_DEVICE => {
                self.reset();
                change.rings = true;
                Ok(())
            }
            request::SET_MEM_TABLE => {
                change.rings = true;
                self.set_memory(body, files)
            }
            request::ADD_MEM_REG => {
                change.rings = true;
                let _padding = body.u64().ok_or_else(short)?;
                let about = body.region().ok_or_else(short)?;
                let file = files.pop().ok_or(wrong("a region without its file"))?;
                let mut memory = self.memory.copy();
                if memory.len() >= REGIONS_MAX {
                    return Err(wrong("too many regions"));
                }
                memory.add(about, file).map_err(|_| wrong("a region that cannot be mapped"))?;
                self.exchange_memory(memory);
                Ok(())
            }
            request::REM_MEM_REG => {
                change.rings = true;
                let _padding = body.u64().ok_or_else(short)?;
                let about = body.region().ok_or_else(short)?;
                let mut memory = self.memory.copy();
                if !memory.remove(about.guest, about.user, about.len) {
                    return Err(wrong("a region that was never added"));
                }
                self.exchange_memory(memory);
                Ok(())
            }
            request::GET_VRING_BASE => {
                let index = body.u32().ok_or_else(short)?;
                let queue = self.queue(index)?;
                queue.stop();
                queue.started = false;
                let base = u64::from(queue.base);
                change.rings = true;
                reply = Some(u64::from(index) | base << 32);
                Ok(())
            }
            request::SET_VRING_NUM
            | request::SET_VRING_ADDR
            | request::SET_VRING_BASE
            | request::SET_VRING_ENABLE => {
                change.rings = true;
                self.set_ring(header.request, body)
            }
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR => {
                change.rings = true;
                let about = body.u64().ok_or_else(short)?;
                self.set_event(header.request, about, files.pop())
            }
            request::SEND_RARP => {
                let bytes = body.u64().ok_or_else(short)?.to_ne_bytes();
                change.announce = bytes.first_chunk::<6>().copied();
                Ok(())
            }
            request::NET_SET_MTU => {
                self.mtu = body.u64().ok_or_else(short)? as u16;
                Ok(())
            }
            _ => Err(wrong("a request that was not agreed on")),
        };
        result?;
        let acknowledged = self.protocols & protocol_feature::REPLY_ACK != 0;
        if reply.is_none() && header.flags & flag::NEED_REPLY != 0 && acknowledged {
            reply = Some(0);
        }
        let Some(value) = reply else { return Ok(()) };
        let body = value.to_ne_bytes();
        let header = Header { flags: flag::VERSION | flag::REPLY, size: body.len() as u32, ..header };
        self.channel.send(header, &body, &[])
    }

    fn queue(&mut self, index: u32) -> Result<&mut Queue, Error> {
        let number = usize::try_from(index).unwrap_or(usize::MAX);
        if number >= RINGS_MAX {
            return Err(Error::Protocol("a ring beyond the last"));
        }
        if self.queues.len() <= number {
            let waited = &self.waited;
            let new = || Queue { waited: waited.clone(), ..Queue::default() };
            self.queues.resize_with(number.saturating_add(1), new);
        }
        self.queues.get_mut(number).ok_or(Error::Protocol("a ring beyond the last"))
    }

    fn set_features(&mut self, features: u64, change: &mut Change) -> Result<(), Error> {
        if features & !FEATURES != 0 {
            return Err(Error::Protocol("features that were not offered"));
        }
        if self.features != features {
            self.features = features;
            change.rings = true;
            self.start_all();
        }
        Ok(())
    }

    fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.stop();
            let kick_version = queue.kick_version.wrapping_add(1);
            let waited = queue.waited.clone();
            *queue = Queue { call: queue.call.take(), kick_version, waited, ..Queue::default() };
        }
        self.features = 0;
    }

    fn set_memory(&mut self, mut body: Body<'_>, files: Vec<OwnedFd>) -> Result<(), Error> {
        let short = || Error::Protocol("a body that is too short");
        let (count, _padding) = (body.u32().ok_or_else(short)? as usize, body.u32().ok_or_else(short)?);
        if count > REGIONS_MAX || count != files.len() {
            return Err(Error::Protocol("other files than regions"));
        }
        let mut memory = self.memory.emptied();
        for file in files {
            let about = body.region().ok_or_else(short)?;
            memory.add(about, file).map_err(|_| Error::Protocol("a region that cannot be mapped"))?;
        }
        self.exchange_memory(memory);
        Ok(())
    }

    /// Rings find their parts again in the new memory.
    fn exchange_memory(&mut self, memory: Memory) {
        self.memory = Arc::new(memory);
        for queue in &mut self.queues {
            queue.stop();
        }
        self.start_all();
    }

    fn set_ring(&mut self, what: u32, mut body: Body<'_>) -> Result<(), Error> {
        let short = || Error::Protocol("a body that is too short");
        if what == request::SET_VRING_ADDR {
            let addresses = VringAddresses::decode(body).ok_or_else(short)?;
            let queue = self.queue(addresses.index)?;
            queue.stop();
            queue.addresses = Some(addresses);
            return self.start(addresses.index);
        }
        let (index, value) = (body.u32().ok_or_else(short)?, body.u32().ok_or_else(short)?);
        let queue = self.queue(index)?;
        match what {
            request::SET_VRING_NUM => {
                queue.size = u16::try_from(value).map_err(|_| Error::Protocol("a ring that is too large"))?;
            }
            request::SET_VRING_BASE => queue.base = value as u16,
            _ if value == 0 => {
                queue.enabled = false;
                queue.stop();
            }
            _ => queue.enabled = true,
        }
        self.start(index)
    }

    fn set_event(&mut self, what: u32, about: u64, file: Option<OwnedFd>) -> Result<(), Error> {
        let index = (about & 0xff) as u32;
        let none = about & NO_FILE != 0;
        if none != file.is_none() {
            return Err(Error::Protocol("an event without its file, or a file too many"));
        }
        if let Some(file) = &file {
            make_harmless(file).ok_or(Error::Protocol("a file that is no event counter"))?;
        }
        let queue = self.queue(index)?;
        match what {
            request::SET_VRING_KICK => {
                if none {
                    return Err(Error::Protocol("a ring that is to be polled for ever"));
                }
                queue.kick = file.map(Arc::new);
                queue.kick_version = queue.kick_version.wrapping_add(1);
                queue.started = true;
                queue.broken = None;
                self.start(index)
            }
            request::SET_VRING_CALL => {
                queue.call = file;
                // The driver may wait for what came back before.
                queue.call().map_err(|_| Error::Waits)
            }
            _ => Ok(()),
        }
    }

    fn start_all(&mut self) {
        for index in 0..self.queues.len() {
            // What cannot run is broken, and says so.
            let _ = self.start(u32::try_from(index).unwrap_or(u32::MAX));
        }
    }

    /// Starts a ring if all is said.
    fn start(&mut self, index: u32) -> Result<(), Error> {
        let (memory, features) = (self.memory.clone(), self.features);
        // Without protocol features rings are enabled from the start.
        let enabled = features & PROTOCOL_FEATURES == 0;
        let queue = self.queue(index)?;
        if queue.ring.is_some() || !queue.started || !(queue.enabled || enabled) || queue.broken.is_some() {
            return Ok(());
        }
        let Some(addresses) = queue.addresses else { return Ok(()) };
        let VringAddresses { descriptors, used, available, .. } = addresses;
        let places = Places { size: queue.size, descriptors, used, available };
        match Ring::new(&memory, places, queue.base, features) {
            Ok(ring) => queue.ring = Some(ring),
            Err(_) if memory.is_empty() => {}
            Err(why) => queue.fail(why),
        }
        Ok(())
    }
}

/// Nobody waits for a front end: its files are event counters, whose reads and writes return at once.
fn make_harmless(file: &OwnedFd) -> Option<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};
    use std::os::fd::AsRawFd;
    let kind = readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new()).ok()?;
    if kind.as_bytes() != b"anon_inode:[eventfd]" {
        return None;
    }
    let flags = fcntl_getfl(file).ok()?;
    fcntl_setfl(file, flags | OFlags::NONBLOCK).ok()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_all_rings_of_a_connection_wait_is_one_sum() {
        let mut backend = Backend::new(UnixStream::pair().unwrap().0);
        assert!(backend.queue(3).is_ok());
        backend.reset();
        let begin = Instant::now();
        let mut most = Vec::new();
        for queue in &backend.queues {
            most.push(queue.waited.lock().unwrap().add(begin, Waited::MOST / 3));
        }
        assert_eq!(most, [false, false, false, true]);
        let later = begin + Waited::PERIOD + Duration::from_secs(1);
        assert!(!backend.queues[0].waited.lock().unwrap().add(later, Waited::MOST));
    }
    #[test]
    fn who_is_kept_from_its_cpu_was_not_made_to_wait() {
        let (mut waited, begin) = (Waited::default(), Instant::now());
        let long = Duration::from_secs(1);
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert!(waited.looks(begin));
        assert!((0..9).all(|second| !waited.judge(at(second), long, Some(false))));
        // Stopped and continued, once.
        assert!(!waited.judge(at(9), long, Some(true)));
        assert!(waited.judge(at(10), Waited::LITTLE, Some(true)));
        // Where nothing is slow nobody looks, until something is.
        assert!(waited.looks(at(20)) && !waited.looks(at(22)));
        assert!(!waited.judge(at(30), long, None) && waited.looks(at(31)));
    }

    #[test]
    fn who_makes_others_wait_is_found() {
        let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let reader = full.try_clone().unwrap();
        let mut queue = Queue { call: Some(full.try_clone().unwrap()), ..Queue::default() };
        assert_eq!(queue.call(), Ok(()));
        let mut round = || {
            rustix::io::read(&reader, &mut [0; 8]).unwrap();
            rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            let other = reader.try_clone().unwrap();
            let reads = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                rustix::io::read(&other, &mut [0; 8]).unwrap();
            });
            let result = queue.call();
            reads.join().unwrap();
            result
        };
        assert_eq!(round(), Ok(()));
        assert_eq!(round(), Err(ring::Error::Call));
    }
}
