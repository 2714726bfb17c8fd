//! VMDK (VMware): hosted sparse disks in one file, plain (`monolithicSparse`) or compressed (`streamOptimized`), read. Little-endian.
//!
//! A directory has places of tables, whose entries are places of grains (64 KiB usually), in sectors; 0 is "none", and 1,
//! where a flag says so, "zeroes". A compressed grain begins with a marker: its sector on the disk, and the length of a zlib stream. A
//! file that was written as a stream has its directory behind the grains, and a second header that says where. A text
//! inside, the descriptor, names the parent.
//!
//! Source: VMware's "Virtual Disk Format 5.0" technical note, sections "Hosted Sparse Extents" and "Stream-Optimized
//! Compressed Sparse Extents".

mod header;
#[cfg(test)]
mod test;

pub use header::Header;
pub(crate) use header::{MAGIC, TEXT_MAGIC};

use super::Format;
use super::container::{Fact, Facts};
use super::findings::{Findings, Repair};
use super::mapped::{Layout, Mapped, Packed, Place, SECTOR, Sectors, damaged, look_up};
use crate::disk::{Disk, Error};
use crate::endian::{le32, le64, size};
use crate::storage::Storage;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

const ENTRY: u64 = 4;
/// An entry that says "zeroes".
const ZERO: u32 = 1;
/// Bytes of the marker before a compressed grain.
const MARKER: u64 = 12;

/// How a VMDK is laid out.
pub struct Layer {
    header: Header,
}

/// A VMDK.
pub type Vmdk = Mapped<Layer>;

impl Vmdk {
    /// Reads the header of an image.
    pub fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header, Error> {
        super::sound(path, "VMDK", Header::read(storage))
    }

    /// Opens an image whose header was read.
    pub fn open(
        path: &Path,
        storage: Arc<dyn Storage>,
        header: Header,
        parent: Option<Arc<dyn Disk>>,
    ) -> Self {
        Mapped::new(path, Layer { header }, storage, parent)
    }
}

impl Layer {
    /// Bytes of the disk that one table maps.
    fn span(&self) -> u64 {
        self.header.grain.saturating_mul(self.header.table_entries)
    }

    /// A place that an entry names, if so many bytes of the file are there.
    fn place(&self, sectors: &Sectors, sector: u32, bytes: u64) -> Option<u64> {
        let at = u64::from(sector).saturating_mul(SECTOR);
        (at > 0 && at.saturating_add(bytes) <= sectors.storage().len()).then_some(at)
    }

    fn table(&self, sectors: &Sectors, offset: u64) -> io::Result<Option<u64>> {
        let index = offset.checked_div(self.span()).unwrap_or(0);
        let at = self.header.directory.saturating_add(index.saturating_mul(ENTRY));
        match le32(&sectors.read(at / SECTOR)?, size(at % SECTOR)) {
            0 => Ok(None),
            sector => {
                let table = self.place(sectors, sector, self.header.table_entries.saturating_mul(ENTRY));
                let text =
                    || damaged(format_args!("the directory's entry {index} ({sector:#x}) names no table"));
                table.map(Some).ok_or_else(text)
            }
        }
    }

    /// The entries of a table from `index` on that lie in one sector.
    fn entries(&self, sectors: &Sectors, table: u64, index: u64) -> io::Result<Vec<u32>> {
        let at = table.saturating_add(index.saturating_mul(ENTRY));
        let bytes = sectors.read(at / SECTOR)?;
        let words = bytes.get(size(at % SECTOR)..).unwrap_or_default().chunks_exact(ENTRY as usize);
        Ok(words
            .map(|word| le32(word, 0))
            .take(size(self.header.table_entries.saturating_sub(index)))
            .collect())
    }

    /// What an entry says of a grain, at its beginning.
    fn describe(&self, sectors: &Sectors, entry: u32) -> io::Result<Place> {
        Ok(match entry {
            0 => Place::Below,
            ZERO if self.header.zero_grains => Place::Zero,
            sector => {
                let at = self.place(sectors, sector, 1);
                let at = at.ok_or_else(|| damaged(format_args!("an entry ({sector:#x}) names no grain")))?;
                Place::At(at)
            }
        })
    }

