//! How yado leaves: its exit codes, and errors that carry one.

use std::fmt;

/// The guest panicked.
pub const GUEST_PANICKED: u8 = 3;
/// The guest's CPU gave up (triple fault), or the engine could not go on.
pub const GUEST_CRASHED: u8 = 4;
/// yado itself failed.
pub const YADO_FAILED: u8 = 125;

/// An error with an exit code of its own.
#[derive(Debug)]
pub struct WithCode {
    pub code: u8,
    pub message: String,
}

impl fmt::Display for WithCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for WithCode {}

/// An error that leaves with `code`.
pub fn with_code(code: u8, message: impl Into<String>) -> anyhow::Error {
    WithCode { code, message: message.into() }.into()
}

/// The code that an error leaves with.
pub fn code_of(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<WithCode>().map_or(YADO_FAILED, |with| with.code)
}
