//! QED against the model, power cuts, qemu-img, and damaged files.

use super::*;
use crate::format::mapped::power_test;
use crate::format::mapped::test::{self, Kind, SIZE, cases, qemu_img, read_all, run, step};
use crate::storage::StorageFile;
use crate::storage::power::Power;
use crate::{ReadInto, WriteFrom};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Shape {
    options: CreateOptions,
}

impl Kind for Shape {
    fn format(&self) -> Format {
        Format::Qed
    }

    fn below(&self) -> bool {
        self.options.backing.is_some()
    }

    /// QEMU makes tables of one cluster and does not open them.
    fn qemu_reads(&self) -> bool {
        self.options.table_clusters > 1
    }

    fn qemu_checks(&self) -> bool {
        self.qemu_reads()
    }

    fn create(&self, storage: Arc<dyn Storage>, below: Option<Arc<dyn Disk>>) -> Arc<dyn Container> {
        Arc::new(Qed::create(Path::new("new"), storage, &self.options, below).unwrap())
    }

    fn open(&self, storage: Arc<dyn Storage>, below: Option<Arc<dyn Disk>>) -> Arc<dyn Container> {
        let header = Qed::read_header(Path::new("old"), storage.as_ref()).unwrap();
        Arc::new(Qed::open(Path::new("old"), storage, header, below).unwrap())
    }
}

fn shape(size: u64) -> impl Strategy<Value = Shape> {
    (12u32..=17, 0u32..=4, any::<bool>()).prop_map(move |(cluster_bits, table, below)| {
        let backing = below.then(|| ("base.raw".to_owned(), Format::Raw));
        let options =
            CreateOptions { cluster_bits, table_clusters: 1 << table, backing, ..CreateOptions::new(size) };
        Shape { options }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::with_cases(cases(24)) })]

    #[test]
    fn an_image_is_a_disk_and_qemu_agrees(shape in shape(SIZE), steps in prop::collection::vec(step(true, SIZE), 1..25)) {
        test::play(&shape, &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::with_cases(cases(12)) })]

    #[test]
    fn a_power_cut_costs_nothing_that_was_flushed(
        shape in shape(power_test::SIZE),
        steps in prop::collection::vec(step(false, power_test::SIZE), 1..20),
        seed: u64,
    ) {
        power_test::play(&shape, &steps, seed);
    }
}

#[test]
fn threads_do_not_disturb_each_other() {
    for (cluster_bits, below) in [(12, false), (16, true)] {
        let backing = below.then(|| ("base.raw".to_owned(), Format::Raw));
        test::crowd(&Shape { options: CreateOptions { cluster_bits, backing, ..CreateOptions::new(SIZE) } });
    }
}

fn open(path: &Path, read_only: bool) -> Result<Qed, Error> {
    let storage = test::reopen(path, read_only);
    let header = Qed::read_header(path, storage.as_ref())?;
    Qed::open(path, storage, header, None)
}

#[test]
fn what_qemu_makes_is_read_and_written_on() {
    for options in ["cluster_size=4096,table_size=2", "cluster_size=65536", "cluster_size=1M,table_size=16"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qed");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qed", "-o", options, name, "100M"]);
        run("qemu-io", &["-f", "qed", "-c", "write -P 7 5M 300k", "-c", "write -z 20M 4M", name]);
        let image = open(&path, false).unwrap();
        let mut bytes = vec![0; 400 << 10];
        image.read((5 << 20) - 1024, &ReadInto::new(&mut bytes)).unwrap();
        assert!(bytes[..1024] == [0; 1024] && bytes[1024..301 << 10].iter().all(|byte| *byte == 7));
        assert!(bytes[301 << 10..].iter().all(|byte| *byte == 0));
        image.write(99 << 20, &WriteFrom(&[9; 1 << 20])).unwrap();
        assert!(image.check(Repair::Nothing).unwrap().is_clean());
        drop(image);
        qemu_img(&["check", "-f", "qed", name]);
        run("qemu-io", &["-f", "qed", "-c", "read -P 9 99M 1M", "-c", "read -P 7 5M 300k", name]);
    }
}

