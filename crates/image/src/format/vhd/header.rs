//! What a VHD says of itself: the footer (512 bytes, the file's last, with a copy in front unless the disk is fixed), the
//! header of a dynamic disk (1024 bytes), and where it names its parent. Big-endian.
//!
//! Source: Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0, sections "Hard Disk Footer Format" and
//! "Dynamic Disk Header Format".

use crate::endian::{be16, be32, be64, put, size};
use crate::storage::Storage;
use std::io;
use std::time::SystemTime;

/// What a footer begins with.
pub const COOKIE: &[u8] = b"conectix";
const HEADER_COOKIE: &[u8] = b"cxsparse";
/// Bytes of a footer, and of a sector.
pub const FOOTER: u64 = 512;
/// The bytes of one.
pub type Footer = [u8; 512];
/// Bytes of the header of a dynamic disk.
pub const HEADER: u64 = 1024;
/// Where the format's time begins, in seconds since 1970.
const YEAR_2000: u64 = 946_684_800;
const VERSION: u32 = 0x0001_0000;
/// The largest disk: as many sectors as other programs accept.
pub const CAPACITY_MAX: u64 = 0xff00_0000 * 512;
/// Most bytes of a block allocation table.
const TABLE_BYTES_MAX: u64 = 32 << 20;
/// Nothing there.
const NOWHERE: u64 = u64::MAX;
/// Places where a header names the parent.
const LOCATORS: usize = 8;
const LOCATORS_AT: usize = 576;
/// A name in UTF-16, little-endian: relative to the image, and absolute.
const RELATIVE: u32 = u32::from_be_bytes(*b"W2ru");
const ABSOLUTE: u32 = u32::from_be_bytes(*b"W2ku");
/// Longest name in bytes.
const NAME_MAX: u32 = 4096;
/// A disk whose geometry is this is larger than geometry can say.
const GEOMETRY_SECTORS_MAX: u64 = 65535 * 16 * 255;

/// What kind of disk it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All bytes in a row.
    Fixed,
    /// Blocks where something was written.
    Dynamic,
    /// Sectors that differ from the parent's.
    Differencing,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

/// The disk that a differencing one differs from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parent {
    /// Its identity.
    pub uuid: [u8; 16],
    /// When it was written, in seconds since 2000.
    pub time: u32,
    /// Its file.
    pub name: String,
}

/// The tables of a dynamic or differencing disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    /// Place of this header.
    pub at: u64,
    /// Place of the block allocation table.
    pub table: u64,
    /// Entries of the table.
    pub entries: u64,
    /// Bytes of a block, as a power of two.
    pub block_bits: u32,
    /// Of differencing disks.
    pub parent: Option<Parent>,
    /// Where the names of the parent end.
    pub names_end: u64,
}

/// What footer and header say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub capacity: u64,
    /// What kind of disk it is.
    pub kind: Kind,
    /// Its identity.
    pub uuid: [u8; 16],
    /// Unless it is fixed.
    pub blocks: Option<Blocks>,
    /// The file's last sector is the footer as it should be.
    pub(super) sealed: bool,
    /// The footer.
    pub(super) footer: Footer,
}

/// Why it cannot be used.
pub type Refusal = String;

/// The sum that footers and headers carry: the ones' complement of all bytes but its own.
fn sum(bytes: &[u8], at: usize) -> u32 {
    let others = bytes.iter().enumerate().filter(|(place, _)| !(at..at.saturating_add(4)).contains(place));
    !others.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

fn put_sum(bytes: &mut [u8], at: usize) {
    let sum = sum(bytes, at);
    put(bytes, at, &sum.to_be_bytes());
}

fn is_footer(bytes: &[u8]) -> bool {
    bytes.starts_with(COOKIE) && sum(bytes, 64) == be32(bytes, 64)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes.get(at..at.saturating_add(N)).unwrap_or(&[0; N]));
    out
}

