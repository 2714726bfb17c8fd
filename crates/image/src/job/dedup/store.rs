//! What several disks have in common, in one image that they can build on.
//!
//! A disk shows of its base what the base has at the same place. So for each place the base gets the content that most disks
//! have there. In the base's file every content is stored once, wherever it is shown: what two disks have at different places
//! is shared too, if neither place is taken by something better.

use super::{Sum, add, buffer, check_block, sum_of_data, too_many};
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::{Content, Disk};
use crate::endian::size;
use crate::format::qcow2::Qcow2;
use crate::job::{Progress, in_pieces};
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};

const PIECE: u64 = 2 << 20;

/// What a disk would gain, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gain {
    /// Data that it holds.
    pub data: u64,
    /// Of it: is in the base.
    pub in_base: u64,
}

/// A block of a disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Block {
    number: u64,
    sum: Sum,
    disk: u32,
}

/// What a base would hold.
pub struct Plan {
    block: u64,
    capacity: u64,
    /// Blocks in their order, from the first disk that has each.
    chosen: Vec<Block>,
    gains: Vec<Gain>,
    contents: u64,
}

impl Plan {
    /// Bytes of the base's disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes of data that the base's file would hold.
    pub fn base_data(&self) -> u64 {
        self.contents.saturating_mul(self.block)
    }

    /// Bytes that the base shows, for progress.
    pub fn shown(&self) -> u64 {
        (self.chosen.len() as u64).saturating_mul(self.block)
    }

    /// What each disk would gain.
    pub fn gains(&self) -> &[Gain] {
        &self.gains
    }
}

/// Reads all disks and finds what a base would have to hold. Progress counts bytes of the disks.
pub fn plan(disks: &[&dyn Disk], block: u64, threads: usize, progress: &Progress) -> io::Result<Plan> {
    check_block(block)?;
    let mut blocks = Vec::new();
    for (number, disk) in (0u32..).zip(disks) {
        scan(*disk, number, block, threads, progress, &mut blocks)?;
    }
    blocks.sort_unstable();
    let mut gains = vec![Gain::default(); disks.len()];
    for one in &blocks {
        if let Some(gain) = gains.get_mut(size(one.disk.into())) {
            gain.data = gain.data.saturating_add(block);
        }
    }
    let places = || blocks.chunk_by(|a, b| a.number == b.number);
    let users = Counts::of(blocks.iter().map(|one| one.sum));
    let mut chosen: Vec<Block> = places().filter_map(|place| best(place, &users)).collect();
    drop(users);
    // What serves one block alone had better stay where it is.
    let served = at_their_places(&chosen, places())
        .flat_map(|(choice, place)| place.iter().map(|one| one.sum).filter(|sum| *sum == choice.sum));
    let served = Counts::of(served);
    chosen.retain(|choice| served.count(choice.sum) > 1);
    for (choice, place) in at_their_places(&chosen, places()) {
        for one in place.iter().filter(|one| one.sum == choice.sum) {
            if let Some(gain) = gains.get_mut(size(one.disk.into())) {
                gain.in_base = gain.in_base.saturating_add(block);
            }
        }
    }
    let contents = served.repeated();
    let longest = disks.iter().map(|disk| disk.capacity()).max().unwrap_or(0);
    let capacity = longest.checked_next_multiple_of(block).ok_or_else(too_many)?;
    Ok(Plan { block, capacity, chosen, gains, contents })
}

/// How often each sum occurs: a sorted list takes a third of what a map does.
struct Counts(Vec<Sum>);

impl Counts {
    fn of(sums: impl Iterator<Item = Sum>) -> Self {
        let mut sums: Vec<Sum> = sums.collect();
        sums.sort_unstable();
        Self(sums)
    }

    fn count(&self, sum: Sum) -> usize {
        let from = self.0.partition_point(|one| *one < sum);
        self.0.get(from..).map_or(0, |rest| rest.partition_point(|one| *one == sum))
    }

    /// Sums that occur more than once.
    fn repeated(&self) -> u64 {
        self.0.chunk_by(|a, b| a == b).filter(|same| same.len() > 1).count() as u64
    }
}

/// What a base has best of what disks have at one place: what most of them have, of these what is most frequent elsewhere.
fn best(place: &[Block], users: &Counts) -> Option<Block> {
    let weight = |same: &&[Block]| {
        let elsewhere = same.first().map_or(0, |one| users.count(one.sum));
        (same.len(), elsewhere)
    };
    let best = place.chunk_by(|a, b| a.sum == b.sum).max_by_key(weight)?;
    best.first().copied().filter(|_| weight(&best).1 > 1)
}

