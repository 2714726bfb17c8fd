//! Copies of whole images: shared blocks where the file system can, else only the data, holes kept.

use crate::storage::sys;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Why an image could not be copied.
#[derive(Debug, thiserror::Error)]
#[error("cannot copy the image {from} to {to}: {source}")]
pub struct CloneError {
    /// The image to copy.
    pub from: PathBuf,
    /// Where to.
    pub to: PathBuf,
    /// The host's reason.
    pub source: io::Error,
}

/// How an image was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloned {
    /// The copy shares its blocks with the original until one of them is written.
    Shared,
    /// This many bytes of data were copied.
    Copied(u64),
}

/// Bytes per step, and so per call of the progress function.
const STEP: u64 = 8 << 20;

/// Makes `to`, which must not exist, a copy of `from`. `progress` is called with (bytes done, bytes of the file).
/// If it fails, `to` does not exist afterwards.
pub fn clone_file(from: &Path, to: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Cloned, CloneError> {
    let failed = |source| CloneError { from: from.to_owned(), to: to.to_owned(), source };
    let input = File::open(from).map_err(failed)?;
    let output = OpenOptions::new().read(true).write(true).create_new(true).open(to).map_err(failed)?;
    copy(&input, &output, progress).map_err(|source| {
        // The first reason matters more than whether the rest can be removed.
        let _ = fs::remove_file(to);
        failed(source)
    })
}

fn copy(input: &File, output: &File, progress: &mut dyn FnMut(u64, u64)) -> io::Result<Cloned> {
    let len = input.metadata()?.len();
    if sys::ficlone(output.as_fd(), input.as_fd()).is_ok() {
        progress(len, len);
        return Ok(Cloned::Shared);
    }
    output.set_len(len)?;
    let (mut at, mut copied) = (0, 0u64);
    while let Some(data) = next_data(input, at, len)? {
        let end = sys::seek(input.as_fd(), data, true)?.unwrap_or(len).min(len);
        at = data;
        while at < end {
            let part = end.wrapping_sub(at).min(STEP);
            let done = copy_part(input, output, at, part)?;
            if done == 0 {
                // The file became shorter under us; what is missing stays a hole.
                return Ok(Cloned::Copied(copied));
            }
            at = at.saturating_add(done);
            copied = copied.saturating_add(done);
            progress(at, len);
        }
    }
    progress(len, len);
    Ok(Cloned::Copied(copied))
}

/// The next data at or after `at`; on a file system that does not know holes, all is data.
fn next_data(input: &File, at: u64, len: u64) -> io::Result<Option<u64>> {
    if at >= len {
        return Ok(None);
    }
    match sys::seek(input.as_fd(), at, false) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Some(at)),
        found => found,
    }
}

fn copy_part(input: &File, output: &File, at: u64, len: u64) -> io::Result<u64> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    match sys::copy_file_range(input.as_fd(), output.as_fd(), at, len) {
        Ok(done) if done > 0 => Ok(done as u64),
        // Across file systems, or where the kernel answers 0 for a file it cannot copy: through memory.
        _ => {
            let mut bytes = vec![0; len.min(1 << 20)];
            let done = input.read_at(&mut bytes, at)?;
            output.write_all_at(bytes.get(..done).unwrap_or_default(), at)?;
            Ok(done as u64)
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_is_equal_and_as_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len((64 << 20) + 100).unwrap();
        for at in [0u64, 5 << 20, (20 << 20) + 3, 64 << 20] {
            file.write_all_at(
                &[at.to_le_bytes()[2] | 1; 5000][..if at == 64 << 20 { 100 } else { 5000 }],
                at,
            )
            .unwrap();
        }
        file.sync_all().unwrap();
        let mut last = (0, 0);
        let how = clone_file(&from, &to, &mut |done, all| last = (done, all)).unwrap();
        assert_eq!(last, ((64 << 20) + 100, (64 << 20) + 100));
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        if let Cloned::Copied(bytes) = how {
            assert!(bytes < 1 << 20, "{bytes} bytes copied of a sparse file");
            assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        }
        let again = clone_file(&from, &to, &mut |_, _| {}).unwrap_err();
        assert_eq!(again.source.kind(), io::ErrorKind::AlreadyExists);
        assert!(to.exists());
    }
}