    /// A compressed grain: its marker must be of that grain, and its stream inside the file.
    fn packed(&self, sectors: &Sectors, at: u64, offset: u64) -> io::Result<Place> {
        let storage = sectors.storage();
        let mut marker = [0; MARKER as usize];
        storage.read_bytes(at, &mut marker)?;
        let within = offset & self.header.grain.wrapping_sub(1);
        let (sector, len) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
        let start = at.saturating_add(MARKER);
        let most = self.header.grain.saturating_mul(2);
        if sector != offset.saturating_sub(within) / SECTOR
            || len > most
            || start.saturating_add(len) > storage.len()
        {
            return Err(damaged(format_args!("the grain for offset {offset:#x} has another one's marker")));
        }
        Ok(Place::Packed(Packed { offset: start, len, whole: self.header.grain, skip: within }))
    }
}

impl Layout for Layer {
    fn name(&self) -> &'static str {
        "VMDK"
    }

    fn capacity(&self) -> u64 {
        self.header.capacity
    }

    fn block(&self) -> u64 {
        self.header.grain
    }

    fn grain(&self) -> u64 {
        self.header.grain
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn locate(&self, sectors: &Sectors, offset: u64, len: u64) -> io::Result<(Place, u64)> {
        let (grain, span) = (self.header.grain, self.span());
        let into_span = offset.checked_rem(span).unwrap_or(0);
        let len = len.min(span.saturating_sub(into_span));
        let Some(table) = self.table(sectors, offset)? else { return Ok((Place::Below, len)) };
        let within = offset & grain.wrapping_sub(1);
        let mut index = into_span.checked_div(grain).unwrap_or(0);
        let mut run = 0u64;
        let mut first = None;
        while run < len {
            let entries = self.entries(sectors, table, index)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                let place = match (first, self.describe(sectors, entry)) {
                    (None, place) => place?,
                    // A broken entry ends the run, and is met by the next look-up.
                    (Some(first), Err(_)) => return Ok((first, run.min(len))),
                    (Some(_), Ok(place)) => place,
                };
                match (first, place) {
                    (None, Place::At(at)) if self.header.compressed => {
                        return Ok((
                            self.packed(sectors, at, offset)?,
                            grain.saturating_sub(within).min(len),
                        ));
                    }
                    (None, Place::At(at)) => first = Some(Place::At(at.saturating_add(within))),
                    (None, place) => first = Some(place),
                    (Some(Place::At(start)), Place::At(at)) if start.saturating_add(run) == at => {}
                    (Some(first), place) if first == place && !matches!(place, Place::At(_)) => {}
                    (Some(first), _) => return Ok((first, run.min(len))),
                }
                run = run.saturating_add(if run == 0 { grain.saturating_sub(within) } else { grain });
                index = index.saturating_add(1);
                if run >= len {
                    break;
                }
            }
        }
        Ok((first.unwrap_or(Place::Below), run.min(len)))
    }

    fn facts(&self) -> Facts {
        let header = &self.header;
        Facts {
            cluster_size: Some(header.grain),
            dirty: header.unclean,
            backing: header.parent.clone().map(|name| (name, Some(Format::Vmdk.to_string()))),
            details: vec![
                ("cid", Fact::Number(header.cid.into())),
                ("parent-cid", Fact::Number(header.parent_cid.into())),
                ("create-type", Fact::Text(header.create_type.clone())),
            ],
        }
    }

    fn check(&self, sectors: &Sectors, _repair: Repair) -> io::Result<Findings> {
        let (span, capacity) = (self.span().max(1), self.capacity());
        let bytes = self.header.table_entries.saturating_mul(ENTRY).max(1);
        let total_clusters = capacity.div_ceil(self.block().max(1));
        let mut found = Findings { total_clusters, ..Findings::default() };
        let (mut start, mut next) = (0u64, 0u64);
        let mut tables = BTreeSet::new();
        while start < capacity {
            let end = start.saturating_add(span).min(capacity);
            // Tables that lie over each other are looked at once: a hostile directory names one all the time.
            let table = self.table(sectors, start).ok().flatten();
            let near = |at: u64| at.saturating_sub(bytes.saturating_sub(1))..at.saturating_add(bytes);
            match table.filter(|at| tables.range(near(*at)).next().is_some()) {
                Some(at) => {
                    found.corrupt(|| format!("the directory names the table at {at:#x} more than once"))
                }
                None => look_up(self, sectors, start..end, &mut next, &mut found),
            }
            tables.extend(table);
            start = end;
        }
        Ok(found)
    }
}
