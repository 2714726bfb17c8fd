//! What somebody cannot do who has broken out of a guest into yado's process: a thread of a running `yado run` is taken over
//! with ptrace, and tries.

mod intruder;

use intruder::{Answer, Intruder, threads};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use xtask::story::{self, Home};

fn home() -> Home {
    Home::fresh_for(Path::new(env!("CARGO_BIN_EXE_yado")))
}

/// A multiboot image that says "up" on the serial port and halts for ever.
fn kernel(home: &Home) -> PathBuf {
    home.bare_kernel(b"\x66\xba\xf8\x03\xb0u\xee\xb0p\xee\xb0\n\xee\xf4\xeb\xfd")
}

/// Says "up" when the PIT has interrupted it by way of the I/O APIC: the interrupt of a thread that is not a vCPU's. 32-bit code
/// at 0x100020.
#[rustfmt::skip]
const TIMER: [u8; 212] = [
    // cli; mov esp, 0x180000; lgdt; jmp 8:next.
    0xfa, 0xbc, 0x00, 0x00, 0x18, 0x00, 0x0f, 0x01, 0x15, 0xe8, 0x00, 0x10, 0x00, 0xea, 0x34, 0x00,
    0x10, 0x00, 0x08, 0x00,
    // mov ds, es, ss.
    0xb8, 0x10, 0x00, 0x00, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,
    // both 8259As masked.
    0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1,
    // gate 0x40 at 0x170200: the handler; lidt.
    0xb8, 0xbd, 0x00, 0x10, 0x00, 0x89, 0xc2, 0x25, 0xff, 0xff, 0x00, 0x00, 0x0d, 0x00, 0x00, 0x08,
    0x00, 0xa3, 0x00, 0x02, 0x17, 0x00, 0x81, 0xe2, 0x00, 0x00, 0xff, 0xff, 0x81, 0xca, 0x00, 0x8e,
    0x00, 0x00, 0x89, 0x15, 0x04, 0x02, 0x17, 0x00, 0x0f, 0x01, 0x1d, 0xee, 0x00, 0x10, 0x00,
    // I/O APIC, pins 0 and 2: vector 0x40, edge, to APIC 0.
    0xbe, 0x00, 0x00, 0xc0, 0xfe, 0xc7, 0x06, 0x10, 0x00, 0x00, 0x00, 0xc7, 0x46, 0x10, 0x40, 0x00,
    0x00, 0x00, 0xc7, 0x06, 0x11, 0x00, 0x00, 0x00, 0xc7, 0x46, 0x10, 0x00, 0x00, 0x00, 0x00, 0xc7,
    0x06, 0x14, 0x00, 0x00, 0x00, 0xc7, 0x46, 0x10, 0x40, 0x00, 0x00, 0x00, 0xc7, 0x06, 0x15, 0x00,
    0x00, 0x00, 0xc7, 0x46, 0x10, 0x00, 0x00, 0x00, 0x00,
    // PIT, channel 0, mode 0: once, after 14 ms.
    0xb0, 0x30, 0xe6, 0x43, 0xb0, 0x00, 0xe6, 0x40, 0xb0, 0x40, 0xe6, 0x40,
    // sti; then hlt for ever.
    0xfb, 0xf4, 0xeb, 0xfd,
    // the handler: "up" on the serial port; then hlt for ever.
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xb0, 0x75, 0xee, 0xb0, 0x70, 0xee, 0xb0, 0x0a, 0xee, 0xeb, 0xed,
    // the GDT: 32-bit code and data; what LGDT and LIDT load.
    0x8d, 0x76, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00,
    0x9b, 0xcf, 0x00, 0xff, 0xff, 0x00, 0x00, 0x00, 0x93, 0xcf, 0x00, 0x17, 0x00, 0xd0, 0x00, 0x10,
    0x00, 0x07, 0x02, 0x00, 0x00, 0x17, 0x00,
];

/// A guest that runs, in a process that is a child of this one; it goes with this value.
struct Guest {
    child: Child,
}

impl Guest {
    fn start(home: &Home, options: &[&str]) -> Self {
        Self::of(home, &kernel(home), options)
    }

    /// Waits until it says "up".
    fn of(home: &Home, kernel: &Path, options: &[&str]) -> Self {
        let line =
            [&["run", "-q", "--name", "g", "--memory", "8M", "--kernel", kernel.to_str().unwrap()], options];
        let mut command = home.command(&line.concat());
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
        let guest = Self { child };
        story::until("the guest runs", story::LIMIT, || home.yado(&["logs", "g"]).text().contains("up"));
        guest
    }

