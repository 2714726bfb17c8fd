//! `cargo xtask fuzz`: runs the fuzz targets in turn and says what each did.
//!
//! The targets are a workspace of their own in `fuzz/`, since they want a nightly compiler and cargo-fuzz. What a target
//! has learnt stays in `fuzz/corpus/`, what it found in `fuzz/artifacts/`; neither is committed. Beginnings that a
//! fuzzer does not guess are in `fuzz/seeds/` and, as words, in `fuzz/dictionaries/`.

use crate::{target_directory, tidy};
use anyhow::{Context, bail, ensure};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What to run.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Which targets; all if none is named
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u64,
}

/// Memory in MiB that a target may use; all guests here are small.
const RSS_MIB_MAX: u32 = 2048;
/// Longest time in seconds that one input may take.
const INPUT_SECONDS_MAX: u32 = 10;

/// Bytes of an input at most: long enough for what the target parses, short enough for many a second.
fn input_bytes_max(target: &str) -> u32 {
    match target {
        "engine" => 512,
        "image" => 1024,
        "deb" => 8192,
        _ => 4096,
    }
}

/// What one target did.
#[derive(Debug, PartialEq, Eq)]
struct Figures {
    executions: u64,
    /// Edges seen when the seeds and the corpus had been read, and at the end.
    coverage: (u64, u64),
}

/// Runs the targets; fails if one finds something.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let root = tidy::root();
    let all = targets(&root)?;
    for name in &options.targets {
        ensure!(all.contains(name), "there is no fuzz target {name}; there are {}", all.join(", "));
    }
    let chosen = if options.targets.is_empty() { &all } else { &options.targets };
    println!("{:<18} {:>8} {:>12} {:>8} {:>15}  found", "target", "seconds", "executions", "per s", "edges");
    let mut found = Vec::new();
    for target in chosen {
        build(&root, target)?;
        let began = Instant::now();
        let log = fuzz(&root, target, options.seconds)?;
        let seconds = began.elapsed().as_secs().max(1);
        let figures = figures(&log.text);
        let per_second = figures.executions / seconds;
        let edges = format!("{} -> {}", figures.coverage.0, figures.coverage.1);
        let result = if log.clean { "nothing" } else { "SOMETHING" };
        println!(
            "{target:<18} {seconds:>8} {:>12} {per_second:>8} {edges:>15}  {result}",
            figures.executions
        );
        if !log.clean {
            println!("{}", tail(&log.text, 40));
            found.push(target.as_str());
        }
    }
    ensure!(found.is_empty(), "{} found something: the inputs are in fuzz/artifacts/", found.join(", "));
    Ok(())
}

fn targets(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root.join("fuzz/fuzz_targets"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn cargo_fuzz(root: &Path, what: &str, target: &str) -> Command {
    let mut command = Command::new("cargo");
    command.args(["+nightly", "fuzz", what, target]).current_dir(root.join("fuzz")).stdin(Stdio::null());
    if std::env::var_os("CARGO_TARGET_DIR").is_some() {
        // One that was given relative to the root.
        command.env("CARGO_TARGET_DIR", target_directory());
    }
    command
}

fn build(root: &Path, target: &str) -> anyhow::Result<()> {
    let output = cargo_fuzz(root, "build", target).output().context("cargo does not start")?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    bail!(
        "the fuzz target {target} does not build; it takes a nightly toolchain (`rustup toolchain install nightly`) and \
         cargo-fuzz (`cargo install cargo-fuzz`):\n{}",
        tail(&text, 30)
    )
}

struct Log {
    text: String,
    clean: bool,
}

fn fuzz(root: &Path, target: &str, seconds: u64) -> anyhow::Result<Log> {
    let directory = root.join("fuzz");
    let corpus = directory.join("corpus").join(target);
    std::fs::create_dir_all(&corpus)?;
    let mut command = cargo_fuzz(root, "run", target);
    command.arg(&corpus);
    let seeds = directory.join("seeds").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    command.arg("--");
    let dictionary = directory.join("dictionaries").join(format!("{target}.dict"));
    if dictionary.is_file() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    command.args([
        format!("-max_total_time={seconds}"),
        format!("-rss_limit_mb={RSS_MIB_MAX}"),
        format!("-timeout={INPUT_SECONDS_MAX}"),
        format!("-max_len={}", input_bytes_max(target)),
        // Longer inputs sooner than the fuzzer would try them: most of ours are lists of actions.
        "-len_control=20".to_owned(),
        "-print_final_stats=1".to_owned(),
    ]);
    // Threads that serve the engine live as long as the process.
    command.env("ASAN_OPTIONS", "detect_odr_violation=0:detect_leaks=0");
    let output = command.output().context("the fuzzer does not start")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(Log { text, clean: output.status.success() })
}

/// Reads libFuzzer's report.
fn figures(log: &str) -> Figures {
    let after = |line: &str, word: &str| {
        let rest = line.split(word).nth(1)?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let executions = log.lines().find_map(|line| after(line, "stat::number_of_executed_units:"));
    let mut coverage =
        log.lines().filter(|line| line.starts_with('#')).filter_map(|line| after(line, "cov:"));
    let first = coverage.next().unwrap_or(0);
    Figures { executions: executions.unwrap_or(0), coverage: (first, coverage.next_back().unwrap_or(first)) }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_target_is_built_and_every_seed_has_a_target() {
        let root = tidy::root();
        let names = targets(&root).unwrap();
        let manifest = std::fs::read_to_string(root.join("fuzz/Cargo.toml")).unwrap();
        for name in &names {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), names.len());
        for folder in ["seeds", "dictionaries"] {
            for entry in std::fs::read_dir(root.join("fuzz").join(folder)).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_stem().unwrap().to_string_lossy().into_owned();
                assert!(names.contains(&name), "{folder}/{name}");
            }
        }
    }

    #[test]
    fn reports_are_read() {
        let log = "INFO: seed corpus\n#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 40Mb\n\
                   #99\tNEW    cov: 70 ft: 80 corp: 9/99b lim: 4 exec/s: 0 rss: 41Mb L: 3/4 MS: 1 CopyPart-\n\
                   #500\tDONE   cov: 71 ft: 90 corp: 9/99b lim: 4 exec/s: 50 rss: 41Mb\n\
                   stat::number_of_executed_units: 500\nstat::average_exec_per_sec:     50\n";
        assert_eq!(figures(log), Figures { executions: 500, coverage: (12, 71) });
        assert_eq!(figures(""), Figures { executions: 0, coverage: (0, 0) });
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
    }
}
