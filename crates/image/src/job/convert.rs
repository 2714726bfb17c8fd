//! Copies of a disk's content into another image.

use super::share::{BLOCK, Shared};
use super::{Progress, in_pieces, is_zero};
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::{Content, Disk, Status};
use crate::endian::size;
use crate::format::qcow2::{CreateOptions, Qcow2};
use crate::format::{qed, vhd};
use std::io;

/// Bytes that one thread deals with at a time.
const PIECE: u64 = 2 << 20;
/// Bytes that one thread deals with at a time where nothing is moved.
const SHARED_PIECE: u64 = 64 << 20;
/// Bytes that are compared with what is below at a time.
const OVER_PIECE: u64 = 64 << 10;

/// How a disk is copied.
#[derive(Debug, Clone, Copy)]
pub struct ConvertOptions {
    /// Threads.
    pub threads: usize,
    /// Runs of zeroes of this many bytes are not stored; zero: everything is.
    pub sparse: u64,
    /// The target reads as zeroes where nothing was written.
    pub target_is_zero: bool,
    /// The target may have the source's blocks where the file system can share them; zeroes in them are stored.
    pub share: bool,
}

/// Where the copy goes.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// Any disk.
    Plain(&'a dyn Disk),
    /// A qcow2 image, its clusters compressed.
    Compressed(&'a Qcow2),
}

impl Target<'_> {
    fn disk(&self) -> &dyn Disk {
        match self {
            Self::Plain(disk) => *disk,
            Self::Compressed(qcow2) => *qcow2,
        }
    }
}

/// Copies all of `source`, which must not be larger than the target.
pub fn convert(
    source: &dyn Disk,
    target: Target<'_>,
    options: ConvertOptions,
    progress: &Progress,
) -> io::Result<()> {
    let capacity = source.capacity();
    let room = room(source, target)?;
    match target {
        Target::Plain(disk) => {
            let options = ConvertOptions { share: options.share && shares(source, disk)?, ..options };
            let piece = if options.share { SHARED_PIECE } else { PIECE };
            let worker = || Ok(vec![0; size(PIECE)]);
            in_pieces(capacity, piece, options.threads, worker, |buffer: &mut Vec<u8>, at, len| {
                copy_piece(source, disk, options, buffer, (at, len), progress)
            })?;
        }
        Target::Compressed(qcow2) => {
            let cluster = qcow2.header().cluster_size();
            let worker = || Ok((vec![0; size(cluster)], qcow2.deflater()?));
            let piece = cluster.max(PIECE);
            in_pieces(capacity, piece, options.threads, worker, |(buffer, deflater), at, len| {
                in_clusters(cluster, at, len, |from, part| {
                    buffer.fill(0);
                    if has_data(source, from, part)? {
                        source
                            .read(from, &ReadInto::new(buffer.get_mut(..size(part)).unwrap_or_default()))?;
                    }
                    if !is_zero(buffer) {
                        qcow2.write_compressed(from, buffer, deflater)?;
                    } else if !options.target_is_zero {
                        qcow2.write_zeroes(from, part, true)?;
                    }
                    progress.advance(part)
                })
            })?;
        }
    }
    let rest = room.saturating_sub(capacity);
    if rest > 0 && !options.target_is_zero {
        target.disk().write_zeroes(capacity, rest, true)?;
    }
    target.disk().flush()
}

/// Copies what `source` has and the disk below the target has not. Beyond the end of that there are zeroes.
pub fn convert_over(
    source: &dyn Disk,
    target: Target<'_>,
    below: &dyn Disk,
    options: ConvertOptions,
    progress: &Progress,
) -> io::Result<()> {
    room(source, target)?;
    let cluster = match target {
        Target::Compressed(qcow2) => qcow2.header().cluster_size(),
        Target::Plain(_) => OVER_PIECE,
    };
    let worker = || {
        let deflater = match target {
            Target::Compressed(qcow2) => Some(qcow2.deflater()?),
            Target::Plain(_) => None,
        };
        Ok((vec![0; size(cluster)], vec![0; size(cluster)], deflater))
    };
    let piece = cluster.max(PIECE);
    in_pieces(source.capacity(), piece, options.threads, worker, |(now, then, deflater), at, len| {
        in_clusters(cluster, at, len, |from, part| {
            now.fill(0);
            then.fill(0);
            source.read(from, &ReadInto::new(now.get_mut(..size(part)).unwrap_or_default()))?;
            let there = below.capacity().saturating_sub(from).min(part);
            if there > 0 {
                below.read(from, &ReadInto::new(then.get_mut(..size(there)).unwrap_or_default()))?;
            }
            if now != then {
                let bytes = now.get(..size(part)).unwrap_or_default();
                match (target, deflater.as_mut()) {
                    _ if is_zero(now) => target.disk().write_zeroes(from, part, true)?,
                    (Target::Compressed(qcow2), Some(deflater)) => {
                        qcow2.write_compressed(from, now, deflater)?;
                    }
                    _ => target.disk().write(from, &WriteFrom(bytes))?,
                }
            }
            progress.advance(part)
        })
    })?;
    target.disk().flush()
}

