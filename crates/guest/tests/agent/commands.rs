//! Commands with pipes: bytes, exit codes, signals, environment, many at a time.

use super::*;
use guest::{Ending, Failure};

#[test]
fn ten_megabytes_go_both_ways_unchanged() {
    let mut guest = Guest::start();
    let data = noise(10_000_000);
    let session = guest.begin(Exec { argv: words(&["cat"]), ..Exec::default() });
    guest.run_of(session).input = data.clone();
    let run = guest.finish(session);
    assert_eq!(run.code(), 0);
    assert!(run.stdout == data, "{} bytes came back", run.stdout.len());
    assert!(run.stderr.is_empty());
}

#[test]
fn stdout_and_stderr_are_kept_apart() {
    let mut guest = Guest::start();
    let session =
        guest.shell("head -c 3000000 /dev/zero | tr '\\0' e >&2 & head -c 3000000 /dev/zero; wait; exit 7");
    let run = guest.finish(session);
    assert!(run.stdout == vec![0; 3_000_000] && run.stderr == vec![b'e'; 3_000_000]);
    assert_eq!(run.code(), 7);
}

#[test]
fn endings_are_told_as_a_shell_would() {
    let mut guest = Guest::start();
    for (script, code) in [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)] {
        let session = guest.shell(script);
        assert_eq!(guest.finish(session).code(), code, "{script}");
    }
    let mut failing = |argv: &[&str], directory: &str, user: &str| {
        let (directory, user) = (directory.into(), user.into());
        let session = guest.begin(Exec { argv: words(argv), directory, user, ..Exec::default() });
        match guest.finish(session).last {
            Some(Event::Failed { failure, errno, .. }) => (failure, failure.exit_code(), errno),
            other => panic!("{argv:?}: {other:?}"),
        }
    };
    assert_eq!(failing(&["no-such-program"], "", ""), (Failure::NotFound, 127, 2));
    assert_eq!(failing(&["/no/such/program"], "", ""), (Failure::NotFound, 127, 2));
    assert_eq!(failing(&["/etc/passwd"], "", ""), (Failure::NotExecutable, 126, 13));
    assert_eq!(failing(&["true"], "/no/such/directory", ""), (Failure::Directory, 126, 2));
    assert_eq!(failing(&["true"], "", "no-such-user"), (Failure::User, 126, 2));
}

#[test]
fn signals_reach_the_whole_process_group() {
    let mut guest = Guest::start();
    let session = guest.shell("sleep 1000 & echo $!; wait");
    guest.until("the child is named", |guest| guest.runs[&session].text().ends_with('\n'));
    let child: u32 = guest.runs[&session].text().trim().parse().unwrap();
    guest.client.signal(session, SIGTERM).unwrap();
    let run = guest.finish(session);
    assert!(matches!(run.last, Some(Event::Exited { ending: Ending::Signal(SIGTERM), .. })));
    guest.until("the grandchild is gone", |_| process_state(child).is_none_or(|state| state == 'Z'));
}

