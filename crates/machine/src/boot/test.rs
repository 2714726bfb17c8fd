use super::*;
use memory::Backing;
use proptest::prelude::*;

fn ram(mib: u64) -> GuestMemory {
    GuestMemory::new(&[(0, mib << 20)], Backing::Private).unwrap()
}

fn request<'a>(kernel: &'a [u8], modules: &'a [Module<'a>], command_line: &'a str) -> Request<'a> {
    Request {
        kernel,
        kernel_name: "kernel",
        modules,
        command_line,
        rsdp: 0xe_0000,
        reserved: &[(0xe000_0000, 0x1000_0000)],
        seed: [7; 32],
    }
}

/// A 64-bit ELF with one segment of `content` at `address`, twice as long in memory, and a PVH note if asked.
fn elf64(address: u64, content: &[u8], note: Option<u32>) -> Vec<u8> {
    let mut file = vec![0u8; 64 + 2 * 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&(address + 4).to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, words: [u64; 6]| {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (i, word) in words.iter().enumerate() {
            file[at + 8 + i * 8..at + 16 + i * 8].copy_from_slice(&word.to_le_bytes());
        }
    };
    let len = content.len() as u64;
    header(64, 1, [176, 0, address, len, len * 2, 16]);
    let note_len = if note.is_some() { 20 } else { 0 };
    header(120, 4, [176 + len, 0, 0, note_len, note_len, 4]);
    file.extend_from_slice(content);
    if let Some(entry) = note {
        for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    file
}

/// A bzImage of protocol 2.15 around a payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 1024];
    file[0x1f1] = 1;
    file[0x200..0x206].copy_from_slice(&[0xeb, 0x6a, b'H', b'd', b'r', b'S']);
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x211] = 1;
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&0x7fu16.to_le_bytes());
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    file.extend_from_slice(&[0x90; 16]);
    file.extend_from_slice(payload);
    file.resize(file.len().next_multiple_of(16), 0);
    let paragraphs = ((file.len() - 1024) / 16) as u32;
    file[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    file
}

fn lz4(content: &[u8]) -> Vec<u8> {
    let packed = lz4_flex::block::compress(content);
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
    out.extend_from_slice(&packed);
    out.extend_from_slice(&(content.len() as u32).to_le_bytes());
    out
}

