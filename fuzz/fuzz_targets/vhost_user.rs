//! A hostile vhost-user front end: messages, files, rings and memory of any kind.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| net::switch::fuzz_vhost(data));
