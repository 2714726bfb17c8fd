//! New images.

use super::header::{
    AUTOCLEAR_RAW_DATA, COMPATIBLE_LAZY, Compression, Header, INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, L1_BYTES_MAX,
};
use super::refcount::{block_bits, write_count};
use super::table::{COPIED, Entry};
use super::{Parts, Qcow2};
use crate::disk::{Disk, Error};
use crate::endian::{bytes_be, size};
use crate::storage::Storage;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// How much of a new image is made at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing but the tables that must be.
    #[default]
    Off,
    /// All tables, and places for all data.
    Metadata,
    /// And space for it, reserved by the file system.
    Falloc,
    /// And zeroes written to it.
    Full,
}

/// What a new image is like.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the disk: a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// log2 of bytes in a cluster.
    pub cluster_bits: u32,
    /// log2 of bits in a refcount.
    pub refcount_order: u32,
    /// Refcounts are written when the image is closed.
    pub lazy_refcounts: bool,
    /// 32 subclusters in a cluster.
    pub extended_l2: bool,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Backing file and its format, as they are to stand in the image.
    pub backing: Option<(String, String)>,
    /// External data file, as it is to stand in the image; and whether it is to be a raw image.
    pub data_file: Option<(String, bool)>,
    /// What is made at once.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The usual image of a size.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }

    fn check(&self) -> Result<(), String> {
        let refuse = |text: &str| Err(text.to_owned());
        if !(2..=3).contains(&self.version) {
            return refuse("there are qcow2 versions 2 (compat=0.10) and 3 (compat=1.1)");
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return refuse("the cluster size is a power of two from 512 bytes to 2 MiB");
        }
        if self.refcount_order > 6 {
            return refuse("refcounts have 1, 2, 4, 8, 16, 32 or 64 bits");
        }
        let new = self.refcount_order != 4
            || self.lazy_refcounts
            || self.extended_l2
            || self.compression != Compression::Zlib
            || self.data_file.is_some();
        if self.version == 2 && new {
            return refuse(
                "lazy refcounts, other refcount widths, subclusters, zstd and external data files need version 3 (compat=1.1)",
            );
        }
        if self.extended_l2 && self.cluster_bits < 14 {
            return refuse("subclusters need clusters of 16 KiB or more");
        }
        if !self.size.is_multiple_of(512) {
            return refuse("the size of a disk is a multiple of 512 bytes");
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off {
            return refuse(
                "an image over a backing file cannot be preallocated: it would hide what is below",
            );
        }
        if self.backing.is_some() && self.data_file.as_ref().is_some_and(|(_, raw)| *raw) {
            return refuse("an image with a raw external data file cannot have a backing file");
        }
        Ok(())
    }

    /// The header of such an image, whose tables have no place yet.
    pub fn header(&self) -> Result<Header, String> {
        self.check()?;
        let mut incompatible = 0;
        let mut flag = |is: bool, bit: u64| incompatible |= if is { bit } else { 0 };
        flag(self.compression == Compression::Zstd, INCOMPATIBLE_COMPRESSION);
        flag(self.extended_l2, INCOMPATIBLE_EXTENDED_L2);
        flag(self.data_file.is_some(), INCOMPATIBLE_DATA_FILE);
        let raw = self.data_file.as_ref().is_some_and(|(_, raw)| *raw);
        let mut header = Header {
            version: self.version,
            cluster_bits: self.cluster_bits,
            size: self.size,
            l1_size: 0,
            l1_offset: 0,
            reftable_offset: 0,
            reftable_clusters: 0,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible,
            compatible: if self.lazy_refcounts { COMPATIBLE_LAZY } else { 0 },
            autoclear: if raw { AUTOCLEAR_RAW_DATA } else { 0 },
            refcount_order: self.refcount_order,
            compression: self.compression,
            backing: self.backing.as_ref().map(|(name, _)| name.clone()),
            backing_format: self.backing.as_ref().map(|(_, format)| format.clone()),
            data_file: self.data_file.as_ref().map(|(name, _)| name.clone()),
            bitmaps: None,
            unknown: Vec::new(),
        };
        let entries = header.l1_entries_for(self.size).max(1);
        if entries.saturating_mul(8) > L1_BYTES_MAX {
            return Err("the disk is too large for clusters of this size: use larger clusters".into());
        }
        header.l1_size = entries as u32;
        Ok(header)
    }
}

/// What a new image begins with: clusters of the refcount table, refcount blocks, and of the L1 table.
pub fn layout(header: &Header) -> (u64, u64, u64) {
    let cluster = header.cluster_size();
    let per_block = 1u64 << (block_bits(header.cluster_bits, header.refcount_order) & 63);
    let l1 = u64::from(header.l1_size).saturating_mul(8).div_ceil(cluster);
    let (mut table, mut blocks) = (1u64, 1u64);
    loop {
        let total = l1.saturating_add(table).saturating_add(blocks).saturating_add(1);
        let need_blocks = total.div_ceil(per_block);
        let need_table = need_blocks.saturating_mul(8).div_ceil(cluster);
        if need_blocks <= blocks && need_table <= table {
            return (table, blocks, l1);
        }
        (table, blocks) = (need_table.max(table), need_blocks.max(blocks));
    }
}

