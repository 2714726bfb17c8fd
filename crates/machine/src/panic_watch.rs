//! Reads along on the serial port to tell a guest whose kernel panicked from one that restarts or prints on.
//!
//! pvpanic says it better, but its driver is a module in stock kernels. Linux prints three lines that matter
//! (`kernel/panic.c`, `kernel/reboot.c`): that it panicked; at the very end, if it will never restart, an end marker;
//! and before an orderly restart, that it restarts. A log shown on the console has these lines too, so the marker
//! counts only if nothing follows it and the kernel has no pvpanic driver (which looks at the port when it comes), and a panic only if the
//! machine then resets without saying so.
//!
//! Lock order: a device's lock, then the UART's or the watch's.

use chipset::pvpanic::PvPanic;
use chipset::uart16550::Uart16550;
use device::{Access, Device, VmTime};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PANIC: &[u8] = b"Kernel panic - not syncing";
const END_MARKER: &[u8] = b"---[ end Kernel panic - not syncing";
const RESTART: &[u8] = b"reboot: Restarting system";
/// Silence after the end marker that proves that it was meant.
const SILENCE: Duration = Duration::from_secs(2);
/// Longest line looked at, in bytes.
const LINE_MAX: usize = 512;

/// What the console's lines say.
#[derive(Debug, Default)]
struct Reader {
    line: Vec<u8>,
    panicked: bool,
    /// It said that it restarts.
    restarting: bool,
    /// When the end marker was printed, if nothing came after it.
    silent_since: Option<VmTime>,
    /// The kernel's pvpanic driver is there: it says so itself when it panics, before it prints the end marker.
    tells_itself: bool,
}

impl Reader {
    fn read(&mut self, byte: u8, now: VmTime) {
        if byte != b'\n' {
            if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
            if !byte.is_ascii_whitespace() {
                self.silent_since = None;
            }
            return;
        }
        let says = |what: &[u8]| self.line.windows(what.len()).any(|part| part == what);
        if says(END_MARKER) {
            // Linux has said that it panics before. Of one that tells itself and has not, these are somebody else's words.
            if self.panicked && !self.tells_itself {
                self.silent_since = Some(now);
            }
        } else if says(PANIC) {
            (self.panicked, self.restarting) = (true, false);
        } else if says(RESTART) {
            (self.panicked, self.restarting) = (false, true);
        }
        self.line.clear();
    }
}

/// Whether the guest's last words were those of a panic. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct PanicWatch(Arc<Mutex<Reader>>);

impl PanicWatch {
    /// Whether a reset now is that of a kernel that panicked.
    pub(crate) fn panicked(&self) -> bool {
        self.lock().panicked
    }

    /// Whether the guest has said that it restarts.
    pub(crate) fn restarting(&self) -> bool {
        self.lock().restarting
    }

    fn lock(&self) -> MutexGuard<'_, Reader> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A UART that is read along.
pub(crate) struct WatchedUart {
    uart: Arc<Mutex<Uart16550>>,
    watch: PanicWatch,
    hung: Box<dyn Fn() + Send>,
}

impl WatchedUart {
    /// `hung` is called when the guest has panicked for good.
    pub(crate) fn new(
        uart: Arc<Mutex<Uart16550>>,
        watch: PanicWatch,
        hung: impl Fn() + Send + 'static,
    ) -> Self {
        Self { uart, watch, hung: Box::new(hung) }
    }

    fn uart(&self) -> MutexGuard<'_, Uart16550> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pvpanic port at which one sees whether the guest's kernel knows it.
pub(crate) struct WatchedPort {
    port: PvPanic,
    watch: PanicWatch,
}

impl WatchedPort {
    pub(crate) fn new(port: PvPanic, watch: PanicWatch) -> Self {
        Self { port, watch }
    }
}

impl Device for WatchedPort {
    fn name(&self) -> &'static str {
        self.port.name()
    }

    fn read(&mut self, access: Access, now: VmTime) -> u64 {
        self.watch.lock().tells_itself = true;
        self.port.read(access, now)
    }

    fn write(&mut self, access: Access, value: u64, now: VmTime) {
        self.port.write(access, value, now);
    }

    fn reset(&mut self) {
        self.watch.lock().tells_itself = false;
        self.port.reset();
    }

