//! What an image can be asked beyond being a disk, where its format keeps tables.

use super::Format;
use super::findings::{Findings, Repair};
use crate::disk::{Disk, Error};
use std::io;

/// A format's own word about an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// Yes or no.
    Flag(bool),
    /// A number.
    Number(u64),
    /// Words.
    Text(String),
    /// Several.
    List(Vec<Fact>),
    /// Several with names.
    Row(Vec<(&'static str, Fact)>),
}

/// What the header of an image says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Bytes of a cluster, block or grain.
    pub cluster_size: Option<u64>,
    /// It was not closed in order.
    pub dirty: bool,
    /// The image that it builds on, as it is written there, and its format if the image says it.
    pub backing: Option<(String, Option<String>)>,
    /// More, by qemu-img's names.
    pub details: Vec<(&'static str, Fact)>,
}

/// See the module.
pub trait Container: Disk {
    /// What the header says.
    fn facts(&self) -> Facts;
    /// Checks the image, and repairs it if it may be written. Requests wait meanwhile.
    fn check(&self, repair: Repair) -> Result<Findings, Error>;
    /// Writes all that is only in memory and notes that the image was closed in order. It can be used on.
    fn close(&self) -> io::Result<()>;
    /// Names another image to build on, or none. What the disk shows is the caller's to keep.
    fn set_backing(&self, backing: Option<(&str, Format)>) -> io::Result<()>;
    /// Forgets all that the image holds itself: it shows what is below it.
    fn empty(&self) -> io::Result<()>;
}
