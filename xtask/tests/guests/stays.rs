//! A guest that stays: started in the background, listed, talked to, stopped, started again, removed.

use std::time::{Duration, Instant};
use xtask::story::{Home, until};

fn processor_time(process: u64) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    // Fields 14 and 15 of proc(5), in hundredths of a second.
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
fn a_guest_from_its_birth_to_its_end() {
    let home = Home::new();
    let started = home.yado(&["run", "-q", "debian", "--name", "web", "--detach"]);
    started.assert_success();
    assert_eq!(started.text(), "web\n");

    let listed = home.yado(&["ps", "--json"]);
    let guests: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(guests[0]["name"], "web");
    assert_eq!(guests[0]["running"], true);
    let process = guests[0]["pid"].as_u64().unwrap();

    home.yado(&["run", "-q", "debian", "--name", "web"]).assert_refused(125, "web is running");

    assert_eq!(home.in_guest("web", "id -u; uname -s"), "0\nLinux");
    assert_eq!(home.yado(&["exec", "web", "--", "sh", "-c", "exit 9"]).code(), 9);
    home.in_guest("web", "echo kept > /var/tmp/note; systemctl is-system-running --wait || true");
    // Two commands at a time.
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| home.in_guest("web", "sleep 2; echo slow"));
        assert_eq!(home.in_guest("web", "echo quick"), "quick");
        assert!(!slow.is_finished());
        assert_eq!(slow.join().unwrap(), "slow");
    });

    let inspected = home.yado(&["inspect", "web"]);
    inspected.assert_success();
    assert!(serde_json::from_slice::<serde_json::Value>(&inspected.stdout).unwrap().is_object());

    idle_costs_little(&home, process);

    let log = home.yado(&["logs", "web"]).text();
    assert!(log.contains("login:"), "no login prompt in:\n{log}");
    assert_eq!(home.yado(&["logs", "--lines", "2", "web"]).text().lines().count(), 2);

    assert_eq!(home.yado(&["stop", "web"]).code(), 0);
    assert!(home.processes().is_empty());
    assert_eq!(home.yado(&["ps", "--quiet"]).text(), "");
    assert_eq!(home.yado(&["ps", "--all", "--quiet"]).text(), "web\n");
    home.yado(&["exec", "web", "--", "true"]).assert_refused(125, "not running");

    let again = home.yado(&["run", "-q", "debian", "--name", "web", "--", "cat", "/var/tmp/note"]);
    again.assert_success();
    assert_eq!(again.text(), "kept\n");
    assert!(home.processes().is_empty());

    home.yado(&["rm", "web"]).assert_success();
    home.assert_nothing_left();
}

/// A guest that waits takes less than 3 % of a processor.
fn idle_costs_little(home: &Home, process: u64) {
    // The first boot's configuration of packages is work, not idling. It goes on when the guest starts again, and once dpkg
    // has begun it goes to its end.
    let busy = "yado-configure.timer apt-daily.timer apt-daily-upgrade.timer";
    let ended = "n=0; while pgrep -x dpkg && [ $n -lt 180 ]; do sleep 1; n=$((n+1)); done";
    home.in_guest("web", &format!("systemctl stop {busy} 2>/dev/null; {ended}; sync; sleep 5"));
    const PERIOD: Duration = Duration::from_secs(10);
    let measured = |period| {
        let (before, began) = (processor_time(process), Instant::now());
        std::thread::sleep(period);
        (processor_time(process) - before).as_secs_f64() / began.elapsed().as_secs_f64()
    };
    // Work that a booted system still does in the background may fall into one period, not into three.
    let best = (0..3).map(|_| measured(PERIOD)).fold(f64::INFINITY, f64::min);
    assert!(best < 0.03, "an idle guest takes {:.1} % of a processor", best * 100.0);
}

#[test]
fn a_guest_reboots_and_is_the_same_guest() {
    let home = Home::new();
    home.yado(&["run", "-q", "debian", "--name", "again", "--detach"]).assert_success();
    let process = home.processes();
    // A reboot amid the configuration of packages is another story, and a long one.
    let unless_configured = "until systemctl mask --runtime --now yado-configure.timer; do sleep 1; done";
    home.in_guest(
        "again",
        &format!("{unless_configured} 2>/dev/null; systemctl is-system-running --wait || true"),
    );
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let first = home.in_guest("again", boot_id);
    home.in_guest(
        "again",
        "echo kept > /var/tmp/note; systemctl is-active serial-getty@hvc0 && exit 1 || true",
    );
    let finished = home.yado(&["exec", "again", "--", "sh", "-c", "systemctl reboot; sleep 100"]);
    assert_eq!(finished.code(), 125, "{}", finished.all());
    assert!(finished.stderr.contains("the guest restarted"), "{}", finished.all());
    // The agent answers again once the guest is up.
    let finished = home.yado(&["exec", "again", "--timeout", "120", "--", "sh", "-c", boot_id]);
    finished.assert_success();
    assert_ne!(finished.text().trim_end(), first);
    assert_eq!(home.in_guest("again", "cat /var/tmp/note"), "kept");
    let inspected = home.yado(&["inspect", "again"]);
    let tree: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(tree["machine"]["starts"], 2);
    assert!(home.yado(&["logs", "again"]).text().contains("the guest restarts: start 2"));
    assert_eq!(home.processes(), process, "the process is another one");
    home.yado(&["stop", "again"]).assert_success();
    home.yado(&["rm", "again"]).assert_success();
    home.assert_nothing_left();
}

#[test]
fn a_paused_guest_stands_still() {
    let home = Home::new();
    home.yado(&["run", "-q", "debian", "--name", "clock", "--detach"]).assert_success();
    home.in_guest("clock", "true");
    home.yado(&["pause", "clock"]).assert_success();
    let process: u64 = home.processes()[0].into();
    let before = processor_time(process);
    std::thread::sleep(Duration::from_secs(2));
    assert!(processor_time(process) - before < Duration::from_millis(100));
    home.yado(&["resume", "clock"]).assert_success();
    assert_eq!(home.in_guest("clock", "echo on"), "on");
    home.yado(&["rm", "--force", "clock"]).assert_success();
    home.assert_nothing_left();
}

#[test]
fn a_guest_without_a_name_vanishes_when_it_stops() {
    let home = Home::new();
    let started = home.yado(&["run", "-q", "debian", "--detach"]);
    started.assert_success();
    let name = started.text().trim().to_owned();
    assert!(name.starts_with("debian-"), "{name}");
    home.yado(&["stop", "--force", &name]).assert_success();
    until("the guest to vanish", Duration::from_secs(10), || home.processes().is_empty());
    home.assert_nothing_left();
}

#[test]
fn a_killed_yado_leaves_nothing_that_hinders() {
    let home = Home::new();
    let started = home.yado(&["run", "-q", "debian", "--detach"]);
    started.assert_success();
    for process in home.processes() {
        xtask::story::signal(process, "KILL");
    }
    // A dying process loses its memory first and its locks last.
    until("the guest to be forgotten", Duration::from_secs(10), || {
        home.yado(&["ps", "--all", "--quiet"]).text().is_empty()
    });
    home.yado(&["run", "-q", "debian", "--", "true"]).assert_success();
    home.assert_nothing_left();
}
