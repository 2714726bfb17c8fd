//! `yado stats --prometheus`: counters in Prometheus' text format (version 0.0.4), under the same names on both engines.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;

/// One running guest.
pub struct Guest<'a> {
    pub name: &'a str,
    /// Bytes of RAM.
    pub memory: u64,
    /// Of its process, in bytes.
    pub resident: Option<u64>,
    /// What it answers to a request for statistics.
    pub told: Value,
}

/// What a family of samples is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// Every family has its samples together, as the format demands.
#[derive(Default)]
struct Families(BTreeMap<&'static str, (Kind, &'static str, String)>);

/// A label's value: backslashes, quotes and ends of lines are escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Families {
    fn add(&mut self, family: (&'static str, Kind, &'static str), labels: &[(&str, &str)], value: f64) {
        let (name, kind, about) = family;
        let (_, _, samples) = self.0.entry(name).or_insert_with(|| (kind, about, String::new()));
        let labels: Vec<_> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(samples, "{name}{{{}}} {value}", labels.join(","));
    }

    fn text(self) -> String {
        let mut text = String::new();
        for (name, (kind, about, samples)) in self.0 {
            let kind = if kind == Kind::Counter { "counter" } else { "gauge" };
            let _ = write!(text, "# HELP {name} {about}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

const UP: (&str, Kind, &str) =
    ("yado_guest_up", Kind::Gauge, "The guest runs; by the CPU engine that runs it.");
const STARTS: (&str, Kind, &str) = (
    "yado_guest_starts_total",
    Kind::Counter,
    "How often the guest has started: once, and once more for every reset.",
);
const TIME: (&str, Kind, &str) = ("yado_guest_time_seconds", Kind::Counter, "The guest's own time.");
const MEMORY: (&str, Kind, &str) = ("yado_guest_memory_bytes", Kind::Gauge, "RAM of the guest.");
const RESIDENT: (&str, Kind, &str) =
    ("yado_process_resident_bytes", Kind::Gauge, "Memory of the host that the guest's process has.");
const HOST_TIME: (&str, Kind, &str) =
    ("yado_vcpu_host_cpu_seconds_total", Kind::Counter, "CPU time of the vCPU's thread on the host.");
const HALTED: (&str, Kind, &str) =
    ("yado_vcpu_halted_seconds_total", Kind::Counter, "Time that the vCPU slept in HLT.");
const HALTS: (&str, Kind, &str) = ("yado_vcpu_halts_total", Kind::Counter, "Sleeps in HLT.");
const EXITS: (&str, Kind, &str) =
    ("yado_vcpu_exits_total", Kind::Counter, "Exits of the vCPU to yado, by what the guest wanted.");
const INTERRUPTS: (&str, Kind, &str) =
    ("yado_vcpu_interrupts_total", Kind::Counter, "Interrupts that the vCPU has taken.");
const PAGE_FAULTS: (&str, Kind, &str) = (
    "yado_vcpu_page_faults_total",
    Kind::Counter,
    "Translations of addresses that the engine did not have: page faults of KVM's, TLB misses of the software engine's.",
);
const EMULATED: (&str, Kind, &str) = (
    "yado_vcpu_instructions_emulated_total",
    Kind::Counter,
    "Instructions that the engine made one at a time.",
);
const ENGINE: (&str, Kind, &str) =
    ("yado_vcpu_engine_total", Kind::Counter, "Whatever else the engine counts, by its own names.");

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn rows(value: &Value) -> impl Iterator<Item = (&str, f64)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), number(value)))
}

const NANOSECOND: f64 = 1e-9;

/// What both engines count, from where each keeps it: name, in the software engine's account, in KVM's.
fn shared(cpu: &Value, kvm: bool) -> [((&'static str, Kind, &'static str), f64); 5] {
    let engine = &cpu["engine"];
    let taken: f64 = rows(&cpu["interrupts_by_vector"]).map(|(_, count)| count).sum();
    let of = |soft: f64, of_kvm: &str| if kvm { number(&engine[of_kvm]) } else { soft };
    [
        (HALTED, of(number(&cpu["halted_ns"]), "halt_wait_ns") * NANOSECOND),
        (HALTS, of(number(&cpu["halts"]), "halt_exits")),
        (INTERRUPTS, of(taken, "irq_injections")),
        (PAGE_FAULTS, of(number(&engine["tlb_misses"]), "pf_taken")),
        (EMULATED, of(number(&engine["steps"]), "insn_emulation")),
    ]
}

