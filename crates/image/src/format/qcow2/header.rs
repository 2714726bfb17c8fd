//! The header of a qcow2 image and its extensions, and the limits of what is accepted.
//!
//! Source: QEMU's docs/interop/qcow2.rst, sections "Header" and "Header extensions".

use crate::endian::{be32, be64, put, size};
use crate::format::Refusal;
use crate::format::container::Fact;

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
const HEADER_V2: usize = 72;
/// Bytes of the version 3 header that we write, with the compression type.
const HEADER_V3: usize = 112;
/// Bytes of the shortest version 3 header.
const HEADER_V3_MIN: usize = 104;

/// Largest active L1 table in bytes.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;
/// Most internal snapshots.
pub const SNAPSHOTS_MAX: u32 = 65536;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// Longest name of a backing file in bytes.
pub const BACKING_NAME_MAX: usize = 1023;
/// Header extensions that are looked at.
const EXTENSIONS_MAX: usize = 64;

/// Incompatible feature: refcounts may be stale.
pub const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
/// Incompatible feature: structures are known to be damaged.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in a file of its own.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: the compression type is not deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries have 128 bits and 32 subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = 0x1f;
/// Compatible feature: refcounts are written late.
pub const COMPATIBLE_LAZY: u64 = 1 << 0;
/// Autoclear feature: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear feature: the external data file can be read as a raw image.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_LUKS: u32 = 0x0537_be77;

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate in a window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Where the directory of dirty bitmaps is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_len: u64,
    /// Its place in the file.
    pub directory_offset: u64,
}

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of bytes in a cluster.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Its place.
    pub l1_offset: u64,
    /// Place of the refcount table.
    pub reftable_offset: u64,
    /// Its clusters.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Place of the snapshot table.
    pub snapshots_offset: u64,
    /// Incompatible features.
    pub incompatible: u64,
    /// Compatible features.
    pub compatible: u64,
    /// Autoclear features.
    pub autoclear: u64,
    /// log2 of bits in a refcount.
    pub refcount_order: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file, as it stands in the image.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Dirty bitmaps.
    pub bitmaps: Option<BitmapsExtension>,
    /// Extensions that we do not know: kept as they are.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// How a file gets another header without ever having none.
pub struct Switch {
    /// First, to be stable: the backing file's name and its place, where the old header has nothing.
    pub name: Option<(u64, Vec<u8>)>,
    /// Then the first sector.
    pub sector: Vec<u8>,
}

fn corrupt<T>(what: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::Corrupt(what.into()))
}

