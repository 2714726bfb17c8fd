//! `yado image` against qemu-img: each reads what the other makes, and they say the same of it.

use serde_json::Value;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let output = Command::new(program).args(arguments).current_dir(self.0.path()).output();
        output.unwrap_or_else(|error| {
            panic!("{program}: {error}; `cargo xtask setup` installs what is missing")
        })
    }

    /// Runs `yado image` and answers what it prints; the exit code must be `code`.
    fn yado(&self, code: i32, arguments: &str) -> String {
        let words: Vec<&str> = std::iter::once("image").chain(arguments.split_whitespace()).collect();
        let output = self.run(env!("CARGO_BIN_EXE_yado"), &words);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "yado image {arguments}: {out}{err}");
        format!("{out}{err}")
    }

    fn qemu(&self, arguments: &str) -> String {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.run("qemu-img", &words);
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {arguments}: {err}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// A raw image of 8 MiB: text, zeroes that are stored, holes, and bytes that do not shrink.
    fn raw(&self, name: &str) {
        let mut bytes: Vec<u8> = Vec::new();
        let mut random = 1u32;
        for block in 0..128u32 {
            for at in 0..65536u32 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                bytes.push(match block % 4 {
                    0 => (at / 97) as u8,
                    1 => 0,
                    2 => (random >> 24) as u8,
                    _ => u8::from(at % 5000 == 0),
                });
            }
        }
        std::fs::write(self.path(name), bytes).unwrap();
    }
}

/// The same fields of both reports, as far as the other has them.
fn agree(ours: &Value, theirs: &Value, without: &[&str]) {
    for (name, value) in theirs.as_object().unwrap() {
        if !without.contains(&name.as_str()) {
            assert_eq!(ours.get(name), Some(value), "{name}: {ours:#} {theirs:#}");
        }
    }
}

#[test]
fn images_go_there_and_back() {
    let place = Place::new();
    place.raw("a.raw");
    for (number, options) in [
        "",
        "-c",
        "-c -o compression_type=zstd",
        "-o compat=0.10,cluster_size=4K",
        "-o extended_l2=on,cluster_size=128K",
    ]
    .into_iter()
    .enumerate()
    {
        place.yado(0, &format!("convert -q -f raw -O qcow2 {options} a.raw b{number}.qcow2"));
        place.qemu(&format!("check b{number}.qcow2"));
        place.qemu(&format!("compare -f raw -F qcow2 a.raw b{number}.qcow2"));
        place.yado(0, &format!("convert -q -f qcow2 -O raw b{number}.qcow2 c.raw"));
        assert!(
            std::fs::read(place.path("a.raw")).unwrap() == std::fs::read(place.path("c.raw")).unwrap(),
            "{options}"
        );
        let theirs: Value =
            serde_json::from_str(&place.qemu(&format!("info --output json b{number}.qcow2"))).unwrap();
        let ours: Value =
            serde_json::from_str(&place.yado(0, &format!("info --json b{number}.qcow2"))).unwrap();
        agree(&ours, &theirs, &[]);
        let theirs: Value =
            serde_json::from_str(&place.qemu(&format!("check --output json b{number}.qcow2"))).unwrap();
        let ours: Value =
            serde_json::from_str(&place.yado(0, &format!("check --json b{number}.qcow2"))).unwrap();
        agree(&ours, &theirs, &["fragmented-clusters", "compressed-clusters"]);
    }
    assert!(std::fs::metadata(place.path("b1.qcow2")).unwrap().len() < 4 << 20, "it is compressed");
    place.yado(1, "compare -q -f raw -F raw a.raw b0.qcow2");
    assert!(place.yado(0, "compare -f raw -F qcow2 a.raw b0.qcow2").contains("identical"));
}