/// All guests.
pub fn text(guests: &[Guest<'_>]) -> String {
    let mut families = Families::default();
    for Guest { name, memory, resident, told } in guests {
        let engine = told["engine"].as_str().unwrap_or("-");
        let of_guest = [("guest", *name)];
        families.add(UP, &[("guest", name), ("engine", engine)], 1.0);
        families.add(STARTS, &of_guest, number(&told["starts"]));
        families.add(TIME, &of_guest, number(&told["vm_time_ns"]) * NANOSECOND);
        families.add(MEMORY, &of_guest, *memory as f64);
        if let Some(resident) = resident {
            families.add(RESIDENT, &of_guest, *resident as f64);
        }
        for (index, cpu) in told["vcpus"].as_array().into_iter().flatten().enumerate() {
            let index = index.to_string();
            let of_cpu = [("guest", *name), ("vcpu", index.as_str())];
            families.add(HOST_TIME, &of_cpu, number(&cpu["host_cpu_time_ns"]) * NANOSECOND);
            for (family, value) in shared(cpu, engine == "kvm") {
                families.add(family, &of_cpu, value);
            }
            for (kind, count) in rows(&cpu["exits"]) {
                families.add(EXITS, &[of_cpu[0], of_cpu[1], ("kind", kind)], count);
            }
            for (counter, count) in rows(&cpu["engine"]) {
                families.add(ENGINE, &[of_cpu[0], of_cpu[1], ("counter", counter)], count);
            }
        }
    }
    families.text()
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_engines_count_under_the_same_names_and_families_stay_together() {
        let guest = |name, engine: &str, counters: Value| Guest {
            name,
            memory: 1 << 20,
            resident: Some(4096),
            told: json!({ "engine": engine, "vm_time_ns": 2_500_000_000u64, "starts": 2, "vcpus": [{
                "host_cpu_time_ns": 1_000_000_000, "halted_ns": 500_000_000, "halts": 3,
                "exits": { "port_write": 4 }, "interrupts_by_vector": { "0xec": 5, "0xed": 1 }, "engine": counters,
            }] }),
        };
        let soft = guest("a", "soft", json!({ "tlb_misses": 7, "steps": 8 }));
        let kvm = guest(
            "b\"",
            "kvm",
            json!({ "halt_wait_ns": 250_000_000, "halt_exits": 9, "irq_injections": 10,
            "pf_taken": 11, "insn_emulation": 12 }),
        );
        let text = text(&[soft, kvm]);
        for line in [
            "yado_guest_up{guest=\"a\",engine=\"soft\"} 1",
            "yado_guest_time_seconds{guest=\"a\"} 2.5",
            "yado_vcpu_halted_seconds_total{guest=\"a\",vcpu=\"0\"} 0.5",
            "yado_vcpu_halted_seconds_total{guest=\"b\\\"\",vcpu=\"0\"} 0.25",
            "yado_vcpu_interrupts_total{guest=\"a\",vcpu=\"0\"} 6",
            "yado_vcpu_interrupts_total{guest=\"b\\\"\",vcpu=\"0\"} 10",
            "yado_vcpu_page_faults_total{guest=\"a\",vcpu=\"0\"} 7",
            "yado_vcpu_instructions_emulated_total{guest=\"b\\\"\",vcpu=\"0\"} 12",
            "yado_vcpu_exits_total{guest=\"a\",vcpu=\"0\",kind=\"port_write\"} 4",
            "yado_vcpu_engine_total{guest=\"b\\\"\",vcpu=\"0\",counter=\"halt_exits\"} 9",
            "yado_process_resident_bytes{guest=\"a\"} 4096",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} in\n{text}");
        }
        let mut seen = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let family = line.split('{').next().unwrap();
            if seen.last() != Some(&family) {
                assert!(!seen.contains(&family), "{family} in two places");
                seen.push(family);
            }
        }
        assert_eq!(text.matches("# TYPE ").count(), seen.len());
    }
}