/// Choices with all that disks have there.
fn at_their_places<'a>(
    chosen: &'a [Block],
    places: impl Iterator<Item = &'a [Block]>,
) -> impl Iterator<Item = (&'a Block, &'a [Block])> {
    let mut choices = chosen.iter().peekable();
    places.filter_map(move |place| {
        let number = place.first()?.number;
        Some((choices.next_if(|choice| choice.number == number)?, place))
    })
}

/// The sums of a disk's blocks; the last one may end early.
fn scan(
    disk: &dyn Disk,
    number: u32,
    block: u64,
    threads: usize,
    progress: &Progress,
    blocks: &mut Vec<Block>,
) -> io::Result<()> {
    let found = Mutex::new(std::mem::take(blocks));
    let worker = || Ok(buffer(PIECE));
    in_pieces(disk.capacity(), PIECE, threads, worker, |buffer: &mut Vec<u8>, start, len| {
        let mut new = Vec::new();
        let mut done = 0u64;
        while done < len {
            let at = start.saturating_add(done);
            let left = len.saturating_sub(done);
            let part = block.min(left);
            let status = disk.block_status(at, left)?;
            let whole = status.len.min(left);
            if status.content == Content::Zero && whole >= part {
                // All blocks that end in the zeroes.
                let skip = if whole == left {
                    left
                } else {
                    whole.saturating_sub(whole.checked_rem(block).unwrap_or(0))
                };
                done = done.saturating_add(skip.max(part));
                continue;
            }
            let bytes = buffer.get_mut(..size(block)).unwrap_or_default();
            read_block(disk, at, bytes)?;
            let number_of_block = at.checked_div(block).unwrap_or(0);
            new.extend(sum_of_data(bytes).map(|sum| Block { number: number_of_block, sum, disk: number }));
            done = done.saturating_add(part);
        }
        add(&found, new)?;
        progress.advance(len)
    })?;
    *blocks = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(())
}

/// A block, with zeroes beyond the disk's end.
fn read_block(disk: &dyn Disk, at: u64, into: &mut [u8]) -> io::Result<()> {
    let there = disk.capacity().saturating_sub(at).min(into.len() as u64);
    let (bytes, beyond) = into.split_at_mut(size(there));
    beyond.fill(0);
    if bytes.is_empty() { Ok(()) } else { disk.read(at, &ReadInto::new(bytes)) }
}

/// Writes the base into a new image, whose clusters have the size of the blocks. Progress counts bytes that it shows.
pub fn write(plan: &Plan, disks: &[&dyn Disk], base: &Qcow2, progress: &Progress) -> io::Result<()> {
    let mut stored: HashMap<Sum, u64> = HashMap::new();
    let mut bytes = buffer(plan.block);
    for choice in &plan.chosen {
        let at = choice.number.saturating_mul(plan.block);
        let again = match stored.get(&choice.sum) {
            Some(first) => match base.share_cluster(*first, at) {
                // It has as many users as can be counted: another copy begins.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => false,
                done => done.map(|()| true)?,
            },
            None => false,
        };
        if !again {
            let disk = disks.get(size(choice.disk.into())).ok_or(io::ErrorKind::InvalidInput)?;
            read_block(*disk, at, &mut bytes)?;
            base.write(at, &WriteFrom(&bytes))?;
            stored.insert(choice.sum, at);
        }
        progress.advance(plan.block)?;
    }
    base.flush()
}

/// What a disk gains from a base that is there already. Progress counts bytes of the disk.
pub fn gain(disk: &dyn Disk, base: &dyn Disk, block: u64, progress: &Progress) -> io::Result<Gain> {
    check_block(block)?;
    let (mut gain, mut own, mut below) = (Gain::default(), buffer(block), buffer(block));
    let mut at = 0u64;
    while at < disk.capacity() {
        let left = disk.capacity().saturating_sub(at);
        let status = disk.block_status(at, left)?;
        let zeroes = status.len.min(left);
        if status.content == Content::Zero && zeroes >= block.min(left) {
            let skip = if zeroes == left {
                left
            } else {
                zeroes.saturating_sub(zeroes.checked_rem(block).unwrap_or(0))
            };
            progress.advance(skip)?;
            at = at.saturating_add(skip);
            continue;
        }
        read_block(disk, at, &mut own)?;
        if sum_of_data(&own).is_some() {
            gain.data = gain.data.saturating_add(block);
            read_block(base, at, &mut below)?;
            let same = if own == below { block } else { 0 };
            gain.in_base = gain.in_base.saturating_add(same);
        }
        progress.advance(block.min(left))?;
        at = at.saturating_add(block);
    }
    Ok(gain)
}
