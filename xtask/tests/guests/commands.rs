//! `yado run debian -- COMMAND`: streams, exit codes, signals.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;
use xtask::story::{Home, finish, noise, signal, until};

const DEBIAN: &[&str] = &["run", "-q", "debian", "--"];

fn run(home: &Home, command: &[&str]) -> xtask::story::Finished {
    home.yado(&[DEBIAN, command].concat())
}

#[test]
fn a_command_ends_well() {
    let home = Home::new();
    let finished = run(&home, &["true"]);
    finished.assert_success();
    assert!(finished.stdout.is_empty() && finished.stderr.is_empty(), "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn the_commands_exit_code_is_yados() {
    let home = Home::new();
    let finished = run(&home, &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(finished.code(), 7, "{}", finished.all());
    assert_eq!((finished.text().as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
    home.assert_nothing_left();
}

#[test]
fn commands_that_cannot_start_are_told_apart() {
    let home = Home::new();
    let finished = run(&home, &["no-such-command"]);
    assert_eq!(finished.code(), 127, "{}", finished.all());
    assert!(finished.stderr.contains("no-such-command"), "{}", finished.all());
    let finished = run(&home, &["/etc/passwd"]);
    assert_eq!(finished.code(), 126, "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn ten_megabytes_go_through_unchanged() {
    let home = Home::new();
    let bytes = noise(10_000_000);
    let finished = home.yado_with_input(&[DEBIAN, &["cat"]].concat(), &bytes);
    finished.assert_success();
    assert!(finished.stdout == bytes, "{} bytes came back, or others", finished.stdout.len());
    assert!(finished.stderr.is_empty(), "{}", finished.stderr);
}

#[test]
fn environment_directory_and_user_are_the_commands() {
    let home = Home::new();
    let line = [
        "run",
        "-q",
        "debian",
        "--env",
        "COLOUR=dark blue",
        "--workdir",
        "/usr/share",
        "--user",
        "nobody",
        "--",
    ];
    let finished = home.yado(&[&line[..], &["sh", "-c", "echo $COLOUR; pwd; id -un"]].concat());
    finished.assert_success();
    assert_eq!(finished.text(), "dark blue\n/usr/share\nnobody\n");
}

#[test]
fn signals_reach_the_command() {
    let home = Home::new();
    for (name, code) in [("TERM", 143), ("INT", 130)] {
        let mut child =
            home.command(&[DEBIAN, &["sh", "-c", "echo up; exec sleep 600"]].concat()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        signal(child.id(), name);
        let finished = finish(child, &[]);
        assert_eq!(finished.code(), code, "SIG{name}: {}", finished.all());
        home.assert_nothing_left();
    }
}

#[test]
fn a_command_can_answer_a_signal() {
    let home = Home::new();
    let script = "trap 'echo caught; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let mut child = home.command(&[DEBIAN, &["sh", "-c", script]].concat()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    signal(child.id(), "TERM");
    line.clear();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "caught\n");
    assert_eq!(finish(child, &[]).code(), 5);
}

#[test]
fn a_reader_that_leaves_ends_the_command() {
    let home = Home::new();
    let mut yado = home.command(&[DEBIAN, &["yes"]].concat()).spawn().unwrap();
    let out = yado.stdout.take().unwrap();
    let head = Command::new("head").args(["-n", "3"]).stdin(out).stdout(Stdio::piped()).output().unwrap();
    assert_eq!(head.stdout, b"y\ny\ny\n");
    until("yado to notice that nobody reads", Duration::from_secs(30), || yado.try_wait().unwrap().is_some());
    home.assert_nothing_left();
}

#[test]
fn ctrl_c_while_the_guest_boots() {
    let home = Home::new();
    // The image is in the cache afterwards, so that what follows is the boot.
    run(&home, &["true"]).assert_success();
    let child = home.command(&[DEBIAN, &["sleep", "600"]].concat()).spawn().unwrap();
    until("the guest's socket", Duration::from_secs(60), || {
        std::fs::read_dir(home.path().join("run/yado")).is_ok_and(|mut entries| entries.next().is_some())
    });
    signal(child.id(), "INT");
    let finished = finish(child, &[]);
    assert_eq!(finished.code(), 130, "{}", finished.all());
    home.assert_nothing_left();
}

#[test]
fn a_process_without_memory_ends_alone() {
    let home = Home::new();
    let finished =
        home.yado(&["run", "-q", "debian", "--", "sh", "-c", "tail /dev/zero; echo $?; sleep 1; echo lives"]);
    finished.assert_success();
    assert_eq!(finished.text(), "137\nlives\n", "{}", finished.all());
    home.assert_nothing_left();
}
