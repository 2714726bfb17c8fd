//! Anything as a package file: ar, decompressors, the control part, and the data part up to 16 MiB.
#![no_main]

use std::io::Read;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok((_, content)) = debian::deb::open(data) {
        let _ = std::io::copy(&mut content.take(16 << 20), &mut std::io::sink());
    }
});
