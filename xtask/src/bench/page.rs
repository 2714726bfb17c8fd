//! A page of results below docs/benchmarks/: what was run, where, and what came out.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// Writes `docs/benchmarks/NAME.md` from `body`, with the command line, the host and what the measured `yado` says of
/// itself at its top.
pub fn write(name: &str, title: &str, body: &str, yado: Option<&Path>) -> anyhow::Result<()> {
    let directory = crate::tidy::root().join("docs/benchmarks");
    std::fs::create_dir_all(&directory)?;
    let mut page = format!("# {title}\n\n");
    let arguments: Vec<String> = std::env::args().skip(1).map(shown).collect();
    let _ = write!(page, "Made by `cargo xtask {}` on {}; do not edit.\n\n", arguments.join(" "), today());
    page.push_str(&host(yado));
    page.push('\n');
    page.push_str(body);
    let path = directory.join(name).with_extension("md");
    std::fs::write(&path, page)?;
    println!("written: {}", path.display());
    Ok(())
}

/// Paths of one machine mean nothing elsewhere: only the file's name is shown.
fn shown(argument: String) -> String {
    match Path::new(&argument).file_name() {
        Some(name) if argument.starts_with('/') => name.to_string_lossy().into_owned(),
        _ => argument,
    }
}

fn today() -> String {
    said("date", &["-u", "+%Y-%m-%d"])
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(|_| "?".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What the numbers depend on.
pub fn host(yado: Option<&Path>) -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        cpuinfo
            .lines()
            .find(|line| line.starts_with(key))
            .and_then(|line| line.split_once(':'))
            .map_or_else(|| "?".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let hypervisor =
        if field("flags").split(' ').any(|flag| flag == "hypervisor") { ", itself a guest" } else { "" };
    let qemu = said("qemu-system-x86_64", &["--version"]);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?");
    format!(
        "| | |\n|---|---|\n| CPU | {}, {cores} cores{hypervisor} |\n| host kernel | Linux {} |\n| peer | {} |\n\
         | yado | {} |\n| load when the page was written | {load} |\n",
        field("model name"),
        said("uname", &["-r"]),
        qemu.lines().next().unwrap_or("?"),
        yado.map_or_else(|| "not measured".into(), |yado| said(&yado.to_string_lossy(), &["--version"])),
    )
}
