//! System calls of Linux on x86-64, each as a safe function. The only place of the agent with unsafe code: there is no libc
//! under it (it must run in any guest and build without a static one), so the kernel is called directly.
//!
//! Numbers and structures: the kernel's `arch/x86/entry/syscalls/syscall_64.tbl` and its user-space headers.

use alloc::ffi::CString;
use alloc::vec::Vec;
use core::arch::asm;
use core::ffi::CStr;
use core::ptr::null;

mod heap;
mod start;

/// An error number of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

pub const ENOENT: Errno = Errno(2);
pub const EINTR: Errno = Errno(4);
pub const ENXIO: Errno = Errno(6);
pub const EAGAIN: Errno = Errno(11);
pub const EACCES: Errno = Errno(13);
pub const EEXIST: Errno = Errno(17);
pub const ENOTDIR: Errno = Errno(20);
pub const EINVAL: Errno = Errno(22);

pub const SIGHUP: u8 = 1;
pub const SIGKILL: u8 = 9;
pub const SIGPIPE: u8 = 13;
pub const SIGCHLD: u8 = 17;
pub const SIGCONT: u8 = 18;

pub const O_RDONLY: usize = 0;
pub const O_WRONLY: usize = 1;
pub const O_RDWR: usize = 2;
pub const O_NOCTTY: usize = 0o400;
pub const O_NONBLOCK: usize = 0o4000;
pub const O_DIRECTORY: usize = 0o200_000;
const O_CLOEXEC: usize = 0o2_000_000;

const AT_FDCWD: usize = -100isize as usize;

/// Makes a system call.
///
/// # Safety
/// As the call: pointers among the arguments must be good for what the kernel does with them.
unsafe fn call(number: usize, arguments: [usize; 5]) -> Result<usize, Errno> {
    let [a, b, c, d, e] = arguments;
    let result: isize;
    // SAFETY: the caller vouches for the arguments; the kernel clobbers only rcx, r11 and the result.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, in("r9") 0, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match result {
        -4095..=-1 => Err(Errno(result.unsigned_abs() as u32)),
        _ => Ok(result as usize),
    }
}

/// An open file descriptor, closed when dropped.
#[derive(Debug)]
pub struct Fd(i32);

impl Fd {
    /// Takes over a descriptor that the agent was started with.
    pub fn inherited(number: i32) -> Self {
        Self(number)
    }

    pub fn number(&self) -> i32 {
        self.0
    }

    fn raw(&self) -> usize {
        self.0 as usize
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: no pointers; this value owns the descriptor.
        let _ = unsafe { call(3, [self.raw(), 0, 0, 0, 0]) };
    }
}

pub fn exit(code: i32) -> ! {
    loop {
        // SAFETY: no pointers; exit_group does not return.
        let _ = unsafe { call(231, [code as usize, 0, 0, 0, 0]) };
    }
}

fn map_anonymous(size: usize) -> *mut u8 {
    const READ_WRITE: usize = 3;
    const PRIVATE_ANONYMOUS: usize = 0x22;
    // The sixth argument, the offset, is 0 as `call` passes it.
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let result = unsafe { call(9, [0, size, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX]) };
    result.unwrap_or(0) as *mut u8
}

fn unmap(block: *mut u8, size: usize) {
    // SAFETY: only the heap calls this, with a mapping of its own that nobody uses any more.
    let _ = unsafe { call(11, [block as usize, size, 0, 0, 0]) };
}

pub fn open(path: &CStr, flags: usize) -> Result<Fd, Errno> {
    // SAFETY: `path` is a C string.
    let number = unsafe { call(257, [AT_FDCWD, path.as_ptr() as usize, flags | O_CLOEXEC, 0, 0]) }?;
    Ok(Fd(number as i32))
}

