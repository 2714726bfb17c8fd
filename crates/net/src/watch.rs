//! Looking at the frames of a guest's cards while they pass: captures for people, whatever carries the frames.
//!
//! A [`Watch`] belongs to a guest, a [`View`] to somebody who looks. Nobody who looks can make a card wait: what a view has no room
//! for is counted and not seen. While nobody looks, a card pays for one load.
//!
//! Lock order: the list of views, then one view.

use crate::batch::Batch;
use crate::card::Card;
use crate::switch::capture::{Direction, Pcapng};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The most who look at a time.
const VIEWS_MAX: usize = 8;

/// Why there is no view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No card whose frames pass here.
    #[error("this guest has no card whose frames its own process carries: a switch or a back end has them")]
    NoCard,
    /// Too many look.
    #[error("{VIEWS_MAX} captures of this guest run already: end one")]
    Busy,
}

#[derive(Debug)]
struct Shared {
    seen: Mutex<Pcapng>,
    more: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All that can be looked at of one guest.
#[derive(Debug, Default)]
pub struct Watch {
    cards: Mutex<Vec<String>>,
    views: Mutex<Vec<Arc<Shared>>>,
    /// Somebody looks.
    watched: AtomicBool,
}

impl Watch {
    /// Adds a card; answers its number. Cards are added before anybody looks.
    pub fn add(&self, name: String) -> u32 {
        let mut cards = lock(&self.cards);
        cards.push(name);
        u32::try_from(cards.len().saturating_sub(1)).unwrap_or(u32::MAX)
    }

    /// Begins to look: frames are cut after `snap` bytes.
    pub fn open(self: &Arc<Self>, snap: u32) -> Result<View, Error> {
        let cards = lock(&self.cards);
        if cards.is_empty() {
            return Err(Error::NoCard);
        }
        let mut file = Pcapng::new(snap);
        cards.iter().for_each(|name| file.interface(name));
        let shared = Arc::new(Shared { seen: Mutex::new(file), more: Condvar::new() });
        let mut views = lock(&self.views);
        if views.len() >= VIEWS_MAX {
            return Err(Error::Busy);
        }
        views.push(shared.clone());
        self.watched.store(true, Ordering::Release);
        Ok(View { watch: self.clone(), shared })
    }

    /// Whether somebody looks.
    pub fn watched(&self) -> bool {
        self.watched.load(Ordering::Acquire)
    }

    /// A frame passes, now.
    pub fn record(&self, card: u32, direction: Direction, frame: &[u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        for shared in lock(&self.views).iter() {
            lock(&shared.seen).frame(card, at, direction, [frame, &[], &[]], None);
            shared.more.notify_one();
        }
    }
}

/// What somebody sees. Dropping it ends the look.
#[derive(Debug)]
pub struct View {
    watch: Arc<Watch>,
    shared: Arc<Shared>,
}

impl View {
    /// The next bytes of a pcapng file: empty if nothing has passed within `patience`.
    pub fn read(&self, patience: Duration) -> Vec<u8> {
        let empty = |seen: &mut Pcapng| seen.bytes().is_empty();
        let waited = self.shared.more.wait_timeout_while(lock(&self.shared.seen), patience, empty);
        let (mut seen, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let mut bytes = Vec::new();
        seen.take(&mut bytes);
        bytes
    }

    /// Frames that were seen, and frames that found no room.
    pub fn counts(&self) -> (u64, u64) {
        lock(&self.shared.seen).counts()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let mut views = lock(&self.watch.views);
        views.retain(|shared| !Arc::ptr_eq(shared, &self.shared));
        self.watch.watched.store(!views.is_empty(), Ordering::Release);
    }
}

/// A card that is looked at.
#[derive(Debug)]
pub struct Watched<C> {
    card: C,
    watch: Arc<Watch>,
    number: u32,
}

impl<C: Card> Watched<C> {
    /// `card`, seen under `name`.
    pub fn new(card: C, watch: Arc<Watch>, name: String) -> Self {
        let number = watch.add(name);
        Self { card, watch, number }
    }
}

impl<C: Card> Card for Watched<C> {
    fn take(&self, batch: &mut Batch) -> bool {
        let before = batch.len();
        let more = self.card.take(batch);
        if self.watch.watched() {
            for (_, frame) in batch.iter().skip(before) {
                self.watch.record(self.number, Direction::In, frame);
            }
        }
        more
    }

