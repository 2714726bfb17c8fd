//! The bare CPU: a child process that runs cases and reports how they ended.
//!
//! The child is forked once. It has pages of its own at the guest's linear addresses, an alternate signal stack, and
//! seccomp's strict mode (read, write and exit only). It is told by a pipe that a batch of cases lies in memory shared
//! with the parent, runs them, and answers by another pipe. Code is entered and left by jumps; a signal records the
//! exception and leaves the code as well. If the child dies, the parent knows at which case, and starts another.

use super::case::{CODE, CODE_MAX, Case, DATA, Ending, Outcome, PAGE, State, WRITABLE};
use std::arch::naked_asm;
use std::mem::offset_of;

/// Cases of one batch.
pub const BATCH: usize = 64;
pub const POKES: usize = 4;

#[repr(C, align(64))]
struct Slot {
    start: State,
    code: [u8; CODE_MAX + 32],
    len: usize,
    pokes: [(u64, u64); POKES],
    poked: usize,
    outcome: Outcome,
    data: [u8; WRITABLE],
}

#[repr(C)]
struct Shared {
    slots: [Slot; BATCH],
    count: usize,
    current: usize,
    /// The data that each case starts with; the third page is that of the child's first batch.
    data: [u8; WRITABLE],
}

#[repr(C, align(64))]
struct Context {
    state: State,
    host_rsp: u64,
    host_fs: u64,
    host_gs: u64,
    ucontext: u64,
}

static mut CONTEXT: Context =
    Context { state: State::EMPTY, host_rsp: 0, host_fs: 0, host_gs: 0, ucontext: 0 };

const FX: usize = offset_of!(State, fx);
const YMM: usize = offset_of!(State, ymm);
const FS: usize = offset_of!(State, fs);
const GS: usize = offset_of!(State, gs);
const RSP: usize = offset_of!(Context, host_rsp);
const HOST_FS: usize = offset_of!(Context, host_fs);
const HOST_GS: usize = offset_of!(Context, host_gs);
const UCONTEXT: usize = offset_of!(Context, ucontext);

/// Runs with the state of `CONTEXT` until [`back`] (answers 0) or a signal (answers 1).
#[unsafe(naked)]
extern "sysv64" fn go() -> u64 {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "lea rax, [rip + {c}]",
        "mov [rax + {rsp}], rsp",
        "rdfsbase rcx", "mov [rax + {host_fs}], rcx",
        "rdgsbase rcx", "mov [rax + {host_gs}], rcx",
        "fxrstor64 [rax + {fx}]",
        ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        "vmovdqu ymm\\i, [rax + {ymm} + 32*\\i]",
        ".endr",
        "mov rcx, [rax + {fs}]", "wrfsbase rcx",
        "mov rcx, [rax + {gs}]", "wrgsbase rcx",
        "push qword ptr [rax + 136]", "popfq",
        "mov rcx, [rax + 8]", "mov rdx, [rax + 16]", "mov rbx, [rax + 24]", "mov rsp, [rax + 32]",
        "mov rbp, [rax + 40]", "mov rsi, [rax + 48]", "mov rdi, [rax + 56]",
        "mov r8, [rax + 64]", "mov r9, [rax + 72]", "mov r10, [rax + 80]", "mov r11, [rax + 88]",
        "mov r12, [rax + 96]", "mov r13, [rax + 104]", "mov r14, [rax + 112]", "mov r15, [rax + 120]",
        "mov rax, [rax]",
        "jmp [rip + {c} + 128]",
        c = sym CONTEXT, fx = const FX, ymm = const YMM, fs = const FS, gs = const GS, rsp = const RSP,
        host_fs = const HOST_FS, host_gs = const HOST_GS,
    )
}

/// Where the code goes at its end.
#[unsafe(naked)]
extern "sysv64" fn back() {
    naked_asm!(
        "mov [rip + {c}], rax",
        "lea rax, [rip + {c}]",
        "mov [rax + 8], rcx", "mov [rax + 16], rdx", "mov [rax + 24], rbx", "mov [rax + 32], rsp",
        "mov [rax + 40], rbp", "mov [rax + 48], rsi", "mov [rax + 56], rdi",
        "mov [rax + 64], r8", "mov [rax + 72], r9", "mov [rax + 80], r10", "mov [rax + 88], r11",
        "mov [rax + 96], r12", "mov [rax + 104], r13", "mov [rax + 112], r14", "mov [rax + 120], r15",
        "mov rsp, [rax + {rsp}]",
        "pushfq", "pop qword ptr [rax + 136]",
        "push 2", "popfq",
        "rdfsbase rcx", "mov [rax + {fs}], rcx",
        "rdgsbase rcx", "mov [rax + {gs}], rcx",
        "mov rcx, [rax + {host_fs}]", "wrfsbase rcx",
        "mov rcx, [rax + {host_gs}]", "wrgsbase rcx",
        "fxsave64 [rax + {fx}]",
        ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        "vmovdqu [rax + {ymm} + 32*\\i], ymm\\i",
        ".endr",
        "vzeroupper",
        "fninit",
        "mov dword ptr [rsp - 8], 0x1f80", "ldmxcsr [rsp - 8]",
        "xor eax, eax",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        c = sym CONTEXT, fx = const FX, ymm = const YMM, fs = const FS, gs = const GS, rsp = const RSP,
        host_fs = const HOST_FS, host_gs = const HOST_GS,
    )
}

