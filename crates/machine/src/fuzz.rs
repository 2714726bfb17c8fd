//! Entry point for fuzzers: the vCPU loop's handlers and everything behind them, driven by exits of any kind and content as an engine
//! would hand them over, with guest RAM that changes between them.
//!
//! What must hold: no panic; every exit that asks for an answer gets one, and no other does; the handlers come back.

use crate::config::{DiskConfig, DiskInterface, MachineConfig};
use crate::machine::Machine;
use crate::vcpu::Runner;
use chipset::board as at;
use cpu::{Engine, Error, Exit, Kick, LocalApics, Registers, Space, Vcpu, VcpuConfig, msr};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A multiboot header: nothing of the kernel is ever executed.
const KERNEL: [u32; 9] = [0x1bad_b002, 0x1_0000, 0xe451_4ffe, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020, 0xf4];
/// Places in memory that are worth an access, and how much there is.
const PLACES: [(u64, u64); 6] = [
    (at::LOCAL_APIC, 0x1000),
    (at::IOAPIC, 0x100),
    (at::ECAM.base, 0x4_0000),
    (at::MMIO32.base, 0x4_0000),
    (at::MMIO64.base, 0x8_0000),
    (at::TEST_MEMORY, 0x1000),
];
const PORTS: [u16; 20] = [
    0x20, 0x21, 0xa0, 0xa1, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0x3f8, 0x2f8, 0x600, 0x608,
    0xcf8, 0xcfc, 0x2000, 0xe0,
];
const MSRS: [u32; 14] = [
    msr::APIC_BASE,
    msr::TSC_DEADLINE,
    msr::X2APIC_FIRST,
    0x808,
    0x80b,
    0x80f,
    0x830,
    0x832,
    msr::KVM_WALL_CLOCK,
    msr::KVM_SYSTEM_TIME,
    msr::KVM_STEAL_TIME,
    msr::KVM_EOI_EN,
    msr::KVM_POLL_CONTROL,
    msr::MTRR_DEF_TYPE,
];

/// What the script and its vCPU share.
#[derive(Default)]
struct Shared {
    answers: AtomicUsize,
    interruptible: AtomicBool,
}

/// An engine whose exits are written by the fuzzer. With `apics` it has local APICs of its own, as KVM has.
struct Script {
    apics: bool,
    shared: Arc<Shared>,
}

struct Deaf;

impl LocalApics for Deaf {
    fn send(&self, _address: u64, _data: u32) {}
    fn set_pins(&self, _messages: &[(u64, u32)]) {}
}

impl Kick for Deaf {
    fn kick(&self) {}
}

impl Engine for Script {
    fn name(&self) -> &'static str {
        "script"
    }

    fn create_vcpu(&self, _config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error> {
        let shared = self.shared.clone();
        Ok(Box::new(Actor { registers: Registers::default(), msrs: BTreeMap::new(), priority: 0, shared }))
    }

    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }

    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        self.apics.then(|| Arc::new(Deaf) as Arc<dyn LocalApics>)
    }
}

struct Actor {
    registers: Registers,
    msrs: BTreeMap<u32, u64>,
    priority: u8,
    shared: Arc<Shared>,
}

impl Vcpu for Actor {
    fn run(&mut self) -> Result<Exit, Error> {
        Ok(Exit::Interrupted)
    }
    fn complete(&mut self, _answer: Option<u64>) {
        self.shared.answers.fetch_add(1, Ordering::SeqCst);
    }
    fn inject_interrupt(&mut self, _vector: u8) {
        assert!(self.interruptible(), "an interrupt that nobody can take");
    }
    fn inject_nmi(&mut self) {}
    fn interruptible(&self) -> bool {
        self.shared.interruptible.load(Ordering::SeqCst)
    }
    fn request_interrupt_window(&mut self, _wanted: bool) {}
    fn registers(&self) -> Registers {
        self.registers.clone()
    }
    fn set_registers(&mut self, registers: &Registers) {
        self.registers = registers.clone();
    }
    fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.get(&index).copied()
    }
    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        self.msrs.insert(index, value);
        true
    }
    fn task_priority(&self) -> u8 {
        self.priority
    }
    fn set_task_priority(&mut self, priority: u8) {
        assert!(priority < 16, "CR8 has four bits");
        self.priority = priority;
    }
    fn tsc(&self) -> u64 {
        0x1234_5678
    }
    fn flush_tlb(&mut self) {}
    fn reset(&mut self, _init: bool) {
        self.registers = Registers::default();
    }
    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(Deaf)
    }
}

/// A machine that stands on the script, and its one vCPU's loop.
struct Stage {
    machine: Machine,
    runner: Runner,
    shared: Arc<Shared>,
    /// Kernel and disks.
    _files: tempfile::TempDir,
}

fn stage(apics: bool) -> Stage {
    let files = tempfile::tempdir().expect("a directory");
    let path = |name: &str| files.path().join(name);
    let kernel: Vec<u8> = KERNEL.iter().flat_map(|word| word.to_le_bytes()).collect();
    std::fs::write(path("kernel"), kernel).expect("a kernel");
    let disk = |name: &str, interface| {
        std::fs::write(path(name), vec![0; 1 << 16]).expect("a disk");
        DiskConfig { interface, ..DiskConfig::raw(path(name)) }
    };
    let config = MachineConfig {
        memory: 4 << 20,
        test_devices: true,
        ports: vec!["agent".to_owned()],
        disks: vec![disk("virtio", DiskInterface::Virtio), disk("nvme", DiskInterface::Nvme)],
        ..MachineConfig::new(path("kernel"))
    };
    let shared = Arc::new(Shared::default());
    let engine = Arc::new(Script { apics, shared: shared.clone() });
    let (machine, runner) = Machine::on_script(config, engine).expect("a machine");
    Stage { machine, runner, shared, _files: files }
}

