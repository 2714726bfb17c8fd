//! A network card whose frames are carried by another process: a switch of yado's, or any vhost-user back end.
//!
//! The card's buffers are lent to the back end, which reads and writes guest RAM itself; this thread only passes on which buffers, and
//! what came back. So there is one copy between two guests, and still every chain is checked, and every write noted, here.
//!
//! The back end is *away*, *connected*, or *running* (it has the rings of the driver's current session). When it goes away it is looked for
//! twice a second; what it had to send is lost, and what it had to fill waits for the next.

use crate::config::BackEnd;
use memory::GuestMemory;
use net::Bell;
use net::vhost::{Frontend, GuestRegion, feature};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio::{Lending, Loan, Net};

/// Entries of the rings that the back end sees: more than the card's own, since tables of descriptors are spread out.
const RING_SIZE: u16 = 4096;
/// How often a back end that is away is looked for.
const SEARCH_PERIOD: Duration = Duration::from_millis(500);
/// How long the first one may take.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long one that is there again may take to let the card in: who waits for it hears neither a reset nor the machine's end.
const ENTRY_MAX: Duration = Duration::from_secs(1);
/// Buffers that are passed on before the other direction has its turn.
const BURST: usize = 256;

/// Why a card has no back end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The switch says no, or is not there.
    #[error(transparent)]
    Switch(#[from] net::switch::control::Error),
    /// The connection failed.
    #[error("cannot use the vhost-user back end {place}: {source}")]
    BackEnd {
        /// Which.
        place: String,
        /// Why.
        source: net::vhost::Error,
    },
    /// Guest RAM is nobody else's.
    #[error("this guest's RAM cannot be shared with a back end")]
    Private,
}

impl BackEnd {
    /// Connects, for so many rings.
    pub(crate) fn connect(&self, rings: u16) -> Result<Frontend, Error> {
        self.connect_within(rings, CONNECT_MAX)
    }

    fn connect_within(&self, rings: u16, wait: Duration) -> Result<Frontend, Error> {
        let wrong = |source| Error::BackEnd { place: self.to_string(), source };
        match self {
            Self::Switch { control, port, spec } => {
                let request =
                    net::switch::control::Request::Attach { name: port.clone(), spec: (**spec).clone() };
                let (_, stream) = net::switch::control::open_within(control, &request, wait)?;
                Frontend::new_within(stream, rings, RING_SIZE, wait).map_err(wrong)
            }
            Self::Socket(path) => Frontend::connect_within(path, rings, RING_SIZE, wait).map_err(wrong),
        }
    }
}

/// What of a ring is with nobody's ring: buffers that found no room, and those that a back end left behind.
#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Loan>,
    /// Those with the back end, by token.
    posted: Vec<Option<Loan>>,
}

impl Lane {
    fn keep(&mut self, loan: Loan) {
        let place = loan.token as usize;
        if self.posted.len() <= place {
            self.posted.resize(place.saturating_add(1), None);
        }
        if let Some(slot) = self.posted.get_mut(place) {
            *slot = Some(loan);
        }
    }
}

/// Carries one card's frames.
pub(crate) struct Carrier {
    card: Arc<Mutex<Net>>,
    memory: GuestMemory,
    back_end: BackEnd,
    front: Option<Frontend>,
    /// The session that runs.
    running: Option<Lending>,
    /// The card is no bus master for a while: the back end has stopped, and all that it had is still the session's.
    suspended: bool,
    lanes: Vec<Lane>,
    rings: u16,
    loans: Vec<Loan>,
    returns: Vec<(u32, u32)>,
    /// What was said last of a back end that is away.
    told: Option<String>,
}

impl Carrier {
    /// Takes over a connection that was made for `rings` rings.
    pub(crate) fn new(
        card: Arc<Mutex<Net>>,
        memory: GuestMemory,
        back_end: BackEnd,
        front: Frontend,
        rings: u16,
    ) -> Result<Self, Error> {
        if memory.file().is_none() {
            return Err(Error::Private);
        }
        let lanes = (0..rings).map(|_| Lane::default()).collect();
        let (loans, returns) = (Vec::new(), Vec::new());
        Ok(Self {
            card,
            memory,
            back_end,
            front: Some(front),
            running: None,
            suspended: false,
            lanes,
            rings,
            loans,
            returns,
            told: None,
        })
    }

