//! Disks that the kernel still looks for when the agent starts. A command that the user sends along with `--disk` expects them, but
//! the kernel waits only for its root, and udev loads other drivers late in the boot.

use alloc::ffi::CString;
use alloc::vec::Vec;

use crate::{modules, sys};

const PCI: &[u8] = b"/sys/bus/pci/devices/";
/// A disk without a driver never comes.
const WAIT_MS_MAX: i64 = 5_000;

/// Waits until each disk controller on PCI has a disk with its file in `/dev`.
pub fn wait() {
    if all_there() {
        return;
    }
    modules::load_virtio_driver(&[b"drivers/block/virtio_blk"]);
    let began = sys::monotonic_ms();
    while !all_there() && sys::monotonic_ms() - began < WAIT_MS_MAX {
        sys::sleep(5);
    }
}

fn all_there() -> bool {
    names(PCI).iter().map(|device| [PCI, device, b"/"].concat()).all(|device| {
        // Class codes of mass storage (PCI Code and ID Assignment, 1.2): virtio-blk is 00h (SCSI), NVMe 08h.
        match class(&device).as_slice() {
            [b'0', b'x', b'0', b'1', b'0', b'8', ..] => has_nvme(&device),
            [b'0', b'x', b'0', b'1', b'0', b'0', ..] => has_virtio(&device),
            _ => true,
        }
    })
}

/// The device file that is meant by `/dev/nvme1n1`: the disk of the second controller by its address on PCI. The kernel gives
/// numbers in the order in which it happens to find them. `None` as long as the controller is not known.
pub fn by_place(device: &[u8]) -> Option<Vec<u8>> {
    let Some(rest) = device.strip_prefix(b"/dev/nvme") else { return Some(device.to_vec()) };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, disk) = rest.split_at_checked(digits)?;
    let number: usize = core::str::from_utf8(number).ok()?.parse().ok()?;
    let mut controllers = names(PCI);
    controllers.retain(|device| class(&[PCI, device, b"/"].concat()).starts_with(b"0x0108"));
    controllers.sort_unstable();
    let place = [PCI, controllers.get(number)?, b"/nvme"].concat();
    Some([b"/dev/", &names(&place).first()?[..], disk].concat())
}

/// `nvme/nvme1/nvme1n1` under the controller.
fn has_nvme(device: &[u8]) -> bool {
    let place = [device, b"nvme/"].concat();
    names(&place).iter().any(|controller| {
        names(&[&place[..], controller].concat())
            .iter()
            .any(|name| name.starts_with(controller) && has_file(name))
    })
}

/// `virtio2/block/vda` under the controller.
fn has_virtio(device: &[u8]) -> bool {
    let buses = names(device).into_iter().filter(|name| name.starts_with(b"virtio"));
    buses
        .map(|bus| [device, &bus, b"/block"].concat())
        .any(|place| names(&place).iter().any(|name| has_file(name)))
}

fn has_file(disk: &[u8]) -> bool {
    CString::new([b"/dev/", disk].concat()).is_ok_and(|path| sys::exists(&path))
}

fn class(device: &[u8]) -> Vec<u8> {
    let path = CString::new([device, b"class"].concat());
    path.ok().and_then(|path| sys::read_file(&path, 64).ok()).unwrap_or_default()
}

fn names(place: &[u8]) -> Vec<Vec<u8>> {
    CString::new(place).ok().and_then(|path| sys::directory(&path).ok()).unwrap_or_default()
}
