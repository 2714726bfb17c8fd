//! What costs most in a guest: system calls, processes, faults, signals; and the little that an init must do.

use super::Workload;
use std::hint::black_box;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

pub const ALL: &[Workload] = &[
    Workload { group: "system", name: "getpid", run: getpid },
    Workload { group: "system", name: "open_read_close", run: open_read_close },
    Workload { group: "system", name: "fork_wait", run: fork_wait },
    Workload { group: "system", name: "fork_exec", run: fork_exec },
    Workload { group: "system", name: "pipe_ping_pong", run: pipe_ping_pong },
    Workload { group: "system", name: "page_faults", run: page_faults },
    Workload { group: "system", name: "map_unmap", run: map_unmap },
    Workload { group: "system", name: "signals", run: signals },
    Workload { group: "system", name: "thread", run: thread },
    Workload { group: "system", name: "read_write", run: read_write },
    Workload { group: "system", name: "clock", run: clock },
    Workload { group: "system", name: "segv", run: segv },
    Workload { group: "system", name: "first_touch", run: first_touch },
    Workload { group: "system", name: "futex_ping_pong", run: futex_ping_pong },
];

/// The argument with which this program does nothing, for fork_exec.
pub const NOTHING: &str = "--nothing";
const OWN_PROGRAM: &std::ffi::CStr = c"/proc/self/exe";

/// Mounts /proc; answers the workloads that the kernel's command line names (`workloads=A,B`).
pub fn prepare_as_init() -> Vec<String> {
    for (kind, place) in [(c"proc", c"/proc"), (c"tmpfs", c"/tmp"), (c"devtmpfs", c"/dev")] {
        // SAFETY: four C strings, no data; failure shows as missing files.
        unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    }
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let names = line.split_whitespace().find_map(|word| word.strip_prefix("workloads="));
    names.map(|names| names.split(',').map(str::to_owned).collect()).unwrap_or_default()
}

/// Ends the guest.
pub fn power_off() {
    // SAFETY: no memory is passed.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
}

/// The cheapest system call.
fn getpid(units: u64) -> u64 {
    for _ in 0..units {
        // SAFETY: no memory is passed.
        black_box(unsafe { libc::syscall(libc::SYS_getppid) });
    }
    0
}

/// A small file opened, read, closed.
fn open_read_close(units: u64) -> u64 {
    let path = "/tmp/yado-workload";
    if std::fs::write(path, [7u8; 100]).is_err() {
        return u64::MAX;
    }
    let mut length = 0;
    for _ in 0..units {
        length = std::fs::read(path).map_or(0, |bytes| bytes.len() as u64);
    }
    let _ = std::fs::remove_file(path);
    length
}

fn child_of(work: impl FnOnce()) {
    // SAFETY: this program has one thread here; the child only does `work`, which makes system calls, and leaves.
    unsafe {
        match libc::fork() {
            0 => {
                work();
                libc::_exit(9);
            }
            -1 => {}
            child => {
                libc::waitpid(child, null_mut(), 0);
            }
        }
    }
}

/// A process made and waited for.
fn fork_wait(units: u64) -> u64 {
    for _ in 0..units {
        child_of(|| {});
    }
    0
}

/// A process made, another program started in it, and waited for.
fn fork_exec(units: u64) -> u64 {
    let arguments = [OWN_PROGRAM.as_ptr(), c"--nothing".as_ptr(), std::ptr::null()];
    for _ in 0..units {
        // SAFETY: the list of arguments ends with null.
        child_of(|| unsafe {
            libc::execv(OWN_PROGRAM.as_ptr(), arguments.as_ptr());
        });
    }
    0
}

/// A byte to another process and back: two switches of processes.
fn pipe_ping_pong(units: u64) -> u64 {
    let mut there = [0; 2];
    let mut back = [0; 2];
    let mut byte = 1u8;
    // SAFETY: the arrays are as large as pipe() wants; the child only reads, writes, and leaves when its pipe closes.
    unsafe {
        if libc::pipe(there.as_mut_ptr()) != 0 || libc::pipe(back.as_mut_ptr()) != 0 {
            return u64::MAX;
        }
        let child = libc::fork();
        if child == 0 {
            libc::close(there[1]);
            while libc::read(there[0], (&raw mut byte).cast(), 1) == 1 {
                byte = byte.wrapping_add(1);
                libc::write(back[1], (&raw const byte).cast(), 1);
            }
            libc::_exit(0);
        }
        for _ in 0..units {
            byte = 1;
            libc::write(there[1], (&raw const byte).cast(), 1);
            libc::read(back[0], (&raw mut byte).cast(), 1);
        }
        for file in [there[0], there[1], back[0], back[1]] {
            libc::close(file);
        }
        libc::waitpid(child, null_mut(), 0);
    }
    u64::from(byte)
}

