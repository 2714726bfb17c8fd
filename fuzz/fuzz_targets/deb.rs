//! Package files, from the archive to the file system: anything as an ar archive, as each compressed stream and as
//! a tar archive, and archives of sound members with anything in their fields, put into an ext4 image.
#![no_main]

use debian::archive;
use debian::tree::{Device, Keep, Metadata, Package, Root, Tree};
use std::io::{self, Read};
use yado_fuzz::Input;
use yado_fuzz::kernels::Packing;
use yado_fuzz::packages::{ar, deb, sound, tar_member};

/// What is read of a data part.
const DATA_MAX: u64 = 4 << 20;

/// A place for the image, which forgets what is written but must be written inside.
struct Nowhere(u64);

impl ext4::Target for Nowhere {
    fn set_len(&mut self, length: u64) -> io::Result<()> {
        self.0 = length;
        Ok(())
    }
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.0), "beyond the image");
        Ok(())
    }
}

struct Image(ext4::Writer<Nowhere>);

fn metadata(meta: &Metadata) -> ext4::Metadata {
    ext4::Metadata { mode: meta.mode, uid: meta.uid, gid: meta.gid, mtime: meta.mtime, xattrs: Vec::new() }
}

impl Tree for Image {
    fn directory(&mut self, path: &str, meta: &Metadata) -> io::Result<()> {
        self.0.directory(path.as_bytes(), &metadata(meta)).map_err(io::Error::other)
    }
    fn file(&mut self, path: &str, meta: &Metadata, size: u64, content: &mut dyn Read) -> io::Result<()> {
        self.0.file(path.as_bytes(), &metadata(meta), size, content).map_err(io::Error::other)
    }
    fn symlink(&mut self, path: &str, meta: &Metadata, target: &str) -> io::Result<()> {
        self.0.symlink(path.as_bytes(), &metadata(meta), target.as_bytes()).map_err(io::Error::other)
    }
    fn hard_link(&mut self, path: &str, existing: &str) -> io::Result<()> {
        self.0.hard_link(path.as_bytes(), existing.as_bytes()).map_err(io::Error::other)
    }
    fn device(&mut self, path: &str, meta: &Metadata, device: Device) -> io::Result<()> {
        let (kind, major, minor) = match device {
            Device::Character(major, minor) => (ext4::DeviceKind::Character, major, minor),
            Device::Block(major, minor) => (ext4::DeviceKind::Block, major, minor),
            Device::Fifo => (ext4::DeviceKind::Fifo, 0, 0),
        };
        self.0.device(path.as_bytes(), &metadata(meta), kind, major, minor).map_err(io::Error::other)
    }
}

/// Unpacks as a build does.
fn unpack(file: &[u8]) {
    let Ok((control, data)) = debian::deb::open(file) else { return };
    assert!(control.iter().all(|file| !file.name.contains('/')));
    let writer = ext4::Writer::new(Nowhere(0), &ext4::Options::new(4 << 20)).expect("a sound size");
    let mut image = Image(writer);
    let keep = Keep { wants: |path| path.ends_with(".ko"), essence: |_, bytes| bytes };
    let mut root = Root::new(&mut image, keep, 0).expect("an empty tree");
    let names = ["fuzz".to_owned()];
    let digests = ["/etc/a".to_owned()];
    let package = Package { number: 0, name: "fuzz", yields: &[], names: &names, digests: &digests };
    if let Ok(list) = archive::put_in(&mut root, &package, &mut data.take(DATA_MAX)) {
        assert!(list.iter().all(|path| path.starts_with('/') && !path.contains("/../")), "{list:?}");
    }
    if image.0.finish().is_err() {
        // Full, say.
    }
}

/// Members whose fields the input says.
fn members(input: &mut Input<'_>) -> Vec<u8> {
    const NAMES: [&[u8]; 16] = [
        b"./",
        b"./etc/",
        b"etc/a",
        b"usr/bin/x",
        b"lib/y",
        b"bin",
        b"../out",
        b"/abs",
        b"a/../b",
        b"etc/a/b",
        b"x.ko",
        b"usr",
        b"etc/l/z",
        b"\xff\xfe",
        b"",
        b"etc/l",
    ];
    let mut tar = Vec::new();
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let [kind, name, link, len] = input.array();
        let kind = b"0123567LKxgSV\0"[usize::from(kind) % 14];
        let name = NAMES[usize::from(name & 15)];
        let link = NAMES[usize::from(link & 15)];
        let content = input.take(usize::from(len & 63));
        let mut member = tar_member(kind, name, link, content);
        if len & 0x40 != 0 {
            // One field broken, with the sum put right.
            let at = usize::from(input.u16()) % 512;
            member[at] = input.u8();
            let mut header = tar::Header::new_old();
            header.as_mut_bytes().copy_from_slice(&member[..512]);
            header.set_cksum();
            member[..512].copy_from_slice(header.as_bytes());
        }
        if len & 0x80 != 0 {
            tar.extend(pax(input));
        }
        tar.extend(member);
    }
    tar
}

/// A pax header with one record.
fn pax(input: &mut Input<'_>) -> Vec<u8> {
    let key = ["path", "linkpath", "size", "mtime"][usize::from(input.u8() & 3)];
    let len = usize::from(input.u8());
    let value = String::from_utf8_lossy(input.take(len)).into_owned();
    let record = format!(" {key}={value}\n");
    let digits = (record.len() + 3).to_string().len();
    let record = format!("{}{record}", record.len() + digits);
    tar_member(b'x', b"pax", b"", record.as_bytes())
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let kind = input.u8();
    let control = tar_member(b'0', b"./control", b"", b"Package: a\n");
    let file = match kind & 7 {
        0 => input.take(usize::MAX).to_vec(),
        // Anything as a stream.
        1 => {
            let suffix = ["", ".gz", ".xz", ".zst"][usize::from(kind >> 4 & 3)];
            let name = format!("data.tar{suffix}");
            ar(&[("control.tar", &control), (&name, input.take(usize::MAX))])
        }
        2 => deb(input.take(usize::MAX), b"", Packing::Plain),
        3 => deb(&control, input.take(usize::MAX), Packing::Plain),
        // A sound package broken in a few places.
        4 => {
            let mut file = sound(kind >> 4);
            input.patch(&mut file);
            file
        }
        _ => deb(&control, &members(&mut input), Packing::Plain),
    };
    unpack(&file);
});