#[test]
fn maps_are_those_of_qemu() {
    let place = Place::new();
    place.raw("base.raw");
    place.qemu("create -q -f qcow2 -b base.raw -F raw top.qcow2 10M");
    place.run("qemu-io", &["-c", "write -P 7 100k 300k", "-c", "write -z 3M 1M", "top.qcow2"]);
    let theirs: Value = serde_json::from_str(&place.qemu("map -f qcow2 --output json top.qcow2")).unwrap();
    let ours: Value = serde_json::from_str(&place.yado(0, "map -f qcow2 --json top.qcow2")).unwrap();
    let rows = |report: &Value| {
        let rows = report.as_array().unwrap().iter();
        rows.map(|row| {
            ["start", "length", "depth", "zero", "data", "offset"].map(|name| row.get(name).cloned())
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(rows(&ours), rows(&theirs));
    // A guess trusts nothing that the image names.
    let refused = place.yado(125, "map top.qcow2");
    assert!(refused.contains("base.raw") && refused.contains("-f qcow2"), "{refused}");
    assert!(place.yado(0, "info top.qcow2").contains("base.raw"));
}

/// A thousand million runs in a file of less than 2 MiB: they are told as they are found.
#[test]
fn a_map_without_end_needs_no_memory() {
    let place = Place::new();
    place.yado(0, "create -q -f qcow2 a.qcow2 64T");
    let mut bytes = std::fs::read(place.path("a.qcow2")).unwrap();
    bytes.resize(bytes.len().next_multiple_of(1 << 16), 0);
    let table = bytes.len() as u64;
    // Data and nothing in turn, and all parts of the disk name this table.
    for row in 0..8192u64 {
        let entry = if row % 2 == 0 { 1 << 63 | (table + (1 << 16)) } else { 0 };
        bytes.extend_from_slice(&entry.to_be_bytes());
    }
    bytes.resize(bytes.len() + (1 << 16), 1);
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    for entry in bytes[l1..l1 + 8 * 131_072].chunks_exact_mut(8) {
        entry.copy_from_slice(&(1 << 63 | table).to_be_bytes());
    }
    std::fs::write(place.path("a.qcow2"), bytes).unwrap();
    let link = place.path("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_yado"), &link).unwrap();
    let yado = env!("CARGO_BIN_EXE_yado");
    for line in [
        format!("{yado} image map -f qcow2 a.qcow2"),
        format!("{yado} image map -f qcow2 --json a.qcow2"),
        format!("{} map -f qcow2 --output=json a.qcow2", link.display()),
    ] {
        // Of memory 1 GiB.
        let script = format!("ulimit -v 1048576; timeout 60 {line} | head -c 100000 | wc -c");
        let output = place.run("sh", &["-c", &script]);
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "100000", "{line}: {output:?}");
    }
}

#[test]
fn chains_are_moved_merged_and_emptied() {
    let place = Place::new();
    place.raw("base.raw");
    std::fs::copy(place.path("base.raw"), place.path("other.raw")).unwrap();
    place.yado(0, "create -q -f qcow2 -b base.raw -F raw top.qcow2");
    place.run("qemu-io", &["-c", "write -P 7 100k 300k", "top.qcow2"]);
    place.run("qemu-io", &["-f", "raw", "-c", "write -P 9 5M 100k", "other.raw"]);
    place.yado(0, "convert -q -f qcow2 -O raw top.qcow2 before.raw");
    place.yado(0, "rebase -q -f qcow2 -b other.raw -F raw top.qcow2");
    place.qemu("compare -f qcow2 -F raw top.qcow2 before.raw");
    place.yado(0, "commit -q top.qcow2");
    place.qemu("check top.qcow2");
    place.qemu("compare -f raw -F raw other.raw before.raw");
    place.qemu("compare -f qcow2 -F raw top.qcow2 before.raw");
    place.yado(0, "rebase -q -f qcow2 -b  top.qcow2".replace("-b  ", "--backing= ").as_str());
    place.qemu("compare -f qcow2 -F raw top.qcow2 before.raw");
    place.qemu("check top.qcow2");
    assert!(!place.qemu("info top.qcow2").contains("backing"));
}

/// What an internal snapshot has not itself it shows from below.
#[test]
fn what_snapshots_show_is_not_changed_below_them() {
    let place = Place::new();
    place.raw("base.raw");
    place.raw("other.raw");
    place.yado(0, "create -q -f qcow2 -b base.raw -F raw top.qcow2");
    place.yado(0, "snapshot -f qcow2 -c one top.qcow2");
    place.run("qemu-io", &["-c", "write -P 7 100k 300k", "top.qcow2"]);
    let before = ["base.raw", "top.qcow2"].map(|name| std::fs::read(place.path(name)).unwrap());
    for line in [
        "commit -q -f qcow2 top.qcow2",
        "commit -q -d -f qcow2 top.qcow2",
        "rebase -q -f qcow2 -b other.raw -F raw top.qcow2",
        "rebase -q -f qcow2 -b '' top.qcow2",
    ] {
        let words: Vec<&str> = std::iter::once("image").chain(line.split(' ')).collect();
        let words: Vec<&str> = words.into_iter().map(|word| word.trim_matches('\'')).collect();
        let output = place.run(env!("CARGO_BIN_EXE_yado"), &words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains("snapshots"), "{line}: {said}");
    }
    let after = ["base.raw", "top.qcow2"].map(|name| std::fs::read(place.path(name)).unwrap());
    assert!(before == after);
    // A new name for the same content is their owner's affair.
    place.yado(0, "rebase -q -u -f qcow2 -b other.raw -F raw top.qcow2");
    place.yado(0, "snapshot -f qcow2 -d one top.qcow2");
    place.yado(0, "commit -q -f qcow2 top.qcow2");
}

#[test]
fn disks_grow_shrink_and_go_back() {
    let place = Place::new();
    place.raw("a.raw");
    place.yado(0, "convert -q -f raw -O qcow2 a.raw a.qcow2");
    place.yado(0, "snapshot -c first a.qcow2");
    place.run("qemu-io", &["-c", "write -P 7 0 4M", "a.qcow2"]);
    place.yado(0, "resize -q a.qcow2 +1G");
    assert!(place.yado(2, "resize -q a.qcow2 1M").contains("--shrink"));
    place.yado(0, "resize -q --shrink a.qcow2 1M");
    assert!(place.qemu("snapshot -l a.qcow2").contains("first"));
    assert!(place.yado(0, "snapshot a.qcow2").contains("first"));
    place.qemu("check a.qcow2");
    place.yado(0, "convert -q -l first -O raw a.qcow2 then.raw");
    place.qemu("compare -f raw -F raw a.raw then.raw");
    place.yado(0, "snapshot -a first a.qcow2");
    place.yado(0, "snapshot -d 1 a.qcow2");
    place.qemu("check a.qcow2");
    place.qemu("compare -f raw -F qcow2 a.raw a.qcow2");
}

#[test]
fn damage_is_found_and_repaired() {
    let place = Place::new();
    place.raw("a.raw");
    place.yado(0, "convert -q -f raw -O qcow2 a.raw a.qcow2");
    // A refcount block full of zeroes: every cluster is used more often than it is counted.
    let report: Value = serde_json::from_str(&place.yado(0, "check --json a.qcow2")).unwrap();
    assert_eq!(report["check-errors"], 0);
    let mut bytes = std::fs::read(place.path("a.qcow2")).unwrap();
    bytes[2 << 16..(2 << 16) + 100].fill(0);
    std::fs::write(place.path("a.qcow2"), bytes).unwrap();
    place.yado(2, "check a.qcow2");
    assert!(place.yado(0, "check -r all a.qcow2").contains("Repaired"));
    assert!(place.yado(0, "check --repair a.qcow2").contains("No errors"));
    place.yado(0, "check a.qcow2");
    place.qemu("check a.qcow2");
    place.qemu("compare -f raw -F qcow2 a.raw a.qcow2");
}

#[test]
fn nonsense_is_refused_and_leaves_nothing() {
    let place = Place::new();
    place.yado(2, "create -f qcow2 -o cluster_size=3K a.qcow2 1G");
    place.yado(2, "create -f vmdk a.vmdk 1G");
    place.yado(125, "create -f qcow2 -o cluster_size=512 a.qcow2 1P");
    place.yado(2, "create -f qcow2 a.qcow2");
    place.yado(125, "convert -f qcow2 -O raw nowhere.qcow2 a.raw");
    let left: Vec<_> = std::fs::read_dir(place.0.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    place.yado(0, "create -q -f qcow2 big.qcow2 1T");
    assert!(size(&place.path("big.qcow2")) < 1 << 20);
    assert!(place.yado(0, "measure --size 1G -O qcow2").contains("required size"));
}

#[test]
fn what_is_in_use_is_neither_replaced_nor_changed() {
    let place = Place::new();
    place.raw("a.raw");
    place.yado(0, "create -q -f qcow2 b.qcow2 8M");
    let target = place.path("b.qcow2");
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o600)).unwrap();
    let guest = std::fs::File::open(&target).unwrap();
    guest.lock().unwrap();
    let before = guest.metadata().unwrap().ino();
    let refused = place.yado(125, "convert -q -f raw -O qcow2 a.raw b.qcow2");
    assert!(refused.contains("in use"), "{refused}");
    assert_eq!(target.metadata().unwrap().ino(), before);
    // To look at it is all that can be done meanwhile.
    place.yado(0, "snapshot -U -f qcow2 b.qcow2");
    for change in ["-c one", "-a one", "-d one"] {
        let refused = place.yado(125, &format!("snapshot -U {change} -f qcow2 b.qcow2"));
        assert!(refused.contains("-U"), "{refused}");
    }
    drop(guest);
    place.yado(0, "convert -q -f raw -O qcow2 a.raw b.qcow2");
    assert_eq!(target.metadata().unwrap().mode() & 0o777, 0o600);
    place.qemu("compare -f raw -F qcow2 a.raw b.qcow2");
    std::fs::hard_link(&target, place.path("c.qcow2")).unwrap();
    let refused = place.yado(2, "convert -q -f raw -O qcow2 a.raw b.qcow2");
    assert!(refused.contains("2 names"), "{refused}");
    let mut names: Vec<_> =
        place.0.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.raw", "b.qcow2", "c.qcow2"]);
}

