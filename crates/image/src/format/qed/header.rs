//! The header of a QED image: 64 bytes, little-endian, and the backing file's name behind it.
//!
//! Source: QEMU's docs/interop/qed_spec.txt, section "Header".

use crate::endian::{le32, le64, put, size};
use crate::format::Refusal;
use crate::storage::Storage;
use std::io;

/// What a file begins with.
pub const MAGIC: &[u8] = b"QED\0";
/// Bytes of the fields.
pub const HEADER_BYTES: u64 = 64;
const FEATURE_BACKING: u64 = 1;
const FEATURE_NEED_CHECK: u64 = 2;
const FEATURE_BACKING_RAW: u64 = 4;
const FEATURES_KNOWN: u64 = 7;
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=26;
const TABLE_CLUSTERS_MAX: u64 = 16;
/// Longest name of a backing file.
const NAME_MAX: u32 = 1023;
/// Place of the name's place and length.
const NAME_AT: usize = 56;
/// Where we put names. Each is in the first cluster, whatever its size, and one is free whereever a name is.
const NAME_PLACES: [u32; 3] = [64, 2048, 3072];

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a cluster, as a power of two.
    pub cluster_bits: u32,
    /// Clusters of a table, of either level.
    pub table_clusters: u64,
    /// Clusters of the header.
    pub header_clusters: u64,
    /// Features without which the image cannot be read.
    pub features: u64,
    /// Features that do not matter to who does not know them.
    compatible: u64,
    /// Features that are none any more once a program that does not know them has written the image.
    pub autoclear: u64,
    /// Place of the L1 table.
    pub l1: u64,
    /// Bytes of the disk.
    pub capacity: u64,
    /// Name of the backing file.
    pub backing: Option<String>,
    /// Its place.
    name_at: u32,
}

