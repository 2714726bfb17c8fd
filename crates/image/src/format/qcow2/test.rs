//! qcow2 against a model in memory, and against qemu-img.

use super::*;
use crate::buffers::VecBuffers;
use crate::format::Raw;
use crate::storage::StorageFile;
use proptest::prelude::*;
use std::process::Command;

/// Runs qemu-img and answers what it printed; fails if it does.
fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output();
    let output = output.expect("qemu-img, which `cargo xtask setup` installs");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let buffers = VecBuffers::new(vec![0xee; disk.capacity() as usize]);
    disk.read(0, &buffers).unwrap();
    buffers.into_inner()
}

fn create(path: &Path, options: &CreateOptions, parts: Parts) -> Qcow2 {
    let storage = Arc::new(StorageFile::create(path, false).unwrap());
    Qcow2::create(path, storage, options, parts).unwrap()
}

fn open(path: &Path, read_only: bool, parts: Parts) -> Qcow2 {
    let storage = crate::format::mapped::test::reopen(path, read_only);
    let header = Qcow2::read_header(path, storage.as_ref()).unwrap();
    Qcow2::open(path, storage, header, parts).unwrap()
}

/// A file below, whose content is no zeroes, shorter than the disk.
fn base(directory: &Path, len: usize) -> (Arc<dyn Disk>, Vec<u8>) {
    let path = directory.join("base.raw");
    let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8 + 1).collect();
    std::fs::write(&path, &bytes).unwrap();
    (Arc::new(Raw::open(&path, true).unwrap()), bytes)
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Compress(u64, u8),
    Flush,
    Reopen,
    Snapshot,
    Apply,
    Delete,
    Resize(u64),
}

const SIZE: u64 = 3 << 20;

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SIZE / 512 * 2, 0u64..600, 0u64..3, 0u64..512).prop_map(|(at, sectors, odd, bytes)| {
        let (at, len) = (at * 256, sectors * 512);
        if odd == 0 { (at + bytes, len + bytes) } else { (at, len) }
    });
    (range, any::<u8>(), 0..20).prop_map(|((at, len), value, kind)| match kind {
        0..=7 => Step::Write(at, len, value),
        8 | 9 => Step::Zero(at, len, value & 1 == 0),
        10 | 11 => Step::Discard(at, len),
        12 | 13 => Step::Compress(at, value),
        14 => Step::Flush,
        15 => Step::Reopen,
        16 => Step::Snapshot,
        17 => Step::Apply,
        18 => Step::Delete,
        _ => Step::Resize(at / 512 * 512),
    })
}

fn options() -> impl Strategy<Value = (CreateOptions, bool)> {
    let shape = (9u32..=17, 0u32..=6, any::<bool>(), any::<bool>(), any::<bool>());
    (shape, any::<bool>(), 0..6).prop_map(
        |((cluster_bits, refcount_order, lazy_refcounts, zstd, below), sub, old)| {
            let version = if old == 0 { 2 } else { 3 };
            let new = version == 3;
            let options = CreateOptions {
                version,
                cluster_bits,
                refcount_order: if new { refcount_order } else { 4 },
                lazy_refcounts: lazy_refcounts && new,
                extended_l2: sub && new && cluster_bits >= 14,
                compression: if zstd && new { Compression::Zstd } else { Compression::Zlib },
                backing: below.then(|| ("base.raw".to_owned(), "raw".to_owned())),
                ..CreateOptions::new(SIZE)
            };
            (options, below)
        },
    )
}

struct Model {
    bytes: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

struct Play {
    path: PathBuf,
    below: Option<Arc<dyn Disk>>,
    image: Option<Qcow2>,
    model: Model,
    names: u32,
}

impl Play {
    fn parts(&self) -> Parts {
        Parts { backing: self.below.clone(), data: None }
    }

    fn image(&self) -> &Qcow2 {
        self.image.as_ref().unwrap()
    }

