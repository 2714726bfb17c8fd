//! The saved state of MSI-X.

use super::{MsiX, Vector};
use device::{Msi, Saved, StateError};

/// A table entry and its pending bit.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct VectorState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

/// What the MSI-X of a function is made of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MsiXState {
    vectors: Vec<VectorState>,
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
}

impl From<&Vector> for VectorState {
    fn from(vector: &Vector) -> Self {
        let Vector { message: Msi { address, data }, masked, pending } = *vector;
        Self { address, data, masked, pending }
    }
}

impl From<VectorState> for Vector {
    fn from(state: VectorState) -> Self {
        let VectorState { address, data, masked, pending } = state;
        Self { message: Msi { address, data }, masked, pending }
    }
}

impl Saved for MsiX {
    type State = MsiXState;

    fn save(&self) -> MsiXState {
        // Where table and capability are is what the function was built with.
        let Self {
            vectors,
            enabled,
            function_masked,
            bus_master,
            bar: _,
            table: _,
            pba: _,
            capability: _,
            sink: _,
        } = self;
        MsiXState {
            vectors: vectors.iter().map(VectorState::from).collect(),
            enabled: *enabled,
            function_masked: *function_masked,
            bus_master: *bus_master,
        }
    }

    /// Sends nothing: what was to be sent is in the state of the local APICs.
    fn restore(&mut self, state: MsiXState) -> Result<(), StateError> {
        let MsiXState { vectors, enabled, function_masked, bus_master } = state;
        if vectors.len() != self.vectors.len() {
            return Err(StateError { device: "msi-x", why: "it has another number of vectors" });
        }
        self.vectors = vectors.into_iter().map(Vector::from).collect();
        (self.enabled, self.function_masked, self.bus_master) = (enabled, function_masked, bus_master);
        Ok(())
    }
}
