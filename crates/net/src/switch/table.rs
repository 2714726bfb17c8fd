//! Which address is behind which port: the learning table (IEEE 802.1Q, 8.8).
//!
//! A flat table of buckets, each one cache line with four entries; an address may be in either of two buckets, by a hash that nobody
//! outside can guess. So a look-up costs at most two cache lines whatever guests send. It grows by doubling up to its limit; what
//! finds no room then is not learnt, and its frames are flooded. Entries age: those that are too old are as good as empty.

use std::hash::{BuildHasher, RandomState};

/// Entries of a bucket.
const WAYS: usize = 4;
/// Buckets at the start: 16 KiB.
const BUCKETS_MIN: usize = 256;
/// Addresses that a table has room for unless said otherwise.
pub const ADDRESSES_MAX: usize = 65_536;
/// Seconds after which an address that was not seen is forgotten (802.1Q, table 8-6).
pub const AGEING_SECONDS: u32 = 300;

/// A port's number.
pub type PortNumber = u16;

/// An address in a VLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// Of an address in a VLAN.
    #[inline]
    pub fn new(address: [u8; 6], vlan: u16) -> Self {
        let [a, b, c, d, e, f] = address;
        Self(u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | u64::from(vlan) << 48)
    }

    /// The address.
    pub fn address(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// The VLAN.
    pub fn vlan(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// How sure it is that an address is behind a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The entry is empty.
    None,
    /// Somebody said so.
    Said,
    /// Somebody said so who is believed: who is not cannot move it.
    Believed,
    /// It was configured: it neither ages nor moves.
    Fixed,
}

/// What is known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Of what.
    pub key: Key,
    /// Behind which port.
    pub port: PortNumber,
    /// How sure that is.
    pub standing: Standing,
    /// Second at which it was seen last.
    pub seen: u32,
}

impl Entry {
    /// It was configured.
    #[inline]
    pub fn fixed(&self) -> bool {
        self.standing == Standing::Fixed
    }

    #[inline]
    fn used(&self) -> bool {
        self.standing != Standing::None
    }
}

const EMPTY: Entry = Entry { key: Key(0), port: 0, standing: Standing::None, seen: 0 };

/// Who says that an address is behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speaker {
    /// Its number.
    pub port: PortNumber,
    /// It is trusted, or was given the address.
    pub believed: bool,
    /// It may have another address.
    pub may_add: bool,
}

#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Bucket([Entry; WAYS]);

/// What became of an address that was to be learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learnt {
    /// It was known there.
    Known,
    /// It is new.
    New,
    /// It was behind this port before.
    Moved(PortNumber),
    /// It belongs to another port: for good, or for as long as that one, which is believed, goes on using it.
    Fixed(PortNumber),
    /// There is no room.
    Full,
}

/// The table.
#[derive(Debug)]
pub struct Table {
    buckets: Vec<Bucket>,
    count: usize,
    count_max: usize,
    ageing: u32,
    random: u64,
    version: u64,
    /// The second in which entries that are too old were removed last.
    expired: Option<u32>,
}

impl Table {
    /// An empty table for at most so many addresses.
    pub fn new(count_max: usize, ageing_seconds: u32) -> Self {
        let random = RandomState::new().hash_one(0u8);
        let buckets = vec![Bucket([EMPTY; WAYS]); BUCKETS_MIN];
        let count_max = count_max.max(1);
        Self { buckets, count: 0, count_max, ageing: ageing_seconds, random, version: 0, expired: None }
    }

    /// Another number whenever an address has come, moved or gone otherwise than by age. Who remembers what he found may go on believing it
    /// within the same second and version.
    #[inline]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Number of entries, those among them that are too old.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The two buckets of a key: both ends of a product of products (as in MurmurHash3's last step), with a start that nobody knows.
    #[inline]
    fn places(&self, key: Key) -> (usize, usize) {
        let mut mixed = key.0 ^ self.random;
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        mixed ^= mixed >> 33;
        let bits = self.buckets.len().trailing_zeros();
        let mask = self.buckets.len().wrapping_sub(1);
        (mixed as usize & mask, (mixed >> 1).wrapping_shr(63u32.wrapping_sub(bits)) as usize & mask)
    }

    #[inline]
    fn old(&self, entry: &Entry, now: u32) -> bool {
        !entry.fixed() && now.wrapping_sub(entry.seen) > self.ageing
    }

