//! Images of a chain: moved onto another base, or written down into their own.

use super::{Progress, in_pieces};
use crate::buffers::{ReadInto, WriteFrom};
use crate::disk::{Content, Disk};
use crate::endian::size;
use std::io;

const PIECE: u64 = 1 << 20;

/// Writes what an image holds itself into the disk below it, which must be as large. The image keeps what it holds.
pub fn commit(top: &dyn Disk, base: &dyn Disk, threads: usize, progress: &Progress) -> io::Result<()> {
    let capacity = top.capacity();
    let worker = || Ok(vec![0; size(PIECE)]);
    in_pieces(capacity, PIECE, threads, worker, |buffer: &mut Vec<u8>, start, len| {
        let mut done = 0u64;
        while done < len {
            let at = start.saturating_add(done);
            let status = top.block_status(at, len.saturating_sub(done))?;
            let part = status.len.clamp(1, len.saturating_sub(done));
            if status.depth == 0 && status.present {
                if status.content == Content::Zero {
                    base.write_zeroes(at, part, true)?;
                } else {
                    let bytes = buffer.get_mut(..size(part)).unwrap_or_default();
                    top.read(at, &ReadInto::new(bytes))?;
                    base.write(at, &WriteFrom(bytes))?;
                }
            }
            progress.advance(part)?;
            done = done.saturating_add(part);
        }
        Ok(())
    })?;
    base.flush()
}

/// Makes an image, of clusters of so many bytes, hold itself whatever its old base has and the new one has not, so that it
/// reads the same over the new one. Only then may its header name the new one.
pub fn rebase(
    top: &dyn Disk,
    cluster: u64,
    new: Option<&dyn Disk>,
    threads: usize,
    progress: &Progress,
) -> io::Result<()> {
    let worker = || Ok((vec![0; size(cluster)], vec![0; size(cluster)]));
    let room = new.map_or(0, Disk::capacity);
    in_pieces(top.capacity(), cluster, threads, worker, |(now, then): &mut (Vec<u8>, Vec<u8>), at, len| {
        let mut own = true;
        let mut looked = 0u64;
        while looked < len {
            let status = top.block_status(at.saturating_add(looked), len.saturating_sub(looked))?;
            own &= status.depth == 0 && status.present;
            looked = looked.saturating_add(status.len.max(1));
        }
        if !own {
            let (now, then) =
                (now.get_mut(..size(len)).unwrap_or_default(), then.get_mut(..size(len)).unwrap_or_default());
            top.read(at, &ReadInto::new(now))?;
            then.fill(0);
            let below = room.saturating_sub(at).min(len);
            if let Some(new) = new.filter(|_| below > 0) {
                new.read(at, &ReadInto::new(then.get_mut(..size(below)).unwrap_or_default()))?;
            }
            if now != then {
                if super::is_zero(now) {
                    top.write_zeroes(at, len, true)?;
                } else {
                    top.write(at, &WriteFrom(now))?;
                }
            }
        }
        progress.advance(len)
    })?;
    top.flush()
}
