//! Does this host's KVM run kernels? Opening /dev/kvm does not tell: some hosts offer it on top of a back end that
//! refuses instructions every kernel uses, or emulates kernel code one instruction at a time.

use crate::guest::{LOOP_ITERATIONS, PORT, program};
use crate::interrupt;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memory::{Backing, GuestMemory};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the probe's guest may take in all.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long the timed loop may take; native, it is well under a millisecond.
const LOOP_MAX: Duration = Duration::from_millis(20);

/// What a look at /dev/kvm told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It runs what kernels execute, at native speed.
    Usable {
        /// Nanoseconds per iteration of the timed loop, in tenths.
        loop_tenth_ns: u64,
    },
    /// It does not; one clause says why, another what to do about it.
    Unusable {
        /// What is wrong, for a sentence that begins with "/dev/kvm".
        why: String,
        /// What the user can do, if anything.
        cure: Option<String>,
    },
}

/// Tries /dev/kvm with a small guest; takes a few milliseconds where KVM works, at most about two seconds elsewhere.
pub fn probe() -> Verdict {
    match open() {
        Ok(kvm) => run(kvm),
        Err(verdict) => verdict,
    }
}

fn unusable(why: impl Into<String>, cure: Option<&str>) -> Verdict {
    Verdict::Unusable { why: why.into(), cure: cure.map(str::to_owned) }
}

fn open() -> Result<Kvm, Verdict> {
    let kvm = Kvm::new().map_err(|error| {
        let error = std::io::Error::from_raw_os_error(error.errno());
        match error.kind() {
            ErrorKind::NotFound => unusable(
                "does not exist",
                Some("enable virtualization in the firmware, or nesting in the cloud, and load kvm_intel or kvm_amd"),
            ),
            ErrorKind::PermissionDenied => {
                unusable("may not be opened by this user", Some("sudo usermod -aG kvm $USER, then log in again"))
            }
            _ => unusable(format!("cannot be opened ({error})"), None),
        }
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(unusable(
            format!("speaks API version {other}, not 12"),
            Some("use a kernel newer than 2.6.22"),
        )),
    }
}

const STEPS: [&str; 6] = ["its first instruction", "int3", "cmpxchg16b", "xrstors", "a loop", "the end"];

fn run(kvm: Kvm) -> Verdict {
    interrupt::install();
    let step = Arc::new(AtomicU8::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let (seen, give_up) = (step.clone(), stop.clone());
    let spawned = thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        let mut guest = Guest::new(&kvm).map_err(|error| (0, format!("cannot make a guest ({error})")))?;
        guest.run(&seen, &give_up)
    });
    let Ok(guest) = spawned else { return unusable("could not be tried: no thread", None) };
    let begin = Instant::now();
    let mut slow = false;
    while !guest.is_finished() {
        thread::sleep(Duration::from_micros(200));
        if begin.elapsed() > PATIENCE {
            slow = true;
            stop.store(true, Ordering::Release);
            interrupt::interrupt(&guest);
        }
    }
    let at = STEPS.get(usize::from(step.load(Ordering::Acquire))).copied().unwrap_or("its end");
    match guest.join() {
        _ if slow => {
            unusable(format!("crawls: our test guest did not finish within {PATIENCE:?} (at {at})"), None)
        }
        Ok(Ok(took)) if took > LOOP_MAX => unusable(
            format!(
                "emulates kernel code: {} ns per instruction where native code takes less than one",
                took.as_nanos() / u128::from(2 * LOOP_ITERATIONS)
            ),
            None,
        ),
        Ok(Ok(took)) => Verdict::Usable {
            loop_tenth_ns: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).saturating_mul(10)
                / u64::from(LOOP_ITERATIONS),
        },
        Ok(Err((step, why))) => {
            let at = STEPS.get(usize::from(step)).copied().unwrap_or("its end");
            unusable(format!("does not run kernels: our test guest failed at {at} ({why})"), None)
        }
        Err(_) => unusable("could not be tried: the probe failed", None),
    }
}

/// The test guest: 64 KiB of RAM, identity-mapped, one vCPU in long mode.
struct Guest {
    vcpu: VcpuFd,
    // Dropped after the vCPU, in this order.
    _vm: VmFd,
    _memory: GuestMemory,
}