/// Makes a file that is not there yet, to be written.
pub fn create_file(path: &CStr, mode: usize) -> Result<Fd, Errno> {
    const O_CREAT_EXCL: usize = 0o300;
    let flags = O_WRONLY | O_CREAT_EXCL | O_CLOEXEC;
    // SAFETY: `path` is a C string.
    let number = unsafe { call(257, [AT_FDCWD, path.as_ptr() as usize, flags, mode, 0]) }?;
    Ok(Fd(number as i32))
}

pub fn read(fd: &Fd, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
    unsafe { call(0, [fd.raw(), buffer.as_mut_ptr() as usize, buffer.len(), 0, 0]) }
}

pub fn write(fd: &Fd, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel reads `bytes.len()` bytes of `bytes`.
    unsafe { call(1, [fd.raw(), bytes.as_ptr() as usize, bytes.len(), 0, 0]) }
}

/// The whole of a small file, cut after `limit` bytes.
pub fn read_file(path: &CStr, limit: usize) -> Result<Vec<u8>, Errno> {
    let file = open(path, O_RDONLY)?;
    let mut content = Vec::new();
    let mut buffer = [0; 1024];
    while content.len() < limit {
        let count = read(&file, &mut buffer)?;
        if count == 0 {
            break;
        }
        content.extend_from_slice(&buffer[..count]);
    }
    content.truncate(limit);
    Ok(content)
}

/// A pipe: its reading and its writing end.
pub fn pipe() -> Result<(Fd, Fd), Errno> {
    let mut ends = [0i32; 2];
    // SAFETY: the kernel writes two ints.
    unsafe { call(293, [ends.as_mut_ptr() as usize, O_CLOEXEC, 0, 0, 0]) }?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

pub fn set_nonblocking(fd: &Fd) -> Result<(), Errno> {
    const F_GETFL: usize = 3;
    const F_SETFL: usize = 4;
    // SAFETY: no pointers.
    let flags = unsafe { call(72, [fd.raw(), F_GETFL, 0, 0, 0]) }?;
    // SAFETY: no pointers.
    unsafe { call(72, [fd.raw(), F_SETFL, flags | O_NONBLOCK, 0, 0]) }.map(drop)
}

pub fn set_close_on_exec(fd: &Fd) -> Result<(), Errno> {
    // F_SETFD, FD_CLOEXEC.
    // SAFETY: no pointers.
    unsafe { call(72, [fd.raw(), 2, 1, 0, 0]) }.map(drop)
}

/// Lets no descriptor from 3 on, of whoever started the agent, reach commands. (Linux before 5.11 cannot; then they may.)
pub fn close_others_on_exec() {
    const CLOSE_RANGE_CLOEXEC: usize = 4;
    // SAFETY: no pointers.
    let _ = unsafe { call(436, [3, u32::MAX as usize, CLOSE_RANGE_CLOEXEC, 0, 0]) };
}

pub fn duplicate(fd: &Fd) -> Result<Fd, Errno> {
    const F_DUPFD_CLOEXEC: usize = 1030;
    // SAFETY: no pointers.
    let number = unsafe { call(72, [fd.raw(), F_DUPFD_CLOEXEC, 0, 0, 0]) }?;
    Ok(Fd(number as i32))
}

/// Makes `fd` also known as `number` (another than its own), open across exec.
pub fn duplicate_to(fd: &Fd, number: i32) -> Result<(), Errno> {
    // SAFETY: no pointers. What was open as `number` is closed; only children before exec do this, to 0, 1 and 2.
    unsafe { call(292, [fd.raw(), number as usize, 0, 0, 0]) }.map(drop)
}

/// Makes sure that descriptors 0 to 2 are open, so that no other file gets these numbers.
pub fn open_standard_files(path: &CStr) {
    while let Ok(fd) = open(path, O_RDWR) {
        if fd.number() > 2 {
            return;
        }
        let number = fd.number();
        core::mem::forget(fd);
        // Clear close-on-exec: these three are inherited.
        // SAFETY: no pointers.
        let _ = unsafe { call(72, [number as usize, 2, 0, 0, 0]) };
    }
}

pub const POLLIN: i16 = 1;
pub const POLLOUT: i16 = 4;
pub const POLLERR: i16 = 8;
pub const POLLHUP: i16 = 16;

/// `struct pollfd`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PollFd {
    fd: i32,
    events: i16,
    pub revents: i16,
}

