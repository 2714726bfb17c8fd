//! What a server offers under a name.

use crate::disk::{Content, Disk, Status};
use crate::nbd::wire::{Mode, allocation, flag};
use std::sync::Arc;

/// A disk under a name.
pub struct Export {
    /// Its name; the empty one is taken by clients that ask for none.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// Nothing is written, whatever the disk would allow.
    pub read_only: bool,
}

/// The contexts that a client has chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contexts {
    pub allocation: bool,
    pub depth: bool,
}

/// A context of ours: what clients call it in requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`
    Allocation,
    /// `qemu:allocation-depth`
    Depth,
}

impl Context {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Depth];

    /// Its number in this session.
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Depth => 2,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => allocation::NAME,
            Self::Depth => crate::nbd::wire::ALLOCATION_DEPTH,
        }
    }

    /// What it says of a range.
    pub fn flags(self, status: &Status) -> u32 {
        match self {
            Self::Allocation if status.content == Content::Zero => allocation::HOLE | allocation::ZERO,
            Self::Allocation => 0,
            Self::Depth if status.present => status.depth.saturating_add(1),
            Self::Depth => 0,
        }
    }
}

impl Contexts {
    /// None of them.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Whether it is among them.
    pub fn has(self, context: Context) -> bool {
        match context {
            Context::Allocation => self.allocation,
            Context::Depth => self.depth,
        }
    }

    /// Adds it.
    pub fn add(&mut self, context: Context) {
        match context {
            Context::Allocation => self.allocation = true,
            Context::Depth => self.depth = true,
        }
    }
}

impl Export {
    /// Bytes.
    pub fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.disk.read_only()
    }

    /// The transmission flags. All connections see one image, and a flush of one makes the writes of all stable; but where
    /// only one is served at a time (`alone`), who opens a second one waits for ever.
    pub fn flags(&self, mode: Mode, contexts: Contexts, alone: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        if !alone {
            flags |= flag::CAN_MULTI_CONN;
        }
        flags |= if self.is_read_only() {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        };
        if mode >= Mode::Structured {
            flags |= flag::SEND_DF;
        }
        if mode >= Mode::Extended && !contexts.is_empty() {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}