impl Header {
    /// Reads a header.
    pub fn read(storage: &dyn Storage) -> io::Result<Result<Self, Refusal>> {
        let mut bytes = [0; HEADER_BYTES as usize];
        storage.read_bytes(0, &mut bytes)?;
        let header = match Self::parse(&bytes) {
            Ok(header) => header,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if header.features & FEATURE_BACKING == 0 {
            return Ok(Ok(header));
        }
        let (at, len) = (le32(&bytes, NAME_AT), le32(&bytes, NAME_AT.saturating_add(4)));
        let end = u64::from(at).saturating_add(len.into());
        if len == 0 || len > NAME_MAX || end > header.header_bytes() {
            return Ok(Err(Refusal::Corrupt("the name of its backing file does not fit".into())));
        }
        let mut name = vec![0; size(len.into())];
        storage.read_bytes(at.into(), &mut name)?;
        Ok(match String::from_utf8(name) {
            Ok(name) => Ok(Self { backing: Some(name), name_at: at, ..header }),
            Err(_) => Err(Refusal::Corrupt("the name of its backing file is no text".into())),
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let corrupt = |what: &str| Err(Refusal::Corrupt(what.to_owned()));
        if !bytes.starts_with(MAGIC) {
            return corrupt("it does not begin with \"QED\"");
        }
        let features = le64(bytes, 16);
        if features & !FEATURES_KNOWN != 0 {
            let what = format!("it needs features that yado has not ({:#x})", features & !FEATURES_KNOWN);
            return Err(Refusal::Unsupported(what));
        }
        let (cluster, table, header) = (le32(bytes, 4), le32(bytes, 8), le32(bytes, 12));
        let cluster_bits = cluster.trailing_zeros();
        if !cluster.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
            return corrupt("its clusters have a size that cannot be");
        }
        let this = Self {
            cluster_bits,
            table_clusters: table.into(),
            header_clusters: header.into(),
            features,
            compatible: le64(bytes, 24),
            autoclear: le64(bytes, 32),
            l1: le64(bytes, 40),
            capacity: le64(bytes, 48),
            backing: None,
            name_at: 0,
        };
        if !table.is_power_of_two() || this.table_clusters > TABLE_CLUSTERS_MAX {
            return corrupt("its tables have a size that cannot be");
        }
        if header == 0 || this.header_bytes() > u32::MAX.into() {
            return corrupt("its header has a size that cannot be");
        }
        if !this.is_aligned(this.l1) || this.l1 < this.header_bytes() || this.l1 > i64::MAX as u64 >> 1 {
            return corrupt("its L1 table is where it cannot be");
        }
        if this.capacity > this.capacity_max() || !this.capacity.is_multiple_of(512) {
            return corrupt("its disk has a size that cannot be");
        }
        Ok(this)
    }

    /// A header for a new image.
    pub fn new(cluster_bits: u32, table_clusters: u64, capacity: u64) -> Self {
        Self {
            cluster_bits,
            table_clusters,
            header_clusters: 1,
            features: 0,
            compatible: 0,
            autoclear: 0,
            l1: 1 << (cluster_bits & 63),
            capacity,
            backing: None,
            name_at: 0,
        }
    }

    /// The fields.
    pub fn encode(&self) -> [u8; HEADER_BYTES as usize] {
        let mut bytes = [0; HEADER_BYTES as usize];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &(self.cluster() as u32).to_le_bytes());
        put(&mut bytes, 8, &(self.table_clusters as u32).to_le_bytes());
        put(&mut bytes, 12, &(self.header_clusters as u32).to_le_bytes());
        put(&mut bytes, 16, &self.features.to_le_bytes());
        put(&mut bytes, 24, &self.compatible.to_le_bytes());
        put(&mut bytes, 32, &self.autoclear.to_le_bytes());
        put(&mut bytes, 40, &self.l1.to_le_bytes());
        put(&mut bytes, 48, &self.capacity.to_le_bytes());
        if let Some(name) = &self.backing {
            put(&mut bytes, NAME_AT, &self.name_at.to_le_bytes());
            put(&mut bytes, NAME_AT.saturating_add(4), &(name.len() as u32).to_le_bytes());
        }
        bytes
    }

    /// The backing file's name, and its place.
    pub fn name(&self) -> Option<(u64, &[u8])> {
        Some((self.name_at.into(), self.backing.as_ref()?.as_bytes()))
    }

    /// Names another backing file, at a place where the old name is not: `false` if it is too long. The format knows only
    /// "raw" and "look at it".
    pub fn name_backing(&mut self, backing: Option<(&str, bool)>) -> bool {
        if backing.is_some_and(|(name, _)| name.is_empty() || name.len() > NAME_MAX as usize) {
            return false;
        }
        let old =
            self.name_at..self.name_at.saturating_add(self.backing.as_ref().map_or(0, String::len) as u32);
        let free = |at: &u32| old.is_empty() || at.saturating_add(NAME_MAX) <= old.start || *at >= old.end;
        self.name_at = NAME_PLACES.into_iter().find(free).unwrap_or(0);
        self.features &= !(FEATURE_BACKING | FEATURE_BACKING_RAW);
        self.backing = backing.map(|(name, _)| name.to_owned());
        self.features |= match backing {
            None => 0,
            Some((_, false)) => FEATURE_BACKING,
            Some((_, true)) => FEATURE_BACKING | FEATURE_BACKING_RAW,
        };
        true
    }

    /// The image says that its backing file is raw.
    pub fn backing_is_raw(&self) -> bool {
        self.features & FEATURE_BACKING_RAW != 0
    }

    /// It was not closed in order.
    pub fn needs_check(&self) -> bool {
        self.features & FEATURE_NEED_CHECK != 0
    }

    /// It is in order.
    pub fn set_checked(&mut self) -> bool {
        self.features &= !FEATURE_NEED_CHECK;
        true
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << (self.cluster_bits & 63)
    }

    /// Bytes of the header.
    pub fn header_bytes(&self) -> u64 {
        self.header_clusters.saturating_mul(self.cluster())
    }

    /// Bytes of a table.
    pub fn table_bytes(&self) -> u64 {
        self.table_clusters.saturating_mul(self.cluster())
    }

    /// Entries of a table, as a power of two.
    pub fn table_bits(&self) -> u32 {
        (self.table_bytes() / 8).trailing_zeros()
    }

    /// Bytes of the disk that one L2 table maps, as a power of two: at most 2^53.
    pub fn span_bits(&self) -> u32 {
        self.cluster_bits.saturating_add(self.table_bits())
    }

    /// The largest disk: what L1 and L2 tables can map, and offsets can be.
    pub fn capacity_max(&self) -> u64 {
        let bits = self.span_bits().saturating_add(self.table_bits());
        1 << bits.min(62)
    }

    /// Whether a cluster can begin there.
    pub fn is_aligned(&self, at: u64) -> bool {
        at & self.cluster().wrapping_sub(1) == 0
    }
}
