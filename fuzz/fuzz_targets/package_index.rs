//! Anything as a Packages file, and a package chosen from it.
#![no_main]

use debian::index::Catalogue;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let catalogue = Catalogue::new([text]);
    let names: Vec<String> =
        (0..catalogue.len()).filter_map(|at| catalogue.get(at)).map(|package| package.name.to_string()).take(3).collect();
    let _ = debian::resolve::resolve(&catalogue, &names, &[]);
    for at in catalogue.newest() {
        let _ = catalogue.get(at).map(|package| package.location().is_ok());
    }
});