impl PollFd {
    pub fn new(fd: &Fd, events: i16) -> Self {
        Self { fd: fd.0, events, revents: 0 }
    }
}

/// Waits; a negative time is without end.
pub fn poll(files: &mut [PollFd], milliseconds: i64) -> Result<(), Errno> {
    // SAFETY: the kernel reads and writes `files.len()` structures of this layout.
    unsafe { call(7, [files.as_mut_ptr() as usize, files.len(), milliseconds as usize, 0, 0]) }.map(drop)
}

pub fn sleep(milliseconds: i64) {
    let _ = poll(&mut [], milliseconds);
}

/// Milliseconds of the monotonic clock.
pub fn monotonic_ms() -> i64 {
    let mut time = [0i64; 2];
    // SAFETY: the kernel writes one timespec.
    let _ = unsafe { call(228, [1, time.as_mut_ptr() as usize, 0, 0, 0]) };
    time[0] * 1000 + time[1] / 1_000_000
}

pub fn set_real_time(nanoseconds: u64) -> Result<(), Errno> {
    let time = [(nanoseconds / 1_000_000_000) as i64, (nanoseconds % 1_000_000_000) as i64];
    // SAFETY: the kernel reads one timespec.
    unsafe { call(227, [0, time.as_ptr() as usize, 0, 0, 0]) }.map(drop)
}

fn set_signal_mask(mask: u64) {
    const SIG_SETMASK: usize = 2;
    // SAFETY: the kernel reads eight bytes of mask.
    let _ = unsafe { call(14, [SIG_SETMASK, &raw const mask as usize, 0, 8, 0]) };
}

/// Blocks SIGCHLD and SIGPIPE and gives a file that is readable when a child has ended.
pub fn child_signals() -> Result<Fd, Errno> {
    let child = 1u64 << (SIGCHLD - 1);
    set_signal_mask(child | 1 << (SIGPIPE - 1));
    // SAFETY: the kernel reads eight bytes of mask.
    let number = unsafe { call(289, [usize::MAX, &raw const child as usize, 8, O_NONBLOCK | O_CLOEXEC, 0]) }?;
    Ok(Fd(number as i32))
}

/// Gives a new process the signal handling that programs expect: nothing blocked, nothing ignored.
pub fn reset_signals() {
    // struct sigaction of the kernel: handler, flags, restorer, mask; all zero is SIG_DFL.
    let default = [0u64; 4];
    for number in 1..=64usize {
        // SAFETY: the kernel reads one structure. It refuses SIGKILL and SIGSTOP, which are as they should be.
        let _ = unsafe { call(13, [number, default.as_ptr() as usize, 0, 8, 0]) };
    }
    set_signal_mask(0);
}

/// Sends a signal to a process, or to the group `-pid`.
pub fn kill(pid: i32, signal: u8) -> Result<(), Errno> {
    // SAFETY: no pointers.
    unsafe { call(62, [pid as usize, usize::from(signal), 0, 0, 0]) }.map(drop)
}

pub fn getpid() -> u32 {
    // SAFETY: no pointers.
    unsafe { call(39, [0; 5]) }.unwrap_or(0) as u32
}

/// Takes the status of a child that has ended: its number and wait status.
pub fn reap() -> Option<(u32, u32)> {
    const WNOHANG: usize = 1;
    let mut status = 0u32;
    // SAFETY: the kernel writes one int.
    let pid = unsafe { call(61, [usize::MAX, &raw mut status as usize, WNOHANG, 0, 0]) }.ok()?;
    (pid > 0).then_some((pid as u32, status))
}

/// Makes a child process. `None` in the child.
pub fn fork() -> Result<Option<u32>, Errno> {
    // SAFETY: the agent has one thread, so the copy's memory is whole.
    let pid = unsafe { call(57, [0; 5]) }?;
    Ok((pid > 0).then_some(pid as u32))
}

