//! Exits of KVM's of any kind and content, on a double of the kernel.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| engine_kvm::fuzz_exits(data));