/// Seconds since 2000.
pub fn seconds(time: SystemTime) -> u32 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(since.saturating_sub(YEAR_2000)).unwrap_or(u32::MAX)
}

/// Cylinders, heads and sectors of a disk: section "CHS Calculation".
fn geometry(capacity: u64) -> [u8; 4] {
    let sectors = (capacity / 512).min(GEOMETRY_SECTORS_MAX);
    let (heads, track): (u64, u64) = if sectors >= 65535 * 16 * 63 {
        (16, 255)
    } else {
        let heads = (sectors / 17).div_ceil(1024).max(4);
        if heads <= 16 && sectors / 17 < heads.saturating_mul(1024) {
            (heads, 17)
        } else if sectors / 31 < 16 * 1024 {
            (16, 31)
        } else {
            (16, 63)
        }
    };
    let cylinders = sectors.checked_div(track.saturating_mul(heads)).unwrap_or(0) as u16;
    let [high, low] = cylinders.to_be_bytes();
    [high, low, heads as u8, track as u8]
}

/// The next size that geometry can say exactly: what makers that go by it make of a size.
pub fn with_whole_cylinders(size: u64) -> u64 {
    let said = |capacity: u64| {
        let [high, low, heads, track] = geometry(capacity);
        let cylinders = u64::from(u16::from_be_bytes([high, low]));
        cylinders.saturating_mul(heads.into()).saturating_mul(track.into()).saturating_mul(512)
    };
    let largest = GEOMETRY_SECTORS_MAX.saturating_mul(512);
    let mut asked = size.min(largest);
    // At most a cylinder's sectors.
    while said(asked) < size.min(largest) {
        asked = asked.saturating_add(512);
    }
    if said(asked) >= largest { size } else { said(asked) }
}

/// The size of the disk: by the footer's number or by its geometry, whichever its maker goes by.
fn capacity(footer: &[u8]) -> u64 {
    let exact: [&[u8]; 6] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];
    let byte = |at: usize| u64::from(footer.get(at).copied().unwrap_or(0));
    let geometry = u64::from(be16(footer, 56)).saturating_mul(byte(58)).saturating_mul(byte(59));
    let by_number = exact.contains(&footer.get(28..32).unwrap_or_default());
    if by_number || geometry >= GEOMETRY_SECTORS_MAX || geometry == 0 {
        be64(footer, 48) & !511
    } else {
        geometry.saturating_mul(512)
    }
}

/// A new footer.
pub fn footer(capacity: u64, kind: Kind, uuid: [u8; 16], header: u64) -> Footer {
    let mut bytes = [0; 512];
    put(&mut bytes, 0, COOKIE);
    put(&mut bytes, 8, &2u32.to_be_bytes());
    put(&mut bytes, 12, &VERSION.to_be_bytes());
    put(&mut bytes, 16, &header.to_be_bytes());
    put(&mut bytes, 24, &seconds(SystemTime::now()).to_be_bytes());
    // By this name QEMU and others know that the size is exact and not what the geometry says.
    put(&mut bytes, 28, b"qem2");
    put(&mut bytes, 32, &0x0005_0003u32.to_be_bytes());
    put(&mut bytes, 36, b"Wi2k");
    put(&mut bytes, 40, &capacity.to_be_bytes());
    put(&mut bytes, 60, &kind.number().to_be_bytes());
    put(&mut bytes, 68, &uuid);
    resized(&bytes, capacity, header)
}

/// The footer for another size and place of the header.
pub fn resized(footer: &Footer, capacity: u64, header: u64) -> Footer {
    let mut bytes = *footer;
    put(&mut bytes, 16, &header.to_be_bytes());
    // A disk that was rounded up by its maker's geometry has an exact size from now on.
    put(&mut bytes, 28, b"qem2");
    put(&mut bytes, 48, &capacity.to_be_bytes());
    put(&mut bytes, 56, &geometry(capacity));
    put_sum(&mut bytes, 64);
    bytes
}