/// The fuzzer's bytes from the front, zeroes where they end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (now, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..now.len()].copy_from_slice(now);
        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn word(&mut self) -> u64 {
        match self.byte() & 3 {
            0 => self.byte().into(),
            1 => u16::from_le_bytes(self.array()).into(),
            2 => u32::from_le_bytes(self.array()).into(),
            _ => u64::from_le_bytes(self.array()),
        }
    }

    /// Where, and how wide.
    fn place(&mut self) -> (Space, u64, u8) {
        let [what, low] = self.array();
        let size = 1 << (what >> 6);
        if what & 0x20 != 0 {
            let base = PORTS[usize::from(what & 0x1f) % PORTS.len()];
            let port = if low & 0x80 != 0 {
                u16::from_le_bytes(self.array())
            } else {
                base.wrapping_add((low & 7).into())
            };
            return (Space::Port, port.into(), size.min(4));
        }
        match PLACES.get(usize::from(what & 0xf)) {
            Some((base, len)) => {
                let offset = u64::from(u16::from_le_bytes(self.array())) << (low & 3);
                (Space::Mmio, base + offset % len, size)
            }
            None => (Space::Mmio, self.word(), size),
        }
    }

    fn exit(&mut self) -> Exit {
        match self.byte() & 0x1f {
            0..=9 => {
                let (space, address, size) = self.place();
                let mask = u64::MAX >> (64 - u32::from(size) * 8);
                Exit::Write { space, address, size, value: self.word() & mask }
            }
            10..=15 => {
                let (space, address, size) = self.place();
                Exit::Read { space, address, size }
            }
            16 | 17 => Exit::ReadMsr { index: self.msr() },
            18..=21 => Exit::WriteMsr { index: self.msr(), value: self.word() },
            22 | 23 => {
                let number = u64::from(self.byte()) & 0xf;
                Exit::Hypercall { number, args: std::array::from_fn(|_| self.word()) }
            }
            24 => Exit::EndOfInterrupt { vector: self.byte() },
            25 => Exit::Halt,
            26 => Exit::InterruptWindow,
            27 => Exit::Debug,
            28 if self.byte() == 0xff => Exit::Shutdown,
            _ => Exit::Interrupted,
        }
    }

    fn msr(&mut self) -> u32 {
        let [choice, low] = self.array();
        match MSRS.get(usize::from(choice & 0x1f)) {
            Some(index) => *index,
            None if choice & 0x80 != 0 => msr::X2APIC_FIRST + u32::from(low),
            None => u32::from_le_bytes(self.array()),
        }
    }
}

impl Stage {
    /// One exit or one change of RAM; `false` once the machine has ended.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let kind = bytes.byte();
        self.shared.interruptible.store(kind & 1 != 0, Ordering::SeqCst);
        if kind & 0xe0 == 0xe0 {
            let at = u64::from(u16::from_le_bytes(bytes.array())) << 4;
            let content: [u8; 16] = bytes.array();
            self.machine.common().memory.write(at, &content).expect("in RAM");
        }
        let exit = bytes.exit();
        let asks = matches!(
            exit,
            Exit::Read { .. } | Exit::ReadMsr { .. } | Exit::WriteMsr { .. } | Exit::Hypercall { .. }
        );
        let before = self.shared.answers.load(Ordering::SeqCst);
        let goes_on = self.runner.play(exit);
        let answers = self.shared.answers.load(Ordering::SeqCst) - before;
        assert_eq!(answers, usize::from(asks), "answers to an exit");
        goes_on
    }
}

/// Exits of these bytes, on a machine with local APICs of its own or on one whose engine has them.
pub fn fuzz_exits(data: &[u8]) {
    thread_local!(static STAGES: RefCell<[Option<Stage>; 2]> = const { RefCell::new([None, None]) });
    let mut bytes = Bytes(data);
    let apics = bytes.byte() & 1;
    STAGES.with_borrow_mut(|stages| {
        let kept = &mut stages[usize::from(apics)];
        let stage = kept.get_or_insert_with(|| stage(apics == 1));
        let mut lives = true;
        while lives && !bytes.0.is_empty() {
            lives = stage.step(&mut bytes);
        }
        if !lives {
            *kept = None;
        }
    });
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_guest_that_resets_with_its_first_instruction_lets_itself_be_paused() {
        let Stage { machine, mut runner, shared: _, _files } = stage(true);
        // The keyboard controller's pulse.
        let reset = Exit::Write { space: Space::Port, address: 0x64, size: 1, value: 0xfe };
        std::thread::scope(|scope| {
            let guest =
                scope.spawn(move || while runner.play(reset.clone()) && runner.play(Exit::Interrupted) {});
            for starts in [5, 10] {
                while machine.starts() < starts {
                    std::thread::yield_now();
                }
                assert!(machine.pause());
                machine.resume();
            }
            machine.stop();
            guest.join().unwrap();
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn exits_of_any_content_hurt_nobody(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::fuzz_exits(&data);
        }
    }
}
