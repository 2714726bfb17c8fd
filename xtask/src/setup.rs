//! The programs of other people that tests and benchmarks compare with. yado itself needs none of them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Program, and the Debian package that has it.
const PROGRAMS: &[(&str, &str)] = &[
    ("busybox", "busybox-static"),
    ("debugfs", "e2fsprogs"),
    ("fio", "fio"),
    ("gpgv", "gpgv"),
    ("iasl", "acpica-tools"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("nbdsh", "python3-libnbd"),
    ("openssl", "openssl"),
    ("qemu-img", "qemu-utils"),
    ("vhdiinfo", "libvhdi-utils"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("zstd", "zstd"),
];

/// The same for benchmarks alone: `cargo xtask test` does without them.
const BENCH_PROGRAMS: &[(&str, &str)] = &[
    ("dpdk-testpmd", "dpdk-dev"),
    ("dpdk-testpmd", "librte-meta-net"),
    ("iperf3", "iperf3"),
    ("mkfs.xfs", "xfsprogs"),
    ("ovs-vsctl", "openvswitch-switch"),
    (OVS_DPDK, "openvswitch-switch-dpdk"),
    ("slirp4netns", "slirp4netns"),
];

/// Open vSwitch with DPDK, which is in nobody's search path.
pub const OVS_DPDK: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// What only benchmarks compare with, too: DPDK, Open vSwitch and others
    #[arg(long)]
    bench: bool,
}

/// Where a program is; the directories of administrators' programs are looked into too.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.starts_with('/') {
        return Some(PathBuf::from(program)).filter(|file| file.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(program)).find(|file| file.is_file())
}

/// The busybox that can be a guest's only program: the one that is linked statically.
pub fn static_busybox() -> Option<PathBuf> {
    find("busybox").filter(|path| std::fs::read(path).is_ok_and(|bytes| !has_interpreter(&bytes)))
}

/// Whether an ELF program wants a dynamic linker: one of its program headers is PT_INTERP.
fn has_interpreter(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let headers = || Some((number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?));
    let Some((table, size, count)) = headers() else { return false };
    (0..count).any(|index| number(table.wrapping_add(index * size), 4) == Some(PT_INTERP as usize))
}

/// Packages whose programs are not here, each once.
pub fn missing(options: &Options) -> Vec<&'static str> {
    let lacks = |program: &str| match program {
        "busybox" => static_busybox().is_none(),
        _ => find(program).is_none(),
    };
    let more = if options.bench { BENCH_PROGRAMS } else { &[] };
    let wanted = PROGRAMS.iter().chain(more);
    let mut packages: Vec<_> =
        wanted.filter(|(program, _)| lacks(program)).map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Installs what is missing, with apt-get as root or through sudo.
pub fn install_missing(options: &Options) -> anyhow::Result<()> {
    let packages = missing(options);
    if packages.is_empty() {
        println!("setup: all programs that tests compare with are here");
        return Ok(());
    }
    println!("setup: missing: {}", packages.join(" "));
    let by_hand = format!("install them by hand: apt-get install {}", packages.join(" "));
    anyhow::ensure!(find("apt-get").is_some(), "no apt-get here; {by_hand}");
    apt(&["update", "-q"], &by_hand)?;
    apt(&[&["install", "-q", "-y", "--no-install-recommends"], packages.as_slice()].concat(), &by_hand)
}

fn apt(arguments: &[&str], by_hand: &str) -> anyhow::Result<()> {
    let mut line: Vec<&str> = Vec::new();
    if !is_root() {
        anyhow::ensure!(find("sudo").is_some(), "neither root nor sudo; {by_hand}");
        line.extend(["sudo", "-n", "--preserve-env=DEBIAN_FRONTEND"]);
    }
    line.extend(["apt-get", "-o", "DPkg::Lock::Timeout=300"]);
    line.extend(arguments);
    println!("setup: {}", line.join(" "));
    let (program, rest) = line.split_first().ok_or_else(|| anyhow::anyhow!("nothing to run"))?;
    let status = Command::new(program)
        .args(rest)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .status()?;
    anyhow::ensure!(status.success(), "{} failed ({status}); {by_hand}", line.join(" "));
    Ok(())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(Path::new("/proc/self")).is_ok_and(|own| own.uid() == 0)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn programs_are_found_on_the_path() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
        assert!(find("/bin/sh").is_some() && find("/no/such/program").is_none());
    }

    #[test]
    fn programs_with_a_dynamic_linker_are_told_apart() {
        // The test's own program is linked dynamically.
        assert!(has_interpreter(&std::fs::read("/proc/self/exe").unwrap()));
        assert!(!has_interpreter(b"\x7fELF"));
    }
}
