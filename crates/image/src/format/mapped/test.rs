//! Formats against a model in memory, and against qemu-img: what is the same for all of them.

use super::super::{Container, Format, Raw, Repair};
use crate::buffers::{ReadInto, VecBuffers, WriteFrom};
use crate::disk::Disk;
use crate::storage::{Storage, StorageFile};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// Bytes of the disks here.
pub const SIZE: u64 = 3 << 20;

/// Images of one shape.
pub trait Kind: std::fmt::Debug {
    fn format(&self) -> Format;
    /// There is an image below.
    fn below(&self) -> bool;
    fn create(&self, storage: Arc<dyn Storage>, below: Option<Arc<dyn Disk>>) -> Arc<dyn Container>;
    fn open(&self, storage: Arc<dyn Storage>, below: Option<Arc<dyn Disk>>) -> Arc<dyn Container>;
    /// qemu-img can read it.
    fn qemu_reads(&self) -> bool {
        true
    }
    /// qemu-img can check it.
    fn qemu_checks(&self) -> bool {
        true
    }
}

/// Runs qemu-img and answers what it printed; fails if it does.
pub fn qemu_img(arguments: &[&str]) -> String {
    run("qemu-img", arguments)
}

/// Runs a program of the host, as [`qemu_img`].
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output =
        output.unwrap_or_else(|error| panic!("{program}, which `cargo xtask setup` installs: {error}"));
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Opens a file that this process has just closed. Programs that other tests start have a copy of every descriptor, and its
/// lock, until they are what they will be.
pub fn reopen(path: &Path, read_only: bool) -> Arc<StorageFile> {
    for _ in 0..500 {
        match StorageFile::open(path, read_only) {
            Err(crate::Error::InUse { .. }) => std::thread::sleep(std::time::Duration::from_millis(10)),
            other => return Arc::new(other.unwrap()),
        }
    }
    panic!("{} stays in use", path.display());
}

pub fn read_all(disk: &dyn Disk) -> Vec<u8> {
    let buffers = VecBuffers::new(vec![0xee; disk.capacity() as usize]);
    disk.read(0, &buffers).unwrap();
    buffers.into_inner()
}

/// What lies below: no zeroes.
pub fn base_bytes(len: usize) -> Vec<u8> {
    // Copied in rows, since a debug build counts slowly.
    let row: Vec<u8> = (1..=251).collect();
    let mut bytes = row.repeat(len.div_ceil(row.len()));
    bytes.truncate(len);
    bytes
}

#[derive(Debug, Clone)]
pub enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
    Resize(u64),
}

/// A step at sectors, or (with `odd`) now and then between them.
pub fn step(odd: bool, size: u64) -> impl Strategy<Value = Step> {
    let range = (0..size / 512 * 2, 0u64..size / 5120, 0u64..3, 0u64..512);
    let range = range.prop_map(move |(at, sectors, between, bytes)| {
        let (at, len) = (at * 256, sectors * 512);
        match (odd, between) {
            (true, 0) => (at + bytes, len + bytes),
            (true, _) => (at, len),
            (false, _) => (at / 512 * 512, len),
        }
    });
    (range, any::<u8>(), 0..14).prop_map(|((at, len), value, kind)| match kind {
        0..=6 => Step::Write(at, len, value),
        7 | 8 => Step::Zero(at, len, value & 1 == 0),
        9 | 10 => Step::Discard(at, len),
        11 => Step::Flush,
        12 => Step::Reopen,
        _ => Step::Resize(at / 512 * 512),
    })
}

/// An image and what it must hold.
struct Play<'a> {
    kind: &'a dyn Kind,
    path: PathBuf,
    below: Option<Arc<dyn Disk>>,
    image: Option<Arc<dyn Container>>,
    model: Vec<u8>,
}

impl Play<'_> {
    fn image(&self) -> &dyn Container {
        self.image.as_deref().unwrap()
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
                self.image().write(at, &WriteFrom(&bytes)).unwrap();
                self.model[range].copy_from_slice(&bytes);
            }
            Step::Zero(at, len, unmap) => {
                let (at, len, range) = self.clip(at, len);
                self.image().write_zeroes(at, len, unmap).unwrap();
                self.model[range].fill(0);
            }
            Step::Discard(at, len) => {
                let (at, len, range) = self.clip(at, len);
                self.image().discard(at, len).unwrap();
                let mut now = vec![0; range.len()];
                self.image().read(at, &ReadInto::new(&mut now)).unwrap();
                for (model, now) in self.model[range].iter_mut().zip(now) {
                    assert!(now == 0 || now == *model, "a discard has made something new");
                    *model = now;
                }
            }
            Step::Flush => self.image().flush().unwrap(),
            Step::Reopen => {
                drop(self.image.take());
                self.image = Some(self.kind.open(reopen(&self.path, false), self.below.clone()));
            }
            Step::Resize(to) => {
                if self.image().resize(to).is_ok() {
                    self.model.resize(to as usize, 0);
                }
            }
        }
    }

    /// `block_status` and `read` agree.
    fn assert_status(&self) {
        let mut at = 0;
        while at < self.image().capacity() {
            let status = self.image().block_status(at, self.image().capacity() - at).unwrap();
            let end = at + status.len;
            assert!(status.len > 0 && end <= self.image().capacity());
            if status.content == crate::Content::Zero {
                assert!(self.model[at as usize..end as usize].iter().all(|byte| *byte == 0), "at {at}");
            }
            if let (Some(place), 0) = (status.offset, status.depth) {
                let mut bytes = vec![0; status.len as usize];
                let file = StorageFile::open_shared(&self.path, true).unwrap();
                file.read_bytes(place, &mut bytes).unwrap();
                assert!(bytes == self.model[at as usize..end as usize], "at {at}: {status:?}");
            }
            at = end;
        }
    }
}

