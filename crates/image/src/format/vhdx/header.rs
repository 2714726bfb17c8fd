//! Headers, regions and metadata of a VHDX.
//!
//! Source: [MS-VHDX] sections 2.2 (header section), 2.6 (metadata region).

use crate::endian::{le16, le32, le64, put, size};
use crate::format::Refusal;
use crate::storage::Storage;
use std::io;

/// What a file begins with.
pub const MAGIC: &[u8] = b"vhdxfile";
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const HEADERS: [u64; 2] = [64 * KIB, 128 * KIB];
const HEADER_BYTES: usize = 4096;
const REGIONS: [u64; 2] = [192 * KIB, 256 * KIB];
const REGIONS_BYTES: u64 = 64 * KIB;
/// Regions, or items of metadata, that a table has at most.
const ENTRIES_MAX: usize = 2047;
/// The largest disk (section 2.6.2.2), and block (2.6.2.1).
const CAPACITY_MAX: u64 = 64 << 40;
const BLOCK_MAX: u64 = 256 * MIB;
/// Sectors that a sector bitmap has bits for.
const BITMAP_SECTORS: u64 = 1 << 23;

const BAT: u128 = 0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08;
const METADATA: u128 = 0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e;
const FILE_PARAMETERS: u128 = 0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b;
const DISK_SIZE: u128 = 0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8;
const SECTOR_SIZE: u128 = 0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f;
const PHYSICAL_SECTOR_SIZE: u128 = 0xcda3_48c7_445d_4471_9cc9_e988_5251_c556;
const DISK_ID: u128 = 0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746;
const PARENT_LOCATOR: u128 = 0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c;
/// Flags of an item of metadata (section 2.6.1.2): the format's own and not a user's, and not to be ignored.
const ITEM_REQUIRED: u32 = 4;

/// What a file says of its disk, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Of the disk.
    pub capacity: u64,
    /// Of a block: a power of two.
    pub block: u64,
    /// Place of the block allocation table.
    pub table: u64,
    /// Blocks between two entries of sector bitmaps.
    chunk: u64,
}

fn corrupt<T>(what: &str) -> Result<T, Refusal> {
    Err(Refusal::Corrupt(what.to_owned()))
}

/// Whether a structure's CRC-32C, at its byte 4, is right.
fn sum_is_right(bytes: &[u8]) -> bool {
    let mut zeroed = bytes.to_vec();
    put(&mut zeroed, 4, &[0; 4]);
    crc32c::crc32c(&zeroed) == le32(bytes, 4)
}

/// A GUID, whose first three fields are little-endian, as it is written in the specification.
fn guid(bytes: &[u8], at: usize) -> u128 {
    let field = |shift: u32, value: u64| u128::from(value) << shift;
    let rest = le64(bytes, at.saturating_add(8)).swap_bytes();
    field(96, le32(bytes, at).into())
        | field(80, le16(bytes, at.saturating_add(4)).into())
        | field(64, le16(bytes, at.saturating_add(6)).into())
        | field(0, rest)
}

fn read(storage: &dyn Storage, at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size(len)];
    storage.read_bytes(at, &mut bytes)?;
    Ok(bytes)
}

impl Header {
    /// Reads all of it.
    pub fn read(storage: &dyn Storage) -> io::Result<Result<Self, Refusal>> {
        if !read(storage, 0, 8)?.starts_with(MAGIC) {
            return Ok(corrupt("it does not begin with \"vhdxfile\""));
        }
        let mut newest: Option<Vec<u8>> = None;
        for at in HEADERS {
            let header = read(storage, at, HEADER_BYTES as u64)?;
            let newer = newest.as_ref().is_none_or(|other| le64(&header, 8) > le64(other, 8));
            if header.starts_with(b"head") && sum_is_right(&header) && newer {
                newest = Some(header);
            }
        }
        let Some(header) = newest else { return Ok(corrupt("neither of its headers is sound")) };
        if le16(&header, 66) != 1 {
            return Ok(Err(Refusal::Unsupported("it is of a version that yado has not".into())));
        }
        if guid(&header, 48) != 0 {
            let what = "it was not closed in order, and its log must be replayed first: open it once in Hyper-V, or with \
                        `qemu-img check -r all`";
            return Ok(Err(Refusal::Unsupported(what.into())));
        }
        let regions = match Regions::read(storage)? {
            Ok(regions) => regions,
            Err(refusal) => return Ok(Err(refusal)),
        };
        Self::from_metadata(storage, &regions)
    }