fn gzip(content: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_bzimage_is_unpacked_and_entered_in_64_bit_mode() {
    let vmlinux = elf64(0x100_0000, b"kernel code", None);
    for payload in [vmlinux.clone(), lz4(&vmlinux), gzip(&vmlinux)] {
        let (memory, file) = (ram(64), bzimage(&payload));
        memory.write(0x100_000b, b"old rubbish").unwrap();
        let initrd = Module { name: "", bytes: b"initrd" };
        let registers = load(&memory, &request(&file, &[initrd], "quiet")).unwrap();
        assert_eq!(registers.rip, 0x100_0004);
        assert_eq!(registers.efer, 0x500);
        assert_eq!(&memory.read_array::<22>(0x100_0000).unwrap(), b"kernel code\0\0\0\0\0\0\0\0\0\0\0");
        let zero_page = registers.gpr[6];
        let field = |at: u64| memory.load_u32(zero_page + at).unwrap();
        assert_eq!(field(0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(&memory.read_array::<6>(field(0x228).into()).unwrap(), b"quiet\0");
        assert_eq!((field(0x218), field(0x21c)), (0x3ff_f000, 6));
        assert_eq!(&memory.read_array::<6>(0x3ff_f000).unwrap(), b"initrd");
        assert_eq!(field(0x70), 0xe_0000);
        // The map ends with RAM from 1 MiB and what the board reserved.
        let count = u64::from(memory.read_array::<1>(zero_page + 0x1e8).unwrap()[0]);
        let last = zero_page + 0x2d0 + (count - 1) * 20;
        assert_eq!(memory.load_u64(last).unwrap(), 0xe000_0000);
        assert_eq!(memory.load_u64(last - 20).unwrap(), 0x10_0000);
        assert_eq!(memory.load_u64(last - 12).unwrap(), 63 << 20);
        // Entropy.
        let seed = memory.load_u64(zero_page + 0x250).unwrap();
        assert_eq!(memory.load_u32(seed + 8).unwrap(), 9);
        assert_eq!(memory.read_array::<32>(seed + 16).unwrap(), [7; 32]);
        // Identity paging: 2 MiB pages up to the last of 4 GiB.
        let pml4 = memory.load_u64(registers.cr3).unwrap() & !0xfff;
        let directory = memory.load_u64(pml4 + 3 * 8).unwrap() & !0xfff;
        assert_eq!(memory.load_u64(directory + 511 * 8).unwrap(), 0xffe0_0083);
    }
}

#[test]
fn an_unknown_compression_is_left_to_the_kernel() {
    let (memory, file) = (ram(64), bzimage(b"BZh9 whatever"));
    let registers = load(&memory, &request(&file, &[], "")).unwrap();
    assert_eq!(registers.rip, 0x100_0200);
    assert_eq!(&memory.read_array::<4>(0x100_0010).unwrap(), b"BZh9");
}

#[test]
fn an_elf_with_a_note_starts_as_pvh() {
    let (memory, file) = (ram(32), elf64(0x20_0000, b"code", Some(0x20_0123)));
    let initrd = Module { name: "", bytes: b"initrd" };
    let registers = load(&memory, &request(&file, &[initrd], "a b")).unwrap();
    assert_eq!((registers.rip, registers.cr0 & 1, registers.cr0 >> 31), (0x20_0123, 1, 0));
    let info = registers.gpr[3];
    assert_eq!(memory.load_u32(info).unwrap(), 0x336e_c578);
    let module = memory.load_u64(info + 0x10).unwrap();
    assert_eq!(memory.load_u64(module + 8).unwrap(), 6);
    let line = memory.load_u64(info + 0x18).unwrap();
    assert_eq!(&memory.read_array::<4>(line).unwrap(), b"a b\0");
}

#[test]
fn a_multiboot_image_gets_modules_and_its_command_line() {
    let mut file = vec![0u8; 64];
    let flags = 0x1_0003u32;
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    for word in [0x1bad_b002, flags, sum, 0x10_0040, 0x10_0000, 0, 0x10_2000, 0x10_0060] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(b"code");
    let memory = ram(16);
    memory.write(0x10_1000, &[1]).unwrap();
    let modules = [Module { name: "one arg", bytes: &[1; 5000] }, Module { name: "two", bytes: b"2" }];
    let registers = load(&memory, &request(&file, &modules, "x=1")).unwrap();
    assert_eq!((registers.rip, registers.gpr[0]), (0x10_0060, 0x2bad_b002));
    assert_eq!(memory.read_array::<1>(0x10_1000).unwrap(), [0], "bss is cleared");
    let info = registers.gpr[3];
    let field = |at: u64| memory.load_u32(info + at).unwrap();
    let line = memory.read_array::<11>(field(16).into()).unwrap();
    assert_eq!(&line, b"kernel x=1\0");
    assert_eq!(field(20), 2);
    let second = u64::from(field(24)) + 16;
    assert_eq!(memory.load_u32(second).unwrap(), 0x10_4000);
    assert_eq!(memory.load_u32(second + 4).unwrap(), 0x10_4001);
    assert_eq!(field(8), 15 << 10);
    assert_eq!(field(44) % 24, 0);
}

#[test]
fn what_is_wrong_is_said() {
    let vmlinux = elf64(0x100_0000, &[0x90; 5000], None);
    let good = bzimage(&lz4(&vmlinux));
    let memory = ram(20);
    let say = |file: &[u8], modules: &[Module<'_>], line: &str| {
        load(&memory, &request(file, modules, line)).unwrap_err().to_string()
    };
    let mut i386 = good.clone();
    i386[0x236] = 0;
    assert!(say(&i386, &[], "").contains("32-bit Linux kernel"));
    assert!(say(&good[..1050], &[], "").contains("cut off in its kernel image"));
    let mut corrupt = bzimage(&gzip(&vmlinux));
    corrupt[1024 + 16 + 40] ^= 0xff;
    assert!(say(&corrupt, &[], "").contains("does not decompress"));
    let mut arm = vmlinux.clone();
    arm[18] = 183;
    assert!(say(&arm, &[], "").contains("arm64"));
    let mut image = vec![0; 64];
    image[56..60].copy_from_slice(b"ARM\x64");
    assert!(say(&image, &[], "").contains("arm64 Linux kernel"));
    assert!(say(b"", &[], "").contains("empty"));
    let big = elf64(0x200_0000, b"x", None);
    assert!(say(&big, &[], "").contains("larger --memory"));
    let initrd = vec![0; 8 << 20];
    let module = Module { name: "", bytes: &initrd };
    assert!(say(&good, &[module], "").contains("initrd has 8 MiB"));
    assert!(say(&good, &[], &"x".repeat(3000)).contains("takes 2047"));
    let low = elf64(0x1000, b"x", None);
    assert!(say(&low, &[], "").contains("0x1000"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_kernel_makes_the_loader_panic(
        which in 0u8..4,
        cuts in 0usize..6000,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
    ) {
        let vmlinux = elf64(0x100_0000, &[0x90; 3000], Some(0x100_0000));
        let mut file = match which {
            0 => bzimage(&lz4(&vmlinux)),
            1 => bzimage(&gzip(&vmlinux)),
            2 => vmlinux,
            _ => vec![0x90; 1500],
        };
        file.truncate(file.len() - cuts.min(file.len()) / 4);
        // Headers are where the fields are.
        let headers = file.len().min(700);
        for (index, value) in changes {
            if headers > 0 {
                let at = index.index(headers);
                file[at] = value;
            }
        }
        fuzz(&file);
    }
}