#[test]
fn a_program_gets_the_signals_that_programs_expect() {
    let mut guest = Guest::start();
    let session = guest.shell("grep -E '^Sig(Blk|Ign)' /proc/self/status; yes | head -n 1 >/dev/null");
    let run = guest.finish(session);
    assert_eq!(run.text(), "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    assert!(run.stderr.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
}

#[test]
fn environment_directory_and_arguments_arrive() {
    let mut guest = Guest::start();
    let exec = Exec {
        argv: words(&["sh", "-c", "pwd; echo \"$PATH|$HOME|$COLOUR|$1|$#\"", "sh", "a b\n*", ""]),
        env: words(&["COLOUR=blue", "PATH=/usr/bin:/bin"]),
        directory: b"/usr/lib".to_vec(),
        ..Exec::default()
    };
    let session = guest.begin(exec);
    let run = guest.finish(session);
    let home = fs::read_to_string("/etc/passwd").unwrap();
    let home = home.lines().find(|line| line.starts_with("root:")).unwrap().split(':').nth(5).unwrap();
    assert_eq!(run.text(), format!("/usr/lib\n/usr/bin:/bin|{home}|blue|a b\n*|2\n"));
}

#[test]
fn another_user_has_its_groups_only() {
    let mut guest = Guest::start();
    let session = guest.shell("id -u");
    if guest.finish(session).text() != "0\n" {
        return; // Only root can become somebody else.
    }
    for (user, expected) in [("65534", "65534:65534:65534\n"), ("12345:54321", "12345:54321:54321\n")] {
        let argv = words(&["sh", "-c", "echo $(id -u):$(id -g):$(id -G)"]);
        let session = guest.begin(Exec { argv, user: user.into(), ..Exec::default() });
        assert_eq!(guest.finish(session).text(), expected);
    }
}

#[test]
fn no_file_of_the_agents_leaks_into_commands() {
    let mut guest = Guest::start();
    let waiting = guest.shell("sleep 1000");
    let session = guest.shell("ls /proc/$$/fd");
    assert_eq!(guest.finish(session).text(), "0\n1\n2\n");
    guest.client.abandon(waiting);
    let code = guest.finish(waiting).code();
    assert!([128 + 1, 128 + 9].contains(&code), "neither hung up nor killed: {code}");
}

#[test]
fn twenty_commands_run_at_a_time() {
    let mut guest = Guest::start();
    let sessions: Vec<_> = (0..20)
        .map(|number| {
            let session =
                guest.shell(&format!("head -c 200000 | tr a-z A-Z; echo {number} >&2; exit {number}"));
            guest.run_of(session).input = vec![b'a' + number; 200_000];
            session
        })
        .collect();
    for (number, session) in (0u8..).zip(sessions) {
        let run = guest.finish(session);
        assert_eq!(run.code(), number);
        assert_eq!(run.stderr, format!("{number}\n").into_bytes());
        let wrong = run.stdout.iter().position(|&byte| byte != b'A' + number);
        assert_eq!((run.stdout.len(), wrong), (200_000, None), "command {number}");
    }
}

#[test]
fn a_stalled_reader_delays_only_itself() {
    let mut guest = Guest::start();
    let stalled = guest.shell("head -c 5000000 /dev/zero");
    guest.run_of(stalled).stalled = true;
    guest.until("the window is full", |guest| guest.runs[&stalled].stdout.len() == guest::OUTPUT_WINDOW);
    let other = guest.shell("head -c 2000000 /dev/zero");
    assert_eq!(guest.finish(other).stdout.len(), 2_000_000);
    assert_eq!(guest.runs[&stalled].stdout.len(), guest::OUTPUT_WINDOW);
    guest.run_of(stalled).stalled = false;
    guest.client.consumed(stalled, Stream::Stdout, guest::OUTPUT_WINDOW);
    assert_eq!(guest.finish(stalled).stdout.len(), 5_000_000);
}

#[test]
fn input_that_nobody_reads_blocks_nobody() {
    let mut guest = Guest::start();
    let session = guest.begin(Exec { argv: words(&["true"]), ..Exec::default() });
    guest.run_of(session).input = vec![1; 3_000_000];
    assert_eq!(guest.finish(session).code(), 0);
    // One that has closed its input and goes on takes it all, too.
    let session = guest.shell("exec <&-; sleep 0.3; echo done");
    guest.run_of(session).input = vec![1; 3_000_000];
    assert_eq!(guest.finish(session).text(), "done\n");
}

#[test]
fn a_process_left_behind_does_not_hold_up_the_end() {
    let mut guest = Guest::start();
    let session = guest.shell("sleep 1000 & echo $!");
    let run = guest.finish(session);
    assert_eq!(run.code(), 0);
    let status = Command::new("kill").arg(run.text().trim()).status().unwrap();
    assert!(status.success(), "it went on running");
}

#[test]
fn nobody_stays_a_zombie() {
    let mut guest = Guest::start();
    for _ in 0..30 {
        let session = guest.shell("exit 0");
        guest.finish(session);
    }
    let session = guest.begin(Exec { argv: words(&["no-such-program"]), ..Exec::default() });
    guest.finish(session);
    let task = format!("/proc/{0}/task/{0}/children", guest.agent.id());
    guest.until("all are reaped", |_| fs::read_to_string(&task).unwrap().trim().is_empty());
}
