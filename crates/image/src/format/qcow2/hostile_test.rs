//! Small files that ask for much: what they name is walked once, and what is wrong with them is not kept.

use super::*;
use crate::endian::{bytes_be, put};
use crate::storage::StorageFile;
use std::time::{Duration, Instant};

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    let path = Path::new("hostile");
    let header = Qcow2::read_header(path, storage.as_ref()).unwrap();
    Qcow2::open(path, storage, header, Parts::default()).unwrap()
}

/// A new image in a sparse file, and where more can be put.
fn made(options: &CreateOptions) -> (Arc<StorageFile>, u64) {
    let file = Arc::new(StorageFile::private(tempfile::tempfile().unwrap(), 0));
    drop(Qcow2::create(Path::new("hostile"), file.clone(), options, Parts::default()).unwrap());
    let end = file.len().next_multiple_of(1 << options.cluster_bits);
    (file, end)
}

#[test]
fn blocks_that_count_what_is_behind_the_end_are_a_leak_each() {
    let options = CreateOptions { cluster_bits: 21, refcount_order: 0, ..CreateOptions::new(1 << 20) };
    let (file, end) = made(&options);
    let table = open(file.clone()).header().reftable_offset;
    // Sixteen million clusters each, none of which is there.
    for number in 0..4 {
        file.write_bytes(end + (number << 21), &[0xff; 1 << 21]).unwrap();
        file.write_bytes(table + (number + 2) * 8, &(end + (number << 21)).to_be_bytes()).unwrap();
    }
    let image = open(file);
    // The blocks are not counted themselves, either.
    let found = image.check(Repair::Nothing).unwrap();
    assert_eq!((found.leaks, found.corruptions), (4, 4), "{found:?}");
    let found = image.check(Repair::All).unwrap();
    assert!(found.is_clean() && found.leaks_fixed == 4, "{found:?}");
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
}

#[test]
fn tables_of_bitmaps_and_snapshots_are_walked_once() {
    let (file, end) = made(&CreateOptions::new(1 << 20));
    let (names, snapshots, table) = (2000u64, end + (1 << 20), end + (2 << 20));
    let mut directory = Vec::new();
    let mut list = Vec::new();
    for number in 0..names {
        let mut entry = [0; 32];
        put(&mut entry, 0, &table.to_be_bytes());
        put(&mut entry, 8, &(4u32 << 20).to_be_bytes());
        put(&mut entry, 12, &[0, 0, 0, 2, 1, 16, 0, 4]);
        put(&mut entry, 24, &(number as u32 + 0x6161_6161).to_be_bytes().map(|byte| byte & 0x7f));
        directory.extend(entry);
        let mut entry = [0; 48];
        put(&mut entry, 0, &table.to_be_bytes());
        put(&mut entry, 8, &(4u32 << 20).to_be_bytes());
        put(&mut entry, 12, &[0, 4, 0, 4]);
        put(&mut entry, 40, &(number as u32).to_be_bytes().map(|byte| byte & 0x7f));
        list.extend(entry);
    }
    file.write_bytes(end, &directory).unwrap();
    file.write_bytes(snapshots, &list).unwrap();
    file.set_len(table + (32 << 20)).unwrap();
    let mut header = Qcow2::read_header(Path::new("hostile"), file.as_ref()).unwrap();
    header.autoclear |= header::AUTOCLEAR_BITMAPS;
    header.bitmaps = Some(header::BitmapsExtension {
        count: names as u32,
        directory_len: directory.len() as u64,
        directory_offset: end,
    });
    header.snapshots = names as u32;
    header.snapshots_offset = snapshots;
    file.write_bytes(0, &header.encode().unwrap()).unwrap();
    let began = Instant::now();
    let image = open(file.clone());
    let found = image.check(Repair::Nothing).unwrap();
    assert!(found.corruptions >= 2 * names - 1, "{} corruptions", found.corruptions);
    // To record in all of them would take too much: they are given up.
    image.write(0, &crate::WriteFrom(&[1; 512])).unwrap();
    assert!(image.header().bitmaps.is_none());
    drop(image);
    // More than the format allows.
    header.bitmaps = header.bitmaps.map(|old| header::BitmapsExtension { count: 70_000, ..old });
    file.write_bytes(0, &header.encode().unwrap()).unwrap();
    let image = open(file);
    assert!(image.bitmaps().is_err() && image.check(Repair::Nothing).unwrap().corruptions > 0);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn tables_behind_the_end_take_no_memory() {
    let (file, end) = made(&CreateOptions::new(1 << 20));
    let words = 1u64 << 20;
    file.write_bytes(end, &bytes_be((0..words).map(|number| (number + 1) << 30))).unwrap();
    file.write_bytes(36, &(words as u32).to_be_bytes()).unwrap();
    file.write_bytes(40, &end.to_be_bytes()).unwrap();
    let image = open(file);
    let metadata = image.map.metadata.read().unwrap();
    assert!(metadata.words() < 64, "{}", metadata.words());
    assert!(metadata.contains(0) && metadata.contains(end >> 16));
}

#[test]
fn a_table_of_broken_entries_is_copied_and_cured_quickly() {
    let (file, end) = made(&CreateOptions { cluster_bits: 21, ..CreateOptions::new(1 << 40) });
    // Far behind what is given out next. The first entry is good; the table is not the image's alone, and so is copied.
    let end = end + (16 << 21);
    let table = bytes_be((0..1u64 << 18).map(|number| if number == 0 { 0 } else { 1 << 60 | number << 21 }));
    file.write_bytes(end, &table).unwrap();
    let l1 = open(file.clone()).header().l1_offset;
    file.write_bytes(l1, &end.to_be_bytes()).unwrap();
    let began = Instant::now();
    let image = open(file);
    image.write(0, &crate::WriteFrom(&[1; 512])).unwrap();
    image.flush().unwrap();
    let found = image.check(Repair::All).unwrap();
    assert!(found.is_clean() && found.corruptions_fixed > 200_000, "{found:?}");
    let mut bytes = [0; 512];
    image.read(0, &crate::ReadInto::new(&mut bytes)).unwrap();
    assert_eq!(bytes, [1; 512]);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_snapshot_that_cannot_be_taken_changes_no_count() {
    use crate::storage::power::Power;
    let file = Arc::new(Power::default());
    let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 20) };
    drop(Qcow2::create(Path::new("hostile"), file.clone(), &options, Parts::default()).unwrap());
    let bytes = file.cut(&[], file.moment(), || 0);
    let len = bytes.len().next_multiple_of(512) + 40 * 512;
    let device = Arc::new(Power::device([bytes.clone(), vec![0; len - bytes.len()]].concat()));
    let image = open(device);
    let mut written = 0;
    while image.write(written * 512, &crate::WriteFrom(&[7; 512])).is_ok() {
        written += 1;
    }
    assert!(written > 20);
    assert!(image.create_snapshot("a", 0, 0).is_err());
    let found = image.check(Repair::Nothing).unwrap();
    assert!(found.is_clean(), "{found:?}");
}
