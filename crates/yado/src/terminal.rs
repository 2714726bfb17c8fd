//! The user's terminal: raw while a console or command has it, and as it was afterwards, whatever happens.

use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};

static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// What became of output that could not be written.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Remembers whether output was written: what has been begun is finished all the same.
pub fn note(written: io::Result<()>) {
    if let Err(error) = written {
        let _ = LOST.set(error);
    }
}

/// Whether what is written goes nowhere any more.
pub fn nobody_reads() -> bool {
    LOST.get().is_some()
}

/// The exit code of a command, unless its output is lost to somebody who wanted it: who closes a pipe has read enough.
pub fn told(code: u8) -> anyhow::Result<u8> {
    note(io::stdout().flush());
    match LOST.get() {
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::anyhow!("cannot write to standard output: {error}"))
        }
        _ => Ok(code),
    }
}

/// Whether a person sits at both ends.
pub fn is_interactive() -> bool {
    isatty(stdin()) && isatty(stdout())
}

/// The size: rows, columns.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// The terminal is raw as long as this lives.
#[must_use = "the terminal is put back when this is dropped"]
pub struct Raw(());

impl Raw {
    /// Makes the terminal raw; `None` if standard input is none.
    pub fn enter() -> Option<Self> {
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).ok()?;
        *BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(before);
        Some(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was; harmless at any time.
pub fn restore() {
    let before = BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(before) = before {
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &before);
    }
}
