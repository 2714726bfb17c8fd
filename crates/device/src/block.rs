//! The queue between a storage controller (a value) and the thread that does its I/O.
//!
//! The controller parses guest rings into [`Request`]s; a worker takes them with [`Controller::next_request`] (the
//! device lock held only for that), moves the bytes between guest RAM and the image, and answers with
//! [`Controller::complete`]. Every request taken is completed exactly once, in any order; a controller that was
//! reset meanwhile ignores completions of tokens it no longer knows.

/// What a request asks for. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Image to guest RAM.
    Read,
    /// Guest RAM to image; with `fua` also onto stable storage before completion.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything completed before is on stable storage when this completes.
    Flush,
    /// The range's content is no longer needed.
    Discard,
    /// The range reads as zeroes afterwards; with `unmap` it may be deallocated, with `fua` the zeroes are on stable
    /// storage before completion.
    WriteZeroes {
        /// May deallocate.
        unmap: bool,
        /// Force unit access.
        fua: bool,
    },
}

/// A piece of guest RAM: guest-physical address and length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// One request to a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Names the request in [`Controller::complete`].
    pub token: u64,
    /// What to do.
    pub operation: Operation,
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes; the sum of the segments for reads and writes.
    pub len: u64,
    /// Where the data is in guest RAM, in order. Addresses are the guest's and may be nonsense: an access that is
    /// not RAM completes with [`Outcome::BadAddress`].
    pub segments: Vec<Segment>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Ok,
    /// The image could not be read or written.
    IoError,
    /// The image's file system is full.
    NoSpace,
    /// The operation is not possible on this disk (write to a read-only disk, unmap not supported).
    Unsupported,
    /// A segment is not RAM.
    BadAddress,
}

/// What a disk is, told to the controller when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in bytes, a multiple of `block_size`.
    pub capacity: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Writes fail.
    pub read_only: bool,
    /// Discard and write-zeroes work.
    pub discard: bool,
    /// Writes are on stable storage only after a flush, until the driver decides otherwise; else when they are done.
    pub write_cache: bool,
}

/// The worker's side of a storage controller.
pub trait Controller: Send {
    /// The next request, if the rings hold one.
    fn next_request(&mut self) -> Option<Request>;
    /// Answers a request.
    fn complete(&mut self, token: u64, outcome: Outcome);
}