/// What the source has as zeroes must not show what the base has there.
#[test]
fn copies_on_a_base_read_as_their_source() {
    let place = Place::new();
    place.raw("base.raw");
    let mut bytes = std::fs::read(place.path("base.raw")).unwrap();
    bytes[2 << 20..3 << 20].fill(0);
    bytes[100_000..200_000].fill(7);
    std::fs::write(place.path("a.raw"), &bytes).unwrap();
    place.yado(0, "convert -q -f raw -O vpc base.raw base.vpc");
    for (format, options) in [
        ("qcow2", "backing_file=base.raw,backing_fmt=raw"),
        ("qcow2", "backing_file=base.raw,backing_fmt=raw -c"),
        ("qed", "backing_file=base.raw,backing_fmt=raw"),
        ("vpc", "backing_file=base.vpc,backing_fmt=vpc"),
    ] {
        place.yado(0, &format!("convert -q -f raw -O {format} -o {options} a.raw top"));
        place.yado(0, &format!("compare -q -f {format} -F raw top a.raw"));
        if format != "vpc" {
            place.qemu(&format!("compare -f {format} -F raw top a.raw"));
        }
        let taken = taken(&place, &["top"]);
        assert!(taken < 4 << 20, "{format}: what the base has is not copied: {taken}");
    }
}

