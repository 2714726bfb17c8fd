//! State that outlives the program: what a device is made of besides its wires.
//!
//! A device's saved state is a type of its own with named fields. A field that comes later gets a serde default, so that
//! a later yado takes up an earlier one's state; what it cannot take up it refuses by name.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A saved state that no device can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the saved state of {device} cannot be taken up: {why}; it was damaged, or made by a later yado")]
pub struct StateError {
    /// [`crate::Device::name`].
    pub device: &'static str,
    /// Which field is impossible.
    pub why: &'static str,
}

/// A device whose state can be kept and taken up again. Levels of wires into the device are part of its state; wires out
/// of it follow from it.
pub trait Saved {
    /// The state.
    type State: Serialize + DeserializeOwned;

    /// The state now.
    fn save(&self) -> Self::State;

    /// Takes up a state and drives the wires out of the device. After an error the device is as it was.
    fn restore(&mut self, state: Self::State) -> Result<(), StateError>;
}
