//! pvpanic: the port through which a guest's kernel says that it panicked (QEMU `docs/specs/pvpanic.rst`).

use device::{Access, Device, VmTime};
use serde_json::{Value, json};

/// What the guest's kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PanicEvent {
    /// It panicked and will do nothing more.
    Panicked,
    /// It panicked and its crash kernel takes over.
    CrashLoaded,
}

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
pub struct PvPanic {
    report: Box<dyn Fn(PanicEvent) + Send + Sync>,
    last: u8,
}

impl PvPanic {
    /// Number of ports.
    pub const LEN: u64 = 1;

    /// `report` is called with the device locked: it only notes and wakes.
    pub fn new(report: impl Fn(PanicEvent) + Send + Sync + 'static) -> Self {
        Self { report: Box::new(report), last: 0 }
    }
}

impl std::fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PvPanic").field("last", &self.last).finish()
    }
}

impl Device for PvPanic {
    fn name(&self) -> &'static str {
        "pvpanic"
    }

    /// The events that the host understands.
    fn read(&mut self, _access: Access, _now: VmTime) -> u64 {
        (PANICKED | CRASH_LOADED).into()
    }

    fn write(&mut self, _access: Access, value: u64, _now: VmTime) {
        self.last = value as u8;
        if self.last & PANICKED != 0 {
            (self.report)(PanicEvent::Panicked);
        } else if self.last & CRASH_LOADED != 0 {
            (self.report)(PanicEvent::CrashLoaded);
        }
    }

    fn reset(&mut self) {
        self.last = 0;
    }

    fn inspect(&self) -> Value {
        json!({ "last_event": self.last })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn events_are_told_apart_and_others_ignored() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let mut device = PvPanic::new(move |event| log.lock().unwrap().push(event));
        let access = Access { window: 0, offset: 0, size: 1 };
        assert_eq!(device.read(access, VmTime(0)), 3);
        for value in [4, 1, 2, 3, 0] {
            device.write(access, value, VmTime(0));
        }
        use PanicEvent::{CrashLoaded, Panicked};
        assert_eq!(*seen.lock().unwrap(), [Panicked, CrashLoaded, Panicked]);
    }
}