    fn clip(&self, at: u64, len: u64) -> (u64, u64, std::ops::Range<usize>) {
        let at = at.min(self.image().capacity());
        let len = len.min(self.image().capacity() - at);
        (at, len, at as usize..(at + len) as usize)
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(at, len, value) => {
                let (at, len, range) = self.clip(at, len);
                let bytes: Vec<u8> = (0..len).map(|i| value.wrapping_add((i / 512) as u8)).collect();
                self.image().write(at, &VecBuffers::new(bytes.clone())).unwrap();
                self.model.bytes[range].copy_from_slice(&bytes);
            }
            Step::Zero(at, len, unmap) => {
                let (at, len, range) = self.clip(at, len);
                self.image().write_zeroes(at, len, unmap).unwrap();
                self.model.bytes[range].fill(0);
            }
            Step::Discard(at, len) => {
                let (at, len, range) = self.clip(at, len);
                self.image().discard(at, len).unwrap();
                let mut now = vec![0; range.len()];
                self.image().read(at, &crate::ReadInto::new(&mut now)).unwrap();
                for (model, now) in self.model.bytes[range].iter_mut().zip(now) {
                    assert!(now == 0 || now == *model, "a discard has made something new");
                    *model = now;
                }
            }
            Step::Compress(at, value) => self.compress(at, value),
            Step::Flush => self.image().flush().unwrap(),
            Step::Reopen => {
                drop(self.image.take());
                self.image = Some(open(&self.path, false, self.parts()));
            }
            Step::Snapshot => {
                self.names += 1;
                let name = format!("s{}", self.names);
                match self.image().snapshot(&name) {
                    Ok(()) => self.model.snapshots.push((name, self.model.bytes.clone())),
                    // Narrow refcounts have no room.
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
                }
            }
            Step::Apply => {
                let Some((name, bytes)) = self.model.snapshots.last().cloned() else { return };
                match self.image().apply_snapshot(&name) {
                    Ok(()) => self.model.bytes = bytes,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
                }
            }
            Step::Delete => {
                if self.model.snapshots.is_empty() {
                    return;
                }
                let (name, _) = self.model.snapshots.remove(0);
                self.image().delete_snapshot(&name).unwrap();
            }
            Step::Resize(to) => {
                if self.image().resize(to).is_ok() {
                    self.model.bytes.resize(to as usize, 0);
                }
            }
        }
    }

    fn compress(&mut self, at: u64, value: u8) {
        let cluster = self.image().header().cluster_size();
        let (at, len, _) = self.clip(at / cluster * cluster, cluster);
        if len == 0 {
            return;
        }
        let mut bytes: Vec<u8> = (0..len).map(|i| value ^ (i / 64) as u8).collect();
        self.model.bytes[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        bytes.resize(cluster as usize, 0);
        let mut deflater = self.image().deflater().unwrap();
        self.image().write_compressed(at, &bytes, &mut deflater).unwrap();
    }
}

fn play(options: &CreateOptions, below: bool, steps: &[Step]) {
    let directory = tempfile::tempdir().unwrap();
    let (disk, bytes) = base(directory.path(), 2_000_000);
    let path = directory.path().join("top.qcow2");
    let mut model = if below { bytes } else { Vec::new() };
    model.resize(SIZE as usize, 0);
    let below = below.then_some(disk);
    let image = create(&path, options, Parts { backing: below.clone(), data: None });
    let model = Model { bytes: model, snapshots: Vec::new() };
    let mut play = Play { path: path.clone(), below, image: Some(image), model, names: 0 };
    for step in steps {
        play.step(step);
        assert!(read_all(play.image()) == play.model.bytes, "after {step:?}");
    }
    let found = play.image().check(Repair::Nothing).unwrap();
    assert!(found.is_clean(), "{found:?}");
    drop(play.image.take());
    let found = open(&path, true, play.parts()).check(Repair::Nothing).unwrap();
    assert!(found.is_clean(), "closed: {found:?}");
    judge(directory.path(), &path, &play.model);
}

/// qemu-img finds nothing wrong and reads what the model has.
fn judge(directory: &Path, path: &Path, model: &Model) {
    let path = path.to_str().unwrap();
    qemu_img(&["check", "-f", "qcow2", path]);
    let raw = directory.join("model.raw");
    std::fs::write(&raw, &model.bytes).unwrap();
    if !model.bytes.is_empty() {
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", path, raw.to_str().unwrap()]);
    }
    // qemu-img gives a snapshot the size that the disk has now.
    if let Some((name, bytes)) = model.snapshots.first().filter(|(_, bytes)| bytes.len() == model.bytes.len())
    {
        let copy = directory.join("snapshot.raw");
        qemu_img(&["convert", "-l", name, "-f", "qcow2", "-O", "raw", path, copy.to_str().unwrap()]);
        assert!(&std::fs::read(copy).unwrap() == bytes, "snapshot {name}");
    }
}

/// How many cases a test tries; `IMAGE_TEST_CASES` multiplies them for long runs.
pub fn cases(usual: u32) -> u32 {
    let times = std::env::var("IMAGE_TEST_CASES").ok().and_then(|times| times.parse().ok());
    usual * times.unwrap_or(1)
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::with_cases(cases(32)) })]

    #[test]
    fn an_image_is_a_disk_and_qemu_agrees(
        (options, below) in options(),
        steps in prop::collection::vec(step(), 1..25),
    ) {
        play(&options, below, &steps);
    }
}