#[test]
fn qed_images_go_there_and_back() {
    let place = Place::new();
    place.raw("a.raw");
    for (number, options) in
        ["", "-o cluster_size=4K,table_size=2", "-o cluster_size=1M"].into_iter().enumerate()
    {
        place.yado(0, &format!("convert -q -f raw -O qed {options} a.raw b{number}.qed"));
        place.qemu(&format!("check -f qed b{number}.qed"));
        place.qemu(&format!("compare -f raw -F qed a.raw b{number}.qed"));
        place.yado(0, &format!("convert -q -f qed -O raw b{number}.qed c.raw"));
        assert_eq!(std::fs::read(place.path("a.raw")).unwrap(), std::fs::read(place.path("c.raw")).unwrap());
        place.qemu(&format!("convert -f raw -O qed {options} a.raw d.qed"));
        assert!(place.yado(0, "compare -F qed a.raw d.qed -f raw").contains("identical"));
        let both = |command: &str| {
            let theirs: Value =
                serde_json::from_str(&place.qemu(&format!("{command} --output json b{number}.qed"))).unwrap();
            let ours: Value =
                serde_json::from_str(&place.yado(0, &format!("{command} --json b{number}.qed"))).unwrap();
            (ours, theirs)
        };
        let (ours, theirs) = both("info -f qed");
        agree(&ours, &theirs, &["actual-size", "children"]);
        let (ours, theirs) = both("check -f qed");
        // QEMU calls clusters out of order fragmented where they go on in the next table.
        agree(&ours, &theirs, &["fragmented-clusters", "image-end-offset"]);
        let (ours, theirs) = both("map -f qed");
        let rows = ours.as_array().unwrap().iter().zip(theirs.as_array().unwrap());
        rows.for_each(|(ours, theirs)| agree(ours, theirs, &[]));
    }
}

#[test]
fn qed_images_build_on_others() {
    let place = Place::new();
    place.raw("base.raw");
    place.qemu("create -q -f qed -b base.raw -F raw top.qed 10M");
    place.run("qemu-io", &["-f", "qed", "-c", "write -P 7 100k 300k", "-c", "write -z 3M 1M", "top.qed"]);
    place.yado(0, "convert -q -f qed -O raw top.qed before.raw");
    place.qemu("compare -f qed -F raw top.qed before.raw");
    assert!(place.yado(125, "map top.qed").contains("-f qed"), "a guessed image is not believed");
    place.yado(0, "rebase -q -f qed --backing= top.qed");
    place.qemu("check -f qed top.qed");
    place.qemu("compare -f qed -F raw top.qed before.raw");
    place.yado(0, "rebase -q -f qed -b base.raw -F raw top.qed");
    place.yado(0, "commit -q -f qed top.qed");
    place.qemu("compare -f qed -F raw top.qed before.raw");
    place.qemu("check -f qed top.qed");
    assert!(std::fs::metadata(place.path("top.qed")).unwrap().len() <= 5 * 65536, "it is empty");
    // The format cannot say of what format a backing file is: one that is found by its header is not believed further.
    place.yado(0, "create -q -f qed -b top.qed -F qed third.qed");
    assert!(place.yado(125, "map -f qed third.qed").contains("base.raw"));
    place.yado(0, "rebase -q -f qed --backing= top.qed");
    place.yado(0, "resize -q third.qed -f qed +5M");
    place.qemu("compare -f qed -F raw third.qed before.raw");
    place.yado(2, "create -q -f qed -b base.raw fourth.qed");
    let full: Value = serde_json::from_str(&place.yado(0, "measure -f raw -O qed --json base.raw")).unwrap();
    place.yado(0, "convert -q -f raw -O qed -S 0 base.raw full.qed");
    let len = std::fs::metadata(place.path("full.qed")).unwrap().len();
    assert_eq!(full["fully-allocated"], len);
}