impl Qcow2 {
    /// Writes a new image into empty storage and opens it.
    pub fn create(
        path: &Path,
        storage: Arc<dyn Storage>,
        options: &CreateOptions,
        parts: Parts,
    ) -> Result<Self, Error> {
        let mut header = options.header().map_err(Error::Options)?;
        let (table, blocks, l1) = layout(&header);
        let bits = header.cluster_bits & 63;
        header.reftable_offset = 1 << bits;
        header.reftable_clusters = table as u32;
        header.l1_offset = table.saturating_add(blocks).saturating_add(1) << bits;
        let io = |source| Error::io(path, source);
        let first = header.encode();
        let first =
            first.ok_or_else(|| Error::Options("the names do not fit into the first cluster".into()))?;
        write_tables(storage.as_ref(), &header, (table, blocks, l1)).map_err(io)?;
        storage.write_bytes(0, &first).map_err(io)?;
        if let Some(data) = parts.data.as_ref() {
            data.set_len(options.size).map_err(io)?;
        }
        let image = Self::open(path, storage, header, parts)?;
        if options.preallocation != Preallocation::Off {
            image.preallocate(0, options.size, options.preallocation).map_err(io)?;
        }
        image.flush().map_err(io)?;
        Ok(image)
    }

    /// Gives places in the file to all clusters of a range that have none. Nothing may be below them.
    pub fn preallocate(&self, from: u64, to: u64, how: Preallocation) -> io::Result<()> {
        let cluster = self.shape.cluster();
        let mut at = from.checked_next_multiple_of(cluster).unwrap_or(from);
        while at < to {
            {
                let _pass = self.gate.pass();
                self.open_for_change()?;
                at = self.preallocate_run(at, to, how)?;
            }
            self.limit_dirty()?;
        }
        self.flush_metadata()
    }

    fn preallocate_run(&self, at: u64, to: u64, how: Preallocation) -> io::Result<u64> {
        let (shape, cluster) = (&self.shape, self.shape.cluster());
        let span = shape.table_span();
        let end = to.min(at.saturating_sub(at & span.wrapping_sub(1)).saturating_add(span));
        let number = |at: u64| at >> (shape.cluster_bits & 63);
        let _clusters = self.lock_clusters(number(at), number(end.saturating_sub(1)));
        let table = self.writable_table(at)?;
        if table.entry(shape.l2_index(at)) != Entry::default() {
            return Ok(at.saturating_add(cluster));
        }
        let count = end.saturating_sub(at).div_ceil(cluster);
        let run = if shape.data_file {
            super::refcount::Run { offset: at, count, fresh: true }
        } else {
            self.refcounts.allocate(self.storage.as_ref(), count)?
        };
        let bytes = run.count.saturating_mul(cluster);
        match how {
            Preallocation::Falloc => self.data().reserve(run.offset, bytes)?,
            Preallocation::Full => {
                let zeroes = vec![0; size(cluster.max(1 << 20).min(bytes))];
                let mut done = 0u64;
                while done < bytes {
                    let part = zeroes.get(..size(bytes.saturating_sub(done).min(zeroes.len() as u64)));
                    self.data().write_bytes(run.offset.saturating_add(done), part.unwrap_or_default())?;
                    done = done.saturating_add(zeroes.len() as u64);
                }
            }
            _ if !run.fresh => self.data().zero_range(run.offset, bytes)?,
            _ => {}
        }
        let bitmap = if shape.extended { 0xffff_ffff } else { 0 };
        let mut entries = Vec::new();
        for index in 0..run.count {
            let skip = index.saturating_mul(cluster);
            let at = at.saturating_add(skip);
            let old = table.entry(shape.l2_index(at));
            entries.push((at, old, Entry { word: run.offset.saturating_add(skip) | COPIED, bitmap }));
        }
        self.set_entries(at, &entries)?;
        Ok(at.saturating_add(bytes))
    }
}

fn write_tables(storage: &dyn Storage, header: &Header, layout: (u64, u64, u64)) -> io::Result<()> {
    let (table, blocks, l1) = layout;
    let bits = header.cluster_bits & 63;
    let cluster = size(header.cluster_size());
    let first_block = table.saturating_add(1);
    let total = l1.saturating_add(first_block).saturating_add(blocks);
    let per_block = 1u64 << (block_bits(header.cluster_bits, header.refcount_order) & 63);
    storage.set_len(total << bits)?;
    let mut entries = bytes_be((0..blocks).map(|block| first_block.saturating_add(block) << bits));
    entries.resize(size(table << bits), 0);
    storage.write_bytes(1 << bits, &entries)?;
    for block in 0..blocks {
        let mut bytes = vec![0; cluster];
        let base = block.saturating_mul(per_block);
        for index in 0..per_block.min(total.saturating_sub(base)) {
            write_count(&mut bytes, size(index), header.refcount_order, 1);
        }
        storage.write_bytes(first_block.saturating_add(block) << bits, &bytes)?;
    }
    // The L1 table is empty: what was never written reads as zeroes, unless this is a device.
    storage.zero_range(first_block.saturating_add(blocks) << bits, l1 << bits)
}
