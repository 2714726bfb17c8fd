//! Copies that move nothing: where source and target lie on one file system that can share blocks (reflink), an image's
//! bytes become the other's without being read.
//!
//! No format knows of it. A target is given [`Shared`] to write from, which is no memory: when a storage asks it to write
//! itself into a file, it reads the source into [`IntoFile`], which, when the source's storage asks it to fill itself from a
//! file, lets one file have the other's blocks. Where bytes come otherwise (compressed, from a server) that is refused, and
//! the bytes are copied as ever.

use crate::buffers::{Buffers, ReadInto};
use crate::disk::Disk;
use std::io;
use std::os::fd::BorrowedFd;

/// File systems whose copies of ranges share blocks: XFS and btrfs (statfs(2)). Others would copy, slowly.
const SHARING: [u64; 2] = [0x5846_5342, 0x9123_683e];

/// What file systems share: whole blocks of this many bytes.
pub const BLOCK: u64 = 4096;

/// A disk's bytes at `offset`, to write from.
pub struct Shared<'a> {
    pub source: &'a dyn Disk,
    pub offset: u64,
    pub len: u64,
}

impl Buffers for Shared<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_file(&self, _: u64, _: u64, _: BorrowedFd<'_>, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn write_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.source.read(self.offset.saturating_add(at), &IntoFile { file, offset, len })
    }

    fn put(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// Pieces of blocks, at the edges. Who wants more is no file, and what is copied is looked through for zeroes before.
    fn get(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        if into.len() as u64 >= BLOCK {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.source.read(self.offset.saturating_add(at), &ReadInto::new(into))
    }
}

/// A range of a file, to read into.
struct IntoFile<'a> {
    file: BorrowedFd<'a>,
    offset: u64,
    len: u64,
}

impl Buffers for IntoFile<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_file(&self, at: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        share(file, offset, self.file, self.offset.saturating_add(at), len)
    }

    fn write_file(&self, _: u64, _: u64, _: BorrowedFd<'_>, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn put(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn get(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// Lets a range of `to` have the blocks of a range of `from`.
fn share(from: BorrowedFd<'_>, at: u64, to: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let place = rustix::fs::fstatfs(to)?;
    // Parts of blocks would be copied, slowly.
    if (at | offset | len) & BLOCK.saturating_sub(1) != 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    if !SHARING.contains(&(place.f_type as u64)) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let mut done = 0u64;
    while done < len {
        let (mut source, mut target) = (at.saturating_add(done), offset.saturating_add(done));
        let part = crate::endian::size(len.saturating_sub(done));
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), part) {
            // The file ends; what is beyond reads as zeroes, which nobody shares.
            Ok(0) => return Err(io::ErrorKind::Unsupported.into()),
            Ok(count) => done = done.saturating_add(count as u64),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::format::Raw;
    use crate::format::qcow2::{CreateOptions, Parts, Qcow2};
    use crate::storage::StorageFile;
    use std::sync::Arc;

    /// Where a test finds a file system that shares blocks, it is this directory.
    fn file(len: u64) -> tempfile::NamedTempFile {
        let place = std::env::var_os("IMAGE_TEST_REFLINK").unwrap_or_else(|| std::env::temp_dir().into());
        let file = tempfile::NamedTempFile::new_in(place).unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn bytes_arrive_or_sharing_is_refused() {
        let (from, to) = (file(1 << 20), file(1 << 20));
        let bytes: Vec<u8> = (0..1u32 << 20).map(|at| (at >> 9) as u8).collect();
        std::fs::write(from.path(), &bytes).unwrap();
        let source = Raw::open(from.path(), true).unwrap();
        let target = Raw::open(to.path(), false).unwrap();
        let shared = Shared { source: &source, offset: 4096, len: 1 << 18 };
        match target.write(8192, &shared) {
            Ok(()) => {
                let written = std::fs::read(to.path()).unwrap();
                assert!(written[8192..8192 + (1 << 18)] == bytes[4096..4096 + (1 << 18)]);
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
        }
        let mut part = [0; 512];
        shared.get(512, &mut part).unwrap();
        assert_eq!(part, bytes[4608..5120]);
        assert!(shared.put(0, &part).is_err());
        assert!(shared.get(0, &mut [0; 4096]).is_err(), "a server's disk is not written to so");
    }

    #[test]
    fn what_is_compressed_or_zero_is_not_shared() {
        let (from, to) = (file(0), file(1 << 20));
        let create = CreateOptions::new(1 << 20);
        let storage = Arc::new(StorageFile::create(from.path(), true).unwrap());
        let source = Qcow2::create(from.path(), storage, &create, Parts::default()).unwrap();
        source.write_compressed(0, &[7; 65536], &mut source.deflater().unwrap()).unwrap();
        let target = Raw::open(to.path(), false).unwrap();
        for offset in [0, 1 << 17] {
            let error = target.write(0, &Shared { source: &source, offset, len: 65536 }).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}");
        }
    }
}
