//! Anything as a Packages file, a package chosen from it, and the fields that packages have: relations, versions,
//! accounts, module information.
#![no_main]

use debian::index::Catalogue;
use debian::{accounts, modules, relation, version};
use std::cmp::Ordering;
use yado_fuzz::Input;

/// Versions are ordered, whatever they are.
fn versions(text: &str) {
    let list: Vec<&str> = text.split_whitespace().take(4).collect();
    for a in &list {
        assert_eq!(version::compare(a, a), Ordering::Equal, "{a}");
        for b in &list {
            assert_eq!(version::compare(a, b), version::compare(b, a).reverse(), "{a} {b}");
            for c in &list {
                let (ab, bc) = (version::compare(a, b), version::compare(b, c));
                let ac = version::compare(a, c);
                assert!(
                    ab != Ordering::Less || bc == Ordering::Greater || ac == Ordering::Less,
                    "{a} {b} {c}"
                );
            }
        }
    }
}

fn index(text: &str) {
    let catalogue = Catalogue::new([text]);
    let names: Vec<String> = (0..catalogue.len())
        .filter_map(|at| catalogue.get(at))
        .map(|package| package.name.to_string())
        .take(3)
        .collect();
    let _ = debian::resolve::resolve(&catalogue, &names, &[]);
    for at in catalogue.newest() {
        if let Some(Ok(location)) = catalogue.get(at).map(|package| package.location()) {
            assert!(!location.filename.split('/').any(|part| part == ".."), "{location:?}");
        }
    }
}

fn module_files(input: &mut Input<'_>) {
    let mut files = Vec::new();
    for name in ["usr/lib/modules/6.1/a.ko", "usr/lib/modules/6.1/b-c.ko", "usr/lib/modules/6.1/d.ko.xz"] {
        let len = usize::from(input.u16());
        files.push((name.to_owned(), input.take(len).to_vec()));
    }
    let read: Vec<_> = files
        .iter()
        .map(|(path, bytes)| modules::read(path, &modules::essence(path, bytes.clone())))
        .collect();
    modules::indices(&read, "kernel/e.ko\nb_c.ko\n");
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let kind = input.u8();
    if kind & 7 == 7 {
        return module_files(&mut input);
    }
    let Ok(text) = std::str::from_utf8(input.0) else { return };
    match kind & 7 {
        0 => versions(text),
        1 => {
            let mut users = accounts::Accounts::from_masters(text, text);
            users.add_sysusers(text);
            let (passwd, shadow) = (users.passwd(), users.shadow(1));
            assert_eq!(passwd.lines().count(), shadow.lines().count());
            users.group();
            users.gshadow();
        }
        2 => {
            relation::parse(text);
            if let Some(atom) = relation::parse_atom(text) {
                atom.accepts("1.0-1");
            }
        }
        _ => index(text),
    }
});
