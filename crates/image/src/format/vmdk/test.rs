//! VMDKs that qemu-img makes, whole and damaged.

use super::*;
use crate::format::Container;
use crate::format::mapped::test::{qemu_img, read_all, reopen, run};
use crate::storage::power::Power;
use proptest::prelude::*;

fn bytes_of_disk() -> Vec<u8> {
    let mut bytes = vec![0; 3 << 20];
    bytes[100_000..400_000].fill(7);
    (0..300_000).for_each(|at| bytes[2_000_000 + at] = (at * at / 7) as u8);
    bytes
}

/// A file that qemu-img makes of such a disk.
fn made(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("a.raw"), directory.path().join("a.vmdk"));
    std::fs::write(&raw, bytes_of_disk()).unwrap();
    let (raw, path) = (raw.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", options, raw, path]);
    std::fs::read(path).unwrap()
}

fn open(bytes: Vec<u8>) -> Result<Vmdk, Error> {
    let storage: Arc<dyn Storage> = Arc::new(Power::new(bytes));
    let header = Vmdk::read_header(Path::new("a"), storage.as_ref())?;
    Ok(Vmdk::open(Path::new("a"), storage, header, None))
}

#[test]
fn what_qemu_makes_is_read() {
    for options in ["subformat=monolithicSparse", "subformat=streamOptimized", "zeroed_grain=on"] {
        let image = open(made(options)).unwrap();
        assert!(read_all(&image) == bytes_of_disk(), "{options}");
        let found = image.check(Repair::Nothing).unwrap();
        assert!(found.is_clean() && found.allocated_clusters > 5, "{found:?}");
        assert_eq!(found.compressed_clusters > 0, options.contains("stream"));
        assert!(image.write(0, &crate::WriteFrom(&[1; 512])).is_err());
        let mut at = 0;
        while at < image.capacity() {
            let status = image.block_status(at, image.capacity() - at).unwrap();
            assert!(
                status.compressed == (status.content == crate::Content::Data && options.contains("stream"))
            );
            at += status.len;
        }
    }
}

#[test]
fn a_child_shows_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    qemu_img(&["create", "-q", "-f", "vmdk", &path("base.vmdk"), "8M"]);
    run("qemu-io", &["-f", "vmdk", "-c", "write -P 5 0 2M", &path("base.vmdk")]);
    qemu_img(&["create", "-q", "-f", "vmdk", "-b", &path("base.vmdk"), "-F", "vmdk", &path("top.vmdk")]);
    run("qemu-io", &["-f", "vmdk", "-c", "write -P 6 1M 64k", &path("top.vmdk")]);
    let how =
        crate::OpenOptions { format: Some(Format::Vmdk), read_only: true, ..crate::OpenOptions::default() };
    let image = crate::Image::open(Path::new(&path("top.vmdk")), how).unwrap();
    let bytes = read_all(image.disk.as_ref());
    assert!(bytes[..1 << 20] == [5; 1 << 20] && bytes[1 << 20..(1 << 20) + 65536] == [6; 65536]);
    assert!(bytes[2 << 20..].iter().all(|byte| *byte == 0));
    assert_eq!(image.disk.block_status(0, 512).unwrap().depth, 1);
    drop(image);
    drop(reopen(Path::new(&path("top.vmdk")), false));
    let refused = crate::OpenOptions { read_only: false, ..how };
    let text = crate::Image::open(Path::new(&path("top.vmdk")), refused).err().unwrap().to_string();
    assert!(text.contains("convert"), "{text}");
    // A parent that has changed since, or another one, has another identity.
    run("qemu-io", &["-f", "vmdk", "-c", "write -P 9 0 64k", &path("base.vmdk")]);
    let text = crate::Image::open(Path::new(&path("top.vmdk")), how).err().unwrap().to_string();
    assert!(text.contains("changed since"), "{text}");
}

#[test]
fn a_child_that_names_no_parent_is_refused() {
    let mut bytes = made("subformat=monolithicSparse");
    let name = b"parentCID=ffffffff";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at..at + name.len()].copy_from_slice(b"parentCID=12345678");
    let error = open(bytes).err().unwrap().to_string();
    assert!(error.contains("does not name"), "{error}");
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let good = made("subformat=monolithicSparse");
    for (at, word, what) in [
        (0usize, 7u32, "begin"),
        (4, 9, "version"),
        (20, 5, "grains"),
        (44, 77, "tables"),
        (56, 0x7fff_ffff, "directory"),
        (16, 0xff, "size"),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        let error = open(bytes).err().unwrap().to_string();
        assert!(error.contains(what), "{error}");
    }
    assert!(open(TEXT_MAGIC.to_vec()).err().unwrap().to_string().contains("names other files"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn damage_is_an_error_and_nothing_else(
        stream: bool,
        changes in prop::collection::vec((0usize..70_000, any::<u8>()), 1..30),
    ) {
        static FILES: std::sync::OnceLock<[Vec<u8>; 2]> = std::sync::OnceLock::new();
        let files =
            FILES.get_or_init(|| [made("subformat=monolithicSparse"), made("subformat=streamOptimized")]);
        let mut bytes = files[usize::from(stream)].clone();
        for (at, value) in changes {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        if let Ok(image) = open(bytes) {
            let mut buffer = vec![0; 1 << 16];
            for at in 0..48u64 {
                let _ = image.read(at << 16, &crate::ReadInto::new(&mut buffer));
            }
            let _ = image.check(Repair::Nothing);
        }
    }
}

#[test]
fn a_directory_that_names_one_table_all_the_time_is_looked_at_once() {
    let mut bytes = made("subformat=monolithicSparse");
    let place = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    // Another directory behind the file, for a disk of 2 TiB: all of it the first table.
    let (grain, directory) = (place(20) * 512, place(56) as usize * 512);
    let (entries, table) = (u64::from(le32(&bytes, 44)), bytes[directory..directory + 4].to_vec());
    let (spans, end) = (65_536u64, bytes.len().next_multiple_of(512));
    bytes.resize(end, 0);
    bytes.extend(table.repeat(spans as usize));
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes[12..20].copy_from_slice(&(spans * entries * grain / 512).to_le_bytes());
    bytes[56..64].copy_from_slice(&(end as u64 / 512).to_le_bytes());
    let began = std::time::Instant::now();
    let found = open(bytes).unwrap().check(Repair::Nothing).unwrap();
    assert_eq!(found.corruptions, spans - 1);
    assert!(found.allocated_clusters > 5 && began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
}
