//! Kernels for tests: ELF files around bytes of code.

/// Where the file's content is loaded.
pub const BASE: u64 = 0x20_0000;

/// An ELF file that is entered in 64-bit mode with memory mapped to itself: `parts` at 2 MiB plus their offsets.
pub fn elf64(parts: &[(usize, Vec<u8>)]) -> Vec<u8> {
    const HEADERS: usize = 0x40 + 0x38;
    let end = parts.iter().map(|(at, bytes)| at + bytes.len()).max().unwrap();
    let mut content = vec![0x90; end];
    for (at, bytes) in parts {
        content[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([BASE, 0x40, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([0x40u16, 0x38, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    file.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
    let len = content.len() as u64;
    file.extend([HEADERS as u64, BASE, BASE, len, len, 0x1000].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(content);
    file
}
