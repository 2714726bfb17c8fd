//! Network cards and the threads that carry their frames.
//!
//! One thread per card. Lock order: the card's lock alone, held only while frames are copied into or out of guest RAM.

use crate::config::{BackEnd, NetworkConfig, NetworkKind};
use crate::functions::{Error, Slots, Workers};
use crate::lending;
use crate::notice::Notice;
use device::Notify;
use net::gateway::Gateway;
use net::tap::Tap;
use net::vhost::{Frontend, feature};
use net::watch::Watched;
use net::{Batch, Bell, Card};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use virtio::{Net, NetConfig};

/// The most queue pairs: as many as the card may have, one for each vCPU.
const PAIRS_MAX: u32 = 64;
/// VIRTIO_NET_F_RSS: whoever lays frames into a card's rings spreads them; another process does as it likes.
const RSS: u64 = 1 << 60;

/// A virtio card, as those see it who carry its frames.
struct GuestCard(Arc<Mutex<Net>>);

impl GuestCard {
    fn lock(&self) -> MutexGuard<'_, Net> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Card for GuestCard {
    fn take(&self, batch: &mut Batch) -> bool {
        self.lock().take(batch)
    }

    fn give(&self, batch: &mut Batch) {
        if !batch.is_empty() {
            self.lock().give(batch);
        }
    }

    fn give_up(&self, batch: &mut Batch) {
        self.lock().give_up(batch);
    }
}

/// Where a card's frames go.
enum Carrier {
    Gateway(Box<Gateway>),
    Tap(Tap),
    Lending(Box<lending::Carrier>),
}

impl Carrier {
    /// What it is called, if this process carries the frames itself.
    fn name(&self) -> Option<&'static str> {
        match self {
            Self::Gateway(_) => Some("user"),
            Self::Tap(_) => Some("tap"),
            Self::Lending(_) => None,
        }
    }

    /// Serves until the bell is closed. `tell` hears why frames go nowhere, and (nothing) that they go again.
    fn serve(self, card: &dyn Card, bell: &Bell, tell: &dyn Fn(Option<String>)) {
        match self {
            Self::Gateway(gateway) => {
                gateway.serve(card, bell).unwrap_or_else(|error| tell(Some(error.to_string())))
            }
            Self::Tap(tap) => tap.serve(card, bell).unwrap_or_else(|error| tell(Some(error.to_string()))),
            Self::Lending(carrier) => carrier.serve(bell, tell),
        }
    }
}

/// What a card on another process's rings does not do: change at run time what it takes, and what that process does not do.
fn withheld(front: &Frontend) -> u64 {
    let needs_card = feature::CTRL_GUEST_OFFLOADS | RSS;
    (feature::OF_BACK_ENDS & !front.offered()) | needs_card
}

/// How many rings of a back end's there are to use.
fn count_rings(mut front: Frontend, back_end: &BackEnd) -> Result<(Frontend, u16), lending::Error> {
    let wrong = |source| lending::Error::BackEnd { place: back_end.to_string(), source };
    let rings = front.rings_max().map_err(wrong)?;
    Ok((front, rings.max(2) & !1))
}

impl Slots<'_> {
    /// Attaches all network cards in order.
    pub(crate) fn networks(
        &self,
        networks: &[NetworkConfig],
        cpus: u32,
        workers: &mut Workers,
    ) -> Result<(), Error> {
        for (number, config) in networks.iter().enumerate() {
            let bell = Bell::new().map_err(Error::Card)?;
            let ring = bell.clone();
            let pairs = u16::try_from(cpus.min(PAIRS_MAX)).unwrap_or(1);
            let mut about = NetConfig { address: config.address, mtu: config.mtu, pairs, withheld: 0 };
            let mut front = None;
            if let NetworkKind::BackEnd(back_end) = &config.kind {
                let connection = back_end.connect(pairs.saturating_mul(2))?;
                let (connection, rings) = count_rings(connection, back_end)?;
                about.pairs = rings / 2;
                about.withheld = withheld(&connection);
                front = Some((back_end, connection, rings));
            }
            let notify = Notify::new(move || ring.ring());
            let mut card = Net::new(self.memory.clone(), self.msi.clone(), notify, about);
            if self.doorbells.is_some()
                && let Some(hung) = self.bell(bell.hang()).map_err(Error::Bell)?
            {
                card.set_bell(hung);
            }
            let card = Arc::new(Mutex::new(card));
            let carrier = match &config.kind {
                NetworkKind::User(user) => {
                    let gateway = Gateway::new(user.clone())?;
                    workers.monitors.push(gateway.monitor());
                    Carrier::Gateway(Box::new(gateway))
                }
                NetworkKind::Tap(name) => Carrier::Tap(Tap::open(name)?),
                NetworkKind::BackEnd(_) => {
                    let Some((back_end, front, rings)) = front else { continue };
                    let (card, memory) = (card.clone(), self.memory.clone());
                    workers.lent.push(card.clone());
                    let carrier = lending::Carrier::new(card, memory, back_end.clone(), front, rings)?;
                    Carrier::Lending(Box::new(carrier))
                }
            };
            self.attach(card.clone())?;
            workers.bells.push(bell.clone());
            let name = format!("net{number}");
            let carried: Box<dyn Card> = match carrier.name() {
                None => Box::new(GuestCard(card)),
                Some(kind) => {
                    workers.cards.push((name.clone(), kind, card.clone()));
                    Box::new(Watched::new(GuestCard(card), workers.watch.clone(), name.clone()))
                }
            };
            let notices = self.notices.clone();
            let serve = move || {
                sandbox::narrow(sandbox::Role::Network);
                let tell = |why| match why {
                    Some(why) => notices.tell(Notice::NetworkLost { card: number, why }),
                    None => notices.tell(Notice::NetworkBack { card: number }),
                };
                carrier.serve(&*carried, &bell, &tell);
            };
            workers.starts.push(Box::new(move || Ok(vec![thread::Builder::new().name(name).spawn(serve)?])));
        }
        Ok(())
    }
}
