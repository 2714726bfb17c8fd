//! A hostile guest on the user-mode gateway: frames of any content, and segments of any content on one connection.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((0..=127, rest)) => net::gateway::fuzz_gateway(rest),
        Some((_, rest)) => net::gateway::fuzz_tcp(rest),
        None => {}
    }
});