/// An image with data in three clusters; the tables are at 4096 and 8192, the clusters behind.
fn small() -> Vec<u8> {
    let options = CreateOptions { cluster_bits: 12, table_clusters: 1, ..CreateOptions::new(1 << 20) };
    let power = Arc::new(Power::default());
    let image = Qed::create(Path::new("small"), power.clone(), &options, None).unwrap();
    for number in 0..3u64 {
        image.write(number << 12, &WriteFrom(&[number as u8 + 1; 4096])).unwrap();
    }
    drop(image);
    power.cut(&[], power.moment(), || 255)
}

fn set(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
}

fn repaired(bytes: Vec<u8>) -> (Findings, Vec<u8>, Qed) {
    let storage: Arc<dyn Storage> = Arc::new(Power::new(bytes));
    let header = Qed::read_header(Path::new("bad"), storage.as_ref()).unwrap();
    let image = Qed::open_for_repair(Path::new("bad"), storage, header, None).unwrap();
    let found = image.check(Repair::All).unwrap();
    let disk = read_all(&image);
    (found, disk, image)
}

#[test]
fn damage_is_found_refused_and_repaired() {
    let mut bytes = small();
    // Outside the file; inside the L1 table; not aligned.
    for (index, word) in [(0, 1 << 40), (1, 4096), (2, 12289)] {
        set(&mut bytes, 8192 + index * 8, word);
    }
    let storage: Arc<dyn Storage> = Arc::new(Power::new(bytes.clone()));
    let header = Qed::read_header(Path::new("bad"), storage.as_ref()).unwrap();
    let image = Qed::open(Path::new("bad"), storage, header, None).unwrap();
    let mut buffer = [0; 512];
    let error = image.read(0, &ReadInto::new(&mut buffer)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(image.write(1 << 19, &WriteFrom(&[1; 512])).is_err(), "nothing is written to a damaged image");
    let (found, disk, image) = repaired(bytes);
    assert_eq!((found.corruptions, found.corruptions_fixed), (0, 3), "{found:?}");
    assert!(disk.iter().all(|byte| *byte == 0));
    assert_eq!(image.storage().len(), 3 << 12, "the clusters that nothing names are cut off");
}

/// Behind a bad L1 entry lies all that could still be saved, and nothing names it.
#[test]
fn leaks_of_a_damaged_image_are_left() {
    let mut bytes = small();
    set(&mut bytes, 4096, 8193);
    let storage = Arc::new(Power::new(bytes.clone()));
    let header = Qed::read_header(Path::new("bad"), storage.as_ref()).unwrap();
    let image = Qed::open_for_repair(Path::new("bad"), storage.clone(), header, None).unwrap();
    let found = image.check(Repair::Leaks).unwrap();
    assert!(found.corruptions == 1 && found.leaks > 0 && found.leaks_fixed == 0, "{found:?}");
    let mut after = vec![0; bytes.len()];
    storage.read_bytes(0, &mut after).unwrap();
    assert!(after == bytes && storage.len() == bytes.len() as u64);
}

#[test]
fn clusters_with_two_users_are_copied() {
    let mut bytes = small();
    let shared = u64::from_le_bytes(bytes[8192..8200].try_into().unwrap());
    set(&mut bytes, 8192 + 8 * 5, shared);
    // An L2 table in place of data, too.
    set(&mut bytes, 8192 + 8 * 6, 8192);
    let (found, disk, image) = repaired(bytes);
    assert_eq!((found.corruptions, found.corruptions_fixed), (0, 2), "{found:?}");
    assert!(disk[..4096] == [1; 4096] && disk[5 << 12..6 << 12] == [1; 4096]);
    image.write(0, &WriteFrom(&[8; 4096])).unwrap();
    assert!(read_all(&image)[5 << 12..6 << 12] == [1; 4096], "a write shows in one place");
}

#[test]
fn an_image_that_others_left_open_is_checked_first() {
    let mut bytes = small();
    bytes[16] |= 2;
    set(&mut bytes, 8192 + 8, 1 << 40);
    let storage: Arc<dyn Storage> = Arc::new(Power::new(bytes));
    let header = Qed::read_header(Path::new("left"), storage.as_ref()).unwrap();
    assert!(header.needs_check());
    let image = Qed::open(Path::new("left"), storage.clone(), header, None).unwrap();
    assert!(!image.facts().dirty);
    assert!(!Qed::read_header(Path::new("left"), storage.as_ref()).unwrap().needs_check());
    assert!(read_all(&image)[4096..8192].iter().all(|byte| *byte == 0));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let good = small();
    let cases: &[(usize, u32, &str)] = &[
        (0, 0, "begin"),
        (4, 5000, "clusters"),
        (8, 3, "tables"),
        (12, 0, "header"),
        (16, 8, "features"),
        (40, 4097, "L1"),
        (48, 7, "size"),
        (52, 1 << 30, "size"),
    ];
    for (at, word, what) in cases {
        let mut bytes = good.clone();
        bytes[*at..at + 4].copy_from_slice(&word.to_le_bytes());
        let error = Qed::read_header(Path::new("bad"), &Power::new(bytes)).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let mut named = good;
    named[16] = 1;
    named[56..64].copy_from_slice(&[64, 0, 0, 0, 255, 255, 0, 0]);
    assert!(Qed::read_header(Path::new("bad"), &Power::new(named)).is_err());
}

#[test]
fn a_sparse_giant_is_looked_at_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("giant.qed");
    let storage = Arc::new(StorageFile::create(&path, false).unwrap());
    let image = Qed::create(&path, storage, &CreateOptions::new(64 << 40), None).unwrap();
    image.write((64 << 40) - 512, &WriteFrom(&[1; 512])).unwrap();
    let began = std::time::Instant::now();
    assert_eq!(image.block_status(0, 64 << 40).unwrap().len, (64 << 40) - 65536);
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    image.resize(32 << 40).unwrap();
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
}

#[test]
fn at_every_moment_of_a_rebase_the_old_name_or_the_new_one_holds() {
    let long = "b".repeat(1000);
    let backing = Some((long.clone(), Format::Raw));
    let options = CreateOptions { cluster_bits: 12, backing, ..CreateOptions::new(1 << 20) };
    let first = Arc::new(Power::default());
    drop(Qed::create(Path::new("new"), first.clone(), &options, None).unwrap());
    let start = first.cut(&[], first.moment(), || 255);
    let power = Arc::new(Power::new(start.clone()));
    let header = Qed::read_header(Path::new("a"), power.as_ref()).unwrap();
    let image = Qed::open(Path::new("a"), power.clone(), header, None).unwrap();
    let names = [long, "c".repeat(900), "d".repeat(1023), "short".to_owned()];
    for name in &names[1..] {
        image.set_backing(Some((name, Format::Qcow2))).unwrap();
        assert_eq!(&image.facts().backing.unwrap().0, name);
    }
    assert!(image.set_backing(Some((&"e".repeat(1024), Format::Raw))).is_err());
    let mut seen = std::collections::HashSet::new();
    for (moment, seed) in (0..=power.moment()).flat_map(|moment| (1u64..20).map(move |seed| (moment, seed))) {
        let mut state = seed;
        let bytes = power.cut(&start, moment, || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        });
        let name = Qed::read_header(Path::new("cut"), &Power::new(bytes)).unwrap().backing.unwrap();
        assert!(names.contains(&name), "cut at {moment}: {name}");
        seen.insert(name);
    }
    assert_eq!(seen.len(), names.len());
}

#[test]
fn an_image_on_a_device_is_refused_with_a_reason() {
    let device = Arc::new(Power::device(vec![0; 8 << 20]));
    let refused = Qed::create(Path::new("new"), device, &CreateOptions::new(1 << 20), None).err().unwrap();
    assert!(refused.to_string().contains("use qcow2"), "{refused}");
}
