//! Three hostile guests on one switch: frames, offload headers, chains and time of any kind.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| net::switch::fuzz_switch(data));
