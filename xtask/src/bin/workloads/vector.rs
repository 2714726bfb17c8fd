//! Vector registers: products of matrices with SSE2 and AVX2, integer kernels.

use super::Workload;
use std::arch::x86_64::{
    __m128i, __m256, _mm_add_epi8, _mm_add_ps, _mm_loadu_ps, _mm_loadu_si128, _mm_max_epu8, _mm_mul_ps,
    _mm_sad_epu8, _mm_set1_epi8, _mm_set1_ps, _mm_setzero_ps, _mm_setzero_si128, _mm_storeu_ps,
    _mm_storeu_si128, _mm_xor_si128, _mm256_cmpeq_epi8, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_movemask_epi8, _mm256_set1_epi8, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};
use std::hint::black_box;

pub const ALL: &[Workload] = &[
    Workload { group: "vector", name: "matrix_sse2", run: matrix_sse2 },
    Workload { group: "vector", name: "matrix_avx2_fma", run: matrix_avx2 },
    Workload { group: "vector", name: "bytes_sse2", run: bytes_sse2 },
    Workload { group: "vector", name: "find_avx2", run: find_avx2 },
];

/// Rows and columns.
const N: usize = 32;
type Matrix = [f32; N * N];

fn matrices() -> (Matrix, Matrix) {
    (std::array::from_fn(|i| (i % 7) as f32), std::array::from_fn(|i| (i % 5) as f32))
}

fn check(product: &Matrix) -> u64 {
    product.iter().sum::<f32>() as u64
}

/// Product of two 32x32 matrices, four floats at a time.
fn matrix_sse2(units: u64) -> u64 {
    let (a, b) = matrices();
    let mut product = [0.0; N * N];
    for _ in 0..units {
        let (a, b) = (black_box(&a), black_box(&b));
        for row in 0..N {
            for column in (0..N).step_by(4) {
                // SAFETY: SSE2 is part of x86-64; all indices are below N * N.
                unsafe {
                    let mut sum = _mm_setzero_ps();
                    for k in 0..N {
                        let right = _mm_loadu_ps(b.as_ptr().add(k * N + column));
                        sum = _mm_add_ps(sum, _mm_mul_ps(_mm_set1_ps(a[row * N + k]), right));
                    }
                    _mm_storeu_ps(product.as_mut_ptr().add(row * N + column), sum);
                }
            }
        }
        black_box(&mut product);
    }
    check(&product)
}

/// The same, eight at a time with fused multiply-add; where the CPU has none, the SSE2 way.
fn matrix_avx2(units: u64) -> u64 {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return matrix_sse2(units);
    }
    let (a, b) = matrices();
    let mut product = [0.0; N * N];
    for _ in 0..units {
        // SAFETY: the CPU has what the function needs.
        unsafe { multiply_avx2(black_box(&a), black_box(&b), &mut product) };
        black_box(&mut product);
    }
    check(&product)
}

/// Needs AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_avx2(a: &Matrix, b: &Matrix, product: &mut Matrix) {
    for row in 0..N {
        for column in (0..N).step_by(8) {
            let mut sum: __m256 = _mm256_setzero_ps();
            for k in 0..N {
                // SAFETY: all indices are below N * N.
                let right = unsafe { _mm256_loadu_ps(b.as_ptr().add(k * N + column)) };
                sum = _mm256_fmadd_ps(_mm256_set1_ps(a[row * N + k]), right, sum);
            }
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(product.as_mut_ptr().add(row * N + column), sum) };
        }
    }
}

/// 4 KiB of bytes: add, maximum, xor, sum.
fn bytes_sse2(units: u64) -> u64 {
    let data = [3u8; 4096];
    let mut sums = [0u64; 2];
    for _ in 0..units {
        let data = black_box(&data);
        // SAFETY: SSE2 is part of x86-64; 256 times 16 bytes are 4096.
        unsafe {
            let mut sum = _mm_setzero_si128();
            for i in 0..256 {
                let bytes = _mm_loadu_si128(data.as_ptr().add(i * 16).cast::<__m128i>());
                let more = _mm_max_epu8(_mm_add_epi8(bytes, _mm_set1_epi8(i as i8)), bytes);
                sum = _mm_add_epi8(sum, _mm_sad_epu8(_mm_xor_si128(more, bytes), _mm_setzero_si128()));
            }
            _mm_storeu_si128(sums.as_mut_ptr().cast::<__m128i>(), sum);
        }
        black_box(&mut sums);
    }
    sums[0] ^ sums[1]
}

/// How often a byte is among 4096, 32 at a time.
fn find_avx2(units: u64) -> u64 {
    let bytes: Vec<u8> = (0..4096u32).map(|i| (i * i % 251) as u8).collect();
    let mut count = 0;
    for _ in 0..units {
        count = if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            unsafe { count_avx2(black_box(&bytes), 17) }
        } else {
            black_box(&bytes).iter().filter(|&&byte| byte == 17).count() as u64
        };
    }
    count
}

#[target_feature(enable = "avx2")]
fn count_avx2(bytes: &[u8], wanted: i8) -> u64 {
    let wanted = _mm256_set1_epi8(wanted);
    bytes.chunks_exact(32).fold(0, |count, part| {
        // SAFETY: the chunk has 32 bytes.
        let part = unsafe { _mm256_loadu_si256(part.as_ptr().cast()) };
        count + u64::from(_mm256_movemask_epi8(_mm256_cmpeq_epi8(part, wanted)).count_ones())
    })
}
