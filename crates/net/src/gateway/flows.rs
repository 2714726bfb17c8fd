//! Tables of flows: bounded, found by key or by number, with timers.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::time::Instant;

/// What a token is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Bell,
    Tcp,
    Udp,
    Ping,
    Listener,
    Peers,
}

/// Names one thing that has events: never another one, even in the same place of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token {
    pub kind: Kind,
    pub index: u32,
    generation: u32,
}

impl Token {
    pub const fn new(kind: Kind, index: u32) -> Self {
        Self { kind, index, generation: 0 }
    }

    /// Of a kind that has one member.
    pub const fn only(kind: Kind) -> Self {
        Self::new(kind, 0)
    }

    /// As the kernel keeps it.
    pub fn encode(self) -> u64 {
        let kind = match self.kind {
            Kind::Bell => 0u64,
            Kind::Tcp => 1,
            Kind::Udp => 2,
            Kind::Ping => 3,
            Kind::Listener => 4,
            Kind::Peers => 5,
        };
        kind << 56 | u64::from(self.generation & 0xff_ffff) << 32 | u64::from(self.index)
    }

    pub fn decode(bits: u64) -> Self {
        let kind = match bits >> 56 {
            0 => Kind::Bell,
            1 => Kind::Tcp,
            2 => Kind::Udp,
            3 => Kind::Ping,
            4 => Kind::Listener,
            _ => Kind::Peers,
        };
        Self { kind, index: bits as u32, generation: (bits >> 32) as u32 & 0xff_ffff }
    }
}

struct Place<K, T> {
    generation: u32,
    flow: Option<(K, T)>,
}

/// A table of at most so many flows.
pub struct Flows<K, T> {
    kind: Kind,
    places: Vec<Place<K, T>>,
    free: Vec<u32>,
    by_key: HashMap<K, Token>,
    max: usize,
}

impl<K: Hash + Eq + Clone, T> Flows<K, T> {
    pub fn new(kind: Kind, max: usize) -> Self {
        Self { kind, places: Vec::new(), free: Vec::new(), by_key: HashMap::new(), max }
    }

    /// The most flows.
    pub fn max(&self) -> usize {
        self.max
    }

    pub fn is_full(&self) -> bool {
        self.by_key.len() >= self.max
    }

    pub fn find(&self, key: &K) -> Option<Token> {
        self.by_key.get(key).copied()
    }

    /// Adds a flow made from its token; `None` if the table is full or has the key.
    pub fn insert(&mut self, key: K, flow: T) -> Option<Token> {
        if self.is_full() || self.by_key.contains_key(&key) {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.places.len()).ok()?;
                self.places.push(Place { generation: 0, flow: None });
                index
            }
        };
        let place = self.places.get_mut(index as usize)?;
        place.generation = place.generation.wrapping_add(1) & 0xff_ffff;
        place.flow = Some((key.clone(), flow));
        let token = Token { kind: self.kind, index, generation: place.generation };
        self.by_key.insert(key, token);
        Some(token)
    }

    pub fn get_mut(&mut self, token: Token) -> Option<(&K, &mut T)> {
        let place = self.places.get_mut(token.index as usize)?;
        if place.generation != token.generation {
            return None;
        }
        place.flow.as_mut().map(|(key, flow)| (&*key, flow))
    }

    /// Whether what the token names is there.
    pub fn has(&self, token: Token) -> bool {
        let place = self.places.get(token.index as usize);
        place.is_some_and(|place| place.generation == token.generation && place.flow.is_some())
    }

    pub fn remove(&mut self, token: Token) -> Option<(K, T)> {
        let place = self.places.get_mut(token.index as usize)?;
        if place.generation != token.generation {
            return None;
        }
        let (key, flow) = place.flow.take()?;
        self.by_key.remove(&key);
        self.free.push(token.index);
        Some((key, flow))
    }

    /// All flows.
    pub fn iter(&self) -> impl Iterator<Item = (Token, &K, &T)> {
        (0u32..).zip(&self.places).filter_map(|(index, place)| {
            let (key, flow) = place.flow.as_ref()?;
            Some((Token { kind: self.kind, index, generation: place.generation }, key, flow))
        })
    }
}

