//! Which of the cards behind the guest's has which address (RFC 2131, 4.3.1).
//!
//! The guest's own address, to which forwards and other guests' packets go, belongs to the card that is seen to use it, else to the first
//! that asks: that is not always the guest's card, since a bridge or a bond in front of it has an address of its own. Others get the
//! address that they ask for, if nobody has it: a gateway that is made anew, as after a restore, knows nobody, and they keep what they
//! have.

use super::config::Network;
use std::net::Ipv4Addr;

/// The most cards.
pub const LEASES_MAX: usize = 200;

/// Who has which address.
#[derive(Debug, Default)]
pub struct Leases(Vec<([u8; 6], Ipv4Addr)>);

impl Leases {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn is_free(&self, address: Ipv4Addr) -> bool {
        self.0.iter().all(|(_, other)| *other != address)
    }

    /// The address of a card; `None` if there are too many of them.
    pub fn lend(&mut self, mac: [u8; 6], wanted: Option<Ipv4Addr>, network: &Network) -> Option<Ipv4Addr> {
        if let Some((_, has)) = self.0.iter().find(|(other, _)| *other == mac) {
            return Some(*has);
        }
        if self.0.len() >= LEASES_MAX {
            return None;
        }
        let lendable = |address: &Ipv4Addr| {
            let is_host = !matches!(address.octets(), [.., 0 | 255]);
            is_host && network.is_guest((*address).into()) && self.is_free(*address)
        };
        let first = u32::from(network.guest4);
        let mut others = (first..first.saturating_add(253)).map(Ipv4Addr::from);
        let lent = wanted.filter(&lendable).or_else(|| others.find(&lendable))?;
        self.0.push((mac, lent));
        Some(lent)
    }

    /// A card uses an address.
    pub fn seen(&mut self, mac: [u8; 6], address: Ipv4Addr) {
        if self.is_free(address) {
            self.0.retain(|(other, _)| *other != mac);
            self.0.push((mac, address));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn card(number: u8) -> [u8; 6] {
        [2, 7, 0, 0, 0, number]
    }

    fn at(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, last)
    }

    #[test]
    fn who_asks_first_is_the_guest() {
        let (mut leases, network) = (Leases::default(), Network::choose(""));
        let none = Some(Ipv4Addr::UNSPECIFIED);
        assert_eq!(leases.lend(card(1), none, &network), Some(at(2)), "a bridge in front of the card");
        assert_eq!(leases.lend(OWN, none, &network), Some(at(3)));
        assert_eq!(leases.lend(card(1), Some(at(9)), &network), Some(at(2)));
        // But not if it has the address already.
        let mut leases = Leases::default();
        leases.seen(OWN, at(2));
        assert_eq!(leases.lend(card(1), none, &network), Some(at(3)));
        leases.seen(card(1), at(2));
        assert_eq!(leases.lend(OWN, Some(at(2)), &network), Some(at(2)));
    }

    #[test]
    fn all_keep_what_they_have_when_the_gateway_is_another_one() {
        let (mut leases, network) = (Leases::default(), Network::choose(""));
        assert_eq!(leases.lend(card(2), Some(at(4)), &network), Some(at(4)));
        assert_eq!(leases.lend(card(1), Some(at(3)), &network), Some(at(3)));
        assert_eq!(leases.lend(OWN, Some(at(2)), &network), Some(at(2)));
        for wanted in [at(4), at(1), at(0), at(255), Ipv4Addr::new(10, 78, 0, 7)] {
            let lent =
                leases.lend([2, 8, wanted.octets()[1], 0, 0, wanted.octets()[3]], Some(wanted), &network);
            assert!(lent.is_some_and(|lent| lent != wanted && lent > at(4)), "{wanted}: {lent:?}");
        }
    }

    #[test]
    fn there_are_not_too_many() {
        let (mut leases, network) = (Leases::default(), Network::choose(""));
        let lent: std::collections::HashSet<_> =
            (0..=255).filter_map(|number| leases.lend(card(number), None, &network)).collect();
        assert_eq!((lent.len(), leases.len()), (LEASES_MAX, LEASES_MAX));
    }
}