impl Header {
    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << (self.cluster_bits & 63)
    }

    /// What it says, by qemu-img's names.
    pub fn details(&self) -> Vec<(&'static str, Fact)> {
        let text = |text: &str| Fact::Text(text.to_owned());
        let mut details = vec![
            ("compat", text(if self.version == 2 { "0.10" } else { "1.1" })),
            ("compression-type", text(if self.compression == Compression::Zstd { "zstd" } else { "zlib" })),
            ("refcount-bits", Fact::Number(1 << (self.refcount_order & 63))),
        ];
        if self.version >= 3 {
            details.push(("lazy-refcounts", Fact::Flag(self.compatible & COMPATIBLE_LAZY != 0)));
            details.push(("corrupt", Fact::Flag(self.incompatible & INCOMPATIBLE_CORRUPT != 0)));
            details.push(("extended-l2", Fact::Flag(self.extended_l2())));
            if let Some(file) = &self.data_file {
                details.push(("data-file", text(file)));
                details.push(("data-file-raw", Fact::Flag(self.autoclear & AUTOCLEAR_RAW_DATA != 0)));
            }
        }
        details
    }

    /// Whether L2 entries have 128 bits.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    /// Whether guest data is in a file of its own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// log2 of entries in an L2 table.
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits.saturating_sub(if self.extended_l2() { 4 } else { 3 })
    }

    /// L1 entries that a disk of `size` bytes takes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        let bits = self.cluster_bits.saturating_add(self.l2_bits()) & 63;
        size.div_ceil(1 << bits)
    }

    /// Reads a header; `bytes` are the image's first cluster, or as much of it as there is.
    pub fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        if be32(bytes, 0) != MAGIC || bytes.len() < HEADER_V2 {
            return corrupt("it does not begin with a qcow2 header");
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(Refusal::Unsupported(format!(
                "it is qcow2 version {version}; versions 2 and 3 are known"
            )));
        }
        if version == 3 && bytes.len() < HEADER_V3_MIN {
            return corrupt("the header ends early");
        }
        let v3 = |at: usize| if version == 3 { be64(bytes, at) } else { 0 };
        let header_len = if version == 3 { size(be32(bytes, 100).into()) } else { HEADER_V2 };
        let mut header = Self {
            version,
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            reftable_offset: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order: if version == 3 { be32(bytes, 96) } else { 4 },
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            bitmaps: None,
            unknown: Vec::new(),
        };
        if !(9..=21).contains(&header.cluster_bits) {
            return corrupt(format!("clusters of 2^{} bytes; 2^9 to 2^21 are allowed", header.cluster_bits));
        }
        if version == 3 && (header_len < HEADER_V3_MIN || !header_len.is_multiple_of(8)) {
            return corrupt(format!("a header of {header_len} bytes"));
        }
        if header_len as u64 > header.cluster_size() {
            return corrupt("a header longer than a cluster");
        }
        let compression = if header_len > HEADER_V3_MIN { bytes.get(104).copied().unwrap_or(0) } else { 0 };
        header.features(compression, be32(bytes, 32), bytes, header_len)?;
        header.extensions(bytes, header_len)?;
        header.backing_name(be64(bytes, 8), be32(bytes, 16), bytes)?;
        header.check()?;
        Ok(header)
    }

    fn features(
        &mut self,
        compression: u8,
        crypt: u32,
        bytes: &[u8],
        header_len: usize,
    ) -> Result<(), Refusal> {
        let unknown = self.incompatible & !INCOMPATIBLE_KNOWN;
        if unknown != 0 {
            let names = feature_names(bytes, header_len, unknown);
            return Err(Refusal::Unsupported(format!("it needs features that yado has not: {names}")));
        }
        self.compression = match (compression, self.incompatible & INCOMPATIBLE_COMPRESSION != 0) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0, true) | (1, false) => return corrupt("compression type and feature bit disagree"),
            (other, _) => {
                return Err(Refusal::Unsupported(format!(
                    "it is compressed by method {other}; 0 and 1 are known"
                )));
            }
        };
        match crypt {
            0 => Ok(()),
            1 => Err(Refusal::Unsupported(
                "it is encrypted with qcow2's AES, which is broken; convert it with the program that made it".into(),
            )),
            2 => Err(Refusal::Unsupported(
                "it is encrypted with LUKS, which yado does not open; convert it to a plain image with the program \
                 that made it, and keep that on an encrypted disk"
                    .into(),
            )),
            other => corrupt(format!("encryption method {other}")),
        }
    }

    fn extensions(&mut self, bytes: &[u8], header_len: usize) -> Result<(), Refusal> {
        let end = bytes.len().min(size(self.cluster_size()));
        let mut at = header_len;
        for _ in 0..EXTENSIONS_MAX {
            let Some(data) = at.checked_add(8).filter(|data| *data <= end) else { return Ok(()) };
            let (kind, len) = (be32(bytes, at), size(be32(bytes, at.saturating_add(4)).into()));
            if kind == EXTENSION_END {
                return Ok(());
            }
            let stop = data.saturating_add(len);
            let Some(content) = bytes.get(data..stop).filter(|_| stop <= end) else {
                return corrupt("a header extension leaves the first cluster");
            };
            self.extension(kind, content)?;
            at = stop.checked_next_multiple_of(8).unwrap_or(stop);
        }
        corrupt("too many header extensions")
    }

    fn extension(&mut self, kind: u32, content: &[u8]) -> Result<(), Refusal> {
        let text = || String::from_utf8_lossy(content).trim_end_matches('\0').to_owned();
        match kind {
            EXTENSION_BACKING_FORMAT => self.backing_format = Some(text()),
            EXTENSION_DATA_FILE => self.data_file = Some(text()),
            EXTENSION_FEATURE_NAMES => {}
            EXTENSION_LUKS => return corrupt("a LUKS header in an image that is not encrypted"),
            EXTENSION_BITMAPS if self.autoclear & AUTOCLEAR_BITMAPS != 0 => {
                if content.len() != 24 {
                    return corrupt("the bitmaps extension has a wrong length");
                }
                self.bitmaps = Some(BitmapsExtension {
                    count: be32(content, 0),
                    directory_len: be64(content, 8),
                    directory_offset: be64(content, 16),
                });
            }
            // Without the autoclear bit somebody wrote who does not know bitmaps: they are gone.
            EXTENSION_BITMAPS => {}
            _ => self.unknown.push((kind, content.to_vec())),
        }
        Ok(())
    }

    fn backing_name(&mut self, offset: u64, len: u32, bytes: &[u8]) -> Result<(), Refusal> {
        if offset == 0 || len == 0 {
            return Ok(());
        }
        let (start, len) = (size(offset), size(len.into()));
        if len > BACKING_NAME_MAX || start.saturating_add(len) as u64 > self.cluster_size() {
            return corrupt("the name of the backing file is too long or outside the first cluster");
        }
        let Some(name) = bytes.get(start..start.saturating_add(len)) else {
            return corrupt("the image ends inside the name of its backing file");
        };
        match std::str::from_utf8(name) {
            Ok(name) if !name.contains('\0') => self.backing = Some(name.to_owned()),
            _ => return corrupt("the name of the backing file is no text"),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Refusal> {
        let aligned = |offset: u64| offset & self.cluster_size().wrapping_sub(1) == 0 && offset < 1 << 56;
        if self.refcount_order > 6 {
            return corrupt(format!("refcounts of 2^{} bits", self.refcount_order));
        }
        if self.extended_l2() && self.cluster_bits < 14 {
            return corrupt("subclusters need clusters of 16 KiB or more");
        }
        let l1_bytes = u64::from(self.l1_size).saturating_mul(8);
        if l1_bytes > L1_BYTES_MAX {
            return corrupt(format!("an L1 table of {l1_bytes} bytes; {L1_BYTES_MAX} are the most"));
        }
        if self.l1_entries_for(self.size) > u64::from(self.l1_size) || self.size > 1 << 62 {
            return corrupt("the L1 table is too small for the disk");
        }
        if !aligned(self.l1_offset) || (self.l1_size > 0 && self.l1_offset == 0) {
            return corrupt("the L1 table is at no cluster");
        }
        let reftable = u64::from(self.reftable_clusters).saturating_mul(self.cluster_size());
        if reftable > REFTABLE_BYTES_MAX || self.reftable_clusters == 0 {
            return corrupt(format!(
                "a refcount table of {reftable} bytes; up to {REFTABLE_BYTES_MAX} are allowed"
            ));
        }
        if !aligned(self.reftable_offset) || self.reftable_offset == 0 {
            return corrupt("the refcount table is at no cluster");
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return corrupt(format!("{} snapshots; {SNAPSHOTS_MAX} are the most", self.snapshots));
        }
        if !aligned(self.snapshots_offset) || (self.snapshots > 0 && self.snapshots_offset == 0) {
            return corrupt("the snapshot table is at no cluster");
        }
        if self.data_file.is_some() != self.has_data_file() && self.data_file.is_some() {
            return corrupt("an external data file is named but not used");
        }
        if self.backing.is_some() && self.autoclear & AUTOCLEAR_RAW_DATA != 0 && self.has_data_file() {
            return corrupt("an image with a raw external data file cannot have a backing file");
        }
        Ok(())
    }

    /// The first cluster (or as much of it as is used) of an image with this header. `None` if the names do not fit.
    pub fn encode(&self) -> Option<Vec<u8>> {
        // Names of features help others to refuse in words; a small cluster may have no room for them.
        self.encode_with(true).or_else(|| self.encode_with(false))
    }

    fn encode_with(&self, feature_names: bool) -> Option<Vec<u8>> {
        let mut bytes = vec![0; size(self.cluster_size())];
        let end = self.put_extensions(&mut bytes, feature_names)?;
        if let Some(name) = &self.backing {
            bytes.get(..end.checked_add(name.len())?)?;
            put(&mut bytes, end, name.as_bytes());
            point_at_name(&mut bytes, end, name.len());
        }
        Some(bytes)
    }

    /// Whether bitmaps could be named, if they are not.
    pub fn has_room_for_bitmaps(&self) -> bool {
        let bitmaps = Some(BitmapsExtension { count: 0, directory_len: 0, directory_offset: 0 });
        Self { bitmaps, ..self.clone() }.encode().is_some()
    }

    /// What makes this the header of an image whose first cluster is `old`; `None` if there is no room for it beside that.
    pub fn encode_beside(&self, old: &[u8]) -> Option<Switch> {
        // Names of features are for people; they give way.
        [true, false].into_iter().find_map(|feature_names| self.encode_beside_with(old, feature_names))
    }

    fn encode_beside_with(&self, old: &[u8], feature_names: bool) -> Option<Switch> {
        let mut sector = vec![0; SECTOR];
        let end = self.put_extensions(&mut sector, feature_names)?;
        let Some(name) = self.backing.as_ref().map(|name| name.as_bytes()) else {
            return Some(Switch { name: None, sector });
        };
        let (start, len) = (size(be64(old, 8)), size(be32(old, 16).into()));
        let old_name = start..start.saturating_add(len);
        let stays = start >= end && old.get(old_name.clone()) == Some(name);
        let old_end = extensions_end(old).max(SECTOR);
        let free = |at: &usize| {
            let end = at.saturating_add(name.len());
            end <= old.len() && (end <= old_name.start || *at >= old_name.end)
        };
        let at = if end.saturating_add(name.len()) <= SECTOR {
            end
        } else if stays {
            start
        } else {
            [old_end, old_end.max(old_name.end)].into_iter().find(free)?
        };
        point_at_name(&mut sector, at, name.len());
        // What of it lies in the first sector is written with that.
        let inside = name.len().min(SECTOR.saturating_sub(at));
        put(&mut sector, at, name.get(..inside).unwrap_or_default());
        let is_new = at >= SECTOR && !stays;
        Some(Switch { name: is_new.then(|| (at as u64, name.to_vec())), sector })
    }

    /// Whether the extensions fit into the first sector.
    pub fn is_short(&self) -> bool {
        self.put_extensions(&mut [0; SECTOR], false).is_some()
    }

    /// Puts the fields and extensions to the beginning of `bytes`; answers where they end.
    fn put_extensions(&self, bytes: &mut [u8], feature_names: bool) -> Option<usize> {
        let header_len = if self.version == 3 { HEADER_V3 } else { HEADER_V2 };
        put(bytes, 0, &MAGIC.to_be_bytes());
        put(bytes, 4, &self.version.to_be_bytes());
        put(bytes, 20, &self.cluster_bits.to_be_bytes());
        put(bytes, 24, &self.size.to_be_bytes());
        put(bytes, 36, &self.l1_size.to_be_bytes());
        put(bytes, 40, &self.l1_offset.to_be_bytes());
        put(bytes, 48, &self.reftable_offset.to_be_bytes());
        put(bytes, 56, &self.reftable_clusters.to_be_bytes());
        put(bytes, 60, &self.snapshots.to_be_bytes());
        put(bytes, 64, &self.snapshots_offset.to_be_bytes());
        if self.version == 3 {
            put(bytes, 72, &self.incompatible.to_be_bytes());
            put(bytes, 80, &self.compatible.to_be_bytes());
            put(bytes, 88, &self.autoclear.to_be_bytes());
            put(bytes, 96, &self.refcount_order.to_be_bytes());
            put(bytes, 100, &(header_len as u32).to_be_bytes());
            put(bytes, 104, &[u8::from(self.compression == Compression::Zstd)]);
        }
        let mut at = header_len;
        let mut extend = |kind: u32, content: &[u8]| {
            let padded = content.len().checked_next_multiple_of(8)?;
            let end = at.checked_add(8)?.checked_add(padded)?;
            bytes.get(..end)?;
            put(bytes, at, &kind.to_be_bytes());
            put(bytes, at.saturating_add(4), &(content.len() as u32).to_be_bytes());
            put(bytes, at.saturating_add(8), content);
            at = end;
            Some(())
        };
        if let Some(format) = &self.backing_format {
            extend(EXTENSION_BACKING_FORMAT, format.as_bytes())?;
        }
        if let Some(name) = &self.data_file {
            extend(EXTENSION_DATA_FILE, name.as_bytes())?;
        }
        if let Some(bitmaps) = &self.bitmaps {
            let mut content = [0; 24];
            put(&mut content, 0, &bitmaps.count.to_be_bytes());
            put(&mut content, 8, &bitmaps.directory_len.to_be_bytes());
            put(&mut content, 16, &bitmaps.directory_offset.to_be_bytes());
            extend(EXTENSION_BITMAPS, &content)?;
        }
        for (kind, content) in &self.unknown {
            extend(*kind, content)?;
        }
        if self.version == 3 && feature_names {
            extend(EXTENSION_FEATURE_NAMES, &our_feature_names())?;
        }
        extend(EXTENSION_END, &[])?;
        Some(at)
    }
}

/// Says in a header's fields where the backing file's name is.
fn point_at_name(bytes: &mut [u8], at: usize, len: usize) {
    put(bytes, 8, &(at as u64).to_be_bytes());
    put(bytes, 16, &(len as u32).to_be_bytes());
}

/// Where the extensions of a header end.
fn extensions_end(bytes: &[u8]) -> usize {
    let mut at = if be32(bytes, 4) >= 3 { size(be32(bytes, 100).into()) } else { HEADER_V2 };
    for _ in 0..EXTENSIONS_MAX {
        let (kind, len) = (be32(bytes, at), size(be32(bytes, at.saturating_add(4)).into()));
        let data = at.saturating_add(8);
        if kind == EXTENSION_END || data > bytes.len() {
            return data;
        }
        at = data.saturating_add(len).checked_next_multiple_of(8).unwrap_or(usize::MAX);
    }
    at
}

/// Entries of the feature name table (section "Feature name table"): type, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

fn our_feature_names() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(48 * 8);
    for (kind, bit, name) in FEATURE_NAMES {
        let mut entry = [0; 48];
        put(&mut entry, 0, &[kind, bit]);
        put(&mut entry, 2, name.as_bytes());
        bytes.extend_from_slice(&entry);
    }
    bytes
}