/// When flows want to be looked at. A flow has at most one entry, which may come too early, never too late.
#[derive(Debug, Default)]
pub struct Timers(BTreeSet<(Instant, Token)>);

impl Timers {
    /// Makes sure that `token` is looked at by `at`; `set` remembers the entry.
    pub fn by(&mut self, at: Instant, token: Token, set: &mut Option<Instant>) {
        if set.is_some_and(|earlier| earlier <= at) {
            return;
        }
        self.cancel(token, set);
        self.0.insert((at, token));
        *set = Some(at);
    }

    pub fn cancel(&mut self, token: Token, set: &mut Option<Instant>) {
        if let Some(at) = set.take() {
            self.0.remove(&(at, token));
        }
    }

    /// The next entry.
    pub fn next(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Takes an entry that is due. Its owner forgets it.
    pub fn due(&mut self, now: Instant) -> Option<Token> {
        let first = self.0.first().filter(|(at, _)| *at <= now).copied()?;
        self.0.remove(&first);
        Some(first.1)
    }
}

/// Flows by when they were used last: which that is longest ago is found without looking at all of them.
#[derive(Debug, Default)]
pub struct Ages(BTreeSet<(Instant, Token)>);

impl Ages {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn insert(&mut self, at: Instant, token: Token) {
        self.0.insert((at, token));
    }

    pub fn remove(&mut self, at: Instant, token: Token) {
        self.0.remove(&(at, token));
    }

    /// The one that was used longest ago. `used` says of a flow when that was, and remembers it: flows that were used since they were put
    /// in their places go to the places that they have now, once for all the times.
    pub fn oldest(&mut self, mut used: impl FnMut(Token) -> Option<Instant>) -> Option<Token> {
        loop {
            let first = self.0.first().copied()?;
            match used(first.1) {
                Some(at) if at > first.0 => {
                    self.0.remove(&first);
                    self.0.insert((at, first.1));
                }
                _ => return Some(first.1),
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #[test]
        fn a_token_names_one_flow_only(
            actions in prop::collection::vec((any::<bool>(), 0u8..12), 0..200)
        ) {
            let mut flows: Flows<u8, u32> = Flows::new(Kind::Udp, 8);
            let mut model = HashMap::new();
            let mut old = vec![];
            for (number, (add, key)) in (0u32..).zip(actions) {
                if add {
                    let token = flows.insert(key, number);
                    prop_assert_eq!(token.is_some(), model.len() < 8 && !model.contains_key(&key));
                    if let Some(token) = token {
                        prop_assert_eq!(Token::decode(token.encode()), token);
                        model.insert(key, (token, number));
                    }
                } else if let Some((token, value)) = model.remove(&key) {
                    prop_assert_eq!(flows.remove(token), Some((key, value)));
                    old.push(token);
                }
                for (key, (token, value)) in &model {
                    prop_assert_eq!(flows.find(key), Some(*token));
                    prop_assert_eq!(flows.get_mut(*token).map(|(key, value)| (*key, *value)), Some((*key, *value)));
                }
                prop_assert!(old.iter().all(|&token| flows.get_mut(token).is_none()));
                prop_assert_eq!(flows.by_key.len(), model.len());
            }
        }
    }

    #[test]
    fn timers_come_in_order_and_once() {
        let (mut timers, now) = (Timers::default(), Instant::now());
        let token = |index| Token::new(Kind::Tcp, index);
        let after = |ms| now + Duration::from_millis(ms);
        let (mut a, mut b) = (None, None);
        timers.by(after(5), token(1), &mut a);
        timers.by(after(3), token(2), &mut b);
        timers.by(after(9), token(2), &mut b);
        assert_eq!((timers.next(), b), (Some(after(3)), Some(after(3))));
        timers.by(after(1), token(1), &mut a);
        assert_eq!(timers.due(after(4)), Some(token(1)));
        assert_eq!(timers.due(after(4)), Some(token(2)));
        assert_eq!(timers.due(after(40)), None);
    }
}
