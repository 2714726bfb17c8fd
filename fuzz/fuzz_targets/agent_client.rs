//! A hostile agent inside the guest.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| guest::fuzz_client(data));
