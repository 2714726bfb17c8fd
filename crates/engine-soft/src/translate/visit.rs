//! What the translator does for a process that runs directly: code of a page that cannot.
//!
//! Most stay there for a few instructions, a library's fence or a cleared buffer next to its CPUIDs. So indirect jumps and returns
//! leave translated code, to see whether the page has been left. Code that stays longer is let run.

use crate::state::CpuState;

/// Times that translated code is left.
const LOOKS: u32 = 64;

/// A stay in the translator.
#[derive(Debug)]
pub(crate) struct Visit {
    page: u64,
    looks: u32,
}

impl Visit {
    /// At the page of RIP.
    pub(crate) fn new(state: &CpuState) -> Self {
        Self { page: page(state), looks: LOOKS }
    }

    /// The page has been left.
    pub(crate) fn over(&self, state: &CpuState) -> bool {
        page(state) != self.page
    }

    /// Whether translated code is to be left at the next indirect jump.
    pub(super) fn looks(&mut self) -> bool {
        let looks = self.looks > 0;
        self.looks = self.looks.saturating_sub(1);
        looks
    }
}

fn page(state: &CpuState) -> u64 {
    state.rip & !0xfff
}
