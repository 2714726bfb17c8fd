//! A process in which user code of the guest runs on the host's CPU, and the means to drive it.
//!
//! The process has nothing: its address space holds guest memory, one page of our code and one page of commands that
//! it cannot write; its only descriptors are the guest's RAM and those two pages. The vCPU's thread traces it. While
//! guest code runs, no system call is executed at all (`PTRACE_SYSEMU`): each stops the process. To change mappings the
//! tracer lets our code run instead, which makes the system calls of the command page, and a seccomp filter allows it
//! nothing but those that change mappings. The process ends with its tracer.
//!
//! `unsafe` because it is all foreign calls.
#![allow(unsafe_code)]

use crate::step::model::host_tsc;
use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{NonNull, null_mut};

/// Guest addresses below this cannot be mapped (the host's mmap_min_addr).
pub(super) const LOWEST: u64 = 0x1_0000;
/// End of the addresses a process can have.
pub(super) const TOP: u64 = 0x7fff_ffff_f000;
/// Our two pages are somewhere in between, where programs have nothing: heaps are below, stacks and libraries above.
const PLACES: (u64, u64) = (0x1000_0000_0000, 0x5000_0000_0000);
const PAGE: u64 = 4096;
/// Where the program is loaded before it moves to its place.
const LOAD: u64 = 0x40_0000;
/// Offsets in the program's page: code, and the commands that it starts with.
const CODE: usize = 0x100;
const FIRST: usize = 0x200;

/// Selectors of Linux' flat 64-bit user segments, the host's and a Linux guest's.
pub(super) const USER_CS: u64 = 0x33;
pub(super) const USER_SS: u64 = 0x2b;

/// The program's descriptors.
const PROGRAM: u64 = 0;
const COMMANDS: u64 = 1;
pub(super) const RAM: u64 = 2;

/// `si_code` of SIGSEGV for an access that PKRU forbids.
const SEGV_PKUERR: i32 = 4;
/// The byte of an XSAVE image, and its bit, that says that PKRU is there (XSTATE_BV, bit 9).
const PKRU_PRESENT: (usize, u8) = (513, 1 << 1);

/// A system call: its number and six arguments, and nothing.
pub(super) type Command = [u64; 8];
/// Most commands at a time.
pub(super) const COMMANDS_MAX: usize = PAGE as usize / size_of::<Command>();

/// Runs R13 commands from R12 on, until one fails, and stops.
///
/// ```text
/// next:  test r13, r13;  jz done
///        mov rax, [r12];  mov rdi, [r12+8];  mov rsi, [r12+16];  mov rdx, [r12+24]
///        mov r10, [r12+32];  mov r8, [r12+40];  mov r9, [r12+48];  syscall
///        cmp rax, -4095;  jae done;  add r12, 64;  dec r13;  jmp next
/// done:  int3
/// ```
const RUN_COMMANDS: [u8; 67] = [
    0x4d, 0x85, 0xed, 0x74, 0x3b, 0x49, 0x8b, 0x04, 0x24, 0x49, 0x8b, 0x7c, 0x24, 0x08, 0x49, 0x8b, 0x74,
    0x24, 0x10, 0x49, 0x8b, 0x54, 0x24, 0x18, 0x4d, 0x8b, 0x54, 0x24, 0x20, 0x4d, 0x8b, 0x44, 0x24, 0x28,
    0x4d, 0x8b, 0x4c, 0x24, 0x30, 0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, 0x73, 0x0f, 0x49, 0x83,
    0xc4, 0x40, 0x49, 0xff, 0xcd, 0xeb, 0xc6, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xcc, 0xcc, 0xcc,
];

const SYSEMU: libc::c_uint = 31;
const SETSIGMASK: libc::c_uint = 0x420b;
/// Whether CPUID may be executed, a function of arch_prctl(2).
const ARCH_CPUID: u64 = 0x1012;
const NT_X86_XSTATE: usize = 0x202;
const EXEC: libc::c_uint = 0x10;

