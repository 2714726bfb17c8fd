//! A way to get a thread out of KVM_RUN: a signal whose handler does nothing.
//!
//! Unsafe, because signals are raw libc calls.
#![allow(unsafe_code)]

use std::os::unix::thread::{JoinHandleExt, RawPthread};
use std::thread::JoinHandle;

extern "C" fn ignore(_: libc::c_int) {}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the empty handler, without SA_RESTART, so that a blocking system call ends with EINTR.
pub(crate) fn install() {
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe (it does nothing).
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        libc::sigaction(signal(), &action, std::ptr::null_mut());
    }
}

/// Interrupts the thread's system call.
pub(crate) fn interrupt<T>(thread: &JoinHandle<T>) {
    let id: RawPthread = thread.as_pthread_t();
    // SAFETY: the handle is not joined yet, so the thread id is valid.
    unsafe { libc::pthread_kill(id, signal()) };
}
