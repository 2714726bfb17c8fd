//! Images of the formats that are a header, a table and blocks, sound until somebody changed bytes in them: opened, read,
//! written, checked and repaired. Nothing may panic, hang or take memory that the file does not justify, and a repair that says so
//! leaves an image in which a check finds nothing wrong.
#![no_main]

use image::format::Raw;
use image::format::qed::{self, Qed};
use image::format::vhd::{self, Vhd};
use image::format::{Container, Format, Repair};
use image::storage::Storage;
use image::{Disk, ReadInto, WriteFrom};
use std::path::Path;
use std::sync::Arc;
use yado_fuzz::Input;
use yado_fuzz::file::Memory;

const DISK: u64 = 256 << 10;

/// An image of a shape that the input chooses.
struct Shape {
    kind: u8,
    numbers: u8,
}

type Below = Option<Arc<dyn Disk>>;

impl Shape {
    fn below(&self) -> Below {
        (self.kind & 0x80 != 0).then(|| {
            let file = Memory::default();
            file.write_bytes(0, &[0xba; (DISK / 2) as usize]).expect("there is room");
            Arc::new(Raw::new(Arc::new(file))) as Arc<dyn Disk>
        })
    }

    fn create(&self, file: Arc<Memory>, below: Below) -> Option<Arc<dyn Container>> {
        let path = Path::new("fuzz");
        if self.kind & 1 != 0 {
            let parent =
                below.is_some().then(|| vhd::Parent { name: "below".into(), ..vhd::Parent::default() });
            let options = vhd::CreateOptions {
                block_bits: 12 + u32::from(self.numbers & 3),
                fixed: parent.is_none() && self.kind & 2 != 0,
                parent,
                ..vhd::CreateOptions::new(DISK)
            };
            return Some(Arc::new(Vhd::create(path, file, &options, below).ok()?));
        }
        let backing = below.is_some().then(|| ("below".to_owned(), Format::Raw));
        let options = qed::CreateOptions {
            cluster_bits: 12 + u32::from(self.numbers & 3),
            table_clusters: 1 << (self.numbers >> 2 & 3),
            backing,
            ..qed::CreateOptions::new(DISK)
        };
        Some(Arc::new(Qed::create(path, file, &options, below).ok()?))
    }

    fn open(&self, file: Arc<Memory>, below: Below, repair: bool) -> Option<Arc<dyn Container>> {
        let path = Path::new("fuzz");
        if self.kind & 1 != 0 {
            let header = Vhd::read_header(path, file.as_ref()).ok()?;
            return Some(Arc::new(Vhd::open(path, file, header, below).ok()?));
        }
        let header = Qed::read_header(path, file.as_ref()).ok()?;
        let open = if repair { Qed::open_for_repair } else { Qed::open };
        Some(Arc::new(open(path, file, header, below).ok()?))
    }
}

fn act(image: &dyn Container, input: &mut Input<'_>) {
    let action = input.u8();
    let (at, len) = (u64::from(input.u16()) * 8, u64::from(input.u16()) & 0x3fff);
    let mut bytes = vec![action; len as usize];
    match action & 15 {
        0..=4 => drop(image.write(at, &WriteFrom(&bytes))),
        5 => drop(image.write_zeroes(at, len << (action >> 5), action & 16 != 0)),
        6 => drop(image.discard(at, len)),
        7 => drop(image.flush()),
        8 => drop(image.resize(at << 6)),
        9 => drop(image.set_backing(None)),
        10 => drop(image.empty()),
        11 | 12 => drop(image.block_status(at, DISK.saturating_sub(at))),
        13 => drop(image.check(Repair::Nothing)),
        _ => drop(image.read(at, &ReadInto::new(&mut bytes))),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let shape = Shape { kind: input.u8(), numbers: input.u8() };
    let file = Arc::new(Memory::default());
    let Some(image) = shape.create(file.clone(), shape.below()) else { return };
    for _ in 0..input.u8() & 7 {
        act(image.as_ref(), &mut input);
    }
    drop(image);
    file.spoil(&mut input);
    let Some(image) = shape.open(file.clone(), shape.below(), false) else { return };
    for _ in 0..24 {
        if input.is_empty() {
            break;
        }
        act(image.as_ref(), &mut input);
    }
    drop(image);
    let Some(image) = shape.open(file, shape.below(), true) else { return };
    if image.check(Repair::All).is_ok_and(|found| found.errors == 0 && found.corruptions == 0) {
        let found = image.check(Repair::Nothing).expect("what was repaired can be checked");
        assert!(found.corruptions == 0, "after the repair: {found:?}");
    }
});
