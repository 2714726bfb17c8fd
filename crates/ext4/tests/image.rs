//! Whole images, feature by feature.

mod oracle;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ext4::{DeviceKind, Error, Metadata, Options, Summary, Target, Writer};
use oracle::{assert_clean, debugfs, run, scratch};

const MIB: u64 = 1 << 20;
const NOW: i64 = 1_700_000_000;

fn options(size: u64) -> Options {
    Options {
        uuid: *b"0123456789abcdef",
        label: "root".into(),
        hash_seed: *b"fedcba9876543210",
        timestamp: NOW,
        ..Options::new(size)
    }
}

fn file_meta() -> Metadata {
    Metadata::new(0o644, NOW)
}

struct Image {
    directory: tempfile::TempDir,
    summary: Summary,
}

impl Image {
    fn path(&self) -> PathBuf {
        self.directory.path().join("image")
    }
}

/// Makes an image with `fill` and lets e2fsck judge it.
fn image(options: &Options, fill: impl FnOnce(&mut Writer<File>)) -> Image {
    let directory = scratch();
    let path = directory.path().join("image");
    let mut writer = Writer::new(File::create(&path).unwrap(), options).unwrap();
    fill(&mut writer);
    let summary = writer.finish().unwrap();
    assert_clean(&path);
    Image { directory, summary }
}

fn cat(image: &Path, path: &str) -> Vec<u8> {
    let output = run("debugfs", &["-R", &format!("cat {path}"), image.to_str().unwrap()]);
    output.stdout
}

/// Bytes that look random and have no zero blocks.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8 | 1
        })
        .collect()
}

#[test]
fn empty_images_of_all_sizes_are_clean() {
    for size in [
        MIB,
        4 * MIB,
        8 * MIB,
        64 * MIB,
        128 * MIB,
        129 * MIB,
        1 << 30,
        (2 << 30) + 12_345,
        4 << 30,
        300 << 30,
    ] {
        let image = image(&options(size), |_| {});
        let on_disk = std::fs::metadata(image.path()).unwrap().blocks() * 512;
        assert!(on_disk < 24 * MIB, "an empty image of {size} bytes takes {on_disk}");
        assert_eq!(image.summary.directories, 2);
    }
}

#[test]
fn it_has_the_features_and_sizes_that_mke2fs_gives() {
    let size = 4 << 30;
    let ours = image(&options(size), |_| {});
    let theirs = ours.directory.path().join("mke2fs");
    File::create(&theirs).unwrap().set_len(size).unwrap();
    let made = run("mke2fs", &["-q", "-t", "ext4", theirs.to_str().unwrap()]);
    assert_eq!(made.status.code(), Some(0));
    let header = |path: &Path| {
        let output = run("dumpe2fs", &["-h", path.to_str().unwrap()]);
        String::from_utf8(output.stdout).unwrap()
    };
    let (ours, theirs) = (header(&ours.path()), header(&theirs));
    for field in [
        "Filesystem magic number",
        "Filesystem revision #",
        "Filesystem flags",
        "Default mount options",
        "Filesystem state",
        "Inode count",
        "Block count",
        "First block",
        "Block size",
        "Fragment size",
        "Group descriptor size",
        "Blocks per group",
        "Fragments per group",
        "Inodes per group",
        "Inode blocks per group",
        "Flex block group size",
        "Maximum mount count",
        "First inode",
        "Inode size",
        "Required extra isize",
        "Desired extra isize",
        "Journal inode",
        "Default directory hash",
        "Journal backup",
        "Checksum type",
        "Journal features",
        "Total journal size",
        "Journal start",
    ] {
        let find = |header: &str| {
            let line = header.lines().find(|line| line.split(':').next() == Some(field));
            line.unwrap_or_else(|| panic!("no {field} in {header}")).to_owned()
        };
        assert_eq!(find(&ours), find(&theirs));
    }
    let features = |header: &str| {
        let line = header.lines().find(|line| line.starts_with("Filesystem features:")).unwrap();
        let mut names: Vec<String> = line.split_whitespace().skip(2).map(str::to_owned).collect();
        // Newer versions of mke2fs add this one by default.
        names.retain(|name| name != "orphan_file" && name != "metadata_csum_seed");
        names.sort();
        names
    };
    assert_eq!(features(&ours), features(&theirs));
}