/// Becomes another program; returns only on failure.
pub fn execve(path: &CStr, argv: &[CString], env: &[CString]) -> Errno {
    let pointers = |strings: &[CString]| -> Vec<_> {
        strings.iter().map(|string| string.as_ptr()).chain([null()]).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: C strings and null-terminated arrays of them, alive until the call is over.
    let result =
        unsafe { call(59, [path.as_ptr() as usize, argv.as_ptr() as usize, env.as_ptr() as usize, 0, 0]) };
    result.err().unwrap_or(EINVAL)
}

pub fn setsid() -> Result<(), Errno> {
    // SAFETY: no pointers.
    unsafe { call(112, [0; 5]) }.map(drop)
}

pub fn chdir(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { call(80, [path.as_ptr() as usize, 0, 0, 0, 0]) }.map(drop)
}

/// Takes on another identity for good: supplementary groups, group, user.
pub fn set_identity(user: u32, group: u32, groups: &[u32]) -> Result<(), Errno> {
    let (user, group) = (user as usize, group as usize);
    // SAFETY: the kernel reads `groups.len()` ints.
    unsafe { call(116, [groups.len(), groups.as_ptr() as usize, 0, 0, 0]) }?;
    // SAFETY: no pointers.
    unsafe { call(119, [group, group, group, 0, 0]) }?;
    // SAFETY: no pointers.
    unsafe { call(117, [user, user, user, 0, 0]) }.map(drop)
}

/// Gives back a priority above the usual one (as the agent's own unit sets), so that commands do not inherit it.
pub fn drop_priority() {
    // getpriority(PRIO_PROCESS, 0) answers 20 - nice.
    // SAFETY: no pointers.
    let rank = unsafe { call(140, [0; 5]) };
    if rank.is_ok_and(|rank| rank > 20) {
        // SAFETY: no pointers.
        let _ = unsafe { call(141, [0; 5]) };
    }
}

pub fn is_root() -> bool {
    // SAFETY: no pointers.
    let user = unsafe { call(107, [0; 5]) };
    user == Ok(0)
}

pub fn mkdir(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { call(258, [AT_FDCWD, path.as_ptr() as usize, 0o755, 0, 0]) }.map(drop)
}

pub fn exists(path: &CStr) -> bool {
    // SAFETY: a C string.
    unsafe { call(269, [AT_FDCWD, path.as_ptr() as usize, 0, 0, 0]) }.is_ok()
}

/// Mounts a file system without a device.
pub fn mount(kind: &CStr, target: &CStr, options: &CStr) -> Result<(), Errno> {
    let (kind, target, options) =
        (kind.as_ptr() as usize, target.as_ptr() as usize, options.as_ptr() as usize);
    // SAFETY: C strings.
    unsafe { call(165, [kind, target, kind, 0, options]) }.map(drop)
}

/// Mounts a disk.
pub fn mount_disk(device: &CStr, target: &CStr, kind: &CStr, read_only: bool) -> Result<(), Errno> {
    const MS_RDONLY: usize = 1;
    let (device, target, kind) = (device.as_ptr() as usize, target.as_ptr() as usize, kind.as_ptr() as usize);
    // SAFETY: C strings; no options.
    unsafe { call(165, [device, target, kind, usize::from(read_only) * MS_RDONLY, 0]) }.map(drop)
}

/// Moves what is mounted at one place to another.
pub fn move_mount(from: &CStr, to: &CStr) -> Result<(), Errno> {
    const MS_MOVE: usize = 0x2000;
    let (from, to) = (from.as_ptr() as usize, to.as_ptr() as usize);
    // SAFETY: C strings; a move reads neither type nor options.
    unsafe { call(165, [from, to, 0, MS_MOVE, 0]) }.map(drop)
}

/// Makes a directory the root of this process and its children.
pub fn chroot(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { call(161, [path.as_ptr() as usize, 0, 0, 0, 0]) }.map(drop)
}

pub fn unlink(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { call(263, [AT_FDCWD, path.as_ptr() as usize, 0, 0, 0]) }.map(drop)
}

/// Loads a kernel module, unpacked by the kernel if its name says that it is compressed.
pub fn load_module(file: &Fd, compressed: bool) -> Result<(), Errno> {
    const MODULE_INIT_COMPRESSED_FILE: usize = 4;
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    // SAFETY: an empty C string for the parameters.
    unsafe { call(313, [file.raw(), c"".as_ptr() as usize, flags, 0, 0]) }.map(drop)
}

/// The names in a directory, in no order.
pub fn directory(path: &CStr) -> Result<Vec<Vec<u8>>, Errno> {
    let directory = open(path, O_RDONLY | O_DIRECTORY)?;
    let mut names = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        // SAFETY: the kernel writes at most `buffer.len()` bytes.
        let count =
            unsafe { call(217, [directory.raw(), buffer.as_mut_ptr() as usize, buffer.len(), 0, 0]) }?;
        let mut rest = &buffer[..count];
        if rest.is_empty() {
            return Ok(names);
        }
        // struct linux_dirent64: u64 ino, i64 off, u16 reclen, u8 type, name.
        while let Some(&[low, high]) = rest.get(16..18) {
            let length = usize::from(u16::from_le_bytes([low, high]));
            let Some(entry) = rest.get(..length).filter(|entry| entry.len() > 19) else { break };
            let name = entry[19..].split(|&byte| byte == 0).next().unwrap_or(&[]);
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
            rest = &rest[length..];
        }
    }
}

