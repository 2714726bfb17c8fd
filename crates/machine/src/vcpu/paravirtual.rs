//! KVM's paravirtual interface as far as CPUID offers it (Linux `Documentation/virt/kvm/x86/`: msr.rst, cpuid.rst,
//! hypercalls.rst; `arch/x86/include/asm/pvclock-abi.h`).

use device::VmTime;
use memory::{AccessError, GuestMemory};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Hypercall numbers.
pub(super) mod hypercall {
    pub(in super::super) const VAPIC_POLL_IRQ: u64 = 1;
    pub(in super::super) const KICK_CPU: u64 = 5;
    pub(in super::super) const CLOCK_PAIRING: u64 = 9;
    pub(in super::super) const SEND_IPI: u64 = 10;
    pub(in super::super) const SCHED_YIELD: u64 = 11;
    /// -KVM_ENOSYS: no such hypercall.
    pub(in super::super) const NO_SUCH_CALL: u64 = 1000u64.wrapping_neg();
    /// -KVM_EFAULT.
    pub(in super::super) const BAD_ADDRESS: u64 = 14u64.wrapping_neg();
    /// -KVM_EINVAL.
    pub(in super::super) const INVALID: u64 = 22u64.wrapping_neg();
    /// -KVM_EOPNOTSUPP.
    pub(in super::super) const NOT_SUPPORTED: u64 = 95u64.wrapping_neg();
}

/// KVM_CLOCK_PAIRING_WALLCLOCK.
const PAIRING_WALL_CLOCK: u64 = 0;
/// PVCLOCK_TSC_STABLE_BIT: all vCPUs' pages agree.
const FLAG_TSC_STABLE: u8 = 1 << 0;
/// PVCLOCK_GUEST_STOPPED: the machine was paused, so a late timer is no lockup.
const FLAG_GUEST_STOPPED: u8 = 1 << 1;

/// Nanoseconds since 1970.
pub(crate) fn wall_clock_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// The factor that turns TSC ticks into nanoseconds: `((ticks << shift) * multiplier) >> 32`, with a shift to the
/// right where `shift` is negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scale {
    multiplier: u32,
    shift: i8,
}

impl Scale {
    /// The closest factor for a TSC of `hz`: the multiplier has its top bit set.
    pub(super) fn of(hz: u64) -> Self {
        let hz = u128::from(hz.max(1));
        let mut shift = 0i8;
        // 1e9 / hz as a fraction of 2^32 lies in [2^31, 2^32) once scaled by 2^-shift.
        let factor = |shift: i8| {
            let numerator = (1_000_000_000u128 << 32).wrapping_shl(32);
            let scaled = if shift >= 0 {
                numerator >> shift.unsigned_abs()
            } else {
                numerator << shift.unsigned_abs()
            };
            (scaled.checked_div(hz).unwrap_or(0) >> 31).wrapping_add(1) >> 1
        };
        while factor(shift) > u128::from(u32::MAX) && shift < 31 {
            shift = shift.wrapping_add(1);
        }
        while factor(shift) < 1 << 31 && shift > -31 {
            shift = shift.wrapping_sub(1);
        }
        Self { multiplier: u32::try_from(factor(shift)).unwrap_or(u32::MAX), shift }
    }

    /// What the guest computes.
    #[cfg(test)]
    fn ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let ticks = if self.shift >= 0 {
            ticks << self.shift.unsigned_abs()
        } else {
            ticks >> self.shift.unsigned_abs()
        };
        u64::try_from((ticks * u128::from(self.multiplier)) >> 32).unwrap()
    }
}

/// A moment in both times, the same for all vCPUs so that their clocks never disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reference {
    tsc: u64,
    time: VmTime,
}

/// The machine-wide half of kvmclock.
#[derive(Debug)]
pub(crate) struct SystemClock {
    scale: Scale,
    reference: Mutex<Option<Reference>>,
}

impl SystemClock {
    /// The clock of vCPUs whose TSCs count at `hz`, all together.
    pub(crate) fn new(hz: u64) -> Self {
        Self { scale: Scale::of(hz), reference: Mutex::new(None) }
    }

