//! One suite of small guests that every engine of this host must run alike: modes, paging, exceptions, interrupts, timers,
//! local and I/O APICs, ports and device memory by every width and form of instruction, registers, processors.
//!
//! A case prints what it finds; what it must print is written in `expected`, from the manuals, so that engines do not only agree
//! but are right. What a KVM back end is known to get wrong is listed in `engines`, and must show.

#[path = "../engines/mod.rs"]
mod engines;
mod expected;
mod program;
mod running;

use engines::*;
use expected::{EXPECTED, SHOWS};
use machine::EngineKind;
use running::run;
use std::time::Duration;

/// No case takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(30);
/// A case in which something is wrong may never end.
const PATIENCE_WITH_FAULTS: Duration = Duration::from_secs(1);

#[test]
fn the_software_engine_is_right() {
    for (case, expected) in EXPECTED {
        assert_eq!(run(case, EngineKind::Soft, PATIENCE), *expected, "{case}");
    }
}

#[test]
fn kvm_is_right_but_for_the_faults_of_this_hosts_back_end() {
    if !engines().contains(&EngineKind::Kvm) {
        return;
    }
    for (case, expected) in EXPECTED {
        let fault = SHOWS.iter().find(|(shows, fault)| shows == case && faults().contains(fault));
        match fault {
            None => assert_eq!(run(case, EngineKind::Kvm, PATIENCE), *expected, "{case}"),
            Some((_, fault)) => {
                let printed = run(case, EngineKind::Kvm, PATIENCE_WITH_FAULTS);
                println!("{case}: a known fault, {}: {printed:?}, not {expected:?}", fault.what);
                assert_ne!(printed, *expected, "{case}: {} no more: take it off the list", fault.what);
            }
        }
    }
}

#[test]
fn every_case_has_its_expectation() {
    let expected: Vec<_> = EXPECTED.iter().map(|(case, _)| *case).collect();
    assert_eq!(program::CASES, expected);
    for (case, _) in SHOWS {
        assert!(expected.contains(case), "{case}");
    }
    for fault in faults() {
        assert!(SHOWS.iter().any(|(_, shown)| shown == fault), "nothing shows {}", fault.name);
    }
}
