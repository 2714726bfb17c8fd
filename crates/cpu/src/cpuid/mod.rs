//! What CPUID answers: leaves as data, and the versioned models that produce them.

mod model;

pub use model::{FeatureMissing, MODELS, Model, ModelError, Topology, default_model};
use serde::{Deserialize, Serialize};

/// The four registers of one CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// One row of a [`CpuidTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, or `None` if the answer does not depend on it.
    pub index: Option<u32>,
    /// The answer.
    pub leaf: Leaf,
}

/// All CPUID answers of one vCPU; bits that follow control registers (OSXSAVE, OSPKE) and leaf 0xD's sizes are
/// adjusted by the engine at execution time.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuidTable {
    /// Sorted by function, then index.
    pub rows: Vec<Row>,
}

/// What the host's own CPUID instruction answers.
pub fn host(function: u32, index: u32) -> Leaf {
    let core::arch::x86_64::CpuidResult { eax, ebx, ecx, edx } =
        core::arch::x86_64::__cpuid_count(function, index);
    Leaf { eax, ebx, ecx, edx }
}

impl CpuidTable {
    /// The answer for (function, index) without the range rules of [`Self::query`].
    pub fn get(&self, function: u32, index: u32) -> Option<Leaf> {
        self.rows
            .iter()
            .find(|row| row.function == function && row.index.is_none_or(|i| i == index))
            .map(|row| row.leaf)
    }

    /// What the CPUID instruction answers. Leaves beyond the highest of their range answer as AMD's do: all zero.
    pub fn query(&self, function: u32, index: u32) -> Leaf {
        self.get(function, index).unwrap_or_default()
    }

    /// Sets or replaces one row.
    pub fn set(&mut self, function: u32, index: Option<u32>, leaf: Leaf) {
        self.rows.retain(|row| !(row.function == function && (index.is_none() || row.index == index)));
        self.rows.push(Row { function, index, leaf });
        self.rows.sort_by_key(|row| (row.function, row.index));
    }
}