/// Many threads on one image: each owns every fourth sector of the disk, so that their requests share clusters and
/// tables all the time, and none may see another's bytes in its own.
#[test]
fn threads_do_not_disturb_each_other() {
    for (bits, extended_l2, below) in [(12, false, false), (16, false, true), (16, true, true)] {
        let directory = tempfile::tempdir().unwrap();
        let (disk, bytes) = base(directory.path(), 2_000_000);
        let path = directory.path().join("top.qcow2");
        let backing = below.then(|| ("base.raw".to_owned(), "raw".to_owned()));
        let options = CreateOptions { cluster_bits: bits, extended_l2, backing, ..CreateOptions::new(SIZE) };
        let parts = Parts { backing: below.then_some(disk), data: None };
        let image = create(&path, &options, parts);
        let mut first = if below { bytes } else { Vec::new() };
        first.resize(SIZE as usize, 0);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (image, first) = (&image, &first);
                scope.spawn(move || one_of_many(image, first, thread));
            }
            scope.spawn(|| {
                for round in 0..6 {
                    image.flush().unwrap();
                    image.snapshot(&format!("s{round}")).unwrap();
                    std::thread::yield_now();
                }
                image.delete_snapshot("s2").unwrap();
            });
        });
        let found = image.check(Repair::Nothing).unwrap();
        assert!(found.is_clean(), "{found:?}");
        let content = read_all(&image);
        drop(image);
        let model = Model { bytes: content, snapshots: Vec::new() };
        judge(directory.path(), &path, &model);
    }
}

fn one_of_many(image: &Qcow2, first: &[u8], thread: u64) {
    let mut mine: std::collections::HashMap<u64, u8> = std::collections::HashMap::new();
    let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for round in 0..800u64 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let sector = random % (SIZE / 2048) * 4 + thread;
        let at = sector * 512;
        let mut bytes = [0xee; 512];
        image.read(at, &crate::ReadInto::new(&mut bytes)).unwrap();
        match mine.get(&sector) {
            Some(value) => assert!(bytes == [*value; 512], "sector {sector}"),
            None => assert!(bytes[..] == first[at as usize..at as usize + 512], "sector {sector}"),
        }
        let value = (round % 255) as u8 + 1;
        if round % 7 == 0 {
            image.write_zeroes(at, 512, true).unwrap();
            mine.insert(sector, 0);
        } else {
            image.write(at, &crate::WriteFrom(&[value; 512])).unwrap();
            mine.insert(sector, value);
        }
    }
    for (sector, value) in mine {
        let mut bytes = [0xee; 512];
        image.read(sector * 512, &crate::ReadInto::new(&mut bytes)).unwrap();
        assert!(bytes == [value; 512], "sector {sector} at the end");
    }
}

#[test]
fn an_external_data_file_is_a_raw_image() {
    let directory = tempfile::tempdir().unwrap();
    let (path, data) = (directory.path().join("top.qcow2"), directory.path().join("data.raw"));
    let options = CreateOptions {
        data_file: Some((data.to_str().unwrap().to_owned(), true)),
        ..CreateOptions::new(SIZE)
    };
    let storage = Arc::new(StorageFile::create(&data, false).unwrap());
    let image = create(&path, &options, Parts { backing: None, data: Some(storage) });
    image.write(70_000, &crate::WriteFrom(&[7; 100_000])).unwrap();
    image.write_zeroes(80_000, 70_000, true).unwrap();
    image.discard(0, 65536).unwrap();
    let content = read_all(&image);
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    drop(image);
    assert!(std::fs::read(&data).unwrap() == content);
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", path.to_str().unwrap(), data.to_str().unwrap()]);
    qemu_img(&["check", path.to_str().unwrap()]);
}

