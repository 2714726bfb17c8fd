//! What a machine has to say to whoever runs it, beside its outcome.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// Something worth a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The guest has reset the machine and is about to boot. Every device has been reset; all vCPUs wait.
    Restarted {
        /// How often the guest has been started now.
        starts: u64,
    },
    /// The host has no space for what the guest writes to this disk; nothing that the guest was told is stored is lost. Said
    /// once until a write succeeds again.
    DiskFull {
        /// The image, or for disposable writes the directory of their file.
        path: PathBuf,
        /// The machine stands still until there is space; else the guest sees I/O errors.
        waits: bool,
    },
    /// The host cannot read or write this disk: the machine stands still until somebody lets it go on.
    DiskFails {
        /// The image, or for disposable writes the directory of their file.
        path: PathBuf,
    },
    /// What a machine stood still for can be done now.
    DiskGoesOn {
        /// The image, or for disposable writes the directory of their file.
        path: PathBuf,
    },
    /// A network card's frames go nowhere any more.
    NetworkLost {
        /// Which card, from 0.
        card: usize,
        /// Why.
        why: String,
    },
    /// They go again.
    NetworkBack {
        /// Which card, from 0.
        card: usize,
    },
}

/// Hears notices, on any of the machine's threads: it must not block for long.
pub type Listener = Box<dyn Fn(Notice) + Send + Sync>;

/// Where notices go, once somebody listens. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Notices(Arc<OnceLock<Listener>>);

impl Notices {
    /// Only the first listener counts.
    pub(crate) fn listen(&self, listener: Listener) {
        let _ = self.0.set(listener);
    }

    pub(crate) fn tell(&self, notice: Notice) {
        if let Some(listener) = self.0.get() {
            listener(notice);
        }
    }
}
