//! What a vCPU tells about itself, on its own thread and when asked: registers, counters, where its time went.

use cpu::{Exit, Registers, Space};
use device::VmTime;
use serde_json::{Map, Value, json};
use std::time::Duration;

/// Kinds of exits, as they are counted.
const EXITS: [&str; 12] = [
    "port_read",
    "port_write",
    "mmio_read",
    "mmio_write",
    "msr_read",
    "msr_write",
    "hypercall",
    "halt",
    "interrupted",
    "interrupt_window",
    "end_of_interrupt",
    "other",
];

/// What a vCPU's loop counts.
#[derive(Debug, Clone)]
pub(crate) struct Tally {
    exits: [u64; EXITS.len()],
    /// Interrupts injected, by vector.
    vectors: Box<[u64; 256]>,
    /// Spans of sleep, and their length.
    halts: u64,
    halted: Duration,
    /// HLTs that a paravirtual kick ended.
    pub(super) kicks: u64,
    /// TLB flushes that others asked for while the vCPU slept.
    pub(super) flushes: u64,
}

impl Default for Tally {
    fn default() -> Self {
        let vectors = Box::new([0; 256]);
        Self { exits: [0; EXITS.len()], vectors, halts: 0, halted: Duration::ZERO, kicks: 0, flushes: 0 }
    }
}

impl Tally {
    pub(super) fn exit(&mut self, exit: &Exit) {
        let kind = match exit {
            Exit::Read { space: Space::Port, .. } => 0,
            Exit::Write { space: Space::Port, .. } => 1,
            Exit::Read { space: Space::Mmio, .. } => 2,
            Exit::Write { space: Space::Mmio, .. } => 3,
            Exit::ReadMsr { .. } => 4,
            Exit::WriteMsr { .. } => 5,
            Exit::Hypercall { .. } => 6,
            Exit::Halt => 7,
            Exit::Interrupted => 8,
            Exit::InterruptWindow => 9,
            Exit::EndOfInterrupt { .. } => 10,
            Exit::Shutdown | Exit::Debug => 11,
        };
        if let Some(count) = self.exits.get_mut(kind) {
            *count = count.wrapping_add(1);
        }
    }

    pub(super) fn interrupt(&mut self, vector: u8) {
        if let Some(count) = self.vectors.get_mut(usize::from(vector)) {
            *count = count.wrapping_add(1);
        }
    }

    pub(super) fn slept(&mut self, time: Duration) {
        self.halts = self.halts.wrapping_add(1);
        self.halted = self.halted.saturating_add(time);
    }
}

/// What a vCPU is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    Running,
    Halted,
    /// Not started by the guest yet.
    Waiting,
    Paused,
}

/// One answer.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(super) doing: Doing,
    pub(super) at: VmTime,
    pub(crate) registers: Registers,
    pub(super) tally: Tally,
    pub(super) counters: Vec<(&'static str, u64)>,
    /// Of the vCPU's thread.
    pub(super) host_time: Duration,
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The rows that are not zero.
fn rows<'a>(rows: impl IntoIterator<Item = (impl Into<String>, &'a u64)>) -> Map<String, Value> {
    let rows = rows.into_iter().filter(|(_, count)| **count != 0);
    rows.map(|(name, count)| (name.into(), Value::from(*count))).collect()
}

impl Report {
    fn doing(&self) -> &'static str {
        match self.doing {
            Doing::Running => "running",
            Doing::Halted => "halted",
            Doing::Waiting => "waiting for its start",
            Doing::Paused => "paused",
        }
    }

    /// The numbers.
    pub(crate) fn statistics(&self) -> Value {
        let vectors = (0u32..).zip(self.tally.vectors.iter());
        json!({
            "state": self.doing(),
            "vm_time_ns": self.at.0,
            "host_cpu_time_ns": ns(self.host_time),
            "halted_ns": ns(self.tally.halted),
            "halts": self.tally.halts,
            "paravirtual_kicks": self.tally.kicks,
            "paravirtual_tlb_flushes": self.tally.flushes,
            "exits": rows(EXITS.into_iter().zip(&self.tally.exits)),
            "interrupts_by_vector": rows(vectors.map(|(vector, count)| (format!("{vector:#04x}"), count))),
            "engine": self.counters.iter().map(|(name, count)| ((*name).to_owned(), Value::from(*count))).collect::<Map<_, _>>(),
        })
    }

    /// The registers, in the notation of debuggers.
    pub(crate) fn inspect(&self) -> Value {
        let registers = &self.registers;
        let mut tree = Map::new();
        tree.insert("state".into(), self.doing().into());
        let number = |(name, value): (&str, u64)| (name.to_owned(), Value::from(format!("{value:#x}")));
        tree.extend(registers.numbers().map(number));
        tree.extend(registers.named_segments().map(|(name, segment)| {
            let text = format!(
                "{:#06x} base {:#x} limit {:#x} attr {:#06x}",
                segment.selector, segment.base, segment.limit, segment.attr
            );
            (name.to_owned(), Value::from(text))
        }));
        tree.extend([("gdtr", registers.gdtr), ("idtr", registers.idtr)].map(|(name, table)| {
            (name.to_owned(), Value::from(format!("base {:#x} limit {:#x}", table.base, table.limit)))
        }));
        Value::Object(tree)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_kind_of_exit_has_a_name_and_only_what_happened_is_told() {
        let mut tally = Tally::default();
        tally.exit(&Exit::Halt);
        tally.exit(&Exit::Read { space: Space::Mmio, address: 0, size: 4 });
        tally.exit(&Exit::Debug);
        tally.interrupt(0xec);
        tally.interrupt(0xec);
        tally.slept(Duration::from_nanos(7));
        let report = Report {
            doing: Doing::Halted,
            at: VmTime(5),
            registers: Registers::default(),
            tally,
            counters: vec![("steps", 3)],
            host_time: Duration::from_micros(2),
        };
        let told = report.statistics();
        assert_eq!(told["exits"], json!({ "halt": 1, "mmio_read": 1, "other": 1 }));
        assert_eq!(told["interrupts_by_vector"], json!({ "0xec": 2 }));
        assert_eq!((&told["halted_ns"], &told["host_cpu_time_ns"]), (&json!(7), &json!(2000)));
        assert_eq!(told["engine"]["steps"], 3);
        let registers = report.inspect();
        assert_eq!((&registers["rip"], &registers["cr0"]), (&json!("0xfff0"), &json!("0x60000010")));
        assert_eq!(registers["cs"], "0xf000 base 0xffff0000 limit 0xffff attr 0x009b");
        assert_eq!(registers.as_object().unwrap().len(), 1 + 16 + 11 + 4 + 8 + 2);
    }
}
