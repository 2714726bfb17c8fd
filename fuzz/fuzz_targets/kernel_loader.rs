//! Anything as a kernel file, and files that load broken in a few places: bzImage with each compression, ELF with
//! and without a PVH note, multiboot 1 as ELF and as a flat image.
#![no_main]

use machine::boot::{Module, Request, layout, load, takes_modules};
use memory::{Backing, GuestMemory};
use std::cell::RefCell;
use yado_fuzz::Input;
use yado_fuzz::kernels::{Packing, bzimage, elf32, elf64, multiboot, pack, sound};

const RAM: u64 = 32 << 20;

thread_local! {
    /// Made once: RAM is large. What loads leave behind is the next one's old rubbish.
    static MEMORY: RefCell<Option<GuestMemory>> = const { RefCell::new(None) };
}

fn file(kind: u8, input: &mut Input<'_>) -> Vec<u8> {
    match kind & 15 {
        0 => input.take(usize::MAX).to_vec(),
        // A broken kernel inside a sound image.
        1 => {
            let mut vmlinux = elf64();
            input.patch(&mut vmlinux);
            bzimage(&pack(&vmlinux, Packing::Lz4))
        }
        // A broken image, or a broken stream in it.
        2..=6 => {
            let mut image = sound(kind & 15);
            input.patch(&mut image);
            image
        }
        // Anything as a stream, behind the magic number of each format.
        7 => {
            const MAGIC: [&[u8]; 5] =
                [b"\x02\x21\x4c\x18", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x7fELF"];
            let mut payload = MAGIC[usize::from(input.u8()) % 5].to_vec();
            payload.extend(input.take(usize::MAX));
            bzimage(&payload)
        }
        8..=10 => {
            let mut elf = elf64();
            input.patch(&mut elf);
            elf
        }
        11 | 12 => {
            let mut elf = elf32();
            input.patch(&mut elf);
            elf
        }
        _ => {
            let mut image = multiboot();
            input.patch(&mut image);
            image
        }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (kind, modules, line) = (input.u8(), input.u8(), input.u8());
    let kernel = file(kind, &mut input);
    let names = ["initrd with arguments", "", "third"];
    let bytes = vec![0x5a; usize::from(modules) << 8];
    let modules: Vec<_> =
        names.iter().take(usize::from(modules & 3)).map(|name| Module { name, bytes: &bytes }).collect();
    let command_line = "x".repeat(usize::from(line) * 20);
    MEMORY.with_borrow_mut(|memory| {
        let memory = memory.get_or_insert_with(|| {
            GuestMemory::new(&[(0, RAM)], Backing::Private).expect("memory of the host")
        });
        let request = Request {
            kernel: &kernel,
            kernel_name: "kernel",
            modules: &modules,
            command_line: &command_line,
            rsdp: layout::FIRMWARE,
            reserved: &[(0xe000_0000, 0x1000_0000)],
            seed: [0; 32],
        };
        takes_modules(&kernel);
        if let Err(error) = load(memory, &request) {
            assert!(error.to_string().len() < 1000);
        }
    });
});
