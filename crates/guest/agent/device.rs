//! Finding and opening the stream to the host.
//!
//! In a guest it is the virtio-console port named `org.yado.agent.0`, found through sysfs so that udev is not needed; where none
//! has come up after a while (no driver), the second serial port. `yado.agent=DEVICE` on the kernel's command line decides.

use alloc::ffi::CString;

use crate::sys::{self, Fd, O_NOCTTY, O_NONBLOCK, O_RDWR};
use crate::{kernel_line, modules};

const PORT_NAME: &[u8] = b"org.yado.agent.0";
const PORTS: &[u8] = b"/sys/class/virtio-ports/";
/// How long the serial port waits for the better one to appear.
const SERIAL_AFTER_MS: i64 = 3000;

/// Where the stream comes from.
pub enum Source {
    /// A descriptor that the agent was started with; its end is the agent's.
    Inherited(Option<Fd>),
    /// This device.
    Path(CString),
    /// Whatever the guest has.
    Search { since_ms: i64, asked_for_driver: bool },
}

/// The open stream.
pub struct Stream {
    pub fd: Fd,
    /// A serial line or terminal: the kernel buffers little of what arrives on it.
    pub narrow: bool,
}

impl Source {
    /// The source that the kernel's command line asks for.
    pub fn from_kernel_line() -> Self {
        let line = sys::read_file(c"/proc/cmdline", 64 * 1024).unwrap_or_default();
        let device = kernel_line::value(&line, b"yado.agent");
        match device.and_then(|name| CString::new([b"/dev/", name].concat()).ok()) {
            Some(path) => Self::Path(path),
            None => Self::Search { since_ms: sys::monotonic_ms(), asked_for_driver: false },
        }
    }

    /// Opens the stream if it is there now.
    pub fn open(&mut self) -> Option<Stream> {
        match self {
            Self::Inherited(fd) => {
                let fd = fd.take()?;
                sys::set_nonblocking(&fd).ok()?;
                sys::set_close_on_exec(&fd).ok()?;
                Some(prepare(fd))
            }
            Self::Path(path) => Some(prepare(sys::open(path, O_RDWR | O_NOCTTY | O_NONBLOCK).ok()?)),
            Self::Search { since_ms, asked_for_driver } => {
                if !*asked_for_driver && !sys::exists(c"/sys/class/virtio-ports") {
                    modules::load_virtio_driver(&[b"drivers/char/virtio_console"]);
                }
                *asked_for_driver = true;
                open_port().or_else(|| {
                    let patient = sys::monotonic_ms() < since_ms.saturating_add(SERIAL_AFTER_MS);
                    if patient { None } else { open_serial() }
                })
            }
        }
    }

    /// Whether there is nothing to open again once the stream has ended.
    pub fn ends_once(&self) -> bool {
        matches!(self, Self::Inherited(_))
    }
}

fn prepare(fd: Fd) -> Stream {
    let narrow = sys::make_raw(&fd).is_ok();
    Stream { fd, narrow }
}

fn open_port() -> Option<Stream> {
    for entry in sys::directory(&CString::new(PORTS).ok()?).ok()? {
        let file = CString::new([PORTS, &entry, b"/name"].concat()).ok()?;
        let name = sys::read_file(&file, 256).unwrap_or_default();
        if name.trim_ascii() == PORT_NAME {
            let path = CString::new([b"/dev/", &entry[..]].concat()).ok()?;
            return Some(prepare(sys::open(&path, O_RDWR | O_NONBLOCK).ok()?));
        }
    }
    None
}

fn open_serial() -> Option<Stream> {
    let fd = sys::open(c"/dev/ttyS1", O_RDWR | O_NOCTTY | O_NONBLOCK).ok()?;
    sys::has_uart(&fd).then(|| prepare(fd))
}
