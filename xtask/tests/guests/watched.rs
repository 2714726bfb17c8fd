//! `yado stats` and `yado inspect`: what is told from outside is what the guest says itself.

use serde_json::Value;
use xtask::story::Home;

fn json(home: &Home, arguments: &[&str]) -> Value {
    let finished = home.yado(arguments);
    finished.assert_success();
    serde_json::from_slice(&finished.stdout).unwrap()
}

/// A profile in which a kernel function is seen, where the guest spends some of its time. On a busy host that may take a few.
fn profile_with(home: &Home, function: &str) -> Value {
    for _ in 0..5 {
        let told = json(home, &["stats", "watched", "--profile=3", "--json"]);
        if told["functions"].as_array().unwrap().iter().any(|row| row["name"] == function) {
            return told;
        }
    }
    panic!("{function} is never seen");
}

#[test]
fn a_guest_is_seen_from_outside_as_from_inside() {
    let home = Home::new();
    home.yado(&["run", "-q", "debian", "--name", "watched", "--cpus", "2", "--detach"]).assert_success();
    home.in_guest("watched", "systemd-run -q --unit=burner sha256sum /dev/zero");
    let id: u64 = home
        .in_guest("watched", "systemctl show -P MainPID burner")
        .parse()
        .expect("the service should have a process");

    let told = profile_with(&home, "read_zero");
    let inside = home.in_guest("watched", "grep ' [tTwW] ' /proc/kallsyms | grep -vc '\\['");
    assert_eq!(told["kernel_functions"].to_string(), inside, "functions that the guest's kernel has");
    let processes = told["processes"].as_array().unwrap();
    let burner = processes.iter().find(|row| row["pid"] == id).expect("the busy process should be seen");
    assert_eq!(burner["name"], "sha256sum");
    let [user, kernel] = ["user", "kernel"].map(|part| burner[part].as_u64().unwrap());
    assert!(user > 100 && kernel > 0, "it computes what it reads: {burner}");
    let map = home.path().join("perf.map");
    home.yado(&["stats", "watched", &format!("--perf-map={}", map.display())]).assert_success();
    let map = std::fs::read_to_string(map).unwrap();
    let known: Vec<_> = map.lines().filter_map(|line| line.split_once(" guest:")).collect();
    assert!(known.iter().any(|(_, name)| *name == "read_zero"), "of {} pieces of code", known.len());
    let place = |text: &str| u64::from_str_radix(text, 16).expect("a hexadecimal number");
    let places = known.iter().filter_map(|(range, _)| range.split_once(' '));
    assert!(places.map(|(start, len)| (place(start), place(len))).is_sorted_by(|a, b| a.0 + a.1 <= b.0));

    let stats = json(&home, &["stats", "watched", "--json"]);
    let vcpus = stats["vcpus"].as_array().unwrap();
    assert_eq!(vcpus.len(), 2);
    for vcpu in vcpus {
        let time = vcpu["vm_time_ns"].as_u64().unwrap();
        assert!(vcpu["halted_ns"].as_u64().unwrap() < time, "{vcpu}");
        assert!(
            vcpu["interrupts_by_vector"].as_object().is_some_and(|vectors| !vectors.is_empty()),
            "{vcpu}"
        );
        assert!(vcpu["engine"]["blocks"].as_u64().unwrap() > 1000, "{vcpu}");
    }

    // A guest that stands still still answers: both times the same.
    home.yado(&["pause", "watched"]).assert_success();
    let registers = || json(&home, &["inspect", "watched"])["machine"]["vcpus"].clone();
    let first = registers();
    assert_eq!((first[0]["state"].as_str(), &first), (Some("paused"), &registers()));
    assert_ne!(first[0]["cr3"], "0x0");
    home.yado(&["resume", "watched"]).assert_success();
    home.yado(&["stop", "watched"]).assert_success();
    home.yado(&["rm", "watched"]).assert_success();
    home.assert_nothing_left();
}
