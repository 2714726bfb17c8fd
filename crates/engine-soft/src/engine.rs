//! [`SoftEngine`]: makes the vCPUs of one VM, and knows what they share: the clock, and what they tell each other of code
//! ([`crate::peers`]).

use crate::peers::Watch;
use crate::step::model::host_tsc;
use crate::vcpu::SoftVcpu;
use cpu::{Engine, Error, Vcpu, VcpuConfig};
use memory::GuestMemory;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How the engine works.
#[derive(Debug, Clone)]
pub struct Options {
    /// Translate hot code; else everything is single-stepped (slow, for comparison).
    pub translate: bool,
    /// Size of each vCPU's cache of translated code in bytes.
    pub code_cache_bytes: usize,
    /// There will be one vCPU only, so that no other writes code or must hear of writes.
    pub single_cpu: bool,
    /// Run user code that computes for a while on the host's CPU, in a process of its own: needs shared memory.
    pub direct: bool,
    /// Compare every translated block with the single-step tier and fail where they differ (very slow, one vCPU).
    pub verify: bool,
    /// The guest's time-stamp counter runs so many times slower than the host's, and so shall the machine's clocks: a guest that
    /// is very slow gets as far between two ticks as others do.
    pub clock_divisor: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            translate: true,
            code_cache_bytes: 64 << 20,
            single_cpu: false,
            direct: true,
            verify: false,
            clock_divisor: 1,
        }
    }
}

/// How long the machine has stood still, in ticks of the host's TSC: the same for all vCPUs, or their TSCs would differ.
#[derive(Debug, Default)]
pub(crate) struct Stood {
    ticks: AtomicU64,
    /// Since when it stands; 0 if it does not.
    since: AtomicU64,
}

impl Stood {
    pub(crate) fn ticks(&self) -> u64 {
        self.ticks.load(Ordering::SeqCst)
    }

    /// The host's TSC since which it stands, if it does.
    pub(crate) fn since(&self) -> Option<u64> {
        Some(self.since.load(Ordering::SeqCst)).filter(|&since| since != 0)
    }
}

/// The software engine of one VM.
pub struct SoftEngine {
    memory: GuestMemory,
    options: Options,
    tsc_hz: u64,
    /// Host TSC when the guest's was zero.
    tsc_start: u64,
    stood: Arc<Stood>,
    watch: Arc<Watch>,
}

impl SoftEngine {
    /// An engine over `memory`. Waits up to 5 ms to measure the clock: see [`look_at_clocks`].
    pub fn new(memory: GuestMemory, options: Options) -> Result<Self, Error> {
        let watch = Arc::new(Watch::new(&memory, !options.single_cpu));
        memory.set_code_watch(watch.clone());
        Ok(Self { memory, options, tsc_hz: calibrate(), tsc_start: host_tsc(), stood: Arc::default(), watch })
    }
}

impl Engine for SoftEngine {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn create_vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error> {
        let divisor = u64::from(self.options.clock_divisor.max(1));
        let offset = self.tsc_start.checked_div(divisor).unwrap_or(0).wrapping_neg();
        let clock = (self.tsc_hz, offset, self.stood.clone());
        let vcpu = SoftVcpu::new(self.memory.clone(), &config, &self.options, &self.watch, clock)?;
        Ok(Box::new(vcpu))
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    fn stand(&self) {
        self.stood.since.store(host_tsc(), Ordering::SeqCst);
    }

    fn go_on(&self) {
        let since = self.stood.since.swap(0, Ordering::SeqCst);
        if since != 0 {
            self.stood.ticks.fetch_add(host_tsc().saturating_sub(since), Ordering::SeqCst);
        }
    }
}

/// Frequency of the host's TSC in Hz: measured, and what CPUID says where that agrees to half a percent.
fn calibrate() -> u64 {
    let measured = measure();
    let near = |hz: u64| hz.abs_diff(measured) < measured / 200;
    stated().filter(|&hz| near(hz)).unwrap_or(measured)
}

/// CPUID 15h (crystal frequency and ratio), or the hypervisors' leaf 4000_0010h (kHz).
fn stated() -> Option<u64> {
    let leaf = cpu::cpuid::host;
    if leaf(0, 0).eax >= 0x15 {
        let ratio = leaf(0x15, 0);
        if ratio.eax != 0 && ratio.ecx != 0 {
            return Some(u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax));
        }
    }
    let hypervisor = leaf(1, 0).ecx >> 31 != 0;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&leaf(0x4000_0000, 0).eax) {
        return Some(u64::from(leaf(0x4000_0010, 0).eax) * 1000);
    }
    None
}

/// The first of the two looks at the clocks.
static FIRST: OnceLock<(u64, u64)> = OnceLock::new();

/// Looks at the host's clocks for the first time. The TSC's frequency is measured between this and [`SoftEngine::new`], which
/// waits if there are not 5 ms between them: call it early.
pub fn look_at_clocks() {
    FIRST.get_or_init(sample);
}

/// Against CLOCK_MONOTONIC_RAW: a look is sharp to some 10 ns, so this to a few millionths.
fn measure() -> u64 {
    const SPAN: u64 = 5_000_000;
    // That clock stands while the host sleeps, and the TSC may not.
    const LONG: u64 = 10_000_000_000;
    let now = sample();
    let first = *FIRST.get_or_init(|| now);
    let (start, ticks) = if now.0.saturating_sub(first.0) < LONG { first } else { now };
    if let Some(left) = SPAN.checked_sub(now.0.saturating_sub(start)) {
        std::thread::sleep(Duration::from_nanos(left));
    }
    let (end, later) = sample();
    let nanoseconds = end.saturating_sub(start).max(1);
    let hz = u128::from(later.wrapping_sub(ticks)) * 1_000_000_000 / u128::from(nanoseconds);
    u64::try_from(hz).unwrap_or(u64::MAX)
}

/// Nanoseconds and TSC at the same moment: the tightest of a few pairs.
fn sample() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = host_tsc();
        let now = monotonic_raw();
        let after = host_tsc();
        let width = after.wrapping_sub(before);
        if width < best.0 {
            best = (width, now, before.wrapping_add(width / 2));
        }
    }
    (best.1, best.2)
}

fn monotonic_raw() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[allow(unsafe_code)]
    // SAFETY: the kernel fills the struct that it is given.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &mut time);
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_clock_is_measured_to_a_percent() {
        let (start, ticks) = sample();
        let hz = calibrate();
        std::thread::sleep(Duration::from_millis(50));
        let (end, later) = sample();
        let expected = u128::from(end - start) * u128::from(hz) / 1_000_000_000;
        let counted = u128::from(later - ticks);
        assert!(counted.abs_diff(expected) < expected / 100, "{hz} Hz: {counted} ticks, not {expected}");
    }
}
