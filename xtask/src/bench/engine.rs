//! `cargo xtask bench engine`: how soon guests run, and what exits, kicks and interrupts cost, on each engine in turn.

mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;

/// Options of `bench engine`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Measure this binary instead of building one
    #[arg(long)]
    yado: Option<PathBuf>,
    /// Write docs/benchmarks/engine.md
    #[arg(long)]
    write: bool,
}

/// Name of a measurement to its line: median and the ends of the middle half, in nanoseconds.
type Told = BTreeMap<String, [f64; 3]>;

/// Measures and prints tables, and writes the page if asked.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let yado = super::release_yado(options.yado.as_deref())?;
    super::build(&["build", "--quiet", "--release", "--package", "machine", "--example", "latency"])?;
    let program = crate::target_directory().join("release/examples/latency");
    let mut engines = vec!["soft"];
    if std::path::Path::new("/dev/kvm").exists() {
        engines.push("kvm");
    }
    let (mut columns, mut starts) = (Vec::new(), Vec::new());
    for &engine in &engines {
        let output = Command::new(&program).arg(engine).output()?;
        anyhow::ensure!(output.status.success(), "{engine}: {}", String::from_utf8_lossy(&output.stderr));
        columns.push(parse(&String::from_utf8(output.stdout)?));
        starts.push((engine, start::measure(&yado, engine)?));
    }
    let body = format!("{}\n{}", start::table(&starts), costs(&engines, &columns));
    println!("{body}");
    if options.write {
        super::page::write("engine", "What the engines cost", &body, Some(&yado))?;
    }
    Ok(())
}

/// Nanoseconds of exits, kicks and interrupts, a column for each engine.
fn costs(engines: &[&str], columns: &[Told]) -> String {
    let mut text = format!("| nanoseconds, median (middle half) | {} |\n", engines.join(" | "));
    let _ = writeln!(text, "|---|{}", "---|".repeat(engines.len()));
    for name in columns.iter().flat_map(BTreeMap::keys).collect::<BTreeSet<_>>() {
        let cell = |column: &Told| {
            let show = |[median, low, high]: &[f64; 3]| format!("{median:.0} ({low:.0} to {high:.0})");
            column.get(name).map_or_else(String::new, show)
        };
        let cells: Vec<_> = columns.iter().map(cell).collect();
        let _ = writeln!(text, "| {name} | {} |", cells.join(" | "));
    }
    text
}
fn parse(text: &str) -> Told {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?.to_owned();
            let mut number = || words.next()?.parse().ok();
            Some((name, [number()?, number()?, number()?]))
        })
        .collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn lines_become_a_table() {
        let told = parse("port_write 255 252 260\nnonsense\nkick 10 1 99\n");
        assert_eq!(told["port_write"], [255.0, 252.0, 260.0]);
        assert_eq!(told.len(), 2);
    }
}
