//! What a hostile package may ask of the file-system writer: names, links, sizes and attributes of all kinds.
#![no_main]

use ext4::{DeviceKind, Metadata, Options, Target, Writer};
use std::io;
use yado_fuzz::Input;

/// Forgets what is written but must be written inside.
struct Nowhere {
    len: u64,
}

impl Target for Nowhere {
    fn set_len(&mut self, length: u64) -> io::Result<()> {
        self.len = length;
        Ok(())
    }
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(
            offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.len),
            "beyond the image"
        );
        Ok(())
    }
}

/// A path of few parts, so that they meet.
fn path(input: &mut Input<'_>) -> Vec<u8> {
    const PARTS: [&[u8]; 8] = [b"a", b"b", b"", b"..", b"\xff\0\n", b"lost+found", b".", b"long"];
    let mut path = Vec::new();
    let depth = input.u8() & 3;
    for _ in 0..=depth {
        if !path.is_empty() {
            path.push(b'/');
        }
        let part = input.u8();
        match PARTS[usize::from(part & 7)] {
            b"long" => path.extend(std::iter::repeat_n(b'n', usize::from(part >> 3) * 10)),
            b"a" => path.extend(format!("{}", part >> 3).bytes()),
            part => path.extend(part),
        }
    }
    path
}

fn metadata(input: &mut Input<'_>) -> Metadata {
    let mut meta = Metadata {
        mode: input.u16(),
        uid: input.u32(),
        gid: 0,
        mtime: input.number() as i64,
        xattrs: Vec::new(),
    };
    for _ in 0..input.u8() & 3 {
        let [name, value] = input.array();
        let prefix =
            ["user.", "security.", "trusted.", "system.posix_acl_access", "x"][usize::from(name) % 5];
        let name = format!("{prefix}{}", "n".repeat(usize::from(name >> 2)));
        meta.xattrs.push((name.into_bytes(), vec![value; usize::from(value) * 20]));
    }
    meta
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let size = match input.u8() {
        kind @ 0..=7 => input.number() << kind,
        kind => u64::from(kind) << 20,
    };
    // More would be the host's own wish.
    let options =
        Options { label: "x".repeat(usize::from(input.u8() & 31)), ..Options::new(size.min(1 << 38)) };
    let Ok(mut writer) = Writer::new(Nowhere { len: 0 }, &options) else { return };
    while !input.is_empty() {
        let action = input.u8();
        let name = path(&mut input);
        let meta = metadata(&mut input);
        let done = match action & 7 {
            0 | 1 => writer.directory(&name, &meta),
            2..=4 => {
                let size = input.number() & 0x3f_ffff;
                // The content may be shorter or longer than was said.
                let given = if action & 0x80 == 0 { size } else { input.number() & 0xffff };
                writer.file(&name, &meta, size, io::Read::take(io::repeat(action), given))
            }
            5 => {
                let target = vec![action; usize::from(input.u16() & 0x1fff)];
                writer.symlink(&name, &meta, &target)
            }
            6 => writer.hard_link(&name, &path(&mut input)),
            _ => {
                let kind = [DeviceKind::Character, DeviceKind::Block, DeviceKind::Fifo, DeviceKind::Socket];
                writer.device(&name, &meta, kind[usize::from(action >> 6)], input.u32(), input.u32())
            }
        };
        if let Err(error) = done {
            assert!(!error.to_string().is_empty());
        }
    }
    let _ = writer.finish();
});