    fn give(&self, batch: &mut Batch) {
        if !self.watch.watched() {
            return self.card.give(batch);
        }
        // Which of them go is known only when they are gone.
        let frames: Vec<Vec<u8>> = batch.iter().map(|(_, frame)| frame.to_vec()).collect();
        self.card.give(batch);
        // Those that stay are in order.
        let mut left = batch.iter().map(|(_, frame)| frame).peekable();
        for frame in &frames {
            if left.next_if(|left| *left == frame.as_slice()).is_none() {
                self.watch.record(self.number, Direction::Out, frame);
            }
        }
    }

    fn give_up(&self, batch: &mut Batch) {
        self.card.give_up(batch);
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        self.card.readiness()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::offload::Offload;
    use crate::switch::capture::BUFFER_MAX;

    /// Sends one frame each time, and takes one of two.
    struct Half;

    impl Card for Half {
        fn take(&self, batch: &mut Batch) -> bool {
            batch.push(Offload::default(), &[b"up, up and away"]);
            false
        }

        fn give(&self, batch: &mut Batch) {
            batch.pop();
        }
    }

    /// Interface, direction, bytes.
    type Packet = (u32, u32, Vec<u8>);

    /// Kinds of blocks, and what the packets among them hold.
    fn blocks(mut bytes: &[u8]) -> (Vec<u32>, Vec<Packet>) {
        let word = |at: &[u8]| u32::from_le_bytes(*at.first_chunk().unwrap());
        let (mut kinds, mut packets) = (vec![], vec![]);
        while !bytes.is_empty() {
            let len = word(&bytes[4..]) as usize;
            let body = &bytes[8..len - 4];
            assert_eq!(word(&bytes[len - 4..]) as usize, len);
            kinds.push(word(bytes));
            if word(bytes) == 6 {
                let size = word(&body[12..]) as usize;
                let options = &body[20 + size.next_multiple_of(4)..];
                assert_eq!(options[..4], [2, 0, 4, 0]);
                packets.push((word(body), word(&options[4..]), body[20..20 + size].to_vec()));
            }
            bytes = &bytes[len..];
        }
        (kinds, packets)
    }

    #[test]
    fn a_view_sees_what_passes_while_it_is_open() {
        let watch = Arc::new(Watch::default());
        assert_eq!(watch.open(100).unwrap_err(), Error::NoCard);
        watch.add("net0".to_owned());
        let card = Watched::new(Half, watch.clone(), "net1".to_owned());
        let mut batch = Batch::new(8, 4096);
        card.take(&mut batch);
        assert!(!watch.watched());
        let view = watch.open(10).unwrap();
        card.take(&mut batch);
        batch.push(Offload::default(), &[b"down, down, down"]);
        batch.clear();
        batch.push(Offload::default(), &[b"first of two...."]);
        batch.push(Offload::default(), &[b"second of two..."]);
        card.give(&mut batch);
        assert_eq!(batch.len(), 1);
        let (kinds, packets) = blocks(&view.read(Duration::ZERO));
        assert_eq!(kinds, [0x0a0d_0d0a, 1, 1, 6, 6]);
        let seen = |direction: u32, bytes: &[u8]| (1, direction, bytes.to_vec());
        assert_eq!(packets, [seen(1, b"up, up and"), seen(2, b"first of t")]);
        assert!(view.read(Duration::from_millis(1)).is_empty());
        card.give(&mut batch);
        assert_eq!((blocks(&view.read(Duration::ZERO)).1.len(), view.counts()), (1, (3, 0)));
        drop(view);
        assert!(!watch.watched());
    }

    #[test]
    fn who_does_not_read_misses_frames_and_holds_nobody_up() {
        let watch = Arc::new(Watch::default());
        watch.add("net0".to_owned());
        let view = watch.open(u32::MAX).unwrap();
        let frame = vec![7; 60_000];
        (0..200).for_each(|_| watch.record(0, Direction::In, &frame));
        let (frames, missed) = view.counts();
        assert!(frames > 100 && missed > 0 && frames + missed == 200, "{frames} {missed}");
        assert!(view.read(Duration::ZERO).len() < BUFFER_MAX + 2 * frame.len());
        watch.record(0, Direction::In, &frame);
        assert_eq!(view.counts().0, frames + 1);
        let others: Vec<_> = (1..VIEWS_MAX).map(|_| watch.open(1).unwrap()).collect();
        assert_eq!(watch.open(1).unwrap_err(), Error::Busy);
        drop(others);
        assert!(watch.watched() && watch.open(1).is_ok());
    }
}
