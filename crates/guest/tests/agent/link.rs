//! The link itself: late and restarted hosts, bytes of others, streams that end.

use super::*;
use guest::LostReason;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

#[test]
fn the_agent_is_the_one_embedded_here() {
    let mut guest = Guest::start();
    assert_eq!(guest.links, [Event::Ready { same_build: true }]);
    guest.client.ping(42).unwrap();
    guest.until("the answer", |guest| guest.links.contains(&Event::Pong(42)));
    assert!(guest::AGENT.len() < 200 * 1024, "the agent has {} bytes", guest::AGENT.len());
    assert!(guest::AGENT.starts_with(b"\x7fELF"));
}

#[test]
fn a_restarted_host_ends_what_the_earlier_one_ran() {
    let mut guest = Guest::start();
    let session = guest.shell("trap '' HUP; sleep 1000 & echo $!; wait");
    guest.until("it runs", |guest| guest.runs[&session].text().ends_with('\n'));
    let pids = [guest.runs[&session].pid, guest.runs[&session].text().trim().parse().unwrap()];
    guest.runs.clear();
    // The earlier host died in the middle of a frame; the new one knows nothing.
    guest.stream.write_all(b"\x20half of a frame").unwrap();
    guest.client = Client::new(1000);
    guest.until("the agent is ready again", |guest| guest.client.is_ready());
    guest.until("the earlier command is gone", |_| {
        pids.iter().all(|&pid| process_state(pid).is_none_or(|state| state == 'Z'))
    });
    let session = guest.shell("echo again");
    assert_eq!(guest.finish(session).text(), "again\n");
}

#[test]
fn lost_bytes_end_sessions_and_the_link_comes_back() {
    let mut guest = Guest::start();
    let session = guest.shell("sleep 1000");
    guest.until("it runs", |guest| guest.runs[&session].pid != 0);
    guest.stream.write_all(b"\x05junk\0").unwrap();
    let run = guest.finish(session);
    let reason = LostReason::AgentRestarted;
    assert_eq!(run.last, Some(Event::SessionLost { session, reason }));
    guest.until("the agent is ready again", |guest| guest.client.is_ready());
    guest.until("the command is gone", |_| process_state(run.pid).is_none());
    let session = guest.shell("echo again");
    assert_eq!(guest.finish(session).text(), "again\n");
}

#[test]
fn commands_end_with_the_agents_stream() {
    let mut guest = Guest::start();
    let session = guest.shell("trap '' HUP; sleep 1000 & wait");
    guest.until("it runs", |guest| guest.runs[&session].pid != 0);
    let pid = guest.runs[&session].pid;
    guest.stream = fs::File::open("/dev/null").unwrap();
    assert_eq!(guest.agent.wait().unwrap().code(), Some(0));
    let start = Instant::now();
    while process_state(pid).is_some_and(|state| state != 'Z') {
        assert!(start.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5));
    }
}

/// A pseudo-terminal, as a stand-in for a serial port: our end, and the path of the agent's.
fn serial_line() -> (fs::File, PathBuf) {
    let mut options = fs::File::options();
    let master = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/ptmx").unwrap();
    let mut number: libc::c_int = 0;
    let unlock: libc::c_int = 0;
    // SAFETY: both requests read or write one int.
    let done = unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) == 0
            && libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) == 0
    };
    assert!(done);
    (master, PathBuf::from(format!("/dev/pts/{number}")))
}

#[test]
fn it_works_over_a_serial_line_with_boot_messages_on_it() {
    let (mut master, path) = serial_line();
    // Keeps the line from hanging up while nobody has it open; a booting kernel writes to it.
    let mut kernel = fs::File::options().read(true).write(true).open(&path).unwrap();
    kernel.write_all(b"[    0.000000] Linux version\r\n\xff\xfe").unwrap();
    // A host that is early: its greeting is echoed, as by a line that is not raw yet.
    let mut early = Client::new(77);
    master.write_all(early.pending()).unwrap();
    early.sent(early.pending().len());
    let agent = Command::new(agent_file()).arg("--device").arg(&path).spawn().unwrap();
    let mut guest = Guest::over(master, agent, early);
    guest.until("the agent is ready", |guest| guest.client.is_ready());
    let data = noise(300_000);
    let session = guest.begin(Exec { argv: words(&["cat"]), ..Exec::default() });
    guest.run_of(session).input = data.clone();
    let run = guest.finish(session);
    assert!(run.stdout == data);
    assert_eq!(run.code(), 0);
}
