//! What a gateway has done so far, to be looked at while it works.

use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the gateway was made.
#[derive(Debug, Default)]
pub struct Monitor {
    opened: AtomicU64,
    closed: AtomicU64,
    refused: AtomicU64,
    full: AtomicU64,
    broken: AtomicU64,
    spoofed: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Monitor {
    pub(super) fn opened(&self) {
        count(&self.opened);
    }
    pub(super) fn closed(&self) {
        count(&self.closed);
    }
    pub(super) fn refused(&self) {
        count(&self.refused);
    }
    pub(super) fn full(&self) {
        count(&self.full);
    }
    pub(super) fn broken(&self) {
        count(&self.broken);
    }
    pub(super) fn spoofed(&self) {
        count(&self.spoofed);
    }

    /// For people.
    pub fn inspect(&self) -> Value {
        let Self { opened, closed, refused, full, broken, spoofed } = self;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({ "connections": read(opened).saturating_sub(read(closed)), "connections_opened": read(opened),
            "refused_destination": read(refused), "refused_table_full": read(full),
            "dropped_broken": read(broken), "dropped_spoofed": read(spoofed) })
    }
}