impl Header {
    /// The disk that it differs from.
    pub fn parent(&self) -> Option<&Parent> {
        self.blocks.as_ref().and_then(|blocks| blocks.parent.as_ref())
    }

    /// Reads footer and header.
    pub fn read(storage: &dyn Storage) -> io::Result<Result<Self, Refusal>> {
        let Some(end) = storage.len().checked_sub(FOOTER) else { return Ok(Err("it is too short".into())) };
        let (mut front, mut back) = ([0; 512], [0; 512]);
        storage.read_bytes(0, &mut front)?;
        storage.read_bytes(end, &mut back)?;
        let kind = |footer: &[u8]| match be32(footer, 60) {
            2 => Ok(Kind::Fixed),
            3 => Ok(Kind::Dynamic),
            4 => Ok(Kind::Differencing),
            other => Err(format!("its footer names a disk of type {other}, which there is none of")),
        };
        // A guest writes the front of a fixed disk, and what may be last in a file that was not closed; it never sees a
        // footer's identity. Where the two are not of one disk nothing can be believed.
        let footer = match (is_footer(&front), is_footer(&back)) {
            (true, true) if array::<16>(&front, 68) != array::<16>(&back, 68) => {
                let what = "the footers at its beginning and end are of different disks; if it is a fixed disk its guest \
                            wrote the first: open it as raw to clear its first sector";
                return Ok(Err(what.into()));
            }
            // Changes go to the front first.
            (true, _) if kind(&front) != Ok(Kind::Fixed) => front,
            (_, true) => back,
            _ => return Ok(Err("it has no footer with a right sum".into())),
        };
        let kind = match kind(&footer) {
            Ok(kind) => kind,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let capacity = capacity(&footer);
        if capacity > CAPACITY_MAX || be32(&footer, 12) >> 16 != VERSION >> 16 {
            return Ok(Err("its size, or its version, cannot be".into()));
        }
        let sealed = back == footer;
        let uuid = array(&footer, 68);
        let header = Self { capacity, kind, uuid, blocks: None, sealed, footer };
        if kind == Kind::Fixed {
            let whole = capacity <= end;
            return Ok(if whole { Ok(header) } else { Err("the file is shorter than its disk".into()) });
        }
        let blocks = Blocks::read(storage, be64(&footer, 16), &header)?;
        Ok(match blocks {
            Ok(blocks) => Ok(Self { blocks: Some(blocks), ..header }),
            Err(refusal) => Err(refusal),
        })
    }
}

impl Blocks {
    fn read(storage: &dyn Storage, at: u64, disk: &Header) -> io::Result<Result<Self, Refusal>> {
        let mut header = [0; HEADER as usize];
        if !at.is_multiple_of(512) || at.saturating_add(HEADER) > storage.len() {
            return Ok(Err("the header of a dynamic disk is where it cannot be".into()));
        }
        storage.read_bytes(at, &mut header)?;
        if !header.starts_with(HEADER_COOKIE) || sum(&header, 36) != be32(&header, 36) {
            return Ok(Err("the header of a dynamic disk is missing, or its sum is wrong".into()));
        }
        let (table, entries) = (be64(&header, 16), u64::from(be32(&header, 28)));
        let block = be32(&header, 32);
        let block_bits = block.trailing_zeros();
        if !block.is_power_of_two() || !(9..=30).contains(&block_bits) {
            return Ok(Err("its blocks have a size that cannot be".into()));
        }
        let bytes = entries.saturating_mul(4);
        let fits = table.checked_add(bytes).is_some_and(|end| end <= storage.len());
        if disk.capacity.div_ceil(block.into()) > entries
            || bytes > TABLE_BYTES_MAX
            || !fits
            || table % 512 != 0
        {
            return Ok(Err("its block allocation table is too small, too large, or outside the file".into()));
        }
        let apart = at >= table.saturating_add(bytes) || at.saturating_add(HEADER) <= table;
        if at < FOOTER || table < FOOTER || !apart {
            return Ok(Err("its header or its block allocation table lies over something else".into()));
        }
        let mut blocks = Self { at, table, entries, block_bits, parent: None, names_end: 0 };
        if disk.kind == Kind::Differencing {
            let (name, end) = parent_name(storage, &header)?;
            let Some(name) = name else { return Ok(Err("it does not name its parent".into())) };
            blocks.parent = Some(Parent { uuid: array(&header, 40), time: be32(&header, 56), name });
            blocks.names_end = end;
        }
        Ok(Ok(blocks))
    }