#[test]
fn vhds_go_there_and_back() {
    let place = Place::new();
    place.raw("a.raw");
    for (number, options) in ["", "-o subformat=fixed", "-o block_size=64K"].into_iter().enumerate() {
        place.yado(0, &format!("convert -q -f raw -O vhd {options} a.raw b{number}.vhd"));
        place.qemu(&format!("compare -f raw -F vpc a.raw b{number}.vhd"));
        place.yado(0, &format!("convert -q -f vhd -O raw b{number}.vhd c.raw"));
        assert_eq!(std::fs::read(place.path("a.raw")).unwrap(), std::fs::read(place.path("c.raw")).unwrap());
        let theirs: Value =
            serde_json::from_str(&place.qemu(&format!("info -f vpc --output json b{number}.vhd"))).unwrap();
        let ours: Value =
            serde_json::from_str(&place.yado(0, &format!("info --json b{number}.vhd"))).unwrap();
        agree(&ours, &theirs, &["actual-size", "children"]);
        assert!(place.yado(0, &format!("check b{number}.vhd")).contains("No errors"));
        place.yado(0, &format!("resize -q b{number}.vhd +100M"));
        place.qemu(&format!("compare -f raw -F vpc a.raw b{number}.vhd"));
        let size: Value =
            serde_json::from_str(&place.yado(0, &format!("measure -O vhd {options} --json -f raw a.raw")))
                .unwrap();
        place.yado(0, &format!("convert -q -f raw -O vhd -S 0 {options} a.raw d.vhd"));
        assert_eq!(size["required"], std::fs::metadata(place.path("d.vhd")).unwrap().len());
    }
    place.qemu("convert -f raw -O vpc -o force_size=on a.raw e.vhd");
    assert!(place.yado(0, "compare -f raw -F vhd a.raw e.vhd").contains("identical"));
}

#[test]
fn vhds_differ_from_others() {
    let place = Place::new();
    place.raw("a.raw");
    place.yado(0, "convert -q -f raw -O vhd a.raw base.vhd");
    place.yado(0, "create -q -f vhd -b base.vhd -F vhd top.vhd");
    assert!(place.yado(2, "create -q -f vhd -b a.raw -F raw no.vhd").contains("qcow2"));
    place.yado(0, "compare -q -f vhd -F raw top.vhd a.raw");
    assert!(place.yado(125, "map top.vhd").contains("format=vpc"), "a guessed image is not believed");
    place.yado(0, "create -q -f vhd -b top.vhd -F vhd third.vhd");
    let chain: Value =
        serde_json::from_str(&place.yado(0, "info -f vhd --backing-chain --json third.vhd")).unwrap();
    assert_eq!(chain.as_array().unwrap().len(), 3);
    let text = String::from_utf8_lossy(&place.run("vhdiinfo", &["third.vhd"]).stdout).into_owned();
    assert!(text.contains("top.vhd") && text.contains("Differential"), "{text}");
    assert!(place.yado(2, "rebase -q -f vhd --backing= third.vhd").contains("qcow2"));
    place.yado(0, "commit -q -f vhd third.vhd");
    place.yado(0, "compare -q -f vhd -F raw third.vhd a.raw");
}