#[test]
fn preallocated_images_are_sound() {
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for extended_l2 in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("top.qcow2");
            let options = CreateOptions { preallocation: how, extended_l2, ..CreateOptions::new(SIZE) };
            let image = create(&path, &options, Parts::default());
            assert!(read_all(&image).iter().all(|byte| *byte == 0));
            image.write(5000, &crate::WriteFrom(&[1; 5000])).unwrap();
            let found = image.check(Repair::Nothing).unwrap();
            assert!(found.is_clean() && found.allocated_clusters == SIZE / 65536, "{found:?}");
            drop(image);
            qemu_img(&["check", path.to_str().unwrap()]);
        }
    }
}

/// What qemu-img makes in all shapes, and what it says of it.
#[test]
fn images_of_qemu_are_read_and_written() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    let bytes: Vec<u8> =
        (0..SIZE).map(|at| if at / 200_000 % 3 == 0 { 0 } else { (at / 700) as u8 }).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let shapes = [
        "compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=2M",
        "compression_type=zstd",
        "extended_l2=on",
    ];
    for (shape, compressed) in shapes.iter().flat_map(|shape| [(shape, false), (shape, true)]) {
        let path = directory.path().join("top.qcow2");
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", shape];
        if compressed {
            arguments.push("-c");
        }
        arguments.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
        qemu_img(&arguments);
        let image = open(&path, false, Parts::default());
        assert!(read_all(&image) == bytes, "{shape} {compressed}");
        let found = image.check(Repair::Nothing).unwrap();
        assert!(found.is_clean(), "{shape} {compressed} {found:?}");
        image.write(100_000, &crate::WriteFrom(&[9; 77_777])).unwrap();
        image.discard(0, SIZE / 2).unwrap();
        let content = read_all(&image);
        drop(image);
        judge(directory.path(), &path, &Model { bytes: content, snapshots: Vec::new() });
    }
}

/// The header names the table of refcounts where it is, also after it had to grow and something else of the header changes.
#[test]
fn a_header_that_is_written_again_knows_the_grown_refcount_table() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("top.qcow2");
    let options = CreateOptions { cluster_bits: 9, refcount_order: 6, ..CreateOptions::new(SIZE) };
    let image = create(&path, &options, Parts::default());
    let before = image.header().reftable_offset;
    image.write(0, &VecBuffers::new(vec![5; SIZE as usize])).unwrap();
    image.flush().unwrap();
    assert_ne!(image.header().reftable_offset, before, "the table has grown");
    image.set_backing(Some(("base.raw".into(), "raw".into()))).unwrap();
    drop(image);
    let image = open(&path, true, Parts::default());
    let found = image.check(Repair::Nothing).unwrap();
    assert!(found.is_clean(), "{found:?}");
    assert!(read_all(&image).iter().all(|byte| *byte == 5));
}

/// However often tables are named, each is walked once.
#[test]
fn a_check_of_an_image_that_names_one_table_all_the_time_ends() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("top.qcow2");
    let image = create(&path, &CreateOptions::new(1 << 40), Parts::default());
    image.write(0, &VecBuffers::new(vec![5; 512])).unwrap();
    image.flush().unwrap();
    let (l1, table) = (image.header().l1_offset, image.map.l1().words()[0]);
    drop(image);
    // A disk of 64 TiB, all of it the same 512 MiB.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    use std::os::unix::fs::FileExt;
    let end = file.metadata().unwrap().len().next_multiple_of(65536);
    file.write_all_at(&table.to_be_bytes().repeat(1 << 17), end).unwrap();
    file.write_all_at(&(1u64 << 46).to_be_bytes(), 24).unwrap();
    file.write_all_at(&(1u32 << 17).to_be_bytes(), 36).unwrap();
    file.write_all_at(&end.to_be_bytes(), 40).unwrap();
    assert_ne!(l1, end);
    let began = std::time::Instant::now();
    let found = open(&path, true, Parts::default()).check(Repair::Nothing).unwrap();
    assert!(found.corruptions > 0 && began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
}

