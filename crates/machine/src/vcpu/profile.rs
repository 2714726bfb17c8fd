//! Where a guest's time goes: all vCPUs are asked in short turns where they are.
//!
//! A vCPU that sleeps is counted as idle and left alone; one that runs looks at the flag where translated code looks for
//! interrupts: at backward and indirect jumps. So a sample belongs to a function, not to an instruction.
//!
//! Lock order: the counts' lock alone.

use crate::linux::{Linux, Process, Space};
use cpu::{Vcpu, msr};
use memory::GuestMemory;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Rows of each table that are told.
const ROWS_MAX: usize = 400;
/// Different places and processes that are kept; more are counted without a name.
const PLACES_MAX: usize = 1 << 16;
/// Where user space ends.
const KERNEL_HALF: u64 = 1 << 63;

/// One profile under way.
pub(crate) struct Profile {
    linux: Option<Linux>,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    idle: u64,
    /// Running, but did not answer within a turn.
    missed: u64,
    kernel: HashMap<u64, u64>,
    /// By process: in the kernel, in user space.
    processes: HashMap<Option<Process>, (u64, u64)>,
    unnamed: u64,
}

impl Profile {
    /// Nothing counted yet; without a known Linux, addresses stay addresses.
    pub(crate) fn new(linux: Option<Linux>) -> Self {
        Self { linux, counts: Mutex::default() }
    }

    /// The vCPU is here now. On its own thread.
    pub(super) fn sample(&self, memory: &GuestMemory, vcpu: &dyn Vcpu) {
        let registers = vcpu.registers();
        let is_kernel = registers.segments.get(1).is_none_or(|cs| cs.selector & 3 == 0);
        // While the kernel runs its base is the active one, but for the first instructions of an entry.
        let bases =
            [registers.segments.get(5).map_or(0, |gs| gs.base), vcpu.msr(msr::KERNEL_GS_BASE).unwrap_or(0)];
        let base = bases.into_iter().find(|&base| base >= KERNEL_HALF).unwrap_or(0);
        let process = match (&self.linux, Space::of(memory, &registers)) {
            (Some(linux), Some(space)) => linux.process(&space, base),
            _ => None,
        };
        self.count(is_kernel, registers.rip, process);
    }

    fn count(&self, is_kernel: bool, rip: u64, process: Option<Process>) {
        let mut counts = self.lock();
        let Counts { kernel, processes, unnamed, .. } = &mut *counts;
        if kernel.len() >= PLACES_MAX || processes.len() >= PLACES_MAX {
            *unnamed = unnamed.saturating_add(1);
            return;
        }
        let (in_kernel, in_user) = processes.entry(process).or_default();
        if is_kernel {
            *in_kernel = in_kernel.saturating_add(1);
            let count = kernel.entry(rip).or_default();
            *count = count.saturating_add(1);
        } else {
            *in_user = in_user.saturating_add(1);
        }
    }

    /// A vCPU sleeps.
    pub(crate) fn idle(&self) {
        let mut counts = self.lock();
        counts.idle = counts.idle.saturating_add(1);
    }

    /// A vCPU has not answered since the last turn.
    pub(crate) fn missed(&self) {
        let mut counts = self.lock();
        counts.missed = counts.missed.saturating_add(1);
    }

    /// What was counted.
    pub(crate) fn told(&self) -> Value {
        let counts = self.lock();
        let mut functions: HashMap<String, u64> = HashMap::new();
        for (&rip, &count) in &counts.kernel {
            let name = match &self.linux {
                Some(linux) => linux.function(rip).to_owned(),
                None => format!("{rip:#x}"),
            };
            let sum = functions.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
        let mut functions: Vec<_> = functions.into_iter().collect();
        functions.sort_by(|(a, m), (b, n)| n.cmp(m).then_with(|| a.cmp(b)));
        let mut processes: Vec<_> = counts.processes.iter().collect();
        processes.sort_by_key(|(process, (kernel, user))| {
            (std::cmp::Reverse(kernel.saturating_add(*user)), (*process).clone())
        });
        let sum =
            |part: fn(&(u64, u64)) -> u64| counts.processes.values().map(part).fold(0, u64::saturating_add);
        let processes = processes.into_iter().take(ROWS_MAX).map(|(process, (kernel, user))| {
            let (id, name) = process.as_ref().map_or((None, "(unknown)"), |p| (Some(p.id), p.name.as_str()));
            json!({ "pid": id, "name": name, "kernel": kernel, "user": user })
        });
        json!({
            "idle": counts.idle,
            "missed": counts.missed,
            "unnamed": counts.unnamed,
            "kernel": sum(|counts| counts.0),
            "user": sum(|counts| counts.1),
            "kernel_functions": self.linux.as_ref().map(Linux::functions),
            "knows_processes": self.linux.as_ref().is_some_and(Linux::knows_processes),
            "functions": functions.into_iter().take(ROWS_MAX)
                .map(|(name, count)| json!({ "name": name, "samples": count })).collect::<Vec<_>>(),
            "processes": processes.collect::<Vec<_>>(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn samples_are_sorted_by_how_many_there_are() {
        let profile = Profile::new(None);
        let process = |id| Some(Process { id, name: "cat".into() });
        for (is_kernel, rip, process) in [
            (true, 0x10, process(1)),
            (true, 0x20, process(2)),
            (true, 0x20, process(2)),
            (false, 0x30, process(2)),
            (false, 0x30, None),
        ] {
            profile.count(is_kernel, rip, process);
        }
        profile.idle();
        let told = profile.told();
        assert_eq!((&told["kernel"], &told["user"], &told["idle"]), (&json!(3), &json!(2), &json!(1)));
        assert_eq!(told["functions"][0], json!({ "name": "0x20", "samples": 2 }));
        assert_eq!(told["processes"][0], json!({ "pid": 2, "name": "cat", "kernel": 2, "user": 1 }));
        assert_eq!(told["kernel_functions"], Value::Null);
    }
}
