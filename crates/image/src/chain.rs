//! A long chain of images, looked through once for each place and not for each read.
//!
//! What lies below an image that is written does not change while it is open: all of it was opened to be read. So it is
//! remembered of a piece of the disk which image of the chain is the first that says anything about it, and reads go there
//! at once. What is remembered is a table of fixed size: a piece's word has the piece's number and the image's, and a piece
//! whose place another one has taken is looked for anew. A word is read and written as a whole, without a lock.

use crate::buffers::{Buffers, Part, put_zeroes};
use crate::disk::{Disk, Status, check_range, read_only_error};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// log2 of a piece's bytes: as most images' clusters.
const PIECE_BITS: u32 = 16;
/// Most words of the table: 8 MiB, for disks of 64 GiB wholly.
const WORDS_MAX: u64 = 1 << 20;
/// Fewest images below the top one for which it is worth it.
const LAYERS_MIN: usize = 3;
/// Bits of a word that say which image it is.
const LAYER_BITS: u32 = 16;
/// No image of the chain says anything: zeroes.
const NOWHERE: u64 = (1 << LAYER_BITS) - 2;
/// More than one image has parts of the piece.
const MIXED: u64 = (1 << LAYER_BITS) - 1;

/// See the module.
pub struct Chain {
    /// From the top down; each one reads from those below it itself.
    layers: Vec<Arc<dyn Disk>>,
    words: Box<[AtomicU64]>,
}

impl Chain {
    /// What is to be read through for these images, from the top down; the first of them where the chain is short or could
    /// change.
    pub fn over(layers: Vec<Arc<dyn Disk>>) -> Option<Arc<dyn Disk>> {
        let fixed = layers.iter().all(|layer| layer.read_only());
        if layers.len() < LAYERS_MIN || layers.len() as u64 >= NOWHERE || !fixed {
            return layers.into_iter().next();
        }
        Some(Arc::new(Self::new(layers)))
    }

    fn new(layers: Vec<Arc<dyn Disk>>) -> Self {
        let pieces = layers.first().map_or(0, |first| first.capacity()).div_ceil(1 << PIECE_BITS);
        let words = pieces.checked_next_power_of_two().unwrap_or(WORDS_MAX).clamp(64, WORDS_MAX);
        let words = (0..words).map(|_| AtomicU64::new(u64::MAX)).collect();
        Self { layers, words }
    }

    fn top(&self) -> io::Result<&Arc<dyn Disk>> {
        self.layers.first().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Which image has the piece, [`NOWHERE`] or [`MIXED`].
    fn layer_of(&self, piece: u64) -> io::Result<u64> {
        let mask = (self.words.len() as u64).saturating_sub(1);
        let Some(word) = self.words.get(crate::endian::size(piece & mask)) else { return Ok(MIXED) };
        let known = word.load(Ordering::Relaxed);
        if known >> LAYER_BITS == piece {
            return Ok(known & MIXED);
        }
        let top = self.top()?;
        let offset = piece << PIECE_BITS;
        let len = top.capacity().saturating_sub(offset).min(1 << PIECE_BITS);
        // Whoever meets damage when he reads says so then.
        let Ok(status) = top.block_status(offset, len) else { return Ok(MIXED) };
        let layer = if status.len < len {
            MIXED
        } else if status.present {
            u64::from(status.depth)
        } else {
            NOWHERE
        };
        // Of two threads that find it out at once both find the same.
        word.store(piece << LAYER_BITS | layer, Ordering::Relaxed);
        Ok(layer)
    }

    fn read_piece(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        let layer = self.layer_of(offset >> PIECE_BITS)?;
        if layer == NOWHERE {
            return put_zeroes(buffers, 0, buffers.len());
        }
        // What is mixed is looked for from the top, as if nothing were known.
        let number = if layer == MIXED { 0 } else { crate::endian::size(layer) };
        match self.layers.get(number) {
            Some(disk) => disk.read(offset, buffers),
            None => self.top()?.read(offset, buffers),
        }
    }
}

impl Disk for Chain {
    fn capacity(&self) -> u64 {
        self.layers.first().map_or(0, |first| first.capacity())
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, buffers: &dyn Buffers) -> io::Result<()> {
        let len = buffers.len();
        check_range(offset, len, self.capacity())?;
        let piece = 1u64 << PIECE_BITS;
        let first = piece.saturating_sub(offset & piece.saturating_sub(1));
        if len <= first {
            return self.read_piece(offset, buffers);
        }
        let (mut done, mut part) = (0u64, first);
        while done < len {
            self.read_piece(offset.saturating_add(done), &Part::new(buffers, done, part))?;
            done = done.saturating_add(part);
            part = piece.min(len.saturating_sub(done));
        }
        Ok(())
    }

    fn write(&self, _: u64, _: &dyn Buffers) -> io::Result<()> {
        Err(read_only_error())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only_error())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(read_only_error())
    }

