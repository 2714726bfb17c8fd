//! Ways out of a device: a wire, a message, a nudge.

use std::sync::Arc;

/// A level-triggered or edge-triggered wire to an interrupt controller. Cheap to clone; raising it twice is raising
/// it once.
#[derive(Clone)]
pub struct Line(Arc<dyn Fn(bool) + Send + Sync>);

impl Line {
    /// A wire that ends in `to`, called with the new level.
    pub fn new(to: impl Fn(bool) + Send + Sync + 'static) -> Self {
        Self(Arc::new(to))
    }

    /// A wire that ends nowhere.
    pub fn unconnected() -> Self {
        Self::new(|_| {})
    }

    /// Sets the level.
    pub fn set(&self, high: bool) {
        (self.0)(high);
    }

    /// High, then low: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Line")
    }
}

/// A message-signalled interrupt: a memory write that the interrupt controllers catch (Intel SDM 3, 12.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msi {
    /// Address, `0xfee.....`.
    pub address: u64,
    /// Data: vector and delivery mode.
    pub data: u32,
}

/// Where messages go. Cheap to clone.
#[derive(Clone)]
pub struct MsiSink(Arc<dyn Fn(Msi) + Send + Sync>);

impl MsiSink {
    /// A sink that hands every message to `to`.
    pub fn new(to: impl Fn(Msi) + Send + Sync + 'static) -> Self {
        Self(Arc::new(to))
    }

    /// A sink that drops every message.
    pub fn unconnected() -> Self {
        Self::new(|_| {})
    }

    /// Sends a message.
    pub fn send(&self, msi: Msi) {
        (self.0)(msi);
    }
}

impl std::fmt::Debug for MsiSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MsiSink")
    }
}

/// Tells whoever serves a device's queues that there is work in them. May be called at any time from inside a
/// device; it only wakes, it never calls back. Cheap to clone.
#[derive(Clone)]
pub struct Notify(Arc<dyn Fn() + Send + Sync>);

impl Notify {
    /// A nudge that calls `to`.
    pub fn new(to: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(to))
    }

    /// A nudge nobody feels (tests that poll).
    pub fn unconnected() -> Self {
        Self::new(|| {})
    }

    /// Wakes the server.
    pub fn notify(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Notify {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Notify")
    }
}
