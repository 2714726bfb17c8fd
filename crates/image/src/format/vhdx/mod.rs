//! VHDX (Hyper-V): fixed and dynamic disks, read. Little-endian.
//!
//! Two headers with numbers (the higher one that is sound holds) and two tables of regions (either) stand in front; the
//! regions are the metadata, which has the disk's sizes, and the block allocation table, whose entries are a state and a
//! place in MiB. After as many entries as a sector bitmap covers comes one for that bitmap, of use to differencing disks only.
//!
//! A file that was not closed has changes of its tables in a log, which whoever opens it to write must replay; it is
//! refused here, since without them its tables mean nothing.
//!
//! Source: Microsoft's [MS-VHDX], version 8.0.

mod header;
#[cfg(test)]
mod test;

pub use header::Header;
pub(crate) use header::MAGIC;

use super::container::Facts;
use super::findings::{Findings, Repair};
use super::mapped::{Layout, Mapped, Place, SECTOR, Sectors, damaged, look_up_all};
use crate::disk::Error;
use crate::endian::{le64, size};
use crate::storage::Storage;
use std::io;
use std::path::Path;
use std::sync::Arc;

const ENTRY: u64 = 8;
/// States of a block (section 2.5.1.1).
const STATE: u64 = 7;
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
const PRESENT: u64 = 6;
/// Place of a block: a multiple of a MiB.
const PLACE: u64 = !0xf_ffff;

/// How a VHDX is laid out.
pub struct Layer {
    header: Header,
}

/// A VHDX.
pub type Vhdx = Mapped<Layer>;

impl Vhdx {
    /// Reads headers, regions and metadata of an image.
    pub fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header, Error> {
        super::sound(path, "VHDX", Header::read(storage))
    }

    /// Opens an image whose header was read.
    pub fn open(path: &Path, storage: Arc<dyn Storage>, header: Header) -> Self {
        Mapped::new(path, Layer { header }, storage, None)
    }
}

impl Layout for Layer {
    fn name(&self) -> &'static str {
        "VHDX"
    }

    fn capacity(&self) -> u64 {
        self.header.capacity
    }

    fn block(&self) -> u64 {
        self.header.block
    }

    fn grain(&self) -> u64 {
        self.header.block
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn locate(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<(Place, u64)> {
        let block = self.header.block;
        let within = offset & block.wrapping_sub(1);
        let mut number = offset >> (block.trailing_zeros() & 63);
        let (mut run, mut first) = (0u64, None);
        while run < len {
            let at = self.header.table.saturating_add(self.header.entry_of(number).saturating_mul(ENTRY));
            let entry = le64(&sectors.read(at / SECTOR)?, size(at % SECTOR));
            let place = match entry & STATE {
                NOT_PRESENT | UNDEFINED => Place::Below,
                ZERO | UNMAPPED => Place::Zero,
                // The last block of a disk may reach beyond the file.
                PRESENT if entry & PLACE != 0 && entry & PLACE < sectors.storage().len() => {
                    Place::At(entry & PLACE)
                }
                _ if first.is_some() => break,
                _ => {
                    let text = format_args!("the entry for offset {offset:#x} ({entry:#x}) names no block");
                    return Err(damaged(text));
                }
            };
            match (first, place) {
                (None, Place::At(at)) => first = Some(Place::At(at.saturating_add(within))),
                (None, place) => first = Some(place),
                (Some(Place::At(start)), Place::At(at)) if start.saturating_add(run) == at => {}
                (Some(first), place) if first == place && !matches!(place, Place::At(_)) => {}
                _ => break,
            }
            run = run.saturating_add(if run == 0 { block.saturating_sub(within) } else { block });
            number = number.saturating_add(1);
        }
        Ok((first.unwrap_or(Place::Below), run.min(len)))
    }

    fn facts(&self) -> Facts {
        Facts { cluster_size: Some(self.header.block), ..Facts::default() }
    }

    fn check(&self, sectors: &Sectors, _repair: Repair) -> io::Result<Findings> {
        Ok(look_up_all(self, sectors))
    }
}