#[test]
fn metadata_reads_back() {
    let image = image(&options(64 * MIB), |writer| {
        let meta = Metadata { mode: 0o4751, uid: 70_001, gid: 70_002, mtime: -5, xattrs: Vec::new() };
        writer.directory(b"/bin", &Metadata { mode: 0o1777, ..meta.clone() }).unwrap();
        writer.directory(b"/", &Metadata { mode: 0o700, ..meta.clone() }).unwrap();
        writer.file(b"/bin/su", &meta, 3, &b"abc"[..]).unwrap();
        let late = Metadata { mtime: 5_000_000_000, ..meta.clone() };
        writer.file(b"/bin/late", &late, 0, io::empty()).unwrap();
        writer.device(b"/dev/null", &meta, DeviceKind::Character, 1, 3).unwrap();
        writer.device(b"/dev/wide", &meta, DeviceKind::Block, 259, 70_000).unwrap();
        for (major, minor) in [(4096, 0), (0, 1 << 20)] {
            let refused = writer.device(b"/dev/x", &meta, DeviceKind::Block, major, minor);
            assert!(matches!(refused, Err(Error::DeviceNumber { .. })));
        }
        writer.device(b"/dev/pipe", &meta, DeviceKind::Fifo, 0, 0).unwrap();
        writer.device(b"/dev/log", &meta, DeviceKind::Socket, 0, 0).unwrap();
    });
    let stat = |path: &str| debugfs(&image.path(), &format!("stat {path}"));
    let su = stat("/bin/su");
    assert!(su.contains("Mode:  04751") && su.contains("Type: regular"), "{su}");
    assert!(su.contains("User: 70001   Group: 70002") && su.contains("Size: 3"), "{su}");
    assert!(su.contains("mtime: 0xfffffffb:00000000") && su.contains("ctime: 0x6553f100:00000000"), "{su}");
    assert!(stat("/bin/late").contains("mtime: 0x2a05f200:00000001"));
    assert!(stat("/bin").contains("Mode:  01777"));
    assert!(stat("/").contains("Mode:  0700"));
    assert!(stat("/dev").contains("Mode:  0755"));
    assert!(stat("/dev/null").contains("Device major/minor number: 01:03"));
    let wide = stat("/dev/wide");
    assert!(
        wide.contains("Type: block special")
            && wide.contains("(New-style) Device major/minor number: 259:70000"),
        "{wide}"
    );
    assert!(stat("/dev/pipe").contains("Type: FIFO"));
    assert!(stat("/dev/log").contains("Type: socket"));
    assert!(stat("/lost+found").contains("Inode: 11 "));
}

#[test]
fn extended_attributes_read_back() {
    let value = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    let image = image(&options(64 * MIB), |writer| {
        let xattrs =
            vec![(b"security.capability".to_vec(), value.clone()), (b"user.a".to_vec(), b"b".to_vec())];
        writer.file(b"/bin/ping", &Metadata { xattrs, ..file_meta() }, 1, &b"x"[..]).unwrap();
        let bad = |xattrs| Metadata { xattrs, ..file_meta() };
        for (name, length) in [("user.a", 80), ("system.posix_acl_access", 4), ("user.", 1), ("", 1)] {
            let meta = bad(vec![(name.into(), vec![0; length])]);
            assert!(matches!(writer.file(b"/x", &meta, 0, io::empty()), Err(Error::Xattr { .. })), "{name}");
        }
        let twice = bad(vec![(b"user.a".to_vec(), vec![1]), (b"user.a".to_vec(), vec![2])]);
        assert!(matches!(writer.directory(b"/x", &twice), Err(Error::Xattr { .. })));
    });
    let listed = debugfs(&image.path(), "ea_list /bin/ping");
    assert!(listed.contains("security.capability (20) = 01 00 00 02 00 20 00"), "{listed}");
    assert!(listed.contains("user.a (1)"), "{listed}");
    let out = image.directory.path().join("value");
    debugfs(&image.path(), &format!("ea_get -f {} /bin/ping security.capability", out.display()));
    assert_eq!(std::fs::read(out).unwrap(), value);
}