/// Names of the incompatible features in `bits`, as the image's own table gives them.
fn feature_names(bytes: &[u8], header_len: usize, bits: u64) -> String {
    let mut names: Vec<String> = Vec::new();
    let mut at = header_len;
    let mut table: &[u8] = &[];
    for _ in 0..EXTENSIONS_MAX {
        let (kind, len) = (be32(bytes, at), size(be32(bytes, at.saturating_add(4)).into()));
        let data = at.saturating_add(8);
        if kind == EXTENSION_END {
            break;
        }
        if kind == EXTENSION_FEATURE_NAMES {
            table = bytes.get(data..data.saturating_add(len)).unwrap_or_default();
            break;
        }
        let stop = data.saturating_add(len);
        at = stop.checked_next_multiple_of(8).unwrap_or(stop);
    }
    for bit in (0..64u8).filter(|bit| bits >> bit & 1 != 0) {
        let entry = table.chunks_exact(48).find(|entry| entry.starts_with(&[0, bit]));
        let name = entry.and_then(|entry| entry.get(2..)).map(|name| {
            let name = String::from_utf8_lossy(name);
            name.chars().take_while(|c| !c.is_control()).collect::<String>()
        });
        names.push(name.unwrap_or_else(|| format!("bit {bit}")));
    }
    names.join(", ")
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    pub fn sound() -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: 10 << 30,
            l1_size: 20,
            l1_offset: 3 << 16,
            reftable_offset: 1 << 16,
            reftable_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: INCOMPATIBLE_COMPRESSION,
            compatible: COMPATIBLE_LAZY,
            autoclear: AUTOCLEAR_BITMAPS,
            refcount_order: 4,
            compression: Compression::Zstd,
            backing: Some("base.raw".into()),
            backing_format: Some("raw".into()),
            data_file: None,
            bitmaps: Some(BitmapsExtension { count: 1, directory_len: 32, directory_offset: 9 << 16 }),
            unknown: vec![(0x1234_5678, vec![1, 2, 3])],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let header = sound();
        assert_eq!(Header::parse(&header.encode().unwrap()), Ok(header));
        let old = Header {
            version: 2,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            bitmaps: None,
            ..sound()
        };
        assert_eq!(Header::parse(&old.encode().unwrap()), Ok(old));
    }

    #[test]
    fn unknown_features_are_refused_by_their_names() {
        let mut bytes = sound().encode().unwrap();
        put(&mut bytes, 72, &(1u64 << 40).to_be_bytes());
        assert!(matches!(Header::parse(&bytes), Err(Refusal::Unsupported(what)) if what.contains("bit 40")));
        put(&mut bytes, 72, &0u64.to_be_bytes());
        put(&mut bytes, 104, &[0]);
        put(&mut bytes, 32, &2u32.to_be_bytes());
        assert!(matches!(Header::parse(&bytes), Err(Refusal::Unsupported(what)) if what.contains("LUKS")));
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let header = Header { cluster_bits: 9, backing: Some("x".repeat(500)), ..sound() };
        assert_eq!(header.encode(), None);
    }

    proptest! {
        #[test]
        fn hostile_headers_are_refused_or_within_limits(
            changes in prop::collection::vec((0usize..600, any::<u8>()), 0..8),
            cut in 0usize..66000,
        ) {
            let mut bytes = sound().encode().unwrap();
            for (at, value) in changes {
                bytes[at] = value;
            }
            bytes.truncate(cut);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!((9..=21).contains(&header.cluster_bits));
                prop_assert!(u64::from(header.l1_size) * 8 <= L1_BYTES_MAX);
                prop_assert!(header.l1_entries_for(header.size) <= u64::from(header.l1_size));
            }
        }
    }
}