const RAM: u64 = 2 << 20;
const CODE: u64 = 0x8000;
const STACK: u64 = 0x7ff0;
const IDT: u64 = 0x6000;
const PAGE_TABLES: u64 = 0x1000;
const GDT: u64 = 0x9000;

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        let lack = |errno| kvm_ioctls::Error::new(errno);
        let memory = GuestMemory::new(&[(0, RAM)], Backing::Private).map_err(|_| lack(libc::ENOMEM))?;
        let (code, handler) = program();
        let put = |address: u64, bytes: &[u8]| memory.write(address, bytes).map_err(|_| lack(libc::EFAULT));
        put(CODE, code)?;
        // One 2 MiB page through three levels: present, writable; page size in the last.
        put(PAGE_TABLES, &((PAGE_TABLES + 0x1000) | 3).to_le_bytes())?;
        put(PAGE_TABLES + 0x1000, &((PAGE_TABLES + 0x2000) | 3).to_le_bytes())?;
        put(PAGE_TABLES + 0x2000, &0x83u64.to_le_bytes())?;
        // GDT: null, 64-bit code, data. IDT: vector 3 is an interrupt gate to the handler.
        put(GDT, &[0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat())?;
        let to = CODE + handler;
        let gate = to & 0xffff | 8 << 16 | 0x8e00 << 32 | (to >> 16 & 0xffff) << 48;
        put(IDT + 3 * 16, &[gate.to_le_bytes(), (to >> 32).to_le_bytes()].concat())?;

        let vm = kvm.create_vm()?;
        let host = memory.host_range(0, RAM, true).map_err(|_| lack(libc::EFAULT))?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: host as u64,
        };
        set_memory(&vm, slot)?;
        let vcpu = vm.create_vcpu(0)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let xsaves = cpuid.as_slice().iter().any(|e| e.function == 0xd && e.index == 1 && e.eax & 8 != 0);
        let xsave = cpuid.as_slice().iter().any(|e| e.function == 1 && e.ecx & 1 << 26 != 0);
        vcpu.set_cpuid2(&cpuid)?;
        vcpu.set_sregs(&long_mode(vcpu.get_sregs()?, xsave))?;
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK,
            rflags: 2,
            r15: u64::from(xsaves && xsave),
            ..kvm_regs::default()
        };
        vcpu.set_regs(&regs)?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Runs to the end; answers how long the loop took, or the step at which it failed and how.
    fn run(&mut self, step: &AtomicU8, give_up: &AtomicBool) -> Result<Duration, (u8, String)> {
        let mut began = Instant::now();
        while !give_up.load(Ordering::Acquire) {
            let at = step.load(Ordering::Acquire);
            let why = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, &[next])) => {
                    match next {
                        4 => began = Instant::now(),
                        5 => return Ok(began.elapsed()),
                        9 => return Err((at, "wrong result".into())),
                        _ => {}
                    }
                    step.store(next, Ordering::Release);
                    continue;
                }
                Ok(VcpuExit::InternalError) => "KVM internal error".to_owned(),
                Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
                Ok(other) => format!("unexpected exit {other:?}"),
                Err(error) if error.errno() == libc::EINTR => continue,
                Err(error) => error.to_string(),
            };
            return Err((at, why));
        }
        Err((step.load(Ordering::Acquire), "too slow".into()))
    }
}

fn long_mode(mut sregs: kvm_sregs, xsave: bool) -> kvm_sregs {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 4 * 16 - 1);
    // PE, MP, ET, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT and OSXSAVE; LME, LMA.
    sregs.cr0 = 0x8001_0033;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x620 | if xsave { 1 << 18 } else { 0 };
    sregs.efer = 0x500;
    sregs
}

/// Gives the VM its RAM.
#[allow(unsafe_code)]
fn set_memory(vm: &VmFd, slot: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the region is a mapping of `GuestMemory`, which `Guest` keeps until after the VM is gone.
    unsafe { vm.set_user_memory_region(slot) }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_probe_comes_to_a_verdict_in_time() {
        let begin = Instant::now();
        let verdict = probe();
        assert!(begin.elapsed() < PATIENCE * 2, "{verdict:?} took {:?}", begin.elapsed());
        if let Verdict::Unusable { why, .. } = &verdict {
            assert!(!why.is_empty());
        }
        println!("{verdict:?} after {:?}", begin.elapsed());
    }
}
