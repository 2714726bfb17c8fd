//! `yado stats`: what a guest's vCPUs have done, and where its time goes.

use crate::arguments::Stats;
use crate::prometheus::{self, Guest};
use crate::{client, exporter, registry, terminal};
use anyhow::{Context, ensure};
use machine::control::protocol::{Kind, Request, read};
use serde_json::Value;
use std::fmt::Write;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PERIOD: Duration = Duration::from_secs(1);
/// How long a guest may take to tell its counters to somebody who asks all.
const PATIENCE: Duration = Duration::from_secs(2);

/// `yado stats`
pub fn stats(options: &Stats) -> anyhow::Result<()> {
    if options.prometheus {
        let name = options.name.clone();
        let Some(place) = &options.listen else {
            print!("{}", prometheus(name.as_deref())?);
            return Ok(());
        };
        return exporter::serve(place, move || prometheus(name.as_deref()));
    }
    let name = options.name.as_deref().unwrap_or_default();
    let guest = registry::find_running(name)?;
    if let Some(path) = &options.perf_map {
        let place = || PathBuf::from(format!("/tmp/perf-{}.map", guest.record.pid));
        return perf_map(name, &path.clone().unwrap_or_else(place));
    }
    if let Some(seconds) = options.profile {
        let request = Request::Profile { milliseconds: seconds.saturating_mul(1000), rate_hz: options.rate };
        let (_, told) = client::open(name, &request)?;
        print(options.json, &told, || profile(&told, options.top))?;
        return Ok(());
    }
    let mut before = Value::Null;
    loop {
        let now = client::ask(name, &Request::Stats)?;
        print(options.json, &now, || table(&now, &before))?;
        if !options.watch {
            return Ok(());
        }
        before = now;
        std::thread::sleep(PERIOD);
        // A guest that is gone is no error of somebody who only watches.
        if terminal::nobody_reads() || registry::find_running(name).is_err() {
            return Ok(());
        }
    }
}

/// Writes what `perf` reads: it looks in /tmp, and believes only files of its user.
fn perf_map(name: &str, path: &Path) -> anyhow::Result<()> {
    let (mut stream, _) = client::open(name, &Request::PerfMap)?;
    let mut map = Vec::new();
    while let Some((Kind::Output, part)) = read(&mut stream).context("the guest's process is gone")? {
        map.extend(part);
    }
    let names = map.iter().filter(|&&byte| byte == b'\n').count();
    ensure!(names > 0, "the engine of {name} runs the guest's code as it is: `perf kvm` names it");
    // What is there may be somebody else's, or a link.
    let _ = std::fs::remove_file(path);
    let written = File::create_new(path).and_then(|mut file| file.write_all(&map));
    written.with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}: {names} pieces of code have names; run this again after `perf record`", path.display());
    Ok(())
}

/// One guest, or all that run. One that stops meanwhile, or does not answer, is not among them.
fn prometheus(name: Option<&str>) -> anyhow::Result<String> {
    let listed = match name {
        Some(name) => vec![registry::find_running(name)?],
        None => registry::list()?.into_iter().filter(|guest| guest.running).collect(),
    };
    let ask = |name: &str| client::ask_within(name, &Request::Stats, PATIENCE);
    // All at once: one that is stopped holds up the others once, and not each scrape as often as there are such.
    let told = std::thread::scope(|scope| {
        let asking: Vec<_> = listed
            .iter()
            .map(|guest| {
                let thread = std::thread::Builder::new().name("asking".into());
                let name = &guest.record.name;
                thread.spawn_scoped(scope, move || ask(name)).map_err(|_| ask(name))
            })
            .collect();
        let heard = asking.into_iter().map(|asked| match asked {
            Ok(thread) => thread.join().ok()?.ok(),
            // The host has no thread to spare now.
            Err(told) => told.ok(),
        });
        heard.collect::<Vec<_>>()
    });
    let guests: Vec<_> = listed
        .iter()
        .zip(told)
        .filter_map(|(guest, told)| {
            let told = told?;
            let record = &guest.record;
            Some(Guest { name: &record.name, memory: record.memory, resident: resident(record.pid), told })
        })
        .collect();
    Ok(prometheus::text(&guests))
}

