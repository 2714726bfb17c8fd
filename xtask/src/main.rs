//! `cargo xtask`: the development commands. See `cargo xtask --help`.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};

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
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Task::Tidy => {
            let breaches = xtask::tidy::check(&xtask::tidy::root())?;
            for breach in &breaches {
                println!("{}", breach.0);
            }
            anyhow::ensure!(breaches.is_empty(), "{} breaches of the laws", breaches.len());
            println!("tidy");
        }
    }
    Ok(())
}
