//! Packs a directory tree into an ext4 image and says how long that took: `pack DIRECTORY IMAGE MEBIBYTES`.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use ext4::{DeviceKind, Metadata, Options, Writer};

/// Where each inode of the packed tree was first met, to find hard links.
type Met = HashMap<(u64, u64), Vec<u8>>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, image, size] = arguments.as_slice() else {
        return Err("usage: pack DIRECTORY IMAGE MEBIBYTES".into());
    };
    let mut options = Options::new(size.parse::<u64>()?.saturating_mul(1 << 20));
    options.label = "packed".into();
    let start = Instant::now();
    let mut writer = Writer::new(File::create(image)?, &options)?;
    let (mut files, mut bytes) = (0_u64, 0_u64);
    let mut met = Met::new();
    let mut pending = vec![PathBuf::from(from)];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let about = fs::symlink_metadata(&path)?;
            files += 1;
            bytes += if about.is_file() { about.len() } else { 0 };
            if about.is_dir() {
                pending.push(path.clone());
            }
            pack(&mut writer, &mut met, Path::new(from), &path, &about)?;
        }
    }
    let filled = start.elapsed();
    let summary = writer.finish()?;
    let total = start.elapsed();
    println!("{files} files, {bytes} bytes: {total:?} ({:?} of it to finish), {summary:?}", total - filled);
    Ok(())
}

fn pack(
    writer: &mut Writer<File>,
    met: &mut Met,
    root: &Path,
    path: &Path,
    about: &fs::Metadata,
) -> Result<(), Box<dyn Error>> {
    let name = path.strip_prefix(root)?.as_os_str().as_bytes();
    let mode = (about.mode() & 0o7777) as u16;
    let meta =
        Metadata { mode, uid: about.uid(), gid: about.gid(), mtime: about.mtime(), xattrs: Vec::new() };
    let file_type = about.file_type();
    if file_type.is_dir() {
        return Ok(writer.directory(name, &meta)?);
    }
    if about.nlink() > 1 {
        if let Some(first) = met.get(&(about.dev(), about.ino())) {
            return Ok(writer.hard_link(name, first)?);
        }
        met.insert((about.dev(), about.ino()), name.to_vec());
    }
    if file_type.is_symlink() {
        writer.symlink(name, &meta, fs::read_link(path)?.as_os_str().as_bytes())?;
    } else if file_type.is_file() {
        writer.file(name, &meta, about.len(), File::open(path)?)?;
    } else {
        let number = about.rdev();
        let major = ((number >> 8) & 0xfff) as u32;
        let minor = ((number & 0xff) | ((number >> 12) & 0xf_ff00)) as u32;
        let kind = match () {
            () if file_type.is_char_device() => DeviceKind::Character,
            () if file_type.is_block_device() => DeviceKind::Block,
            () if file_type.is_fifo() => DeviceKind::Fifo,
            () => DeviceKind::Socket,
        };
        writer.device(name, &meta, kind, major, minor)?;
    }
    Ok(())
}
