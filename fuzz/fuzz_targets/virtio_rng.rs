//! A hostile driver of virtio-rng.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz_rng(data));
