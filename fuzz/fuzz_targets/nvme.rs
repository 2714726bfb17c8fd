//! A hostile driver of the NVMe controller.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nvme::fuzz(data));
