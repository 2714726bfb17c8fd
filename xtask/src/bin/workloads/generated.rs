//! Code that is written and run: what compilers at run time, tracers and interpreters with inline caches do.

use super::Workload;
use super::system::anonymous;
use std::hint::black_box;

pub const ALL: &[Workload] = &[
    Workload { group: "generated", name: "fresh_function", run: fresh_function },
    Workload { group: "generated", name: "fresh_blocks", run: fresh_blocks },
    Workload { group: "generated", name: "patched_loop", run: patched_loop },
    Workload { group: "generated", name: "patched_call", run: patched_call },
];

const LENGTH: usize = 64 << 10;

/// Memory that can be written and executed.
struct Code(*mut u8);

impl Code {
    fn new() -> Self {
        let place = anonymous(LENGTH);
        // SAFETY: the mapping was made just now, of this length.
        let done = unsafe {
            libc::mprotect(place.cast(), LENGTH, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
        };
        assert_eq!(done, 0, "this system lets no program write code");
        Self(place)
    }

    fn write(&self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= LENGTH);
        // SAFETY: inside the mapping. Volatile: what is executed is no data to the compiler.
        code.iter().enumerate().for_each(|(i, &byte)| unsafe { self.0.add(at + i).write_volatile(byte) });
    }

    /// Calls the function at `at` with a number.
    fn call(&self, at: usize, with: u64) -> u64 {
        // SAFETY: what the workloads write are functions of this kind, and the jump orders the writes before them.
        let function: extern "sysv64" fn(u64) -> u64 = unsafe { std::mem::transmute(self.0.add(at)) };
        black_box(function(with))
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: nobody else knows the mapping.
        unsafe { libc::munmap(self.0.cast(), LENGTH) };
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