pub fn sync() {
    // SAFETY: no pointers.
    let _ = unsafe { call(162, [0; 5]) };
}

/// Switches the machine off or starts it again, at once.
pub fn reboot(again: bool) -> Result<(), Errno> {
    let what = if again { 0x0123_4567 } else { 0x4321_fedc };
    // SAFETY: no pointers.
    unsafe { call(169, [0xfee1_dead, 0x2812_1969, what, 0, 0]) }.map(drop)
}

/// Gives the network card `name` an IPv4 address, switches it on, and routes everything else through `gateway` (netdevice(7)).
pub fn configure_ipv4(name: &[u8], address: [u8; 4], prefix: u8, gateway: [u8; 4]) -> Result<(), Errno> {
    const SIOCADDRT: usize = 0x890b;
    const SIOCSIFFLAGS: usize = 0x8914;
    const SIOCSIFADDR: usize = 0x8916;
    const SIOCSIFNETMASK: usize = 0x891c;
    const IFF_UP: u8 = 1;
    const RTF_UP_GATEWAY: u8 = 3;
    const AF_INET: u8 = 2;
    /// `struct ifreq`: a name, then an address or flags.
    #[repr(C, align(8))]
    struct Request([u8; 40]);
    /// `struct rtentry`: destination, gateway and mask from byte 8 on, flags at 56.
    #[repr(C, align(8))]
    struct Route([u8; 120]);
    const SOCK_DGRAM_CLOEXEC: usize = 2 | O_CLOEXEC;
    // SAFETY: no pointers.
    let socket = Fd(unsafe { call(41, [AF_INET.into(), SOCK_DGRAM_CLOEXEC, 0, 0, 0]) }? as i32);
    let request = |what: &[u8]| {
        let mut request = Request([0; 40]);
        request.0[..15].iter_mut().zip(name).for_each(|(to, from)| *to = *from);
        request.0[16..].iter_mut().zip(what).for_each(|(to, from)| *to = *from);
        request
    };
    let internet = |[a, b, c, d]: [u8; 4]| [AF_INET, 0, 0, 0, a, b, c, d];
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0).to_be_bytes();
    let steps = [
        (SIOCSIFADDR, request(&internet(address))),
        (SIOCSIFNETMASK, request(&internet(mask))),
        (SIOCSIFFLAGS, request(&[IFF_UP])),
    ];
    for (number, request) in &steps {
        // SAFETY: the kernel reads one structure of this size.
        unsafe { call(16, [socket.raw(), *number, request as *const Request as usize, 0, 0]) }?;
    }
    let mut route = Route([0; 120]);
    for (at, place) in [(8, [0; 4]), (24, gateway), (40, [0; 4])] {
        route.0[at..][..8].copy_from_slice(&internet(place));
    }
    route.0[56] = RTF_UP_GATEWAY;
    // SAFETY: as above; the pointer in it, the name of a device, is null.
    unsafe { call(16, [socket.raw(), SIOCADDRT, &raw const route as usize, 0, 0]) }.map(drop)
}

