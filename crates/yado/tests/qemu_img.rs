//! yado by the name of qemu-img, beside qemu-img itself: the same lines for both, each in a directory of its own with the same
//! files; both print the same, leave with the same code, and leave the same disks behind.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

struct Pair(tempfile::TempDir);

const OURS: &str = "ours";
const THEIRS: &str = "theirs";

impl Pair {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        for side in [OURS, THEIRS] {
            std::fs::create_dir(place.path(side)).unwrap();
        }
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_yado"), place.path("qemu-img")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, side: &str, line: &str) -> Output {
        let link = self.path("qemu-img");
        let program = if side == OURS { link.to_str().unwrap() } else { "qemu-img" };
        let mut command = Command::new(program);
        // `''` is an empty word.
        command.args(line.split_whitespace().map(|word| word.trim_matches('\'')));
        let output = command.current_dir(self.path(side)).output();
        output.unwrap_or_else(|error| panic!("{program}, which `cargo xtask setup` installs: {error}"))
    }

    /// Runs qemu-img or qemu-io of the host on both sides, so that their files are the same.
    fn prepare(&self, program: &str, arguments: &[&str]) {
        for side in [THEIRS, OURS] {
            let output = Command::new(program).args(arguments).current_dir(self.path(side)).output().unwrap();
            assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        }
    }

    /// The same line on both sides: what is printed, and the code, are the same.
    fn same(&self, line: &str) {
        let (ours, theirs) = (self.run(OURS, line), self.run(THEIRS, line));
        let text = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
        let err = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(
            ours.status.code(),
            theirs.status.code(),
            "qemu-img {line}: {}{}",
            err(&ours),
            err(&theirs)
        );
        assert!(err(&theirs).is_empty() || !err(&ours).is_empty(), "qemu-img {line} says why");
        match (serde_json::from_str::<Value>(&text(&ours)), serde_json::from_str::<Value>(&text(&theirs))) {
            (Ok(ours), Ok(theirs)) => assert_eq!(plain(ours), plain(theirs), "qemu-img {line}"),
            _ => assert_eq!(without_times(&text(&ours)), without_times(&text(&theirs)), "qemu-img {line}"),
        }
    }

    /// What qemu-img says of a file on both sides is the same, and so is the content.
    fn same_image(&self, name: &str, format: &str) {
        let info = |side: &str| {
            let file = format!("{side}/{name}");
            let output = Command::new("qemu-img")
                .args(["info", "-f", format, "--output=json", &file])
                .current_dir(self.0.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            let mut report = plain(serde_json::from_slice(&output.stdout).unwrap());
            for field in ["filename", "full-backing-filename"] {
                report.as_object_mut().unwrap().remove(field);
            }
            report
        };
        assert_eq!(info(OURS), info(THEIRS), "{name}");
        let (ours, theirs) = (format!("{OURS}/{name}"), format!("{THEIRS}/{name}"));
        let compared = Command::new("qemu-img")
            .args(["compare", "-f", format, "-F", format, &ours, &theirs])
            .current_dir(self.0.path())
            .output()
            .unwrap();
        assert!(compared.status.success(), "{name}: {compared:?}");
        if ["qcow2", "qed"].contains(&format) {
            let args = ["check", "-f", format, &ours];
            let checked = Command::new("qemu-img").args(args).current_dir(self.0.path()).output().unwrap();
            assert!(checked.status.success(), "{name}: {checked:?}");
        }
    }
}

/// A report without what is each file's own: its room on the host, and when snapshots were made.
fn plain(mut report: Value) -> Value {
    match &mut report {
        Value::Object(fields) => {
            for own in ["actual-size", "date-sec", "date-nsec", "icount", "image-end-offset"] {
                fields.remove(own);
            }
            fields.values_mut().for_each(|value| *value = plain(value.take()));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| *value = plain(value.take())),
        _ => {}
    }
    report
}