/// New memory, read and write.
pub fn anonymous(bytes: usize) -> *mut u8 {
    // SAFETY: a new mapping anywhere.
    let place = unsafe {
        libc::mmap(
            null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    place.cast()
}

/// 64 pages touched for the first time.
fn page_faults(units: u64) -> u64 {
    const BYTES: usize = 64 * 4096;
    let place = anonymous(BYTES);
    for _ in 0..units {
        // SAFETY: the mapping is this function's and as large as is touched; DONTNEED makes its pages new again.
        unsafe {
            for page in 0..64 {
                place.add(page * 4096).write_volatile(1);
            }
            libc::madvise(place.cast(), BYTES, libc::MADV_DONTNEED);
        }
    }
    // SAFETY: as above; nobody uses it any more.
    unsafe { libc::munmap(place.cast(), BYTES) };
    0
}

/// A mapping made, touched and removed.
fn map_unmap(units: u64) -> u64 {
    for _ in 0..units {
        let place = anonymous(4096);
        // SAFETY: the page was mapped just now.
        unsafe {
            place.write_volatile(1);
            libc::munmap(place.cast(), 4096);
        }
    }
    0
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// A signal to itself, handled.
fn signals(units: u64) -> u64 {
    SIGNALS.store(0, Ordering::Relaxed);
    // SAFETY: the handler only adds to an atomic number.
    unsafe {
        libc::signal(libc::SIGUSR1, count as *const () as libc::sighandler_t);
        for _ in 0..units {
            libc::raise(libc::SIGUSR1);
        }
    }
    u64::from(SIGNALS.load(Ordering::Relaxed) == units)
}

/// A thread made and joined.
fn thread(units: u64) -> u64 {
    (0..units).fold(0, |_, _| std::thread::spawn(|| 5u64).join().unwrap_or_default())
}

/// 4 KiB into a pipe and out again.
fn read_write(units: u64) -> u64 {
    let mut pipe = [0; 2];
    let mut page = [0x77u8; 4096];
    let mut count = 0;
    // SAFETY: the array is as large as pipe() wants; the pipe holds the page, which is this function's.
    unsafe {
        if libc::pipe(pipe.as_mut_ptr()) != 0 {
            return u64::MAX;
        }
        for _ in 0..units {
            libc::write(pipe[1], page.as_ptr().cast(), page.len());
            count = libc::read(pipe[0], page.as_mut_ptr().cast(), page.len()) as u64;
        }
        libc::close(pipe[0]);
        libc::close(pipe[1]);
    }
    count
}

/// The time, which needs no system call where the clock is good.
fn clock(units: u64) -> u64 {
    let start = std::time::Instant::now();
    for _ in 0..units {
        black_box(std::time::Instant::now());
    }
    u64::from(start.elapsed().as_nanos() > 0)
}

static PAGE: AtomicU64 = AtomicU64::new(0);

/// Makes the page writable that the program has just failed to write.
extern "C" fn allow(_: i32) {
    let page = PAGE.load(Ordering::Relaxed) as *mut libc::c_void;
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: `segv` has mapped the page, and keeps it.
    unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE) };
}

/// A write to a protected page: a fault, a signal, the page made writable, the write once more.
fn segv(units: u64) -> u64 {
    let page = anonymous(4096);
    PAGE.store(page as u64, Ordering::Relaxed);
    SIGNALS.store(0, Ordering::Relaxed);
    // SAFETY: the handler makes a system call and adds to an atomic number; it is taken away before the page is.
    unsafe {
        libc::signal(libc::SIGSEGV, allow as *const () as libc::sighandler_t);
        for _ in 0..units {
            libc::mprotect(page.cast(), 4096, libc::PROT_READ);
            page.write_volatile(1);
        }
        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        libc::munmap(page.cast(), 4096);
    }
    u64::from(SIGNALS.load(Ordering::Relaxed) == units)
}

/// 32 MiB of new memory, written once, and given back.
fn first_touch(units: u64) -> u64 {
    const BYTES: usize = 32 << 20;
    for _ in 0..units {
        let place = anonymous(BYTES);
        // SAFETY: the mapping was made just now, of this size.
        unsafe {
            for at in (0..BYTES).step_by(4096) {
                place.add(at).write_volatile(1);
            }
            libc::munmap(place.cast(), BYTES);
        }
    }
    0
}

/// Two threads on one CPU wake each other: switches within one process.
fn futex_ping_pong(units: u64) -> u64 {
    super::parallel::futex_between(0, 0, units)
}
