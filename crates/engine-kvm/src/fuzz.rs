//! Entry point for fuzzers: exits of any kind and content on the kernel's double, answered as a machine answers, with saves, resets,
//! kicks and pauses between them.
//!
//! What must hold: no panic; accesses are of a natural width, with no bits beyond it, and of one exit no more than its page holds;
//! an answer changes nothing but where the exit said it goes.

use crate::double::{Double, FIRST_VCPU, IO_DATA, RUN_LEN};
use crate::engine::{KvmEngine, Options};
use cpu::{Engine, Exit, Vcpu, VcpuConfig};
use kvm_bindings as kvm;
use memory::{Backing, GuestMemory};
use std::cell::RefCell;
use std::mem::offset_of;
use std::sync::Arc;

const REASON: usize = offset_of!(kvm::kvm_run, exit_reason);
const DETAIL: usize = offset_of!(kvm::kvm_run, __bindgen_anon_1);
/// Bytes of the union that a case fills.
const DETAIL_LEN: usize = 64;
/// Exits that say something worth decoding, first of all.
const REASONS: [u32; 13] = [
    kvm::KVM_EXIT_IO,
    kvm::KVM_EXIT_MMIO,
    kvm::KVM_EXIT_MMIO,
    kvm::KVM_EXIT_X86_RDMSR,
    kvm::KVM_EXIT_X86_WRMSR,
    kvm::KVM_EXIT_HYPERCALL,
    kvm::KVM_EXIT_IOAPIC_EOI,
    kvm::KVM_EXIT_INTERNAL_ERROR,
    kvm::KVM_EXIT_FAIL_ENTRY,
    kvm::KVM_EXIT_SYSTEM_EVENT,
    kvm::KVM_EXIT_IRQ_WINDOW_OPEN,
    kvm::KVM_EXIT_MEMORY_FAULT,
    kvm::KVM_EXIT_DIRTY_RING_FULL,
];
const ERRORS: [i32; 4] = [libc::EINTR, libc::EAGAIN, libc::EFAULT, libc::EIO];

struct Case {
    double: Arc<Double>,
    engine: KvmEngine,
    vcpu: Box<dyn Vcpu>,
    /// An exit is to be answered.
    asked: bool,
    /// Accesses handed out since the kernel was asked last.
    handed: u32,
}

fn case() -> Option<Case> {
    let double = Arc::new(Double::linux_6_12().idle());
    for index in [cpu::msr::TSC, cpu::msr::STAR, cpu::msr::TSC_DEADLINE] {
        double.set_msr(index, 0);
    }
    let memory = GuestMemory::new(&[(0, 1 << 16)], Backing::Private).ok()?;
    let engine = KvmEngine::on(double.clone(), memory, Options::default()).ok()?;
    let vcpu = engine.create_vcpu(VcpuConfig { index: 0, cpuid: Arc::default() }).ok()?;
    Some(Case { double, engine, vcpu, asked: false, handed: 0 })
}

/// The next bytes, zeroes where they end.
fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    let (now, rest) = data.split_at(N.min(data.len()));
    bytes[..now.len()].copy_from_slice(now);
    *data = rest;
    bytes
}

impl Case {
    /// Queues what the next KVM_RUN does.
    fn queue(&self, kind: u8, data: &mut &[u8]) {
        let [choice] = take(data);
        if kind & 0x30 == 0x30 {
            return self.double.fails(ERRORS[usize::from(choice) % ERRORS.len()]);
        }
        let reason = match choice {
            0xf0.. => take::<1>(data)[0].into(),
            choice => REASONS[usize::from(choice) % REASONS.len()],
        };
        let mut detail: [u8; DETAIL_LEN] = take(data);
        if reason == kvm::KVM_EXIT_IO && choice & 0x40 == 0 {
            // As a kernel says it: sound width and place, a count that the page holds.
            detail[1] = 1 << (detail[1] % 3);
            detail[5..8].fill(0);
            detail[8..16].copy_from_slice(&(IO_DATA as u64).to_le_bytes());
        }
        let fill = choice;
        self.double.then(move |page| {
            page[REASON..REASON + 4].copy_from_slice(&reason.to_le_bytes());
            page[DETAIL..DETAIL + DETAIL_LEN].copy_from_slice(&detail);
            page[IO_DATA..].fill(fill);
            Ok(0)
        });
    }