    fn inspect(&self) -> serde_json::Value {
        self.port.inspect()
    }
}

impl Device for WatchedUart {
    fn name(&self) -> &'static str {
        "uart16550"
    }

    fn read(&mut self, access: Access, now: VmTime) -> u64 {
        self.uart().read(access, now)
    }

    fn write(&mut self, access: Access, value: u64, now: VmTime) {
        // The divisor's low byte goes here too while it is set up; as a character it says nothing.
        if access.offset == 0 {
            self.watch.lock().read(value as u8, now);
        }
        self.uart().write(access, value, now);
    }

    fn deadline(&self) -> Option<VmTime> {
        let silence = self.watch.lock().silent_since.map(|since| since.after(SILENCE));
        [silence, self.uart().deadline()].into_iter().flatten().min()
    }

    fn tick(&mut self, now: VmTime) {
        self.uart().tick(now);
        let hung = {
            let mut reader = self.watch.lock();
            let over = reader.silent_since.is_some_and(|since| now >= since.after(SILENCE));
            if over {
                reader.silent_since = None;
            }
            over
        };
        if hung {
            (self.hung)();
        }
    }

    fn reset(&mut self) {
        *self.watch.lock() = Reader::default();
        self.uart().reset();
    }

    fn inspect(&self) -> serde_json::Value {
        self.uart().inspect()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use device::{Line, Notify};
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Guest {
        uart: WatchedUart,
        watch: PanicWatch,
        hung: Arc<AtomicU32>,
    }

    fn guest() -> Guest {
        let uart = Arc::new(Mutex::new(Uart16550::new(Line::unconnected(), Notify::unconnected())));
        let (watch, hung) = (PanicWatch::default(), Arc::new(AtomicU32::new(0)));
        let count = hung.clone();
        let uart = WatchedUart::new(uart, watch.clone(), move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        Guest { uart, watch, hung }
    }

    impl Guest {
        fn print(&mut self, text: &str, at: u64) {
            for byte in text.bytes() {
                self.uart.write(Access { window: 0, offset: 0, size: 1 }, byte.into(), VmTime(at));
            }
        }
    }

    #[test]
    fn silence_after_the_end_marker_is_the_end() {
        let mut guest = guest();
        // Words alone are nothing.
        guest.print("---[ end Kernel panic - not syncing\n", 1);
        assert_eq!(guest.uart.deadline(), None);
        guest.print("[    3.0] Kernel panic - not syncing: why\r\n", 4);
        guest.print("[    3.1] ---[ end Kernel panic - not syncing: why ]---\r\n", 5);
        let deadline = guest.uart.deadline().unwrap();
        assert_eq!(deadline, VmTime(2_000_000_005));
        guest.uart.tick(deadline);
        assert_eq!(guest.hung.load(Ordering::Relaxed), 1);
        assert_eq!(guest.uart.deadline(), None);
    }

    #[test]
    fn a_kernel_that_says_itself_that_it_panicked_is_taken_at_its_word() {
        let mut guest = guest();
        let mut port = WatchedPort::new(PvPanic::new(|_| ()), guest.watch.clone());
        port.read(Access { window: 0, offset: 0, size: 1 }, VmTime(0));
        let words = "Kernel panic - not syncing: inner\n---[ end Kernel panic - not syncing: inner ]---\n";
        guest.print(words, 4);
        assert_eq!(guest.uart.deadline(), None);
        guest.uart.tick(VmTime(9_000_000_000));
        assert_eq!(guest.hung.load(Ordering::Relaxed), 0);
        // Another kernel may not.
        port.reset();
        guest.uart.reset();
        guest.print(words, 4);
        assert!(guest.uart.deadline().is_some());
    }

    #[test]
    fn a_log_on_the_console_is_no_panic() {
        let mut guest = guest();
        guest.print("[    3.0] Kernel panic - not syncing: why\r\n", 1);
        assert!(guest.watch.panicked());
        guest.print("---[ end Kernel panic - not syncing: why ]---\r\n# ", 5);
        assert_eq!(guest.uart.deadline(), None);
        guest.print("reboot\r\n[    9.0] reboot: Restarting system\r\n", 9);
        assert!(!guest.watch.panicked() && guest.watch.restarting());
        guest.uart.reset();
        assert!(!guest.watch.restarting());
        guest.print(&"x".repeat(100_000), 9);
        assert_eq!(guest.hung.load(Ordering::Relaxed), 0);
    }
}
