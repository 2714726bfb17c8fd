//! Host signals that code made by this engine raises: #DE, #XM, #MF and #GP of guest instructions.
//!
//! One handler for the process, installed once. It looks the faulting RIP up in a table of registered ranges; a range
//! says where to continue. A signal from anywhere else goes to the handler that was there before, or ends the process
//! as it would have done without us. The table is lock-free, since a handler may not wait.
#![allow(unsafe_code)]

use cpu::Error;
use std::ops::Range;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Called in the signal handler, for a fault at a RIP inside the range: may change the context, and answers whether
/// the thread shall continue there. Must be async-signal-safe.
pub type Recover = fn(trap: u64, context: &mut libc::ucontext_t) -> bool;

const RANGES: usize = 1024;
const SIGNALS: [libc::c_int; 4] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL, libc::SIGBUS];

struct Slot {
    /// 0: free; 1: being changed; else the start.
    start: AtomicU64,
    end: AtomicU64,
    recover: AtomicUsize,
}

static TABLE: [Slot; RANGES] =
    [const { Slot { start: AtomicU64::new(0), end: AtomicU64::new(0), recover: AtomicUsize::new(0) } };
        RANGES];

/// What was installed before us, by index in [`SIGNALS`]: set before our handler can run, never changed.
static PREVIOUS: [std::sync::OnceLock<libc::sigaction>; 4] = [const { std::sync::OnceLock::new() }; 4];
static INSTALL: Once = Once::new();

/// A registered range; ends with it.
#[derive(Debug)]
pub struct Registration(usize);

impl Drop for Registration {
    fn drop(&mut self) {
        TABLE[self.0].start.store(0, Ordering::SeqCst);
    }
}

/// Registers a range of code.
pub fn register(range: Range<u64>, recover: Recover) -> Result<Registration, Error> {
    INSTALL.call_once(install);
    for (index, slot) in TABLE.iter().enumerate() {
        if slot.start.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            slot.end.store(range.end, Ordering::SeqCst);
            slot.recover.store(recover as usize, Ordering::SeqCst);
            slot.start.store(range.start, Ordering::SeqCst);
            return Ok(Registration(index));
        }
    }
    Err(Error::Unsupported { engine: "soft", why: "too many vCPUs in one process; use fewer --cpus".into() })
}

/// Bytes of the alternate stack that a thread gets if it has none.
const STACK: usize = 64 << 10;

/// Makes the calling thread fit to run generated code: it has an alternate signal stack, and signals that others may
/// send are blocked in it (their handlers may not ask for that stack).
pub fn prepare_thread() -> Result<(), Error> {
    thread_local!(static READY: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
    if READY.get() {
        return Ok(());
    }
    let refused = |what| Error::Host { what, source: std::io::Error::last_os_error() };
    // SAFETY: plain structs that the kernel reads or fills; the stack is never freed, since a thread that is ending
    // may still take a signal on it: it costs one mapping per vCPU thread, and only where Rust's own runtime has not
    // made one.
    unsafe {
        let mut old: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &mut old);
        if old.ss_flags & libc::SS_DISABLE != 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let memory = libc::mmap(std::ptr::null_mut(), STACK, rights, flags, -1, 0);
            if memory == libc::MAP_FAILED {
                return Err(refused("memory for a signal stack"));
            }
            let stack = libc::stack_t { ss_sp: memory, ss_flags: 0, ss_size: STACK };
            if libc::sigaltstack(&stack, std::ptr::null_mut()) != 0 {
                return Err(refused("setting a signal stack"));
            }
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        for signal in SIGNALS {
            libc::sigdelset(&mut set, signal);
        }
        // A debugger's and the abort's own.
        for signal in [libc::SIGTRAP, libc::SIGABRT] {
            libc::sigdelset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
    READY.set(true);
    Ok(())
}

fn install() {
    for (signal, previous) in SIGNALS.iter().zip(&PREVIOUS) {
        // SAFETY: both structs are plain data that the kernel reads or fills; our handler is async-signal-safe.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(*signal, std::ptr::null(), &mut old);
            let _ = previous.set(old);
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = handle as *const () as usize;
            // The alternate stack, where the thread has one: code of the translator does not keep RSP on a stack.
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(*signal, &new, std::ptr::null_mut());
        }
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext_t to an SA_SIGINFO handler.
    let ucontext = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let rip = ucontext.uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
    let trap = ucontext.uc_mcontext.gregs[libc::REG_TRAPNO as usize] as u64;
    for slot in &TABLE {
        let start = slot.start.load(Ordering::SeqCst);
        if start <= 1 || rip < start || rip >= slot.end.load(Ordering::SeqCst) {
            continue;
        }
        let recover = slot.recover.load(Ordering::SeqCst);
        // SAFETY: only `register` stores there, a `Recover` before it publishes the range.
        let recover: Recover = unsafe { std::mem::transmute::<usize, Recover>(recover) };
        if recover(trap, ucontext) {
            return;
        }
    }
    forward(signal, info, context);
}

/// Not ours: what would have happened without us.
fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS.iter().position(|&s| s == signal).and_then(|at| PREVIOUS[at].get());
    let action = previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
    if action == libc::SIG_DFL || action == libc::SIG_IGN {
        // The instruction faults again and the default action ends the process; a signal that was sent rather than
        // raised by an instruction is sent again.
        // SAFETY: resets the disposition and raises; both are async-signal-safe.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            if !info.is_null() && (*info).si_code <= 0 {
                libc::raise(signal);
            }
        }
        return;
    }
    let flags = previous.map_or(0, |previous| previous.sa_flags);
    // SAFETY: the address was a valid handler of the kind its flags say, and gets the arguments that we got.
    unsafe {
        if flags & libc::SA_SIGINFO != 0 {
            let handler = std::mem::transmute::<
                usize,
                extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
            >(action);
            handler(signal, info, context);
        } else {
            let handler = std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(action);
            handler(signal);
        }
    }
}
