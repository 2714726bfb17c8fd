//! Random instruction sequences on the bare CPU and on both tiers: the short run. The long one is the example of the
//! same name.
#![allow(unsafe_code, missing_docs)]

#[path = "differential/mod.rs"]
mod differential;

#[test]
fn both_tiers_do_what_the_bare_cpu_does() {
    let options = differential::Options { seed: 1, first: 0, cases: 100_000, failures: 3 };
    let report = differential::run(&options, |_| {});
    assert!(report.failures.is_empty(), "{}", report.failures.join("\n"));
    assert!(report.codes > 1000, "{report:?}");
    assert!(report.died < report.cases / 1000, "{report:?}");
    assert!(report.interrupts > report.cases / 2, "{report:?}");
    // #DE, #UD, #GP, #PF and #MF at least have been met.
    for vector in [0, 6, 13, 14, 16] {
        assert!(report.exceptions[vector] > 0, "vector {vector}: {report:?}");
    }
}