#[test]
fn a_later_file_replaces_an_earlier_one_and_frees_its_blocks() {
    let size = 64 * MIB;
    let image = image(&options(size), |writer| {
        // More in total than fits: freed blocks must be used again.
        for round in 0..8 {
            let content = noise(12 << 20, round);
            writer.file(b"/big", &file_meta(), content.len() as u64, &content[..]).unwrap();
        }
        writer.file(b"/one", &file_meta(), 3, &b"one"[..]).unwrap();
        writer.hard_link(b"/two", b"/one").unwrap();
        writer.hard_link(b"/two", b"/one").unwrap();
        writer.file(b"/one", &file_meta(), 3, &b"new"[..]).unwrap();
        writer.symlink(b"/link", &file_meta(), b"two").unwrap();
        writer.file(b"/link", &file_meta(), 3, &b"own"[..]).unwrap();
        writer.symlink(b"/big2", &file_meta(), &[b'x'; 3000]).unwrap();
        writer.device(b"/big2", &file_meta(), DeviceKind::Fifo, 0, 0).unwrap();
    });
    let image = image.path();
    assert!(cat(&image, "/big") == noise(12 << 20, 7));
    assert_eq!(
        (cat(&image, "/one"), cat(&image, "/two"), cat(&image, "/link")),
        (b"new".into(), b"one".into(), b"own".into())
    );
    assert!(debugfs(&image, "stat /two").contains("Links: 1"));
}

#[test]
fn paths_follow_symbolic_links_and_never_leave_the_image() {
    let image = image(&options(64 * MIB), |writer| {
        let meta = Metadata::new(0o777, NOW);
        writer.symlink(b"bin", &meta, b"usr/bin").unwrap();
        writer.file(b"./bin/x", &file_meta(), 1, &b"x"[..]).unwrap();
        writer.directory(b"/bin/", &Metadata::new(0o751, NOW)).unwrap();
        writer.symlink(b"/usr/lib/up", &meta, b"../../../../..//etc/./deep").unwrap();
        writer.file(b"/usr/lib/up/y", &file_meta(), 1, &b"y"[..]).unwrap();
        writer.symlink(b"/abs", &meta, b"/bin").unwrap();
        writer.file(b"/abs/z", &file_meta(), 1, &b"z"[..]).unwrap();
        writer.symlink(b"/loop", &meta, b"loop").unwrap();
        assert!(matches!(writer.file(b"/loop/a", &meta, 0, io::empty()), Err(Error::SymlinkLoop { .. })));
        writer.symlink(b"/grow", &meta, b"grow/grow").unwrap();
        assert!(matches!(writer.directory(b"/grow", &meta), Err(Error::SymlinkLoop { .. })));
        assert!(matches!(writer.file(b"/../x", &meta, 0, io::empty()), Err(Error::Path { .. })));
        assert!(matches!(writer.file(b"/a\0b", &meta, 0, io::empty()), Err(Error::Path { .. })));
        assert!(matches!(writer.file(&[b'n'; 256], &meta, 0, io::empty()), Err(Error::Path { .. })));
        assert!(matches!(writer.file(&b"n/".repeat(2048), &meta, 0, io::empty()), Err(Error::Path { .. })));
        assert!(matches!(writer.file(b"/", &meta, 0, io::empty()), Err(Error::IsADirectory { .. })));
        assert!(matches!(writer.symlink(b"/usr", &meta, b"x"), Err(Error::IsADirectory { .. })));
        assert!(matches!(writer.directory(b"/usr/bin/x/y", &meta), Err(Error::NotADirectory { .. })));
        assert!(matches!(writer.hard_link(b"/h", b"/nothing"), Err(Error::NotFound { .. })));
        assert!(matches!(writer.hard_link(b"/h", b"/usr"), Err(Error::IsADirectory { .. })));
        assert!(matches!(writer.symlink(b"/s", &meta, b""), Err(Error::SymlinkTarget { .. })));
        writer.directory(&[b"/d".repeat(2047), b"/".to_vec()].concat(), &meta).unwrap();
        writer.symlink(b"/down", &meta, &b"d/".repeat(2047)).unwrap();
        writer.directory(b"/down/e", &meta).unwrap();
        writer.symlink(b"/far", &meta, &b"d/../".repeat(800)).unwrap();
        writer.directory(b"/far/far/far/a", &meta).unwrap();
        let around = b"far/".repeat(6);
        assert!(matches!(writer.directory(&around, &meta), Err(Error::Path { .. })));
        assert!(matches!(writer.directory(b"/down/e/f", &meta), Err(Error::Path { .. })));
    });
    let path = image.path();
    for (file, content) in [("/usr/bin/x", b"x"), ("/etc/deep/y", b"y"), ("/usr/bin/z", b"z")] {
        assert_eq!(cat(&path, file), content, "{file}");
    }
    assert!(debugfs(&path, "stat /usr/bin").contains("Mode:  0751"));
    assert!(debugfs(&path, "stat /bin").contains("Fast link dest: \"usr/bin\""));
}

