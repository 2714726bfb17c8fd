//! System calls that rustix has not: socket options of Linux that it does not name, UDP segments in control messages, and signals to
//! threads. Unsafe code is here because the C library's calls take pointers.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd};

fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// How often this thread has gone to sleep of its own accord: not because it was kept from its CPU.
pub fn times_slept() -> i64 {
    // SAFETY: all zeroes are valid for this plain C structure.
    let mut usage: libc::rusage = unsafe { zeroed() };
    // SAFETY: the kernel writes one such structure to the address of one, which lives over the call.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nvcsw
}

/// Sets an option whose value is an `int`.
pub fn set_option(socket: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes at the address of `value`, which lives over the call.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), len) };
    check(result as libc::ssize_t).map(|_| ())
}

/// Where the next [`libc::MSG_PEEK`] of a socket looks, in bytes from the first that nobody has taken.
pub fn set_peek_offset(socket: impl AsFd, offset: i32) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
}

/// Lets several datagrams of one size arrive as one (Linux 5.0).
pub fn set_udp_gro(socket: impl AsFd) -> io::Result<()> {
    set_option(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Room for one control message with a 32-bit value, aligned as the kernel wants it.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    value: [u8; 8],
}

/// Sends `bytes` on a connected UDP socket as datagrams of `size` bytes (the last may be shorter).
pub fn send_segments(socket: impl AsFd, bytes: &[u8], size: u16) -> io::Result<usize> {
    // SAFETY: all zeroes are valid for these plain C structures.
    let (mut message, mut control): (libc::msghdr, Control) = unsafe { (zeroed(), zeroed()) };
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    control.header.cmsg_level = libc::SOL_UDP;
    control.header.cmsg_type = libc::UDP_SEGMENT;
    control.header.cmsg_len = size_of::<libc::cmsghdr>().saturating_add(size_of::<u16>());
    control.value.iter_mut().zip(size.to_ne_bytes()).for_each(|(to, from)| *to = from);
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points to `part`, which points to `bytes`, and to `control`; all live over the call, and the
    // kernel only reads them. The control message's data follows its header directly, as CMSG_DATA says for 64-bit
    // hosts, where the header's size is a multiple of its alignment.
    check(unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) })
}

/// Receives from a UDP socket with [`set_udp_gro`]: how many bytes, and the size of each datagram in them.
pub fn receive_segments(socket: impl AsFd, into: &mut [u8]) -> io::Result<(usize, usize)> {
    // SAFETY: all zeroes are valid for these plain C structures.
    let (mut message, mut control): (libc::msghdr, Control) = unsafe { (zeroed(), zeroed()) };
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: `message` points to `part`, which points to `into` with its length, and to `control` with its size; all
    // live over the call and are the kernel's alone to write.
    let len = check(unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) })?;
    let told = message.msg_controllen >= size_of::<libc::cmsghdr>().saturating_add(size_of::<i32>())
        && control.header.cmsg_level == libc::SOL_UDP
        && control.header.cmsg_type == libc::UDP_GRO;
    let [a, b, c, d, ..] = control.value;
    let size = if told { usize::try_from(i32::from_ne_bytes([a, b, c, d])).unwrap_or(len) } else { len };
    Ok((len, size.clamp(1, len.max(1))))
}

/// From linux/if_tun.h: frames without more in front than an offload header, on one of several queues.
const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Connects an open /dev/net/tun to the tap `name` (at most 15 bytes), which is made if it is not there.
pub fn attach_tap(file: impl AsFd, name: &str, several_queues: bool) -> io::Result<()> {
    // SAFETY: all zeroes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { zeroed() };
    let room = request.ifr_name.len().saturating_sub(1);
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = if several_queues { TAP_FLAGS | libc::IFF_MULTI_QUEUE } else { TAP_FLAGS };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives over the call.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    check(result as libc::ssize_t).map(|_| ())
}

/// Says which unfinished frames are taken from a tap (TUN_F_...).
pub fn set_tap_offloads(file: impl AsFd, offloads: u32) -> io::Result<()> {
    let value = libc::c_ulong::from(offloads);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, value) };
    check(result as libc::ssize_t).map(|_| ())
}

/// The signal that interrupts a thread's system call. Nobody else uses it here: it is for data that TCP calls urgent.
const INTERRUPTION: i32 = libc::SIGURG;

extern "C" fn on_interruption(_signal: i32) {}

/// From now on [`Thread::interrupt`] ends system calls, which fail with `EINTR`.
pub fn let_calls_be_interrupted() -> io::Result<()> {
    // SAFETY: all zeroes are a valid `sigaction`, without SA_RESTART; the handler has the right signature and does nothing.
    let result = unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = on_interruption as *const () as usize;
        libc::sigaction(INTERRUPTION, &raw const action, std::ptr::null_mut())
    };
    check(result as libc::ssize_t).map(|_| ())
}

/// A thread that can be interrupted while it lives.
#[derive(Debug, Clone, Copy)]
pub struct Thread(libc::pid_t);

impl Thread {
    /// The one that asks.
    pub fn current() -> Self {
        // SAFETY: takes nothing and changes nothing.
        Self(unsafe { libc::gettid() })
    }

    /// Ends the system call that it waits in, if it does. One that has ended is not found.
    pub fn interrupt(self) {
        // SAFETY: numbers by value; at worst there is no such thread in this process.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, INTERRUPTION) };
    }
}

/// Raises the limit on open files as far as it goes; answers how many there may be.
pub fn raise_files_max() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let current = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    current.unwrap_or(u64::MAX)
}
