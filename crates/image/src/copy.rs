//! Copies of image files.

use crate::Error;
use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Bytes copied between two looks at the progress callback.
const CHUNK: usize = 1 << 20;

/// Copies an image: by sharing its blocks where the file system can (reflink), else data only, holes staying holes.
/// `progress` hears bytes of the image as they are dealt with and answers whether to go on. On failure the copy is
/// removed. It is stable when this returns: it can be given a name that others believe.
pub fn clone_file(from: &Path, to: &Path, progress: &mut dyn FnMut(u64) -> bool) -> Result<(), Error> {
    let fail = |source| Error::Copy { from: from.to_path_buf(), to: to.to_path_buf(), source };
    let source = File::open(from).map_err(fail)?;
    let target = new_like(&source, to).map_err(fail)?;
    let copied = copy(&source, &target, progress).and_then(|()| Ok(rustix::fs::fdatasync(&target)?));
    copied.map_err(|error| {
        let _ = std::fs::remove_file(to);
        fail(error)
    })
}

/// Makes a copy that shares all blocks with the original, where the file system can; nothing is left where it cannot.
pub fn share_blocks(from: &Path, to: &Path) -> Result<(), Error> {
    let fail = |source| Error::Copy { from: from.to_path_buf(), to: to.to_path_buf(), source };
    let source = File::open(from).map_err(fail)?;
    let target = new_like(&source, to).map_err(fail)?;
    ioctl_ficlone(&target, &source).map_err(|error| {
        let _ = std::fs::remove_file(to);
        fail(error.into())
    })
}

/// Makes a file that nobody may read who may not read the original. Its owner may write it: a copy is there to be changed.
fn new_like(source: &File, to: &Path) -> io::Result<File> {
    let mode = source.metadata()?.mode() & 0o777 | 0o600;
    File::options().write(true).create_new(true).mode(mode).open(to)
}

fn copy(source: &File, target: &File, progress: &mut dyn FnMut(u64) -> bool) -> io::Result<()> {
    let len = source.metadata()?.len();
    if ioctl_ficlone(target, source).is_ok() {
        progress(len);
        return Ok(());
    }
    target.set_len(len)?;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0u64;
    while at < len {
        let (data, hole) = next_data(source, at, len)?;
        if !progress(data.saturating_sub(at)) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        at = data;
        while at < hole {
            let part = hole.saturating_sub(at).min(CHUNK as u64);
            let Some(piece) = usize::try_from(part).ok().and_then(|part| buffer.get_mut(..part)) else {
                break;
            };
            source.read_exact_at(piece, at)?;
            target.write_all_at(piece, at)?;
            at = at.saturating_add(part);
            if !progress(part) {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
    }
    Ok(())
}

/// The next run of data at or after `at`: its start and end. At the end of the data both are the file's length.
fn next_data(file: &File, at: u64, len: u64) -> io::Result<(u64, u64)> {
    let data = match seek(file, SeekFrom::Data(at)) {
        Ok(data) => data,
        Err(rustix::io::Errno::NXIO) => return Ok((len, len)),
        // A file system that knows no holes has data everywhere.
        Err(rustix::io::Errno::INVAL) => return Ok((at, len)),
        Err(error) => return Err(error.into()),
    };
    Ok((data.min(len), seek(file, SeekFrom::Hole(data))?.min(len)))
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_copy_is_for_no_more_eyes_than_the_original() {
        let directory = tempfile::tempdir().unwrap();
        for (mode, expected) in [(0o600, 0o600), (0o400, 0o600), (0o640, 0o640)] {
            let [from, to] = ["a", "b"].map(|name| directory.path().join(format!("{name}{mode}")));
            std::fs::write(&from, "secret").unwrap();
            std::fs::set_permissions(&from, PermissionsExt::from_mode(mode)).unwrap();
            clone_file(&from, &to, &mut |_| true).unwrap();
            assert_eq!(to.metadata().unwrap().mode() & 0o777 & !0o022, expected, "{mode:o}");
        }
    }

    #[test]
    fn holes_stay_holes_and_data_is_equal() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        let file = File::create(&from).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&[5; 70_000], 3 << 20).unwrap();
        file.set_len(64 << 20).unwrap();
        let mut seen = 0;
        clone_file(&from, &to, &mut |bytes| {
            seen += bytes;
            true
        })
        .unwrap();
        assert_eq!(seen, 64 << 20);
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        assert!(clone_file(&from, &to, &mut |_| true).is_err());
    }

    #[test]
    fn a_cancelled_copy_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&from, vec![1; 1 << 16]).unwrap();
        // Where blocks are shared the copy is done before it can be cancelled.
        if clone_file(&from, &to, &mut |_| false).is_err() {
            assert!(!to.exists());
        }
    }
}
