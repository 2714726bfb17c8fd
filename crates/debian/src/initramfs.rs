//! The initial RAM disk of kernels that have the drivers of the root disk as modules (Debian's generic and rt flavours; the cloud
//! flavour has them built in): a cpio archive ("newc", Linux's `initramfs-buffer-format`) of a program as `/init` and those
//! modules under `/modules`. The program loads them, mounts the root that the kernel command line names, and goes on there.

use crate::deb;
use crate::modules::{self, Module};

/// The drivers of the root disk and its file system. Without one of them among the modules no RAM disk is needed.
const ROOT_DRIVERS: [&str; 2] = ["nvme", "ext4"];
/// What ext4 asks the kernel's cryptography for by name (`softdep ext4 pre: crypto-crc32c`), where it is a module.
const CHECKSUMS: [&str; 2] = ["crc32c_generic", "crc32c_intel"];
/// Where Debian's kernels have these drivers and all that they need, under `/usr/lib/modules/VERSION/kernel/`.
const PLACES: [&str; 8] =
    ["arch/x86/crypto/", "block/", "crypto/", "drivers/nvme/", "fs/ext4/", "fs/jbd2/", "fs/mbcache", "lib/"];

/// Why there is no RAM disk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A module lies where it is not looked for, or cannot be unpacked.
    #[error(
        "the kernel's module {0}, which the root disk needs, cannot be read; choose another kernel flavour"
    )]
    Module(String),
}

/// True for modules that the RAM disk may need, by their path from the root.
pub fn may_hold(path: &str) -> bool {
    let inside = path.strip_prefix("usr/lib/modules/").and_then(|rest| rest.split_once("/kernel/"));
    inside.is_some_and(|(_, place)| PLACES.iter().any(|prefix| place.starts_with(prefix)))
}

/// Makes the archive, if the kernel with these modules needs one. `files` are their contents by the same paths.
pub fn make(init: &[u8], modules: &[Module], files: &[(String, Vec<u8>)]) -> Result<Option<Vec<u8>>, Error> {
    let has = |name: &str| modules.iter().any(|module| modules::name_of(&module.path) == name);
    if !ROOT_DRIVERS.iter().any(|name| has(name)) {
        return Ok(None);
    }
    let names: Vec<&str> = CHECKSUMS.iter().chain(&ROOT_DRIVERS).copied().collect();
    let mut archive = Archive::with_init(init);
    for module in modules::with_needed(&names, modules) {
        let bytes =
            files.iter().find(|(path, _)| *path == module.path).and_then(|(path, bytes)| whole(path, bytes));
        let bytes = bytes.ok_or_else(|| Error::Module(module.path.clone()))?;
        archive.entry(&format!("modules/{}.ko", modules::name_of(&module.path)), FILE, &bytes);
    }
    Ok(Some(archive.finish()))
}

/// An archive without modules, for kernels with these drivers built in: the program can choose among disks, where the kernel takes
/// the one that it finds first.
pub fn bare(init: &[u8]) -> Vec<u8> {
    Archive::with_init(init).finish()
}

/// A module as the kernel loads it, if it was kept whole.
fn whole(path: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let unpacked = match path.ends_with(".xz") {
        true => deb::unxz(bytes, modules::MODULE_BYTES_MAX).ok()?,
        false => bytes.to_vec(),
    };
    unpacked.starts_with(b"\x7fELF").then_some(unpacked)
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// An archive being written.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    fn with_init(init: &[u8]) -> Self {
        let mut archive = Self::default();
        for directory in ["dev", "proc", "sys", "root", "modules"] {
            archive.entry(directory, DIRECTORY, &[]);
        }
        archive.entry("init", PROGRAM, init);
        archive
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries = self.entries.saturating_add(1);
        let name_length = path.len().saturating_add(1);
        let mode = usize::try_from(mode).unwrap_or_default();
        // Inode, mode, owner, group, links, time, size, device of the file system, device, length of the name, no checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name_length, 0];
        self.bytes.extend(b"070701");
        fields.iter().for_each(|field| self.bytes.extend(format!("{field:08x}").into_bytes()));
        self.bytes.extend(path.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn kernel(paths: &[(&str, &[&str])]) -> (Vec<Module>, Vec<(String, Vec<u8>)>) {
        let module = |(path, depends): &(&str, &[&str])| Module {
            path: (*path).to_owned(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
            ..Module::default()
        };
        let content = |path: &str| format!("\x7fELF of {path}").into_bytes();
        (
            paths.iter().map(module).collect(),
            paths.iter().map(|(path, _)| ((*path).to_owned(), content(path))).collect(),
        )
    }

    const GENERIC: [(&str, &[&str]); 6] = [
        ("kernel/crypto/crc32c_generic.ko", &[]),
        ("kernel/drivers/net/e1000.ko", &[]),
        ("kernel/drivers/nvme/host/nvme-core.ko", &[]),
        ("kernel/drivers/nvme/host/nvme.ko", &["nvme_core"]),
        ("kernel/fs/ext4/ext4.ko", &["jbd2"]),
        ("kernel/fs/jbd2/jbd2.ko", &[]),
    ];

    #[test]
    fn the_drivers_of_the_root_disk_and_what_they_need_are_in_it() {
        let (modules, files) = kernel(&GENERIC);
        let archive = make(b"program", &modules, &files).unwrap().unwrap();
        let mut child = match Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        {
            Ok(child) => child,
            Err(_) => Command::new("busybox")
                .args(["cpio", "-t"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap(),
        };
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = child.wait_with_output().unwrap();
        let mut names: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
        names.sort_unstable();
        let modules = ["crc32c_generic", "ext4", "jbd2", "nvme", "nvme_core"];
        let mut wanted: Vec<String> = modules.iter().map(|name| format!("modules/{name}.ko")).collect();
        wanted.extend(["dev", "init", "modules", "proc", "root", "sys"].map(str::to_owned));
        wanted.sort_unstable();
        assert_eq!(names, wanted);
    }

    #[test]
    fn kernels_with_built_in_drivers_need_none() {
        let (modules, files) = kernel(&GENERIC[..3]);
        assert_eq!(make(b"program", &modules, &files).unwrap(), None);
    }

    #[test]
    fn a_module_that_was_not_kept_is_named() {
        let (modules, mut files) = kernel(&GENERIC);
        files[5].1 = b"depends=".to_vec();
        let error = make(b"program", &modules, &files).unwrap_err();
        assert_eq!(error, Error::Module("kernel/fs/jbd2/jbd2.ko".to_owned()));
    }

    #[test]
    fn what_may_be_needed_is_kept_whole() {
        assert!(may_hold("usr/lib/modules/6.1.0-1-amd64/kernel/fs/mbcache.ko"));
        assert!(may_hold("usr/lib/modules/6.12-rt/kernel/lib/crc16.ko.xz"));
        assert!(!may_hold("usr/lib/modules/6.1.0-1-amd64/kernel/drivers/net/e1000.ko"));
        assert!(!may_hold("usr/lib/modules/modules.dep"));
    }
}
