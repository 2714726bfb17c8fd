//! What a guest's process takes of the host, as the host's kernel sees it: where its threads run, what they may use, and what is left when
//! they are gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use xtask::story::{self, Home};

/// Says "up" on the serial port and computes for ever.
const BUSY: &[u8] = b"\x66\xba\xf8\x03\xb0u\xee\xb0p\xee\xb0\n\xee\xeb\xfe";

struct Guest {
    home: Home,
    child: Child,
}

impl Guest {
    fn start(options: &[&str]) -> Self {
        let home = Home::fresh_for(Path::new(env!("CARGO_BIN_EXE_yado")));
        let kernel = home.bare_kernel(BUSY);
        let line = [&["run", "-q", "--name", "g", "--kernel", kernel.to_str().unwrap()], options];
        let mut command = home.command(&line.concat());
        let child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
        let mut guest = Self { home, child };
        story::until("the guest runs", story::LIMIT, || {
            assert!(guest.child.try_wait().unwrap().is_none(), "it has ended");
            guest.home.yado(&["logs", "g"]).text().contains("up")
        });
        guest
    }

    fn inspect(&self) -> serde_json::Value {
        let all: serde_json::Value = serde_json::from_str(&self.home.yado(&["inspect", "g"]).text()).unwrap();
        all["machine"].clone()
    }

    fn groups(&self) -> Vec<PathBuf> {
        let all = self.inspect()["control_groups"]["directories"].clone();
        serde_json::from_value(all).unwrap()
    }

    /// A field of /proc/PID/task/TID/status of each thread called `name`.
    fn of_threads(&self, name: &str, field: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().flatten();
        let status = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        let named = status.filter(|text| text.starts_with(&format!("Name:\t{name}\n")));
        let line =
            |text: String| text.lines().find_map(|line| Some(line.strip_prefix(field)?.trim().to_owned()));
        named.filter_map(line).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn engines() -> Vec<&'static str> {
    let mut engines = vec!["soft"];
    if Path::new("/dev/kvm").exists() {
        engines.push("kvm");
    }
    engines
}

/// Whether this user may make groups that limit CPU time, where yado makes them.
fn may_limit() -> bool {
    let trees = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = |line: &str| Some(line.split_once(":cpu:")?.1.trim_start_matches('/').to_owned());
    let Some(group) = trees.lines().find_map(own) else { return false };
    let probe = Path::new("/sys/fs/cgroup/cpu").join(group).join(format!("probe-{}", std::process::id()));
    fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)).is_ok()
}

fn gone(groups: &[PathBuf]) -> bool {
    groups.iter().all(|group| !group.exists())
}

#[test]
fn a_limited_guest_is_held_back_and_its_groups_go_with_it() {
    if !may_limit() {
        eprintln!("skipped: this user can make no control groups of version 1 for CPU time here");
        return;
    }
    for engine in engines() {
        // So little that a busy host gives it more.
        let mut guest = Guest::start(&["--engine", engine, "--limit", "cpu=5%,cpu-weight=50"]);
        let groups = guest.groups();
        assert_eq!(groups.len(), 1, "only in the tree that is needed");
        let processes = fs::read_to_string(groups[0].join("cgroup.procs")).unwrap();
        assert!(processes.lines().any(|line| line == guest.child.id().to_string()), "{processes}");
        assert_eq!(fs::read_to_string(groups[0].join("cpu.cfs_quota_us")).unwrap().trim(), "5000");
        let held_back = || {
            let text = fs::read_to_string(groups[0].join("cpu.stat")).unwrap();
            text.lines().any(|line| line.strip_prefix("nr_throttled ").is_some_and(|count| count != "0"))
        };
        story::until("the guest is held back", story::LIMIT, held_back);
        // Nobody has the time to clear anything away.
        guest.child.kill().unwrap();
        guest.child.wait().unwrap();
        story::until("its groups are gone", Duration::from_secs(20), || gone(&groups));
    }
}

#[test]
fn groups_that_nobody_has_removed_are_removed_by_whoever_comes_by() {
    if !may_limit() {
        eprintln!("skipped: this user can make no control groups of version 1 for CPU time here");
        return;
    }
    let mut guest = Guest::start(&["--engine", "soft", "--limit", "cpu=2"]);
    let groups = guest.groups();
    let id = guest.child.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let is_keeper = |child: &&str| {
        fs::read_to_string(format!("/proc/{child}/cmdline")).is_ok_and(|line| line.contains("cgroup-keeper"))
    };
    let keeper = children.split_whitespace().find(is_keeper).expect("a keeper");
    story::signal(keeper.parse().unwrap(), "KILL");
    guest.child.kill().unwrap();
    guest.child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!gone(&groups));
    story::until("`yado ps` removes them", Duration::from_secs(20), || {
        guest.home.yado(&["ps"]).assert_success();
        gone(&groups)
    });
}

