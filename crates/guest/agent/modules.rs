//! Loading kernel modules without modprobe: neither an initramfs nor an image whose `depmod` has not run yet has its index.

use alloc::ffi::CString;
use alloc::vec::Vec;

use crate::sys::{self, EEXIST, Errno, O_RDONLY};

/// Loads module files: again and again those that failed, as long as another one got in, because a module can be loaded only
/// after those that it needs. Returns the files that could not be.
pub fn load(mut files: Vec<CString>) -> Vec<CString> {
    loop {
        let before = files.len();
        files.retain(|file| load_one(file).is_err_and(|errno| errno != EEXIST));
        if files.is_empty() || files.len() == before {
            return files;
        }
    }
}

fn load_one(file: &CString) -> Result<(), Errno> {
    let compressed = !file.to_bytes().ends_with(b".ko");
    sys::load_module(&sys::open(file, O_RDONLY)?, compressed)
}

/// Virtio over PCI, where it is a module of the running kernel (Linux 6.1 of Debian 12), in the order of need.
const VIRTIO: [&[u8]; 5] = [
    b"drivers/virtio/virtio",
    b"drivers/virtio/virtio_ring",
    b"drivers/virtio/virtio_pci_legacy_dev",
    b"drivers/virtio/virtio_pci_modern_dev",
    b"drivers/virtio/virtio_pci",
];

/// Loads a virtio driver and what it needs, by their places in the kernel's tree, if they are modules of the running kernel. udev
/// would do so too, but late in the boot.
pub fn load_virtio_driver(names: &[&[u8]]) {
    let release = sys::read_file(c"/proc/sys/kernel/osrelease", 256).unwrap_or_default();
    let kernel = [&b"/lib/modules/"[..], release.trim_ascii(), b"/kernel/"].concat();
    let mut files = Vec::new();
    for name in VIRTIO.iter().chain(names) {
        for ending in [&b".ko"[..], b".ko.xz", b".ko.zst"] {
            let Ok(file) = CString::new([&kernel[..], name, ending].concat()) else { continue };
            if sys::exists(&file) {
                files.push(file);
            }
        }
    }
    // What cannot be loaded shows in that no device appears.
    load(files);
}
