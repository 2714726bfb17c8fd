//! Instructions that the host's CPU executes for a user program without asking, but not as the guest's CPU would.
//!
//! They read what belongs to the host: CPUID, clocks, the CPU's number, descriptor tables, XCR0. Nothing stops them
//! on the host but a breakpoint of the CPU's, and there are four. Bytes of other instructions and of data often look
//! like one, so a page is decoded: from where the code of the page before it arrives, and where that is not known
//! from each of its first bytes; such sweeps soon agree. A place where no instruction begins after all is never met,
//! but takes a breakpoint that another page may need: large programs have thousands of pages.
//! Code that jumps into the middle of its own instructions to see more of the host than it should sees what any user
//! program on the host does.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic};

const PAGE: usize = 4096;
/// The longest instruction.
pub(super) const LONGEST: usize = 15;

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

/// Such instructions that are whole in a page whose code begins at one of `starts`. Those that go on in the next page are
/// [`Sites::across`]'s.
pub(super) fn sites(page: &[u8; PAGE], starts: Starts) -> Sites {
    let mut sites = Sites::default();
    if page.windows(2).any(may_begin) {
        sweep(page, starts, PAGE, |at, instruction| {
            if asks_the_host(instruction) {
                sites.add(at);
            }
        });
    }
    sites
}

/// Where in a page the first instruction may begin: a bit for each of the first bytes.
pub(super) type Starts = u16;

/// Anywhere.
pub(super) const ANYWHERE: Starts = (1 << LONGEST) - 1;

/// How much of the page before shows where instructions begin: sweeps agree after some twenty bytes.
pub(super) const BEFORE: usize = 96;

/// Where instructions begin in a page, by the last bytes of the page before it and its own first.
pub(super) fn starts(bytes: &[u8; BEFORE + LONGEST]) -> Starts {
    sweep(bytes, ANYWHERE, BEFORE, |_, _| {})
}

/// The last bytes of a page, and the first of the page behind it.
pub(super) type Seam = [u8; 2 * REACH];

/// How much of an instruction that is in two pages can be in one of them.
pub(super) const REACH: usize = LONGEST - 1;

impl Sites {
    /// These and those that begin in the page and end in the next.
    pub(super) fn across(mut self, seam: &Seam) -> Self {
        // Without its prefixes it begins with the last byte, or in the next page; or a longer part of it is in this page.
        if !seam.windows(2).any(may_begin) {
            return self;
        }
        for start in 0..REACH {
            let rest = seam.get(start..).unwrap_or_default();
            let instruction = Decoder::with_ip(64, rest, 0, DecoderOptions::NONE).decode();
            if start + instruction.len() > REACH && asks_the_host(&instruction) {
                self.add(PAGE - REACH + start);
            }
        }
        self
    }
}

fn may_begin(pair: &[u8]) -> bool {
    matches!(pair, &[0x0f, second] if may_ask_the_host(second))
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

/// Decodes up to `end`, from each of the starts; answers where instructions begin from there on.
fn sweep(bytes: &[u8], starts: Starts, end: usize, mut found: impl FnMut(usize, &Instruction)) -> Starts {
    let mut seen = [0u64; PAGE / 64];
    let mut behind = 0;
    for start in (0..LONGEST).filter(|start| starts >> start & 1 != 0) {
        let mut at = start;
        while at < end {
            let Some(word) = seen.get_mut(at / 64) else { break };
            if *word >> (at % 64) & 1 != 0 {
                // Another sweep has been here.
                break;
            }
            *word |= 1 << (at % 64);
            let mut decoder =
                Decoder::with_ip(64, bytes.get(at..).unwrap_or_default(), at as u64, DecoderOptions::NONE);
            let instruction = decoder.decode();
            match decoder.last_error() {
                DecoderError::NoMoreBytes => break,
                DecoderError::None => {
                    found(at, &instruction);
                    at += instruction.len();
                }
                // Not code, or not from here: one byte on.
                _ => at += 1,
            }
        }
        if at >= end {
            behind |= 1 << (at - end);
        }
    }
    behind
}

#[cfg(test)]
mod test {
    use super::*;

    fn peculiar(bytes: &[u8; PAGE]) -> bool {
        !sites(bytes, ANYWHERE).none()
    }

    fn page(bytes: &[u8], at: usize) -> [u8; PAGE] {
        let mut page = [0x90; PAGE];
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
                let found = sites(&page(bytes, at), ANYWHERE);
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

    /// The end of one page and the begin of the next, with these bytes across.
    fn seam(bytes: &[u8], in_first: usize) -> Seam {
        let mut seam = [0x90; 2 * REACH];
        seam[REACH - in_first..][..bytes.len()].copy_from_slice(bytes);
        seam
    }

    #[test]
    fn one_that_reaches_into_the_next_page_is_found_with_that() {
        for bytes in [&[0x0f, 0xa2][..], &[0x49, 0x0f, 0x01, 0xd0], &[0x48, 0x0f, 0xc7, 0x64, 0x24, 0x40]] {
            for in_first in 1..bytes.len() {
                assert!(
                    !peculiar(&page(&bytes[..in_first], PAGE - in_first)),
                    "it does not run without the next page"
                );
                let sites = Sites::default().across(&seam(bytes, in_first));
                assert!(
                    sites.offsets().unwrap().contains(&((PAGE - in_first) as u16)),
                    "{bytes:x?} {in_first}: {sites:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_whole_in_one_of_two_pages_does_not_reach_across() {
        for in_first in [0, 2, 3, 10] {
            assert!(Sites::default().across(&seam(&[0x0f, 0xa2], in_first)).none());
        }
        // je, and a move that ends in the next page.
        for bytes in [&[0x0f, 0x84, 0xb9, 0, 0, 0][..], &[0x49, 0x8b, 0x44, 0x24, 0x50]] {
            assert!(Sites::default().across(&seam(bytes, 1)).none());
        }
    }

    #[test]
    fn the_page_before_shows_where_code_begins() {
        // mov eax, 0xa20f0f01, of which three bytes are in the page.
        let instruction = [0xb8, 0x01, 0x0f, 0x0f, 0xa2];
        let mut seam = [0x90; BEFORE + LONGEST];
        seam[BEFORE - 2..][..5].copy_from_slice(&instruction);
        let starts = starts(&seam);
        assert_eq!(starts, 1 << 3);
        let page = page(&instruction[2..], 0);
        assert!(peculiar(&page), "CPUID, if code began with the second byte");
        assert!(sites(&page, starts).none());
    }

    #[test]
    fn too_many_are_said() {
        let found = sites(&page(&[0x0f, 0xa2].repeat(5), 64), ANYWHERE);
        assert_eq!(found.offsets(), None);
        assert_eq!(
            sites(&page(&[0x0f, 0xa2].repeat(4), 64), ANYWHERE).offsets(),
            Some(&[64, 66, 68, 70][..])
        );
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
