//! Cryptography and checksums: the instructions that CPUs have for them, and the algorithms that do without.

use super::Workload;
use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_aesenc_si128, _mm_aesenclast_si128, _mm_alignr_epi8, _mm_blend_epi16,
    _mm_clmulepi64_si128, _mm_crc32_u64, _mm_cvtsi128_si64, _mm_loadu_si128, _mm_set_epi64x,
    _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi32,
    _mm_srli_si128, _mm_storeu_si128, _mm_xor_si128,
};
use std::hint::black_box;

pub const ALL: &[Workload] = &[
    Workload { group: "crypto", name: "aes_ni", run: aes },
    Workload { group: "crypto", name: "pclmul", run: pclmul },
    Workload { group: "crypto", name: "sha_ni", run: sha },
    Workload { group: "crypto", name: "crc32c", run: crc32c },
    Workload { group: "crypto", name: "chacha20", run: chacha20 },
    Workload { group: "crypto", name: "md5", run: md5 },
];

/// Whether this CPU has the instructions of the workload; one that it has not is left out.
pub fn offered(name: &str) -> bool {
    match name {
        "aes_ni" => is_x86_feature_detected!("aes"),
        "pclmul" => is_x86_feature_detected!("pclmulqdq"),
        "sha_ni" => is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1"),
        "crc32c" => is_x86_feature_detected!("sse4.2"),
        _ => true,
    }
}

/// Bytes that one unit of work goes over.
const LENGTH: usize = 4096;

fn data() -> Vec<u8> {
    (0..LENGTH).map(|i| (i * 7 + i / 256) as u8).collect()
}

/// 4 KiB in AES-128's counter mode, four blocks at a time as libraries do. (The round keys are no key's: it takes as long.)
fn aes(units: u64) -> u64 {
    let mut text = data();
    for _ in 0..units {
        text = data();
        // SAFETY: `measure` has asked `offered`.
        unsafe { aes_counter(black_box(&mut text)) };
        black_box(&mut text);
    }
    text.iter().map(|&byte| u64::from(byte)).sum()
}

#[target_feature(enable = "aes")]
fn aes_counter(text: &mut [u8]) {
    let keys: [__m128i; 11] = std::array::from_fn(|i| _mm_set_epi64x(i as i64 * 0x1234_5678_9abc, i as i64));
    let mut counter = 0;
    for blocks in text.chunks_exact_mut(64) {
        let mut state = [_mm_setzero_si128(); 4];
        for lane in &mut state {
            *lane = _mm_xor_si128(_mm_set_epi64x(0x0102_0304, counter), keys[0]);
            counter += 1;
        }
        for key in &keys[1..10] {
            for lane in &mut state {
                *lane = _mm_aesenc_si128(*lane, *key);
            }
        }
        for (lane, block) in state.iter().zip(blocks.chunks_exact_mut(16)) {
            let stream = _mm_aesenclast_si128(*lane, keys[10]);
            // SAFETY: the chunk has 16 bytes.
            unsafe {
                let text = _mm_loadu_si128(block.as_ptr().cast());
                _mm_storeu_si128(block.as_mut_ptr().cast(), _mm_xor_si128(text, stream));
            }
        }
    }
}

/// 4 KiB folded by carry-less products, as CRCs and GHASH are.
fn pclmul(units: u64) -> u64 {
    let text = data();
    let mut last = 0;
    for _ in 0..units {
        // SAFETY: `measure` has asked `offered`.
        last = unsafe { fold(black_box(&text)) };
    }
    last
}

#[target_feature(enable = "pclmulqdq")]
fn fold(text: &[u8]) -> u64 {
    let factors = _mm_set_epi64x(0x1_7519_97d0, 0xccaa_009e);
    let mut sum = _mm_set_epi64x(1, 2);
    for block in text.chunks_exact(16) {
        // SAFETY: the chunk has 16 bytes.
        let next = unsafe { _mm_loadu_si128(block.as_ptr().cast()) };
        let low = _mm_clmulepi64_si128::<0x00>(sum, factors);
        let high = _mm_clmulepi64_si128::<0x11>(sum, factors);
        sum = _mm_xor_si128(_mm_xor_si128(low, high), next);
    }
    (_mm_cvtsi128_si64(sum) ^ _mm_cvtsi128_si64(_mm_srli_si128::<8>(sum))) as u64
}

/// The round constants' first sixteen, used in all four quarters: as much work as SHA-256.
const ROUNDS: [u32; 16] = [
    0x428a_2f98,
    0x7137_4491,
    0xb5c0_fbcf,
    0xe9b5_dba5,
    0x3956_c25b,
    0x59f1_11f1,
    0x923f_82a4,
    0xab1c_5ed5,
    0xd807_aa98,
    0x1283_5b01,
    0x2431_85be,
    0x550c_7dc3,
    0x72be_5d74,
    0x80de_b1fe,
    0x9bdc_06a7,
    0xc19b_f174,
];

/// SHA-256's rounds over 4 KiB by the CPU's instructions.
fn sha(units: u64) -> u64 {
    let text = data();
    let mut last = 0;
    for _ in 0..units {
        // SAFETY: `measure` has asked `offered`.
        last = unsafe { sha_rounds(black_box(&text)) };
    }
    last
}