    fn id(&self) -> u32 {
        self.child.id()
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

/// Threads of each kind that there is.
const THREADS: [&str; 5] = ["yado", "vcpu0", "control", "timer", "console"];

/// Somebody else's process.
struct Victim(Child);

impl Victim {
    fn new() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn status(process: u32, thread: libc::pid_t, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/status")).unwrap();
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

#[test]
fn every_thread_is_inside() {
    for engine in engines() {
        let home = home();
        let guest = Guest::start(&home, &["--engine", engine]);
        let all = threads(guest.id());
        for name in THREADS {
            assert!(all.iter().any(|(_, of)| of == name), "{name} in {all:?}");
        }
        for (thread, name) in all {
            let about = |key| status(guest.id(), thread, key);
            let of = |what: &str| format!("{what} of {name} on {engine}");
            assert_eq!(about("NoNewPrivs"), "1", "{}", of("privileges"));
            assert_eq!(about("Seccomp"), "2", "{}", of("system calls"));
            for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(about(set), "0000000000000000", "{}", of(set));
            }
        }
        let live = home.yado(&["inspect", "g"]).text();
        assert!(live.contains("no_new_privileges"), "{live}");
    }
}

/// Errors that mean no.
const NO: [i32; 3] = [libc::EPERM, libc::EACCES, libc::ENOSYS];

#[test]
fn nothing_outside_is_reached() {
    for engine in engines() {
        let home = home();
        let secret = home.file("secret", b"mine");
        let secret = secret.to_str().unwrap();
        let new = home.path().join("new");
        // Another guest of the same user's.
        let other = home.path().join("state/yado/vms/other/disk.raw");
        std::fs::create_dir_all(other.parent().unwrap()).unwrap();
        std::fs::write(&other, b"theirs").unwrap();
        let mut victim = Victim::new();
        let process = u64::from(victim.0.id());
        let guest = Guest::start(&home, &["--engine", engine, "--net", "none"]);
        let own = u64::from(guest.id());
        for name in THREADS {
            let mut intruder = Intruder::into(guest.id(), name);
            let here = libc::AT_FDCWD as u64;
            let texts =
                [secret, new.to_str().unwrap(), other.to_str().unwrap(), "/proc/1/environ", "/dev/kvm"];
            let [secret, new, other, environ, kvm] =
                [0, 1, 2, 3, 4].map(|at| intruder.text(at as u64, texts[at]));
            let create = (libc::O_CREAT | libc::O_WRONLY) as u64;
            let own_group = (own as i64).wrapping_neg() as u64;
            let tries: &[(&str, libc::c_long, &[u64])] = &[
                ("read a file", libc::SYS_openat, &[here, secret, 0]),
                ("write a file", libc::SYS_openat, &[here, secret, libc::O_RDWR as u64]),
                ("read another guest's disk", libc::SYS_openat, &[here, other, 0]),
                ("read another process's secrets", libc::SYS_openat, &[here, environ, 0]),
                ("open a device", libc::SYS_openat, &[here, kvm, libc::O_RDWR as u64]),
                ("open in the old way", libc::SYS_open, &[secret, 0]),
                ("make a file", libc::SYS_openat, &[here, new, create, 0o600]),
                ("remove a file", libc::SYS_unlinkat, &[here, secret, 0]),
                ("remove another guest's disk", libc::SYS_unlink, &[other]),
                ("rename a file", libc::SYS_rename, &[secret, new]),
                ("make a directory", libc::SYS_mkdir, &[new, 0o700]),
                ("make a link", libc::SYS_symlink, &[secret, new]),
                ("change rights", libc::SYS_chmod, &[secret, 0o777]),
                ("make a way in", libc::SYS_bind, &[0, new, 16]),
                ("talk to the internet", libc::SYS_socket, &[libc::AF_INET as u64, 1, 0]),
                ("talk to the internet by IPv6", libc::SYS_socket, &[libc::AF_INET6 as u64, 2, 0]),
                ("talk to other processes", libc::SYS_socket, &[libc::AF_UNIX as u64, 1, 0]),
                ("talk to the kernel", libc::SYS_socket, &[libc::AF_NETLINK as u64, 3, 0]),
                ("kill in one thread", libc::SYS_tgkill, &[process, process, libc::SIGKILL as u64]),
                ("have the kernel signal others", libc::SYS_fcntl, &[0, libc::F_SETOWN as u64, process]),
                ("type on the terminal", libc::SYS_ioctl, &[0, libc::TIOCSTI, secret]),
                ("a thread with a filter of its own", libc::SYS_clone3, &[secret, 88]),
                ("a process", libc::SYS_clone, &[libc::SIGCHLD as u64, 0, 0, 0, 0]),
                ("shared memory of others", libc::SYS_shmget, &[1, 4096, 0]),
                ("its own limits", libc::SYS_prlimit64, &[own, 7, new, 0]),
                ("time of others", libc::SYS_setpriority, &[0, process, 19]),
                ("a group", libc::SYS_setpgid, &[own_group, 0]),
            ];
            for (what, number, arguments) in tries {
                match intruder.call(*number, arguments) {
                    Answer::Refused(error) if NO.contains(&error) => {}
                    answer => panic!("{name} on {engine}: {what}: {answer:?}"),
                }
            }
            // An engine with processes of its own may signal and trace these; no others.
            if engine == "soft" {
                for (what, number, arguments) in [
                    ("kill", libc::SYS_kill, [process, libc::SIGKILL as u64, 0, 0, 0]),
                    ("signal a group", libc::SYS_kill, [0, libc::SIGUSR1 as u64, 0, 0, 0]),
                    ("trace", libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), process, 0, 0, 0]),
                    (
                        "execute",
                        libc::SYS_execveat,
                        [0, intruder.text(5, "/bin/true"), 0, 0, libc::AT_EMPTY_PATH as u64],
                    ),
                ] {
                    match intruder.call(number, &arguments) {
                        Answer::Refused(libc::EPERM | libc::EACCES | libc::ESRCH) => {}
                        answer => panic!("{name}: {what}: {answer:?}"),
                    }
                }
            } else {
                let (page, execute) = (intruder.put(6, &[0]) & !0xfff, libc::PROT_EXEC as u64);
                assert_eq!(
                    intruder.call(libc::SYS_mprotect, &[page, 4096, 3 | execute]),
                    Answer::Refused(libc::EPERM),
                    "new code in {name}"
                );
            }
        }
        assert!(victim.lives());
        assert_eq!(std::fs::read(&other).unwrap(), b"theirs");
        assert_eq!(std::fs::read(home.path().join("secret")).unwrap(), b"mine");
        assert!(!new.exists());
        // And the guest has heard nothing of it.
        home.yado(&["inspect", "g"]).assert_success();
        home.yado(&["stop", "--force", "g"]).assert_success();
    }
}

#[test]
fn a_guest_with_a_network_reaches_that_and_nothing_else() {
    let home = home();
    let guest = Guest::start(&home, &["--engine", "soft", "--net", "user"]);
    let mut intruder = Intruder::into(guest.id(), "net0");
    let opened = intruder.call(libc::SYS_socket, &[libc::AF_INET as u64, 2, 0]);
    assert!(matches!(opened, Answer::Gave(_)), "{opened:?}");
    for (what, number, arguments) in [
        ("other processes", libc::SYS_socket, [libc::AF_UNIX as u64, 1, 0]),
        ("raw packets", libc::SYS_socket, [libc::AF_PACKET as u64, 3, 0]),
        ("the kernel", libc::SYS_socket, [libc::AF_NETLINK as u64, 3, 0]),
        ("files", libc::SYS_openat, [libc::AF_UNIX as u64, intruder.text(0, "/etc/passwd"), 0]),
        ("a process", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0]),
        ("tracing", libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), 1, 0]),
    ] {
        match intruder.call(number, &arguments) {
            Answer::Refused(error) if NO.contains(&error) => {}
            answer => panic!("{what}: {answer:?}"),
        }
    }
}

