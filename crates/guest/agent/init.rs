//! The agent as the guest's init (process 1 of a small initramfs), and switching the guest off.

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;

use crate::message::Exec;
use crate::root::Root;
use crate::sys::{self, O_RDWR, O_WRONLY};
use crate::{kernel_line, modules, report, spawn};

const REAL_TIME_SIGNAL_MIN: u8 = 34;

/// File systems of the kernel's own.
const KERNELS: [(&CStr, &CStr, &CStr); 3] =
    [(c"devtmpfs", c"/dev", c"mode=755"), (c"proc", c"/proc", c""), (c"sysfs", c"/sys", c"")];

/// Makes of an initramfs a place where programs can run, or goes on to the root that the kernel command line names, with
/// `arguments` for the init there. What is there already, or cannot be, is left.
pub fn prepare(arguments: &[&CStr]) {
    mount_all(&KERNELS);
    sys::open_standard_files(c"/dev/console");
    load_modules();
    if let Some(root) = Root::from_kernel_line() {
        root.enter(&KERNELS.map(|(_, place, _)| place), arguments);
    }
    mount_all(&[
        (c"devpts", c"/dev/pts", c"mode=620,ptmxmode=666"),
        (c"tmpfs", c"/dev/shm", c"mode=1777"),
        (c"tmpfs", c"/run", c"mode=755"),
        (c"tmpfs", c"/tmp", c"mode=1777"),
    ]);
}

fn mount_all(file_systems: &[(&CStr, &CStr, &CStr)]) {
    for (kind, target, options) in file_systems {
        let _ = sys::mkdir(target);
        let _ = sys::mount(kind, target, options);
    }
}

/// Loads the kernel modules in `/modules`; then their files are of no use and only take memory.
fn load_modules() {
    let names = sys::directory(c"/modules").unwrap_or_default();
    let files = names.iter().filter_map(|name| CString::new([b"/modules/", &name[..]].concat()).ok());
    let files: Vec<CString> = files.collect();
    for file in modules::load(files.clone()) {
        report(&[b"cannot load the kernel module ", file.to_bytes()]);
    }
    for file in files {
        let _ = sys::unlink(&file);
    }
}

/// Runs the command that the kernel's command line asks for on the console, then switches the machine off. Returns if it asks
/// for none.
pub fn run_kernel_line_command() {
    let line = sys::read_file(c"/proc/cmdline", 64 * 1024).unwrap_or_default();
    let Some(value) = kernel_line::value(&line, b"yado.exec") else { return };
    let argv = kernel_line::parse_exec(value);
    let exec = Exec { argv, ..Exec::default() };
    let started = sys::open(c"/dev/console", O_RDWR)
        .map_err(|errno| (crate::message::Failure::Resources, errno))
        .and_then(|console| spawn::start_on_console(&exec, &console));
    let code = match started {
        Ok(pid) => wait_for(pid),
        Err((failure, _)) => failure.exit_code(),
    };
    let digits = [b'0' + code / 100, b'0' + code / 10 % 10, b'0' + code % 10];
    let first = digits.iter().position(|&digit| digit != b'0').unwrap_or(2);
    report(&[b"the command has ended with exit code ", &digits[first..]]);
    power_off(false);
}

fn wait_for(wanted: u32) -> u8 {
    loop {
        match sys::reap() {
            Some((pid, status)) if pid == wanted => {
                let signal = (status & 0x7f) as u8;
                return if signal == 0 { (status >> 8) as u8 } else { 128 + signal };
            }
            Some(_) => {}
            None => sys::sleep(5),
        }
    }
}

/// Syncs and switches off at once. Root file systems that can be are left clean.
pub fn power_off(again: bool) {
    sys::sync();
    // Magic SysRq "u", an emergency read-only remount of all file systems: the next mount needs no journal replay.
    if let Ok(trigger) = sys::open(c"/proc/sysrq-trigger", O_WRONLY)
        && sys::write(&trigger, b"u").is_ok()
    {
        for _ in 0..50 {
            if root_is_read_only() {
                break;
            }
            sys::sleep(5);
        }
    }
    sys::sync();
    if sys::reboot(again).is_err() {
        report(&[b"cannot switch the machine off"]);
    }
}

fn root_is_read_only() -> bool {
    let mounts = sys::read_file(c"/proc/mounts", 256 * 1024).unwrap_or_default();
    let on_disk = mounts.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"/dev/"));
    // Fields of proc(5): device, mount point, type, options.
    let options = |line: &[u8]| line.split(|&byte| byte == b' ').nth(3).map(<[u8]>::to_vec);
    on_disk.filter_map(options).all(|options| options == b"ro" || options.starts_with(b"ro,"))
}

/// Asks the guest's init to switch off after stopping its services.
pub fn ask_for_power_off(again: bool) {
    if sys::exists(c"/run/systemd/system") {
        // systemd(1), "Signals": SIGRTMIN+4 starts poweroff.target, SIGRTMIN+5 reboot.target.
        let number = REAL_TIME_SIGNAL_MIN + if again { 5 } else { 4 };
        if sys::kill(1, number).is_ok() {
            return;
        }
    }
    let program = if again { b"reboot".to_vec() } else { b"poweroff".to_vec() };
    let argv: Vec<Vec<u8>> = [program].to_vec();
    if spawn::start(&Exec { argv, ..Exec::default() }).is_err() {
        report(&[b"cannot ask init to switch the machine off"]);
    }
}
