//! `cargo xtask test`: everything that must pass, in the order in which it fails fastest.

use crate::{setup, tidy};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What to leave out.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// Leave out the tests that boot guests
    #[arg(long)]
    pub no_guests: bool,
    /// Run the guest tests that need the largest downloads too (every kernel flavour of every release)
    #[arg(long)]
    pub slow: bool,
}

/// Runs all steps; the first failure ends it.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let began = Instant::now();
    setup::install_missing(&setup::Options::default())?;
    step(began, "format", &["fmt", "--all", "--", "--check"])?;
    step(began, "lints", &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])?;
    laws(began)?;
    if has_nextest() {
        step(began, "unit and property tests", &["nextest", "run", "--workspace", "--locked"])?;
        step(
            began,
            "examples in the documentation",
            &["test", "--workspace", "--doc", "--locked", "--quiet"],
        )?;
    } else {
        step(began, "unit and property tests", &["test", "--workspace", "--locked", "--quiet"])?;
    }
    step(began, "release build", &["build", "--release", "--locked", "--package", "yado"])?;
    if !options.no_guests {
        guest_tests(began, "guests", &[])?;
        if options.slow {
            guest_tests(began, "programs", &[])?;
        } else {
            guest_tests(began, "programs", &["--skip=slow::"])?;
            say(began, "guest tests with the largest downloads: left out; --slow runs them");
        }
    }
    say(began, "all passed");
    Ok(())
}

/// Guests share the host's few cores, so one boots at a time.
fn guest_tests(began: Instant, binary: &str, more: &[&str]) -> anyhow::Result<()> {
    let line = ["test", "--locked", "--package", "xtask", "--test", binary, "--", "--test-threads=1"];
    step(began, &format!("guest tests: {binary}"), &[&line[..], more].concat())
}

fn laws(began: Instant) -> anyhow::Result<()> {
    say(began, "laws of the house");
    let breaches = tidy::check(&tidy::root())?;
    for breach in &breaches {
        println!("{}", breach.0);
    }
    anyhow::ensure!(breaches.is_empty(), "{} breaches of the laws", breaches.len());
    Ok(())
}

fn has_nextest() -> bool {
    Command::new("cargo")
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn step(began: Instant, name: &str, arguments: &[&str]) -> anyhow::Result<()> {
    say(began, &format!("{name}: cargo {}", arguments.join(" ")));
    let this = Instant::now();
    let status =
        Command::new("cargo").args(arguments).current_dir(tidy::root()).stdin(Stdio::null()).status()?;
    anyhow::ensure!(status.success(), "{name} failed ({status}); the reason is above");
    say(began, &format!("{name}: passed in {} s", this.elapsed().as_secs()));
    Ok(())
}

fn say(began: Instant, line: &str) {
    println!("[{:5} s] {line}", began.elapsed().as_secs());
}
