//! Disk image formats.

mod container;
mod findings;
mod gate;
mod mapped;
pub mod qcow2;
pub mod qed;
mod raw;
mod refusal;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

pub use container::{Container, Fact, Facts};
pub use findings::{Findings, Repair};
pub use mapped::Mapped;
pub use raw::Raw;
pub use refusal::Refusal;
pub(crate) use refusal::sound;

use crate::endian::be32;
use crate::storage::Storage;
use std::fmt;
use std::io;
use std::str::FromStr;

/// A format that can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// QEMU's enhanced disk.
    Qed,
    /// Microsoft's virtual hard disk, the first version.
    Vhd,
    /// Microsoft's virtual hard disk, the second version; read only.
    Vhdx,
    /// VMware's disk in one file; read only.
    Vmdk,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Raw, Self::Qcow2, Self::Qed, Self::Vhd, Self::Vhdx, Self::Vmdk];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
            // As QEMU calls it; its users call it "vhd", which is understood too.
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        }
    }
}

impl Format {
    /// Whether images of this format can be made and written.
    pub fn is_writable(self) -> bool {
        !matches!(self, Self::Vhdx | Self::Vmdk)
    }

    /// Whether an image of this format can be put over another base.
    pub fn can_change_base(self) -> bool {
        matches!(self, Self::Qcow2 | Self::Qed)
    }

    /// Whether images of this format can build on one of another, and say so; `None` is a format that is not said.
    pub fn can_build_on(self, below: Option<Self>) -> bool {
        match self {
            Self::Raw | Self::Vhdx | Self::Vmdk => false,
            Self::Qcow2 | Self::Qed => below.is_some(),
            Self::Vhd => below == Some(Self::Vhd),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known =
            Self::ALL.iter().find(|format| format.name() == name || (**format == Self::Vhd && name == "vhd"));
        known.copied().ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|format| format.name()).collect();
            format!("format {name:?} is not known; there are {}", names.join(", "))
        })
    }
}

/// What a file looks like. Only for files whose format nobody has said, and whose names then are not followed.
pub fn probe(storage: &dyn Storage) -> io::Result<Format> {
    let mut start = [0; 512];
    storage.read_bytes(0, &mut start)?;
    let mut end = [0; 512];
    storage.read_bytes(storage.len().saturating_sub(512), &mut end)?;
    let begins = |magic: &[u8]| start.starts_with(magic);
    Ok(match () {
        () if be32(&start, 0) == qcow2::header::MAGIC => Format::Qcow2,
        () if begins(qed::MAGIC) => Format::Qed,
        () if begins(vhdx::MAGIC) => Format::Vhdx,
        () if begins(vmdk::MAGIC) || begins(vmdk::TEXT_MAGIC) => Format::Vmdk,
        () if begins(vhd::COOKIE) || end.starts_with(vhd::COOKIE) => Format::Vhd,
        () => Format::Raw,
    })
}