    /// The header, with the names of the parent behind it at their places.
    pub fn encode(&self, directory: Option<&std::path::Path>) -> Result<Vec<u8>, Refusal> {
        let mut bytes = vec![0; size(HEADER)];
        put(&mut bytes, 0, HEADER_COOKIE);
        put(&mut bytes, 8, &NOWHERE.to_be_bytes());
        put(&mut bytes, 16, &self.table.to_be_bytes());
        put(&mut bytes, 24, &VERSION.to_be_bytes());
        put(&mut bytes, 28, &(self.entries as u32).to_be_bytes());
        put(&mut bytes, 32, &(1u32 << (self.block_bits & 31)).to_be_bytes());
        if let Some(parent) = &self.parent {
            put(&mut bytes, 40, &parent.uuid);
            put(&mut bytes, 56, &parent.time.to_be_bytes());
            let file = parent.name.rsplit('/').next().unwrap_or_default();
            let name: Vec<u8> = file.encode_utf16().take(255).flat_map(u16::to_be_bytes).collect();
            put(&mut bytes, 64, &name);
            let absolute = match directory {
                Some(directory) if !parent.name.starts_with('/') => directory.join(&parent.name),
                _ => parent.name.clone().into(),
            };
            let relative =
                if parent.name.starts_with('/') { None } else { Some(format!("./{}", parent.name)) };
            let names = [(RELATIVE, relative), (ABSOLUTE, Some(absolute.to_string_lossy().into_owned()))];
            let mut row = LOCATORS_AT;
            for (platform, name) in names.into_iter().filter_map(|(platform, name)| Some((platform, name?))) {
                let text: Vec<u8> =
                    name.replace('/', "\\").encode_utf16().flat_map(u16::to_le_bytes).collect();
                if text.len() as u64 > NAME_MAX.into() {
                    return Err("the name of the parent is too long".into());
                }
                let place = self.at.saturating_add(bytes.len() as u64);
                put(&mut bytes, row, &platform.to_be_bytes());
                put(&mut bytes, row.saturating_add(4), &(text.len().div_ceil(512) as u32).to_be_bytes());
                put(&mut bytes, row.saturating_add(8), &(text.len() as u32).to_be_bytes());
                put(&mut bytes, row.saturating_add(16), &place.to_be_bytes());
                bytes.extend_from_slice(&text);
                bytes.resize(bytes.len().next_multiple_of(512), 0);
                row = row.saturating_add(24);
            }
        }
        let header = bytes.get_mut(..size(HEADER)).unwrap_or_default();
        put_sum(header, 36);
        Ok(bytes)
    }

    /// Bytes of a block.
    pub fn block(&self) -> u64 {
        1 << (self.block_bits & 63)
    }

