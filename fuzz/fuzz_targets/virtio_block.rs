//! A hostile driver of virtio-blk: PCI, rings, requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::fuzz_block(data));