    fn run(&mut self) {
        let runs = self.double.count("RUN");
        let exit = self.vcpu.run();
        if self.double.count("RUN") != runs {
            self.handed = 0;
        }
        self.asked = false;
        match exit {
            Ok(Exit::Read { size, .. }) => {
                assert!(matches!(size, 1 | 2 | 4 | 8), "{size} bytes");
                self.handed += 1;
                self.asked = true;
            }
            Ok(Exit::Write { size, value, .. }) => {
                assert!(matches!(size, 1 | 2 | 4 | 8), "{size} bytes");
                assert!(size == 8 || value >> (size * 8) == 0, "{value:#x} in {size} bytes");
                self.handed += 1;
            }
            Ok(Exit::ReadMsr { .. } | Exit::WriteMsr { .. } | Exit::Hypercall { .. }) => self.asked = true,
            Ok(_) => {}
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        assert!(self.handed <= 4096, "one exit is {} accesses", self.handed);
    }

    fn complete(&mut self, data: &mut &[u8]) {
        let [some] = take(data);
        let answer = (some & 1 != 0).then(|| u64::from_le_bytes(take(data)));
        let registers = |double: &Double| {
            let mut head = Vec::new();
            double.page(FIRST_VCPU, |page| {
                head.extend_from_slice(&page[..DETAIL]);
                // All after the union and before the page of port I/O is the kernel's.
                head.extend_from_slice(&page[DETAIL + 256..IO_DATA]);
                assert_eq!(page.len(), RUN_LEN);
            });
            head
        };
        let before = registers(&self.double);
        self.vcpu.complete(answer);
        assert_eq!(before, registers(&self.double), "an answer went where none belongs");
        self.asked = false;
    }

    fn step(&mut self, data: &mut &[u8]) {
        let [kind] = take(data);
        match kind & 0xf {
            0..=5 => {
                self.queue(kind, data);
                self.run();
            }
            6 | 7 => self.run(),
            // Answers that nobody asked for, too.
            8..=10 => self.complete(data),
            11 => {
                self.vcpu.kick_handle().kick();
                self.run();
            }
            12 => {
                let state = self.vcpu.save();
                if let Ok(mut state) = state {
                    let at = usize::from(kind >> 4) * 61 % state.extended.len().max(1);
                    if let Some(byte) = state.extended.get_mut(at) {
                        *byte ^= kind;
                    }
                    state.extended.truncate(if kind == 0xfc { 500 } else { usize::MAX });
                    let _ = self.vcpu.restore(&state);
                }
            }
            13 if kind & 0x80 != 0 => self.vcpu.inject_nmi(),
            13 => {
                if self.vcpu.interruptible() {
                    self.vcpu.inject_interrupt(kind);
                }
                self.vcpu.request_interrupt_window(kind & 0x40 != 0);
            }
            14 => {
                self.vcpu.stand();
                self.engine.stand();
                self.engine.go_on();
                self.vcpu.go_on();
            }
            _ => self.vcpu.reset(kind & 0x10 != 0),
        }
        if self.asked && kind & 0x40 != 0 {
            self.complete(data);
        }
    }
}

/// Exits of these bytes, one after the other.
pub fn fuzz_exits(mut data: &[u8]) {
    thread_local!(static CASE: RefCell<Option<Case>> = const { RefCell::new(None) });
    CASE.with_borrow_mut(|kept| {
        let case = kept.get_or_insert_with(|| case().expect("a vCPU on the double"));
        case.double.forget_asked();
        case.vcpu.reset(false);
        case.handed = 0;
        while !data.is_empty() {
            case.step(&mut data);
        }
        // What is left of a list of accesses is handed out, and the queue of runs ends.
        case.vcpu.reset(false);
        case.run();
    });
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn exits_of_any_content_hurt_nobody(data in proptest::collection::vec(any::<u8>(), 0..600)) {
            super::fuzz_exits(&data);
        }
    }
}
