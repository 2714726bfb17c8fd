//! A hostile driver of virtio-net.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz_net(data));