/// Lines without moments, and without how long something took.
fn without_times(text: &str) -> String {
    let line = |line: &str| {
        let words = line.split(' ').map(|word| {
            let moment = word.len() >= 8
                && word.chars().all(|letter| letter.is_ascii_digit() || "-:".contains(letter));
            if moment { "" } else { word }
        });
        let words: Vec<&str> = words.collect();
        // Icounts, which only qemu-img writes, and percents on the way.
        let kept = words.join(" ").trim_end_matches([' ', '0']).to_owned();
        match kept.starts_with("Run completed in") || kept.starts_with("disk size") {
            true => String::new(),
            false => kept.rsplit('\r').find(|part| !part.is_empty()).unwrap_or_default().to_owned(),
        }
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_looks_at_images_says_the_same() {
    let pair = Pair::new();
    pair.prepare("qemu-img", &["create", "-q", "-f", "raw", "r.raw", "3M"]);
    pair.prepare("qemu-io", &["-f", "raw", "-c", "write -P 1 512k 64k", "r.raw"]);
    pair.prepare("qemu-img", &["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    pair.prepare("qemu-io", &["-f", "qcow2", "-c", "write -P 3 1M 128k", "-c", "write -z 3M 1M", "a.qcow2"]);
    pair.prepare(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "c.qcow2", "12M"],
    );
    pair.prepare("qemu-io", &["-f", "qcow2", "-c", "write -P 4 2M 64k", "c.qcow2"]);
    pair.prepare("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "r.raw", "-F", "raw", "s.qcow2", "5M"]);
    pair.prepare("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2.qcow2", "1M"]);
    let shape = "cluster_size=4k,refcount_bits=8,lazy_refcounts=on,compression_type=zstd";
    pair.prepare("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, "odd.qcow2", "12345678"]);
    pair.prepare("qemu-img", &["create", "-q", "-f", "qed", "-b", "r.raw", "-F", "raw", "q.qed"]);
    pair.prepare("qemu-io", &["-f", "qed", "-c", "write 0 128k", "q.qed"]);
    pair.prepare("qemu-img", &["create", "-q", "-f", "vpc", "v.vhd", "10M"]);
    pair.prepare("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "r.raw", "z.qcow2"]);
    pair.prepare("qemu-img", &["snapshot", "-c", "one", "v2.qcow2"]);
    pair.prepare("qemu-img", &["bitmap", "--add", "a.qcow2", "b0"]);
    pair.prepare("qemu-img", &["bitmap", "--add", "--disable", "-g", "1M", "a.qcow2", "b1"]);
    for file in
        ["r.raw", "a.qcow2", "c.qcow2", "s.qcow2", "v2.qcow2", "odd.qcow2", "q.qed", "v.vhd", "z.qcow2"]
    {
        for line in [
            "info",
            "info --output=json",
            "info -U",
            "map",
            "map --output=json",
            "measure -O raw",
            "measure -O qcow2",
            "measure --output=json -O qcow2 -o cluster_size=4k",
            "snapshot -l",
        ] {
            pair.same(&format!("{line} {file}"));
        }
        if file != "q.qed" {
            // qemu-img's own words of that one differ with its age.
            pair.same(&format!("check {file}"));
            pair.same(&format!("check --output=json {file}"));
        }
        pair.same(&format!("compare {file} a.qcow2"));
        pair.same(&format!("compare -s -q {file} r.raw"));
    }
    for line in [
        "info --backing-chain c.qcow2",
        "info --backing-chain --output=json c.qcow2",
        "info -f qcow2 r.raw",
        "info -f raw a.qcow2",
        "info --image-opts driver=qcow2,file.filename=a.qcow2",
        "info nosuch",
        "info",
        "info a.qcow2 c.qcow2",
        "info --output=xml a.qcow2",
        "info -f foo a.qcow2",
        "check nosuch",
        "check -f foo a.qcow2",
        "check -r foo a.qcow2",
        "check -q a.qcow2",
        "map nosuch",
        "map -s 1M -l 1M --output=json c.qcow2",
        "compare a.qcow2 nosuch",
        "compare a.qcow2",
        "compare -f qcow2 r.raw a.qcow2",
        "compare -p a.qcow2 a.qcow2",
        "measure",
        "measure --size 1G -O qcow2",
        "measure --size 1G -O qcow2 a.qcow2",
        "measure --size abc",
        "measure -O vpc r.raw",
        "measure --output=json -O qcow2 --size 3T -o cluster_size=2M",
        "bench -c 10 -d 4 -f raw r.raw",
        "bench -c 10 -w --flush-interval=2 -f raw r.raw",
        "bench -c 16 -d 4 -w --flush-interval=4 -f raw r.raw",
        "foo",
        "",
    ] {
        pair.same(line);
    }
}

#[test]
fn what_changes_images_leaves_the_same_behind() {
    let pair = Pair::new();
    for line in [
        "create -f raw r 3M",
        "create -f raw -o preallocation=full f 64k",
        "create -f qcow2 a 10M",
        "create -f qcow2 -o cluster_size=4096,lazy_refcounts=on b 5M",
        "create -f qcow2 -o compat=0.10 v2 1M",
        "create -q -f qcow2 -o compat=v3,extended_l2=on,compression_type=zstd x 12345678",
        "create -f qcow2 -b a -F qcow2 c",
        "create -f qcow2 -b a -F qcow2 d 20M",
        "create -f qcow2 -o backing_file=r,backing_fmt=raw e",
        "create -f qcow2 -u -b nosuch -F raw g 1M",
        "create -f qcow2 -b nosuch -F raw g2",
        "create -f qcow2 -b a h",
        "create -f qcow2 i",
        "create -f qcow2 -o size=1M s",
        "create -f qcow2 i 1Z",
        "create -f nofmt i 1M",
        "create -f qcow2 -o foo=1 i 1M",
        "create",
        "create -f qed q 10M",
        "create -f qed -o cluster_size=4096,table_size=2 q3 1M",
        "create -f vpc v 10M",
        "create -f vpc -o subformat=fixed,force_size=on w 10M",
    ] {
        pair.same(line);
    }
    for (name, format) in [
        ("r", "raw"),
        ("a", "qcow2"),
        ("b", "qcow2"),
        ("v2", "qcow2"),
        ("x", "qcow2"),
        ("c", "qcow2"),
        ("d", "qcow2"),
        ("e", "qcow2"),
        ("q", "qed"),
        ("q3", "qed"),
        ("v", "vpc"),
        ("w", "vpc"),
    ] {
        pair.same_image(name, format);
    }
    pair.prepare("qemu-io", &["-f", "qcow2", "-c", "write -P 3 1M 128k", "-c", "write -z 3M 1M", "a"]);
    pair.prepare("qemu-io", &["-f", "qcow2", "-c", "write -P 4 2M 64k", "c"]);
    for line in [
        "snapshot -c one a",
        "snapshot -c two a",
        "snapshot -l a",
        "snapshot -a one a",
        "snapshot -d two a",
        "snapshot -d nosuch a",
        "snapshot -a nosuch a",
        "snapshot -c one r",
        "snapshot",
        "snapshot -c a -d b a",
        "bitmap --add a b0",
        "bitmap --add a b0",
        "bitmap --remove a nosuch",
        "bitmap --disable a b0",
        "bitmap --clear --enable a b0",
        "bitmap a b0",
        "bitmap --add -g 128k a b1",
        "bitmap --merge b1 a b0",
        "bitmap --remove a b1",
        "bitmap --add r b",
        "info --output=json a",
        "resize x 20M",
        "resize x 1M",
        "resize --shrink x 1M",
        "resize x +1M",
        "resize --shrink x -512k",
        "resize x",
        "resize x 0",
        "resize x abc",
        "resize nosuch 1M",
        "resize -f raw r 4M",
        "resize -q v2 2M",
        "rebase -u -b nosuch -F raw c",
        "rebase -b '' c",
        "rebase -u -b a -F qcow2 c",
        "convert -O qcow2 c c2",
        "convert -p -O raw c z.raw",
        "convert -O qcow2 -o cluster_size=4k,compat=0.10 c c3",
        "convert -c -O qcow2 c c4",
        "convert -O qed c c5",
        "convert -O vpc -o force_size=on c c6",
        "convert -O qcow2 -l one a c7",
        "convert -O qcow2 -l snapshot.name=one a c8",
        "convert -O qcow2 a b c9",
        "convert -O qcow2 -B a -F qcow2 c c10",
        "convert -n -O qcow2 c c2",
        "convert",
        "convert a",
        "convert -O nofmt a z",
        "convert -O raw nosuch z",
        "convert -c -O raw a z",
        "convert -O qcow2 -l nosuch a z",
        "convert -n -O qcow2 a z2",
        "convert -t foo a z",
        "convert -S foo a z",
        "convert -m 99 a z",
        "convert -O qcow2 -B a c z",
        "rebase -b '' c10",
        "rebase c",
        "commit c",
        "commit -q -d d",
        "commit r",
    ] {
        pair.same(line);
    }
    for (name, format) in [
        ("a", "qcow2"),
        ("x", "qcow2"),
        ("v2", "qcow2"),
        ("c", "qcow2"),
        ("z.raw", "raw"),
        ("c2", "qcow2"),
        ("c3", "qcow2"),
        ("c4", "qcow2"),
        ("c5", "qed"),
        ("c6", "vpc"),
        ("c7", "qcow2"),
        ("c8", "qcow2"),
        ("c9", "qcow2"),
        ("c10", "qcow2"),
    ] {
        pair.same_image(name, format);
    }
}

/// Damage that both find, mend and tell of in the same words.
#[test]
fn damage_is_told_of_alike() {
    let pair = Pair::new();
    // Refcounts are 16 bits wide, in the third cluster. In the first image the seventh cluster is used and not counted;
    // in both the last one is counted and not used.
    for (name, counts) in [("a", &[(6u64, 0u8), (13, 1)][..]), ("b", &[(13, 1)])] {
        pair.prepare("qemu-img", &["create", "-q", "-f", "qcow2", name, "1M"]);
        pair.prepare("qemu-io", &["-f", "qcow2", "-c", "write 0 512k", name]);
        for side in [OURS, THEIRS] {
            use std::os::unix::fs::FileExt;
            let file = std::fs::OpenOptions::new().write(true).open(pair.path(side).join(name)).unwrap();
            for (cluster, count) in counts {
                file.write_all_at(&[0, *count], 2 * 65536 + 2 * cluster).unwrap();
            }
            file.set_len(14 << 16).unwrap();
        }
    }
    for line in ["check", "check --output=json", "check -r leaks", "check"] {
        pair.same(&format!("{line} b"));
    }
    for line in ["check", "check --output=json"] {
        pair.same(&format!("{line} a"));
    }
    // Their repair takes two rounds for what ours does in one: what it leaves is what counts.
    for side in [OURS, THEIRS] {
        assert!(pair.run(side, "check -r all a").status.success());
    }
    pair.same("check -q a");
    pair.same_image("a", "qcow2");
}

#[test]
fn its_version_and_help_are_known() {
    let pair = Pair::new();
    let version = String::from_utf8(pair.run(OURS, "--version").stdout).unwrap();
    assert!(version.starts_with("qemu-img version ") && version.contains("yado"), "{version}");
    let help = pair.run(OURS, "--help");
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("rebase"));
}