    #[inline]
    fn position(&self, key: Key) -> Option<(usize, usize)> {
        let (first, second) = self.places(key);
        for place in [first, second] {
            let Some(bucket) = self.buckets.get(place) else { continue };
            for (way, entry) in bucket.0.iter().enumerate() {
                if entry.key == key && entry.used() {
                    return Some((place, way));
                }
            }
        }
        None
    }

    fn entry(&self, at: (usize, usize)) -> Option<&Entry> {
        self.buckets.get(at.0)?.0.get(at.1)
    }

    fn entry_mut(&mut self, at: (usize, usize)) -> Option<&mut Entry> {
        self.buckets.get_mut(at.0)?.0.get_mut(at.1)
    }

    /// The port behind which an address is.
    #[inline]
    pub fn find(&self, key: Key, now: u32) -> Option<PortNumber> {
        let entry = self.entry(self.position(key)?)?;
        (!self.old(entry, now)).then_some(entry.port)
    }

    /// An address was seen behind a port. The port of an entry that was too old is in `lost`.
    #[inline]
    pub fn learn(&mut self, key: Key, speaker: Speaker, now: u32, lost: &mut Vec<PortNumber>) -> Learnt {
        let Speaker { port, believed, may_add } = speaker;
        let standing = if believed { Standing::Believed } else { Standing::Said };
        if let Some(at) = self.position(key) {
            let (ageing, version) = (self.ageing, self.version.wrapping_add(1));
            let Some(entry) = self.entry_mut(at) else { return Learnt::Full };
            if entry.port == port {
                // Written only once a second, so that the line stays shared with nobody and clean.
                if entry.seen != now && !entry.fixed() {
                    entry.seen = now;
                }
                return Learnt::Known;
            }
            let old = now.wrapping_sub(entry.seen) > ageing;
            if entry.fixed() || entry.standing == Standing::Believed && !believed && !old {
                return Learnt::Fixed(entry.port);
            }
            if !may_add {
                return Learnt::Full;
            }
            let before = entry.port;
            *entry = Entry { key, port, standing, seen: now };
            self.version = version;
            if old {
                lost.push(before);
                return Learnt::New;
            }
            return Learnt::Moved(before);
        }
        if !may_add {
            return Learnt::Full;
        }
        self.add(Entry { key, port, standing, seen: now }, now, lost)
    }

    /// Makes an address a port's for good.
    pub fn fix(&mut self, key: Key, port: PortNumber, now: u32, lost: &mut Vec<PortNumber>) -> Learnt {
        let entry = Entry { key, port, standing: Standing::Fixed, seen: now };
        self.version = self.version.wrapping_add(1);
        match self.position(key).and_then(|at| self.entry_mut(at)) {
            Some(other) if other.fixed() && other.port != port => Learnt::Fixed(other.port),
            Some(other) => {
                let before = std::mem::replace(other, entry).port;
                if before == port { Learnt::Known } else { Learnt::Moved(before) }
            }
            None => self.add(entry, now, lost),
        }
    }

    #[cold]
    fn add(&mut self, entry: Entry, now: u32, lost: &mut Vec<PortNumber>) -> Learnt {
        // Half full, with four ways and two choices: practically every address finds a place.
        let room = self.buckets.len().saturating_mul(WAYS);
        if self.count >= room / 2 && self.count < self.count_max {
            self.grow(now, lost);
        }
        if self.count >= self.count_max {
            self.expire(now, lost);
        }
        if self.count >= self.count_max {
            return Learnt::Full;
        }
        if !self.place(entry, now, lost) {
            return Learnt::Full;
        }
        self.version = self.version.wrapping_add(1);
        Learnt::New
    }

    fn place(&mut self, entry: Entry, now: u32, lost: &mut Vec<PortNumber>) -> bool {
        let (first, second) = self.places(entry.key);
        let order = if self.used(first) <= self.used(second) { [first, second] } else { [second, first] };
        if order.iter().any(|place| self.put(*place, entry, now, lost)) {
            return true;
        }
        // Somebody in the way may have room in his other bucket.
        for place in order {
            let Some(Bucket(entries)) = self.buckets.get(place).copied() else { continue };
            for (way, other) in entries.into_iter().enumerate() {
                let (one, two) = self.places(other.key);
                let elsewhere = if one == place { two } else { one };
                if elsewhere != place && self.used(elsewhere) < WAYS && self.put(elsewhere, other, now, lost)
                {
                    if let Some(slot) = self.entry_mut((place, way)) {
                        *slot = entry;
                    }
                    return true;
                }
            }
        }
        false
    }

