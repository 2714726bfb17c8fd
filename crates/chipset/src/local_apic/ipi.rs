//! Interrupt messages between agents, and their way to the local APICs (Intel SDM 3, 12.6 and 12.12.10).

use super::LocalApic;
use crate::locked;
use device::Line;
use std::sync::{Arc, Mutex};

/// Delivery mode of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// To all destinations.
    Fixed,
    /// To the destination with the lowest priority.
    LowestPriority,
    /// System management interrupt: accepted and ignored, there is no SMM.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up, the vector is the page to start at.
    Startup,
    /// As from an 8259A.
    External,
}

impl Delivery {
    /// From the three-bit field of ICR, LVT, I/O APIC and MSI; `None` for the reserved one.
    pub fn from_field(field: u32) -> Option<Self> {
        Some(match field & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::External,
            _ => return None,
        })
    }
}

/// Edge or level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// Edge.
    Edge,
    /// Level: the EOI is broadcast to the I/O APICs.
    Level,
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The APIC with this id, or all with [`Self::BROADCAST`].
    Physical(u32),
    /// All APICs whose logical id matches in their present mode, or all with [`Self::BROADCAST`].
    Logical(u32),
    /// All but the sender.
    AllButSelf {
        /// The sender's id.
        sender: u32,
    },
    /// Everybody.
    All,
}

impl Destination {
    /// Every APIC. Eight-bit formats' 0xff is widened to this.
    pub const BROADCAST: u32 = u32::MAX;

    /// From an eight-bit destination field.
    pub fn narrow(logical: bool, id: u8) -> Self {
        Self::wide(logical, if id == 0xff { Self::BROADCAST } else { id.into() })
    }

    /// From a 32-bit destination field.
    pub fn wide(logical: bool, id: u32) -> Self {
        if logical { Self::Logical(id) } else { Self::Physical(id) }
    }
}

/// A message to local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ipi {
    /// What it does there.
    pub delivery: Delivery,
    /// Vector, for those deliveries that have one.
    pub vector: u8,
    /// Trigger mode.
    pub trigger: Trigger,
    /// Whom it is for.
    pub destination: Destination,
}

/// All local APICs of a machine, and how to wake their vCPUs. Clones are the same set.
///
/// APIC ids are the indexes. Lock order: at most one APIC is locked at a time, and none when the waker is called;
/// callers may hold the lock of an interrupt controller or a device, so the waker only wakes and never calls back.
#[derive(Clone)]
pub struct Apics(Arc<Set>);

struct Set {
    apics: Box<[Arc<Mutex<LocalApic>>]>,
    wake: Box<dyn Fn(usize) + Send + Sync>,
}

impl std::fmt::Debug for Apics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Apics({})", self.0.apics.len())
    }
}

impl Apics {
    /// The APICs in order of their ids; `wake(index)` makes that vCPU look at its APIC soon.
    pub fn new(apics: Vec<Arc<Mutex<LocalApic>>>, wake: impl Fn(usize) + Send + Sync + 'static) -> Self {
        Self(Arc::new(Set { apics: apics.into(), wake: Box::new(wake) }))
    }

    /// The APIC of a vCPU.
    pub fn get(&self, index: usize) -> Option<&Arc<Mutex<LocalApic>>> {
        self.0.apics.get(index)
    }

    /// Number of APICs.
    pub fn len(&self) -> usize {
        self.0.apics.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.apics.is_empty()
    }

    /// The wire to pin LINT0 or LINT1 (0 or 1) of an APIC: the 8259A's INTR goes to LINT0 of the BSP.
    pub fn lint_line(&self, index: usize, pin: usize) -> Line {
        let apics = self.clone();
        Line::new(move |high| {
            let news = apics.get(index).is_some_and(|apic| locked(apic).set_lint(pin, high));
            if news {
                (apics.0.wake)(index);
            }
        })
    }

    /// Delivers a message and wakes who got something. Answers whether anybody was addressed.
    pub fn route(&self, ipi: &Ipi) -> bool {
        if ipi.delivery == Delivery::LowestPriority {
            return self.route_lowest(ipi);
        }
        match ipi.destination {
            // The common case needs no search.
            Destination::Physical(id) if id != Destination::BROADCAST => {
                self.hand(usize::try_from(id).unwrap_or(usize::MAX), ipi, false)
            }
            _ => (0..self.0.apics.len()).filter(|&index| self.hand(index, ipi, true)).count() > 0,
        }
    }

    /// Gives the message to one APIC, if it is addressed.
    fn hand(&self, index: usize, ipi: &Ipi, check: bool) -> bool {
        let Some(apic) = self.0.apics.get(index) else { return false };
        let news = {
            let mut apic = locked(apic);
            if check && !apic.addressed_by(ipi.destination) {
                return false;
            }
            apic.receive(ipi)
        };
        if news {
            (self.0.wake)(index);
        }
        true
    }

    fn route_lowest(&self, ipi: &Ipi) -> bool {
        let lowest = self
            .0
            .apics
            .iter()
            .enumerate()
            .filter_map(|(index, apic)| {
                let apic = locked(apic);
                let fits = apic.addressed_by(ipi.destination) && apic.accepts_fixed();
                fits.then(|| (apic.ppr(), index))
            })
            .min();
        lowest.is_some_and(|(_, index)| self.hand(index, ipi, false))
    }
}