    fn card(&self) -> MutexGuard<'_, Net> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves until the bell is closed. `tell` hears why the back end is away, why it does not come back, and (nothing) that it is back.
    pub(crate) fn serve(mut self, bell: &Bell, tell: &dyn Fn(Option<String>)) {
        let mut search_at = Instant::now();
        loop {
            if bell.closed() {
                self.leave();
                return;
            }
            bell.answer();
            let state = self.card().lending();
            let connected = self.front.is_some();
            if let Some(running) = self.running {
                if state.recall || running.session != state.session {
                    self.stop();
                } else if !state.live {
                    self.suspend();
                }
            }
            if connected && self.front.is_none() {
                self.tell(format!("{}: it does not stop; it is looked for", self.back_end), tell);
            }
            let worked = if state.recall {
                self.forget();
                Ok(())
            } else {
                self.work(state)
            };
            if self.running.is_some() && worked.is_ok() && self.told.take().is_some() {
                tell(None);
            }
            // At once the first time, and then no more often than that: a back end may let one in and break off again and again.
            if worked.is_ok() && self.front.is_none() && Instant::now() >= search_at {
                let found = self.back_end.connect_within(self.rings, ENTRY_MAX);
                search_at = Instant::now().checked_add(SEARCH_PERIOD).unwrap_or(search_at);
                match found {
                    Ok(front) => {
                        self.front = Some(front);
                        continue;
                    }
                    Err(why) => self.tell(why.to_string(), tell),
                }
            }
            if let Err(why) = worked.and_then(|()| self.sleep(bell)) {
                self.tell(format!("{}: {why}; it is looked for", self.back_end), tell);
                self.lose();
            }
        }
    }

    /// Says something of a back end that is away, once.
    fn tell(&mut self, what: String, tell: &dyn Fn(Option<String>)) {
        if self.told.as_ref() != Some(&what) {
            tell(Some(what.clone()));
            self.told = Some(what);
        }
    }

    /// Starts what is to run, and passes buffers both ways.
    fn work(&mut self, state: Lending) -> Result<(), net::vhost::Error> {
        if self.front.is_none() || !state.live {
            return Ok(());
        }
        if self.running.is_none() {
            self.start(state)?;
        } else if self.running.is_some_and(|running| running.pairs != state.pairs) {
            self.running = Some(state);
            self.enable(state)?;
        }
        // Rings that the driver has switched off still have what was on its way.
        for ring in 0..self.rings {
            self.collect(ring)?;
            if ring < state.pairs.saturating_mul(2) || self.owes(ring) {
                self.lend(state.session, ring);
            }
        }
        Ok(())
    }

    /// Whether a ring has frames of the guest's that are not sent yet.
    fn owes(&self, number: u16) -> bool {
        let sends = number & 1 == 1;
        let lane = self.lanes.get(usize::from(number)).filter(|_| sends);
        lane.is_some_and(|lane| !lane.waiting.is_empty() || lane.posted.iter().any(Option::is_some))
    }

    fn start(&mut self, state: Lending) -> Result<(), net::vhost::Error> {
        if std::mem::take(&mut self.suspended) {
            for ring in 0..self.rings {
                self.collect(ring)?;
            }
        }
        let Some(front) = &mut self.front else { return Ok(()) };
        let Some(file) = self.memory.file() else { return Ok(()) };
        // The guest's driver relies on what was there when it began.
        if state.features & feature::OF_BACK_ENDS & !front.offered() != 0 {
            return Err(net::vhost::Error::Protocol(
                "it does less than the one before it, on which the guest relies",
            ));
        }
        let regions: Vec<GuestRegion<'_>> = self
            .memory
            .regions()
            .iter()
            .filter_map(|region| {
                let offset = self.memory.file_offset(region.base)?;
                Some(GuestRegion { guest: region.base, len: region.len, file, offset })
            })
            .collect();
        front.start(state.features, &regions, self.rings)?;
        self.running = Some(state);
        // What another back end was to fill, this one may.
        for lane in &mut self.lanes {
            let left = lane.posted.iter_mut().filter_map(Option::take);
            lane.waiting.extend(left);
        }
        self.enable(state)
    }

    fn enable(&mut self, state: Lending) -> Result<(), net::vhost::Error> {
        for ring in 0..self.rings {
            // What the guest has sent before it switched a ring off is sent.
            let wanted = ring < state.pairs.saturating_mul(2) || self.owes(ring);
            let Some(front) = &mut self.front else { return Ok(()) };
            front.enable(ring, wanted)?;
        }
        Ok(())
    }

