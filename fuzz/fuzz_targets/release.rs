//! Anything as a signed Release file, as its text, and as APT's sources.
#![no_main]

use debian::{control, date, release, signature, sources};
use std::sync::LazyLock;
use std::time::SystemTime;

static KEYS: LazyLock<signature::Keyring> = LazyLock::new(signature::Keyring::embedded);

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = KEYS.verify(data, SystemTime::UNIX_EPOCH);
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = release::Release::parse(text);
    let _ = sources::parse_list(text);
    let _ = sources::parse_sources(text);
    let _ = date::parse(text);
    for paragraph in control::paragraphs(text) {
        let _ = paragraph.fields().count();
    }
});