    fn used(&self, place: usize) -> usize {
        self.buckets.get(place).map_or(WAYS, |bucket| bucket.0.iter().filter(|entry| entry.used()).count())
    }

    /// Puts an entry into a bucket, if it has one that is free or too old.
    fn put(&mut self, place: usize, entry: Entry, now: u32, lost: &mut Vec<PortNumber>) -> bool {
        let ageing = self.ageing;
        let old = |e: &Entry| e.used() && !e.fixed() && now.wrapping_sub(e.seen) > ageing;
        let Some(bucket) = self.buckets.get_mut(place) else { return false };
        let Some(slot) = bucket.0.iter_mut().find(|slot| !slot.used() || old(slot)) else { return false };
        let before = std::mem::replace(slot, entry);
        if before.used() {
            lost.push(before.port);
        } else {
            self.count = self.count.saturating_add(1);
        }
        true
    }

    fn grow(&mut self, now: u32, lost: &mut Vec<PortNumber>) {
        let wanted = self.buckets.len().saturating_mul(2);
        let before = std::mem::replace(&mut self.buckets, vec![Bucket([EMPTY; WAYS]); wanted]);
        (self.count, self.version) = (0, self.version.wrapping_add(1));
        for entry in before.iter().flat_map(|bucket| bucket.0).filter(Entry::used) {
            if self.old(&entry, now) || !self.place(entry, now, lost) {
                lost.push(entry.port);
            }
        }
    }

    /// Removes what is too old; answers whether it was looked for. That means to look at all, so it is done once a second, whatever is
    /// sent: within one nothing grows older.
    pub fn expire(&mut self, now: u32, lost: &mut Vec<PortNumber>) -> bool {
        let ageing = self.ageing;
        let looks = self.expired.replace(now) != Some(now);
        if looks {
            self.retain(|entry| entry.fixed() || now.wrapping_sub(entry.seen) <= ageing, lost);
        }
        looks
    }

    /// Keeps some entries; the ports of the others are in `lost`.
    pub fn retain(&mut self, mut keep: impl FnMut(&Entry) -> bool, lost: &mut Vec<PortNumber>) {
        let before = self.count;
        for slot in self.buckets.iter_mut().flat_map(|bucket| &mut bucket.0) {
            if slot.used() && !keep(slot) {
                lost.push(slot.port);
                *slot = EMPTY;
                self.count = self.count.saturating_sub(1);
            }
        }
        if self.count != before {
            self.version = self.version.wrapping_add(1);
        }
    }

