//! `--net` and `-p`: the guest's network cards.

use crate::arguments::{Net, NetCard, NetKind, Run};
use crate::exit::with_code;
use crate::registry;
use crate::switch;
use machine::{BackEnd, NetworkConfig, NetworkKind};
use net::gateway::Config;
use net::switch::Mac;
use std::hash::{DefaultHasher, Hash, Hasher};

/// The cards that the options ask for: one to the user-mode gateway if they say nothing. Ports lead to the first such.
pub fn cards(options: &Run, guest: &str) -> anyhow::Result<Vec<NetworkConfig>> {
    let nets = if options.net.is_empty() { &[Net::Card(NetCard::default())] } else { options.net.as_slice() };
    let none = nets.contains(&Net::None);
    anyhow::ensure!(
        !none || nets.len() == 1,
        with_code(2, "--net none: a guest without a network has no other card; leave out one of the two")
    );
    anyhow::ensure!(
        !none || options.publish.is_empty(),
        with_code(2, "-p: a guest without a network has no ports; leave out --net none")
    );
    let mut cards = Vec::new();
    let mut published = false;
    for (number, net) in nets.iter().enumerate() {
        let Net::Card(card) = net else { continue };
        let address = card.mac.unwrap_or_else(|| address_of(guest, number));
        let kind = match &card.kind {
            NetKind::Tap(name) => NetworkKind::Tap(name.clone()),
            NetKind::VhostUser(path) => NetworkKind::BackEnd(BackEnd::Socket(path.clone())),
            NetKind::Switch { name, port, spec } => {
                let mut spec = spec.clone();
                // A guest has the address of its card and no other, unless more was said.
                if !spec.trusted && spec.macs_max.is_none() {
                    spec.macs = vec![Mac(address)];
                }
                let own = if number == 0 { guest.to_owned() } else { format!("{guest}.{number}") };
                let port = port.clone().unwrap_or(own);
                NetworkKind::BackEnd(BackEnd::Switch { control: switch::running(name)?, port, spec })
            }
            NetKind::User { host_loopback, isolated } => {
                let mut config = Config::new(address);
                config.mtu = card.mtu;
                config.host_loopback = *host_loopback;
                if !std::mem::replace(&mut published, true) {
                    config.peers = (!isolated).then(|| registry::meeting(guest)).transpose()?;
                    config.forwards = options.publish.iter().map(|publish| publish.0).collect();
                }
                NetworkKind::User(config)
            }
        };
        cards.push(NetworkConfig { address, mtu: card.mtu, kind });
    }
    anyhow::ensure!(
        published || options.publish.is_empty(),
        with_code(2, "-p: only cards of --net user have ports of this host; add one, or leave out -p")
    );
    Ok(cards)
}

/// What the agent is told on the kernel's command line, so that the network is there before commands are: see
/// `guest::kernel_line`.
pub fn kernel_words(cards: &[NetworkConfig]) -> String {
    let Some(NetworkConfig { address, kind: NetworkKind::User(user), .. }) = cards.first() else {
        return String::new();
    };
    let network = guest::kernel_line::Network {
        mac: *address,
        address: user.network.guest4.octets(),
        prefix: 24,
        gateway: user.network.gateway4.octets(),
    };
    format!(" {}", guest::kernel_line::network_argument(&network))
}

/// The same card has the same address in every run: locally administered, from the guest's name.
fn address_of(guest: &str, number: usize) -> [u8; 6] {
    let mut hasher = DefaultHasher::new();
    (guest, number).hash(&mut hasher);
    let [a, b, c, d, e, ..] = hasher.finish().to_be_bytes();
    [0x02, a, b, c, d, e]
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::arguments::{Arguments, Command};
    use clap::Parser;

    fn cards_of(line: &[&str]) -> anyhow::Result<Vec<NetworkConfig>> {
        let line = [&["yado", "run", "debian"], line].concat();
        let Command::Run(run) = Arguments::parse_from(line).command else { panic!() };
        cards(&run, "debian-1")
    }

    #[test]
    fn the_agent_is_told_of_the_first_card() {
        let words = kernel_words(&cards_of(&["--net", "user,mac=02:00:00:00:00:0a"]).unwrap());
        assert!(words.starts_with(" yado.network=02:00:00:00:00:0a,"), "{words}");
        assert_eq!(kernel_words(&cards_of(&["--net", "none"]).unwrap()), "");
    }

    #[test]
    fn a_guest_has_one_card_unless_told_otherwise() {
        let plain = cards_of(&[]).unwrap();
        assert_eq!(plain.len(), 1);
        assert_eq!(plain[0].address[0] & 3, 2, "locally administered, not a group");
        assert_eq!(cards_of(&[]).unwrap(), plain, "the same every time");
        let two = cards_of(&["--net", "user", "--net", "user,mtu=9000", "-p", "2222:22"]).unwrap();
        assert_ne!(two[0].address, two[1].address);
        let forwards = |card: &NetworkConfig| {
            let NetworkKind::User(config) = &card.kind else { panic!() };
            config.forwards.len()
        };
        assert_eq!((forwards(&two[0]), forwards(&two[1]), two[1].mtu), (1, 0, 9000));
        assert!(cards_of(&["--net", "none"]).unwrap().is_empty());
        assert!(cards_of(&["--net", "none", "--net", "user"]).is_err());
        assert!(cards_of(&["--net", "none", "-p", "1:1"]).is_err());
        assert!(cards_of(&["--net", "tap=t", "-p", "1:1"]).is_err());
        let tap = cards_of(&["--net", "tap=t"]).unwrap();
        assert_eq!(tap[0].kind, NetworkKind::Tap("t".into()));
        assert_eq!(kernel_words(&tap), "", "who is behind a tap gives addresses himself");
    }
}
