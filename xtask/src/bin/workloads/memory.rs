//! Bytes: copying, filling, searching, as the C library does it with the widest instructions that CPUID offers, and string
//! instructions, as the kernel does it.

use super::{Numbers, Workload};
use std::arch::asm;
use std::ffi::CString;
use std::hint::black_box;
use std::sync::Mutex;

pub const ALL: &[Workload] = &[
    Workload { group: "memory", name: "memcpy_small", run: memcpy_small },
    Workload { group: "memory", name: "memcpy_large", run: memcpy_large },
    Workload { group: "memory", name: "memset", run: memset },
    Workload { group: "memory", name: "strlen", run: strlen },
    Workload { group: "memory", name: "memchr", run: memchr },
    Workload { group: "memory", name: "rep_movs", run: rep_movs },
    Workload { group: "memory", name: "rep_stos", run: rep_stos },
    Workload { group: "memory", name: "random_access", run: random_access },
    Workload { group: "memory", name: "short_strings", run: short_strings },
];

/// 256 copies of 8 to 71 bytes.
fn memcpy_small(units: u64) -> u64 {
    let from = [0x5au8; 128];
    let mut to = [0u8; 128];
    for _ in 0..units {
        for length in 0..256usize {
            let length = black_box(8 + length % 64);
            to[..length].copy_from_slice(&black_box(&from)[..length]);
            black_box(&mut to);
        }
    }
    u64::from(to[70])
}

/// A copy of 1 MiB.
fn memcpy_large(units: u64) -> u64 {
    let from = vec![0x3cu8; 1 << 20];
    let mut to = vec![0u8; 1 << 20];
    for _ in 0..units {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    }
    u64::from(to[12345])
}

/// 64 KiB filled.
fn memset(units: u64) -> u64 {
    let mut to = vec![0u8; 64 << 10];
    for _ in 0..units {
        to.fill(black_box(0xa5));
        black_box(&mut to);
    }
    u64::from(to[777])
}

/// The length of a string of 4000 bytes, by the C library.
fn strlen(units: u64) -> u64 {
    let text = CString::new(vec![b'x'; 4000]).unwrap_or_default();
    let mut length = 0;
    for _ in 0..units {
        // SAFETY: `text` is a C string that outlives the call.
        length = black_box(unsafe { libc::strlen(black_box(text.as_ptr())) });
    }
    length as u64
}

/// The last of 4096 bytes is found, by the C library.
fn memchr(units: u64) -> u64 {
    let mut bytes = vec![b'x'; 4096];
    bytes[4095] = b'y';
    let mut found = 0;
    for _ in 0..units {
        // SAFETY: the range is `bytes` itself.
        let place = unsafe { libc::memchr(black_box(bytes.as_ptr()).cast(), i32::from(b'y'), bytes.len()) };
        found = black_box(place as usize - bytes.as_ptr() as usize);
    }
    found as u64
}

/// 4 KiB copied by one instruction.
fn rep_movs(units: u64) -> u64 {
    let from = vec![0x11u8; 4096];
    let mut to = vec![0u8; 4096];
    for _ in 0..units {
        // SAFETY: 4096 bytes are there on both sides, which do not overlap; the direction flag is clear in Rust code.
        unsafe {
            asm!("rep movsb", inout("rcx") 4096usize => _, inout("rsi") from.as_ptr() => _, inout("rdi") to.as_mut_ptr() => _,
                options(nostack, preserves_flags));
        }
        black_box(&mut to);
    }
    u64::from(to[4095])
}

/// A page cleared by one instruction.
fn rep_stos(units: u64) -> u64 {
    let mut to = vec![1u8; 4096];
    for _ in 0..units {
        // SAFETY: 4096 bytes are there; the direction flag is clear in Rust code.
        unsafe {
            asm!("rep stosq", inout("rcx") 512usize => _, inout("rdi") to.as_mut_ptr() => _, in("rax") 0u64,
                options(nostack, preserves_flags));
        }
        black_box(&mut to);
    }
    u64::from(to[4095])
}

/// 4096 reads and writes all over 32 MiB: more pages than a TLB knows.
fn random_access(units: u64) -> u64 {
    const WORDS: usize = 4 << 20;
    static ALL: Mutex<Vec<u64>> = Mutex::new(Vec::new());
    let Ok(mut words) = ALL.lock() else { return 0 };
    if words.is_empty() {
        words.extend(0..WORDS as u64);
    }
    let words = &mut *words;
    let mut last = 0;
    for _ in 0..units {
        let mut numbers = Numbers(3);
        last = 0;
        for _ in 0..4096 {
            let word = &mut black_box(&mut *words)[numbers.draw() as usize % WORDS];
            last ^= *word;
            *word ^= 1;
        }
        // The second time over undoes the first.
        let mut numbers = Numbers(3);
        for _ in 0..4096 {
            black_box(&mut *words)[numbers.draw() as usize % WORDS] ^= 1;
        }
    }
    last
}

/// 256 comparisons and copies of words of 3 to 18 letters, by the C library.
fn short_strings(units: u64) -> u64 {
    let words: Vec<CString> = (0..256u32)
        .map(|i| CString::new(vec![b'a' + (i % 5) as u8; 3 + i as usize % 16]).unwrap_or_default())
        .collect();
    let mut place = [0u8; 64];
    let mut smaller = 0;
    for _ in 0..units {
        smaller = 0;
        for pair in black_box(&words).windows(2) {
            // SAFETY: C strings of at most 19 bytes, and room for 64.
            unsafe {
                smaller += u64::from(libc::strcmp(pair[0].as_ptr(), pair[1].as_ptr()) < 0);
                libc::strcpy(place.as_mut_ptr().cast(), pair[0].as_ptr());
            }
            black_box(&mut place);
        }
    }
    smaller
}