/// The size of the target, which must hold the source.
fn room(source: &dyn Disk, target: Target<'_>) -> io::Result<u64> {
    let (capacity, room) = (source.capacity(), target.disk().capacity());
    if room < capacity {
        let text = format!("the target has {room} bytes, and the source {capacity}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(room)
}

/// Calls `work` for each cluster of a range, which begins with one: its offset, and how much of it is in the range.
fn in_clusters(
    cluster: u64,
    start: u64,
    len: u64,
    mut work: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0u64;
    while done < len {
        let part = cluster.min(len.saturating_sub(done));
        work(start.saturating_add(done), part)?;
        done = done.saturating_add(part);
    }
    Ok(())
}

fn has_data(disk: &dyn Disk, at: u64, len: u64) -> io::Result<bool> {
    let mut done = 0u64;
    while done < len {
        let status = disk.block_status(at.saturating_add(done), len.saturating_sub(done))?;
        if status.content == Content::Data {
            return Ok(true);
        }
        done = done.saturating_add(status.len.max(1));
    }
    Ok(false)
}

/// Lets the target have what the source has at `at`; answers how much of it, zero where that cannot be.
fn share(source: &dyn Disk, target: &dyn Disk, status: &Status, at: u64, len: u64) -> u64 {
    let len = len & !BLOCK.saturating_sub(1);
    let stored = status.content == Content::Data && status.offset.is_some() && len > 0;
    if stored && target.write(at, &Shared { source, offset: at, len }).is_ok() { len } else { 0 }
}

/// Whether blocks can be shared: the first that the source has are tried.
fn shares(source: &dyn Disk, target: &dyn Disk) -> io::Result<bool> {
    let capacity = source.capacity();
    let mut at = 0u64;
    while at < capacity {
        let status = source.block_status(at, capacity.saturating_sub(at))?;
        if status.content == Content::Data && status.offset.is_some() {
            let len = status.len.clamp(1, PIECE).min(capacity.saturating_sub(at));
            return Ok(share(source, target, &status, at, len) > 0);
        }
        at = at.saturating_add(status.len.max(1));
    }
    Ok(false)
}

fn copy_piece(
    source: &dyn Disk,
    target: &dyn Disk,
    options: ConvertOptions,
    buffer: &mut [u8],
    (start, len): (u64, u64),
    progress: &Progress,
) -> io::Result<()> {
    let mut done = 0u64;
    while done < len {
        let at = start.saturating_add(done);
        let status = source.block_status(at, len.saturating_sub(done))?;
        let mut part = status.len.clamp(1, len.saturating_sub(done));
        let shared = if options.share { share(source, target, &status, at, part) } else { 0 };
        if shared > 0 {
            part = shared;
        } else if status.content == Content::Data || options.sparse == 0 {
            part = part.min(buffer.len() as u64);
            let bytes = buffer.get_mut(..size(part)).unwrap_or_default();
            source.read(at, &ReadInto::new(bytes))?;
            write_sparse(target, at, bytes, options)?;
        } else if !options.target_is_zero {
            target.write_zeroes(at, part, true)?;
        }
        progress.advance(part)?;
        done = done.saturating_add(part);
    }
    Ok(())
}

/// Writes what is not zero, in runs.
fn write_sparse(target: &dyn Disk, at: u64, bytes: &[u8], options: ConvertOptions) -> io::Result<()> {
    if options.sparse == 0 {
        return target.write(at, &WriteFrom(bytes));
    }
    let mut runs: Vec<(bool, usize, usize)> = Vec::new();
    let mut from = 0usize;
    // Blocks count from the disk's beginning, so that runs are aligned.
    while from < bytes.len() {
        let place = at.saturating_add(from as u64);
        let ahead = options.sparse.saturating_sub(place.checked_rem(options.sparse).unwrap_or(0)).max(1);
        let to = from.saturating_add(size(ahead)).min(bytes.len());
        let zero = is_zero(bytes.get(from..to).unwrap_or_default());
        match runs.last_mut() {
            Some((same, _, end)) if *same == zero => *end = to,
            _ => runs.push((zero, from, to)),
        }
        from = to;
    }
    for (zero, from, to) in runs {
        let place = at.saturating_add(from as u64);
        if !zero {
            target.write(place, &WriteFrom(bytes.get(from..to).unwrap_or_default()))?;
        } else if !options.target_is_zero {
            target.write_zeroes(place, to.saturating_sub(from) as u64, true)?;
        }
    }
    Ok(())
}

/// Clusters that hold data of a disk, and those of its tables that each map `span` clusters.
fn clusters_of(source: Option<&dyn Disk>, cluster: u64, span: u64) -> io::Result<(u64, u64)> {
    let Some(source) = source else { return Ok((0, 0)) };
    let (mut data, mut tables) = (0u64, 0u64);
    let (mut next, mut next_table) = (0u64, 0u64);
    let mut at = 0u64;
    while at < source.capacity() {
        let status = source.block_status(at, source.capacity().saturating_sub(at))?;
        let end = at.saturating_add(status.len.max(1));
        if status.content == Content::Data {
            let first = at.checked_div(cluster).unwrap_or(0).max(next);
            next = end.div_ceil(cluster).max(next);
            data = data.saturating_add(next.saturating_sub(first));
            let table = first.checked_div(span).unwrap_or(0).max(next_table);
            next_table = next.div_ceil(span).max(next_table);
            tables = tables.saturating_add(next_table.saturating_sub(table));
        }
        at = end;
    }
    Ok((data, tables))
}

fn counted(source: Option<&dyn Disk>, cluster: u64, span: u64) -> Result<(u64, u64), crate::Error> {
    let found = clusters_of(source, cluster, span);
    found.map_err(|source| crate::Error::io(std::path::Path::new("measure"), source))
}

/// Bytes of the file that a copy of `source` takes as such a qcow2 image, and if everything in it were stored.
pub fn measure(source: Option<&dyn Disk>, options: &CreateOptions) -> Result<(u64, u64), crate::Error> {
    let mut header = options.header().map_err(crate::Error::Options)?;
    let cluster = header.cluster_size();
    let (data, _) = counted(source, cluster, 1)?;
    let all = options.size.div_ceil(cluster);
    header.size = options.size;
    let tables = all.div_ceil(1 << (header.l2_bits() & 63));
    let l1 = u64::from(header.l1_size).saturating_mul(8).div_ceil(cluster);
    let with = |clusters: u64| {
        // Refcounts count themselves: a few rounds find how many.
        let counted = clusters.saturating_add(tables).saturating_add(l1).saturating_add(1);
        let per_block = (cluster << 3) >> (header.refcount_order & 63);
        let (mut blocks, mut table) = (1u64, 1u64);
        for _ in 0..8 {
            let total = counted.saturating_add(blocks).saturating_add(table);
            blocks = total.div_ceil(per_block.max(1));
            table = blocks.saturating_mul(8).div_ceil(cluster);
        }
        counted.saturating_add(blocks).saturating_add(table).saturating_mul(cluster)
    };
    // Refcounts are foreseen for all of it.
    let full = with(all);
    Ok((full.saturating_sub(all.saturating_sub(data).saturating_mul(cluster)), full))
}

/// As [`measure`], for a QED image.
pub fn measure_qed(
    source: Option<&dyn Disk>,
    options: &qed::CreateOptions,
) -> Result<(u64, u64), crate::Error> {
    let header = options.header().map_err(crate::Error::Options)?;
    let span = 1u64 << (header.table_bits() & 63);
    let (data, tables) = counted(source, header.cluster(), span)?;
    let all = options.size.div_ceil(header.cluster());
    let with = |data: u64, tables: u64| {
        let tables = tables.saturating_add(1).saturating_mul(header.table_clusters);
        data.saturating_add(tables).saturating_add(header.header_clusters).saturating_mul(header.cluster())
    };
    Ok((with(data, tables), with(all, all.div_ceil(span))))
}

/// As [`measure`], for a VHD.
pub fn measure_vhd(
    source: Option<&dyn Disk>,
    options: &vhd::CreateOptions,
) -> Result<(u64, u64), crate::Error> {
    let block = 1u64 << (options.block_bits & 63);
    let (data, _) = counted(source, block, 1)?;
    let with = |count| options.file_bytes(count).map_err(crate::Error::Options);
    Ok((with(data)?, with(options.size.div_ceil(block))?))
}