    fn from_metadata(storage: &dyn Storage, regions: &Regions) -> io::Result<Result<Self, Refusal>> {
        let (place, len) = regions.metadata;
        let table = read(storage, place, REGIONS_BYTES)?;
        if !table.starts_with(b"metadata") {
            return Ok(corrupt("its metadata has no table"));
        }
        let (mut parameters, mut capacity, mut sector) = (None, None, None);
        let count = usize::from(le16(&table, 10)).min(ENTRIES_MAX);
        for row in table.chunks_exact(32).skip(1).take(count) {
            let (at, bytes) = (u64::from(le32(row, 16)), u64::from(le32(row, 20)));
            let inside = at >= REGIONS_BYTES && at.saturating_add(bytes.max(8)) <= len;
            let item = || read(storage, place.saturating_add(at), 8);
            match guid(row, 0) {
                FILE_PARAMETERS | DISK_SIZE | SECTOR_SIZE if !inside => {
                    return Ok(corrupt("an item of its metadata is outside"));
                }
                FILE_PARAMETERS => parameters = Some(item()?),
                DISK_SIZE => capacity = Some(le64(&item()?, 0)),
                SECTOR_SIZE => sector = Some(u64::from(le32(&item()?, 0))),
                PHYSICAL_SECTOR_SIZE | DISK_ID | PARENT_LOCATOR => {}
                _ if le32(row, 24) & ITEM_REQUIRED != 0 => {
                    return Ok(Err(Refusal::Unsupported("it has metadata that yado does not know".into())));
                }
                _ => {}
            }
        }
        let (Some(parameters), Some(capacity), Some(sector)) = (parameters, capacity, sector) else {
            return Ok(corrupt("its metadata does not say how large disk, blocks and sectors are"));
        };
        if le32(&parameters, 4) & 2 != 0 {
            let what =
                "it is a differencing VHDX: merge it into its parent first, or convert it where it was made";
            return Ok(Err(Refusal::Unsupported(what.into())));
        }
        let block = u64::from(le32(&parameters, 0));
        if !block.is_power_of_two()
            || !(MIB..=BLOCK_MAX).contains(&block)
            || (sector != 512 && sector != 4096)
        {
            return Ok(corrupt("its blocks or sectors have a size that cannot be"));
        }
        if capacity > CAPACITY_MAX || !capacity.is_multiple_of(sector) {
            return Ok(corrupt("its disk has a size that cannot be"));
        }
        let chunk = BITMAP_SECTORS.saturating_mul(sector) >> (block.trailing_zeros() & 63);
        let header = Self { capacity, block, table: regions.table.0, chunk: chunk.max(1) };
        // Up to the last block; behind it nothing is looked for.
        let last = header.entry_of(capacity.div_ceil(block).saturating_sub(1));
        if last.saturating_add(1).saturating_mul(8) > regions.table.1 {
            return Ok(corrupt("its block allocation table is too small"));
        }
        Ok(Ok(header))
    }

    /// The number of a block's entry: after each chunk of blocks comes one for a sector bitmap.
    pub fn entry_of(&self, block: u64) -> u64 {
        block.saturating_add(block.checked_div(self.chunk).unwrap_or(0))
    }
}

/// Place and length of the two regions that every file has.
struct Regions {
    table: (u64, u64),
    metadata: (u64, u64),
}

impl Regions {
    fn read(storage: &dyn Storage) -> io::Result<Result<Self, Refusal>> {
        let mut sound = None;
        for at in REGIONS {
            let table = read(storage, at, REGIONS_BYTES)?;
            if sound.is_none() && table.starts_with(b"regi") && sum_is_right(&table) {
                sound = Some(table);
            }
        }
        let Some(bytes) = sound else { return Ok(corrupt("neither of its tables of regions is sound")) };
        let (mut table, mut metadata) = (None, None);
        let count = size(le32(&bytes, 8).into()).min(ENTRIES_MAX);
        for row in bytes.get(16..).unwrap_or_default().chunks_exact(32).take(count) {
            let place = (le64(row, 16), u64::from(le32(row, 24)));
            let end = place.0.saturating_add(place.1);
            let known = matches!(guid(row, 0), BAT | METADATA);
            if known && (place.0 < MIB || !place.0.is_multiple_of(MIB) || end > storage.len()) {
                return Ok(corrupt("a region is outside the file"));
            }
            match guid(row, 0) {
                BAT => table = Some(place),
                METADATA => metadata = Some(place),
                _ if le32(row, 28) & 1 != 0 => {
                    return Ok(Err(Refusal::Unsupported("it has a region that yado does not know".into())));
                }
                _ => {}
            }
        }
        let (Some(table), Some(metadata)) = (table, metadata) else {
            return Ok(corrupt("its block allocation table or its metadata is missing"));
        };
        Ok(Ok(Self { table, metadata }))
    }
}