/// Maps `len` bytes of the guest's RAM from `offset` on at `address`, and gets the host's page tables ready.
pub(super) fn map(address: u64, len: u64, rights: libc::c_int, offset: u64) -> Command {
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64;
    [libc::SYS_mmap as u64, address, len, rights as u64, flags, RAM, offset, 0]
}

/// Unmaps `len` bytes at `address`.
pub(super) fn unmap(address: u64, len: u64) -> Command {
    [libc::SYS_munmap as u64, address, len, 0, 0, 0, 0, 0]
}

/// Has RDTSC and RDTSCP, and CPUID where the host's CPU can, raise SIGSEGV.
fn refuse_clock_and_cpuid() -> [Command; 2] {
    [
        [libc::SYS_prctl as u64, libc::PR_SET_TSC as u64, libc::PR_TSC_SIGSEGV as u64, 0, 0, 0, 0, 0],
        [libc::SYS_arch_prctl as u64, ARCH_CPUID, 0, 0, 0, 0, 0, 0],
    ]
}

/// Why the process stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// At a system call, not executed: RIP is behind it.
    Call,
    /// An instruction raised this signal, with `si_code` and `si_addr`.
    Raised { signal: i32, code: i32, address: u64 },
    /// Somebody sent a signal.
    Sent,
}

/// The process. Only the thread that made it may use it.
pub(super) struct Process {
    pid: libc::pid_t,
    /// Linear address of our two pages.
    place: u64,
    /// It has been reaped: its number may be another's by now.
    ended: Cell<bool>,
    /// Our view of the command page.
    commands: NonNull<Command>,
    /// Bytes of the XSAVE image that the kernel wants.
    xsave_len: usize,
    /// The host's CPU that it must start on; -1 is any of the tracer's.
    cpu: libc::c_int,
    cpus: libc::cpu_set_t,
    /// It has been asked to stop at instructions that nobody looked for.
    stops_at_more: bool,
    _ram: OwnedFd,
}

// SAFETY: the pointer is to a mapping that this value owns. (Calls from a thread that is not the tracer fail.)
unsafe impl Send for Process {}

/// Turns the -1 of a failed call into an error.
fn checked(result: libc::c_long, what: &str) -> io::Result<libc::c_long> {
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("{what}: {error}")));
    }
    Ok(result)
}

/// A copy of a descriptor above those that the program gets.
fn copied(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: makes a descriptor of our own.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 16) };
    checked(copy.into(), "copying a descriptor")?;
    // SAFETY: fresh and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A memory file of one page with `bytes`.
fn page_file(name: &std::ffi::CStr, executable: bool, bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC;
    // SAFETY: the name is NUL-terminated.
    let mut fd = unsafe { libc::memfd_create(name.as_ptr(), flags | if executable { EXEC } else { 0 }) };
    if fd < 0 && executable {
        // Linux before 6.3 does not know the flag, and lets all be executed.
        // SAFETY: as above.
        fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    }
    checked(fd.into(), "making a memory file")?;
    // SAFETY: fresh and nobody else's.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: our own file and buffer.
    unsafe {
        checked(libc::ftruncate(fd, PAGE as libc::off_t).into(), "sizing a memory file")?;
        checked(
            libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), 0) as libc::c_long,
            "writing a memory file",
        )?;
    }
    copied(file.as_raw_fd())
}

