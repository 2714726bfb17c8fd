//! Whether two disks hold the same.

use super::{Progress, in_pieces, is_zero};
use crate::buffers::ReadInto;
use crate::disk::{Content, Disk};
use crate::endian::size;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that are compared at a time: few enough that both stay in a CPU's cache.
const PIECE: u64 = 256 << 10;

/// What is not the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// Nothing.
    None,
    /// The bytes at this offset are the first that differ.
    Content(u64),
    /// One is longer, and has something there that is not zero.
    Size(u64),
}

/// Compares two disks; what one has beyond the other's end must be zeroes.
pub fn compare(a: &dyn Disk, b: &dyn Disk, threads: usize, progress: &Progress) -> io::Result<Difference> {
    let both = a.capacity().min(b.capacity());
    let first = AtomicU64::new(u64::MAX);
    let worker = || Ok((vec![0; size(PIECE)], vec![0; size(PIECE)]));
    in_pieces(both, PIECE, threads, worker, |(x, y): &mut (Vec<u8>, Vec<u8>), at, len| {
        if first.load(Ordering::Relaxed) > at
            && let Some(place) = differs(a, b, x, y, (at, len))?
        {
            first.fetch_min(place, Ordering::Relaxed);
        }
        progress.advance(len)
    })?;
    match first.into_inner() {
        u64::MAX => {}
        at => return Ok(Difference::Content(at)),
    }
    let longer = if a.capacity() > b.capacity() { a } else { b };
    let mut at = both;
    let mut buffer = vec![0; size(PIECE)];
    while at < longer.capacity() {
        let status = longer.block_status(at, longer.capacity().saturating_sub(at))?;
        let mut part = status.len.max(1);
        if status.content == Content::Data {
            part = part.min(PIECE);
            let bytes = buffer.get_mut(..size(part)).unwrap_or_default();
            longer.read(at, &ReadInto::new(bytes))?;
            if !is_zero(bytes) {
                let inside = bytes.iter().position(|byte| *byte != 0).unwrap_or(0);
                return Ok(Difference::Size(at.saturating_add(inside as u64)));
            }
        }
        progress.advance(part)?;
        at = at.saturating_add(part);
    }
    Ok(Difference::None)
}

fn differs(
    a: &dyn Disk,
    b: &dyn Disk,
    x: &mut [u8],
    y: &mut [u8],
    (start, len): (u64, u64),
) -> io::Result<Option<u64>> {
    let mut done = 0u64;
    while done < len {
        let at = start.saturating_add(done);
        let left = len.saturating_sub(done);
        let (sa, sb) = (a.block_status(at, left)?, b.block_status(at, left)?);
        let part = sa.len.min(sb.len).clamp(1, left);
        done = done.saturating_add(part);
        let (x, y) =
            (x.get_mut(..size(part)).unwrap_or_default(), y.get_mut(..size(part)).unwrap_or_default());
        match (sa.content, sb.content) {
            (Content::Zero, Content::Zero) => continue,
            (Content::Data, Content::Zero) | (Content::Zero, Content::Data) => {
                let disk = if sa.content == Content::Data { a } else { b };
                disk.read(at, &ReadInto::new(x))?;
                if !is_zero(x) {
                    let inside = x.iter().position(|byte| *byte != 0).unwrap_or(0);
                    return Ok(Some(at.saturating_add(inside as u64)));
                }
            }
            (Content::Data, Content::Data) => {
                a.read(at, &ReadInto::new(x))?;
                b.read(at, &ReadInto::new(y))?;
                if x != y {
                    let inside = x.iter().zip(&*y).position(|(x, y)| x != y).unwrap_or(0);
                    return Ok(Some(at.saturating_add(inside as u64)));
                }
            }
        }
    }
    Ok(None)
}