    fn block_status(&self, offset: u64, len: u64) -> io::Result<Status> {
        self.top()?.block_status(offset, len)
    }

    fn resize(&self, _: u64) -> io::Result<()> {
        Err(read_only_error())
    }

    fn snapshot(&self, _: &str) -> io::Result<()> {
        Err(read_only_error())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::format::qcow2::{CreateOptions, Parts, Qcow2};
    use crate::storage::StorageFile;
    use crate::{VecBuffers, WriteFrom};
    use proptest::prelude::*;

    const SIZE: u64 = 5 << 16;

    /// What is written into an image: place, length, and a value, or zeroes where it is small.
    type Write = (u64, u64, u8);

    /// A new image over another, open to be read.
    fn layer(size: u64, cluster_bits: u32, below: Option<Arc<dyn Disk>>, writes: &[Write]) -> Arc<dyn Disk> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backing = below.as_ref().map(|_| ("below".into(), "qcow2".into()));
        let create = CreateOptions { cluster_bits, backing, ..CreateOptions::new(size) };
        let parts = || Parts { backing: below.clone(), data: None };
        let storage = Arc::new(StorageFile::create(file.path(), true).unwrap());
        let made = Qcow2::create(file.path(), storage, &create, parts()).unwrap();
        for (at, len, value) in writes {
            let at = (*at).min(size - 1);
            let len = (*len).min(size - at);
            match value {
                0..40 => made.write_zeroes(at, len, value & 1 == 0).unwrap(),
                value => made.write(at, &WriteFrom(&vec![*value; len as usize])).unwrap(),
            }
        }
        made.close().unwrap();
        drop(made);
        let storage = Arc::new(StorageFile::open(file.path(), true).unwrap());
        let header = Qcow2::read_header(file.path(), storage.as_ref()).unwrap();
        Arc::new(Qcow2::open(file.path(), storage, header, parts()).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// Images with clusters of several sizes and disks of several, each with some writes and zeroes of its own.
        #[test]
        fn a_chain_reads_as_its_images_do(
            images in prop::collection::vec(
                (12u32..=17, SIZE / 1024..=SIZE / 512, prop::collection::vec((0..SIZE, 1u64..70_000, any::<u8>()), 0..4)),
                3..7,
            ),
            reads in prop::collection::vec((0..SIZE, 1u64..150_000), 1..20),
        ) {
            let mut disks: Vec<Arc<dyn Disk>> = Vec::new();
            for (cluster_bits, sectors, writes) in images {
                let disk = layer(sectors * 512, cluster_bits, disks.first().cloned(), &writes);
                disks.insert(0, disk);
            }
            let plain = disks[0].clone();
            let chain = Chain::over(disks).unwrap();
            for (at, len) in reads {
                let at = at.min(plain.capacity() - 1);
                let len = len.min(plain.capacity() - at) as usize;
                let read = |disk: &dyn Disk| {
                    let buffers = VecBuffers::new(vec![0xee; len]);
                    disk.read(at, &buffers).unwrap();
                    buffers.into_inner()
                };
                // Once to find out, once as it is known then.
                for _ in 0..2 {
                    prop_assert!(read(chain.as_ref()) == read(plain.as_ref()), "{} bytes at {}", len, at);
                }
            }
            prop_assert!(chain.read(plain.capacity(), &VecBuffers::new(vec![0])).is_err());
        }
    }

    #[test]
    fn it_is_known_which_image_has_a_piece() {
        let bottom = layer(SIZE, 16, None, &[(0, 3 << 16, 77)]);
        let middle = layer(SIZE, 16, Some(bottom.clone()), &[(1 << 16, 1 << 16, 88)]);
        // Smaller clusters: a piece is partly its own.
        let top = layer(SIZE, 12, Some(middle.clone()), &[(2 << 16, 4096, 99)]);
        let chain = Chain::new(vec![top, middle, bottom]);
        let found: Vec<u64> = (0..5).map(|piece| chain.layer_of(piece).unwrap()).collect();
        assert_eq!(found, [2, 1, MIXED, NOWHERE, NOWHERE]);
        let again: Vec<u64> = (0..5).map(|piece| chain.layer_of(piece).unwrap()).collect();
        assert_eq!(again, found);
    }

    #[test]
    fn short_chains_and_those_that_are_written_are_left_as_they_are() {
        let bottom = layer(SIZE, 16, None, &[]);
        let same = |chain: Option<Arc<dyn Disk>>, disk: &Arc<dyn Disk>| {
            chain.is_some_and(|chain| Arc::ptr_eq(&chain, disk))
        };
        assert!(same(Chain::over(vec![bottom.clone()]), &bottom));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let written: Arc<dyn Disk> = Arc::new(crate::format::Raw::open(file.path(), false).unwrap());
        let disks = vec![bottom.clone(), bottom.clone(), bottom.clone(), written];
        assert!(same(Chain::over(disks), &bottom));
        assert!(Chain::over(Vec::new()).is_none());
    }
}
