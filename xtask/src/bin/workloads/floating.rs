//! Floating-point numbers one at a time: arithmetic, the C library's functions, the x87.

use super::Workload;
use std::arch::asm;
use std::hint::black_box;

pub const ALL: &[Workload] = &[
    Workload { group: "floating", name: "n_body", run: n_body },
    Workload { group: "floating", name: "sin_exp", run: sin_exp },
    Workload { group: "floating", name: "x87", run: x87 },
];

/// 100 steps of five bodies that attract each other.
fn n_body(units: u64) -> u64 {
    let mut last = 0.0;
    for _ in 0..units {
        let mut bodies: [[f64; 7]; 5] = std::array::from_fn(|i| {
            [i as f64, (i * i) as f64, 1.5 * i as f64, 0.1, -0.1 * i as f64, 0.05, 1.0 + i as f64]
        });
        for _ in 0..100 {
            step(black_box(&mut bodies));
        }
        last = bodies.iter().map(|body| body[0]).sum::<f64>();
    }
    last.to_bits() >> 16
}

/// One step; a body is place, speed, mass.
fn step(bodies: &mut [[f64; 7]; 5]) {
    for i in 0..5 {
        for j in i + 1..5 {
            let apart: [f64; 3] = std::array::from_fn(|k| bodies[i][k] - bodies[j][k]);
            let square = apart.iter().map(|d| d * d).sum::<f64>() + 0.01;
            let pull = 0.001 / (square * square.sqrt());
            for k in 0..3 {
                let (mine, other) = (bodies[i][6], bodies[j][6]);
                bodies[i][k + 3] -= apart[k] * other * pull;
                bodies[j][k + 3] += apart[k] * mine * pull;
            }
        }
    }
    for body in bodies {
        for k in 0..3 {
            body[k] += 0.001 * body[k + 3];
        }
    }
}

/// 256 sines and exponentials.
fn sin_exp(units: u64) -> u64 {
    let mut last = 0.0;
    for _ in 0..units {
        last = (0..256).map(|i| black_box(f64::from(i) * 0.01)).map(|x| x.sin() * (-x).exp()).sum::<f64>();
    }
    // The last bits depend on which variant of its functions the C library takes.
    (last * 1e6) as u64
}

/// 256 multiplications and additions in 80 bits.
fn x87(units: u64) -> u64 {
    let mut value = 0.0f64;
    let factor = 0.999f64;
    for _ in 0..units {
        value = 1.0;
        for _ in 0..256 {
            // SAFETY: pushes two and pops two; all x87 registers are declared lost.
            unsafe {
                asm!("fld qword ptr [{v}]", "fmul qword ptr [{f}]", "fld1", "faddp", "fstp qword ptr [{v}]",
                    v = in(reg) &mut value, f = in(reg) &factor,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                    out("st(6)") _, out("st(7)") _, options(nostack));
            }
        }
    }
    value.to_bits()
}
