//! Tells the program which commit it was built from: `YADO_COMMIT` if that is set, else what git says of a checkout of
//! yado itself, else nothing (a source archive).

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=YADO_COMMIT");
    let given = std::env::var("YADO_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(commit_of_checkout);
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = commit.map_or_else(|| version.clone(), |commit| format!("{version} ({commit})"));
    println!("cargo::rustc-env=YADO_VERSION={version}");
}

/// The commit, followed by `-dirty` if the sources of the program differ from it.
fn commit_of_checkout() -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    // A source archive inside somebody else's repository is not of that repository.
    let top = git(&root, &["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    let commit = git(&root, &["rev-parse", "--short=10", "HEAD"])?;
    let places = ["crates", "Cargo.toml", "Cargo.lock"];
    for place in places {
        println!("cargo::rerun-if-changed={}", root.join(place).display());
    }
    if let Some(log) = git(&root, &["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={}", root.join(log).display());
    }
    let changed =
        git(&root, &[&["status", "--porcelain", "--untracked-files=no", "--"][..], &places].concat())?;
    Some(if changed.is_empty() { commit } else { format!("{commit}-dirty") })
}

fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| said.trim().to_owned())
}
