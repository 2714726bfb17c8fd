//! The long run of the differential test: `cargo run --release -p engine-soft --example differential -- --cases N
//! --seed S [--first N] [--failures N]`. Exits with 1 if a tier differs from the bare CPU.
#![allow(unsafe_code, missing_docs)]

#[path = "../tests/differential/mod.rs"]
mod differential;

use std::time::Instant;

fn main() {
    let mut options = differential::Options { seed: 1, first: 0, cases: 1_000_000, failures: 10 };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse::<u64>().ok());
        match (name.as_str(), value) {
            ("--seed", Some(value)) => options.seed = value,
            ("--first", Some(value)) => options.first = value,
            ("--cases", Some(value)) => options.cases = value,
            ("--failures", Some(value)) => options.failures = value as usize,
            ("--show", Some(value)) => {
                println!("{}", differential::listing(options.seed, value));
                return;
            }
            _ => {
                eprintln!("usage: differential [--seed S] [--first N] [--cases N] [--failures N] [--show N]");
                std::process::exit(2);
            }
        }
    }
    let start = Instant::now();
    let mut said = Instant::now();
    let mut printed = 0;
    let report = differential::run(&options, |report| {
        for failure in report.failures.iter().skip(printed) {
            println!("{failure}");
        }
        printed = report.failures.len();
        if said.elapsed().as_secs() >= 10 {
            said = Instant::now();
            let rate = report.cases as f64 / start.elapsed().as_secs_f64();
            eprintln!("{} cases, {} failures, {rate:.0} cases/s", report.cases, report.failures.len());
        }
    });
    let rate = report.cases as f64 / start.elapsed().as_secs_f64();
    println!(
        "seed {}: {} cases, {} instructions, {} codes, {} interrupts, {} failures, {} deaths of the child, {rate:.0} cases/s",
        options.seed,
        report.cases,
        report.instructions,
        report.codes,
        report.interrupts,
        report.failures.len(),
        report.died,
    );
    let met: Vec<_> = report.exceptions.iter().enumerate().filter(|(_, n)| **n != 0).collect();
    println!("exceptions by vector: {met:?}");
    std::process::exit(i32::from(!report.failures.is_empty()));
}
