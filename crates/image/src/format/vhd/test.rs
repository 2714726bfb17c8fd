//! VHD against the model, power cuts, qemu-img and libvhdi, and damaged files.

use super::*;
use crate::format::Container;
use crate::format::mapped::power_test;
use crate::format::mapped::test::{self, SIZE, cases, qemu_img, read_all, run, step};
use crate::storage::power::Power;
use crate::{ReadInto, WriteFrom};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Shape {
    options: CreateOptions,
}

impl test::Kind for Shape {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn below(&self) -> bool {
        self.options.parent.is_some()
    }

    /// QEMU knows no differencing disks.
    fn qemu_reads(&self) -> bool {
        self.options.parent.is_none()
    }

    fn qemu_checks(&self) -> bool {
        false
    }

    fn create(&self, storage: Arc<dyn Storage>, below: Option<Arc<dyn Disk>>) -> Arc<dyn Container> {
        Arc::new(Vhd::create(Path::new("new"), storage, &self.options, below).unwrap())
    }

    fn open(&self, storage: Arc<dyn Storage>, below: Option<Arc<dyn Disk>>) -> Arc<dyn Container> {
        let header = Vhd::read_header(Path::new("old"), storage.as_ref()).unwrap();
        Arc::new(Vhd::open(Path::new("old"), storage, header, below).unwrap())
    }
}

