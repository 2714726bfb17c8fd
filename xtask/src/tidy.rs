//! The laws of the house that a machine can check: which crate may use which, names, sizes, and what must not be
//! committed. `cargo xtask tidy` prints all breaches; a test fails on the first.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What each crate may use of the others. Arrows point down only: a crate is listed after all it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("memory", &[]),
    ("cpu", &["memory"]),
    ("engine-soft", &["cpu", "memory"]),
    ("engine-kvm", &["cpu", "memory"]),
    ("device", &["memory"]),
    ("chipset", &["device", "memory"]),
    ("image", &[]),
    ("nvme", &["chipset", "device", "memory"]),
    ("net", &[]),
    ("virtio", &["chipset", "device", "memory", "net"]),
    ("guest", &[]),
    ("ext4", &[]),
    ("debian", &["ext4"]),
    ("sandbox", &[]),
    ("resources", &[]),
    (
        "machine",
        &[
            "chipset",
            "cpu",
            "device",
            "engine-kvm",
            "engine-soft",
            "guest",
            "image",
            "memory",
            "net",
            "nvme",
            "resources",
            "sandbox",
            "virtio",
        ],
    ),
    (
        "yado",
        &[
            "cpu",
            "debian",
            "engine-kvm",
            "engine-soft",
            "guest",
            "image",
            "machine",
            "memory",
            "net",
            "resources",
            "sandbox",
        ],
    ),
    ("xtask", &[]),
];

const LINES_MAX: usize = 800;
const COLUMNS_MAX: usize = 140;
/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "base", "helper", "helpers", "manager", "misc"];

/// One broken law: where, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach(pub String);

/// The root of the workspace.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Checks the tree at `root`.
pub fn check(root: &Path) -> anyhow::Result<Vec<Breach>> {
    let mut breaches = Vec::new();
    let files = tracked(root)?;
    dependency_law(root, &mut breaches)?;
    for file in &files {
        names(file, &mut breaches);
        let Ok(text) = fs::read_to_string(root.join(file)) else { continue };
        secrets(file, &text, &mut breaches);
        if file.ends_with(".rs") {
            sizes(file, &text, &mut breaches);
            debts(file, &text, &mut breaches);
        }
    }
    unsafe_law(root, &files, &mut breaches);
    Ok(breaches)
}

/// Files that are, or are about to be, under version control; all files where there is no git.
fn tracked(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()?;
    anyhow::ensure!(
        output.status.success(),
        "git ls-files failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

fn dependency_law(root: &Path, breaches: &mut Vec<Breach>) -> anyhow::Result<()> {
    let law: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut seen = Vec::new();
    for (name, allowed) in MAY_USE {
        for used in *allowed {
            if !seen.contains(used) {
                breaches
                    .push(Breach(format!("the law itself: {name} may use {used}, which is not below it")));
            }
        }
        seen.push(name);
    }
    let mut rooms: Vec<PathBuf> =
        fs::read_dir(root.join("crates"))?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    rooms.push(root.join("xtask"));
    for room in rooms {
        let name = room.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let Ok(manifest) = fs::read_to_string(room.join("Cargo.toml")) else { continue };
        let Some(allowed) = law.get(name.as_str()) else {
            breaches.push(Breach(format!(
                "crates/{name}: a room the dependency law does not know; add it to MAY_USE"
            )));
            continue;
        };
        for used in dependencies(&manifest) {
            if law.contains_key(used.as_str()) && !allowed.contains(&used.as_str()) {
                breaches.push(Breach(format!("crates/{name} uses {used}: the dependency law forbids it")));
            }
        }
    }
    Ok(())
}

/// The names in `[dependencies]` (development dependencies may point anywhere).
fn dependencies(manifest: &str) -> Vec<String> {
    let mut inside = false;
    let mut names = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == "[dependencies]" || line == "[build-dependencies]";
        } else if inside && let Some((key, _)) = line.split_once('=') {
            names.push(key.trim().split('.').next().unwrap_or_default().to_owned());
        }
    }
    names
}