#[test]
fn threads_run_where_and_how_they_are_told_inside_the_sandbox_too() {
    let allowed = fs::read_to_string("/proc/self/status").unwrap();
    let allowed =
        allowed.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
    for engine in engines() {
        let options = [
            "--engine",
            engine,
            "--cpus",
            "2",
            "--pin",
            "1=0",
            "--pin",
            "others=0",
            "--priority",
            "others=batch",
        ];
        let guest = Guest::start(&options);
        let cpus = |name| guest.of_threads(name, "Cpus_allowed_list:");
        assert_eq!(
            cpus("vcpu0"),
            std::slice::from_ref(&allowed),
            "{engine}: as yado was started, not as the others are"
        );
        assert_eq!(cpus("vcpu1"), ["0"], "{engine}");
        assert_eq!(cpus("timer"), ["0"], "{engine}");
        // Field 41 of proc(5) stat: the class, 3 for SCHED_BATCH. The name has no blank.
        let class = |name: &str| {
            let tasks = fs::read_dir(format!("/proc/{}/task", guest.child.id())).unwrap().flatten();
            let stats = tasks.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
            let of = stats.filter(|text| text.contains(&format!("({name})")));
            of.map(|text| text.split(' ').nth(40).unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(
            (class("timer"), class("vcpu0")),
            (vec!["3".to_owned()], vec!["0".to_owned()]),
            "{engine}"
        );
        let told = guest.inspect();
        assert_eq!(told["scheduling"]["pinned"]["1"], serde_json::json!([0]));
        assert_eq!(told["scheduling"]["others"]["priority"], "batch");
        assert!(!told["sandbox"].is_null());
    }
}

#[test]
fn memory_is_held_as_asked_and_shown() {
    let guest = Guest::start(&[
        "--engine",
        "soft",
        "-m",
        "32M,prealloc=2,hugepages=off,lock=onfault",
        "--numa",
        "fake=2",
    ]);
    let memory = &guest.inspect()["memory"];
    assert_eq!(memory["bytes"], 32 << 20);
    assert_eq!((&memory["pages"], &memory["locked"]), (&"off".into(), &"onfault".into()));
    assert_eq!(memory["nodes"][1]["memory"][0], serde_json::json!({"base": 16 << 20, "bytes": 16 << 20}));
    let maps = fs::read_to_string(format!("/proc/{}/smaps", guest.child.id())).unwrap();
    let ram = maps.split("yado-ram").nth(1).expect("guest RAM is in the process");
    assert!(ram.lines().any(|line| line.starts_with("Rss:") && line.contains(" 32768 kB")), "{ram:.300}");
}

#[test]
fn what_the_host_has_not_is_refused_by_name() {
    let home = Home::fresh_for(Path::new(env!("CARGO_BIN_EXE_yado")));
    let kernel = home.bare_kernel(BUSY);
    let run = |options: &[&str]| {
        let line = [&["run", "-q", "--engine", "soft", "--kernel", kernel.to_str().unwrap()], options];
        let finished = home.yado(&line.concat());
        (finished.code(), finished.stderr)
    };
    for (options, code, why) in [
        (&["--pin", "0=1023"][..], 125, "host CPUs [1023]"),
        (&["--pin", "3=0"], 125, "no vCPU 3"),
        (&["--limit", "cpu=lots"], 2, "1.5 or 150%"),
        (&["--limit", "cpu=1", "--cgroup", "/no/such/group"], 125, "--cgroup"),
        (&["--numa", "fake=2", "--numa", "node"], 2, "none beside it"),
        (&["--numa", "cpus=4"], 125, "vCPU 0 is of none"),
        (&["--numa", "host=1000"], 125, "host node 1000"),
        (&["-m", "8M,hugepages=2M"], 125, "--engine kvm"),
        (&["-m", "8M,mergeable"], 125, "this process's own"),
    ] {
        let (ended, said) = run(options);
        assert!(ended == code && said.contains(why), "{options:?}: {ended} {said}");
    }
    home.assert_nothing_left();
}
