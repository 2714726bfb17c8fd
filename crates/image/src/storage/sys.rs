//! System calls that the standard library does not offer.
//!
//! `unsafe` lives here because these calls take raw addresses and variable arguments; every function is a safe face
//! of one call, with the interrupted-call loop inside.
#![allow(unsafe_code)]

use crate::{Source, Target};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most pieces that one call may have (`UIO_MAXIOV`).
pub(crate) const PIECES_MAX: usize = 1024;

/// Runs a call until it is not interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn off(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Reads at `offset`; answers how many bytes, 0 at the end of the file. At most [`PIECES_MAX`] pieces are used.
pub(crate) fn preadv(fd: BorrowedFd<'_>, offset: u64, into: &[Target<'_>]) -> io::Result<usize> {
    let offset = off(offset)?;
    let count = into.len().min(PIECES_MAX) as libc::c_int;
    // SAFETY: `Target` has the layout of `iovec`, and its maker promised that the memory is valid and writable.
    retry(|| unsafe { libc::preadv(fd.as_raw_fd(), into.as_ptr().cast(), count, offset) })
}

/// Writes at `offset`; answers how many bytes. With `durable` they are on stable storage (`RWF_DSYNC`).
pub(crate) fn pwritev(
    fd: BorrowedFd<'_>,
    offset: u64,
    from: &[Source<'_>],
    durable: bool,
) -> io::Result<usize> {
    let offset = off(offset)?;
    let count = from.len().min(PIECES_MAX) as libc::c_int;
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    // SAFETY: `Source` has the layout of `iovec`, and its maker promised that the memory is valid.
    retry(|| unsafe { libc::pwritev2(fd.as_raw_fd(), from.as_ptr().cast(), count, offset, flags) })
}

/// What [`fallocate`] does with a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fallocate {
    /// Zeroes that keep their space.
    Zero,
    /// Zeroes whose space is given back.
    PunchHole,
}

/// Changes the allocation of a range, never the file's size.
pub(crate) fn fallocate(fd: BorrowedFd<'_>, what: Fallocate, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_KEEP_SIZE
        | match what {
            Fallocate::Zero => libc::FALLOC_FL_ZERO_RANGE,
            Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
        };
    let (offset, len) = (off(offset)?, off(len)?);
    // SAFETY: no memory is involved.
    retry(|| unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) as isize }).map(drop)
}

/// Takes an open-file-description lock on the whole file; answers whether it was free.
pub(crate) fn lock(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    // SAFETY: `flock` is plain data for which zeroes are valid: whole file, from the start, no process.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = (if exclusive { libc::F_WRLCK } else { libc::F_RDLCK }) as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the argument is a valid `flock` that outlives the call.
    let done = retry(|| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &lock) as isize });
    match done {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Bytes of a block device.
pub(crate) fn block_device_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    /// `BLKGETSIZE64`: `_IOR(0x12, 114, size_t)` (linux/fs.h).
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: this request writes one u64 to the address given.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut size) as isize })?;
    Ok(size)
}

/// Makes all of `to` share the blocks of `from` (a reflink).
pub(crate) fn ficlone(to: BorrowedFd<'_>, from: BorrowedFd<'_>) -> io::Result<()> {
    /// `FICLONE`: `_IOW(0x94, 9, int)` (linux/fs.h).
    const FICLONE: libc::c_ulong = 0x4004_9409;
    // SAFETY: the argument is a descriptor, no memory is involved.
    retry(|| unsafe { libc::ioctl(to.as_raw_fd(), FICLONE, from.as_raw_fd()) as isize }).map(drop)
}

/// Copies at most `len` bytes inside the kernel, from and to the same offset; answers how many.
pub(crate) fn copy_file_range(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    offset: u64,
    len: usize,
) -> io::Result<usize> {
    let (mut input, mut output) = (off(offset)?, off(offset)?);
    // SAFETY: both offsets are valid for the call and not used after it.
    retry(|| unsafe {
        libc::copy_file_range(from.as_raw_fd(), &raw mut input, to.as_raw_fd(), &raw mut output, len, 0)
    })
}

/// The first byte at or after `offset` that is data (or, with `hole`, not); `None` if there is none.
pub(crate) fn seek(fd: BorrowedFd<'_>, offset: u64, hole: bool) -> io::Result<Option<u64>> {
    let whence = if hole { libc::SEEK_HOLE } else { libc::SEEK_DATA };
    let offset = off(offset)?;
    // SAFETY: no memory is involved.
    match retry(|| unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) as isize }) {
        Ok(at) => Ok(Some(at as u64)),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}
