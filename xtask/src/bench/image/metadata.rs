//! What looks at metadata alone, of large disks.

use super::files::{Files, done, timed};
use super::{Case, Pair, Wanted, seconds};
use std::path::PathBuf;
use std::process::Command;

const PEER: &str = "qemu-img";
/// Most for what a sparse disk of 1 TiB needs.
const AT_ONCE: Wanted = Wanted::AtMost(0.05);

pub const CASES: &[Case] = &[
    seconds("create a sparse 1 TiB qcow2", PEER, AT_ONCE, |files| {
        let place = |name| {
            let path = files.place(name);
            let _ = std::fs::remove_file(&path);
            path
        };
        files.pair(
            || timed(files.yado(&["create", "-q", "-f", "qcow2"]).arg(place("made")).arg("1T")),
            || {
                timed(
                    Command::new("qemu-img")
                        .args(["create", "-q", "-f", "qcow2"])
                        .arg(place("made"))
                        .arg("1T"),
                )
            },
        )
    }),
    seconds("info of a sparse 1 TiB qcow2", PEER, AT_ONCE, |files| of(files, "info", sparse(files)?)),
    seconds("check of a sparse 1 TiB qcow2", PEER, AT_ONCE, |files| of(files, "check", sparse(files)?)),
    seconds("check of 1 TiB of allocated metadata", PEER, Wanted::AtMost(0.6), |files| {
        of(files, "check", allocated(files)?)
    }),
];

fn sparse(files: &Files) -> anyhow::Result<PathBuf> {
    let path = files.place("sparse.qcow2");
    if !path.exists() {
        done(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1T"))?;
    }
    Ok(path)
}

fn allocated(files: &Files) -> anyhow::Result<PathBuf> {
    let path = files.place("allocated.qcow2");
    if !path.exists() {
        let options = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"];
        done(Command::new("qemu-img").args(options).arg(&path).arg("1T"))?;
    }
    Ok(path)
}

fn of(files: &Files, what: &str, path: PathBuf) -> anyhow::Result<Pair> {
    files.pair(
        || timed(files.yado(&[what, "-f", "qcow2"]).arg(&path)),
        || timed(Command::new("qemu-img").args([what, "-f", "qcow2"]).arg(&path)),
    )
}
