//! `yado doctor`: what this host offers, what is missing, and what to do about it.

use crate::arguments::Doctor;
use crate::registry;
use crate::size::Size;
use cpu::cpuid::{MODELS, default_model};
use engine_kvm::Verdict;
use serde::Serialize;
use std::fs;
use std::path::Path;

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    /// What was found, and what it means for guests.
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cure: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Good,
    /// Guests run, but something is lost.
    Lacking,
    /// Guests do not run.
    Bad,
}

fn finding(what: &'static str, state: State, found: impl Into<String>, cure: Option<String>) -> Finding {
    Finding { what, state, found: found.into(), cure }
}

/// Looks, and prints.
pub fn doctor(options: &Doctor) -> anyhow::Result<()> {
    let findings = [
        cpu(),
        kvm(),
        soft(),
        memory(),
        huge_pages(),
        cache(),
        sources(),
        network(),
        io_uring(),
        confinement(),
    ];
    if options.json {
        let models: Vec<_> = MODELS
            .iter()
            .map(|model| {
                let missing: Vec<_> = model.missing().iter().map(|feature| feature.0).collect();
                serde_json::json!({ "name": model.name, "about": model.about, "missing": missing })
            })
            .collect();
        let report = serde_json::json!({ "findings": findings, "cpu_models": models, "default_cpu": default_model().name });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    for Finding { what, state, found, cure } in &findings {
        let mark = match state {
            State::Good => "ok  ",
            State::Lacking => "less",
            State::Bad => "BAD ",
        };
        println!("{mark}  {what:12} {found}");
        if let Some(cure) = cure {
            println!("      {:12} -> {cure}", "");
        }
    }
    println!("\nCPU models (--cpu):");
    for model in MODELS {
        let missing: Vec<_> = model.missing().iter().map(|feature| feature.0).collect();
        let note = match missing.as_slice() {
            [] if model.name == default_model().name => " (default here)".to_owned(),
            [] => String::new(),
            missing => format!(" (not here: no {})", missing.join(", ")),
        };
        println!("      {:12} {}{note}", model.name, model.about);
    }
    Ok(())
}

fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn cpu() -> Finding {
    let name = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into());
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    finding("CPU", State::Good, format!("{name}, {count} usable"), None)
}

fn kvm() -> Finding {
    match engine_kvm::probe() {
        Verdict::Usable { loop_tenth_ns } => finding(
            "KVM",
            State::Good,
            format!(
                "/dev/kvm runs kernels ({}.{} ns per loop of our test guest): guests run on it",
                loop_tenth_ns / 10,
                loop_tenth_ns % 10
            ),
            None,
        ),
        Verdict::Unusable { why, cure, .. } => {
            finding("KVM", State::Lacking, format!("/dev/kvm {why}: guests run on the software engine"), cure)
        }
    }
}

fn soft() -> Finding {
    let model = default_model();
    let bmi2 = cpu::cpuid::host(7, 0).ebx & 1 << 8 != 0;
    if bmi2 {
        finding("soft engine", State::Good, format!("guests see a CPU of model {}", model.name), None)
    } else {
        finding("soft engine", State::Lacking, format!("no BMI2: slower; guests see {}", model.name), None)
    }
}

fn memory() -> Finding {
    let available = field("/proc/meminfo", "MemAvailable")
        .and_then(|value| value.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()))
        .map_or(0, |kib| kib << 10);
    let (state, cure) = if available < 1 << 30 {
        (State::Lacking, Some("use a smaller --memory, or free some".to_owned()))
    } else {
        (State::Good, None)
    };
    finding("memory", state, format!("{} available", Size(available)), cure)
}

fn huge_pages() -> Finding {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if text.contains("[always]") || text.contains("[madvise]") {
        finding("huge pages", State::Good, "transparent huge pages back guest RAM", None)
    } else {
        let cure = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled".to_owned();
        finding("huge pages", State::Lacking, "none: guests touch new memory more slowly", Some(cure))
    }
}

fn cache() -> Finding {
    let looked = registry::cache_directory().and_then(|path| {
        fs::create_dir_all(&path)?;
        let stat = rustix::fs::statvfs(&path)?;
        Ok((path, stat.f_bavail.saturating_mul(stat.f_frsize)))
    });
    match looked {
        Ok((path, free)) if free < 2 << 30 => finding(
            "cache",
            State::Lacking,
            format!("{} has {} free; a Debian image needs about 1 GiB", path.display(), Size(free)),
            Some("free some space, or set XDG_CACHE_HOME to a larger file system".into()),
        ),
        Ok((path, free)) => {
            let held = Size(debian::prune::survey(&path.join("debian")).bytes());
            let found = format!("{} holds {held} (`yado cache`), {} free", path.display(), Size(free));
            finding("cache", State::Good, found, None)
        }
        Err(error) => finding(
            "cache",
            State::Bad,
            format!("no place for images: {error:#}"),
            Some("set XDG_CACHE_HOME to a directory you may write".into()),
        ),
    }
}

fn sources() -> Finding {
    let found = Path::new("/etc/apt/sources.list").exists()
        || fs::read_dir("/etc/apt/sources.list.d").is_ok_and(|mut entries| entries.next().is_some());
    if found {
        finding("packages", State::Good, "this host's APT sources are used for Debian guests", None)
    } else {
        let cure = "give a Debian archive with `yado run debian --mirror URL`".to_owned();
        finding("packages", State::Lacking, "this host has no APT sources", Some(cure))
    }
}

fn network() -> Finding {
    // Two group ids, from and to (icmp(7)).
    let text = fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default();
    let ids: Vec<u32> = text.split_whitespace().filter_map(|id| id.parse().ok()).collect();
    let group = rustix::process::getegid().as_raw();
    if matches!(ids.as_slice(), &[from, to] if (from..=to).contains(&group)) {
        finding("network", State::Good, "guests reach what you reach, and ping", None)
    } else {
        let found = "guests reach what you reach, but ping only their gateway: this host lets no user ping";
        let cure = "as root: sysctl -w net.ipv4.ping_group_range='0 2147483647'".to_owned();
        finding("network", State::Lacking, found, Some(cure))
    }
}

fn confinement() -> Finding {
    match sandbox::files::version() {
        Some(version @ 6..) => finding(
            "sandbox",
            State::Good,
            format!("guests' processes are confined by seccomp and Landlock {version}"),
            None,
        ),
        Some(version) => finding(
            "sandbox",
            State::Lacking,
            format!(
                "Landlock {version} confines files; only system calls are between a guest's process and its neighbours"
            ),
            Some("Linux 6.12 has Landlock 6, which minds ports and signals too".into()),
        ),
        None => finding(
            "sandbox",
            State::Lacking,
            "no Landlock: a guest's process is confined by its list of system calls alone, which lets it open files",
            Some("Linux 5.13 has it: add landlock to the lsm= that the host's kernel is started with".into()),
        ),
    }
}

fn io_uring() -> Finding {
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default().trim() {
        "0" => finding("io_uring", State::Good, "allowed", None),
        "" => finding(
            "io_uring",
            State::Lacking,
            "not in this kernel: disks use ordinary reads and writes",
            None,
        ),
        _ => finding(
            "io_uring",
            State::Lacking,
            "forbidden on this host: disks use ordinary reads and writes",
            Some("sudo sysctl kernel.io_uring_disabled=0".into()),
        ),
    }
}