    /// All that is known now.
    pub fn entries(&self, now: u32) -> impl Iterator<Item = &Entry> {
        let all = self.buckets.iter().flat_map(|bucket| &bucket.0);
        all.filter(move |entry| entry.used() && !self.old(entry, now))
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn key(number: u32) -> Key {
        let [a, b, c, d] = number.to_be_bytes();
        Key::new([2, 0, a, b, c, d], 1)
    }

    fn from(port: PortNumber) -> Speaker {
        Speaker { port, believed: false, may_add: true }
    }

    #[test]
    fn a_bucket_is_a_cache_line() {
        assert_eq!(std::mem::size_of::<Bucket>(), 64);
        let key = Key::new([1, 2, 3, 4, 5, 6], 4094);
        assert_eq!((key.address(), key.vlan()), ([1, 2, 3, 4, 5, 6], 4094));
    }

    #[test]
    fn as_many_addresses_as_promised_find_a_place() {
        let mut table = Table::new(ADDRESSES_MAX, 300);
        let mut lost = Vec::new();
        let full = (0..ADDRESSES_MAX as u32)
            .filter(|&number| {
                table.learn(key(number), from((number % 256) as u16), 1, &mut lost) != Learnt::New
            })
            .count();
        assert!(full + lost.len() < 10, "{full} found none, {} were lost", lost.len());
        let found =
            (0..ADDRESSES_MAX as u32).filter(|&n| table.find(key(n), 1) == Some((n % 256) as u16)).count();
        assert!(found > ADDRESSES_MAX * 999 / 1000, "{found}");
        assert_eq!(
            table.learn(key(1 << 20), from(1), 1, &mut lost),
            if full == 0 { Learnt::Full } else { Learnt::New }
        );
        // Once all are too old there is room again.
        assert_eq!(table.learn(key(1 << 21), from(1), 1000, &mut lost), Learnt::New);
        assert_eq!(table.find(key(5), 1000), None);
    }

    #[test]
    fn what_is_fixed_stays() {
        let mut table = Table::new(100, 10);
        let mut lost = Vec::new();
        table.learn(key(1), from(1), 0, &mut lost);
        assert_eq!(table.fix(key(1), 2, 0, &mut lost), Learnt::Moved(1));
        assert_eq!(table.learn(key(1), from(1), 5, &mut lost), Learnt::Fixed(2));
        assert_eq!(table.fix(key(1), 3, 5, &mut lost), Learnt::Fixed(2));
        assert_eq!(table.find(key(1), 1_000_000), Some(2));
        table.retain(|entry| entry.port != 2, &mut lost);
        assert_eq!((table.find(key(1), 5), lost.as_slice(), table.count()), (None, [2].as_slice(), 0));
    }

    #[test]
    fn who_is_believed_keeps_what_it_uses() {
        let mut table = Table::new(100, 10);
        let mut lost = Vec::new();
        let believed = |port| Speaker { believed: true, ..from(port) };
        assert_eq!(table.learn(key(1), from(1), 0, &mut lost), Learnt::New);
        assert_eq!(table.learn(key(1), believed(2), 0, &mut lost), Learnt::Moved(1));
        assert_eq!(table.learn(key(1), from(1), 10, &mut lost), Learnt::Fixed(2));
        assert_eq!(table.learn(key(1), believed(3), 10, &mut lost), Learnt::Moved(2));
        assert_eq!(table.learn(key(1), believed(3), 15, &mut lost), Learnt::Known);
        assert_eq!(table.learn(key(1), from(1), 25, &mut lost), Learnt::Fixed(3));
        assert_eq!(table.learn(key(1), from(1), 26, &mut lost), Learnt::New, "it was silent for too long");
        assert_eq!(lost, [3]);
    }

    #[test]
    fn a_full_table_is_looked_through_once_a_second() {
        let mut table = Table::new(1000, 300);
        let mut lost = Vec::new();
        let (mut looks, mut version) = (0, table.version());
        for number in 0..11_000 {
            table.learn(key(number), from(1), 5 + number / 9000, &mut lost);
            looks += u32::from(number >= 1000 && table.version() != version);
            version = table.version();
        }
        assert_eq!((looks, table.count(), lost.len()), (0, 1000, 0));
        assert!(!table.expire(6, &mut lost) && table.expire(7, &mut lost));
        assert_eq!(table.learn(key(20_000), from(1), 306, &mut lost), Learnt::New);
        assert_eq!((table.count(), lost.len()), (1, 1000), "each is lost once");
    }

    proptest! {
        #[test]
        fn as_a_map_with_dates(actions in prop::collection::vec((0u32..40, 0u16..4, 0u32..4, any::<bool>()), 0..400)) {
            let mut table = Table::new(1000, 5);
            let mut model: HashMap<u32, (u16, u32)> = HashMap::new();
            let mut lost = Vec::new();
            let mut now = 0;
            for (number, port, pass, may_add) in actions {
                now += pass;
                let known = model.get(&number).filter(|(_, seen)| now - seen <= 5).copied();
                prop_assert_eq!(table.find(key(number), now), known.map(|(port, _)| port));
                let result = table.learn(key(number), Speaker { may_add, ..from(port) }, now, &mut lost);
                // An entry that is too old may be there or not: then it is known for its own port.
                let old = model.get(&number).is_some_and(|(at, _)| *at == port) && known.is_none();
                let expected = match known {
                    Some((at, _)) if at == port => Learnt::Known,
                    _ if !may_add => Learnt::Full,
                    Some((at, _)) => Learnt::Moved(at),
                    None => Learnt::New,
                };
                prop_assert!(result == expected || old && result == Learnt::Known, "{:?} {:?}", result, expected);
                if result != Learnt::Full {
                    model.insert(number, (port, now));
                }
            }
            prop_assert_eq!(table.entries(now).count(), model.values().filter(|(_, seen)| now - seen <= 5).count());
        }
    }
}