/// Bytes of memory that a process has.
fn resident(process: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn print(json: bool, value: &Value, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    match json {
        true => println!("{}", serde_json::to_string_pretty(value)?),
        false => print!("{}", table()),
    }
    Ok(())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn sum(value: &Value) -> u64 {
    value.as_object().map_or(0, |rows| rows.values().map(number).fold(0, u64::saturating_add))
}

/// A number for people: 1234, 56.7k, 89.0M.
fn short(value: u64) -> String {
    match value {
        0..10_000 => value.to_string(),
        10_000..1_000_000 => format!("{:.1}k", value as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value as f64 / 1e6),
        _ => format!("{:.1}G", value as f64 / 1e9),
    }
}

fn share(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".into(),
        _ => format!("{:.1} %", part as f64 * 100.0 / whole as f64),
    }
}

/// A line for each vCPU: since the guest's start, or since `before`.
fn table(now: &Value, before: &Value) -> String {
    if now["engine"] == "kvm" { kvm_table(now, before) } else { soft_table(now, before) }
}

/// What the kernel counts of a vCPU, beside the exits that came to the machine.
fn kvm_table(now: &Value, before: &Value) -> String {
    let mut text = String::from(
        "CPU  STATE      BUSY     HOST CPU  EXITS   TO YADO  INTERRUPTS  HALTS   EMULATED  PAGE FAULTS  TLB FLUSHES\n",
    );
    let cpus = now["vcpus"].as_array().map_or(&[][..], Vec::as_slice);
    for (index, cpu) in cpus.iter().enumerate() {
        let old = &before["vcpus"][index];
        let since = |value: fn(&Value) -> u64| value(cpu).saturating_sub(value(old));
        let time = since(|cpu| number(&cpu["vm_time_ns"]));
        let halted = since(|cpu| number(&cpu["engine"]["halt_wait_ns"]));
        let state = cpu["state"].as_str().unwrap_or("-");
        let _ = writeln!(
            text,
            "{index:<4} {:<10} {:<8} {:<9} {:<7} {:<8} {:<11} {:<7} {:<9} {:<12} {}",
            state.split(' ').next().unwrap_or("-"),
            share(time.saturating_sub(halted), time),
            share(since(|cpu| number(&cpu["host_cpu_time_ns"])), time),
            short(since(|cpu| number(&cpu["engine"]["exits"]))),
            short(since(|cpu| sum(&cpu["exits"]))),
            short(since(|cpu| number(&cpu["engine"]["irq_injections"]))),
            short(since(|cpu| number(&cpu["engine"]["halt_exits"]))),
            short(since(|cpu| number(&cpu["engine"]["insn_emulation"]))),
            short(since(|cpu| number(&cpu["engine"]["pf_taken"]))),
            short(since(|cpu| number(&cpu["engine"]["tlb_flush"]))),
        );
    }
    text
}

fn soft_table(now: &Value, before: &Value) -> String {
    let mut text = String::from(
        "CPU  STATE      BUSY     HOST CPU  EXITS   INTERRUPTS  HALTS   BLOCKS  CODE      TLB MISSES  STEPS\n",
    );
    let cpus = now["vcpus"].as_array().map_or(&[][..], Vec::as_slice);
    for (index, cpu) in cpus.iter().enumerate() {
        let old = &before["vcpus"][index];
        let since = |value: fn(&Value) -> u64| value(cpu).saturating_sub(value(old));
        let time = since(|cpu| number(&cpu["vm_time_ns"]));
        let halted = since(|cpu| number(&cpu["halted_ns"]));
        let state = cpu["state"].as_str().unwrap_or("-");
        let _ = writeln!(
            text,
            "{index:<4} {:<10} {:<8} {:<9} {:<7} {:<11} {:<7} {:<7} {:<9} {:<11} {}",
            state.split(' ').next().unwrap_or("-"),
            share(time.saturating_sub(halted), time),
            share(since(|cpu| number(&cpu["host_cpu_time_ns"])), time),
            short(since(|cpu| sum(&cpu["exits"]))),
            short(since(|cpu| sum(&cpu["interrupts_by_vector"]))),
            short(since(|cpu| number(&cpu["halts"]))),
            short(since(|cpu| number(&cpu["engine"]["blocks"]))),
            format!("{:.1}MiB", number(&cpu["engine"]["code_cache_bytes"]) as f64 / f64::from(1 << 20)),
            short(since(|cpu| number(&cpu["engine"]["tlb_misses"]))),
            short(since(|cpu| number(&cpu["engine"]["steps"]))),
        );
    }
    text
}

/// Shares of kernel functions, then of processes.
fn profile(told: &Value, top: usize) -> String {
    let [kernel, user, idle] = ["kernel", "user", "idle"].map(|name| number(&told[name]));
    let all = kernel.saturating_add(user).saturating_add(idle);
    let busy = kernel.saturating_add(user);
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{all} samples in {:.1} s: idle {}, kernel {}, user {}",
        told["seconds"].as_f64().unwrap_or(0.0),
        share(idle, all),
        share(kernel, all),
        share(user, all)
    );
    if told["kernel_functions"].is_null() {
        text += "no Linux kernel was found in this guest's memory: addresses have no names\n";
    }
    let rows = |name: &str| told[name].as_array().map_or(Vec::new(), |rows| rows.iter().take(top).collect());
    text += "\nBUSY     KERNEL FUNCTION\n";
    for row in rows("functions") {
        let name = row["name"].as_str().unwrap_or("-");
        let _ = writeln!(text, "{:<8} {name}", share(number(&row["samples"]), busy));
    }
    text += "\nBUSY     KERNEL   USER     PID      PROCESS\n";
    for row in rows("processes") {
        let (kernel, user) = (number(&row["kernel"]), number(&row["user"]));
        let id = row["pid"].as_u64().map_or_else(|| "-".into(), |id| id.to_string());
        let _ = writeln!(
            text,
            "{:<8} {:<8} {:<8} {id:<8} {}",
            share(kernel.saturating_add(user), busy),
            share(kernel, busy),
            share(user, busy),
            row["name"].as_str().unwrap_or("-")
        );
    }
    text
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_second_look_tells_what_happened_since() {
        let cpu = |time: u64, halted: u64, steps: u64| {
            json!({ "vcpus": [{
                "state": "waiting for its start", "vm_time_ns": time, "halted_ns": halted, "halts": 3,
                "host_cpu_time_ns": 100, "exits": { "halt": 3, "msr_write": 4 }, "interrupts_by_vector": { "0xec": 2 },
                "engine": { "steps": steps, "code_cache_bytes": 1 << 20, "blocks": 12_345 },
            }] })
        };
        let (first, second) = (cpu(1000, 900, 5), cpu(3000, 1400, 2_000_005));
        let line =
            |text: String| text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(line(table(&first, &Value::Null)), "0 waiting 10.0 % 10.0 % 7 2 3 12.3k 1.0MiB 0 5");
        assert_eq!(line(table(&second, &first)), "0 waiting 75.0 % 0.0 % 0 0 0 0 1.0MiB 0 2.0M");
    }

    #[test]
    fn kvm_counts_other_things() {
        let cpu = |exits: u64| {
            json!({ "engine": "kvm", "vcpus": [{
                "state": "halted", "vm_time_ns": exits * 10, "host_cpu_time_ns": exits, "exits": { "port_write": 4 },
                "engine": { "exits": exits, "halt_wait_ns": exits * 5, "irq_injections": 6, "halt_exits": 7,
                    "insn_emulation": 8, "pf_taken": 9, "tlb_flush": 1 },
            }] })
        };
        let line =
            |text: String| text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(line(table(&cpu(100), &Value::Null)), "0 halted 50.0 % 10.0 % 100 4 6 7 8 9 1");
        assert_eq!(line(table(&cpu(300), &cpu(100))), "0 halted 50.0 % 10.0 % 200 0 0 0 0 0 0");
    }

    #[test]
    fn a_profile_is_a_table_of_shares() {
        let told = json!({
            "seconds": 2.0, "kernel": 3, "user": 1, "idle": 4, "kernel_functions": 9,
            "functions": [{ "name": "clear_page", "samples": 2 }, { "name": "memset", "samples": 1 }],
            "processes": [{ "pid": 7, "name": "cc1", "kernel": 3, "user": 1 }],
        });
        let text = profile(&told, 1);
        assert!(text.contains("8 samples in 2.0 s: idle 50.0 %, kernel 37.5 %, user 12.5 %"), "{text}");
        assert!(text.contains("50.0 %   clear_page\n") && !text.contains("memset"), "{text}");
        assert!(text.contains("100.0 %  75.0 %   25.0 %   7        cc1"), "{text}");
    }
}
