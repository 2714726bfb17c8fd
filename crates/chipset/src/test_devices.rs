//! Devices that bare test kernels of the field expect of QEMU: isa-debug-exit, pc-testdev, and the debug console.

use crate::byte_wide;
use device::serial::Endpoint;
use device::{Access, Device, Line, Notify, VmTime};
use serde_json::{Value, json};
use std::collections::VecDeque;

/// Ends the machine with an exit code: a guest that writes `v` ends it with `2v + 1`, so that no guest can say 0.
pub struct DebugExit {
    exit: Box<dyn Fn(u8) + Send + Sync>,
}

impl DebugExit {
    /// Number of ports.
    pub const LEN: u64 = 4;

    /// `exit` is handed the process exit code.
    pub fn new(exit: impl Fn(u8) + Send + Sync + 'static) -> Self {
        Self { exit: Box::new(exit) }
    }
}

impl std::fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DebugExit")
    }
}

impl Device for DebugExit {
    fn name(&self) -> &'static str {
        "isa-debug-exit"
    }
    fn read(&mut self, _access: Access, _now: VmTime) -> u64 {
        0
    }
    fn write(&mut self, _access: Access, value: u64, _now: VmTime) {
        // An exit status has eight bits.
        (self.exit)((value as u8) << 1 | 1);
    }
    fn reset(&mut self) {}
    fn inspect(&self) -> Value {
        Value::Null
    }
}

/// The ports and memory of QEMU's pc-testdev.
#[derive(Debug)]
pub struct PcTestDevice {
    lines: Vec<Line>,
    scratch: u32,
    memory: Vec<u8>,
}

impl PcTestDevice {
    /// Window of the interrupt ports, one per I/O APIC pin: the value written is the level.
    pub const IRQS: u16 = 0;
    /// Window of the scratch ports: four bytes that keep what is written.
    pub const SCRATCH: u16 = 1;
    /// Window of the flush ports (4 bytes): accepted, there is nothing to flush.
    pub const FLUSH: u16 = 2;
    /// Window of the scratch memory.
    pub const MEMORY: u16 = 3;
    /// Bytes of the scratch memory.
    pub const MEMORY_LEN: u64 = 0x1_0000;

    /// `lines` are those of port 0x2000 on.
    pub fn new(lines: Vec<Line>) -> Self {
        Self { lines, scratch: 0, memory: vec![0; 0x1_0000] }
    }
}

impl Device for PcTestDevice {
    fn name(&self) -> &'static str {
        "pc-testdev"
    }

    fn read(&mut self, access: Access, _now: VmTime) -> u64 {
        match access.window {
            Self::SCRATCH => u64::from(self.scratch) >> (access.offset & 3).wrapping_mul(8) & access.mask(),
            Self::MEMORY => byte_wide::read(access, |offset| {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                self.memory.get(at).copied().unwrap_or(0xff)
            }),
            _ => access.mask(),
        }
    }

    fn write(&mut self, access: Access, value: u64, _now: VmTime) {
        match access.window {
            Self::IRQS => {
                let pin = usize::try_from(access.offset).unwrap_or(usize::MAX);
                if let Some(line) = self.lines.get(pin) {
                    line.set(value & access.mask() != 0);
                }
            }
            Self::SCRATCH => {
                let shift = (access.offset & 3).wrapping_mul(8) as u32;
                let mask = (access.mask() as u32) << shift;
                self.scratch = (self.scratch & !mask) | ((value as u32) << shift & mask);
            }
            Self::MEMORY => byte_wide::write(access, value, |offset, new| {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                if let Some(byte) = self.memory.get_mut(at) {
                    *byte = new;
                }
            }),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.scratch = 0;
        self.memory.fill(0);
    }

    fn inspect(&self) -> Value {
        json!({ "scratch": self.scratch })
    }
}

/// The debug console at port 0xe9: bytes written come out, a read tells that it is there.
#[derive(Debug)]
pub struct DebugConsole {
    output: VecDeque<u8>,
    lost_bytes: u64,
    notify: Notify,
}

/// Output held for the other end; more is lost.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;
const PRESENT: u64 = 0xe9;

