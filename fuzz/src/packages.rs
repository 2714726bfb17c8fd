//! Package files that open, to be broken in one place at a time.

use crate::kernels::{Packing, pack};
use std::io::Write;
use std::sync::OnceLock;

/// An ar archive of `members`.
pub fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = b"!<arch>\n".to_vec();
    for (name, bytes) in members {
        writeln!(file, "{name:<16}{:<32}{:<10}`", 0, bytes.len()).expect("memory takes all");
        file.extend(*bytes);
        file.resize(file.len().next_multiple_of(2), b'\n');
    }
    file
}

/// One member of a tar archive: its header, and its content padded.
pub fn tar_member(kind: u8, name: &[u8], link: &[u8], content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    let bytes = header.as_mut_bytes();
    for (to, from) in bytes[..100].iter_mut().zip(name) {
        *to = *from;
    }
    for (to, from) in bytes[157..257].iter_mut().zip(link) {
        *to = *from;
    }
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let mut member = header.as_bytes().to_vec();
    member.extend(content);
    member.resize(member.len().next_multiple_of(512), 0);
    member
}

/// A sound package of one file, packed; made once.
pub fn sound(packing: u8) -> Vec<u8> {
    static MADE: [OnceLock<Vec<u8>>; 5] = [const { OnceLock::new() }; 5];
    let number = packing % 5;
    let make = || {
        let control = tar_member(b'0', b"./control", b"", b"Package: a\n");
        deb(&control, &tar_member(b'0', b"etc/a", b"", b"hello"), Packing::of(number))
    };
    MADE[usize::from(number)].get_or_init(make).clone()
}

/// A package whose control part is `control` and whose data part is `data`, packed.
pub fn deb(control: &[u8], data: &[u8], packing: Packing) -> Vec<u8> {
    let suffix = match packing {
        Packing::Plain | Packing::Lz4 => "",
        Packing::Gzip => ".gz",
        Packing::Xz => ".xz",
        Packing::Zstd => ".zst",
    };
    let packing = if suffix.is_empty() { Packing::Plain } else { packing };
    let (control, data) = (pack(control, packing), pack(data, packing));
    ar(&[
        ("debian-binary", b"2.0\n"),
        (&format!("control.tar{suffix}"), &control),
        (&format!("data.tar{suffix}"), &data),
    ])
}
