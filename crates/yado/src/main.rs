//! `yado`: the command. Arguments, terminal, progress and exit codes live here; no VM logic does.
#![forbid(unsafe_code)]

mod arguments;
mod client;
mod doctor;
mod engine;
mod exit;
mod guests;
mod progress;
mod registry;
mod run;
mod signals;
mod size;
mod terminal;

use arguments::{Arguments, Command};
use clap::{CommandFactory, Parser};
use machine::control::protocol::Request;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = dispatch(arguments.command);
    terminal::restore();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("yado: {error:#}");
            ExitCode::from(exit::code_of(&error))
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(options) => return run::run(*options),
        Command::Exec(options) => return guests::exec(options),
        Command::Ps(options) => guests::ps(&options)?,
        Command::Console(named) => guests::console(&named)?,
        Command::Stop(options) => guests::stop(&options)?,
        Command::Pause(named) => guests::tell(&named, &Request::Pause)?,
        Command::Resume(named) => guests::tell(&named, &Request::Resume)?,
        Command::Logs(options) => guests::logs(&options)?,
        Command::Inspect(named) => guests::inspect(&named)?,
        Command::Rm(options) => guests::rm(&options)?,
        Command::Doctor(options) => doctor::doctor(&options)?,
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "yado", &mut std::io::stdout());
        }
        Command::Man { directory } => man(&directory)?,
    }
    Ok(0)
}

fn man(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Arguments::command(), directory)?;
    Ok(())
}