/// A bitmap of qemu-img's records what is written here, says meanwhile that it is in use, and qemu-img finds it sound.
#[test]
fn bitmaps_record_what_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("top.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "3M"]);
    qemu_img(&["bitmap", "--add", "-g", "4096", name, "fine"]);
    qemu_img(&["bitmap", "--add", "--disable", name, "off"]);
    let image = open(&path, false, Parts::default());
    image.write(70_000, &VecBuffers::new(vec![7; 10_000])).unwrap();
    image.discard(1 << 20, 1 << 16).unwrap();
    image.flush().unwrap();
    let flags =
        || image.bitmaps().unwrap().iter().map(|one| (one.records(), one.is_stale())).collect::<Vec<_>>();
    assert_eq!(flags(), [(true, true), (false, false)], "in use while it is written");
    assert!(image.bitmap_bits("fine").is_err());
    image.close().unwrap();
    assert_eq!(flags(), [(true, false), (false, false)]);
    // It can be used on, and the mark comes back.
    image.write(2 << 20, &VecBuffers::new(vec![7; 512])).unwrap();
    assert_eq!(flags()[0], (true, true));
    image.resize(5 << 20).unwrap_err();
    image.change_bitmap("off", Change::Remove).unwrap();
    image.resize(5 << 20).unwrap();
    drop(image);
    qemu_img(&["check", name]);
    let info = qemu_img(&["info", name]);
    assert!(
        info.contains("name: fine") && info.contains("granularity: 4096") && !info.contains("in-use"),
        "{info}"
    );
    let image = open(&path, true, Parts::default());
    let bits = image.bitmap_bits("fine").unwrap();
    for granule in 0..(5 << 20) / 4096u64 {
        let at = granule * 4096;
        let touched = (69_632..81_920).contains(&at)
            || (1 << 20..(1 << 20) + 65536).contains(&at)
            || at == 2 << 20
            || at >= 3 << 20;
        assert_eq!(bits.contains(at), touched, "at {at}");
    }
    // A crash leaves a bitmap that says so, and everything else sound.
    drop(image);
    let copy = directory.path().join("crashed.qcow2");
    let image = open(&path, false, Parts::default());
    image.write(0, &VecBuffers::new(vec![1; 512])).unwrap();
    image.flush().unwrap();
    std::fs::copy(&path, &copy).unwrap();
    drop(image);
    qemu_img(&["check", copy.to_str().unwrap()]);
    let crashed = open(&copy, false, Parts::default());
    assert!(crashed.bitmaps().unwrap()[0].is_stale());
    assert!(crashed.change_bitmap("fine", Change::Clear).is_err());
    crashed.change_bitmap("fine", Change::Remove).unwrap();
    assert!(crashed.bitmaps().unwrap().is_empty() && crashed.check(Repair::Nothing).unwrap().is_clean());
}

#[test]
fn bitmaps_are_made_merged_and_cleared_as_by_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("top.qcow2");
    let name = path.to_str().unwrap();
    let image =
        create(&path, &CreateOptions { cluster_bits: 12, ..CreateOptions::new(64 << 20) }, Parts::default());
    image.change_bitmap("a", Change::Add(Some(512))).unwrap();
    image.change_bitmap("b", Change::Add(None)).unwrap();
    assert!(image.change_bitmap("a", Change::Add(None)).is_err());
    assert!(image.change_bitmap("c", Change::Add(Some(1000))).is_err());
    image.write(5 << 20, &VecBuffers::new(vec![7; 3 << 20])).unwrap();
    image.change_bitmap("b", Change::Record(false)).unwrap();
    image.write(0, &VecBuffers::new(vec![7; 512])).unwrap();
    image.close().unwrap();
    let other = image.bitmap_bits("a").unwrap();
    assert!(other.contains(0) && other.contains(7 << 20) && !other.contains(9 << 20));
    assert!(
        !image.bitmap_bits("b").unwrap().contains(0) && image.bitmap_bits("b").unwrap().contains(6 << 20)
    );
    image.change_bitmap("b", Change::Merge(&other)).unwrap();
    assert!(
        image.bitmap_bits("b").unwrap().contains(4095) && !image.bitmap_bits("b").unwrap().contains(4096)
    );
    image.change_bitmap("a", Change::Clear).unwrap();
    assert!(!image.bitmap_bits("a").unwrap().contains(0));
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    drop(image);
    qemu_img(&["check", name]);
    qemu_img(&["bitmap", "--merge", "b", name, "a"]);
    let image = open(&path, true, Parts::default());
    let bits = image.bitmap_bits("a").unwrap();
    assert!(bits.contains(4095) && bits.contains(7 << 20) && !bits.contains(9 << 20));
}

/// In memory, open to be written.
fn in_memory(options: &CreateOptions) -> (Arc<crate::storage::power::Power>, Qcow2) {
    let power = Arc::new(crate::storage::power::Power::default());
    drop(Qcow2::create(Path::new("memory"), power.clone(), options, Parts::default()).unwrap());
    (power.clone(), open_memory(power))
}

