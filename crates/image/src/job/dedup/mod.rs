//! Equal parts of several images made one.
//!
//! Two ways. Where the file system shares blocks, equal blocks of the images' *files* become one on the disk ([`extents`]):
//! the file system compares them itself, nothing that is read changes, and it does not matter what the files are. Elsewhere what
//! the images' *disks* have in common goes into a base image that all of them build on ([`store`]).
//!
//! Blocks are told apart by the first 128 bits of their BLAKE3 sums. A sum only proposes: the file system compares before it
//! shares, and whoever puts an image on a base compares before the old one goes.

pub mod extents;
pub mod store;

use crate::endian::size;
use crate::job::is_zero;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Blocks that one job knows of at most. At its peak it has up to 112 bytes of memory for each: 7 GiB for 4 TiB of data in
/// blocks of 64 KiB, if no two disks have anything at the same place.
const BLOCKS_MAX: usize = 1 << 26;

/// The sum of a block's content.
type Sum = u128;

/// The sum of a block.
fn sum(block: &[u8]) -> Sum {
    let sum = blake3::hash(block);
    sum.as_bytes().first_chunk::<16>().map_or(0, |half| Sum::from_le_bytes(*half))
}

/// The sum of a block; `None` if it is nothing but zeroes.
fn sum_of_data(block: &[u8]) -> Option<Sum> {
    if is_zero(block) { None } else { Some(sum(block)) }
}

/// Whether blocks of so many bytes can be compared.
pub fn check_block(block: u64) -> io::Result<()> {
    if block.is_power_of_two() && (4096..=2 << 20).contains(&block) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "a block has a power of two of bytes, from 4K to 2M"))
}

/// Adds what a piece has to what was found.
fn add<T>(found: &Mutex<Vec<T>>, mut new: Vec<T>) -> io::Result<()> {
    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
    if found.len().saturating_add(new.len()) > BLOCKS_MAX {
        return Err(too_many());
    }
    found.append(&mut new);
    Ok(())
}

fn too_many() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "there are too many blocks to remember: use larger ones")
}

/// Memory for the blocks of a piece.
fn buffer(piece: u64) -> Vec<u8> {
    vec![0; size(piece)]
}
