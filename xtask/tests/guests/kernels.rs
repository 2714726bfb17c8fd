//! Debian's kernels with a root of the test's own, and a bare test kernel.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use xtask::initramfs::{Initramfs, busybox};
use xtask::story::{Finished, Home, noise};

/// The cloud kernel of a release, as yado fetched and verified it for its own guests.
pub fn kernel(home: &Home, codename: &str) -> PathBuf {
    let cache = home.cache().join("yado/debian");
    if let Some(image) = xtask::guest_files::cached(&cache, codename) {
        return image.kernel;
    }
    home.yado(&["run", "-q", &format!("debian:{codename}"), "--", "true"]).assert_success();
    xtask::guest_files::cached(&cache, codename).expect("an image is in the cache after a guest ran").kernel
}

fn boot(home: &Home, kernel: &std::path::Path, tree: Initramfs, more: &[&str]) -> Finished {
    let initrd = home.file("initrd", &tree.finish_gzip().unwrap());
    let line = ["run", "-q", "--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
    let command_line = ["--cmdline", "console=ttyS0 panic=-1"];
    home.yado(&[&line[..], &command_line, more].concat())
}

fn boots(codename: &str, release: &str) {
    let home = Home::new();
    let kernel = kernel(&home, codename);
    let payload = noise(3_000_000);
    let script = "uname -r; sha256sum /payload; seq 1 20000 | sort -r | md5sum; gzip -c /payload | gunzip | sha256sum; \
                  cat /sys/devices/system/clocksource/clocksource0/current_clocksource; grep -c processor /proc/cpuinfo";
    let tree = busybox(script).unwrap().file("payload", 0o644, &payload);
    let finished = boot(&home, &kernel, tree, &[]);
    finished.assert_success();
    let console = finished.text().replace('\r', "");
    assert!(console.lines().any(|line| line.starts_with(release)), "no {release} in:\n{console}");
    // The same programs on the bare host.
    let file = home.file("payload", &payload);
    for (program, line) in [
        ("sha256sum", format!("sha256sum {}", file.display())),
        ("md5sum", "seq 1 20000 | sort -r | md5sum".into()),
    ] {
        let host = std::process::Command::new("sh").args(["-c", &line]).env("LC_ALL", "C").output().unwrap();
        let sum = String::from_utf8(host.stdout).unwrap().split(' ').next().unwrap().to_owned();
        let count = console.matches(&sum).count();
        let wanted = if program == "sha256sum" { 2 } else { 1 };
        assert_eq!(count, wanted, "{program} of the host says {sum}:\n{console}");
    }
    home.assert_nothing_left();
}

#[test]
fn debian_12s_cloud_kernel_boots() {
    boots("bookworm", "6.1.");
}

#[test]
fn debian_13s_cloud_kernel_boots() {
    boots("trixie", "6.12.");
}

/// Writes a mark to a disk and reboots; the second boot finds it.
const REBOOTS_ONCE: &str = "until [ -b /dev/nvme0n1 ]; do /bin/busybox usleep 50000; done\n\
    if [ \"$(head -c 5 /dev/nvme0n1)\" = again ]; then echo second boot; poweroff -f; fi\n\
    printf again | dd of=/dev/nvme0n1 bs=512 conv=sync,fsync; echo first boot; /bin/busybox reboot -f; \
    /bin/busybox sleep 100";

#[test]
fn a_kernel_that_reboots_boots_again_and_only_then() {
    let home = Home::new();
    let kernel = kernel(&home, "trixie");
    let disk = home.file("disk", &vec![0; 1 << 20]);
    let disk = format!("{},bus=nvme", disk.display());
    // The way to reboot: the FADT's reset register, the keyboard controller, a triple fault, PCI's reset register.
    for way in ["a", "k", "t", "p"] {
        std::fs::write(home.path().join("disk"), vec![0; 1 << 20]).unwrap();
        let line = format!("console=ttyS0 panic=-1 quiet reboot={way}");
        let initrd = home.file("initrd", &busybox(REBOOTS_ONCE).unwrap().finish_gzip().unwrap());
        let arguments =
            ["run", "-q", "--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
        let rest = ["--cmdline", &line, "--disk", &disk];
        let finished = home.yado(&[&arguments[..], &rest].concat());
        finished.assert_success();
        let (first, second) = (finished.text().find("first boot"), finished.text().find("second boot"));
        assert!(first.is_some() && first < second, "reboot={way}: {}", finished.all());
        assert!(finished.text().contains("the guest restarts: start 2"), "{}", finished.all());
    }
    home.file("disk", &vec![0; 1 << 20]);
    let finished = boot(&home, &kernel, busybox(REBOOTS_ONCE).unwrap(), &["--disk", &disk, "--no-reboot"]);
    finished.assert_success();
    assert!(finished.text().contains("first boot") && !finished.text().contains("second boot"));
    home.assert_nothing_left();
}

#[test]
fn a_guest_that_reboots_without_end_is_stopped_by_ctrl_c() {
    let home = Home::new();
    let kernel = kernel(&home, "trixie");
    let tree = busybox("/bin/busybox reboot -f; /bin/busybox sleep 100").unwrap();
    let initrd = home.file("initrd", &tree.finish_gzip().unwrap());
    let arguments = ["run", "-q", "--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()];
    let mut child = home.command(&[&arguments[..], &["--cmdline", "quiet"]].concat()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let mut lines = out.split(b'\n').map(|line| String::from_utf8_lossy(&line.unwrap()).into_owned());
    assert!(lines.any(|line| line.contains("start 3")), "it ended before its third start");
    xtask::story::signal(child.id(), "INT");
    // Somebody reads on, as a terminal does.
    let reader = std::thread::spawn(move || lines.count());
    let finished = xtask::story::finish(child, &[]);
    reader.join().unwrap();
    assert!(finished.took < std::time::Duration::from_secs(60), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_kernel_given_alone_is_heard_when_it_panics() {
    let home = Home::new();
    // No root, no console named, no word about panics.
    let kernel = kernel(&home, "trixie");
    let finished = home.yado(&["run", "--kernel", kernel.to_str().unwrap()]);
    assert_eq!(finished.code(), 3, "{}", finished.all());
    assert!(finished.stderr.contains("command line \"console=ttyS0 panic=-1\""), "{}", finished.all());
    let last = finished.stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with("yado: the guest panicked"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_panicking_kernel_leaves_with_3() {
    let home = Home::new();
    let kernel = kernel(&home, "trixie");
    let finished = boot(&home, &kernel, busybox("exit 1").unwrap(), &[]);
    assert_eq!(finished.code(), 3, "{}", finished.all());
    assert!(finished.stderr.contains("yado: the guest panicked"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_real_kernel_that_is_cut_off() {
    let home = Home::new();
    let whole = std::fs::read(kernel(&home, "trixie")).unwrap();
    // The last few KiB are the signature for Secure Boot, which nobody misses here.
    for length in [whole.len() / 2, whole.len() - 200_000, 0x300] {
        let cut = home.file("vmlinuz", &whole[..length]);
        home.yado(&["run", "-q", "--kernel", cut.to_str().unwrap()])
            .assert_refused(125, "copy or download it again");
    }
    home.assert_nothing_left();
}

#[test]
fn memory_too_small_for_the_kernel() {
    let home = Home::new();
    let kernel = kernel(&home, "trixie");
    let finished = home.yado(&["run", "-q", "--memory", "8M", "--kernel", kernel.to_str().unwrap()]);
    finished.assert_refused(125, "--memory");
    home.assert_nothing_left();
}

#[test]
fn a_bare_kernel_ends_with_its_own_code() {
    let home = Home::new();
    // Multiboot 1 with load addresses (header flag 16): header, load, end of data, end of bss, entry; then code.
    let code = [0xb0u8, 21, 0xe6, 0xf4, 0xf4]; // mov al, 21; out 0xf4, al; hlt
    let load = 0x10_0000u32;
    let flags = 1u32 << 16;
    let header = [
        0x1bad_b002u32,
        flags,
        0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags),
        load,
        load,
        load + 32 + code.len() as u32,
        0,
        load + 32,
    ];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend_from_slice(&code);
    let kernel = home.file("kernel", &image);
    let finished = home.yado(&["run", "-q", "--test-devices", "--kernel", kernel.to_str().unwrap()]);
    assert_eq!(finished.code(), 43, "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_triple_fault_leaves_with_4() {
    let home = Home::new();
    let code = [0x0f, 0x0b]; // ud2, without an interrupt table
    let load = 0x10_0000u32;
    let flags = 1u32 << 16;
    let checksum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    let header = [0x1bad_b002u32, flags, checksum, load, load, load + 34, 0, load + 32];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend_from_slice(&code);
    let kernel = home.file("kernel", &image);
    let finished = home.yado(&["run", "-q", "--kernel", kernel.to_str().unwrap()]);
    assert_eq!(finished.code(), 4, "{}", finished.all());
    assert!(finished.stderr.contains("triple fault"), "{}", finished.all());
    home.assert_nothing_left();
}
