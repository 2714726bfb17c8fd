//! What `cargo xtask test` leaves out unless asked: kernels of some 100 MB that are fetched first, and the soak.

use crate::kernels::{Kernel, boots};
use xtask::story::Home;

#[test]
fn debian_13s_generic_kernel_boots() {
    boots(Kernel {
        codename: "trixie",
        flavour: "generic",
        release: ("6.12.", "-amd64"),
        version: "PREEMPT_DYNAMIC",
    });
}

#[test]
fn debian_12s_generic_kernel_boots() {
    boots(Kernel {
        codename: "bookworm",
        flavour: "generic",
        release: ("6.1.", "-amd64"),
        version: "PREEMPT_DYNAMIC",
    });
}

#[test]
fn debian_12s_real_time_kernel_boots() {
    boots(Kernel {
        codename: "bookworm",
        flavour: "rt",
        release: ("6.1.", "-rt-amd64"),
        version: "PREEMPT_RT",
    });
}

/// Stressors that check their own results: computing, memory, processes, signals, futexes, system calls, and code that
/// is written and run.
const STRESSORS: &[&str] = &[
    "cpu --cpu-method fft",
    "cpu --cpu-method matrixprod",
    "cpu --cpu-method int128longdouble",
    "vm",
    "vm-rw",
    "fork",
    "vfork",
    "pthread",
    "signal",
    "sigq",
    "sigsegv",
    "sigfpe",
    "futex",
    "mutex",
    "sem",
    "pipe",
    "poll",
    "timer",
    "itimer",
    "switch",
    "mmap",
    "mprotect",
    "madvise",
    "memfd",
    "atomic",
    "lockbus",
    "rseq",
    "membarrier",
    "tlb-shootdown",
    "icache",
    "flushcache",
    "far-branch",
    "funccall",
    "branch",
    "longjmp",
    "context",
    "clone",
    "ptrace",
    "str",
    "memcpy",
    "qsort",
    "zlib",
    "crypt",
    "vecmath",
    "x86syscall",
    "tsc",
    "regs",
    "nop",
    "opcode",
    "stackmmap",
];

/// For how long each runs: YADO_SOAK_SECONDS, or three.
fn soak_seconds() -> u64 {
    std::env::var("YADO_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// Bytes of the process that runs the guest, in mebibytes.
fn resident_mib(home: &Home) -> u64 {
    let sizes = home.processes().into_iter().filter_map(|id| {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    sizes.max().unwrap_or(0) / 1024
}

fn soak(cpus: usize) {
    // Some stressors want 300 MiB for each CPU.
    let memory_mib = 1024 + 320 * cpus.max(2) as u64;
    let home = Home::new();
    let (cpus, memory) = (cpus.to_string(), format!("{memory_mib}M"));
    let line = ["run", "-q", "debian", "--name", "soak", "--package", "stress-ng", "--detach"];
    home.yado(&[&line[..], &["--cpus", &cpus, "--memory", &memory]].concat()).assert_success();
    home.wait_configured("soak");
    for stressor in STRESSORS {
        let (name, options) = stressor.split_once(' ').unwrap_or((stressor, ""));
        let instances = cpus.parse::<usize>().unwrap().max(2);
        let told = home.in_guest(
            "soak",
            &format!(
                "stress-ng --{name} {instances} {options} -t {} --verify --oom-avoid 2>&1",
                soak_seconds()
            ),
        );
        assert!(!told.contains("fail:") && !told.contains("unsuccessful"), "{stressor}: {told}");
    }
    let complaints = home.in_guest("soak", "dmesg | grep -E 'BUG|WARNING|lockup|stall|hung' || true");
    assert_eq!(complaints, "", "what the guest's kernel says after all this");
    let resident = resident_mib(&home);
    // Each vCPU's code is mapped twice, and both count.
    let own = cpus.parse::<u64>().unwrap() * (2 * 64 + 32) + 256;
    assert!(resident < memory_mib + own, "{resident} MiB for a guest of {memory_mib}");
    home.yado(&["stop", "soak"]).assert_success();
    home.yado(&["rm", "soak"]).assert_success();
    home.assert_nothing_left();
}

#[test]
fn a_soak_with_one_cpu() {
    soak(1);
}

#[test]
fn a_soak_with_two_cpus() {
    soak(2);
}

#[test]
fn a_soak_with_more_cpus_than_the_host_has() {
    soak(8);
}
