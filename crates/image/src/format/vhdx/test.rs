//! VHDXs that qemu-img makes, whole and damaged.

use super::*;
use crate::disk::Disk;
use crate::format::Container;
use crate::format::mapped::test::{qemu_img, read_all};
use crate::storage::power::Power;
use proptest::prelude::*;

fn bytes_of_disk() -> Vec<u8> {
    let mut bytes = vec![0; 9 << 20];
    bytes[100_000..400_000].fill(7);
    bytes[5 << 20..6 << 20].fill(9);
    bytes
}

fn made(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("a.raw"), directory.path().join("a.vhdx"));
    std::fs::write(&raw, bytes_of_disk()).unwrap();
    let (raw, path) = (raw.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path]);
    std::fs::read(path).unwrap()
}

fn open(bytes: Vec<u8>) -> Result<Vhdx, Error> {
    let storage: Arc<dyn Storage> = Arc::new(Power::new(bytes));
    let header = Vhdx::read_header(Path::new("a"), storage.as_ref())?;
    Ok(Vhdx::open(Path::new("a"), storage, header))
}

#[test]
fn what_qemu_makes_is_read() {
    for options in ["subformat=dynamic,block_size=1M", "subformat=fixed", "block_size=8M,block_state_zero=on"]
    {
        let image = open(made(options)).unwrap();
        assert!(read_all(&image) == bytes_of_disk(), "{options}");
        assert!(image.check(Repair::Nothing).unwrap().is_clean());
        assert!(image.write(0, &crate::WriteFrom(&[1; 512])).is_err());
    }
}

#[test]
fn entries_of_bitmaps_are_stepped_over() {
    let mut file = made("subformat=dynamic,block_size=1M");
    file.truncate(1 << 20);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.vhdx");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", name, "20G"]);
    crate::format::mapped::test::run("qemu-io", &["-f", "vhdx", "-c", "write -P 3 10G 3M", name]);
    let how = crate::OpenOptions { read_only: true, ..crate::OpenOptions::default() };
    let image = crate::Image::open(&path, how).unwrap();
    let mut bytes = vec![0; 5 << 20];
    image.disk.read((10 << 30) - (1 << 20), &crate::ReadInto::new(&mut bytes)).unwrap();
    let (before, rest) = bytes.split_at(1 << 20);
    let (inside, behind) = rest.split_at(3 << 20);
    assert!(before.iter().chain(behind).all(|byte| *byte == 0) && inside.iter().all(|byte| *byte == 3));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let good = made("subformat=dynamic");
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        open(bytes).err().unwrap().to_string()
    };
    assert!(refused(&|bytes| bytes[0] = 0).contains("begin"));
    let broken = |bytes: &mut Vec<u8>| (bytes[(64 << 10) + 9], bytes[(128 << 10) + 9]) = (0x33, 0x33);
    assert!(refused(&broken).contains("headers"));
    let broken = |bytes: &mut Vec<u8>| (bytes[(192 << 10) + 20], bytes[(256 << 10) + 20]) = (0x33, 0x33);
    assert!(refused(&broken).contains("regions"));
    // A log that was not replayed.
    let logged = |bytes: &mut Vec<u8>| {
        for at in [64usize << 10, 128 << 10] {
            bytes[at + 48] = 1;
            bytes[at + 4..at + 8].fill(0);
            let sum = crc32c::crc32c(&bytes[at..at + 4096]);
            bytes[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
    };
    assert!(refused(&logged).contains("log"));
    assert!(refused(&|bytes| bytes.truncate(300 << 10)).contains("outside"));
    // Metadata that must be known and is not: the identity of one item, the size of physical sectors.
    let strange = |bytes: &mut Vec<u8>| {
        let known = 0xcda3_48c7_u32.to_le_bytes();
        let at = bytes.windows(4).position(|word| word == known).unwrap();
        bytes[at] ^= 1;
    };
    assert!(refused(&strange).contains("metadata"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]

    #[test]
    fn damage_is_an_error_and_nothing_else(changes in prop::collection::vec((0usize..3 << 20, any::<u8>()), 1..30)) {
        static FILE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let mut bytes = FILE.get_or_init(|| made("subformat=dynamic,block_size=1M")).clone();
        for (at, value) in changes {
            // Metadata and table are at 2 and 3 MiB: most of it there.
            let at = if value & 1 == 0 { at } else { (2 << 20) + at % 4096 + (at & 1) * (1 << 20) };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(image) = open(bytes) {
            let mut buffer = vec![0; 1 << 16];
            for at in 0..144u64 {
                let _ = image.read(at << 16, &crate::ReadInto::new(&mut buffer));
            }
            let _ = image.check(Repair::Nothing);
        }
    }
}