#[test]
fn what_no_guest_ever_needs_ends_the_process() {
    for engine in engines() {
        let of_kvm: &[(&str, libc::c_long)] = &[("tracing", libc::SYS_ptrace), ("signals", libc::SYS_kill)];
        let always = [
            ("another program", libc::SYS_execve),
            ("another's memory", libc::SYS_process_vm_readv),
            ("mounts", libc::SYS_mount),
            ("namespaces", libc::SYS_unshare),
            ("programs in the kernel", libc::SYS_bpf),
        ];
        let more = if engine == "kvm" { of_kvm } else { &[] };
        for (what, number) in always.iter().chain(more) {
            let home = home();
            let guest = Guest::start(&home, &["--engine", engine]);
            let mut intruder = Intruder::into(guest.id(), "vcpu0");
            assert_eq!(intruder.call(*number, &[]), Answer::Died(libc::SIGSYS), "{what} on {engine}");
        }
    }
}

#[test]
fn a_guest_without_a_name_leaves_nothing_behind() {
    for engine in engines() {
        let home = home();
        // mov dx, 0x604; mov ax, 0x3400; out dx, ax: power off.
        let kernel = home.bare_kernel(b"\x66\xba\x04\x06\x66\xb8\x00\x34\x66\xef\xeb\xfe");
        let line = ["run", "-q", "--memory", "8M", "--engine", engine, "--kernel", kernel.to_str().unwrap()];
        home.yado(&line).assert_success();
        home.assert_nothing_left();
    }
}

#[test]
fn interrupts_of_every_thread_reach_the_guest() {
    for engine in engines() {
        let home = home();
        let kernel = home.bare_kernel(&TIMER);
        let _guest = Guest::of(&home, &kernel, &["--engine", engine]);
        // The guest's clock stands and goes on by the hand of the thread that is asked.
        home.yado(&["pause", "g"]).assert_success();
        home.yado(&["resume", "g"]).assert_success();
    }
}

#[test]
fn the_sandbox_can_be_left_off() {
    let home = home();
    let guest = Guest::start(&home, &["--sandbox", "off"]);
    assert_eq!(status(guest.id(), guest.id() as libc::pid_t, "Seccomp"), "0");
    assert!(home.yado(&["inspect", "g"]).text().contains("\"sandbox\": null"));
    assert!(home.yado(&["doctor"]).text().contains("sandbox"));
}
