//! The saved state of a configuration space: the bytes that are not as they were after power-up.

use super::{ConfigSpace, SIZE};
use device::{Saved, StateError};
use std::collections::BTreeMap;

/// What has changed in a configuration space since power-up.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ConfigSpaceState {
    /// By offset.
    changed: BTreeMap<u16, u8>,
    asserted: bool,
}

/// Vendor and device: these say what the function is, and never change.
const IDENTITY: u16 = 4;

impl Saved for ConfigSpace {
    type State = ConfigSpaceState;

    fn save(&self) -> ConfigSpaceState {
        // The rest is what the function was built with.
        let Self { bytes, power_up, asserted, writable: _, bars: _, free: _, link: _, line: _ } = self;
        let bytes = (0u16..).zip(bytes.iter().zip(power_up));
        let changed = bytes.filter(|(_, (now, then))| now != then).map(|(at, (now, _))| (at, *now)).collect();
        ConfigSpaceState { changed, asserted: *asserted }
    }

    fn restore(&mut self, state: ConfigSpaceState) -> Result<(), StateError> {
        let ConfigSpaceState { changed, asserted } = state;
        if changed.keys().any(|&at| at < IDENTITY || usize::from(at) >= SIZE) {
            return Err(StateError { device: "pci", why: "a byte that never changes has another value" });
        }
        self.bytes.copy_from_slice(&self.power_up);
        for (at, value) in changed {
            self.update(at, &[value]);
        }
        self.asserted = asserted;
        self.drive_line();
        Ok(())
    }
}
