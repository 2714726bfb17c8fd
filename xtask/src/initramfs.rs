//! Small root file systems in memory: a cpio archive ("newc", Linux's `initramfs-buffer-format`) written here, so that no
//! root and no other program is needed.

use std::io::Write;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Initramfs {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let name_length = path.len() + 1;
        // inode, mode, uid, gid, links, mtime, size, device of the file system, device, length of the name, no checksum
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name_length as u32,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A directory; those above it must come first.
    #[must_use]
    pub fn directory(mut self, path: &str) -> Self {
        self.entry(path, DIRECTORY, (0, 0), &[]);
        self
    }

    /// A file with these permissions.
    #[must_use]
    pub fn file(mut self, path: &str, permissions: u32, content: &[u8]) -> Self {
        self.entry(path, FILE | permissions, (0, 0), content);
        self
    }

    /// A symbolic link.
    #[must_use]
    pub fn link(mut self, path: &str, target: &str) -> Self {
        self.entry(path, SYMLINK, (0, 0), target.as_bytes());
        self
    }

    /// A character device.
    #[must_use]
    pub fn device(mut self, path: &str, major: u32, minor: u32) -> Self {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
        self
    }

    /// The archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    /// The archive, packed as distributions pack theirs.
    pub fn finish_gzip(self) -> anyhow::Result<Vec<u8>> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(&self.finish())?;
        Ok(packer.finish()?)
    }
}

/// busybox and an `/init` that mounts what programs expect, then does `script` (a shell script) and powers off.
pub fn busybox(script: &str) -> anyhow::Result<Initramfs> {
    let path = crate::setup::static_busybox()
        .ok_or_else(|| anyhow::anyhow!("no static busybox here: `cargo xtask setup` installs it"))?;
    let program = std::fs::read(path)?;
    let init = format!(
        "#!/bin/busybox sh\n\
         export PATH=/bin\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t devtmpfs dev /dev\n\
         {script}\n\
         poweroff -f\n"
    );
    let mut tree = Initramfs::new();
    for directory in ["bin", "dev", "proc", "sys", "tmp", "mnt"] {
        tree = tree.directory(directory);
    }
    tree = tree.device("dev/console", 5, 1).device("dev/null", 1, 3);
    tree = tree.file("bin/busybox", 0o755, &program);
    for applet in APPLETS {
        tree = tree.link(&format!("bin/{applet}"), "busybox");
    }
    Ok(tree.file("init", 0o755, init.as_bytes()))
}

const APPLETS: &[&str] = &[
    "awk",
    "cat",
    "cut",
    "date",
    "dd",
    "dmesg",
    "echo",
    "expr",
    "false",
    "free",
    "grep",
    "gunzip",
    "gzip",
    "head",
    "ls",
    "md5sum",
    "mkdir",
    "mount",
    "poweroff",
    "printf",
    "ps",
    "reboot",
    "rm",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stty",
    "tail",
    "test",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "wc",
];

#[cfg(test)]
mod test {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_what_is_written() {
        let Some(busybox) = crate::setup::find("busybox") else {
            panic!("`cargo xtask setup` installs busybox")
        };
        let archive = Initramfs::new()
            .directory("etc")
            .file("etc/motd", 0o644, b"odd")
            .link("motd", "etc/motd")
            .device("null", 1, 3)
            .finish();
        let mut child = Command::new(busybox)
            .args(["cpio", "-t", "-v"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        for part in ["drwxr-xr-x", "etc/motd", "motd -> etc/motd", "crw------- 0/0"] {
            assert!(listing.contains(part), "{part:?} is not in:\n{listing}");
        }
    }
}
