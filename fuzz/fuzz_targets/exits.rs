//! Exits of any kind and content, on the vCPU loop of a whole machine.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| machine::fuzz_exits(data));
