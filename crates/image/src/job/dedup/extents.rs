//! Equal blocks of files, shared on the disk by the file system.
//!
//! All files are read once. Of blocks with the same sum the first is kept, and ranges of the others are proposed to the file
//! system, which locks both, compares, and makes them one: at every moment each file reads the same, even if it is in use.
//! What is one already is found by its place and left alone.

use super::{Sum, add, buffer, check_block, sum};
use crate::endian::size;
use crate::job::{Progress, in_pieces};
use crate::storage::{Placed, Shared, Storage, StorageFile};
use rustix::fs::{Mode, OFlags};
use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const PIECE: u64 = 2 << 20;
/// Bytes of one proposal: what btrfs takes at most.
const RANGE_MAX: u64 = 16 << 20;

/// Bytes that a file system is tried with: blocks of any.
const TRIED: usize = 65536;

/// What was found, and done. All are bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// Data that was looked at.
    pub scanned: u64,
    /// In blocks that another one is equal to, beside the first of each kind.
    pub equal: u64,
    /// Of these: were one with another already.
    pub shared: u64,
    /// Of these: were made one, or can be.
    pub saved: u64,
}

/// A block of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Block {
    sum: Sum,
    file: u32,
    number: u64,
}

/// Blocks in a row that are equal to others in a row.
#[derive(Clone, Copy)]
struct Run {
    file: u32,
    at: u64,
    source: u32,
    from: u64,
    len: u64,
}

/// Files, and what is equal in them.
pub struct Plan {
    runs: Vec<Run>,
    sums: Sums,
}

impl Plan {
    /// What there is to gain, if every proposal is taken.
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Bytes that are to be proposed, for progress.
    pub fn proposed(&self) -> u64 {
        self.runs.iter().map(|run| run.len).fold(0, u64::saturating_add)
    }
}

