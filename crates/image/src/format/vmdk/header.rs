//! The header of a sparse VMDK, and the text inside that says whose child it is.

use crate::endian::{le16, le32, le64, size};
use crate::format::Refusal;
use crate::storage::Storage;
use std::io;

/// What a sparse file begins with.
pub const MAGIC: &[u8] = b"KDMV";
/// What a file begins with that only names others.
pub const TEXT_MAGIC: &[u8] = b"# Disk DescriptorFile";
const SECTOR: u64 = 512;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
/// The directory is where the header at the end says.
const AT_END: u64 = u64::MAX;
/// The largest disk: VMware's have at most 62 TiB.
const CAPACITY_MAX: u64 = 64 << 40;
const GRAIN_MAX: u64 = 2 << 20;
const TABLE_ENTRIES_MAX: u64 = 1 << 16;
/// Longest text that is looked at.
const TEXT_MAX: u64 = 64 << 10;
/// The parent's identity where there is no parent.
const NO_PARENT: u32 = u32::MAX;

/// What a header says. Places and lengths are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Of the disk.
    pub capacity: u64,
    /// Of a grain: a power of two.
    pub grain: u64,
    /// Entries of a table.
    pub table_entries: u64,
    /// Place of the directory.
    pub directory: u64,
    /// Grains are zlib streams.
    pub compressed: bool,
    /// The entry 1 says "zeroes".
    pub zero_grains: bool,
    /// It was not closed in order.
    pub unclean: bool,
    /// Identity of the content.
    pub cid: u32,
    /// That of the parent when it became one.
    pub parent_cid: u32,
    /// The kind of disk, by VMware's name.
    pub create_type: String,
    /// The parent's file.
    pub parent: Option<String>,
}

impl Header {
    /// Reads a header, or the two of a stream, and the text.
    pub fn read(storage: &dyn Storage) -> io::Result<Result<Self, Refusal>> {
        let mut bytes = [0; SECTOR as usize];
        storage.read_bytes(0, &mut bytes)?;
        if bytes.starts_with(TEXT_MAGIC) {
            let what = "it only names other files: yado reads disks that are one file (monolithicSparse, streamOptimized)";
            return Ok(Err(Refusal::Unsupported(what.into())));
        }
        let text = text(storage, &bytes)?;
        if le64(&bytes, 56) == AT_END {
            // The second header is the last but one sector.
            let mut last = [0; SECTOR as usize];
            storage.read_bytes(storage.len().saturating_sub(2 * SECTOR), &mut last)?;
            if !last.starts_with(MAGIC) || le64(&last, 56) == AT_END {
                return Ok(Err(Refusal::Corrupt("its directory should be at the end, and is not".into())));
            }
            bytes = last;
        }
        Ok(Self::parse(&bytes, storage.len()).map(|header| header.described(&text)).and_then(Self::named))
    }

    fn parse(bytes: &[u8], file: u64) -> Result<Self, Refusal> {
        let corrupt = |what: &str| Err(Refusal::Corrupt(what.to_owned()));
        if !bytes.starts_with(MAGIC) {
            return corrupt("it does not begin with \"KDMV\"");
        }
        if !(1..=3).contains(&le32(bytes, 4)) {
            return Err(Refusal::Unsupported(format!(
                "it is of version {}, which yado has not",
                le32(bytes, 4)
            )));
        }
        let flags = le32(bytes, 8);
        let compressed = flags & FLAG_COMPRESSED != 0;
        if compressed && le16(bytes, 77) != 1 {
            return Err(Refusal::Unsupported("its grains are compressed in a way that yado has not".into()));
        }
        let bytes_of = |at: usize| le64(bytes, at).checked_mul(SECTOR).filter(|bytes| *bytes < 1 << 62);
        let (Some(capacity), Some(grain), Some(directory)) = (bytes_of(12), bytes_of(20), bytes_of(56))
        else {
            return corrupt("its numbers cannot be");
        };
        if capacity > CAPACITY_MAX {
            return corrupt("its disk has a size that cannot be");
        }
        let table_entries = u64::from(le32(bytes, 44));
        if !grain.is_power_of_two() || !(4096..=GRAIN_MAX).contains(&grain) {
            return corrupt("its grains have a size that cannot be");
        }
        if table_entries == 0 || table_entries > TABLE_ENTRIES_MAX || !table_entries.is_multiple_of(128) {
            return corrupt("its tables have a size that cannot be");
        }
        let tables = capacity.div_ceil(grain.saturating_mul(table_entries));
        if directory == 0 || directory.saturating_add(tables.saturating_mul(4)) > file {
            return corrupt("its directory is outside the file");
        }
        Ok(Self {
            capacity,
            grain,
            table_entries,
            directory,
            compressed,
            zero_grains: flags & FLAG_ZERO_GRAINS != 0,
            unclean: bytes.get(72).is_some_and(|unclean| *unclean != 0),
            cid: 0,
            parent_cid: NO_PARENT,
            create_type: String::new(),
            parent: None,
        })
    }

    /// What another disk's child has not would read as zeroes without it.
    fn named(self) -> Result<Self, Refusal> {
        if self.parent_cid != NO_PARENT && self.parent.is_none() {
            return Err(Refusal::Corrupt("it is another disk's child, and does not name it".into()));
        }
        Ok(self)
    }

    /// With what the text says.
    fn described(mut self, text: &str) -> Self {
        for line in text.lines() {
            let Some((name, value)) = line.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            let number = || u32::from_str_radix(value, 16).ok();
            match name.trim() {
                "CID" => self.cid = number().unwrap_or(0),
                "parentCID" => self.parent_cid = number().unwrap_or(NO_PARENT),
                "createType" => self.create_type = value.to_owned(),
                "parentFileNameHint" => self.parent = Some(value.replace('\\', "/")),
                _ => {}
            }
        }
        if self.parent_cid == NO_PARENT {
            self.parent = None;
        }
        self
    }
}

/// The text inside.
fn text(storage: &dyn Storage, header: &[u8]) -> io::Result<String> {
    let at = le64(header, 28).saturating_mul(SECTOR);
    let len = le64(header, 36).saturating_mul(SECTOR).min(TEXT_MAX).min(storage.len().saturating_sub(at));
    if at == 0 || len == 0 {
        return Ok(String::new());
    }
    let mut bytes = vec![0; size(len)];
    storage.read_bytes(at, &mut bytes)?;
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    Ok(String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned())
}