#[target_feature(enable = "sha,sse4.1")]
fn sha_rounds(text: &[u8]) -> u64 {
    let mut state = (_mm_set_epi64x(1, 2), _mm_set_epi64x(3, 4));
    for block in text.chunks_exact(64) {
        let mut words = [_mm_setzero_si128(); 4];
        for (word, part) in words.iter_mut().zip(block.chunks_exact(16)) {
            // SAFETY: the chunk has 16 bytes.
            *word = unsafe { _mm_loadu_si128(part.as_ptr().cast()) };
        }
        for round in 0..16 {
            // SAFETY: four constants from a multiple of four below sixteen on.
            let constants = unsafe { _mm_loadu_si128(ROUNDS.as_ptr().add(round % 4 * 4).cast()) };
            let sum = _mm_add_epi32(words[0], constants);
            state.1 = _mm_sha256rnds2_epu32(state.1, state.0, sum);
            state.0 = _mm_sha256rnds2_epu32(state.0, state.1, _mm_shuffle_epi32::<0x0e>(sum));
            let part = _mm_add_epi32(
                _mm_sha256msg1_epu32(words[0], words[1]),
                _mm_alignr_epi8::<4>(words[3], words[2]),
            );
            words = [words[1], words[2], words[3], _mm_sha256msg2_epu32(part, words[3])];
        }
        state.0 = _mm_blend_epi16::<0xf0>(state.0, state.1);
    }
    _mm_cvtsi128_si64(state.0) as u64
}

/// CRC-32C of 4 KiB by the CPU's instruction, a chain of dependent steps.
fn crc32c(units: u64) -> u64 {
    let text = data();
    let mut last = 0;
    for _ in 0..units {
        // SAFETY: `measure` has asked `offered`.
        last = unsafe { crc32c_steps(black_box(&text)) };
    }
    last
}

#[target_feature(enable = "sse4.2")]
fn crc32c_steps(text: &[u8]) -> u64 {
    let words = text.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_le_bytes));
    words.fold(u64::from(u32::MAX), |crc, word| _mm_crc32_u64(crc, word))
}

/// ChaCha20's key stream over 4 KiB, in general registers and whatever the compiler makes of it (RFC 8439, 2.3).
fn chacha20(units: u64) -> u64 {
    let mut sum = 0;
    for _ in 0..units {
        sum = 0;
        let mut input: [u32; 16] = std::array::from_fn(|i| 0x6170_7865u32.wrapping_mul(i as u32 + 1));
        for block in 0..(LENGTH / 64) as u32 {
            input[12] = block;
            let input = black_box(&input);
            let mut x = *input;
            for _ in 0..10 {
                for [a, b, c, d] in QUARTERS {
                    quarter(&mut x, a, b, c, d);
                }
            }
            for (word, first) in x.iter().zip(input) {
                sum = u64::rotate_left(sum, 1) ^ u64::from(word.wrapping_add(*first));
            }
        }
    }
    sum
}

const QUARTERS: [[usize; 4]; 8] = [
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
    [0, 5, 10, 15],
    [1, 6, 11, 12],
    [2, 7, 8, 13],
    [3, 4, 9, 14],
];

#[inline(always)]
fn quarter(x: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    for (left, right, turn, add) in [(d, a, 16, b), (b, c, 12, d), (d, a, 8, b), (b, c, 7, d)] {
        x[right] = x[right].wrapping_add(x[add]);
        x[left] = (x[left] ^ x[right]).rotate_left(turn);
    }
}

/// MD5's rounds over 4 KiB (RFC 1321, 3.4): one long chain of dependent operations.
fn md5(units: u64) -> u64 {
    let text = data();
    let sines: [u32; 64] = std::array::from_fn(|i| ((i as f64 + 1.0).sin().abs() * 4_294_967_296.0) as u32);
    let mut state = [0u32; 4];
    for _ in 0..units {
        state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
        for block in black_box(&text).chunks_exact(64) {
            let words: [u32; 16] = std::array::from_fn(|i| {
                block[i * 4..i * 4 + 4].iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))
            });
            state = md5_block(state, &words, &sines);
        }
    }
    u64::from(state[0]) << 32 | u64::from(state[1])
}

fn md5_block(state: [u32; 4], words: &[u32; 16], sines: &[u32; 64]) -> [u32; 4] {
    const TURNS: [[u32; 4]; 4] = [[7, 12, 17, 22], [5, 9, 14, 20], [4, 11, 16, 23], [6, 10, 15, 21]];
    let [mut a, mut b, mut c, mut d] = state;
    for step in 0..64 {
        let (mixed, word) = match step / 16 {
            0 => ((b & c) | (!b & d), step),
            1 => ((d & b) | (!d & c), (5 * step + 1) % 16),
            2 => (b ^ c ^ d, (3 * step + 5) % 16),
            _ => (c ^ (b | !d), (7 * step) % 16),
        };
        let sum = a.wrapping_add(mixed).wrapping_add(sines[step]).wrapping_add(words[word]);
        (a, d, c) = (d, c, b);
        b = b.wrapping_add(sum.rotate_left(TURNS[step / 16][step % 4]));
    }
    [state[0].wrapping_add(a), state[1].wrapping_add(b), state[2].wrapping_add(c), state[3].wrapping_add(d)]
}
