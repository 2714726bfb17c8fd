//! Code that is written and run: what compilers at run time, tracers and interpreters with inline caches do.

use super::Workload;
use super::system::anonymous;
use std::hint::black_box;

pub const ALL: &[Workload] = &[
    Workload { group: "generated", name: "fresh_function", run: fresh_function },
    Workload { group: "generated", name: "fresh_blocks", run: fresh_blocks },
    Workload { group: "generated", name: "patched_loop", run: patched_loop },
    Workload { group: "generated", name: "patched_call", run: patched_call },
    Workload { group: "integer", name: "large_program", run: large_program },
];

/// Memory that can be written and executed.
struct Code {
    place: *mut u8,
    length: usize,
}

impl Code {
    fn new() -> Self {
        Self::of(64 << 10)
    }

    fn of(length: usize) -> Self {
        let code = Self { place: anonymous(length), length };
        code.allow(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        code
    }

    fn allow(&self, protection: i32) {
        // SAFETY: the mapping is this struct's, of this length.
        let done = unsafe { libc::mprotect(self.place.cast(), self.length, protection) };
        assert_eq!(done, 0, "this system lets no program write code");
    }

    fn write(&self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= self.length);
        // SAFETY: inside the mapping. Volatile: what is executed is no data to the compiler.
        code.iter().enumerate().for_each(|(i, &byte)| unsafe { self.place.add(at + i).write_volatile(byte) });
    }

    /// Calls the function at `at` with a number.
    fn call(&self, at: usize, with: u64) -> u64 {
        // SAFETY: what the workloads write are functions of this kind, and the jump orders the writes before them.
        let function: extern "sysv64" fn(u64) -> u64 = unsafe { std::mem::transmute(self.place.add(at)) };
        black_box(function(with))
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: nobody else knows the mapping.
        unsafe { libc::munmap(self.place.cast(), self.length) };
    }
}

/// `lea eax, [rdi + number]; ret`
fn adder(number: u32) -> [u8; 7] {
    let [a, b, c, d] = number.to_le_bytes();
    [0x8d, 0x87, a, b, c, d, 0xc3]
}

/// A function of two instructions written at the same place and called, a hundred times.
fn fresh_function(units: u64) -> u64 {
    let code = Code::new();
    let mut sum = 0;
    for _ in 0..units {
        sum = 0;
        for number in 0..100 {
            code.write(0, &adder(number));
            sum = code.call(0, sum);
        }
    }
    sum
}

/// A thousand blocks that branch to one another, written anew and run once.
fn fresh_blocks(units: u64) -> u64 {
    const BLOCKS: usize = 1000;
    let code = Code::new();
    let mut sum = 0;
    for _ in 0..units {
        code.write(0, &[0x89, 0xf8]); // mov eax, edi
        for block in 0..BLOCKS {
            // add eax, block; test al, 1; jz +2; rol eax, 1
            let [a, b, c, d] = (block as u32 * 7 + 1).to_le_bytes();
            code.write(2 + block * 11, &[0x05, a, b, c, d, 0xa8, 1, 0x74, 2, 0xd1, 0xc0]);
        }
        code.write(2 + BLOCKS * 11, &[0xc3]);
        sum = code.call(0, 1);
    }
    sum
}

/// A loop of a thousand rounds whose constant is patched before each run.
fn patched_loop(units: u64) -> u64 {
    let code = Code::new();
    // xor eax, eax; mov ecx, 1000; again: add eax, constant; rol eax, 3; xor eax, edi; dec ecx; jnz again; ret
    code.write(
        0,
        &[
            0x31, 0xc0, 0xb9, 0xe8, 3, 0, 0, 5, 0, 0, 0, 0, 0xc1, 0xc0, 3, 0x31, 0xf8, 0xff, 0xc9, 0x75,
            0xf2, 0xc3,
        ],
    );
    let mut sum = 0;
    for _ in 0..units {
        sum = 0;
        for constant in 0..8u32 {
            code.write(8, &constant.to_le_bytes());
            sum = code.call(0, sum);
        }
    }
    sum
}

/// A call whose target is patched to and fro between two functions, as inline caches and trampolines are.
fn patched_call(units: u64) -> u64 {
    const FUNCTIONS: [u32; 2] = [0x100, 0x140];
    let code = Code::new();
    code.write(FUNCTIONS[0] as usize, &adder(3));
    code.write(FUNCTIONS[1] as usize, &adder(5));
    // call function; mov edi, eax; call function; ret
    code.write(0, &[0xe8, 0, 0, 0, 0, 0x89, 0xc7, 0xe8, 0, 0, 0, 0, 0xc3]);
    let mut sum = 0;
    for _ in 0..units {
        sum = 0;
        for turn in 0..100 {
            for (at, after) in [(1, 5), (8, 12)] {
                code.write(at, &(FUNCTIONS[turn % 2] - after).to_le_bytes());
            }
            sum = code.call(0, sum);
        }
    }
    sum
}

/// A program of eight megabytes of which every page is run, as compilers and databases are: thousands of functions that lie
/// across the ends of pages as they come.
fn large_program(units: u64) -> u64 {
    const LENGTH: usize = 8 << 20;
    // lea rdi, [rdi + rdi + 1]; mov rax, rdi; shr rax, 7; xor rdi, rax; test dil, 1; jz +4; add rdi, 5; rol rdi, 9; mov r8, rdi
    const PART: [u8; 34] = [
        0x48, 0x8d, 0x7c, 0x3f, 0x01, 0x48, 0x89, 0xf8, 0x48, 0xc1, 0xe8, 0x07, 0x48, 0x31, 0xc7, 0x40, 0xf6,
        0xc7, 0x01, 0x74, 0x04, 0x48, 0x83, 0xc7, 0x05, 0x48, 0xc1, 0xc7, 0x09, 0x49, 0x89, 0xf8, 0x66, 0x90,
    ];
    // mov rax, rdi; ret
    const END: [u8; 4] = [0x48, 0x89, 0xf8, 0xc3];
    const FUNCTION: usize = 3 * PART.len() + END.len();
    const COUNT: usize = LENGTH / FUNCTION;
    thread_local! {
        static PROGRAM: Code = {
            let code = Code::of(LENGTH);
            let function = [&PART[..], &PART, &PART, &END].concat();
            (0..COUNT).for_each(|number| code.write(number * FUNCTION, &function));
            code.allow(libc::PROT_READ | libc::PROT_EXEC);
            code
        };
    }
    PROGRAM.with(|program| {
        let mut sum = 0;
        for _ in 0..units {
            let mut number = 0;
            sum = 0;
            // One in each page, about, in no order.
            for _ in 0..LENGTH / 4096 {
                number = (number + COUNT / 2 + 4099 * 38 + 7) % COUNT;
                sum = program.call(number * FUNCTION, sum);
            }
        }
        sum
    })
}
