//! Starting a command: identity, environment, pipes or a terminal, fork and exec.

use alloc::ffi::CString;
use alloc::vec::Vec;

use crate::account::{self, Account};
use crate::message::{Exec, Failure};
use crate::sys::{self, EACCES, EINVAL, ENOENT, ENOTDIR, Errno, Fd};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const FILE_MAX: usize = 1024 * 1024;

/// A command about to run.
pub struct Child {
    pub pid: u32,
    /// Says why exec failed, or ends without a word once it has succeeded.
    pub status: Fd,
    pub stdin: Fd,
    pub stdout: Fd,
    /// None with a terminal.
    pub stderr: Option<Fd>,
}

/// Everything a child needs, made before the fork.
struct Plan {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    directory: CString,
    account: Account,
}

fn c_string(bytes: &[u8]) -> Result<CString, (Failure, Errno)> {
    CString::new(bytes).map_err(|_| (Failure::NotFound, EINVAL))
}

fn find_account(who: &[u8]) -> Option<Account> {
    let passwd = sys::read_file(c"/etc/passwd", FILE_MAX).unwrap_or_default();
    let group = sys::read_file(c"/etc/group", FILE_MAX).unwrap_or_default();
    account::find(who, &passwd, &group)
}

fn value<'a>(env: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    env.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))
}

fn plan(exec: &Exec) -> Result<Plan, (Failure, Errno)> {
    let account = find_account(&exec.user).ok_or((Failure::User, ENOENT))?;
    let mut env = exec.env.clone();
    let mut default = |name: &[u8], fallback: &[u8]| {
        if value(&env, name).is_none() && !fallback.is_empty() {
            env.push([name, b"=", fallback].concat());
        }
    };
    default(b"PATH", DEFAULT_PATH);
    default(b"HOME", &account.home);
    default(b"USER", &account.name);
    default(b"LOGNAME", &account.name);
    default(b"SHELL", &account.shell);
    if let Some(terminal) = &exec.terminal {
        default(b"TERM", &terminal.term);
    }
    let program = exec.argv.first().map_or(&[][..], Vec::as_slice);
    let candidates = if program.contains(&b'/') {
        [c_string(program)?].to_vec()
    } else {
        let path = value(&env, b"PATH").unwrap_or(DEFAULT_PATH);
        let places = path.split(|&byte| byte == b':').filter(|place| !place.is_empty());
        places.map(|place| c_string(&[place, b"/", program].concat())).collect::<Result<_, _>>()?
    };
    let home = if account.home.is_empty() { &b"/"[..] } else { &account.home };
    let directory = c_string(if exec.directory.is_empty() { home } else { &exec.directory })?;
    let argv = exec.argv.iter().map(|argument| c_string(argument)).collect::<Result<_, _>>()?;
    let env = env.iter().map(|entry| c_string(entry)).collect::<Result<_, _>>()?;
    Ok(Plan { candidates, argv, env, directory, account })
}

/// Starts a command in a session of its own.
pub fn start(exec: &Exec) -> Result<Child, (Failure, Errno)> {
    let plan = plan(exec)?;
    let resources = |errno| (Failure::Resources, errno);
    let (status, report) = sys::pipe().map_err(resources)?;
    if let Some(terminal) = &exec.terminal {
        let (master, slave) = sys::open_terminal(terminal.rows, terminal.columns).map_err(resources)?;
        let stdin = sys::duplicate(&master).map_err(resources)?;
        let Some(pid) = sys::fork().map_err(resources)? else {
            become_command(&plan, exec, [&slave, &slave, &slave], true, &report)
        };
        return Ok(Child { pid, status, stdin, stdout: master, stderr: None });
    }
    let (child_in, stdin) = sys::pipe().map_err(resources)?;
    let (stdout, child_out) = sys::pipe().map_err(resources)?;
    let (stderr, child_err) = sys::pipe().map_err(resources)?;
    for end in [&stdin, &stdout, &stderr] {
        sys::set_nonblocking(end).map_err(resources)?;
    }
    let Some(pid) = sys::fork().map_err(resources)? else {
        become_command(&plan, exec, [&child_in, &child_out, &child_err], false, &report)
    };
    Ok(Child { pid, status, stdin, stdout, stderr: Some(stderr) })
}

/// Starts a command on the terminal `console`, as init does when the kernel's command line asks for it.
pub fn start_on_console(exec: &Exec, console: &Fd) -> Result<u32, (Failure, Errno)> {
    let plan = plan(exec)?;
    let resources = |errno| (Failure::Resources, errno);
    let (status, report) = sys::pipe().map_err(resources)?;
    let Some(pid) = sys::fork().map_err(resources)? else {
        become_command(&plan, exec, [console, console, console], true, &report)
    };
    drop(report);
    match read_report(&status) {
        Some(failure) => Err(failure),
        None => Ok(pid),
    }
}

/// What the child says of its exec, blocking: a failure, or nothing at success.
pub fn read_report(status: &Fd) -> Option<(Failure, Errno)> {
    let mut report = [0; 5];
    loop {
        match sys::read(status, &mut report) {
            Err(sys::EINTR) => {}
            Ok(5) => {
                let [kind, errno @ ..] = report;
                let failure = match kind {
                    0 => Failure::NotFound,
                    1 => Failure::NotExecutable,
                    2 => Failure::Directory,
                    3 => Failure::User,
                    _ => Failure::Resources,
                };
                return Some((failure, Errno(u32::from_le_bytes(errno))));
            }
            _ => return None,
        }
    }
}

/// In the child: never returns.
fn become_command(plan: &Plan, exec: &Exec, files: [&Fd; 3], terminal: bool, report: &Fd) -> ! {
    let (failure, errno) = try_to_become(plan, exec, files, terminal);
    let kind = match failure {
        Failure::NotFound => 0,
        Failure::NotExecutable => 1,
        Failure::Directory => 2,
        Failure::User => 3,
        Failure::Resources => 4,
    };
    let [a, b, c, d] = errno.0.to_le_bytes();
    let _ = sys::write(report, &[kind, a, b, c, d]);
    sys::exit(i32::from(failure.exit_code()))
}

fn try_to_become(plan: &Plan, exec: &Exec, files: [&Fd; 3], terminal: bool) -> (Failure, Errno) {
    let prepared = (|| {
        sys::setsid()?;
        for (file, number) in files.into_iter().zip(0..) {
            sys::duplicate_to(file, number)?;
        }
        if terminal { sys::take_terminal(files[0]) } else { Ok(()) }
    })();
    if let Err(errno) = prepared {
        return (Failure::Resources, errno);
    }
    sys::drop_priority();
    let account = &plan.account;
    // An agent that is not root (in tests) can run commands only as itself.
    if (sys::is_root() || !exec.user.is_empty())
        && let Err(errno) = sys::set_identity(account.user, account.group, &account.groups)
    {
        return (Failure::User, errno);
    }
    if let Err(errno) = sys::chdir(&plan.directory) {
        // A home directory that is not there (yet) is no reason to refuse; one that was asked for is.
        if !exec.directory.is_empty() || sys::chdir(c"/").is_err() {
            return (Failure::Directory, errno);
        }
    }
    sys::reset_signals();
    let mut result = (Failure::NotFound, ENOENT);
    for candidate in &plan.candidates {
        match sys::execve(candidate, &plan.argv, &plan.env) {
            ENOENT | ENOTDIR => {}
            // As execvp(3): a later directory may have one that can be executed.
            EACCES => result = (Failure::NotExecutable, EACCES),
            errno => return (Failure::NotExecutable, errno),
        }
    }
    result
}