/// The signal handler: leaves the code for good, with the registers in the frame that the kernel made.
#[unsafe(naked)]
extern "sysv64" fn on_signal() {
    naked_asm!(
        "push 2", "popfq",
        "lea rax, [rip + {c}]",
        "mov [rax + {ucontext}], rdx",
        "rdfsbase rcx", "mov [rax + {fs}], rcx",
        "rdgsbase rcx", "mov [rax + {gs}], rcx",
        "mov rcx, [rax + {host_fs}]", "wrfsbase rcx",
        "mov rcx, [rax + {host_gs}]", "wrgsbase rcx",
        "mov rsp, [rax + {rsp}]",
        "mov eax, 1",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        c = sym CONTEXT, ucontext = const UCONTEXT, fs = const FS, gs = const GS, rsp = const RSP,
        host_fs = const HOST_FS, host_gs = const HOST_GS,
    )
}

/// Where all code goes at its end: nowhere in the guest.
pub fn end() -> u64 {
    back as *const () as u64
}

/// In the order of the encoding, where ucontext has RAX to R15.
const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Bit 2 of XSTATE_BV: YMM's upper halves follow; else they are zero.
const AVX: u64 = 4;

/// Runs one slot in the child. `memory` is valid at the fixed addresses.
///
/// # Safety
/// Only in the child, after [`prepare`].
unsafe fn run(slot: &mut Slot, data: &[u8; WRITABLE]) {
    // SAFETY: the pages at CODE and DATA are mapped; CONTEXT is used by this single thread only.
    unsafe {
        std::ptr::copy_nonoverlapping(data.as_ptr(), DATA as *mut u8, WRITABLE);
        for &(at, value) in &slot.pokes[..slot.poked] {
            (at as *mut u64).write_unaligned(value);
        }
        std::ptr::write_bytes(CODE as *mut u8, 0xcc, 2 * PAGE as usize);
        std::ptr::copy_nonoverlapping(slot.code.as_ptr(), slot.start.rip as *mut u8, slot.len);
        let context = &raw mut CONTEXT;
        (*context).state = slot.start;
        let signal = go();
        let out = &mut slot.outcome;
        out.ending = Ending::default();
        out.state = (*context).state;
        out.state.rip = end();
        if signal != 0 {
            caught(out, &*((*context).ucontext as *const libc::ucontext_t));
        }
        std::ptr::copy_nonoverlapping(DATA as *const u8, slot.data.as_mut_ptr(), WRITABLE);
    }
}

/// # Safety
/// The context must be a signal frame's.
unsafe fn caught(out: &mut Outcome, context: &libc::ucontext_t) {
    let registers = &context.uc_mcontext.gregs;
    let get = |register: libc::c_int| registers[register as usize] as u64;
    for (to, from) in out.state.gpr.iter_mut().zip(GREGS) {
        *to = get(from);
    }
    out.state.rflags = get(libc::REG_EFL);
    let vector = get(libc::REG_TRAPNO) as u32;
    out.state.rip = get(libc::REG_RIP);
    out.ending = Ending::exception(vector, get(libc::REG_ERR) as u32, get(libc::REG_CR2));
    let image = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: the kernel stores an XSAVE image: 512 bytes, a header of 64, then the upper halves of YMM.
    unsafe {
        out.state.fx = image.cast::<[u8; 512]>().read_unaligned();
        let features = image.add(512).cast::<u64>().read_unaligned();
        for (i, ymm) in out.state.ymm.iter_mut().enumerate() {
            let low = image.add(160 + 16 * i).cast::<[u64; 2]>().read_unaligned();
            let high = image.add(576 + 16 * i).cast::<[u64; 2]>().read_unaligned();
            let high = if features & AVX != 0 { high } else { [0; 2] };
            *ymm = [low[0], low[1], high[0], high[1]];
        }
    }
}

/// Maps the pages and arms the signals. Nothing here allocates: the parent may have had other threads.
///
/// # Safety
/// Only in a fresh child.
unsafe fn prepare(constant: &[u8]) -> bool {
    // SAFETY: the addresses are far from everything a process has, and NOREPLACE says so if not.
    unsafe {
        let map = |at: u64, len: u64, rights: libc::c_int| {
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
            libc::mmap(at as *mut libc::c_void, len as usize, rights, flags, -1, 0) as u64 == at
        };
        let data = libc::PROT_READ | libc::PROT_WRITE;
        if !map(CODE, 2 * PAGE, data | libc::PROT_EXEC) || !map(DATA, 3 * PAGE, data) {
            return false;
        }
        let third = DATA + WRITABLE as u64;
        std::ptr::copy_nonoverlapping(constant.as_ptr(), third as *mut u8, PAGE as usize);
        libc::mprotect(third as *mut libc::c_void, PAGE as usize, libc::PROT_READ);
        let size = 256 << 10;
        let stack = libc::mmap(
            std::ptr::null_mut(),
            size,
            data,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
            0,
        );
        let stack = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: size };
        if libc::sigaltstack(&stack, std::ptr::null_mut()) != 0 {
            return false;
        }
        for signal in [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS, libc::SIGTRAP] {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) == 0
    }
}