/// The program, which moves to `place`: an ELF file of one page.
fn program(place: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    // ELF64 header: little-endian, an executable for x86-64 with one program header (System V ABI, chapter 4).
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &(LOAD + CODE as u64).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    // PT_LOAD, readable and executable: the whole page.
    put(64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    for (at, value) in [(80, LOAD), (88, LOAD), (96, PAGE), (104, PAGE), (112, PAGE)] {
        put(at, &value.to_le_bytes());
    }
    put(CODE, &RUN_COMMANDS);
    let (read, execute) = (libc::PROT_READ as u64, libc::PROT_EXEC as u64);
    let fixed = libc::MAP_FIXED as u64;
    let mmap = libc::SYS_mmap as u64;
    let first: [Command; 2] = [
        [mmap, place, PAGE, read | execute, libc::MAP_PRIVATE as u64 | fixed, PROGRAM, 0, 0],
        [mmap, place + PAGE, PAGE, read, libc::MAP_SHARED as u64 | fixed, COMMANDS, 0, 0],
    ];
    for (i, value) in first.iter().flatten().enumerate() {
        put(FIRST + i * 8, &value.to_le_bytes());
    }
    page
}

/// What the new process does before the program, in our memory, while our thread waits: nothing but system calls.
struct Birth {
    descriptors: [RawFd; 3],
    filter: [libc::sock_filter; 16],
}

impl Birth {
    fn new(descriptors: [RawFd; 3]) -> Self {
        // Fields of struct seccomp_data: nr at 0, arch at 4, the first argument.
        const ARGUMENT: u32 = 16;
        let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
        let equal = |k: u32, jt: u8, jf: u8| libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt,
            jf,
            k,
        };
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let give = libc::BPF_RET | libc::BPF_K;
        // AUDIT_ARCH_X86_64. The kernel's tracing hook comes first, so that this meets our own calls only, and the
        // vsyscall page, which tracing does not see.
        Self {
            descriptors,
            filter: [
                statement(load, 4),
                equal(0xc000_003e, 0, 12),
                statement(load, 0),
                equal(libc::SYS_mmap as u32, 11, 0),
                equal(libc::SYS_munmap as u32, 10, 0),
                equal(libc::SYS_mprotect as u32, 9, 0),
                equal(libc::SYS_execveat as u32, 8, 0),
                equal(libc::SYS_exit_group as u32, 7, 0),
                equal(libc::SYS_prctl as u32, 1, 0),
                equal(libc::SYS_arch_prctl as u32, 2, 4),
                statement(load, ARGUMENT),
                equal(libc::PR_SET_TSC as u32, 3, 2),
                statement(load, ARGUMENT),
                equal(ARCH_CPUID as u32, 1, 0),
                statement(give, libc::SECCOMP_RET_TRAP),
                statement(give, libc::SECCOMP_RET_ALLOW),
            ],
        }
    }
}

extern "C" fn be_born(birth: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the parent waits and keeps the struct alive; all that follows are system calls on it.
    unsafe {
        let birth = &*birth.cast::<Birth>();
        for (to, &from) in birth.descriptors.iter().enumerate() {
            if libc::dup2(from, to as RawFd) < 0 {
                return 1;
            }
        }
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) != 0 {
            return 2;
        }
        // Not of our terminal's group: its signals are for us.
        libc::setsid();
        if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 {
            return 3;
        }
        let filter =
            libc::sock_fprog { len: birth.filter.len() as u16, filter: birth.filter.as_ptr().cast_mut() };
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) != 0
        {
            return 4;
        }
        let arguments = [c"yado: guest code".as_ptr(), std::ptr::null()];
        let environment = [std::ptr::null::<libc::c_char>()];
        libc::syscall(
            libc::SYS_execveat,
            PROGRAM as RawFd,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        5
    }
}

