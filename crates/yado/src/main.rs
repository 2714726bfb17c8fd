//! `yado`: the command. Arguments, terminal, progress and exit codes live here; no VM logic does.
#![forbid(unsafe_code)]

// The standard ones panic where nobody reads any more or a disk is full, and a panic ends the guest.
macro_rules! eprintln {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($what)*);
    }};
}
macro_rules! println {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        crate::terminal::note(writeln!(std::io::stdout(), $($what)*));
    }};
}
macro_rules! print {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        crate::terminal::note(write!(std::io::stdout(), $($what)*));
    }};
}

mod arguments;
mod cache;
mod client;
mod doctor;
mod engine;
mod exit;
mod exporter;
mod guests;
mod host_share;
mod image;
mod numbers;
mod progress;
mod prometheus;
mod provision;
mod registry;
mod run;
mod signals;
mod size;
mod stats;
mod switch;
mod terminal;

use arguments::{Arguments, Command};
use clap::{CommandFactory, Parser};
use machine::control::protocol::Request;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    memory::keep_heap_small();
    let name = std::env::args_os().next();
    if image::qemu_nbd::is_called(name.as_deref().map(Path::new)) {
        return ExitCode::from(image::qemu_nbd::main());
    }
    if image::qemu_img::is_called(name.as_deref().map(Path::new)) {
        return ExitCode::from(image::qemu_img::run(std::env::args_os()));
    }
    let arguments = Arguments::parse();
    let result = dispatch(arguments.command);
    terminal::restore();
    match result.and_then(terminal::told) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("yado: {}", sentence(&error));
            ExitCode::from(exit::code_of(&error))
        }
    }
}

/// The error with its causes, each said once: many messages quote their cause already.
fn sentence(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

fn dispatch(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(options) => {
            machine::look_at_clocks();
            return run::run(*options);
        }
        Command::Exec(options) => return guests::exec(options),
        Command::Ps(options) => guests::ps(&options)?,
        Command::Console(named) => guests::console(&named)?,
        Command::Stop(options) => guests::stop(&options)?,
        Command::Pause(named) => guests::tell(&named, &Request::Pause)?,
        Command::Resume(named) => guests::tell(&named, &Request::Resume)?,
        Command::Logs(options) => guests::logs(&options)?,
        Command::Inspect(named) => guests::inspect(&named)?,
        Command::Stats(options) => stats::stats(&options)?,
        Command::Rm(options) => guests::rm(&options)?,
        Command::Image(command) => return image::run(command),
        Command::Switch(options) => switch::switch(options.command)?,
        Command::Net(options) => switch::net(options.command)?,
        Command::Cache(options) => cache::cache(&options)?,
        Command::Doctor(options) => doctor::doctor(&options)?,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "yado", &mut std::io::stdout());
        }
        Command::CgroupKeeper => host_share::keep()?,
        Command::Man { directory } => man(&directory)?,
    }
    Ok(0)
}

fn man(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Arguments::command(), directory)?;
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let cause = std::io::Error::other("no space");
        assert_eq!(
            sentence(&anyhow::Error::new(cause).context("cannot write x")),
            "cannot write x: no space"
        );
        let cause = std::io::Error::other("no space");
        let quoting = anyhow::Error::new(cause).context("cannot write x: no space; free some");
        assert_eq!(sentence(&quoting), "cannot write x: no space; free some");
    }
}