    /// Passes what the driver has made available to the back end, as far as there is room.
    fn lend(&mut self, session: u64, number: u16) {
        let Some(lane) = self.lanes.get_mut(usize::from(number)) else { return };
        let Some(ring) = self.front.as_mut().and_then(|front| front.ring(number)) else { return };
        let mut broken = Vec::new();
        loop {
            while let Some(loan) = lane.waiting.pop_front() {
                if loan.segments.len() >= usize::from(RING_SIZE) {
                    broken.push((loan.token, 0));
                } else if ring.post(loan.token, &loan.segments, number & 1 == 0) {
                    lane.keep(loan);
                } else {
                    lane.waiting.push_front(loan);
                    break;
                }
            }
            if !lane.waiting.is_empty() {
                break;
            }
            let mut card = self.card.lock().unwrap_or_else(PoisonError::into_inner);
            card.lend(session, number, BURST, &mut self.loans);
            drop(card);
            if self.loans.is_empty() {
                break;
            }
            lane.waiting.extend(self.loans.drain(..));
        }
        ring.publish();
        if !broken.is_empty() {
            self.card().give_back(number, &broken);
        }
    }

    /// Gives what came back to the driver.
    fn collect(&mut self, number: u16) -> Result<(), net::vhost::Error> {
        let Some(lane) = self.lanes.get_mut(usize::from(number)) else { return Ok(()) };
        let Some(ring) = self.front.as_mut().and_then(|front| front.ring(number)) else { return Ok(()) };
        self.returns.clear();
        let result = loop {
            match ring.collect() {
                Ok(Some((token, written))) => {
                    if let Some(slot) = lane.posted.get_mut(token as usize) {
                        *slot = None;
                    }
                    self.returns.push((token, written));
                }
                Ok(None) => break Ok(()),
                Err(why) => break Err(why),
            }
        };
        if !self.returns.is_empty() {
            let returns = std::mem::take(&mut self.returns);
            self.card().give_back(number, &returns);
            self.returns = returns;
        }
        result
    }

    /// Waits until there is something to do.
    fn sleep(&mut self, bell: &Bell) -> Result<(), net::vhost::Error> {
        let mut more = false;
        if self.running.is_some()
            && let Some(front) = &mut self.front
        {
            for number in 0..self.rings {
                more |= front.ring(number).is_some_and(|ring| ring.listen());
            }
        }
        if more || !bell.doze() {
            return Ok(());
        }
        let result = {
            let mut files = vec![PollFd::new(bell, PollFlags::IN)];
            if let Some(front) = &self.front {
                files.push(PollFd::new(front, PollFlags::IN));
                files.extend(
                    front.rings().iter().map(|ring| PollFd::from_borrowed_fd(ring.call(), PollFlags::IN)),
                );
            }
            let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(SEARCH_PERIOD.subsec_nanos()) };
            let wait = self.front.is_none().then_some(&wait);
            let result = poll(&mut files, wait);
            let spoke = files.get(1).is_some_and(|file| !file.revents().is_empty());
            let called: Vec<bool> = files.iter().skip(2).map(|file| !file.revents().is_empty()).collect();
            result.map(|_| (spoke, called))
        };
        bell.wake();
        let Ok((spoke, called)) = result else { return Ok(()) };
        let Some(front) = &mut self.front else { return Ok(()) };
        for (ring, _) in front.rings().iter().zip(called).filter(|(_, called)| *called) {
            ring.clear_call();
        }
        if spoke && !front.alive() {
            return Err(net::vhost::Error::Closed);
        }
        Ok(())
    }

    /// The driver's session is over: the back end gives everything up.
    fn stop(&mut self) {
        self.halt();
        self.forget();
    }

    /// The session goes on, but its memory is not to be used now.
    fn suspend(&mut self) {
        self.halt();
        self.suspended = self.front.is_some();
    }

    fn halt(&mut self) {
        self.running = None;
        let stopped = self.front.as_mut().is_none_or(|front| front.stop().is_ok());
        if !stopped {
            self.front = None;
        }
    }

    /// Nobody has buffers of the session that is over.
    fn forget(&mut self) {
        self.suspended = false;
        self.lanes.iter_mut().for_each(|lane| *lane = Lane::default());
        self.card().recalled();
    }

    /// The back end is gone. What it was to send is lost, what it was to fill waits.
    fn lose(&mut self) {
        self.suspended = false;
        self.front = None;
        self.running = None;
        for number in (1..self.rings).step_by(2) {
            let Some(lane) = self.lanes.get_mut(usize::from(number)) else { continue };
            let posted = lane.posted.iter_mut().filter_map(Option::take);
            let tokens: Vec<(u32, u32)> =
                posted.chain(lane.waiting.drain(..)).map(|loan| (loan.token, 0)).collect();
            if !tokens.is_empty() {
                self.card().give_back(number, &tokens);
            }
        }
    }

    /// The machine ends.
    fn leave(&mut self) {
        if self.running.is_some() {
            self.stop();
        } else {
            // Whoever waits for a reset to be over does not wait for ever.
            self.forget();
        }
    }
}

#[cfg(test)]
mod test;
