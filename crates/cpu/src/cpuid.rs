//! What CPUID answers: leaves as data, and the versioned models that produce them.

use serde::{Deserialize, Serialize};

/// The four registers of one CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX, EBX, ECX, EDX.
    #[allow(missing_docs)]
    pub eax: u32,
    #[allow(missing_docs)]
    pub ebx: u32,
    #[allow(missing_docs)]
    pub ecx: u32,
    #[allow(missing_docs)]
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
