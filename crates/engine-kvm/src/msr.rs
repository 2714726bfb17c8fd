//! Model-specific registers that KVM holds.

use crate::host::{Handle, Plain};
use crate::ioctl::{GET_MSRS, SET_MSRS};
use cpu::msr;
use kvm_bindings::kvm_msr_entry;
use std::collections::BTreeMap;

/// Registers that one request may name: the kernel takes fewer than 256 (`MAX_IO_MSRS`).
const AT_ONCE: usize = 128;

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..kvm_msr_entry::zeroed() }
}

/// Reads one; `None` if KVM has no such register.
pub(crate) fn get(vcpu: &Handle, index: u32) -> Option<u64> {
    let (entries, done) = vcpu.list(GET_MSRS, &[entry(index, 0)]).ok()?;
    entries.first().filter(|_| done == 1).map(|entry| entry.data)
}

/// Writes one; `false` if KVM refuses.
pub(crate) fn set(vcpu: &Handle, index: u32, value: u64) -> bool {
    vcpu.list(SET_MSRS, &[entry(index, value)]).is_ok_and(|(_, done)| done == 1)
}

/// Which registers are saved: those that KVM lists and lets us read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Msrs(Vec<u32>);

impl Msrs {
    /// Tries all that KVM lists. It stops at the first that it refuses; that one is left out.
    pub(crate) fn of(vcpu: &Handle, listed: &[u32]) -> Self {
        let mut left: Vec<_> = listed.iter().map(|&index| entry(index, 0)).collect();
        // In no list of any kernel's, though it is state (with the local APIC's timer).
        left.push(entry(msr::TSC_DEADLINE, 0));
        left.sort_by_key(|entry| entry.index);
        left.dedup_by_key(|entry| entry.index);
        let mut readable = Vec::new();
        let mut rest = left.as_slice();
        while !rest.is_empty() {
            let now = first(rest);
            let done = vcpu.list(GET_MSRS, now).map_or(0, |(_, done)| done as usize).min(now.len());
            let (good, left) = rest.split_at(done);
            readable.extend(good.iter().map(|entry| entry.index));
            rest = if done == now.len() { left } else { left.get(1..).unwrap_or_default() };
        }
        Self(readable)
    }

    /// Their values. One that cannot be read any more is an error: what is not saved is lost.
    pub(crate) fn read(&self, vcpu: &Handle) -> std::io::Result<BTreeMap<u32, u64>> {
        let mut values = BTreeMap::new();
        for indices in self.0.chunks(AT_ONCE) {
            let asked: Vec<_> = indices.iter().map(|&index| entry(index, 0)).collect();
            let (entries, done) = vcpu.list(GET_MSRS, &asked)?;
            if let Some(refused) = indices.get(done as usize) {
                let why = format!("MSR {refused:#x}, which could be read before, cannot be read now");
                return Err(std::io::Error::other(why));
            }
            values.extend(entries.iter().map(|entry| (entry.index, entry.data)));
        }
        Ok(values)
    }
}

/// As many as one request may name.
fn first(entries: &[kvm_msr_entry]) -> &[kvm_msr_entry] {
    entries.get(..AT_ONCE).unwrap_or(entries)
}

/// Sets many; answers those that KVM refused although they would change something.
pub(crate) fn set_all(vcpu: &Handle, values: &BTreeMap<u32, u64>) -> Vec<u32> {
    let entries: Vec<_> = values.iter().map(|(&index, &value)| entry(index, value)).collect();
    let mut refused = Vec::new();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let now = first(rest);
        let done = vcpu.list(SET_MSRS, now).map_or(0, |(_, done)| done as usize).min(now.len());
        rest = rest.get(done..).unwrap_or_default();
        if done == now.len() {
            continue;
        }
        let Some((first, after)) = rest.split_first() else { break };
        if get(vcpu, first.index) != Some(first.data) {
            refused.push(first.index);
        }
        rest = after;
    }
    refused
}
