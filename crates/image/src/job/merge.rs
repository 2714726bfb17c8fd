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

/// Whether the image itself, and none below it, says all of what a range holds.
fn holds(top: &dyn Disk, at: u64, len: u64) -> io::Result<bool> {
    let mut looked = 0u64;
    while looked < len {
        let status = top.block_status(at.saturating_add(looked), len.saturating_sub(looked))?;
        if status.depth != 0 || !status.present {
            return Ok(false);
        }
        looked = looked.saturating_add(status.len.max(1));
    }
    Ok(true)
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
        if !holds(top, at, len)? {
            let (now, then) =
                (now.get_mut(..size(len)).unwrap_or_default(), then.get_mut(..size(len)).unwrap_or_default());
            top.read(at, &ReadInto::new(now))?;
            then.fill(0);
            let below = room.saturating_sub(at).min(len);
            if let Some(new) = new.filter(|_| below > 0) {
                new.read(at, &ReadInto::new(then.get_mut(..size(below)).unwrap_or_default()))?;
            }
            if now != then {
                let zero = super::is_zero(now);
                if zero {
                    top.write_zeroes(at, len, true)?;
                }
                // Over the old base zeroes may be nothing that the image must note; over the new one they are.
                if !zero || !holds(top, at, len)? {
                    top.write(at, &WriteFrom(now))?;
                }
            }
        }
        progress.advance(len)
    })?;
    top.flush()
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::format::qcow2::{self, Qcow2};
    use crate::format::qed::{self, Qed};
    use crate::format::{Container, Format};
    use crate::storage::Storage;
    use crate::storage::power::Power;
    use std::path::Path;
    use std::sync::Arc;

    const SIZE: u64 = 1 << 20;

    /// A disk whose first `len` bytes are sevens.
    fn sevens(len: u64) -> Arc<dyn Disk> {
        let options = qcow2::CreateOptions::new(len);
        let image =
            Qcow2::create(Path::new("base"), Arc::new(Power::default()), &options, qcow2::Parts::default());
        let image = image.unwrap();
        image.write(0, &WriteFrom(&vec![7; size(len)])).unwrap();
        Arc::new(image)
    }

    /// Moves an image that holds nothing from one base to another; it must go on to read as `expected`.
    fn moved(old: Option<Arc<dyn Disk>>, new: Arc<dyn Disk>, expected: &[u8]) {
        let path = Path::new("top");
        let named = old.as_ref().map(|_| ("base".to_owned(), Format::Raw));
        let backing = old.as_ref().map(|_| ("base".to_owned(), "raw".to_owned()));
        let create = |version, storage: Arc<dyn Storage>| -> Arc<dyn Container> {
            let backing = backing.clone();
            let options = qcow2::CreateOptions { version, backing, ..qcow2::CreateOptions::new(SIZE) };
            let parts = qcow2::Parts { backing: old.clone(), data: None };
            Arc::new(Qcow2::create(path, storage, &options, parts).unwrap())
        };
        for kind in ["qcow2 2", "qcow2 3", "QED"] {
            let storage = Arc::new(Power::default());
            let top: Arc<dyn Container> = match kind {
                "qcow2 2" => create(2, storage.clone()),
                "qcow2 3" => create(3, storage.clone()),
                _ => {
                    let options =
                        qed::CreateOptions { backing: named.clone(), ..qed::CreateOptions::new(SIZE) };
                    Arc::new(Qed::create(path, storage.clone(), &options, old.clone()).unwrap())
                }
            };
            let cluster = top.facts().cluster_size.unwrap();
            rebase(top.as_ref(), cluster, Some(new.as_ref()), 2, &Progress::default()).unwrap();
            top.set_backing(Some(("new", Format::Raw))).unwrap();
            top.close().unwrap();
            drop(top);
            let mut bytes = vec![1; size(SIZE)];
            if kind == "QED" {
                let header = Qed::read_header(path, storage.as_ref()).unwrap();
                let top = Qed::open(path, storage, header, Some(new.clone())).unwrap();
                top.read(0, &ReadInto::new(&mut bytes)).unwrap();
            } else {
                let header = Qcow2::read_header(path, storage.as_ref()).unwrap();
                let parts = qcow2::Parts { backing: Some(new.clone()), data: None };
                let top = Qcow2::open(path, storage, header, parts).unwrap();
                top.read(0, &ReadInto::new(&mut bytes)).unwrap();
            }
            assert!(bytes == expected, "{kind}");
        }
    }

    #[test]
    fn what_read_as_zeroes_over_no_base_does_so_over_a_new_one() {
        moved(None, sevens(SIZE), &[0; size_of(SIZE)]);
        // A tail that the old base was too short for.
        let mut short = vec![0; size_of(SIZE)];
        short[..size_of(SIZE / 2) - 512].fill(7);
        moved(Some(sevens(SIZE / 2 - 512)), sevens(SIZE), &short);
    }

    const fn size_of(bytes: u64) -> usize {
        bytes as usize
    }
}
