//! Debian's kernels besides the usual one: other flavours, and a kernel as the ELF file that its build makes.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xtask::initramfs::busybox;
use xtask::story::{Finished, Home};

/// One of Debian's kernels.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// Code name of the release.
    pub codename: &'static str,
    /// As `--flavour` takes it.
    pub flavour: &'static str,
    /// How its release begins and ends.
    pub release: (&'static str, &'static str),
    /// What its version says about preemption.
    pub version: &'static str,
}

impl Kernel {
    fn is(&self, release: &str) -> bool {
        let flavoured = ["-rt-amd64", "-cloud-amd64"].iter().any(|end| release.ends_with(end));
        let (begin, end) = self.release;
        release.starts_with(begin) && release.ends_with(end) && (flavoured == (end != "-amd64"))
    }
}

/// Boots the Debian guest with this kernel, whose drivers for the root disk are modules, and then the kernel alone with a root in
/// memory.
pub fn boots(kernel: Kernel) {
    let home = Home::new();
    let guest = format!("debian:{}", kernel.codename);
    let line = ["run", "-q", &guest, "--flavour", kernel.flavour, "--", "sh", "-c"];
    let whole = home.yado(
        &[&line[..], &["uname -rv; findmnt -n -o SOURCE,FSTYPE /; ls /init /modules 2>&1 | wc -l"]].concat(),
    );
    whole.assert_success();
    assert!(whole.text().contains(kernel.version), "{}", whole.all());
    assert!(kernel.is(whole.text().split(' ').next().unwrap_or_default()), "{}", whole.all());
    assert!(whole.text().ends_with("/dev/nvme0n1 ext4\n2\n"), "{}", whole.all());
    let cache = home.cache().join("yado/debian");
    let image =
        xtask::guest_files::cached_with(&cache, kernel.codename, |release| kernel.is(release)).unwrap();
    let alone = direct(&home, &image.kernel, "uname -rv");
    assert!(alone.text().contains(kernel.version), "{}", alone.all());
    println!(
        "{} {}: `-- COMMAND` in {:?}, alone in {:?}",
        kernel.codename, kernel.flavour, whole.took, alone.took
    );
    home.assert_nothing_left();
}

/// Boots a kernel with a small root that runs `script` and powers off.
fn direct(home: &Home, kernel: &Path, script: &str) -> Finished {
    let initrd = home.file("initrd", &busybox(script).unwrap().finish_gzip().unwrap());
    let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
    let finished = home.yado(&["run", "-q", "--kernel", kernel, "--initrd", initrd, "--cmdline", "quiet"]);
    finished.assert_success();
    finished
}

#[test]
fn debian_13s_real_time_kernel_boots() {
    boots(Kernel {
        codename: "trixie",
        flavour: "rt",
        release: ("6.12.", "-rt-amd64"),
        version: "PREEMPT_RT",
    });
}

/// The ELF file inside a bzImage boots by its PVH entry, as in other hypervisors.
#[test]
fn a_kernels_elf_file_boots_by_pvh() {
    let home = Home::new();
    let cache = home.cache().join("yado/debian");
    home.yado(&["run", "-q", "debian:trixie", "--", "true"]).assert_success();
    let kernel = xtask::guest_files::cached(&cache, "trixie").unwrap().kernel;
    let finished = direct(&home, &vmlinux(&home, &kernel), "cat /proc/sys/kernel/bootloader_type; uname -r");
    // 0xb0 is what the kernel's PVH entry sets for loaders other than Xen (arch/x86/platform/pvh/enlighten.c).
    let text = finished.text().replace('\r', "");
    assert!(text.contains("176\n6.12."), "{}", finished.all());
    home.assert_nothing_left();
}

/// Takes the compressed ELF file out of a bzImage (Linux `boot.rst`: `setup_sects`, `payload_offset`, `payload_length`).
fn vmlinux(home: &Home, kernel: &Path) -> PathBuf {
    let bytes = std::fs::read(kernel).unwrap();
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(bytes[0x1f1]) + 1) * 512 + number(0x248);
    // The last four bytes are the unpacked size.
    let payload = home.file("payload.zst", &bytes[start..start + number(0x24c) - 4]);
    let output = Command::new("zstd").arg("-dc").arg(payload).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success());
    home.file("vmlinux", &output.stdout)
}