impl Process {
    /// Makes a process that can map the RAM of that file.
    pub(super) fn new(ram: BorrowedFd<'_>) -> io::Result<Self> {
        let ram = copied(ram.as_raw_fd())?;
        // Unlike that of the next process, and of the next run.
        let place = PLACES.0 + RandomState::new().hash_one(0) % (PLACES.1 - PLACES.0) / PAGE * PAGE;
        let program = page_file(c"yado-direct", true, &program(place))?;
        let page = page_file(c"yado-commands", false, &[])?;
        let birth = Birth::new([program.as_raw_fd(), page.as_raw_fd(), ram.as_raw_fd()]);
        let mut stack = vec![0u128; 4096];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK;
        // SAFETY: the function only makes system calls; with CLONE_VFORK this thread waits until it has left our
        // memory, so that stack and argument live long enough.
        let pid = unsafe {
            let top = stack.as_mut_ptr_range().end;
            libc::clone(be_born, top.cast(), flags, (&raw const birth).cast_mut().cast())
        };
        checked(pid.into(), "making a process")?;
        // SAFETY: a shared mapping of our own file.
        let commands = unsafe {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(null_mut(), PAGE as usize, rights, libc::MAP_SHARED, page.as_raw_fd(), 0)
        };
        let commands = if commands == libc::MAP_FAILED { None } else { NonNull::new(commands.cast()) };
        let Some(commands) = commands else {
            let error = io::Error::last_os_error();
            end(pid);
            return Err(error);
        };
        // SAFETY: the kernel fills a set of ours.
        let cpus = unsafe {
            let mut cpus: libc::cpu_set_t = zeroed();
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut cpus);
            cpus
        };
        let mut process = Self {
            pid,
            place,
            ended: Cell::new(false),
            commands,
            xsave_len: 0,
            cpu: -1,
            cpus,
            stops_at_more: false,
            _ram: ram,
        };
        process.start()?;
        Ok(process)
    }

    pub(super) fn pid(&self) -> libc::pid_t {
        self.pid
    }

    fn start(&mut self) -> io::Result<()> {
        match self.wait()? {
            Stop::Sent | Stop::Raised { signal: libc::SIGTRAP, .. } => {}
            stop => return Err(io::Error::other(format!("the process began with {stop:?}"))),
        }
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        self.trace(libc::PTRACE_SETOPTIONS, 0, options as usize, "tracing")?;
        let none = 0u64;
        self.trace(SETSIGMASK, 8, (&raw const none) as usize, "unblocking signals")?;
        let mut image = vec![0; 64 << 10];
        self.xsave_len = self.transfer(libc::PTRACE_GETREGSET, &mut image)?;
        self.call(LOAD, LOAD + FIRST as u64, 2)?;
        self.run_commands(&self.unmap_all())
    }

    /// Unmaps all of the guest's.
    pub(super) fn unmap_all(&self) -> [Command; 2] {
        let rest = self.place + 2 * PAGE;
        [unmap(0, self.place), unmap(rest, TOP - rest)]
    }

    /// Our pages: the guest cannot have its own there.
    pub(super) fn ours(&self) -> [u64; 2] {
        [self.place, self.place + PAGE]
    }

    fn trace(&self, request: libc::c_uint, address: usize, data: usize, what: &str) -> io::Result<()> {
        // SAFETY: requests of this module read or write nothing of ours but what `data` points to.
        checked(unsafe { libc::ptrace(request, self.pid, address, data) }, what).map(drop)
    }

    /// Waits for a stop.
    fn wait(&self) -> io::Result<Stop> {
        let mut status = 0;
        loop {
            // SAFETY: the kernel fills a number of ours.
            let pid = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) };
            if pid == self.pid {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if !libc::WIFSTOPPED(status) {
            self.ended.set(true);
            let code =
                if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) };
            return Err(io::Error::other(format!("the process that runs guest code has ended ({code})")));
        }
        let signal = libc::WSTOPSIG(status);
        if signal == libc::SIGTRAP | 0x80 {
            return Ok(Stop::Call);
        }
        // SAFETY: the kernel fills a struct of ours.
        let info = unsafe {
            let mut info: libc::siginfo_t = zeroed();
            self.trace(libc::PTRACE_GETSIGINFO, 0, (&raw mut info) as usize, "asking for a signal")?;
            info
        };
        if info.si_code <= 0 {
            return Ok(Stop::Sent);
        }
        // SAFETY: signals that instructions raise have an address.
        let address = unsafe { info.si_addr() } as u64;
        Ok(Stop::Raised { signal, code: info.si_code, address })
    }

    pub(super) fn registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: plain numbers, which the kernel fills.
        unsafe {
            let mut registers: libc::user_regs_struct = zeroed();
            self.trace(libc::PTRACE_GETREGS, 0, (&raw mut registers) as usize, "reading registers")?;
            Ok(registers)
        }
    }

    pub(super) fn set_registers(&self, registers: &libc::user_regs_struct) -> io::Result<()> {
        let at = std::ptr::from_ref(registers) as usize;
        self.trace(libc::PTRACE_SETREGS, 0, at, "setting registers")
    }

    fn transfer(&self, request: libc::c_uint, image: &mut [u8]) -> io::Result<usize> {
        let mut vector = libc::iovec { iov_base: image.as_mut_ptr().cast(), iov_len: image.len() };
        self.trace(request, NT_X86_XSTATE, (&raw mut vector) as usize, "moving vector registers")?;
        Ok(vector.iov_len)
    }

    /// Bytes of a whole XSAVE image.
    pub(super) fn xsave_len(&self) -> usize {
        self.xsave_len
    }

    /// Reads as much of the XSAVE image as fits.
    pub(super) fn xsave(&self, image: &mut [u8]) -> io::Result<()> {
        self.transfer(libc::PTRACE_GETREGSET, image).map(drop)
    }

    /// Sets all that XSAVE knows, from a whole image.
    pub(super) fn set_xsave(&self, image: &mut [u8]) -> io::Result<()> {
        self.transfer(libc::PTRACE_SETREGSET, image).map(drop)
    }

    /// Stops guest code before the instructions at these addresses; 0 is none.
    pub(super) fn set_breakpoints(&self, addresses: &[u64; 4]) -> io::Result<()> {
        let field = |number: usize| std::mem::offset_of!(libc::user, u_debugreg) + number * size_of::<u64>();
        let mut control = 0;
        for (number, &address) in addresses.iter().enumerate() {
            if address != 0 {
                self.trace(libc::PTRACE_POKEUSER, field(number), address as usize, "setting a breakpoint")?;
                // Enabled, for execution (Intel SDM 3, 18.2.4).
                control |= 1 << (2 * number);
            }
        }
        self.trace(libc::PTRACE_POKEUSER, field(7), control, "setting breakpoints")
    }

    /// Has instructions that ask the host stop the process wherever they are, as far as this host's CPU knows how to: RDTSC
    /// everywhere, CPUID on Intel's of the last ten years and AMD's newest. Its registers are lost.
    pub(super) fn stop_at_more(&mut self) {
        if !std::mem::replace(&mut self.stops_at_more, true) {
            for command in refuse_clock_and_cpuid() {
                // A CPU that cannot is no error.
                drop(self.run_commands(&[command]));
            }
        }
    }

    /// Has the process start on the tracer's CPU, where it is switched to fastest: the tracer is about to sleep. Where that
    /// fails, it starts anywhere.
    pub(super) fn follow(&mut self) {
        // SAFETY: a plain call.
        let cpu = unsafe { libc::sched_getcpu() };
        if cpu == self.cpu || cpu < 0 {
            return;
        }
        self.cpu = cpu;
        // SAFETY: plain bits.
        let mut only: libc::cpu_set_t = unsafe { zeroed() };
        // SAFETY: changes a set of ours, at a place inside it.
        unsafe { libc::CPU_SET(cpu as usize % libc::CPU_SETSIZE as usize, &mut only) };
        self.set_cpus(&only);
    }

    fn set_cpus(&self, cpus: &libc::cpu_set_t) {
        // SAFETY: a plain call on a set of ours.
        unsafe { libc::sched_setaffinity(self.pid, size_of::<libc::cpu_set_t>(), cpus) };
    }

    /// Once it has started, it may go where there is room.
    fn release(&mut self) {
        if std::mem::replace(&mut self.cpu, -1) >= 0 {
            self.set_cpus(&self.cpus);
        }
    }

    /// Lets guest code run until it stops. No system call of it is executed.
    pub(super) fn run(&mut self) -> io::Result<Stop> {
        self.trace(SYSEMU, 0, 0, "running guest code")?;
        self.release();
        self.wait()
    }

    /// Makes system calls in the process. Its registers are lost.
    pub(super) fn run_commands(&mut self, commands: &[Command]) -> io::Result<()> {
        for part in commands.chunks(COMMANDS_MAX) {
            // SAFETY: the page is ours and as large; the process does not run.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), self.commands.as_ptr(), part.len()) };
            self.call(self.place, self.place + PAGE, part.len())?;
        }
        Ok(())
    }

    /// How long it takes to run next to nothing until a stop, in ticks of the host's TSC. The registers are lost.
    pub(super) fn stop_cost(&mut self) -> io::Result<u64> {
        let mut least = u64::MAX;
        for _ in 0..4 {
            let ticks = self.call(self.place, self.place + PAGE, 0)?;
            least = least.min(ticks);
        }
        Ok(least)
    }

    /// Runs our code, whose page is at `page`; answers how long, in ticks of the host's TSC.
    fn call(&mut self, page: u64, commands: u64, count: usize) -> io::Result<u64> {
        // SAFETY: plain numbers.
        let mut registers: libc::user_regs_struct = unsafe { zeroed() };
        (registers.cs, registers.ss) = (USER_CS, USER_SS);
        registers.rip = page + CODE as u64;
        registers.r12 = commands;
        registers.r13 = count as u64;
        registers.eflags = 2;
        registers.orig_rax = u64::MAX;
        self.set_registers(&registers)?;
        let began = host_tsc();
        let mut unlocked = false;
        loop {
            self.trace(libc::PTRACE_CONT, 0, 0, "changing mappings")?;
            match self.wait()? {
                // A kick, which is looked for before guest code runs.
                Stop::Sent => {}
                Stop::Raised { signal: libc::SIGTRAP, .. } => break,
                // Guest code has locked itself, and us, out of memory by PKRU. What is not in an image is as after a reset.
                Stop::Raised { signal: libc::SIGSEGV, code: SEGV_PKUERR, .. } if !unlocked => {
                    unlocked = true;
                    let mut image = vec![0; self.xsave_len];
                    self.xsave(&mut image)?;
                    if let Some(byte) = image.get_mut(PKRU_PRESENT.0) {
                        *byte &= !PKRU_PRESENT.1;
                    }
                    self.set_xsave(&mut image)?;
                }
                stop => return Err(io::Error::other(format!("changing mappings ended with {stop:?}"))),
            }
        }
        let ticks = host_tsc() - began;
        let after = self.registers()?;
        if after.r13 == 0 {
            return Ok(ticks);
        }
        Err(io::Error::from_raw_os_error((after.rax as i64).wrapping_neg() as i32))
    }
}

