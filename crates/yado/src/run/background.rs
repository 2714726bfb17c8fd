//! `yado run --detach`: the guest runs in a process of its own, started anew from this program.

use crate::exit::with_code;
use anyhow::Context;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

/// Tells the started process that it is the background one.
const VARIABLE: &str = "YADO_BACKGROUND";
/// What it says on standard output when the guest runs; the name follows.
const READY: &str = "running ";

/// Whether this process was started by [`start`].
pub fn is_background() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// What a background process does when its guest runs. Made while it can still open files.
pub struct Parting {
    nowhere: File,
}

impl Parting {
    /// `None` if this is not the background process.
    pub fn new() -> anyhow::Result<Option<Self>> {
        if !is_background() {
            return Ok(None);
        }
        // Until here Ctrl-C was for this process too.
        let _ = rustix::process::setsid();
        Ok(Some(Self { nowhere: File::options().write(true).open("/dev/null")? }))
    }

    /// Says to the process that started this one that the guest runs, and lets go of it.
    pub fn ready(self, name: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{READY}{name}")?;
        out.flush()?;
        rustix::stdio::dup2_stdout(&self.nowhere)?;
        rustix::stdio::dup2_stderr(&self.nowhere)?;
        Ok(())
    }
}

/// Starts the guest in the background; answers its name when it runs.
pub fn start() -> anyhow::Result<String> {
    let program = std::env::current_exe().context("cannot find yado's own program file")?;
    let mut command = Command::new(program);
    command
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Progress, if it is not quiet, and errors until the guest runs.
        .stderr(Stdio::inherit());
    let mut child = command.spawn().context("cannot start a process for the guest")?;
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        let mut byte = [0];
        while !said.ends_with('\n') && out.read(&mut byte).is_ok_and(|count| count == 1) {
            said.push(char::from(byte[0]));
        }
    }
    if let Some(name) = said.trim_end().strip_prefix(READY) {
        return Ok(name.to_owned());
    }
    // It has said why on standard error.
    let status = child.wait()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::exit::YADO_FAILED);
    Err(with_code(code, "the guest did not start"))
}