/// Whether the file system of a directory shares blocks: it is asked to, of two files that have no names.
pub fn is_possible(directory: &Path) -> io::Result<bool> {
    let make = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?;
        let file = StorageFile::private(file.into(), 0);
        file.write_bytes(0, &[1; TRIED])?;
        Ok::<_, io::Error>(file)
    };
    match make()?.share_from(0, &make()?, 0, TRIED as u64) {
        Ok(shared) => Ok(shared == Shared::Bytes(TRIED as u64)),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads all files and finds equal blocks of `block` bytes. Progress counts bytes of the files.
pub fn plan(files: &[StorageFile], block: u64, threads: usize, progress: &Progress) -> io::Result<Plan> {
    check_block(block)?;
    let mut blocks = Vec::new();
    let mut sums = Sums::default();
    for (number, file) in (0u32..).zip(files) {
        scan(file, number, block, threads, progress, &mut blocks)?;
    }
    sums.scanned = (blocks.len() as u64).saturating_mul(block);
    blocks.sort_unstable();
    // A file system that does not tell where blocks lie compares once more what is one already.
    let places: Vec<Vec<Placed>> = files.iter().map(|file| file.places().unwrap_or_default()).collect();
    let mut runs = Vec::new();
    for equal in blocks.chunk_by(|a, b| a.sum == b.sum).filter(|equal| equal.len() > 1) {
        propose(equal, block, &places, &mut runs, &mut sums);
    }
    runs.sort_unstable_by_key(|run| (run.file, run.at));
    Ok(Plan { runs: joined(runs), sums })
}

/// The sums of a file's blocks. What does not fill a block at its end is left alone.
fn scan(
    file: &StorageFile,
    number: u32,
    block: u64,
    threads: usize,
    progress: &Progress,
    blocks: &mut Vec<Block>,
) -> io::Result<()> {
    let found = Mutex::new(std::mem::take(blocks));
    let worker = || Ok(buffer(PIECE));
    in_pieces(file.len(), PIECE, threads, worker, |buffer: &mut Vec<u8>, start, len| {
        let whole = len.saturating_sub(len.checked_rem(block).unwrap_or(0));
        let mut new = Vec::new();
        let mut done = 0u64;
        while done < whole {
            let at = start.saturating_add(done);
            let extent = file.extent(at, whole.saturating_sub(done))?;
            // Blocks that are data in part count.
            let up =
                |len: u64| len.checked_next_multiple_of(block).unwrap_or(len).min(whole.saturating_sub(done));
            if extent.hole {
                let holes = extent.len.saturating_sub(extent.len.checked_rem(block).unwrap_or(0));
                if holes > 0 {
                    done = done.saturating_add(holes);
                    continue;
                }
            }
            let part = if extent.hole { block } else { up(extent.len) };
            let bytes = buffer.get_mut(..size(part)).unwrap_or_default();
            file.read_bytes(at, bytes)?;
            for (inside, bytes) in (0u64..).zip(bytes.chunks_exact(size(block))) {
                let place = at.saturating_add(inside.saturating_mul(block));
                let number_of_block = place.checked_div(block).unwrap_or(0);
                new.push(Block { sum: sum(bytes), file: number, number: number_of_block });
            }
            done = done.saturating_add(part);
        }
        add(&found, new)?;
        progress.advance(len)
    })?;
    *blocks = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(())
}

/// The place of a block, if it has one of its own.
fn place(places: &[Vec<Placed>], block: &Block, len: u64) -> Option<u64> {
    let list = places.get(size(block.file.into()))?;
    let offset = block.number.checked_mul(len)?;
    let after = list.partition_point(|placed| placed.offset <= offset);
    let placed = list.get(after.checked_sub(1)?)?;
    let inside = offset.checked_sub(placed.offset)?;
    (inside.checked_add(len)? <= placed.len).then(|| placed.place.checked_add(inside))?
}

/// Counts blocks that are equal, and adds those that are not one with the first yet.
fn propose(equal: &[Block], block: u64, places: &[Vec<Placed>], runs: &mut Vec<Run>, sums: &mut Sums) {
    let Some((first, others)) = equal.split_first() else { return };
    sums.equal = sums.equal.saturating_add((others.len() as u64).saturating_mul(block));
    let kept = place(places, first, block);
    let mut seen: HashSet<u64> = kept.into_iter().collect();
    for other in others {
        let place = place(places, other, block);
        if place.is_none_or(|place| seen.insert(place)) {
            sums.saved = sums.saved.saturating_add(block);
        } else {
            sums.shared = sums.shared.saturating_add(block);
        }
        if place.is_none() || place != kept {
            let offset = |number: u64| number.saturating_mul(block);
            runs.push(Run {
                file: other.file,
                at: offset(other.number),
                source: first.file,
                from: offset(first.number),
                len: block,
            });
        }
    }
}

/// Runs in their order, those that go on as one.
fn joined(runs: Vec<Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last)
                if (last.file, last.source) == (run.file, run.source)
                    && last.at.checked_add(last.len) == Some(run.at)
                    && last.from.checked_add(last.len) == Some(run.from) =>
            {
                last.len = last.len.saturating_add(run.len);
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// Has the file system share what is equal; what has changed meanwhile is left alone. Answers how many bytes are one now that
/// were not. Progress counts bytes of proposals.
pub fn share(files: &[StorageFile], plan: &Plan, progress: &Progress) -> io::Result<u64> {
    let mut shared = 0u64;
    for run in &plan.runs {
        let file = |number: u32| files.get(size(number.into())).ok_or(io::ErrorKind::InvalidInput);
        let (target, source) = (file(run.file)?, file(run.source)?);
        let mut done = 0u64;
        while done < run.len {
            let part = run.len.saturating_sub(done).min(RANGE_MAX);
            let (at, from) = (run.at.saturating_add(done), run.from.saturating_add(done));
            let step = match target.share_from(at, source, from, part)? {
                Shared::Bytes(0) => return Err(io::ErrorKind::Unsupported.into()),
                Shared::Bytes(bytes) => {
                    shared = shared.saturating_add(bytes);
                    bytes
                }
                Shared::Differs => part,
            };
            progress.advance(step)?;
            done = done.saturating_add(step);
        }
    }
    Ok(shared)
}