#[test]
fn vhdx_and_vmdk_are_converted() {
    let place = Place::new();
    place.raw("a.raw");
    for (number, (format, options)) in [
        ("vhdx", "subformat=dynamic"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
    ]
    .into_iter()
    .enumerate()
    {
        place.qemu(&format!("convert -f raw -O {format} -o {options} a.raw b{number}"));
        place.yado(0, &format!("convert -q -f {format} -O qcow2 b{number} c{number}.qcow2"));
        place.qemu(&format!("compare -f raw -F qcow2 a.raw c{number}.qcow2"));
        let theirs: Value =
            serde_json::from_str(&place.qemu(&format!("info -f {format} --output json b{number}"))).unwrap();
        let ours: Value = serde_json::from_str(&place.yado(0, &format!("info --json b{number}"))).unwrap();
        agree(&ours, &theirs, &["actual-size", "children", "format-specific"]);
        assert!(place.yado(0, &format!("check b{number}")).contains("No errors"));
        assert!(place.yado(125, &format!("resize b{number} +1M")).contains("convert"));
        place.yado(2, &format!("create -f {format} d 1M"));
    }
}

#[test]
fn clones_are_made_at_once() {
    let place = Place::new();
    place.raw("a.raw");
    place.yado(0, "convert -q -f raw -O qed a.raw a.qed");
    std::fs::create_dir(place.path("d")).unwrap();
    // By sharing blocks or by building on the original: it reads the same.
    place.yado(0, "clone -q -f qed a.qed d/b");
    let format = place.yado(0, "info --json d/b");
    let format: Value = serde_json::from_str(&format).unwrap();
    let format = format["format"].as_str().unwrap();
    place.yado(0, &format!("compare -q -f qed -F {format} a.qed d/b"));
    place.run("qemu-io", &["-f", format, "-c", "write -P 7 0 1M", "d/b"]);
    place.yado(1, &format!("compare -q -f qed -F {format} a.qed d/b"));
    place.yado(0, "compare -q -f qed -F raw a.qed a.raw");
    assert!(place.yado(2, "clone -q -f qed a.qed d/b").contains("is there already"));
}

/// A link stays a link, and bitmaps and benchmarks are at hand.
#[test]
fn links_are_followed_bitmaps_kept_and_speed_measured() {
    let place = Place::new();
    place.raw("a.raw");
    std::fs::create_dir(place.path("store")).unwrap();
    std::fs::write(place.path("store/real.qcow2"), b"old").unwrap();
    std::os::unix::fs::symlink("store/real.qcow2", place.path("link.qcow2")).unwrap();
    place.yado(0, "convert -f raw -O qcow2 a.raw link.qcow2");
    assert!(place.path("link.qcow2").is_symlink());
    assert_eq!(std::fs::read_dir(place.path("store")).unwrap().count(), 1);
    place.qemu("compare -f raw -F qcow2 a.raw store/real.qcow2");
    place.yado(0, "bitmap -f qcow2 --add -g 64K link.qcow2 monday");
    place.yado(1, "bitmap -f qcow2 --add link.qcow2 monday");
    place.yado(0, "bench -f qcow2 -w -c 64 -d 4 --pattern 9 link.qcow2");
    let said = place.yado(0, "bench -f qcow2 -c 64 -d 4 link.qcow2");
    assert!(said.contains("Sending 64 read requests") && said.contains("Run completed in"), "{said}");
    let info = place.yado(0, "info -f qcow2 link.qcow2");
    assert!(info.contains("monday"), "{info}");
    assert!(place.qemu("info -f qcow2 link.qcow2").contains("name: monday"));
    place.qemu("check -f qcow2 link.qcow2");
    // An image that builds on another is not believed where its format is guessed.
    place.yado(0, "create -q -f qcow2 -b a.raw -F raw top.qcow2");
    place.yado(125, "bench -c 1 top.qcow2");
    place.yado(0, "bench -f qcow2 -c 1 top.qcow2");
}

/// Four images of 8 MiB that have much in common, each in a raw file and a qcow2 image: the second differs in places, the third
/// has some of it elsewhere, the last is longer.
fn alike(place: &Place) -> [&'static str; 4] {
    place.raw("a.raw");
    let first = std::fs::read(place.path("a.raw")).unwrap();
    let mut second = first.clone();
    second[3 << 20..(3 << 20) + 5000].fill(9);
    // Where the first has data this one has none.
    second[6 << 20..7 << 20].fill(0);
    let third = [&first[4 << 20..], &first[..4 << 20]].concat();
    let last = [&first[..], &vec![0; 1 << 20], &first[..100 << 10]].concat();
    for (name, bytes) in [("b.raw", second), ("c.raw", third), ("d.raw", last)] {
        std::fs::write(place.path(name), bytes).unwrap();
    }
    ["a", "b", "c", "d"]
}

fn taken(place: &Place, names: &[&str]) -> u64 {
    names.iter().map(|name| std::fs::metadata(place.path(name)).unwrap().blocks() * 512).sum()
}

#[test]
fn images_are_put_on_what_they_have_in_common() {
    let place = Place::new();
    let names = alike(&place);
    let options =
        ["", "-o cluster_size=4K,lazy_refcounts=on", "-o compat=0.10", "-o extended_l2=on,cluster_size=128K"];
    for (name, options) in names.iter().zip(options) {
        place.yado(0, &format!("convert -q -f raw -O qcow2 {options} {name}.raw {name}.qcow2"));
    }
    let images = ["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"];
    let before = taken(&place, &images);
    let three = "a.qcow2 b.qcow2 c.qcow2";
    let report = |text: String| serde_json::from_str::<Value>(&text).unwrap();
    let would = report(place.yado(0, &format!("dedup -n --json --base store.qcow2 {three}")));
    assert!(!place.path("store.qcow2").exists() && before == taken(&place, &images));
    let only_mine = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(place.path("a.qcow2"), only_mine).unwrap();
    let done = report(place.yado(0, &format!("dedup --json --base store.qcow2 {three}")));
    for field in ["data", "equal", "base"] {
        assert_eq!(would[field], done[field], "{would:#} {done:#}");
    }
    // Half of the raw image is data that is not the same everywhere; it was there three times.
    let all = ["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2", "store.qcow2"];
    let saved = before - taken(&place, &all);
    assert_eq!(done["saved"].as_u64(), Some(saved), "{done:#}");
    assert!(
        saved > 6 << 20 && would["saved"].as_u64().unwrap().abs_diff(saved) < 2 << 20,
        "{would:#} {done:#}"
    );
    // One that comes later; those that are on the base stay as they are.
    place.yado(0, &format!("dedup --base store.qcow2 {three} d.qcow2"));
    assert!(taken(&place, &["d.qcow2"]) < 1 << 20);
    for (name, image) in names.iter().zip(images) {
        place.qemu(&format!("check -f qcow2 {image}"));
        place.qemu(&format!("compare -f raw -F qcow2 {name}.raw {image}"));
        assert!(place.qemu(&format!("info {image}")).contains("backing file: store.qcow2"));
    }
    place.qemu("check -f qcow2 store.qcow2");
    // One of them is its owner's alone, and so is what it has in common with the others.
    let store = std::fs::metadata(place.path("store.qcow2")).unwrap();
    assert_eq!(store.permissions().mode() & 0o777, 0o400);
    let theirs: Value = serde_json::from_str(&place.qemu("info --output json c.qcow2")).unwrap();
    assert_eq!(theirs["format-specific"]["data"]["compat"], "0.10");
    // They can be written, each alone.
    place.run("qemu-io", &["-c", "write -P 7 0 100k", "a.qcow2"]);
    place.qemu("check -f qcow2 a.qcow2");
    place.qemu("compare -f raw -F qcow2 d.raw d.qcow2");
    let mode = std::fs::metadata(place.path("a.qcow2")).unwrap().permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
    let left = std::fs::read_dir(place.0.path()).unwrap().count();
    assert_eq!(left, 9, "nothing else is left");
}

#[test]
fn images_that_would_lose_something_are_left_alone() {
    let place = Place::new();
    place.raw("a.raw");
    for name in ["snapshot", "bitmap", "top"] {
        place.yado(0, &format!("convert -q -f raw -O qcow2 a.raw {name}.qcow2"));
    }
    place.yado(0, "snapshot -c one snapshot.qcow2");
    place.yado(0, "bitmap -f qcow2 --add bitmap.qcow2 one");
    place.yado(0, "rebase -q -f qcow2 -b a.raw -F raw top.qcow2");
    for (name, why) in
        [("snapshot", "snapshots would be lost"), ("bitmap", "bitmaps"), ("top", "a backing file already")]
    {
        let said = place.yado(2, &format!("dedup --base store.qcow2 {name}.qcow2"));
        assert!(said.contains(why), "{said}");
    }
    assert!(place.yado(2, "dedup --base s top.qcow2 ./top.qcow2").contains("twice"));
    assert!(place.yado(2, "dedup --block-size 5K top.qcow2").contains("power of two"));
    place.yado(125, "dedup --base store.qcow2 a.raw");
    place.yado(0, "convert -q -f raw -O qcow2 -o lazy_refcounts=on a.raw dirty.qcow2");
    std::fs::hard_link(place.path("dirty.qcow2"), place.path("other.qcow2")).unwrap();
    assert!(place.yado(2, "dedup --base store.qcow2 dirty.qcow2").contains("2 names"));
    std::fs::remove_file(place.path("other.qcow2")).unwrap();
    // One whose user was killed: to look at it repairs nothing.
    let mut bytes = std::fs::read(place.path("dirty.qcow2")).unwrap();
    bytes[79] |= 1;
    std::fs::write(place.path("dirty.qcow2"), &bytes).unwrap();
    place.yado(0, "dedup -n --base store.qcow2 dirty.qcow2");
    assert!(std::fs::read(place.path("dirty.qcow2")).unwrap() == bytes);
    assert!(!place.path("store.qcow2").exists());
}

#[test]
fn a_data_file_that_is_there_is_not_emptied_by_a_copy() {
    let place = Place::new();
    place.raw("a.raw");
    place.yado(0, "convert -q -f raw -O qcow2 -o data_file=d.raw a.raw dst.qcow2");
    std::fs::write(place.path("b.raw"), [7; 1 << 20]).unwrap();
    let said = place.yado(2, "convert -q -f raw -O qcow2 -o data_file=d.raw b.raw dst.qcow2");
    assert!(said.contains("d.raw is there already"), "{said}");
    place.qemu("compare -f raw -F qcow2 a.raw dst.qcow2");
    // A copy that fails leaves nothing, and what was there.
    place.yado(0, "convert -q -f raw -O qcow2 a.raw damaged.qcow2");
    let mut bytes = std::fs::read(place.path("damaged.qcow2")).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let table = word(&bytes, word(&bytes, 40)) & ((1 << 56) - 1);
    bytes[table..table + 8].fill(0x3f);
    std::fs::write(place.path("damaged.qcow2"), &bytes).unwrap();
    place.yado(125, "convert -q -f qcow2 -O qcow2 -o data_file=e.raw damaged.qcow2 dst.qcow2");
    place.qemu("compare -f raw -F qcow2 a.raw dst.qcow2");
    let mut left: Vec<_> =
        std::fs::read_dir(place.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a.raw", "b.raw", "d.raw", "damaged.qcow2", "dst.qcow2"]);
}

#[test]
fn a_link_as_the_target_is_compared_with_the_base_that_the_image_gets() {
    let place = Place::new();
    std::fs::create_dir(place.path("vm")).unwrap();
    for (name, byte) in [("src.raw", 7), ("base.raw", 7), ("vm/base.raw", 8), ("vm/dst.qcow2", 0)] {
        std::fs::write(place.path(name), vec![byte; 1 << 20]).unwrap();
    }
    std::os::unix::fs::symlink("vm/dst.qcow2", place.path("link")).unwrap();
    place.yado(0, "convert -q -f raw -O qcow2 -o backing_file=base.raw,backing_fmt=raw src.raw link");
    place.qemu("compare -f raw -F qcow2 src.raw vm/dst.qcow2");
}

#[test]
fn a_signal_ends_what_does_not_look_for_signals() {
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_yado"))
        .args(["image", "create", "-q", "-f", "raw", "-o", "preallocation=full", "large.raw", "100G"])
        .current_dir(place.0.path())
        .spawn()
        .unwrap();
    let wait = |what: &str, mut over: Box<dyn FnMut() -> bool + '_>| {
        let since = std::time::Instant::now();
        while !over() {
            assert!(since.elapsed().as_secs() < 10, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    wait(
        "it begins",
        Box::new(|| std::fs::metadata(place.path("large.raw")).is_ok_and(|file| file.blocks() > 0)),
    );
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut status = None;
    wait(
        "it ends",
        Box::new(|| {
            status = child.try_wait().unwrap();
            status.is_some()
        }),
    );
    assert_eq!(status.unwrap().code(), Some(143));
    assert!(!place.path("large.raw").exists(), "nothing half made is left");
}

/// Whatever moment it is killed at, every image reads as it did.
#[test]
fn a_killed_dedup_loses_nothing() {
    let place = Place::new();
    let names = alike(&place);
    for round in 0..8u64 {
        for name in names {
            place.yado(0, &format!("convert -q -f raw -O qcow2 {name}.raw {name}.qcow2"));
        }
        let _ = std::fs::remove_file(place.path("store.qcow2"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_yado"))
            .args([
                "image",
                "dedup",
                "-q",
                "--base",
                "store.qcow2",
                "a.qcow2",
                "b.qcow2",
                "c.qcow2",
                "d.qcow2",
            ])
            .current_dir(place.0.path())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(40 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        for name in names {
            place.qemu(&format!("check -q -f qcow2 {name}.qcow2"));
            place.qemu(&format!("compare -f raw -F qcow2 {name}.raw {name}.qcow2"));
        }
        // And what was begun can be ended.
        place.yado(0, "dedup -q --base store.qcow2 a.qcow2 b.qcow2 c.qcow2 d.qcow2");
        for name in names {
            place.qemu(&format!("compare -f raw -F qcow2 {name}.raw {name}.qcow2"));
        }
    }
}

/// A file system in a file, mounted as long as the value lives.
struct Mounted(std::path::PathBuf);

impl Mounted {
    /// `None` where mounting is not allowed.
    fn new(place: &Place, kind: &str) -> Option<Self> {
        let (file, target) = (place.path(&format!("{kind}.fs")), place.path(kind));
        std::fs::File::create(&file).unwrap().set_len(512 << 20).unwrap();
        let mkfs = xtask::setup::find(&format!("mkfs.{kind}")).expect("`cargo xtask setup` installs it");
        assert!(Command::new(mkfs).arg("-q").arg(&file).status().unwrap().success());
        std::fs::create_dir(&target).unwrap();
        let mount = Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&target).output().ok()?;
        mount.status.success().then_some(Self(target))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn file_systems_that_can_share_blocks_do() {
    for kind in ["btrfs", "xfs"] {
        let place = Place::new();
        let names = alike(&place);
        let Some(mounted) = Mounted::new(&place, kind) else {
            // Nobody but root may mount. What is left to see is that other file systems are told apart.
            let said = place.yado(125, "dedup a.raw b.raw");
            assert!(said.contains("--base"), "{said}");
            return;
        };
        let inside = Place(tempfile::tempdir_in(&mounted.0).unwrap());
        for name in names {
            std::fs::copy(place.path(&format!("{name}.raw")), inside.path(&format!("{name}.raw"))).unwrap();
        }
        place.yado(0, "convert -q -f raw -O qcow2 a.raw e.qcow2");
        std::fs::copy(place.path("e.qcow2"), inside.path("e.qcow2")).unwrap();
        let used = || {
            Command::new("sync").arg("-f").arg(inside.path("a.raw")).status().unwrap();
            let free =
                Command::new("df").args(["--output=used", "-B1"]).arg(inside.path("a.raw")).output().unwrap();
            let text = String::from_utf8(free.stdout).unwrap();
            text.lines().nth(1).unwrap().trim().parse::<u64>().unwrap()
        };
        let report = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        let line = "dedup --json a.raw b.raw c.raw d.raw e.qcow2";
        let would = report(inside.yado(0, &format!("{line} -n")));
        let before = used();
        let done = report(inside.yado(0, line));
        assert_eq!(would["saved"], done["saved"], "{would:#} {done:#}");
        let saved = done["saved"].as_u64().unwrap();
        // The data of one of them is in all.
        assert!(saved > 16 << 20, "{kind}: {done:#}");
        // btrfs keeps an extent as long as any of it is used: only the third file is nothing but what others have.
        let gained = before.saturating_sub(used());
        let least = if kind == "btrfs" { 7 << 20 } else { saved.saturating_sub(4 << 20) };
        assert!((least..saved + (4 << 20)).contains(&gained), "{kind}: {gained} of {saved}");
        for name in names {
            let (one, other) = (place.path(&format!("{name}.raw")), inside.path(&format!("{name}.raw")));
            assert!(std::fs::read(one).unwrap() == std::fs::read(other).unwrap());
        }
        inside.qemu("check -q -f qcow2 e.qcow2");
        inside.qemu("compare -f raw -F qcow2 a.raw e.qcow2");
        // What is one is told apart from what is equal, and there is nothing more to do.
        let again = report(inside.yado(0, line));
        assert_eq!((&again["saved"], &again["equal"]), (&0.into(), &done["equal"]), "{kind}: {again:#}");
        assert_eq!(again["shared-before"], again["equal"]);
    }
}
