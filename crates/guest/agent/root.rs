//! From an initramfs to the root on a disk, as the kernel itself goes where its drivers are built in: `root=/dev/NAME`
//! (of NVMe disks: the one in that place), `rootfstype=`, `ro` and `rw`, `init=` (the kernel's `admin-guide/kernel-parameters`).

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;

use crate::sys::{self, Errno};
use crate::{disks, kernel_line, report};

/// Where the new root is mounted before it becomes the root.
const PLACE: &CStr = c"/root";
/// Longest wait for the disk: its driver looks for disks in the background.
const WAIT_MS_MAX: i64 = 10_000;
/// What may be the init of a root, in the kernel's order.
const INITS: [&CStr; 4] = [c"/sbin/init", c"/etc/init", c"/bin/init", c"/bin/sh"];

/// A root file system on a disk.
pub struct Root {
    device: CString,
    kind: CString,
    read_only: bool,
    init: Option<CString>,
}

impl Root {
    /// The root that the kernel command line names by its device file, if any.
    pub fn from_kernel_line() -> Option<Self> {
        let line = sys::read_file(c"/proc/cmdline", 64 * 1024).ok()?;
        let text = |name: &[u8]| kernel_line::value(&line, name).and_then(|value| CString::new(value).ok());
        let device = text(b"root").filter(|device| device.to_bytes().starts_with(b"/dev/"))?;
        let mut words = line.split(|byte| byte.is_ascii_whitespace());
        let mode = words.rfind(|word| [&b"ro"[..], b"rw"].contains(word));
        Some(Self {
            device,
            kind: text(b"rootfstype").unwrap_or_else(|| c"ext4".into()),
            read_only: mode != Some(&b"rw"[..]),
            init: text(b"init"),
        })
    }

    /// Mounts it, takes `mounts` along and becomes its init. If that fails this process ends, and the kernel panics as it does by
    /// itself without a root or an init.
    pub fn enter(&self, mounts: &[&CStr], arguments: &[&CStr]) -> ! {
        match self.mount().and_then(|()| move_into(mounts)) {
            Ok(()) => self.start_init(arguments),
            Err(errno) => complain(b"cannot mount the root ", &self.device, errno),
        }
        sys::exit(1);
    }

    /// Returns only if there is none that can be started.
    fn start_init(&self, arguments: &[&CStr]) {
        let inits = match &self.init {
            Some(init) => [init.as_c_str()].to_vec(),
            None => INITS.to_vec(),
        };
        let environment = [c"HOME=/".into(), c"TERM=linux".into()];
        for init in inits {
            let given = arguments.iter().skip(1).copied();
            let argv: Vec<CString> = [init].into_iter().chain(given).map(CString::from).collect();
            let errno = sys::execve(init, &argv, &environment);
            if errno != sys::ENOENT || self.init.is_some() {
                complain(b"cannot start ", init, errno);
            }
        }
        report(&[b"no init could be started on ", self.device.to_bytes()]);
    }

    fn mount(&self) -> Result<(), Errno> {
        let _ = sys::mkdir(PLACE);
        let began = sys::monotonic_ms();
        loop {
            let device = disks::by_place(self.device.to_bytes()).and_then(|device| CString::new(device).ok());
            let errno = match device {
                None => sys::ENOENT,
                Some(device) => match sys::mount_disk(&device, PLACE, &self.kind, self.read_only) {
                    Ok(()) => return Ok(()),
                    Err(errno) => errno,
                },
            };
            // Not there yet, or there and not yet answering (ENXIO).
            let early = errno == sys::ENOENT || errno == sys::ENXIO;
            if !early || sys::monotonic_ms() - began > WAIT_MS_MAX {
                return Err(errno);
            }
            sys::sleep(2);
        }
    }
}

/// Makes what is mounted at [`PLACE`] the root, and takes `mounts` along.
fn move_into(mounts: &[&CStr]) -> Result<(), Errno> {
    // The initramfs stays in memory under the new root, and this program is most of it.
    let _ = sys::unlink(c"/init");
    for place in mounts {
        if let Ok(target) = CString::new([PLACE.to_bytes(), place.to_bytes()].concat()) {
            let _ = sys::move_mount(place, &target);
        }
    }
    sys::chdir(PLACE)?;
    sys::move_mount(c".", c"/")?;
    sys::chroot(c".")
}

fn complain(what: &[u8], which: &CStr, errno: Errno) {
    let digit = |unit: u32| b'0' + (errno.0 / unit % 10) as u8;
    report(&[what, which.to_bytes(), b": error ", &[digit(100), digit(10), digit(1)]]);
}
