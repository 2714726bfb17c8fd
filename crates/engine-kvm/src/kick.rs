//! Getting a vCPU out of KVM_RUN from another thread.
//!
//! `immediate_exit` makes the next entry return at once; a signal ends the one under way. The order makes sure that no
//! kick is lost: a kicker sets the byte, then looks whether the vCPU is inside; the vCPU says that it is inside, then
//! enters, and the kernel looks at the byte.
//!
//! Unsafe, because signals are raw libc calls.
#![allow(unsafe_code)]

use crate::run_page::RunPage;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Once};

extern "C" fn ignore(_: libc::c_int) {}

/// The signal: its handler does nothing, its arrival is all.
pub(crate) fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the empty handler, without SA_RESTART, so that a blocking system call ends with EINTR.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe (it does nothing).
    ONCE.call_once(|| unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        libc::sigaction(signal(), &action, std::ptr::null_mut());
    });
}

/// A vCPU as kickers see it.
pub(crate) struct Kicker {
    page: Arc<RunPage>,
    inside: AtomicBool,
    /// The thread that is inside.
    thread: AtomicI32,
}

impl Kicker {
    pub(crate) fn new(page: Arc<RunPage>) -> Self {
        install();
        Self { page, inside: AtomicBool::new(false), thread: AtomicI32::new(0) }
    }

    /// Runs `enter` so that kicks reach it.
    pub(crate) fn inside<R>(&self, enter: impl FnOnce() -> R) -> R {
        thread_local!(static ID: libc::pid_t = prepare());
        self.thread.store(ID.with(|id| *id), Ordering::Relaxed);
        self.inside.store(true, Ordering::SeqCst);
        let result = enter();
        self.inside.store(false, Ordering::SeqCst);
        result
    }

    /// The kicks so far have been heard.
    pub(crate) fn heard(&self) {
        self.page.set_immediate_exit(false);
    }
}

/// The calling thread takes the signal; answers its number.
fn prepare() -> libc::pid_t {
    // SAFETY: plain system calls on a set of our own.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
        libc::gettid()
    }
}

impl cpu::Kick for Kicker {
    fn kick(&self) {
        self.page.set_immediate_exit(true);
        if self.inside.load(Ordering::SeqCst) {
            let thread = self.thread.load(Ordering::Relaxed);
            // SAFETY: a signal to a thread of this process; one that has just ended gets none, and its handler does
            // nothing in any other.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}