fn names(file: &str, breaches: &mut Vec<Breach>) {
    for part in Path::new(file).iter().filter_map(|p| p.to_str()) {
        let stem = part.split('.').next().unwrap_or_default();
        if EMPTY_NAMES.contains(&stem) {
            breaches.push(Breach(format!("{file}: {stem:?} says nothing about what is inside")));
        }
    }
}

fn sizes(file: &str, text: &str, breaches: &mut Vec<Breach>) {
    let lines = text.lines().count();
    if lines > LINES_MAX {
        breaches.push(Breach(format!("{file}: {lines} lines, more than {LINES_MAX}: split it by concept")));
    }
    for (number, line) in text.lines().enumerate() {
        // Tables and string literals have no better place to break.
        let whole = line.contains('"') || line.trim_start().starts_with("//! |");
        if line.chars().count() > COLUMNS_MAX && !whole {
            breaches.push(Breach(format!("{file}:{}: wider than {COLUMNS_MAX} columns", number + 1)));
        }
    }
}

/// Words that mark unfinished work, spelled here so that this file does not find itself.
fn debts(file: &str, text: &str, breaches: &mut Vec<Breach>) {
    let words = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["XX", "X:"],
        ["todo", "!("],
        ["unimplemented", "!("],
        ["#[ign", "ore"],
    ];
    for (number, line) in text.lines().enumerate() {
        for word in words.iter().map(|word| word.concat()) {
            if line.contains(&word) {
                breaches.push(Breach(format!("{file}:{}: {word} marks unfinished work", number + 1)));
            }
        }
    }
}

/// Host names of package sources and paths of somebody's machine do not belong in a repository.
fn secrets(file: &str, text: &str, breaches: &mut Vec<Breach>) {
    if file.ends_with("Cargo.lock") {
        return;
    }
    let words = [
        ["deb.debian", ".org"],
        ["security.debian", ".org"],
        ["ftp.debian", ".org"],
        ["snapshot.debian", ".org"],
        ["crates", ".io"],
        ["npmjs", ".org"],
        ["pypi", ".org"],
        ["/wo", "rk/"],
        ["/ro", "ot/"],
    ];
    for (number, line) in text.lines().enumerate() {
        for word in words.iter().map(|word| word.concat()) {
            if line.contains(&word) {
                breaches.push(Breach(format!(
                    "{file}:{}: {word} is a place of one machine or network",
                    number + 1
                )));
            }
        }
    }
}

/// A crate either forbids unsafe code or names the modules that have it, each with a reason at its top.
fn unsafe_law(root: &Path, files: &[String], breaches: &mut Vec<Breach>) {
    let sources =
        files.iter().filter(|f| f.starts_with("crates/") && f.ends_with(".rs") && f.contains("/src/"));
    for file in sources {
        let Ok(text) = fs::read_to_string(root.join(file)) else { continue };
        let crate_root = file.ends_with("/src/lib.rs") || file.ends_with("/src/main.rs");
        if crate_root && !text.contains("#![forbid(unsafe_code)]") && !text.contains("#![deny(unsafe_code)]")
        {
            breaches.push(Breach(format!("{file}: neither forbids nor denies unsafe code")));
        }
        if text.contains("#![allow(unsafe_code)]") && !text.starts_with("//!") {
            breaches.push(Breach(format!("{file}: has unsafe code but no reason at its top")));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn manifests_are_read() {
        let manifest = "[package]\nname = \"x\"\n[dependencies]\ncpu.workspace = true\nmemory = { path = \"..\" }\n\
                        [dev-dependencies]\nmachine.workspace = true\n";
        assert_eq!(dependencies(manifest), ["cpu", "memory"]);
    }

    #[test]
    fn unfinished_work_and_private_places_are_found() {
        let mut breaches = Vec::new();
        debts("a.rs", &format!("// {}{} later", "TO", "DO"), &mut breaches);
        secrets("a.rs", &format!("http://{}{}/debian", "deb.debian", ".org"), &mut breaches);
        names("crates/x/src/util.rs", &mut breaches);
        sizes("a.rs", &"\n".repeat(LINES_MAX + 1), &mut breaches);
        assert_eq!(breaches.len(), 4);
    }
}
