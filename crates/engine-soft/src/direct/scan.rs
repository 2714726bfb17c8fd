//! Instructions that the host's CPU executes for a user program without asking, but not as the guest's CPU would.
//!
//! They read what belongs to the host: CPUID, clocks, the CPU's number, descriptor tables, XCR0. Nothing stops them
//! on the host but a breakpoint of the CPU's, and there are four. Bytes of other instructions and of data often look
//! like one, so a page is decoded: from each of its first bytes, since where the first instruction begins is not
//! known; such sweeps soon agree. A place where none begins after all does no harm: a breakpoint there is never met.
//! Code that jumps into the middle of its own instructions to see more of the host than it should sees what any user
//! program on the host does.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic};

const PAGE: usize = 4096;
/// The longest instruction.
const LONGEST: usize = 15;

/// The most places in a page that can be watched: the CPU's breakpoints.
pub(super) const SITES_MAX: usize = 4;

/// Where such instructions begin in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sites {
    offsets: [u16; SITES_MAX],
    count: usize,
}

impl Sites {
    /// Page offsets, unless there are too many.
    pub(super) fn offsets(&self) -> Option<&[u16]> {
        self.offsets.get(..self.count)
    }

    pub(super) fn none(&self) -> bool {
        self.count == 0
    }

    fn add(&mut self, at: usize) {
        if let Some(place) = self.offsets.get_mut(self.count) {
            *place = at as u16;
        }
        self.count = (self.count + 1).min(SITES_MAX + 1);
    }
}

/// Such instructions in the first page of `bytes`, which go on with some of the next page's if that is known.
pub(super) fn sites(bytes: &[u8]) -> Sites {
    let mut sites = Sites::default();
    let last = bytes.len().saturating_sub(1);
    let mut pairs = bytes.windows(2).take(PAGE);
    let likely = pairs.any(|pair| pair[0] == 0x0f && may_ask_the_host(pair[1]));
    let open = bytes.len() <= PAGE && bytes.get(last) == Some(&0x0f);
    if likely || open {
        decode(bytes, &mut sites);
    }
    sites
}

/// Whether 0F and this byte may begin one of the instructions.
fn may_ask_the_host(opcode: u8) -> bool {
    matches!(opcode, 0x00..=0x03 | 0x31 | 0x33 | 0x34 | 0xa2 | 0xae | 0xc7)
}

fn asks_the_host(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc | M::Rdpru | M::Xgetbv | M::Rdpkru | M::Wrpkru
    ) || matches!(
        instruction.mnemonic(),
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw | M::Sysenter
    ) || matches!(
        instruction.mnemonic(),
        // They save what the host's XCR0 has, beyond the end of the guest's area.
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64
    )
}

fn decode(bytes: &[u8], sites: &mut Sites) {
    let mut seen = [0u64; PAGE / 64];
    for start in 0..LONGEST {
        let Some(rest) = bytes.get(start..) else { break };
        let mut decoder = Decoder::with_ip(64, rest, start as u64, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            let at = decoder.ip() as usize;
            let Some(word) = seen.get_mut(at / 64) else { break };
            if *word >> (at % 64) & 1 != 0 {
                // Another sweep has been here.
                break;
            }
            *word |= 1 << (at % 64);
            decoder.decode_out(&mut instruction);
            match decoder.last_error() {
                DecoderError::NoMoreBytes => {
                    if cut_off(bytes.get(at..).unwrap_or_default()) {
                        sites.add(at);
                    }
                    break;
                }
                DecoderError::None if asks_the_host(&instruction) => sites.add(at),
                DecoderError::None => {}
                _ => {
                    // Not code, or not from here: one byte on.
                    let next = at + 1;
                    let Some(rest) = bytes.get(next..) else { break };
                    decoder = Decoder::with_ip(64, rest, next as u64, DecoderOptions::NONE);
                }
            }
        }
    }
}

/// Whether an instruction of which these bytes are known may be one.
fn cut_off(bytes: &[u8]) -> bool {
    let prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let mut opcode = bytes.iter().skip_while(|byte| prefix(byte));
    match (opcode.next(), opcode.next()) {
        (None, _) | (Some(0x0f), None) => true,
        (Some(0x0f), Some(&second)) => may_ask_the_host(second),
        _ => false,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn peculiar(bytes: &[u8]) -> bool {
        !sites(bytes).none()
    }

    fn page(bytes: &[u8], at: usize) -> Vec<u8> {
        let mut page = vec![0x90; PAGE];
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn instructions_that_ask_the_host_are_found() {
        for bytes in [
            &[0x0f, 0xa2][..],
            &[0x0f, 0x31],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0x00],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0x0f, 0x03, 0xc0],
            &[0x66, 0x48, 0x0f, 0x00, 0xc8],
            // xsavec [rsp + 0x40], xsave64 [rdi], xsaveopt [rdi]
            &[0x0f, 0xc7, 0x64, 0x24, 0x40],
            &[0x48, 0x0f, 0xae, 0x27],
            &[0x0f, 0xae, 0x37],
        ] {
            for at in [0, 1, 7, 14, 100, PAGE - bytes.len()] {
                let found = sites(&page(bytes, at));
                let offsets = found.offsets().unwrap();
                assert!(offsets.contains(&(at as u16)), "{bytes:x?} at {at}: {offsets:?}");
            }
        }
    }

    #[test]
    fn what_only_looks_like_one_is_not() {
        for bytes in [
            // je +0xf00, mov eax, 0xa20f3101, syscall, cmpxchg8b [rsi]
            &[0x0f, 0x84, 0x00, 0x0f, 0x00, 0x00][..],
            &[0xb8, 0x0f, 0xa2, 0x0f, 0x31],
            &[0x0f, 0x05],
            &[0x0f, 0xc7, 0x0e],
            // mfence, stmxcsr [rsp], xrstor [rsp]
            &[0x0f, 0xae, 0xf0],
            &[0x0f, 0xae, 0x1c, 0x24],
            &[0x0f, 0xae, 0x2c, 0x24],
        ] {
            assert!(!peculiar(&page(bytes, 100)), "{bytes:x?}");
        }
    }

    #[test]
    fn one_that_reaches_into_the_next_page_is_found() {
        let mut bytes = page(&[0x0f], PAGE - 1);
        assert!(peculiar(&bytes), "the next page is not known");
        bytes.extend([0xa2, 0x90]);
        assert!(peculiar(&bytes));
        bytes[PAGE] = 0x05;
        assert!(!peculiar(&bytes));
    }

    #[test]
    fn too_many_are_said() {
        let found = sites(&page(&[0x0f, 0xa2].repeat(5), 64));
        assert_eq!(found.offsets(), None);
        assert_eq!(sites(&page(&[0x0f, 0xa2].repeat(4), 64)).offsets(), Some(&[64, 66, 68, 70][..]));
    }

    /// Every opcode that iced knows as one of the instructions is looked for.
    #[test]
    fn no_encoding_is_forgotten() {
        for opcode in 0..=255u8 {
            for modrm in 0..=255u8 {
                for prefix in [None, Some(0x66), Some(0xf2), Some(0xf3)] {
                    let mut bytes: Vec<u8> = prefix.into_iter().collect();
                    bytes.extend([0x0f, opcode, modrm, 0, 0, 0, 0, 0, 0]);
                    let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                    assert!(!asks_the_host(&decoded) || may_ask_the_host(opcode), "{decoded}");
                }
            }
        }
    }
}
