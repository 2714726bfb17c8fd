//! Whole images: `yado image convert` and `compare` beside qemu-img's.

use super::files::{Files, done, timed};
use super::{Case, Pair, Wanted, seconds};
use crate::setup;
use std::path::{Path, PathBuf};
use std::process::Command;

const PEER: &str = "qemu-img convert";
const ZSTD: &[&str] = &["-c", "-o", "compression_type=zstd"];
const ZLIB: &[&str] = &["-c"];
/// Longest time of a copy that shares blocks.
const SHARED: Wanted = Wanted::AtMost(0.04);
/// MiB of images that are copied by sharing their blocks.
const SHARED_SIZE: u64 = 2048;

pub const CASES: &[Case] = &[
    seconds("convert raw to raw", PEER, Wanted::Times(1.0), |files| {
        convert(files, &files.mixed_raw()?, "raw", "raw", &[], &[])
    }),
    seconds("convert raw to qcow2", PEER, Wanted::Times(1.0), |files| {
        convert(files, &files.mixed_raw()?, "raw", "qcow2", &[], &[])
    }),
    seconds("convert qcow2 to raw", PEER, Wanted::Times(1.0), |files| {
        convert(files, &files.mixed("mixed.qcow2", &[])?, "qcow2", "raw", &[], &[])
    }),
    seconds("convert to qcow2 with zstd", "qemu-img convert -W -m 16", Wanted::Times(2.0), |files| {
        convert(files, &files.mixed_raw()?, "raw", "qcow2", ZSTD, &["-W", "-m", "16"])
    }),
    seconds("convert to qcow2 with zlib", "qemu-img convert -W -m 16", Wanted::Times(3.0), |files| {
        convert(files, &files.mixed_raw()?, "raw", "qcow2", ZLIB, &["-W", "-m", "16"])
    }),
    seconds("convert zstd to raw", PEER, Wanted::Times(1.4), |files| {
        convert(files, &files.mixed("zstd.qcow2", ZSTD)?, "qcow2", "raw", &[], &[])
    }),
    seconds("convert zlib to raw", PEER, Wanted::Times(1.4), |files| {
        convert(files, &files.mixed("zlib.qcow2", ZLIB)?, "qcow2", "raw", &[], &[])
    }),
    seconds("compare raw and qcow2", "qemu-img compare", Wanted::Times(1.5), compare),
    seconds("raw to raw, 2 GiB, XFS", "qemu-img convert -C", SHARED, |files| shared(files, "raw", "raw")),
    seconds("raw to qcow2, 2 GiB, XFS", "qemu-img convert -C", SHARED, |files| shared(files, "raw", "qcow2")),
    seconds("qcow2 to raw, 2 GiB, XFS", "qemu-img convert -C", SHARED, |files| shared(files, "qcow2", "raw")),
];

fn convert(
    files: &Files,
    source: &Path,
    from: &str,
    to: &str,
    both: &[&str],
    qemu: &[&str],
) -> anyhow::Result<Pair> {
    let target = files.place("copy");
    let length = |target: &Path| std::fs::metadata(target).map_or(0, |file| file.len());
    let (mut ours, mut theirs) = (0, 0);
    let fresh = || {
        let _ = std::fs::remove_file(&target);
    };
    let pair = files.pair(
        || {
            fresh();
            let mut command = files.yado(&["convert", "-q", "-f", from, "-O", to]);
            let took = timed(command.args(both).arg(source).arg(&target));
            ours = length(&target);
            took
        },
        || {
            fresh();
            let mut command = Command::new("qemu-img");
            command.args(["convert", "-f", from, "-O", to]).args(both).args(qemu);
            let took = timed(command.arg(source).arg(&target));
            theirs = length(&target);
            took
        },
    );
    fresh();
    let mut pair = pair?;
    if !both.is_empty() && theirs > 0 {
        pair.note = format!("size {:.3} of qemu-img's", ours as f64 / theirs as f64);
    }
    Ok(pair)
}

fn compare(files: &Files) -> anyhow::Result<Pair> {
    let (raw, qcow2) = (files.mixed_raw()?, files.mixed("mixed.qcow2", &[])?);
    let formats = ["compare", "-f", "raw", "-F", "qcow2"];
    files.pair(
        || timed(files.yado(&formats).arg("-q").arg(&raw).arg(&qcow2)),
        || timed(Command::new("qemu-img").args(formats).arg(&raw).arg(&qcow2)),
    )
}

/// An XFS in a file, for as long as it lives.
struct Mount(PathBuf);

impl Mount {
    fn new(files: &Files) -> anyhow::Result<Self> {
        let (file, place) = (files.place("xfs"), files.place("xfs.mount"));
        let _ = std::fs::remove_file(&file);
        std::fs::File::create(&file)?.set_len(8 << 30)?;
        done(Command::new("mkfs.xfs").arg("-q").arg(&file))?;
        std::fs::create_dir_all(&place)?;
        done(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&place))?;
        Ok(Self(place))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Copies where the file system shares blocks. The image is made, and on the file system's disk, before.
fn shared(files: &Files, from: &str, to: &str) -> anyhow::Result<Pair> {
    let is_root = done(Command::new("test").args(["-w", "/dev/loop-control"])).is_ok();
    anyhow::ensure!(
        is_root && setup::find("mkfs.xfs").is_some(),
        "an XFS is wanted: run as root, with mkfs.xfs (`cargo xtask setup --bench`)"
    );
    let mount = Mount::new(files)?;
    let (source, target) = (mount.0.join("source"), mount.0.join("target"));
    let size = (SHARED_SIZE << 20).to_string();
    let raw = mount.0.join("raw");
    done(Command::new("cp").arg(files.mixed_raw()?).arg(&raw))?;
    done(Command::new("qemu-img").args(["resize", "-q", "-f", "raw"]).arg(&raw).arg(&size))?;
    let mut first = Command::new("qemu-img");
    done(first.args(["convert", "-f", "raw", "-O", from]).arg(&raw).arg(&source))?;
    done(&mut Command::new("sync"))?;
    let fresh = || {
        let _ = std::fs::remove_file(&target);
    };
    files.pair(
        || {
            fresh();
            timed(files.yado(&["convert", "-q", "-f", from, "-O", to]).arg(&source).arg(&target))
        },
        || {
            fresh();
            let mut command = Command::new("qemu-img");
            timed(command.args(["convert", "-C", "-f", from, "-O", to]).arg(&source).arg(&target))
        },
    )
}
