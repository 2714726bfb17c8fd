//! Anything as a kernel file: bzImage, ELF, multiboot.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| machine::boot::fuzz(data));
