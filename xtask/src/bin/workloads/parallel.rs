//! Two CPUs: throughput of independent work, and messages from one to the other.

use super::{Numbers, Workload};
use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// These want two CPUs.
pub const GROUP: &str = "parallel";

pub const ALL: &[Workload] = &[
    Workload { group: GROUP, name: "one_thread", run: one_thread },
    Workload { group: GROUP, name: "two_threads", run: two_threads },
    Workload { group: GROUP, name: "pipe_two_cpus", run: pipe_two_cpus },
    Workload { group: GROUP, name: "futex_two_cpus", run: futex_two_cpus },
    Workload { group: GROUP, name: "locked_line", run: locked_line },
    Workload { group: GROUP, name: "shootdown", run: shootdown },
];

/// How many CPUs this process may use.
pub fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Keeps the calling thread on one CPU.
fn pin(cpu: usize) {
    // SAFETY: the set is this function's, and `cpu` far below its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// Integer work over a table of 16 KiB, so many times. The same code for one thread and for two: where code is decides how fast
/// it is.
#[inline(never)]
fn work(seed: u64, times: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..times {
        let mut numbers = Numbers(seed);
        let mut table = [0u64; 2048];
        for _ in 0..20_000 {
            let number = numbers.draw();
            table[number as usize % 2048] ^= number.rotate_left(7);
        }
        sum = black_box(&table).iter().fold(0, |sum: u64, &word| sum.wrapping_mul(31) ^ word);
    }
    sum
}

/// Two pieces of work, one after the other.
fn one_thread(units: u64) -> u64 {
    work(1, units) ^ work(2, units)
}

/// Two pieces of work beside each other.
fn two_threads(units: u64) -> u64 {
    let pieces = [1, 2].map(|seed| {
        thread::spawn(move || {
            pin(seed as usize - 1);
            work(seed, units)
        })
    });
    pieces.into_iter().fold(0, |sum, piece| sum ^ piece.join().unwrap_or_default())
}

/// A byte through a pipe to a thread on the other CPU and back.
fn pipe_two_cpus(units: u64) -> u64 {
    let (mut there, mut back) = ([0; 2], [0; 2]);
    // SAFETY: the arrays are as large as pipe() wants.
    if unsafe { libc::pipe(there.as_mut_ptr()) != 0 || libc::pipe(back.as_mut_ptr()) != 0 } {
        return u64::MAX;
    }
    let pass = |from: i32, to: i32, first: bool| {
        let mut byte = 1u8;
        for _ in 0..units {
            // SAFETY: one byte, which is this function's.
            unsafe {
                if first {
                    libc::write(to, (&raw const byte).cast(), 1);
                }
                libc::read(from, (&raw mut byte).cast(), 1);
                if !first {
                    byte = byte.wrapping_add(1);
                    libc::write(to, (&raw const byte).cast(), 1);
                }
            }
        }
        byte
    };
    let byte = thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            pass(there[0], back[1], false)
        });
        let here = scope.spawn(|| {
            pin(0);
            pass(back[0], there[1], true)
        });
        here.join().unwrap_or_default()
    });
    for file in there.into_iter().chain(back) {
        // SAFETY: the pipes are this function's.
        unsafe { libc::close(file) };
    }
    u64::from(byte != 0)
}

/// Waits in the kernel until `word` is `wanted`.
fn wait_for(word: &AtomicU32, wanted: u32) {
    loop {
        let now = word.load(Ordering::Acquire);
        if now == wanted {
            return;
        }
        // SAFETY: the word lives as long as the scope of both threads.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, now, 0)
        };
    }
}

fn tell(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    // SAFETY: as in `wait_for`.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1) };
}

/// A thread on the other CPU is woken and wakes.
fn futex_two_cpus(units: u64) -> u64 {
    futex_between(0, 1, units)
}

/// Two threads, each on its CPU, wake each other in turn.
pub fn futex_between(first: usize, second: usize, units: u64) -> u64 {
    let turn = AtomicU32::new(0);
    let play = |own: u32, cpu: usize| {
        pin(cpu);
        for _ in 0..units {
            wait_for(&turn, own);
            tell(&turn, 1 - own);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| play(1, second));
        scope.spawn(|| play(0, first));
    });
    u64::from(turn.load(Ordering::Relaxed))
}

/// Two CPUs add to the same number, a thousand times each.
fn locked_line(units: u64) -> u64 {
    let number = AtomicU32::new(0);
    let add = |cpu: usize| {
        pin(cpu);
        for _ in 0..units * 1000 {
            number.fetch_add(1, Ordering::SeqCst);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| add(0));
        scope.spawn(|| add(1));
    });
    u64::from(u64::from(number.load(Ordering::Relaxed)) == units * 2000 % (1 << 32))
}

/// A page's protection is taken away and given back while another CPU works in the same address space: each change
/// interrupts the other.
fn shootdown(units: u64) -> u64 {
    let over = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            while over.load(Ordering::Relaxed) == 0 {
                black_box(work(3, 1));
            }
        });
        let changes = scope.spawn(|| {
            pin(0);
            let page = super::system::anonymous(4096);
            for _ in 0..units {
                // SAFETY: the page is this function's; it is written only while that is allowed.
                unsafe {
                    page.write_volatile(1);
                    libc::mprotect(page.cast(), 4096, libc::PROT_READ);
                    libc::mprotect(page.cast(), 4096, libc::PROT_READ | libc::PROT_WRITE);
                }
            }
            // SAFETY: as above.
            unsafe { libc::munmap(page.cast(), 4096) };
        });
        let _ = changes.join();
        over.store(1, Ordering::Relaxed);
    });
    0
}