fn shape(size: u64) -> impl Strategy<Value = Shape> {
    (12u32..=22, 0..5).prop_map(move |(block_bits, kind)| {
        let parent = (kind > 2).then(|| Parent { name: "base.vhd".into(), ..Parent::default() });
        let options = CreateOptions { block_bits, fixed: kind == 0, parent, ..CreateOptions::new(size) };
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
    for (block_bits, below) in [(12, false), (21, false), (16, true)] {
        let parent = below.then(|| Parent { name: "base.vhd".into(), ..Parent::default() });
        test::crowd(&Shape { options: CreateOptions { block_bits, parent, ..CreateOptions::new(SIZE) } });
    }
}

fn open(path: &Path) -> Vhd {
    let storage = test::reopen(path, false);
    let header = Vhd::read_header(path, storage.as_ref()).unwrap();
    Vhd::open(path, storage, header, None).unwrap()
}

#[test]
fn what_qemu_makes_is_read_and_written_on() {
    for options in ["subformat=dynamic", "subformat=fixed", "force_size=on", "subformat=fixed,force_size=on"]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.vhd");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "vpc", "-o", options, name, "100M"]);
        run("qemu-io", &["-f", "vpc", "-c", "write -P 7 5M 300k", name]);
        let image = open(&path);
        let info: String = qemu_img(&["info", "-f", "vpc", "--output", "json", name]);
        assert!(info.contains(&format!("\"virtual-size\": {}", image.capacity())), "{info}");
        let mut bytes = vec![0; 400 << 10];
        image.read((5 << 20) - 1024, &ReadInto::new(&mut bytes)).unwrap();
        assert!(bytes[..1024] == [0; 1024] && bytes[1024..301 << 10].iter().all(|byte| *byte == 7));
        assert!(bytes[301 << 10..].iter().all(|byte| *byte == 0));
        image.write(98 << 20, &WriteFrom(&[9; 1 << 20])).unwrap();
        image.resize(300 << 20).unwrap();
        image.write(299 << 20, &WriteFrom(&[8; 1 << 20])).unwrap();
        assert!(image.check(Repair::Nothing).unwrap().is_clean());
        drop(image);
        let reads = ["read -P 9 98M 1M", "read -P 7 5M 300k", "read -P 8 299M 1M", "read -P 0 200M 10M"];
        let mut arguments = vec!["-f", "vpc"];
        reads.iter().for_each(|read| arguments.extend(["-c", read]));
        arguments.push(name);
        let text = run("qemu-io", &arguments);
        assert!(!text.contains("failed"), "{text}");
    }
}

#[test]
fn libvhdi_knows_a_differencing_disk_and_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let (base, top) = (directory.path().join("base.vhd"), directory.path().join("top.vhd"));
    let image = crate::create_vhd(&base, &CreateOptions::new(16 << 20), None).unwrap();
    image.disk.write(0, &WriteFrom(&[1; 1 << 20])).unwrap();
    image.close().unwrap();
    drop(image);
    let image = crate::create_vhd(&top, &CreateOptions::new(16 << 20), Some("base.vhd")).unwrap();
    image.disk.write(512, &WriteFrom(&[2; 700])).unwrap();
    let mut bytes = [0; 2048];
    image.disk.read(0, &ReadInto::new(&mut bytes)).unwrap();
    assert!(bytes[..512] == [1; 512] && bytes[512..1212] == [2; 700] && bytes[1212..] == [1; 836]);
    image.close().unwrap();
    drop(image);
    let text = run("vhdiinfo", &[top.to_str().unwrap()]);
    for part in ["Differential", "base.vhd", "16777216 bytes"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let how =
        crate::OpenOptions { format: Some(Format::Vhd), read_only: true, ..crate::OpenOptions::default() };
    let again = crate::Image::open(&top, how).unwrap();
    let mut more = [0; 2048];
    again.disk.read(0, &ReadInto::new(&mut more)).unwrap();
    assert_eq!(bytes, more);
    drop(again);
    // Another disk with the parent's name is not the parent.
    std::fs::remove_file(&base).unwrap();
    drop(crate::create_vhd(&base, &CreateOptions::new(16 << 20), None).unwrap());
    let refused = crate::Image::open(&top, how).err().unwrap().to_string();
    assert!(refused.contains("not the disk"), "{refused}");
}

/// A dynamic disk with three blocks of 4 KiB; the table is at 1536.
fn small() -> Vec<u8> {
    let power = Arc::new(Power::default());
    let options = CreateOptions { block_bits: 12, ..CreateOptions::new(1 << 20) };
    let image = Vhd::create(Path::new("small"), power.clone(), &options, None).unwrap();
    for number in 0..3u64 {
        image.write(number << 12, &WriteFrom(&[number as u8 + 1; 4096])).unwrap();
    }
    drop(image);
    power.cut(&[], power.moment(), || 255)
}

fn read(bytes: Vec<u8>) -> Result<Header, Error> {
    Vhd::read_header(Path::new("bad"), &Power::new(bytes))
}

#[test]
fn damage_is_found_refused_and_repaired() {
    let mut bytes = small();
    let first: [u8; 4] = bytes[1536..1540].try_into().unwrap();
    bytes[1540..1544].copy_from_slice(&[0x7f; 4]);
    bytes[1548..1552].copy_from_slice(&[0, 0, 0, 3]);
    bytes[1552..1556].copy_from_slice(&first);
    let storage = Arc::new(Power::new(bytes));
    let header = Vhd::read_header(Path::new("bad"), storage.as_ref()).unwrap();
    let image = Vhd::open(Path::new("bad"), storage, header, None).unwrap();
    let mut buffer = [0; 512];
    assert!(image.read(4096, &ReadInto::new(&mut buffer)).is_err());
    assert!(image.write(1 << 19, &WriteFrom(&[1; 512])).is_err(), "nothing is written to a damaged image");
    let found = image.check(Repair::All).unwrap();
    assert_eq!((found.corruptions, found.corruptions_fixed, found.leaks), (0, 3, 0), "{found:?}");
    image.write(0, &WriteFrom(&[8; 4096])).unwrap();
    let disk = read_all(&image);
    assert!(disk[..4096] == [8; 4096] && disk[4 << 12..5 << 12] == [1; 4096], "a write shows in one place");
}

#[test]
fn a_lost_footer_is_written_again() {
    let mut bytes = small();
    bytes.truncate(bytes.len() - 512);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let check = |read_only: bool, repair: Repair| {
        let storage = test::reopen(file.path(), read_only);
        let header = Vhd::read_header(file.path(), storage.as_ref()).unwrap();
        Vhd::open(file.path(), storage, header, None).unwrap().check(repair).unwrap()
    };
    assert_eq!(check(true, Repair::Nothing).leaks, 1);
    assert!(check(false, Repair::Leaks).is_clean());
    assert!(check(true, Repair::Nothing).is_clean());
}

#[test]
fn a_guest_cannot_make_a_fixed_disk_another_one() {
    let power = Arc::new(Power::default());
    let options = CreateOptions { fixed: true, ..CreateOptions::new(1 << 20) };
    let image = Vhd::create(Path::new("fixed"), power.clone(), &options, None).unwrap();
    image.write(0, &WriteFrom(&small()[..8192])).unwrap();
    drop(image);
    let bytes = power.cut(&[], power.moment(), || 255);
    assert!(read(bytes).unwrap_err().to_string().contains("different disks"));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let good = small();
    assert!(read(good.clone()).is_ok());
    let end = good.len() - 512;
    // Without a right sum nothing is believed, in either place.
    for at in [(20, end + 20), (60, end + 60)] {
        let mut bytes = good.clone();
        (bytes[at.0], bytes[at.1]) = (0x55, 0x55);
        assert!(read(bytes).unwrap_err().to_string().contains("sum"));
    }
    let mut bytes = good.clone();
    bytes[512 + 30] ^= 1;
    assert!(read(bytes).unwrap_err().to_string().contains("sum"));
    assert!(read(vec![0; 100]).is_err());
    assert!(read(good[..512].to_vec()).is_err());
}

#[test]
fn sizes_and_tables_have_limits() {
    let create =
        |options: &CreateOptions| Vhd::create(Path::new("a"), Arc::new(Power::default()), options, None);
    assert!(create(&CreateOptions::new(CAPACITY_MAX + 512)).is_err());
    assert!(create(&CreateOptions { block_bits: 12, ..CreateOptions::new(1 << 40) }).is_err());
    let image = create(&CreateOptions::new(CAPACITY_MAX)).unwrap();
    image.write(CAPACITY_MAX - 512, &WriteFrom(&[1; 512])).unwrap();
    assert_eq!(image.block_status(0, CAPACITY_MAX).unwrap().len, CAPACITY_MAX - (2 << 20));
    assert!(image.resize(CAPACITY_MAX + 512).is_err());
}

#[test]
fn no_block_lies_on_the_header() {
    let mut bytes = small();
    // The table's first entry names the sector of the header of the dynamic disk.
    bytes[1536..1540].copy_from_slice(&1u32.to_be_bytes());
    let storage = Arc::new(Power::new(bytes.clone()));
    let header = Vhd::read_header(Path::new("bad"), storage.as_ref()).unwrap();
    let image = Vhd::open(Path::new("bad"), storage, header, None).unwrap();
    let mut buffer = [0; 512];
    assert_eq!(image.read(0, &ReadInto::new(&mut buffer)).unwrap_err().kind(), io::ErrorKind::InvalidData);
    // A table over the footer's copy.
    let mut bytes = small();
    bytes[512 + 16..512 + 24].fill(0);
    let header: [u8; 1024] = bytes[512..1536].try_into().unwrap();
    let sum = !header
        .iter()
        .enumerate()
        .filter(|(at, _)| !(36..40).contains(at))
        .map(|(_, byte)| u32::from(*byte))
        .sum::<u32>();
    bytes[512 + 36..512 + 40].copy_from_slice(&sum.to_be_bytes());
    assert!(read(bytes).unwrap_err().to_string().contains("over something else"));
}
