//! Kernel files that load, to be broken in one place at a time.

use std::io::Write;
use std::sync::OnceLock;

/// How the payload of a bzImage is packed.
#[derive(Clone, Copy)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// Linux's LZ4: the legacy frame, and the size behind it.
    Lz4,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
}

/// A 64-bit ELF of one segment, with a PVH note.
pub fn elf64() -> Vec<u8> {
    const ADDRESS: u64 = 0x100_0000;
    let content = b"kernel code that says Linux version 6.1 somewhere";
    let mut file = vec![0u8; 64 + 2 * 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[24..32].copy_from_slice(&(ADDRESS + 4).to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, words: [u64; 6]| {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (i, word) in words.iter().enumerate() {
            file[at + 8 + i * 8..at + 16 + i * 8].copy_from_slice(&word.to_le_bytes());
        }
    };
    let len = content.len() as u64;
    header(64, 1, [176, 0, ADDRESS, len, len * 2, 16]);
    header(120, 4, [176 + len, 0, 0, 20, 20, 4]);
    file.extend(content);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x100_0000] {
        file.extend(word.to_le_bytes());
    }
    file
}

/// A 32-bit ELF with a multiboot 1 header in its segment.
pub fn elf32() -> Vec<u8> {
    let mut file = vec![0u8; 52 + 32];
    file[..6].copy_from_slice(b"\x7fELF\x01\x01");
    file[16..20].copy_from_slice(&[2, 0, 3, 0]);
    file[24..28].copy_from_slice(&0x10_0010u32.to_le_bytes());
    file[28..32].copy_from_slice(&52u32.to_le_bytes());
    file[42..46].copy_from_slice(&[32, 0, 1, 0]);
    for (i, word) in [1u32, 84, 0x10_0000, 0x10_0000, 32, 0x1000, 7, 4].iter().enumerate() {
        file[52 + i * 4..56 + i * 4].copy_from_slice(&word.to_le_bytes());
    }
    let flags = 3u32;
    for word in [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags), 0, 0, 0, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    file
}

/// A flat image with a multiboot 1 header that says where it goes.
pub fn multiboot() -> Vec<u8> {
    let mut file = vec![0u8; 64];
    let flags = 0x1_0003u32;
    let sum = 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    for word in [0x1bad_b002, flags, sum, 0x10_0040, 0x10_0000, 0, 0x10_2000, 0x10_0060] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"code");
    file
}

/// A bzImage of protocol 2.15.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x200, b"\xeb\x6aHdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &16u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    file.extend([0x90; 16]);
    file.extend(payload);
    file.resize(file.len().next_multiple_of(16), 0);
    let paragraphs = ((file.len() - 1024) / 16) as u32;
    file[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    file
}

/// A bzImage that loads, packed in one of the ways; made once.
pub fn sound(packing: u8) -> Vec<u8> {
    static MADE: [OnceLock<Vec<u8>>; 5] = [const { OnceLock::new() }; 5];
    let number = packing % 5;
    MADE[usize::from(number)].get_or_init(|| bzimage(&pack(&elf64(), Packing::of(number)))).clone()
}

/// Packs as a kernel build does. Bytes are packed in raw form where the format has one, so that a fuzzer's bytes
/// stay what they are.
pub fn pack(content: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => content.to_vec(),
        Packing::Lz4 => {
            let packed = lz4_flex::block::compress(content);
            let mut out = vec![0x02, 0x21, 0x4c, 0x18];
            out.extend((packed.len() as u32).to_le_bytes());
            out.extend(packed);
            out.extend((content.len() as u32).to_le_bytes());
            out
        }
        Packing::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(content).expect("memory takes all");
            encoder.finish().expect("memory takes all")
        }
        Packing::Xz => {
            let options = lzma_rust2::XzOptions::with_preset(0);
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).expect("known options");
            writer.write_all(content).expect("memory takes all");
            writer.finish().expect("memory takes all")
        }
        Packing::Zstd => {
            ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
        }
    }
}

impl Packing {
    /// One of them.
    pub fn of(number: u8) -> Self {
        [Self::Plain, Self::Lz4, Self::Gzip, Self::Xz, Self::Zstd][usize::from(number) % 5]
    }
}
