//! What guests ask of their disks: an overlay over a raw image whose size is no whole number of anything, against a
//! model in memory. The image below must not change.
#![no_main]

use image::format::Raw;
use image::{Disk, Overlay, VecBuffers};
use std::cell::RefCell;
use yado_fuzz::Input;

const SIZE: usize = 40 * 1024 + 512 + 100;

struct Below {
    directory: tempfile::TempDir,
    content: Vec<u8>,
}

thread_local! {
    static BELOW: RefCell<Option<Below>> = const { RefCell::new(None) };
}

fn below() -> Below {
    let directory = tempfile::tempdir().expect("a directory");
    let content: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    std::fs::write(directory.path().join("below"), &content).expect("room on the host");
    Below { directory, content }
}

fn play(below: &Below, input: &mut Input<'_>) {
    let path = below.directory.path().join("below");
    let raw = Raw::open(&path, true).expect("an image");
    let capacity = raw.capacity();
    let overlay = Overlay::new(raw, below.directory.path()).expect("an overlay");
    assert_eq!(overlay.capacity(), capacity);
    let mut model = below.content.clone();
    model.resize(capacity as usize, 0);
    while !input.is_empty() {
        let action = input.u8();
        let (at, len) = match action >> 6 {
            0 => (input.number(), input.number() & 0xffff),
            1 => (u64::from(input.u8()) << 9, u64::from(input.u8()) << 9),
            _ => (u64::from(input.u16()) % capacity, u64::from(input.u16()) % 20_000),
        };
        let inside = at.checked_add(len).is_some_and(|end| end <= capacity);
        let range = if inside { at as usize..(at + len) as usize } else { 0..0 };
        let done = match action & 7 {
            0..=2 => {
                let done = overlay.write(at, &VecBuffers::new(vec![action; len as usize])).is_ok();
                if done {
                    model[range].fill(action);
                }
                done
            }
            3 => {
                let done = overlay.write_zeroes(at, len, action & 8 != 0).is_ok();
                if done {
                    model[range].fill(0);
                }
                done
            }
            4 => {
                let done = overlay.discard(at, len).is_ok();
                // Whole blocks are gone.
                let (start, end) = (range.start.next_multiple_of(4096), range.end / 4096 * 4096);
                if done && start < end {
                    model[start..end].fill(0);
                }
                done
            }
            5 => overlay.flush().is_ok() && inside,
            _ => {
                let buffers = VecBuffers::new(vec![0xee; len as usize]);
                let done = overlay.read(at, &buffers).is_ok();
                if done {
                    assert_eq!(buffers.into_inner(), model[range], "read of {len} at {at}");
                }
                done
            }
        };
        assert_eq!(done, inside, "{len} bytes at {at}, action {action}");
    }
    let buffers = VecBuffers::new(vec![0; capacity as usize]);
    overlay.read(0, &buffers).expect("the whole disk");
    assert!(buffers.into_inner() == model, "the disk at the end");
    assert!(std::fs::read(&path).expect("the image") == below.content, "the image below has changed");
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    BELOW.with_borrow_mut(|held| play(held.get_or_insert_with(below), &mut Input(data)));
});
