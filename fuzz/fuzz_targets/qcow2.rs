//! qcow2 images that were sound until somebody changed bytes in them: opened, read, written, checked and repaired. Nothing
//! may panic, hang or take memory that the file does not justify, and a repair leaves an image in which a check finds nothing.
#![no_main]

use image::format::Repair;
use image::format::qcow2::{Change, Compression, CreateOptions, Parts, Qcow2};
use image::{Disk, ReadInto, WriteFrom};
use std::path::Path;
use std::sync::Arc;
use yado_fuzz::Input;
use yado_fuzz::file::Memory;

const DISK: u64 = 256 << 10;

fn options(input: &mut Input<'_>) -> CreateOptions {
    let (shape, kind) = (input.u8(), input.u8());
    let cluster_bits = 9 + u32::from(shape & 7);
    let old = kind & 1 != 0;
    CreateOptions {
        version: if old { 2 } else { 3 },
        cluster_bits,
        refcount_order: if old { 4 } else { u32::from(shape >> 3) % 7 },
        lazy_refcounts: !old && kind & 2 != 0,
        extended_l2: !old && kind & 4 != 0 && cluster_bits >= 14,
        compression: if !old && kind & 8 != 0 { Compression::Zstd } else { Compression::Zlib },
        ..CreateOptions::new(DISK)
    }
}

fn open(file: Arc<Memory>) -> Option<Qcow2> {
    let path = Path::new("fuzz");
    let header = Qcow2::read_header(path, file.as_ref()).ok()?;
    if header.backing.is_some() || header.has_data_file() {
        return None;
    }
    Qcow2::open(path, file, header, Parts::default()).ok()
}

fn act(image: &Qcow2, input: &mut Input<'_>) {
    let action = input.u8();
    let (at, len) = (u64::from(input.u16()) * 8, u64::from(input.u16()) & 0x3fff);
    let mut bytes = vec![action; len as usize];
    match action & 15 {
        0..=3 => drop(image.write(at, &WriteFrom(&bytes))),
        4 => drop(image.write_zeroes(at, len, action & 16 != 0)),
        5 => drop(image.discard(at, len)),
        6 => drop(image.flush()),
        7 => drop(image.snapshot("a")),
        8 => drop(image.apply_snapshot("a")),
        9 => drop(image.delete_snapshot("1")),
        10 => drop(image.resize(at << 6)),
        11 => {
            let cluster = image.header().cluster_size();
            let bytes = vec![action; cluster as usize];
            if let Ok(mut deflater) = image.deflater() {
                let _ = image.write_compressed(at / cluster * cluster, &bytes, &mut deflater);
            }
        }
        12 => drop(image.block_status(at, len)),
        14 => bitmaps(image, if action & 16 == 0 { "a" } else { "b" }, at),
        13 => drop(image.check(Repair::Nothing)),
        _ => drop(image.read(at, &ReadInto::new(&mut bytes))),
    }
}

/// A change of bitmaps, and what they say.
fn bitmaps(image: &Qcow2, name: &str, at: u64) {
    let change = match at >> 3 & 7 {
        0 | 1 => Change::Add((at & 0x4000 != 0).then_some(at >> 3 & 0x1fe0)),
        2 => Change::Remove,
        3 => Change::Clear,
        4 => Change::Record(true),
        5 => Change::Record(false),
        6 => {
            if let Ok(bits) = image.bitmap_bits("a") {
                let _ = image.change_bitmap(name, Change::Merge(&bits));
            }
            return;
        }
        _ => return drop(image.close()),
    };
    let _ = image.change_bitmap(name, change);
    if let Ok(bits) = image.bitmap_bits(name) {
        bits.contains(at);
    }
    let _ = image.bitmap_bytes(65536);
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let options = options(&mut input);
    let file = Arc::new(Memory::default());
    let Ok(image) = Qcow2::create(Path::new("fuzz"), file.clone(), &options, Parts::default()) else {
        return;
    };
    for _ in 0..input.u8() & 7 {
        act(&image, &mut input);
    }
    drop(image);
    file.spoil(&mut input);
    let Some(image) = open(file.clone()) else { return };
    for _ in 0..24 {
        if input.is_empty() {
            break;
        }
        act(&image, &mut input);
    }
    drop(image);
    let path = Path::new("fuzz");
    let Ok(header) = Qcow2::read_header(path, file.as_ref()) else { return };
    if header.backing.is_some() || header.has_data_file() {
        return;
    }
    let Ok(image) = Qcow2::open_for_repair(path, file, header, Parts::default()) else { return };
    if image.check(Repair::All).is_ok_and(|found| found.errors == 0 && found.corruptions == 0) {
        let found = image.check(Repair::Nothing).expect("what was repaired can be checked");
        assert!(found.corruptions == 0 && found.leaks == 0, "after the repair: {found:?}");
    }
});