/// Plays steps on a new image; at the end qemu-img must find nothing wrong and read what the model has.
pub fn play(kind: &dyn Kind, steps: &[Step]) {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw");
    std::fs::write(&base, base_bytes(2_000_384)).unwrap();
    let below = kind.below().then(|| Arc::new(Raw::open(&base, true).unwrap()) as Arc<dyn Disk>);
    let path = directory.path().join("top");
    let storage = Arc::new(StorageFile::create(&path, false).unwrap());
    let mut model = if kind.below() { base_bytes(2_000_384) } else { Vec::new() };
    model.resize(SIZE as usize, 0);
    let image = Some(kind.create(storage, below.clone()));
    let mut play = Play { kind, path: path.clone(), below, image, model };
    for step in steps {
        play.step(step);
        assert!(read_all(play.image()) == play.model, "after {step:?}");
    }
    play.assert_status();
    let found = play.image().check(Repair::Nothing).unwrap();
    assert!(found.is_clean(), "{found:?}");
    let Play { image, below, model, .. } = play;
    drop(image);
    let found = kind.open(reopen(&path, true), below).check(Repair::Nothing).unwrap();
    assert!(found.is_clean(), "closed: {found:?}");
    judge(kind, directory.path(), &path, &model);
}

/// qemu-img finds nothing wrong and reads what the model has.
fn judge(kind: &dyn Kind, directory: &Path, path: &Path, model: &[u8]) {
    let (name, path) = (kind.format().name(), path.to_str().unwrap());
    if kind.qemu_checks() {
        qemu_img(&["check", "-f", name, path]);
    }
    if kind.qemu_reads() && !model.is_empty() {
        let raw = directory.join("model.raw");
        std::fs::write(&raw, model).unwrap();
        qemu_img(&["compare", "-f", name, "-F", "raw", path, raw.to_str().unwrap()]);
    }
}

/// Many threads on one image: each owns every fourth sector of the disk, so that their requests share blocks all the time,
/// and none may see another's bytes in its own.
pub fn crowd(kind: &dyn Kind) {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw");
    std::fs::write(&base, base_bytes(2_000_384)).unwrap();
    let below = kind.below().then(|| Arc::new(Raw::open(&base, true).unwrap()) as Arc<dyn Disk>);
    let path = directory.path().join("top");
    let image = kind.create(Arc::new(StorageFile::create(&path, false).unwrap()), below);
    let mut first = if kind.below() { base_bytes(2_000_384) } else { Vec::new() };
    first.resize(SIZE as usize, 0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (image, first) = (image.as_ref(), &first);
            scope.spawn(move || one_of_many(image, first, thread));
        }
        scope.spawn(|| {
            for _ in 0..20 {
                image.flush().unwrap();
                std::thread::yield_now();
            }
        });
    });
    assert!(image.check(Repair::Nothing).unwrap().is_clean());
    let content = read_all(image.as_ref());
    drop(image);
    judge(kind, directory.path(), &path, &content);
}

fn one_of_many(image: &dyn Disk, first: &[u8], thread: u64) {
    let mut mine: std::collections::HashMap<u64, u8> = std::collections::HashMap::new();
    let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let read = |sector: u64| {
        let mut bytes = [0xee; 512];
        image.read(sector * 512, &ReadInto::new(&mut bytes)).unwrap();
        bytes
    };
    for round in 0..800u64 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let sector = random % (SIZE / 2048) * 4 + thread;
        let at = sector * 512;
        match mine.get(&sector) {
            Some(value) => assert!(read(sector) == [*value; 512], "sector {sector}"),
            None => assert!(read(sector)[..] == first[at as usize..at as usize + 512], "sector {sector}"),
        }
        let value = (round % 255) as u8 + 1;
        if round % 7 == 0 {
            image.write_zeroes(at, 512, true).unwrap();
            mine.insert(sector, 0);
        } else {
            image.write(at, &WriteFrom(&[value; 512])).unwrap();
            mine.insert(sector, value);
        }
    }
    for (sector, value) in mine {
        assert!(read(sector) == [value; 512], "sector {sector} at the end");
    }
}

/// How many cases a test tries; `IMAGE_TEST_CASES` multiplies them for long runs.
pub fn cases(usual: u32) -> u32 {
    let times = std::env::var("IMAGE_TEST_CASES").ok().and_then(|times| times.parse().ok());
    usual * times.unwrap_or(1)
}
