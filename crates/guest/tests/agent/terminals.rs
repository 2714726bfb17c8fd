//! Commands with a terminal.

use super::*;

fn on_terminal(script: &str) -> Exec {
    let terminal = Some(guest::terminal(24, 80, "xterm-256color"));
    Exec { argv: words(&["sh", "-c", script]), terminal, ..Exec::default() }
}

#[test]
fn size_and_its_changes_arrive() {
    let mut guest = Guest::start();
    let script = "trap 'stty size; exit 3' WINCH; tty >/dev/null && echo $TERM; stty size; while :; do sleep 0.05; done";
    let session = guest.begin(on_terminal(script));
    guest.run_of(session).input_ends = false;
    guest.until("the first size", |guest| guest.runs[&session].text().contains("24 80"));
    guest.client.resize(session, 50, 132).unwrap();
    let run = guest.finish(session);
    assert_eq!(run.text(), "xterm-256color\r\n24 80\r\n50 132\r\n");
    assert_eq!(run.code(), 3);
    assert!(run.stderr.is_empty());
}

#[test]
fn control_c_interrupts_and_end_of_input_ends() {
    let mut guest = Guest::start();
    let session = guest.begin(on_terminal("echo ready; exec sleep 1000"));
    guest.run_of(session).input_ends = false;
    guest.until("it runs", |guest| guest.runs[&session].text().contains("ready"));
    guest.client.stdin(session, &[3]).unwrap();
    let run = guest.finish(session);
    assert_eq!(run.code(), 128 + 2);
    assert!(run.text().contains("^C"));

    let session = guest.begin(on_terminal("cat; echo over"));
    guest.run_of(session).input = b"line\n".to_vec();
    let run = guest.finish(session);
    assert_eq!(run.text(), "line\r\nline\r\nover\r\n");
}

#[test]
fn all_that_was_written_before_the_end_arrives() {
    let mut guest = Guest::start();
    for _ in 0..20 {
        let session = guest.begin(on_terminal("seq 1 3000"));
        let run = guest.finish(session);
        assert!(run.text().ends_with("\n3000\r\n"));
        assert_eq!(run.text().lines().count(), 3000);
    }
}

#[test]
fn jobs_work_on_it() {
    let mut guest = Guest::start();
    let session =
        guest.begin(on_terminal("ps -o tpgid= -o pgid= -p $$; test -t 0 && test -t 1 && test -t 2"));
    let run = guest.finish(session);
    let numbers: Vec<u32> = run.text().split_whitespace().map(|word| word.parse().unwrap()).collect();
    assert_eq!(numbers, [run.pid, run.pid], "the command's group is in the foreground");
    assert_eq!(run.code(), 0);
}
