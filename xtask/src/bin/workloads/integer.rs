//! General registers: loops, tables, sorting, hashing, calls, an interpreter, long arithmetic.

use super::{Numbers, Workload};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::hint::black_box;

pub const ALL: &[Workload] = &[
    Workload { group: "integer", name: "loop", run: plain_loop },
    Workload { group: "integer", name: "crc32", run: crc32 },
    Workload { group: "integer", name: "sort", run: sort },
    Workload { group: "integer", name: "hash_map", run: hash_map },
    Workload { group: "integer", name: "calls", run: calls },
    Workload { group: "integer", name: "indirect_calls", run: indirect_calls },
    Workload { group: "integer", name: "interpreter", run: interpreter },
    Workload { group: "integer", name: "pointer_chase", run: pointer_chase },
    Workload { group: "integer", name: "long_multiply", run: long_multiply },
    Workload { group: "integer", name: "sha256_scalar", run: sha256 },
    Workload { group: "integer", name: "divide", run: divide },
    Workload { group: "integer", name: "locked_add", run: locked_add },
    Workload { group: "integer", name: "binary_search", run: binary_search },
];

/// 4096 dependent steps of shifts, adds and xors.
fn plain_loop(units: u64) -> u64 {
    let mut last = 0;
    for _ in 0..units {
        let mut x = black_box(88_172_645_463_325_252_u64);
        for i in 0..4096 {
            x ^= x << 13;
            x ^= x >> 7;
            x = (x ^ (x << 17)).wrapping_add(i);
        }
        last = black_box(x);
    }
    last
}

/// CRC-32 of 4 KiB, a byte at a time by table.
fn crc32(units: u64) -> u64 {
    let mut table = [0u32; 256];
    for (index, entry) in table.iter_mut().enumerate() {
        *entry = (0..8).fold(index as u32, |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()));
    }
    let data: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    let mut last = 0;
    for _ in 0..units {
        let crc = black_box(&data)
            .iter()
            .fold(!0u32, |crc, byte| table[usize::from(crc as u8 ^ byte)] ^ (crc >> 8));
        last = u64::from(black_box(!crc));
    }
    last
}

/// Sorts 4096 numbers.
fn sort(units: u64) -> u64 {
    let mut numbers = Numbers(1);
    let data: Vec<u64> = (0..4096).map(|_| numbers.draw()).collect();
    let mut last = 0;
    for _ in 0..units {
        let mut copy = data.clone();
        black_box(&mut copy).sort_unstable();
        last = copy[2048];
    }
    last
}

#[derive(Default)]
struct Multiplicative(u64);

