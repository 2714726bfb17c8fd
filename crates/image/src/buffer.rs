//! Pieces of host memory that a transfer reads from or writes to.
//!
//! `unsafe` lives here because guest RAM is shared with running vCPUs: no Rust reference to it may exist, so a piece
//! is a raw address and a length in the layout of `iovec`, and only the kernel, or a raw copy, ever touches it.
#![allow(unsafe_code)]

use std::marker::PhantomData;

/// Memory that a write to a disk takes its bytes from.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Source<'a>(libc::iovec, PhantomData<&'a [u8]>);

/// Memory that a read from a disk puts its bytes into.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Target<'a>(libc::iovec, PhantomData<&'a [u8]>);

// SAFETY: a piece is an address and a length; who made it promised that the memory is valid for 'a from any thread.
unsafe impl Send for Source<'_> {}
// SAFETY: as above.
unsafe impl Sync for Source<'_> {}
// SAFETY: as above.
unsafe impl Send for Target<'_> {}
// SAFETY: as above.
unsafe impl Sync for Target<'_> {}

/// What sources and targets share: they can be cut.
pub(crate) trait Piece: Copy {
    fn len(&self) -> usize;
    /// `len` bytes from `at`, cut to what there is.
    fn part(&self, at: usize, len: usize) -> Self;
}

fn cut(whole: libc::iovec, at: usize, len: usize) -> libc::iovec {
    let at = at.min(whole.iov_len);
    let left = whole.iov_len.wrapping_sub(at);
    libc::iovec { iov_base: whole.iov_base.wrapping_byte_add(at), iov_len: len.min(left) }
}

impl<'a> Source<'a> {
    /// A piece of ordinary memory.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// A piece of memory that others may be writing.
    ///
    /// # Safety
    /// `len` bytes at `start` stay mapped and readable for `'a`.
    pub unsafe fn from_raw(start: *const u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len }, PhantomData)
    }
}

impl<'a> Target<'a> {
    /// A piece of ordinary memory.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }, PhantomData)
    }

    /// A piece of memory that others may be reading and writing.
    ///
    /// # Safety
    /// `len` bytes at `start` stay mapped and writable for `'a`, and no Rust reference to them exists.
    pub unsafe fn from_raw(start: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast(), iov_len: len }, PhantomData)
    }

    /// Sets all bytes to zero.
    pub(crate) fn zero(&self) {
        // SAFETY: the maker promised that the range is writable and that nothing else holds a reference to it.
        unsafe { std::ptr::write_bytes(self.0.iov_base.cast::<u8>(), 0, self.0.iov_len) };
    }
}

impl Piece for Source<'_> {
    fn len(&self) -> usize {
        self.0.iov_len
    }
    fn part(&self, at: usize, len: usize) -> Self {
        Self(cut(self.0, at, len), PhantomData)
    }
}

impl Piece for Target<'_> {
    fn len(&self) -> usize {
        self.0.iov_len
    }
    fn part(&self, at: usize, len: usize) -> Self {
        Self(cut(self.0, at, len), PhantomData)
    }
}

/// Bytes in all pieces.
pub(crate) fn total<P: Piece>(pieces: &[P]) -> u64 {
    pieces.iter().fold(0u64, |sum, piece| sum.saturating_add(piece.len() as u64))
}

/// The pieces of bytes `at..at + len` of the whole.
pub(crate) fn slice<P: Piece>(pieces: &[P], at: u64, len: u64) -> Vec<P> {
    let (mut skip, mut left) = (at, len);
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let here = piece.len() as u64;
        if skip >= here {
            skip = skip.wrapping_sub(here);
            continue;
        }
        if left == 0 {
            break;
        }
        let take = left.min(here.wrapping_sub(skip));
        // Both fit: they are at most the length of a piece of memory.
        #[allow(clippy::cast_possible_truncation)]
        parts.push(piece.part(skip as usize, take as usize));
        (skip, left) = (0, left.wrapping_sub(take));
    }
    parts
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn slices_cut_across_pieces() {
        let (a, b, c) = ([1u8; 10], [2u8; 0], [3u8; 5]);
        let all = [Source::new(&a), Source::new(&b), Source::new(&c)];
        assert_eq!(total(&all), 15);
        let lens = |at, len| slice(&all, at, len).iter().map(Piece::len).collect::<Vec<_>>();
        assert_eq!(lens(0, 15), [10, 5]);
        assert_eq!(lens(8, 4), [2, 2]);
        assert_eq!(lens(10, 1), [1]);
        assert_eq!(lens(14, 9), [1]);
        assert!(lens(15, 1).is_empty());
    }
}
