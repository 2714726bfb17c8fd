//! Kernels that are neither Linux nor ours, from Debian's packages: a memory tester that boots as Linux does, and a hypervisor that
//! boots by multiboot.

use std::io::{BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use xtask::story::{Home, finish, signal};

/// A file of a Debian package for amd64, from the host's APT sources, without installing it.
fn from_package(home: &Home, package: &str, file: &str) -> PathBuf {
    let place = home.path().join(package);
    std::fs::create_dir(&place).unwrap();
    let script = "apt-get -q -o APT::Sandbox::User=root download \"$0\" >&2 && dpkg-deb -x ./*.deb .";
    let output = Command::new("sh").args(["-c", script, package]).current_dir(&place).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    place.join(file)
}

/// Boots a kernel without an end and reads its console until it has said `wanted`; Ctrl-C twice ends it.
fn says(home: &Home, kernel: &str, command_line: &str, wanted: &[&str]) {
    let line = ["run", "-q", "--memory", "256M", "--kernel", kernel, "--cmdline", command_line];
    let mut child = home.command(&line).stderr(Stdio::null()).spawn().unwrap();
    let mut console = BufReader::new(child.stdout.take().unwrap());
    let (mut text, mut bytes) = (String::new(), [0; 4096]);
    let began = Instant::now();
    while !wanted.iter().all(|wanted| text.contains(wanted)) {
        let count = console.read(&mut bytes).unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        assert!(
            count > 0 && began.elapsed() < Duration::from_secs(120),
            "{wanted:?} are not all in:\n{text}"
        );
    }
    for _ in 0..2 {
        signal(child.id(), "INT");
        std::thread::sleep(Duration::from_millis(300));
    }
    drop(console);
    finish(child, &[]);
    home.assert_nothing_left();
}

#[test]
fn memtest86_tests_the_guests_memory() {
    let home = Home::new();
    let kernel = from_package(&home, "memtest86+", "boot/memtest86+x64.bin");
    says(&home, kernel.to_str().unwrap(), "console=ttyS0,115200", &["Memtest86+ v", "256MB", "Testing"]);
}

/// Without a guest of its own Xen can only look around and say what it misses.
#[test]
fn xen_boots_by_multiboot() {
    let home = Home::new();
    let search = Command::new("apt-cache").args(["pkgnames", "xen-hypervisor-4"]).output().unwrap();
    let names = String::from_utf8(search.stdout).unwrap();
    let package = names.lines().find(|name| name.ends_with("-amd64")).expect("Debian has Xen");
    let version = package.trim_start_matches("xen-hypervisor-");
    let packed = from_package(&home, package, &format!("boot/xen-{version}.gz"));
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(packed).unwrap()).read_to_end(&mut image).unwrap();
    let kernel = home.file("xen", &image);
    let command_line = "console=com1 com1=115200,8n1,0x3f8,4 noreboot";
    says(&home, kernel.to_str().unwrap(), command_line, &["Xen version 4", "dom0 kernel not specified"]);
}
