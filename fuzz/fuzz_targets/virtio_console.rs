//! A hostile driver of virtio-console.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz_console(data));
