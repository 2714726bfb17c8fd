//! qcow2 images that were sound until somebody changed bytes in them: opened, read, written, checked and repaired. Nothing
//! may panic, hang or take memory that the file does not justify, and a repair leaves an image in which a check finds nothing.
#![no_main]

use image::format::qcow2::{Compression, CreateOptions, Parts, Qcow2, Repair};
use image::storage::{Extent, Storage};
use image::{Buffers, Disk, ReadInto, WriteFrom};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use yado_fuzz::Input;

const DISK: u64 = 256 << 10;
/// A file that grows beyond this is full.
const FILE_MAX: u64 = 16 << 20;

/// A file in memory.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with(&self, offset: u64, len: u64, f: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= FILE_MAX).ok_or(io::ErrorKind::StorageFull)? as usize;
        let mut bytes = self.bytes();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        f(&mut bytes[offset as usize..end])
    }
}

impl Storage for Memory {
    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        let bytes = self.bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let to = from.saturating_add(len as usize).min(bytes.len());
        let mut piece = bytes[from..to].to_vec();
        piece.resize(len as usize, 0);
        buffers.put(at, &piece)
    }
    fn write(&self, offset: u64, buffers: &dyn Buffers, at: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |bytes| buffers.get(at, bytes))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > FILE_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes().resize(len as usize, 0);
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero_range(offset, len)
    }
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(offset, len, |bytes| {
            bytes.fill(0);
            Ok(())
        })
    }
    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn extent(&self, _: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { len, hole: false })
    }
    fn allocated(&self) -> Option<u64> {
        None
    }
}

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
        13 => drop(image.check(Repair::Nothing)),
        _ => drop(image.read(at, &ReadInto::new(&mut bytes))),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let options = options(&mut input);
    let file = Arc::new(Memory(Mutex::new(Vec::new())));
    let Ok(image) = Qcow2::create(Path::new("fuzz"), file.clone(), &options, Parts::default()) else { return };
    for _ in 0..input.u8() & 7 {
        act(&image, &mut input);
    }
    drop(image);
    // Somebody changes what was sound.
    for _ in 0..input.u8() & 15 {
        let (at, value) = (input.u16(), input.u8());
        let mut bytes = file.bytes();
        let len = bytes.len().max(1);
        // Most of it near the beginning, where tables are.
        let place = if value & 1 == 0 { usize::from(at) % len } else { (usize::from(at) * 8) % len };
        if let Some(byte) = bytes.get_mut(place) {
            *byte = input.u8();
        }
    }
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