fn end(pid: libc::pid_t) {
    // SAFETY: kills and reaps a child of ours.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        let mut status = 0;
        while libc::waitpid(pid, &raw mut status, libc::__WALL) == pid
            && !libc::WIFEXITED(status)
            && !libc::WIFSIGNALED(status)
        {}
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended.get() {
            end(self.pid);
        }
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.commands.as_ptr().cast(), PAGE as usize) };
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn commands_are_the_instructions_they_say() {
        use iced_x86::{Decoder, DecoderOptions, Mnemonic};
        let mut decoder = Decoder::with_ip(64, &RUN_COMMANDS, 0, DecoderOptions::NONE);
        let all: Vec<_> = decoder.iter().collect();
        let count = |mnemonic| all.iter().filter(|i| i.mnemonic() == mnemonic).count();
        assert_eq!((count(Mnemonic::Syscall), count(Mnemonic::INVALID)), (1, 0));
        let done = all.iter().find(|i| i.mnemonic() == Mnemonic::Int3).unwrap().ip();
        for jump in all.iter().filter(|i| i.is_jcc_short_or_near()) {
            assert_eq!(jump.near_branch_target(), done);
        }
        let back = all.iter().find(|i| i.mnemonic() == Mnemonic::Jmp).unwrap();
        assert_eq!(back.near_branch_target(), 0);
    }
}