fn open_memory(power: Arc<crate::storage::power::Power>) -> Qcow2 {
    let header = Qcow2::read_header(Path::new("memory"), power.as_ref()).unwrap();
    Qcow2::open(Path::new("memory"), power, header, Parts::default()).unwrap()
}

/// Neither a change of bitmaps that is refused, nor a failure in the middle of one, ends the recording of the others.
#[test]
fn bitmaps_record_on_after_what_fails() {
    let (power, image) = in_memory(&CreateOptions::new(4 << 20));
    image.change_bitmap("a", Change::Add(None)).unwrap();
    image.write(0, &VecBuffers::new(vec![7; 512])).unwrap();
    image.change_bitmap("a", Change::Add(None)).unwrap_err();
    image.write(1 << 20, &VecBuffers::new(vec![7; 512])).unwrap();
    image.flush().unwrap();
    // The host has no space when the disk is to be cut: it stays as long as it is, and its end is watched on.
    image.write(3 << 20, &VecBuffers::new(vec![7; 512])).unwrap();
    image.flush().unwrap();
    power.set_full(true);
    image.resize(1 << 20).unwrap_err();
    power.set_full(false);
    assert_eq!(image.capacity(), 4 << 20);
    image.write(2 << 20, &VecBuffers::new(vec![7; 512])).unwrap();
    image.close().unwrap();
    let bits = image.bitmap_bits("a").unwrap();
    for at in 0..4u64 {
        assert!(bits.contains(at << 20), "at {at} MiB");
    }
    // What fails while bitmaps are written back leaves none that is believed and says too little.
    image.write(512 << 10, &VecBuffers::new(vec![7; 512])).unwrap();
    image.flush().unwrap();
    power.set_full(true);
    image.close().unwrap_err();
    power.set_full(false);
    image.write(1536 << 10, &VecBuffers::new(vec![7; 512])).unwrap();
    image.close().unwrap();
    let there = &image.bitmaps().unwrap()[0];
    assert!(there.is_stale() || image.bitmap_bits("a").unwrap().contains(1536 << 10));
}

#[test]
fn bitmaps_of_other_sizes_are_not_merged() {
    let (_, image) = in_memory(&CreateOptions::new(4 << 20));
    let (_, other) = in_memory(&CreateOptions::new(8 << 20));
    for image in [&image, &other] {
        image.change_bitmap("a", Change::Add(None)).unwrap();
    }
    let error = image.change_bitmap("a", Change::Merge(&other.bitmap_bits("a").unwrap())).unwrap_err();
    assert!(error.to_string().contains("different sizes"), "{error}");
}

/// Names and extensions of the header change as a whole: whatever a disk keeps, the old header or the new one is there.
#[test]
fn at_every_moment_the_old_header_or_the_new_one_holds() {
    for (cluster_bits, longest) in [(9, 200), (10, 250), (12, 1023)] {
        let names = ["a".repeat(longest), "b".repeat(longest - 90), "c".repeat(longest - 3), "short".into()];
        let options = CreateOptions {
            cluster_bits,
            backing: Some((names[0].clone(), "raw".into())),
            ..CreateOptions::new(1 << 20)
        };
        let first = Arc::new(crate::storage::power::Power::default());
        drop(Qcow2::create(Path::new("memory"), first.clone(), &options, Parts::default()).unwrap());
        let start = first.cut(&[], first.moment(), || 255);
        let power = Arc::new(crate::storage::power::Power::new(start.clone()));
        let image = open_memory(power.clone());
        for name in &names[1..] {
            image.set_backing(Some((name.clone(), "qcow2".into()))).unwrap();
            image.change_bitmap(&name[..2], Change::Add(None)).unwrap();
        }
        image.change_bitmap("bb", Change::Remove).unwrap();
        let mut seen = std::collections::HashSet::new();
        for (moment, seed) in
            (0..=power.moment()).flat_map(|moment| (1u64..4).map(move |seed| (moment, seed)))
        {
            let mut state = seed;
            let bytes = power.cut(&start, moment, || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state >> 33
            });
            let power = crate::storage::power::Power::new(bytes);
            let header = Qcow2::read_header(Path::new("memory"), &power).unwrap();
            let name = header.backing.unwrap();
            assert!(names.contains(&name), "cut at {moment}: {name}");
            assert_eq!(header.backing_format.unwrap(), if name == names[0] { "raw" } else { "qcow2" });
            seen.insert((name, header.bitmaps.map_or(0, |bitmaps| bitmaps.count)));
        }
        assert_eq!(seen.len(), 7, "{seen:?}");
    }
}
