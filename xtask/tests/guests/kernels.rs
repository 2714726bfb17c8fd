//! Debian's kernels with a root of the test's own, and a bare test kernel.

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