    /// Time stood still: the next page written takes a new reference.
    pub(crate) fn forget(&self) {
        *self.reference.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn reference(&self, tsc: u64, time: VmTime) -> Reference {
        *self.reference.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(Reference { tsc, time })
    }

    /// Writes a vCPU's `pvclock_vcpu_time_info`: odd version, fields, even version.
    pub(super) fn write_page(
        &self,
        memory: &GuestMemory,
        at: u64,
        tsc: u64,
        now: VmTime,
        stopped: bool,
    ) -> Result<(), AccessError> {
        let reference = self.reference(tsc, now);
        let odd = (memory.load_u32(at)? | 1).wrapping_add(if memory.load_u32(at)? & 1 == 0 { 0 } else { 2 });
        let stopped = if stopped { FLAG_GUEST_STOPPED } else { 0 };
        let mut fields = [0u8; 28];
        crate::boot::put(&mut fields, 4, &reference.tsc.to_le_bytes());
        crate::boot::put(&mut fields, 12, &reference.time.0.to_le_bytes());
        crate::boot::put(&mut fields, 20, &self.scale.multiplier.to_le_bytes());
        crate::boot::put(&mut fields, 24, &self.scale.shift.to_le_bytes());
        crate::boot::put(&mut fields, 25, &[FLAG_TSC_STABLE | stopped]);
        memory.write(at, &odd.to_le_bytes())?;
        memory.write(at.saturating_add(4), &fields)?;
        memory.write(at, &odd.wrapping_add(1).to_le_bytes())
    }
}

/// Writes `pvclock_wall_clock`: what the wall clock said when VM time was zero.
pub(super) fn write_wall_clock(memory: &GuestMemory, at: u64, now: VmTime) -> Result<(), AccessError> {
    let boot = wall_clock_ns().saturating_sub(now.0);
    let version = memory.load_u32(at)? & !1;
    memory.write(at, &version.wrapping_add(1).to_le_bytes())?;
    let (seconds, nanoseconds) = seconds(boot);
    memory.write(at.saturating_add(4), &(seconds as u32).to_le_bytes())?;
    memory.write(at.saturating_add(8), &(nanoseconds as u32).to_le_bytes())?;
    memory.write(at, &version.wrapping_add(2).to_le_bytes())
}

fn seconds(ns: u64) -> (u64, u64) {
    (ns / 1_000_000_000, ns % 1_000_000_000)
}

/// KVM_HC_CLOCK_PAIRING: the wall clock and the TSC of the same moment.
pub(super) fn clock_pairing(memory: &GuestMemory, at: u64, kind: u64, tsc: u64) -> u64 {
    if kind != PAIRING_WALL_CLOCK {
        return hypercall::NOT_SUPPORTED;
    }
    let (seconds, nanoseconds) = seconds(wall_clock_ns());
    let mut pairing = [0u8; 64];
    crate::boot::put(&mut pairing, 0, &seconds.to_le_bytes());
    crate::boot::put(&mut pairing, 8, &nanoseconds.to_le_bytes());
    crate::boot::put(&mut pairing, 16, &tsc.to_le_bytes());
    memory.write(at, &pairing).map_or(hypercall::BAD_ADDRESS, |()| 0)
}

#[cfg(test)]
mod test {
    use super::*;
    use memory::Backing;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn scaling_is_exact_to_a_part_in_a_billion(hz in 100_000_000u64..10_000_000_000, seconds in 1u64..1_000_000) {
            let scale = Scale::of(hz);
            prop_assert!(scale.multiplier >= 1 << 31);
            let ns = scale.ns(hz * seconds);
            let exact = seconds * 1_000_000_000;
            prop_assert!(ns.abs_diff(exact) <= exact / 1_000_000_000 + 2, "{ns} {exact} {scale:?}");
        }
    }

    #[test]
    fn pages_of_all_vcpus_agree_and_versions_are_even() {
        let memory = GuestMemory::new(&[(0, 0x1000)], Backing::Private).unwrap();
        let clock = SystemClock::new(2_000_000_000);
        clock.write_page(&memory, 0, 1000, VmTime(500), false).unwrap();
        clock.write_page(&memory, 64, 9000, VmTime(4500), true).unwrap();
        for page in [0, 64] {
            assert_eq!(memory.load_u32(page).unwrap(), 2);
            assert_eq!(memory.load_u64(page + 8).unwrap(), 1000);
            assert_eq!(memory.load_u64(page + 16).unwrap(), 500);
            assert_eq!(memory.load_u32(page + 24).unwrap(), 1 << 31);
        }
        assert_eq!(memory.read_array::<2>(28).unwrap(), [0, 1]);
        assert_eq!(memory.read_array::<2>(64 + 28).unwrap(), [0, 3]);
        clock.forget();
        clock.write_page(&memory, 0, 7000, VmTime(600), false).unwrap();
        assert_eq!((memory.load_u32(0).unwrap(), memory.load_u64(8).unwrap()), (4, 7000));
        assert!(clock.write_page(&memory, 0xff0, 0, VmTime(0), false).is_err());
    }
}