    /// Bytes of the bitmap before each block's data: a bit for each sector, in whole sectors.
    pub fn bitmap(&self) -> u64 {
        (self.block() / 512).div_ceil(8).next_multiple_of(512)
    }
}

/// The name of the parent, as a path, and where the last of its names in the file ends.
fn parent_name(storage: &dyn Storage, header: &[u8]) -> io::Result<(Option<String>, u64)> {
    let (mut relative, mut absolute, mut end) = (None, None, 0u64);
    for index in 0..LOCATORS {
        let row = LOCATORS_AT.saturating_add(index.saturating_mul(24));
        let (platform, len) = (be32(header, row), be32(header, row.saturating_add(8)));
        let place = be64(header, row.saturating_add(16));
        if platform == 0 || len == 0 || len > NAME_MAX || place.saturating_add(len.into()) > storage.len() {
            continue;
        }
        end = end.max(place.saturating_add(len.into()).next_multiple_of(512));
        let mut bytes = vec![0; size(len.into())];
        storage.read_bytes(place, &mut bytes)?;
        let units: Vec<u16> = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes(array(unit, 0))).collect();
        match (platform, String::from_utf16(&units)) {
            (RELATIVE, Ok(name)) => relative = Some(name),
            (ABSOLUTE, Ok(name)) => absolute = Some(name),
            _ => {}
        }
    }
    let plain = |name: String| name.trim_end_matches('\0').replace('\\', "/");
    let units = header.get(64..576).unwrap_or_default().chunks_exact(2).map(|unit| be16(unit, 0));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    let short = String::from_utf16(&units).ok();
    let name = match (relative.map(plain), absolute.map(plain)) {
        (Some(name), _) => Some(name.strip_prefix("./").unwrap_or(&name).to_owned()),
        (None, Some(name)) if name.starts_with('/') => Some(name),
        // A path of another system: the file may be beside the image.
        (None, name) => short.map(plain).or(name).and_then(|name| name.rsplit('/').next().map(str::to_owned)),
    };
    Ok((name.filter(|name| !name.is_empty()), end))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn geometries_are_those_of_the_specification() {
        let sectors = |capacity: u64| {
            let [high, low, heads, track] = geometry(capacity);
            u64::from(u16::from_be_bytes([high, low])) * u64::from(heads) * u64::from(track)
        };
        for mib in [1u64, 3, 100, 127, 504, 2048, 130_000, 3_000_000] {
            let bytes = mib << 20;
            let said = sectors(bytes) * 512;
            assert!(said <= bytes && (said + (1 << 20) > bytes || mib > 127_000), "{mib} MiB: {said}");
        }
        assert_eq!(geometry(CAPACITY_MAX), [255, 255, 16, 255]);
        // As qemu-img makes of 10M, and of what is too large for geometry.
        assert_eq!(with_whole_cylinders(10 << 20), 10_514_432);
        assert_eq!(with_whole_cylinders(512), 34_816);
        assert_eq!(with_whole_cylinders(1 << 20), 1_079_296);
        assert_eq!(with_whole_cylinders(3000 << 20), 3_146_121_216);
        assert_eq!(with_whole_cylinders(2 << 40), 2 << 40);
    }

    #[test]
    fn names_of_parents_are_paths() {
        let blocks = |name: &str| Blocks {
            at: 512,
            table: 8192,
            entries: 1,
            block_bits: 21,
            parent: Some(Parent { name: name.to_owned(), ..Parent::default() }),
            names_end: 0,
        };
        for name in ["base.vhd", "../a/b\u{e4}se.vhd", "/abs/base.vhd"] {
            let mut bytes = blocks(name).encode(Some(std::path::Path::new("/dir"))).unwrap();
            assert_eq!(sum(&bytes[..1024], 36), be32(&bytes, 36));
            bytes.splice(0..0, [0; 512]);
            let storage = crate::storage::power::Power::new(bytes.clone());
            let (found, end) = parent_name(&storage, &bytes[512..1536]).unwrap();
            assert_eq!(found.as_deref(), Some(name));
            assert_eq!(end, bytes.len() as u64);
        }
        // Only a path of Windows: the file's name is what is left.
        let mut header = vec![0; 1024];
        put(
            &mut header,
            64,
            &"C:\\vm\\base.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<u8>>(),
        );
        let (found, _) = parent_name(&crate::storage::power::Power::default(), &header).unwrap();
        assert_eq!(found.as_deref(), Some("base.vhd"));
    }
}
