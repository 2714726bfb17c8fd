//! Guests on disks of all formats that are written: what a guest wrote is there, the file system on it is sound, and other
//! people's programs agree.

use std::path::Path;
use std::process::Command;
use xtask::story::Home;

/// Runs a program of the host in a directory and answers what it printed; fails if it does.
fn host(directory: &Path, command: &str) -> String {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a program");
    let output = Command::new(program).args(words).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask setup` installs it"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command}: {text}");
    text
}

/// Writes 8 MB of programs twice, throws one away and gives its space back, and says what is on each disk then. Its order is
/// not the same in all guests: the label says which disk is which.
const WRITE: &str = "set -e; for label in one two three; do mount LABEL=$label /mnt; \
                     cat /usr/bin/* | head -c 8000000 > /mnt/kept; cp /mnt/kept /mnt/gone; sync; rm /mnt/gone; \
                     fstrim /mnt; umount /mnt; head -c 64M $(blkid -L $label) | sha256sum; done";
const READ: &str = "for label in one two three; do head -c 64M $(blkid -L $label) | sha256sum; done";

#[test]
fn guests_write_to_disks_of_all_formats() {
    let home = Home::new();
    let place = home.path();
    let path = |name: &str| place.join(name).to_str().expect("a name").to_owned();
    let disks = [
        ("one", "qcow2", "qcow2", "nvme"),
        ("two", "qed", "qed", "virtio"),
        ("three", "vhd", "vpc", "virtio"),
    ];
    for (label, format, _, _) in disks {
        host(place, &format!("mke2fs -q -t ext4 -L {label} fs-{label}.raw 64M"));
        let (raw, image) = (path(&format!("fs-{label}.raw")), path(label));
        home.yado(&["image", "convert", "-q", "-f", "raw", "-O", format, &raw, &image]).assert_success();
    }
    // qcow2 is written over another image.
    std::fs::rename(path("one"), path("base")).expect("it was made");
    home.yado(&["image", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &path("one")])
        .assert_success();
    // Nobody believes a header unasked.
    home.yado(&["run", "-q", "debian", "--disk", &path("two"), "--", "true"]).assert_refused(2, "format=qed");
    let run = |more: &str, script: &str| {
        let options: Vec<String> = disks
            .iter()
            .map(|(label, format, _, bus)| format!("{},format={format},bus={bus}{more}", path(label)))
            .collect();
        let mut arguments = vec!["run", "-q", "debian"];
        options.iter().for_each(|disk| arguments.extend(["--disk", disk.as_str()]));
        arguments.extend(["--", "sh", "-c", script]);
        let finished = home.yado(&arguments);
        finished.assert_success();
        finished.text()
    };
    let wrote = run("", WRITE);
    assert_eq!(wrote.lines().count(), 3, "{wrote}");
    for ((label, format, theirs, _), sum) in disks.iter().zip(wrote.lines()) {
        if *format != "vhd" {
            host(place, &format!("qemu-img check -f {theirs} {label}"));
        }
        // Where the guest gave space back there is none taken.
        let taken: u64 = host(place, &format!("du -k {label}"))
            .split_whitespace()
            .next()
            .unwrap_or("")
            .parse()
            .expect("KiB");
        assert!(taken < 20 << 10, "{label} takes {taken} KiB");
        let raw = path("disk.raw");
        home.yado(&["image", "convert", "-q", "-f", format, "-O", "raw", &path(label), &raw])
            .assert_success();
        host(place, &format!("qemu-img compare -f {theirs} -F raw {label} disk.raw"));
        host(place, "e2fsck -f -n disk.raw");
        assert!(host(place, "sha256sum disk.raw").starts_with(sum.split_whitespace().next().expect("a sum")));
    }
    assert_eq!(run(",readonly", READ), wrote);
    home.assert_nothing_left();
}