/// The child as its parent knows it.
pub struct Native {
    shared: *mut Shared,
    /// The third page of the data.
    constant: Vec<u8>,
    child: libc::pid_t,
    to: libc::c_int,
    from: libc::c_int,
    under_way: bool,
}

impl Native {
    pub fn new(constant: &[u8]) -> Self {
        // SAFETY: a fresh mapping that lives as long as this struct.
        let shared = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(shared, libc::MAP_FAILED);
        let constant = constant.to_vec();
        let mut native =
            Self { shared: shared.cast(), constant, child: 0, to: -1, from: -1, under_way: false };
        native.spawn();
        native
    }

    fn spawn(&mut self) {
        let (mut down, mut up) = ([0; 2], [0; 2]);
        // SAFETY: pipes and fork are plain calls; the child runs only async-signal-safe code and never returns.
        unsafe {
            assert_eq!(libc::pipe2(down.as_mut_ptr(), libc::O_CLOEXEC), 0);
            assert_eq!(libc::pipe2(up.as_mut_ptr(), libc::O_CLOEXEC), 0);
            let shared = self.shared;
            let child = libc::fork();
            assert!(child >= 0, "fork failed");
            if child == 0 {
                libc::close(down[1]);
                libc::close(up[0]);
                if prepare(&self.constant) {
                    serve(shared, down[0], up[1]);
                }
                libc::syscall(libc::SYS_exit, 1);
            }
            libc::close(down[0]);
            libc::close(up[1]);
            (self.child, self.to, self.from) = (child, down[1], up[0]);
        }
    }

    fn reap(&mut self) {
        // SAFETY: our own child and pipes.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
            libc::close(self.to);
            libc::close(self.from);
        }
    }

    /// Starts a batch.
    pub fn start(&mut self, cases: &[Case], data: &[u8]) {
        assert!(cases.len() <= BATCH && !self.under_way);
        // SAFETY: the child waits for its pipe and does not look.
        let shared = unsafe { &mut *self.shared };
        shared.count = cases.len();
        shared.current = 0;
        shared.data.copy_from_slice(data);
        for (slot, case) in shared.slots.iter_mut().zip(cases) {
            slot.start = case.state;
            slot.start.rip = case.start;
            let code = case.bytes();
            slot.len = code.len();
            slot.code[..slot.len].copy_from_slice(&code);
            slot.poked = case.pokes.len();
            slot.pokes[..slot.poked].copy_from_slice(&case.pokes);
        }
        self.resume();
        self.under_way = true;
    }

    fn resume(&self) {
        // SAFETY: one byte of a local.
        unsafe { libc::write(self.to, [1u8].as_ptr().cast(), 1) };
    }

    /// Waits for the batch.
    pub fn finish(&mut self) {
        while self.under_way && !self.answered() {
            // It died, or hangs, at the current case.
            self.reap();
            // SAFETY: the child is gone.
            let shared = unsafe { &mut *self.shared };
            let Some(slot) = shared.slots.get_mut(shared.current) else {
                panic!("the native child cannot start")
            };
            slot.outcome.ending = Ending { kind: Ending::DIED, ..Ending::default() };
            shared.current += 1;
            self.spawn();
            self.resume();
        }
        self.under_way = false;
    }

    fn answered(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.from, events: libc::POLLIN, revents: 0 };
        let mut byte = [0u8];
        // SAFETY: locals.
        unsafe {
            libc::poll(&mut poll, 1, 3_000) == 1 && libc::read(self.from, byte.as_mut_ptr().cast(), 1) == 1
        }
    }

    /// What came of a case of the batch, and the data it left.
    pub fn outcome(&self, index: usize) -> (&Outcome, &[u8]) {
        assert!(!self.under_way);
        // SAFETY: the child waits.
        let slot = unsafe { &(&(*self.shared).slots)[index] };
        (&slot.outcome, &slot.data)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.reap();
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

/// The child's life.
///
/// # Safety
/// Only in a prepared child.
unsafe fn serve(shared: *mut Shared, from: libc::c_int, to: libc::c_int) -> ! {
    let mut byte = [0u8];
    // SAFETY: the parent leaves the shared memory alone until it is answered.
    unsafe {
        while libc::read(from, byte.as_mut_ptr().cast(), 1) == 1 {
            let shared = &mut *shared;
            let data = shared.data;
            while shared.current < shared.count {
                // Volatile, since the parent reads it if this process dies.
                let at = (&raw const shared.current).read_volatile();
                let Some(slot) = shared.slots.get_mut(at) else { break };
                run(slot, &data);
                (&raw mut shared.current).write_volatile(at + 1);
            }
            libc::write(to, byte.as_ptr().cast(), 1);
        }
        libc::syscall(libc::SYS_exit, 0);
    }
    std::process::abort()
}