#[test]
fn long_symbolic_links_read_back() {
    let target = |length| vec![b't'; length];
    let image = image(&options(64 * MIB), |writer| {
        for length in [59, 60, 4095] {
            writer.symlink(format!("/l{length}").as_bytes(), &file_meta(), &target(length)).unwrap();
        }
    });
    for length in [60, 4095] {
        assert_eq!(cat(&image.path(), &format!("/l{length}")), target(length));
    }
    assert!(debugfs(&image.path(), "stat /l59").contains(&format!("Fast link dest: \"{}\"", "t".repeat(59))));
}

/// Every second block is a hole, so that each block is an extent.
struct Comb {
    position: u64,
}

impl Read for Comb {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for byte in buffer.iter_mut() {
            *byte = if (self.position >> 12) & 1 == 0 { (self.position >> 13) as u8 | 1 } else { 0 };
            self.position += 1;
        }
        Ok(buffer.len())
    }
}

#[test]
fn files_with_thousands_of_extents_get_index_blocks() {
    // 4 in the inode, 1,360 at one level, more at two.
    for extents in [4, 5, 340, 341, 1360, 1361, 3000] {
        let size = extents * 8192 - 4096;
        let image = image(&options(64 * MIB), |writer| {
            writer.file(b"/comb", &file_meta(), size, Comb { position: 0 }).unwrap();
        });
        let mut expected = Vec::new();
        Comb { position: 0 }.take(size).read_to_end(&mut expected).unwrap();
        assert!(cat(&image.path(), "/comb") == expected, "{extents} extents");
    }
}

#[test]
fn sparse_files_stay_sparse() {
    let image = image(&options(64 * MIB), |writer| {
        let content = io::repeat(0).take(5 << 30).chain(&b"end"[..]);
        writer.file(b"/sparse", &file_meta(), (5 << 30) + 3, content).unwrap();
        writer.file(b"/zero", &file_meta(), 10 << 20, io::repeat(0)).unwrap();
    });
    let stat = debugfs(&image.path(), "stat /sparse");
    assert!(stat.contains("Size: 5368709123") && stat.contains("Blockcount: 8\n"), "{stat}");
    assert!(stat.contains("(1310720):"), "{stat}");
    assert!(debugfs(&image.path(), "stat /zero").contains("Blockcount: 0\n"));
}

#[test]
fn big_directories_are_hash_trees() {
    let count = 9000;
    let image = image(&options(256 * MIB), |writer| {
        for number in 0..count {
            let name = format!("/many/{number:0>width$}", width = 1 + number % 255);
            writer.file(name.as_bytes(), &file_meta(), 0, io::empty()).unwrap();
        }
        for number in 0..70_000 {
            writer.hard_link(format!("/links{}/{number}", number % 2).as_bytes(), b"/one").unwrap_or_else(
                |_| {
                    writer.file(b"/one", &file_meta(), 0, io::empty()).unwrap();
                },
            );
        }
    });
    assert!(debugfs(&image.path(), "stat /many").contains("Flags: 0x81000"));
    let listed = debugfs(&image.path(), "ls -p /many");
    assert_eq!(listed.lines().filter(|line| line.starts_with('/')).count(), count + 2);
    // debugfs looks names up by hash.
    assert!(debugfs(&image.path(), &format!("stat /many/{:0>200}", 8869)).contains("Type: regular"));
    let tree = debugfs(&image.path(), "htree_dump /many");
    assert!(tree.contains("Indirect levels: 0") && tree.contains("Hash Version: 1"), "{tree:.400}");
}

#[test]
fn a_two_level_hash_tree_is_clean() {
    let image = image(&options(512 * MIB), |writer| {
        for number in 0..9000 {
            let name = format!("/d/{number:0>255}");
            writer.symlink(name.as_bytes(), &file_meta(), b"x").unwrap();
        }
    });
    assert!(debugfs(&image.path(), "htree_dump /d").contains("Indirect levels: 1"));
}

