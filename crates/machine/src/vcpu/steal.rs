//! KVM's steal time (Linux `Documentation/virt/kvm/x86/msr.rst`): how long a vCPU's thread wanted a host CPU and had none;
//! and whether the vCPU runs, so that others spin less for it and leave it alone when TLBs are flushed.
//!
//! States: off; running (`preempted` is zero); asleep (`preempted` is set: others may add the wish for a flush, which is
//! done before the guest runs again).

use memory::GuestMemory;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The MSR's bits: enabled, those that must be zero, the address.
const ENABLED: u64 = 1;
const RESERVED: u64 = 0x3e;
const ADDRESS: u64 = !0x3f;
/// Of `struct kvm_steal_time`.
const STEAL: u64 = 0;
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;
/// Bits of `preempted`.
const IS_PREEMPTED: u32 = 1 << 0;
const FLUSH_TLB: u32 = 1 << 1;
/// How often the host is asked, in time that the vCPU does not sleep: idle guests need not pay for what nobody takes.
const PERIOD: Duration = Duration::from_millis(2);

/// One vCPU's.
#[derive(Debug, Default)]
pub(super) struct StealTime {
    value: u64,
    /// The host's accounts of the vCPU's thread.
    accounts: Option<File>,
    /// Waiting time that has been told already.
    known: u64,
    updated: Option<Instant>,
}

impl StealTime {
    /// What the MSR holds.
    pub(super) fn value(&self) -> u64 {
        self.value
    }

    fn at(&self) -> Option<u64> {
        (self.value & ENABLED != 0).then_some(self.value & ADDRESS)
    }

    /// WRMSR, on the vCPU's thread; `None` is #GP.
    pub(super) fn set(&mut self, value: u64, memory: &GuestMemory) -> Option<()> {
        if value & RESERVED != 0 {
            return None;
        }
        self.value = value;
        if self.at().is_some() {
            // A host that keeps no such accounts steals nothing.
            self.accounts = File::open("/proc/thread-self/schedstat").ok();
            self.known = self.waited().unwrap_or(0);
            self.updated = None;
            self.wakes(Duration::ZERO, memory);
        }
        Some(())
    }

    /// Nanoseconds that the thread has waited for a CPU: the second number of `schedstat`.
    fn waited(&self) -> Option<u64> {
        let mut text = [0; 96];
        let length = self.accounts.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(text.get(..length)?).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    }

    /// Tells the guest what was stolen since the last time, if that was a while ago.
    pub(super) fn update(&mut self, memory: &GuestMemory) {
        let Some(at) = self.at() else { return };
        if self.updated.is_some_and(|updated| updated.elapsed() < PERIOD) {
            return;
        }
        self.updated = Some(Instant::now());
        let Some(waited) = self.waited() else { return };
        let stolen = waited.saturating_sub(self.known);
        self.known = waited;
        if stolen != 0 {
            // A page that is not RAM is the guest's own mistake.
            let _ = tell(memory, at, stolen);
        }
    }

    /// The vCPU goes to sleep.
    pub(super) fn sleeps(&self, memory: &GuestMemory) {
        if let Some(at) = self.at() {
            let _ = memory.atomic_u32(at.wrapping_add(PREEMPTED), |word| {
                word.fetch_or(IS_PREEMPTED, Ordering::SeqCst);
            });
        }
    }

    /// The vCPU runs again after so long; answers whether others want its TLB flushed.
    pub(super) fn wakes(&mut self, slept: Duration, memory: &GuestMemory) -> bool {
        self.updated = self.updated.and_then(|updated| updated.checked_add(slept));
        let Some(at) = self.at() else { return false };
        let before = memory.atomic_u32(at.wrapping_add(PREEMPTED), |word| {
            word.fetch_and(!(IS_PREEMPTED | FLUSH_TLB), Ordering::SeqCst)
        });
        before.is_ok_and(|before| before & FLUSH_TLB != 0)
    }
}

/// Adds to `steal`; the version is odd meanwhile.
fn tell(memory: &GuestMemory, at: u64, stolen: u64) -> Result<(), memory::AccessError> {
    let version = memory.load_u32(at.wrapping_add(VERSION))? & !1;
    let steal = memory.load_u64(at.wrapping_add(STEAL))?.wrapping_add(stolen);
    memory.write(at.wrapping_add(VERSION), &version.wrapping_add(1).to_le_bytes())?;
    memory.write(at.wrapping_add(STEAL), &steal.to_le_bytes())?;
    memory.write(at.wrapping_add(VERSION), &version.wrapping_add(2).to_le_bytes())
}

#[cfg(test)]
mod test {
    use super::*;
    use memory::Backing;

    fn on(memory: &GuestMemory) -> StealTime {
        let mut steal = StealTime::default();
        steal.set(0x101, memory).expect("a sound address");
        steal
    }

    #[test]
    fn a_sleeper_can_be_asked_to_flush() {
        let memory = GuestMemory::new(&[(0, 0x1000)], Backing::Private).unwrap();
        assert_eq!(StealTime::default().set(0x103, &memory), None);
        let mut steal = on(&memory);
        assert_eq!(steal.value(), 0x101);
        steal.sleeps(&memory);
        assert_eq!(memory.load_u32(0x100 + PREEMPTED).unwrap(), IS_PREEMPTED);
        // As another vCPU does it.
        memory.write(0x100 + PREEMPTED, &[3]).unwrap();
        assert!(steal.wakes(Duration::ZERO, &memory));
        assert_eq!(memory.load_u32(0x100 + PREEMPTED).unwrap(), 0);
        assert!(!steal.wakes(Duration::ZERO, &memory));
        let mut off = StealTime::default();
        off.sleeps(&memory);
        assert!(!off.wakes(Duration::ZERO, &memory));
    }

    #[test]
    fn what_was_stolen_adds_up_under_an_even_version() {
        let memory = GuestMemory::new(&[(0, 0x1000)], Backing::Private).unwrap();
        tell(&memory, 0x100, 500).unwrap();
        tell(&memory, 0x100, 700).unwrap();
        assert_eq!((memory.load_u64(0x100).unwrap(), memory.load_u32(0x108).unwrap()), (1200, 4));
        assert!(tell(&memory, 0x10_0000, 1).is_err());
        let mut steal = on(&memory);
        assert!(steal.waited().is_some(), "Linux keeps these accounts");
        // As if nothing had been told yet: the thread has waited for something in its life, or not.
        steal.known = 0;
        steal.update(&memory);
        assert_eq!(memory.load_u64(0x100).unwrap(), 1200 + steal.known);
        assert!(steal.updated.is_some());
    }
}
