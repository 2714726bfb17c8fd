//! Why a header cannot be used, the same for all formats.

use crate::disk::Error;
use std::io;
use std::path::Path;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It breaks the format's rules.
    Corrupt(String),
    /// It uses what yado has not.
    Unsupported(String),
}

/// The header that was read from a file, or why not, for the file's user.
pub(crate) fn sound<H>(
    path: &Path,
    format: &'static str,
    read: io::Result<Result<H, Refusal>>,
) -> Result<H, Error> {
    let path = path.to_path_buf();
    match read {
        Ok(Ok(header)) => Ok(header),
        Ok(Err(Refusal::Corrupt(what))) => Err(Error::Corrupt { path, format, what }),
        Ok(Err(Refusal::Unsupported(what))) => Err(Error::Unsupported { path, what }),
        Err(source) => Err(Error::Io { path, source }),
    }
}
