//! An attacker inside a process: makes its threads do system calls, as somebody would who has taken one over.
//!
//! Unsafe, because ptrace(2) is.
#![allow(unsafe_code)]

use std::fs;
use std::os::unix::fs::FileExt;

/// What a system call in the other process led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// What the kernel gave.
    Gave(i64),
    /// The error's number.
    Refused(i32),
    /// The process ended by this signal.
    Died(i32),
}

/// A thread that does what we say.
pub struct Intruder {
    thread: libc::pid_t,
    before: libc::user_regs_struct,
    /// Where a `syscall` instruction is.
    gate: u64,
    memory: fs::File,
    ended: bool,
}

/// Threads of a process: id and name.
pub fn threads(process: u32) -> Vec<(libc::pid_t, String)> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let named = entries.filter_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        Some((id, fs::read_to_string(entry.path().join("comm")).ok()?.trim().to_owned()))
    });
    named.collect()
}

fn wait(thread: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: the kernel fills a number of ours.
    assert_eq!(unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) }, thread);
    status
}

fn trace(request: libc::c_uint, thread: libc::pid_t, data: usize) {
    // SAFETY: requests of this module touch nothing of ours but a register file that `data` points at.
    let done = unsafe { libc::ptrace(request, thread, 0, data) };
    assert_eq!(done, 0, "ptrace {request}: {}", std::io::Error::last_os_error());
}

fn registers(thread: libc::pid_t) -> libc::user_regs_struct {
    // SAFETY: plain numbers, which the kernel fills.
    let mut registers = unsafe { std::mem::zeroed() };
    trace(libc::PTRACE_GETREGS, thread, (&raw mut registers) as usize);
    registers
}

impl Intruder {
    /// Takes over the thread of this name; the first one, if there are several.
    pub fn into(process: u32, name: &str) -> Self {
        let found = threads(process).into_iter().find(|(_, of)| of == name);
        let thread = found.unwrap_or_else(|| panic!("no thread {name}: {:?}", threads(process))).0;
        let memory = fs::File::options().read(true).write(true).open(format!("/proc/{process}/mem")).unwrap();
        let gate = gate(process, &memory);
        trace(libc::PTRACE_SEIZE, thread, 0);
        trace(libc::PTRACE_INTERRUPT, thread, 0);
        wait(thread);
        Self { thread, before: registers(thread), gate, memory, ended: false }
    }

    /// Bytes at a place of its own, at which the answer is.
    pub fn put(&self, place: u64, bytes: &[u8]) -> u64 {
        let at = (self.before.rsp - 0x2000 + place * 256) & !15;
        self.memory.write_all_at(bytes, at).unwrap();
        at
    }

    /// A string that a path is.
    pub fn text(&self, place: u64, text: &str) -> u64 {
        self.put(place, &[text.as_bytes(), &[0]].concat())
    }

    /// Makes a system call.
    pub fn call(&mut self, number: libc::c_long, arguments: &[u64]) -> Answer {
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
        let mut now = self.before;
        (now.rip, now.rax, now.orig_rax) = (self.gate, number as u64, u64::MAX);
        (now.rdi, now.rsi, now.rdx) = (argument(0), argument(1), argument(2));
        (now.r10, now.r8, now.r9) = (argument(3), argument(4), argument(5));
        trace(libc::PTRACE_SETREGS, self.thread, (&raw mut now) as usize);
        trace(libc::PTRACE_SINGLESTEP, self.thread, 0);
        loop {
            let status = wait(self.thread);
            if libc::WIFSIGNALED(status) {
                self.ended = true;
                return Answer::Died(libc::WTERMSIG(status));
            }
            if libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP {
                break;
            }
            // A signal of its own, which can wait.
            trace(libc::PTRACE_SINGLESTEP, self.thread, 0);
        }
        match registers(self.thread).rax as i64 {
            error @ -4095..0 => Answer::Refused((-error) as i32),
            value => Answer::Gave(value),
        }
    }
}

impl Drop for Intruder {
    fn drop(&mut self) {
        if !self.ended {
            trace(libc::PTRACE_SETREGS, self.thread, (&raw mut self.before) as usize);
            trace(libc::PTRACE_DETACH, self.thread, 0);
        }
    }
}

/// A `syscall` instruction in the process's code.
fn gate(process: u32, memory: &fs::File) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    for line in maps.lines().filter(|line| line.contains(" r-xp ")) {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut bytes = vec![0; (to - from) as usize];
        if memory.read_exact_at(&mut bytes, from).is_ok()
            && let Some(at) = bytes.windows(2).position(|pair| pair == [0x0f, 0x05])
        {
            return from + at as u64;
        }
    }
    panic!("no system call in {maps}");
}
