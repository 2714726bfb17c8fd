//! Network cards and the threads that carry their frames.
//!
//! One thread per card. Lock order: the card's lock alone, held only while frames are copied into or out of guest RAM.

use crate::config::{NetworkConfig, NetworkKind};
use crate::functions::{Error, Slots, Workers};
use crate::notice::Notice;
use device::Notify;
use net::gateway::Gateway;
use net::tap::Tap;
use net::{Batch, Bell, Card};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use virtio::{Net, NetConfig};

/// The most queue pairs: one thread carries all frames, so that more of them help guests only to spread interrupts.
const PAIRS_MAX: u32 = 16;

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
}

/// Where a card's frames go.
enum Carrier {
    Gateway(Box<Gateway>),
    Tap(Tap),
}

impl Carrier {
    fn serve(self, card: &GuestCard, bell: &Bell) -> Result<(), String> {
        match self {
            Self::Gateway(gateway) => gateway.serve(card, bell).map_err(|error| error.to_string()),
            Self::Tap(tap) => tap.serve(card, bell).map_err(|error| error.to_string()),
        }
    }
}

impl Slots<'_> {
    /// Attaches all network cards in order and starts their threads.
    pub(crate) fn networks(
        &self,
        networks: &[NetworkConfig],
        cpus: u32,
        workers: &mut Workers,
    ) -> Result<(), Error> {
        for (number, config) in networks.iter().enumerate() {
            let carrier = match &config.kind {
                NetworkKind::User(user) => {
                    let gateway = Gateway::new(user.clone())?;
                    workers.monitors.push(gateway.monitor());
                    Carrier::Gateway(Box::new(gateway))
                }
                NetworkKind::Tap(name) => Carrier::Tap(Tap::open(name)?),
            };
            let bell = Bell::new().map_err(Error::Card)?;
            let ring = bell.clone();
            let pairs = u16::try_from(cpus.min(PAIRS_MAX)).unwrap_or(1);
            let about = NetConfig { address: config.address, mtu: config.mtu, pairs };
            let notify = Notify::new(move || ring.ring());
            let card = Net::new(self.memory.clone(), self.msi.clone(), notify, about);
            let card = Arc::new(Mutex::new(card));
            self.attach(card.clone())?;
            workers.bells.push(bell.clone());
            let notices = self.notices.clone();
            let serve = move || {
                if let Err(why) = carrier.serve(&GuestCard(card), &bell) {
                    notices.tell(Notice::NetworkLost { card: number, why });
                }
            };
            let thread = thread::Builder::new().name(format!("net{number}")).spawn(serve);
            workers.threads.push(thread.map_err(Error::Card)?);
        }
        Ok(())
    }
}