impl DebugConsole {
    /// A console that tells `notify` about output.
    pub fn new(notify: Notify) -> Self {
        Self { output: VecDeque::new(), lost_bytes: 0, notify }
    }
}

impl Device for DebugConsole {
    fn name(&self) -> &'static str {
        "debug-console"
    }
    fn read(&mut self, _access: Access, _now: VmTime) -> u64 {
        PRESENT
    }
    fn write(&mut self, access: Access, value: u64, _now: VmTime) {
        byte_wide::write(access, value, |_, byte| {
            if self.output.len() < OUTPUT_BYTES_MAX {
                self.output.push_back(byte);
                if self.output.len() == 1 {
                    self.notify.notify();
                }
            } else {
                self.lost_bytes = self.lost_bytes.saturating_add(1);
            }
        });
    }
    fn reset(&mut self) {}
    fn inspect(&self) -> Value {
        json!({ "output_bytes": self.output.len(), "lost_bytes": self.lost_bytes })
    }
}

impl Endpoint for DebugConsole {
    fn offer(&mut self, _port: u32, _bytes: &[u8]) -> usize {
        0
    }
    fn take(&mut self, _port: u32, into: &mut Vec<u8>, max: usize) {
        into.extend(self.output.drain(..max.min(self.output.len())));
        if !self.output.is_empty() {
            self.notify.notify();
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    const NOW: VmTime = VmTime(0);

    fn access(window: u16, offset: u64, size: u8) -> Access {
        Access { window, offset, size }
    }

    #[test]
    fn exit_codes_are_odd() {
        let codes = Arc::new(Mutex::new(vec![]));
        let log = codes.clone();
        let mut exit = DebugExit::new(move |code| log.lock().unwrap().push(code));
        for value in [0, 1, 0x10, 0x7f, 0x80] {
            exit.write(access(0, 0, 4), value, NOW);
        }
        assert_eq!(*codes.lock().unwrap(), [1, 3, 0x21, 0xff, 1]);
    }

    #[test]
    fn scratch_keeps_bytes_words_and_double_words() {
        let levels = Arc::new(Mutex::new(vec![]));
        let lines = (0..24).map(|pin| {
            let log = levels.clone();
            Line::new(move |high| log.lock().unwrap().push((pin, high)))
        });
        let mut device = PcTestDevice::new(lines.collect());
        let scratch = |offset, size| access(PcTestDevice::SCRATCH, offset, size);
        device.write(scratch(0, 4), 0x1122_3344, NOW);
        device.write(scratch(1, 1), 0xaa, NOW);
        device.write(scratch(2, 2), 0xbbcc, NOW);
        assert_eq!(device.read(scratch(0, 4), NOW), 0xbbcc_aa44);
        assert_eq!(device.read(scratch(3, 1), NOW), 0xbb);
        device.write(access(PcTestDevice::MEMORY, 0xfffc, 4), 0x0102_0304, NOW);
        assert_eq!(device.read(access(PcTestDevice::MEMORY, 0xfffd, 2), NOW), 0x0203);
        device.write(access(PcTestDevice::IRQS, 23, 1), 1, NOW);
        device.write(access(PcTestDevice::IRQS, 23, 1), 0, NOW);
        assert_eq!(*levels.lock().unwrap(), [(23, true), (23, false)]);
    }

    #[test]
    fn console_bytes_come_out() {
        let mut console = DebugConsole::new(Notify::unconnected());
        assert_eq!(console.read(access(0, 0, 1), NOW), 0xe9);
        for byte in *b"hi" {
            console.write(access(0, 0, 1), byte.into(), NOW);
        }
        let mut out = vec![];
        console.take(0, &mut out, 10);
        assert_eq!(out, b"hi");
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            steps in prop::collection::vec((any::<bool>(), 0u16..5, any::<u64>(), 0u8..4, any::<u64>()), 0..100)
        ) {
            let mut device = PcTestDevice::new(vec![Line::unconnected(); 24]);
            for (write, window, offset, size, value) in steps {
                let access = access(window, offset, 1 << size);
                if write { device.write(access, value, NOW) } else { device.read(access, NOW); }
            }
        }
    }
}
