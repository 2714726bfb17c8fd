//! What goes wrong on the way to a guest and inside it.

use crate::kernels::kernel;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use xtask::initramfs::busybox;
use xtask::story::{FIND_SECOND_NVME, Home, finish, signal};

#[test]
fn an_endless_boot_is_given_up() {
    let home = Home::new();
    let kernel = kernel(&home, "trixie");
    let initrd = home.file("initrd", &busybox("sleep 1000").unwrap().finish());
    let finished = home.yado(&[
        "run",
        "-q",
        "--boot-timeout",
        "8",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        "console=ttyS0",
        "--",
        "true",
    ]);
    assert_eq!(finished.code(), 125, "{}", finished.all());
    let last = finished.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("within 8 s") && last.contains("--boot-timeout"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn ctrl_c_while_packages_are_fetched() {
    let home = Home::fresh();
    let mut child = home.command(&["run", "debian", "--", "true"]).stderr(Stdio::piped()).spawn().unwrap();
    // The first phase is over when its line is there.
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with("yado: "), "{line}");
    signal(child.id(), "INT");
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
    let finished = finish(child, &[]);
    assert_eq!(finished.code(), 130, "{line}{rest}");
    assert!(rest.lines().last().is_some_and(|last| last.contains("cancelled")), "{line}{rest}");
    home.assert_nothing_left();
}

#[test]
fn a_full_disk_for_the_cache() {
    let home = Home::fresh();
    // A small file system of its own, seen only by this yado: user and mount namespaces need no root.
    let script = "mount -t tmpfs -o size=24m none \"$XDG_CACHE_HOME\" && { \"$0\" run -q debian -- true; code=$?; \
                  find \"$XDG_CACHE_HOME\" -path '*/partial/*'; exit $code; }";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(home.program());
    home.adopt(&mut command);
    let finished = finish(command.spawn().unwrap(), &[]);
    assert_eq!(finished.text(), "", "left half written: {}", finished.all());
    finished.assert_refused(125, "space");
    home.assert_nothing_left();
}

#[test]
fn a_full_disk_inside_the_guest_is_the_guests_affair() {
    let home = Home::new();
    let line = ["run", "-q", "debian", "--", "sh", "-c"];
    let finished = home.yado(&[&line[..], &["head -c 100G /dev/zero > /dev/shm/fill; echo $?"]].concat());
    finished.assert_success();
    assert!(finished.text().ends_with("1\n"), "{}", finished.all());
    assert!(finished.stderr.contains("No space left"), "{}", finished.all());
}

#[test]
fn a_kernel_panic_under_a_command() {
    let home = Home::new();
    let script = "sysctl -q kernel.panic=0; sleep 0.2; echo c > /proc/sysrq-trigger; sleep 60";
    let finished = home.yado(&["run", "-q", "debian", "--", "sh", "-c", script]);
    assert_eq!(finished.code(), 3, "{}", finished.all());
    assert!(finished.stderr.contains("panicked"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_full_host_disk_under_a_guest() {
    let home = Home::new();
    home.yado(&["run", "-q", "debian", "--", "true"]).assert_success();
    // A second disk whose image is sparse, on a file system smaller than it says it is.
    let inside = format!(
        "{FIND_SECOND_NVME} head -c 20M /dev/urandom > /dev/shm/kept; \
         dd if=/dev/shm/kept of=$nvme bs=1M oflag=direct && sync $nvme || exit 9; \
         dd if=/dev/zero of=$nvme bs=1M seek=20 count=200 oflag=direct; echo dd $?; \
         dd if=$nvme bs=1M count=20 iflag=direct | cmp - /dev/shm/kept && echo kept"
    );
    let script = "mkdir \"$TMPDIR/small\" && mount -t tmpfs -o size=64m none \"$TMPDIR/small\" && \
                  truncate -s 256M \"$TMPDIR/small/disk\" && \
                  \"$0\" run -q --disk \"$TMPDIR/small/disk,bus=nvme,werror=report\" debian -- sh -c \"$1\"";
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(home.program())
        .arg(inside);
    home.adopt(&mut command);
    let finished = finish(command.spawn().unwrap(), &[]);
    assert!(finished.text().contains("dd 1"), "the guest did not hear of it: {}", finished.all());
    assert!(finished.text().ends_with("kept\n"), "what was stored is lost: {}", finished.all());
    assert!(finished.stderr.contains("yado: no space is left at"), "{}", finished.all());
}

#[test]
fn a_guest_stands_still_until_its_host_has_space() {
    let home = Home::new();
    home.yado(&["run", "-q", "debian", "--", "true"]).assert_success();
    let inside = format!(
        "{FIND_SECOND_NVME} head -c 40M /dev/urandom > /dev/shm/kept; \
         dd if=/dev/shm/kept of=$nvme bs=1M oflag=direct && sync $nvme || exit 9; \
         dd if=$nvme bs=1M count=40 iflag=direct | cmp - /dev/shm/kept && echo kept; dmesg | grep -i 'i/o error'"
    );
    // Somebody makes space as soon as yado says that there is none.
    let script = "mkdir \"$TMPDIR/small\" && mount -t tmpfs -o size=64m none \"$TMPDIR/small\" && \
                  truncate -s 256M \"$TMPDIR/small/disk\" && head -c 40M /dev/zero > \"$TMPDIR/small/ballast\" || exit 9; \
                  said=\"$TMPDIR/said\"; : > \"$said\"; \
                  (until grep -q 'stands still' \"$said\"; do sleep 0.1; done; rm \"$TMPDIR/small/ballast\") & \
                  \"$0\" run -q --disk \"$TMPDIR/small/disk,bus=nvme\" debian -- sh -c \"$1\" 2> \"$said\"; \
                  kill $! 2> /dev/null; cat \"$said\" >&2";
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(home.program())
        .arg(inside);
    home.adopt(&mut command);
    let finished = finish(command.spawn().unwrap(), &[]);
    assert_eq!(
        finished.text(),
        "kept\n",
        "what was stored is lost, or the guest saw errors: {}",
        finished.all()
    );
    for said in ["no space is left at", "the guest stands still", "the guest goes on"] {
        assert!(finished.stderr.contains(said), "{said}: {}", finished.all());
    }
}

#[test]
fn a_guest_that_restarts_under_its_command() {
    let home = Home::new();
    let finished = home.yado(&["run", "-q", "debian", "--", "sh", "-c", "reboot -f -f; sleep 60"]);
    assert_eq!(finished.code(), 125, "{}", finished.all());
    assert!(finished.stderr.contains("restarted before the command had ended"), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_guest_that_powers_off_under_its_command() {
    let home = Home::new();
    let finished = home.yado(&["run", "-q", "debian", "--", "sh", "-c", "poweroff -f -f; sleep 60"]);
    assert_eq!(finished.code(), 125, "{}", finished.all());
    assert!(finished.stderr.contains("powered off before the command had ended"), "{}", finished.all());
    home.assert_nothing_left();
}
