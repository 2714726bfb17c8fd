//! What `cargo xtask test` leaves out unless asked: each of these fetches a kernel of some 100 MB first.

use crate::kernels::{Kernel, boots};

#[test]
fn debian_13s_generic_kernel_boots() {
    boots(Kernel {
        codename: "trixie",
        flavour: "generic",
        release: ("6.12.", "-amd64"),
        version: "PREEMPT_DYNAMIC",
    });
}

#[test]
fn debian_12s_generic_kernel_boots() {
    boots(Kernel {
        codename: "bookworm",
        flavour: "generic",
        release: ("6.1.", "-amd64"),
        version: "PREEMPT_DYNAMIC",
    });
}

#[test]
fn debian_12s_real_time_kernel_boots() {
    boots(Kernel {
        codename: "bookworm",
        flavour: "rt",
        release: ("6.1.", "-rt-amd64"),
        version: "PREEMPT_RT",
    });
}
