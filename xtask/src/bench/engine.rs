//! `cargo xtask bench engine`: what exits, kicks and interrupts cost, on each engine in turn.

use std::collections::BTreeMap;
use std::process::Command;

/// Name of a measurement to its line: median and the ends of the middle half, in nanoseconds.
type Told = BTreeMap<String, [f64; 3]>;

/// Measures and prints a table.
pub fn run() -> anyhow::Result<()> {
    super::build(&["build", "--quiet", "--release", "--package", "machine", "--example", "latency"])?;
    let program = crate::target_directory().join("release/examples/latency");
    let mut engines = vec!["soft"];
    if std::path::Path::new("/dev/kvm").exists() {
        engines.push("kvm");
    }
    let mut columns = Vec::new();
    for engine in &engines {
        let output = Command::new(&program).arg(engine).output()?;
        anyhow::ensure!(output.status.success(), "{engine}: {}", String::from_utf8_lossy(&output.stderr));
        columns.push(parse(&String::from_utf8(output.stdout)?));
    }
    println!("nanoseconds, median (middle half)");
    print!("{:12}", "");
    engines.iter().for_each(|engine| print!(" {engine:>28}"));
    println!();
    for name in columns.iter().flat_map(BTreeMap::keys).collect::<std::collections::BTreeSet<_>>() {
        print!("{name:12}");
        for column in &columns {
            let cell = column.get(name).map_or_else(String::new, |[median, low, high]| {
                format!("{median:.0} ({low:.0} to {high:.0})")
            });
            print!(" {cell:>28}");
        }
        println!();
    }
    Ok(())
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