/// Makes a serial line or pseudo-terminal pass bytes as they are. An error if `fd` is no terminal.
pub fn make_raw(fd: &Fd) -> Result<(), Errno> {
    const TCGETS: usize = 0x5401;
    const TCSETS: usize = 0x5402;
    const B115200_CS8_CREAD_CLOCAL: u32 = 0o10002 | 0o60 | 0o200 | 0o4000;
    /// `struct termios` of the kernel.
    #[repr(C)]
    struct Termios {
        modes: [u32; 4],
        line: u8,
        characters: [u8; 19],
    }
    let mut termios = Termios { modes: [0; 4], line: 0, characters: [0; 19] };
    // SAFETY: the kernel writes one structure of this layout.
    unsafe { call(16, [fd.raw(), TCGETS, &raw mut termios as usize, 0, 0]) }?;
    termios.modes = [0, 0, B115200_CS8_CREAD_CLOCAL, 0];
    termios.characters = [0; 19];
    const VMIN: usize = 6;
    termios.characters[VMIN] = 1;
    // SAFETY: the kernel reads one structure of this layout.
    unsafe { call(16, [fd.raw(), TCSETS, &raw const termios as usize, 0, 0]) }.map(drop)
}

/// Whether a serial port has a chip behind it.
pub fn has_uart(fd: &Fd) -> bool {
    const TIOCGSERIAL: usize = 0x541e;
    // struct serial_struct begins with an int that is 0 (PORT_UNKNOWN) where no chip was found.
    let mut serial = [0i32; 32];
    // SAFETY: the structure has 72 bytes, fewer than given.
    unsafe { call(16, [fd.raw(), TIOCGSERIAL, serial.as_mut_ptr() as usize, 0, 0]) }.is_ok() && serial[0] != 0
}

/// A new pseudo-terminal: the agent's side and the command's.
pub fn open_terminal(rows: u16, columns: u16) -> Result<(Fd, Fd), Errno> {
    const TIOCSPTLCK: usize = 0x4004_5431;
    const TIOCGPTPEER: usize = 0x5441;
    let master = open(c"/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK)?;
    let unlocked = 0i32;
    // SAFETY: the kernel reads one int.
    unsafe { call(16, [master.raw(), TIOCSPTLCK, &raw const unlocked as usize, 0, 0]) }?;
    let flags = O_RDWR | O_NOCTTY | O_CLOEXEC;
    // SAFETY: no pointers.
    let slave = unsafe { call(16, [master.raw(), TIOCGPTPEER, flags, 0, 0]) }?;
    resize_terminal(&master, rows, columns)?;
    Ok((master, Fd(slave as i32)))
}

pub fn resize_terminal(fd: &Fd, rows: u16, columns: u16) -> Result<(), Errno> {
    const TIOCSWINSZ: usize = 0x5414;
    let size = [rows, columns, 0, 0];
    // SAFETY: the kernel reads one struct winsize, four shorts.
    unsafe { call(16, [fd.raw(), TIOCSWINSZ, size.as_ptr() as usize, 0, 0]) }.map(drop)
}

/// Makes `fd` the controlling terminal of the calling session leader.
pub fn take_terminal(fd: &Fd) -> Result<(), Errno> {
    const TIOCSCTTY: usize = 0x540e;
    // SAFETY: no pointers.
    unsafe { call(16, [fd.raw(), TIOCSCTTY, 0, 0, 0]) }.map(drop)
}
