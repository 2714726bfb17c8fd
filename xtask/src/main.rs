//! `cargo xtask`: the development commands. See `cargo xtask --help`.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use xtask::{bench, fuzz, setup, test, tidy};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "yado's development commands")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check the laws of the house
    Tidy,
    /// Everything that must pass: format, lints, laws, unit tests, guest tests
    Test(test::Options),
    /// Run the fuzz targets in turn (needs a nightly toolchain and cargo-fuzz)
    Fuzz(fuzz::Options),
    /// Install the programs that tests and benchmarks compare with (Debian packages; needs root or sudo)
    Setup(setup::Options),
    /// Measure yado against native code and QEMU's TCG, in turn in one run
    #[command(subcommand)]
    Bench(bench::Area),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Task::Tidy => {
            let breaches = tidy::check(&tidy::root())?;
            for breach in &breaches {
                println!("{}", breach.0);
            }
            anyhow::ensure!(breaches.is_empty(), "{} breaches of the laws", breaches.len());
            println!("tidy");
            Ok(())
        }
        Task::Test(options) => test::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Setup(options) => setup::install_missing(&options),
        Task::Bench(area) => bench::run(&area),
    }
}