#[test]
fn more_subdirectories_than_links_can_count() {
    let image = image(&options(2 << 30), |writer| {
        for number in 0..65_100 {
            writer.directory(format!("/d/{number}").as_bytes(), &file_meta()).unwrap();
        }
    });
    assert!(debugfs(&image.path(), "stat /d").contains("Links: 1 "));
}

#[test]
fn a_full_disk_says_how_much_is_missing() {
    let directory = scratch();
    let path = directory.path().join("image");
    let mut writer = Writer::new(File::create(&path).unwrap(), &options(16 * MIB)).unwrap();
    let error = writer.file(b"/big", &file_meta(), 64 * MIB, io::repeat(7)).unwrap_err();
    let Error::Full { what, missing } = error else { panic!("{error}") };
    assert_eq!(what, "/big");
    assert!((50 * MIB..56 * MIB).contains(&missing), "{missing}");
    // What did not fit is gone, so the rest fits and the image is good.
    writer.file(b"/small", &file_meta(), 4 * MIB, io::repeat(7)).unwrap();
    let error = writer.file(b"/short", &file_meta(), 5 * MIB, io::repeat(7).take(4 * MIB)).unwrap_err();
    assert!(matches!(error, Error::Content { .. }), "{error}");
    let summary = writer.finish().unwrap();
    assert!(summary.free < 12 * MIB);
    assert_clean(&path);
}

#[test]
fn running_out_at_the_end_counts_what_is_left_to_write() {
    let directory = scratch();
    let mut writer =
        Writer::new(File::create(directory.path().join("image")).unwrap(), &options(16 * MIB)).unwrap();
    for number in 0..100 {
        writer.directory(format!("/{number}").as_bytes(), &file_meta()).unwrap();
    }
    let Err(Error::Full { missing, .. }) = writer.file(b"/f", &file_meta(), 16 * MIB, io::repeat(7)) else {
        panic!("it fits");
    };
    writer.file(b"/f", &file_meta(), 16 * MIB - missing - 10 * 4096, io::repeat(7)).unwrap();
    let error = writer.finish().unwrap_err();
    // Root, lost+found and 100 directories need a block each.
    assert!(matches!(error, Error::Full { missing, .. } if missing == 92 * 4096), "{error}");
}

#[test]
fn endless_names_do_not_fit_a_small_disk() {
    let directory = scratch();
    let mut writer =
        Writer::new(File::create(directory.path().join("image")).unwrap(), &options(4 * MIB)).unwrap();
    writer.file(b"/one", &file_meta(), 0, io::empty()).unwrap();
    let error =
        (0..20_000).find_map(|number| writer.hard_link(format!("/{number:0>255}").as_bytes(), b"/one").err());
    assert!(matches!(error, Some(Error::Full { missing: 4096, .. })), "{error:?}");
}

#[test]
fn inodes_run_out_with_an_error() {
    let directory = scratch();
    let path = directory.path().join("image");
    let mut writer = Writer::new(File::create(&path).unwrap(), &options(4 * MIB)).unwrap();
    let mut made = 0;
    let error = loop {
        match writer.file(format!("/{made}").as_bytes(), &file_meta(), 0, io::empty()) {
            Ok(()) => made += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::NoInodes { inodes: 256, .. }), "{error}");
    assert_eq!(made, 256 - 11);
    writer.file(b"/1", &file_meta(), 1, &b"x"[..]).unwrap();
    assert_eq!(writer.finish().unwrap().inodes_free, 0);
    assert_clean(&path);
}

#[test]
fn sizes_out_of_range_are_refused() {
    let file = || tempfile::tempfile().unwrap();
    assert!(matches!(Writer::new(file(), &Options::new(1000)), Err(Error::TooSmall { .. })));
    assert!(matches!(Writer::new(file(), &Options::new(u64::MAX)), Err(Error::TooLarge { .. })));
    let label = Options { label: "seventeen letters".into(), ..Options::new(MIB) };
    assert!(matches!(Writer::new(file(), &label), Err(Error::Label { length: 17 })));
}

/// Fails as a disk does that has only so much space.
struct Small {
    left: usize,
}