impl Hasher for Multiplicative {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// 1024 insertions into a hash map, then 1024 look-ups.
fn hash_map(units: u64) -> u64 {
    let mut last = 0;
    for _ in 0..units {
        let mut map: HashMap<u64, u64, BuildHasherDefault<Multiplicative>> = HashMap::default();
        for i in 0..1024u64 {
            map.insert(black_box(i * 977), i);
        }
        last = (0..1024u64).map(|i| map[&black_box(i * 977)]).sum();
    }
    last
}

#[inline(never)]
fn fibonacci(n: u64) -> u64 {
    if n < 2 { n } else { fibonacci(black_box(n - 1)) + fibonacci(black_box(n - 2)) }
}

/// Recursion: fibonacci(18), about 8,400 calls and returns.
fn calls(units: u64) -> u64 {
    (0..units).fold(0, |_, _| fibonacci(black_box(18)))
}

trait Step {
    fn step(&self, x: u64) -> u64;
}
struct Add(u64);
struct Rotate(u32);
struct Multiply(u64);
impl Step for Add {
    fn step(&self, x: u64) -> u64 {
        x.wrapping_add(self.0)
    }
}
impl Step for Rotate {
    fn step(&self, x: u64) -> u64 {
        x.rotate_left(self.0)
    }
}
impl Step for Multiply {
    fn step(&self, x: u64) -> u64 {
        x.wrapping_mul(self.0)
    }
}

/// 1024 calls through tables of functions, targets in no simple order.
fn indirect_calls(units: u64) -> u64 {
    let mut numbers = Numbers(3);
    let steps: Vec<Box<dyn Step>> = (0..1024)
        .map(|_| match numbers.draw() % 3 {
            0 => Box::new(Add(numbers.draw())) as Box<dyn Step>,
            1 => Box::new(Rotate(7)),
            _ => Box::new(Multiply(numbers.draw() | 1)),
        })
        .collect();
    let mut last = 0;
    for _ in 0..units {
        last = black_box(&steps).iter().fold(1, |x, step| step.step(x));
    }
    last
}

/// A bytecode interpreter: 1000 rounds of a five-instruction loop.
fn interpreter(units: u64) -> u64 {
    const PROGRAM: [u8; 6] = [0, 1, 2, 3, 4, 5];
    let mut last = 0;
    for _ in 0..units {
        let (mut a, mut b, mut left, mut at) = (1u64, 7u64, 1000u32, 0usize);
        last = loop {
            match black_box(PROGRAM[at]) {
                0 => a = a.wrapping_add(b),
                1 => b = b.rotate_left(3) ^ a,
                2 => a = a.wrapping_mul(31),
                3 => b = b.wrapping_sub(a >> 3),
                4 => left -= 1,
                _ => {
                    if left == 0 {
                        break a ^ b;
                    }
                    at = 0;
                    continue;
                }
            }
            at += 1;
        };
    }
    last
}

/// 4096 dependent loads through 256 KiB in random order.
fn pointer_chase(units: u64) -> u64 {
    const CELLS: usize = 32 << 10;
    let mut next: Vec<usize> = (0..CELLS).collect();
    let mut numbers = Numbers(5);
    // Sattolo's shuffle: one cycle through all cells.
    for i in (1..CELLS).rev() {
        next.swap(i, (numbers.draw() % i as u64) as usize);
    }
    let mut last = 0;
    for _ in 0..units {
        let mut at = 0;
        for _ in 0..4096 {
            at = next[at];
        }
        last = black_box(at as u64);
    }
    last
}

/// Product of two 2048-bit numbers, as RSA does it: multiply, add, carry.
fn long_multiply(units: u64) -> u64 {
    let mut numbers = Numbers(7);
    let a: Vec<u64> = (0..32).map(|_| numbers.draw()).collect();
    let b: Vec<u64> = (0..32).map(|_| numbers.draw()).collect();
    let mut last = 0;
    for _ in 0..units {
        let (a, b) = (black_box(&a), black_box(&b));
        let mut product = [0u64; 64];
        for (i, x) in a.iter().enumerate() {
            let mut carry = 0u128;
            for (j, y) in b.iter().enumerate() {
                carry += u128::from(*x) * u128::from(*y) + u128::from(product[i + j]);
                product[i + j] = carry as u64;
                carry >>= 64;
            }
            product[i + 32] = carry as u64;
        }
        last = black_box(product).iter().fold(0, |sum, word| sum ^ word);
    }
    last
}

/// The compression function of SHA-256 (FIPS 180-4, section 6.2.2) on 64 blocks, without the CPU's own instructions for it.
fn sha256(units: u64) -> u64 {
    let constants = sha256_constants();
    let mut last = 0;
    for _ in 0..units {
        let mut state: [u32; 8] = [
            0x6a09_e667,
            0xbb67_ae85,
            0x3c6e_f372,
            0xa54f_f53a,
            0x510e_527f,
            0x9b05_688c,
            0x1f83_d9ab,
            0x5be0_cd19,
        ];
        for block in 0..64u32 {
            compress(&mut state, black_box(block), &constants);
        }
        last = u64::from(state[0]) << 32 | u64::from(state[7]);
    }
    last
}

/// The first 32 bits of the fractional parts of the cube roots of the first 64 primes, computed with integers.
fn sha256_constants() -> [u32; 64] {
    let mut constants = [0; 64];
    let primes = (2u128..).filter(|n| (2..*n).take_while(|d| d * d <= *n).all(|d| n % d != 0));
    for (constant, prime) in constants.iter_mut().zip(primes) {
        // Largest r with r^3 <= prime * 2^96, so that r is the cube root times 2^32.
        let (mut low, mut high) = (0u128, 1u128 << 36);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if middle * middle * middle <= prime << 96 {
                low = middle;
            } else {
                high = middle;
            }
        }
        *constant = low as u32;
    }
    constants
}

fn compress(state: &mut [u32; 8], block: u32, constants: &[u32; 64]) {
    let mut w = [0u32; 64];
    for (i, word) in w.iter_mut().take(16).enumerate() {
        *word = block.wrapping_mul(0x9e37_79b9).wrapping_add(i as u32);
    }
    for i in 16..64 {
        let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ (w[i - 15] >> 3);
        let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for i in 0..64 {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let t1 = h.wrapping_add(s1).wrapping_add(choice).wrapping_add(constants[i]).wrapping_add(w[i]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t2 = s0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
    }
    for (word, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(value);
    }
}

/// 1000 divisions of 64 bits, each of the last one's remainder.
fn divide(units: u64) -> u64 {
    let mut last = 0;
    for _ in 0..units {
        let mut x = black_box(0xfedc_ba98_7654_3210u64);
        for i in 1..=1000u64 {
            let divisor = black_box(i * 12_345_677);
            x = (x / divisor).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (x % divisor);
        }
        last = x;
    }
    last
}

/// 1000 atomic additions and exchanges.
fn locked_add(units: u64) -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    let number = AtomicU64::new(0);
    for _ in 0..units {
        number.store(0, Ordering::Relaxed);
        for i in 0..501u64 {
            let before = number.fetch_add(i, Ordering::SeqCst);
            let _ = number.compare_exchange(before + i, before ^ i, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
    number.into_inner()
}

/// 256 searches in 65536 sorted numbers: branches that cannot be foreseen.
fn binary_search(units: u64) -> u64 {
    let sorted: Vec<u64> = (0..65536u64).map(|i| i * i).collect();
    let mut sum = 0;
    for _ in 0..units {
        let mut numbers = Numbers(7);
        sum = 0;
        for _ in 0..256 {
            let wanted = numbers.draw() >> 32;
            let place = match black_box(&sorted).binary_search(&wanted) {
                Ok(place) | Err(place) => place,
            };
            sum += place as u64;
        }
    }
    sum
}
