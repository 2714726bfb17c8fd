//! Raw and overlay disks against a plain array.

use super::*;
use crate::storage::{Access, File, OpenError};
use crate::{Disk, Error, Source, Target};
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

fn image(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    let (head, tail) = bytes.split_at_mut(len / 3);
    disk.read_at(offset, &[Target::new(head), Target::new(&mut []), Target::new(tail)]).unwrap();
    bytes
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let (_dir, path) = image(&[0; 512]);
    let writer = File::open(&path, Access::Write).unwrap();
    assert!(matches!(File::open(&path, Access::Read), Err(OpenError::InUse { .. })));
    assert!(matches!(File::open(&path, Access::Write), Err(OpenError::InUse { .. })));
    drop(writer);
    let _reader = File::open(&path, Access::Read).unwrap();
    let _another = File::open(&path, Access::Read).unwrap();
    assert!(matches!(File::open(&path, Access::Write), Err(OpenError::InUse { .. })));
}

#[test]
fn what_is_not_a_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(File::open(dir.path(), Access::Read), Err(OpenError::NotADisk { .. })));
    let missing = File::open(&dir.path().join("none"), Access::Read).unwrap_err();
    assert!(missing.to_string().contains("none"), "{missing}");
    assert!(matches!(missing, OpenError::Open { .. }));
}

#[test]
fn a_disk_is_whole_sectors() {
    let (_dir, path) = image(&[7; 700]);
    let disk = Raw::open(&path, Access::Write).unwrap();
    assert_eq!(disk.capacity(), 1024);
    let mut expected = [0; 512];
    expected[..188].fill(7);
    assert_eq!(read(&disk, 512, 512), expected);
    disk.write_at(512, &[Source::new(&[9; 512])], true).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    assert!(matches!(disk.read_at(1024, &[Target::new(&mut [0])]), Err(Error::Range { .. })));
    assert!(matches!(disk.write_at(u64::MAX, &[Source::new(&[0])], false), Err(Error::Range { .. })));
    disk.flush().unwrap();
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let (_dir, path) = image(&[7; 1024]);
    let disk = Raw::open(&path, Access::Read).unwrap();
    assert!(disk.is_read_only());
    assert!(matches!(disk.write_at(0, &[Source::new(&[0; 512])], false), Err(Error::ReadOnly)));
    assert!(matches!(disk.discard(0, 512), Err(Error::ReadOnly)));
    assert!(matches!(disk.write_zeroes(0, 512, true), Err(Error::ReadOnly)));
    disk.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [7; 1024]);
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let (_dir, path) = image(&vec![7; 1 << 20]);
    let disk = Raw::open(&path, Access::Write).unwrap();
    disk.flush().unwrap();
    let before = std::fs::metadata(&path).unwrap().blocks();
    disk.discard(0, 512 << 10).unwrap();
    assert!(std::fs::metadata(&path).unwrap().blocks() < before);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    assert_eq!(read(&disk, (512 << 10) - 4, 8), [0, 0, 0, 0, 7, 7, 7, 7]);
}

#[test]
fn more_pieces_than_one_call_takes() {
    let (_dir, path) = image(&[0; 8192]);
    let disk = Raw::open(&path, Access::Write).unwrap();
    let bytes: Vec<u8> = (0..6000u32).map(|i| i.to_le_bytes()[0]).collect();
    let pieces: Vec<_> = bytes.chunks(3).map(Source::new).collect();
    disk.write_at(100, &pieces, false).unwrap();
    assert_eq!(read(&disk, 100, 6000), bytes);
    let mut into = vec![0; 6000];
    let pieces: Vec<_> = into.chunks_mut(2).map(Target::new).collect();
    disk.read_at(100, &pieces).unwrap();
    assert_eq!(into, bytes);
}

const DISK: u64 = 40_000;

#[derive(Debug, Clone)]
enum Change {
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
}

fn change() -> impl Strategy<Value = Change> {
    let range = (0..DISK).prop_flat_map(|at| (Just(at), 0..=(DISK - at).min(13_000)));
    prop_oneof![
        3 => (range.clone(), any::<u8>()).prop_map(|((at, len), b)| Change::Write(at, len as usize, b | 1)),
        1 => (range, any::<bool>()).prop_map(|((at, len), unmap)| Change::Zero(at, len, unmap)),
    ]
}

fn same_as_an_array(disk: &dyn Disk, expected: &mut [u8], changes: &[Change]) {
    for change in changes {
        match *change {
            Change::Write(at, len, byte) => {
                let bytes = vec![byte; len];
                let (head, tail) = bytes.split_at(len / 2);
                disk.write_at(at, &[Source::new(head), Source::new(tail)], false).unwrap();
                expected[at as usize..][..len].copy_from_slice(&bytes);
            }
            Change::Zero(at, len, unmap) => {
                disk.write_zeroes(at, len, unmap).unwrap();
                expected[at as usize..][..len as usize].fill(0);
            }
        }
    }
    for (i, part) in expected.chunks(1777).enumerate() {
        assert!(read(disk, i as u64 * 1777, part.len()) == part, "chunk {i} differs");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn raw_is_an_array(changes in prop::collection::vec(change(), 0..20)) {
        let mut expected = vec![5; DISK as usize];
        let (_dir, path) = image(&expected);
        let disk = Raw::open(&path, Access::Write).unwrap();
        expected.resize(disk.capacity() as usize, 0);
        same_as_an_array(&disk, &mut expected, &changes);
    }

    #[test]
    fn an_overlay_is_an_array_over_a_base_that_never_changes(changes in prop::collection::vec(change(), 0..20)) {
        let start: Vec<u8> = (0..30_000u32).map(|i| (i / 100) as u8).collect();
        let (dir, path) = image(&start);
        let base = Arc::new(Raw::open(&path, Access::Read).unwrap());
        let disk = Overlay::new(base, dir.path(), DISK).unwrap();
        let mut expected = start.clone();
        expected.resize(disk.capacity() as usize, 0);
        same_as_an_array(&disk, &mut expected, &changes);
        prop_assert!(std::fs::read(&path).unwrap() == start);
        prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
