//! The tree as an ext4 image.

use crate::tree::{Device, Metadata, Tree};
use std::fs::File;
use std::io::{self, Read};

/// Puts a tree into an ext4 file system.
pub struct ImageTree(pub ext4::Writer<File>);

fn other(error: ext4::Error) -> io::Error {
    io::Error::other(error)
}

fn metadata(meta: &Metadata) -> ext4::Metadata {
    ext4::Metadata { mode: meta.mode, uid: meta.uid, gid: meta.gid, mtime: meta.mtime, xattrs: Vec::new() }
}

impl Tree for ImageTree {
    fn directory(&mut self, path: &str, meta: &Metadata) -> io::Result<()> {
        self.0.directory(path.as_bytes(), &metadata(meta)).map_err(other)
    }

    fn file(&mut self, path: &str, meta: &Metadata, size: u64, content: &mut dyn Read) -> io::Result<()> {
        self.0.file(path.as_bytes(), &metadata(meta), size, content).map_err(other)
    }

    fn symlink(&mut self, path: &str, meta: &Metadata, target: &str) -> io::Result<()> {
        self.0.symlink(path.as_bytes(), &metadata(meta), target.as_bytes()).map_err(other)
    }

    fn hard_link(&mut self, path: &str, existing: &str) -> io::Result<()> {
        self.0.hard_link(path.as_bytes(), existing.as_bytes()).map_err(other)
    }

    fn device(&mut self, path: &str, meta: &Metadata, device: Device) -> io::Result<()> {
        let (kind, major, minor) = match device {
            Device::Character(major, minor) => (ext4::DeviceKind::Character, major, minor),
            Device::Block(major, minor) => (ext4::DeviceKind::Block, major, minor),
            Device::Fifo => (ext4::DeviceKind::Fifo, 0, 0),
        };
        self.0.device(path.as_bytes(), &metadata(meta), kind, major, minor).map_err(other)
    }
}