impl Target for Small {
    fn set_len(&mut self, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_all_at(&mut self, bytes: &[u8], _offset: u64) -> io::Result<()> {
        let left = self.left.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
        self.left = left;
        Ok(())
    }
}

#[test]
fn errors_of_the_target_come_through() {
    for left in [0, 5000, 1 << 20, 3 << 20] {
        let made = Writer::new(Small { left }, &options(64 * MIB)).and_then(|mut writer| {
            writer.file(b"/f", &file_meta(), 3 << 20, io::repeat(7))?;
            writer.finish()
        });
        assert!(matches!(made, Err(Error::Target { .. })), "{left}: {made:?}");
    }
}

#[test]
fn the_same_calls_make_the_same_image() {
    let make = || {
        let image = image(&options(32 * MIB), |writer| {
            for number in 0..300 {
                let content = noise(number * 30, number as u64);
                let name = format!("/d/{number}");
                writer.file(name.as_bytes(), &file_meta(), content.len() as u64, &content[..]).unwrap();
            }
        });
        std::fs::read(image.path()).unwrap()
    };
    assert!(make() == make());
}

/// Mounts an image read-only at `at` while it lives; `None` where that is not allowed.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    fn new(image: &Path, at: &'a Path) -> Option<Self> {
        let done = run("mount", &["-o", "loop,ro", image.to_str().unwrap(), at.to_str().unwrap()]);
        done.status.success().then_some(Self(at))
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().unwrap()]);
    }
}

/// The kernel reads it where it may be asked, which takes root; elsewhere `debugfs` does.
#[test]
fn a_tree_reads_back_through_the_kernel() {
    let image = image(&options(256 * MIB), |writer| {
        for number in 0..2000 {
            let content = noise(number * 17, number as u64);
            let name = format!("/usr/share/{}/{number:0>60}", number % 3);
            writer.file(name.as_bytes(), &file_meta(), content.len() as u64, &content[..]).unwrap();
        }
        writer.file(b"/comb", &file_meta(), 20 << 20, Comb { position: 0 }).unwrap();
        writer.symlink(b"/share", &file_meta(), b"usr/share").unwrap();
        writer.hard_link(b"/again", b"/share/1/1").unwrap_err();
        writer.hard_link(b"/again", format!("/share/1/{:0>60}", 1000).as_bytes()).unwrap();
    });
    let root = image.directory.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let mounted = Mount::new(&image.path(), &root);
    if mounted.is_none() {
        oracle::dump(&image.path(), &root);
    }
    for number in 0..2000 {
        let path = root.join(format!("usr/share/{}/{number:0>60}", number % 3));
        assert!(std::fs::read(path).unwrap() == noise(number * 17, number as u64), "{number}");
    }
    let mut comb = Vec::new();
    Comb { position: 0 }.take(20 << 20).read_to_end(&mut comb).unwrap();
    assert!(std::fs::read(root.join("comb")).unwrap() == comb);
    assert!(std::fs::read(root.join("again")).unwrap() == noise(17_000, 1000));
    assert_eq!(std::fs::read_link(root.join("share")).unwrap(), Path::new("usr/share"));
    assert_eq!(std::fs::read_dir(root.join("usr/share/0")).unwrap().count(), 667);
    if mounted.is_some() {
        let about = std::fs::metadata(root.join("again")).unwrap();
        assert_eq!((about.nlink(), about.mtime(), about.mode()), (2, NOW, 0o100_644));
    }
}

#[test]
fn names_hash_as_e2fsprogs_hashes_them() {
    // Signed characters, all lengths around the 32 bytes that are mixed at a time, and the seed.
    let names: Vec<String> =
        (1..255).step_by(3).map(|length| "aé~Z".chars().cycle().take(length / 2 + 1).collect()).collect();
    let image = image(&options(64 * MIB), |writer| {
        for name in &names {
            writer.file(format!("/d/{name}").as_bytes(), &file_meta(), 0, io::empty()).unwrap();
        }
    });
    let tree = debugfs(&image.path(), "htree_dump /d");
    for name in &names {
        let hash = debugfs(
            &image.path(),
            &format!("dx_hash -h half_md4 -s {} {name}", "66656463-6261-3938-3736-353433323130"),
        );
        let hash = hash.split_whitespace().find_map(|word| word.strip_prefix("0x")).unwrap().to_owned();
        let hash = format!("0x{hash:0>8}");
        assert!(tree.contains(&hash), "{name}: {hash}");
    }
}
