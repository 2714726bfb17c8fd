//! Instruction fetch, and the cache of decoded instructions.
//!
//! A cached instruction is used only after its bytes have been compared with guest RAM, so it can never be stale.
//! Pages are remembered with the MMU's generation: any flush forgets them.

use crate::cpu_core::Core;
use crate::exception::{Exception, Trap};
use crate::host;
use crate::mmu::Access;
use crate::state::seg;
use cpu::attr;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use memory::PAGE_SIZE;

const PAGES: usize = 64;
const INSTRUCTIONS: usize = 2048;
/// The longest instruction (Intel SDM 2, 2.3.11).
const LONGEST: usize = 15;

#[derive(Clone, Copy)]
struct Page {
    /// Linear page address, with bit 0 set for CPL 3.
    tag: u64,
    generation: u64,
    /// Host address of the page.
    host: usize,
}

#[derive(Clone)]
struct Cached {
    rip: u64,
    bitness: u32,
    bytes: u128,
    mask: u128,
    decoded: Decoded,
}

/// A decoded instruction, and what the tier made of it.
#[derive(Clone, Copy)]
pub(crate) struct Decoded {
    /// As decoded.
    pub instruction: Instruction,
    /// How to execute it.
    pub execute: crate::step::Execute,
    /// Its bytes, little-endian, and zeroes.
    pub bytes: u128,
}

pub(crate) struct FetchCache {
    pages: Box<[Page; PAGES]>,
    instructions: Box<[Option<Cached>]>,
    options: u32,
}

impl FetchCache {
    pub(crate) fn new(options: u32) -> Self {
        let page = Page { tag: u64::MAX, generation: 0, host: 0 };
        Self {
            pages: Box::new([page; PAGES]),
            instructions: vec![None; INSTRUCTIONS].into_boxed_slice(),
            options,
        }
    }
}

impl Core {
    /// The width of the code that runs now: 16, 32 or 64.
    pub fn code_bits(&self) -> u32 {
        if self.state.code64() {
            64
        } else if self.state.segments[seg::CS].attr & attr::DB != 0 {
            32
        } else {
            16
        }
    }

    /// Fetches and decodes the instruction at RIP.
    pub(crate) fn fetch_instruction(&mut self) -> Result<Decoded, Trap> {
        let rip = self.state.rip;
        let bitness = self.code_bits();
        let linear = if bitness == 64 {
            if !crate::mmu::Mmu::canonical(rip) {
                return Err(Exception::GP.into());
            }
            rip
        } else {
            self.state.segments[seg::CS].base.wrapping_add(rip) & u64::from(u32::MAX)
        };
        let room = crate::access::room_in_page(linear);
        let slot = (rip ^ rip >> 13) as usize % INSTRUCTIONS;
        if room >= 16 {
            let host = self.fetch_page(linear)?;
            let mut bytes = [0; 16];
            host::read(host, &mut bytes);
            let bytes = u128::from_le_bytes(bytes);
            if let Some(cached) = &self.fetch.instructions[slot]
                && cached.rip == rip
                && cached.bytes == bytes & cached.mask
                && cached.bitness == bitness
            {
                let decoded = cached.decoded;
                return self.within_limit(rip, &decoded.instruction, bitness).map(|()| decoded);
            }
        }
        let decoded = self.decode(rip, linear, bitness)?;
        let len = decoded.instruction.len();
        let mask = u128::MAX >> (128 - 8 * len);
        self.fetch.instructions[slot] =
            Some(Cached { rip, bitness, bytes: decoded.bytes & mask, mask, decoded });
        Ok(decoded)
    }

    /// The host address of a byte of code.
    fn fetch_page(&mut self, linear: u64) -> Result<*const u8, Trap> {
        let page = linear & !(PAGE_SIZE - 1);
        let tag = page | u64::from(self.state.cpl() == 3);
        let slot = (linear >> 12) as usize % PAGES;
        let entry = self.fetch.pages[slot];
        let host = if entry.tag == tag && entry.generation == self.mmu.generation() {
            entry.host
        } else {
            let privilege = self.privilege();
            let target =
                self.mmu.resolve(&mut self.state, page, Access::Fetch, privilege).map_err(|fault| {
                    // The page is what was looked up; the address reported is that of the byte.
                    crate::mmu::PageFault { address: linear, ..fault }
                })?;
            // Code outside RAM: the machine has no device that is executed from. The bus answers all ones, as an
            // open bus does, and those are no instruction.
            let Some(host) = target.host else { return Err(Exception::UD.into()) };
            let host = host as usize;
            self.fetch.pages[slot] = Page { tag, generation: self.mmu.generation(), host };
            host
        };
        Ok(host.wrapping_add((linear & (PAGE_SIZE - 1)) as usize) as *const u8)
    }

    fn decode(&mut self, rip: u64, linear: u64, bitness: u32) -> Result<Decoded, Trap> {
        let mut bytes = [0; 16];
        let mut len = crate::access::room_in_page(linear).min(LONGEST);
        host::read(self.fetch_page(linear)?, &mut bytes[..len]);
        let mut instruction = Instruction::default();
        loop {
            let mut decoder = Decoder::with_ip(bitness, &bytes[..len], rip, self.fetch.options);
            decoder.decode_out(&mut instruction);
            match decoder.last_error() {
                DecoderError::None => break,
                // Longer than any instruction may be.
                DecoderError::NoMoreBytes if len == LONGEST => return Err(Exception::GP.into()),
                DecoderError::NoMoreBytes => {
                    let mut next = linear.wrapping_add(len as u64);
                    if bitness != 64 {
                        next &= u64::from(u32::MAX);
                    } else if !crate::mmu::Mmu::canonical(next) {
                        return Err(Exception::GP.into());
                    }
                    host::read(self.fetch_page(next)?, &mut bytes[len..LONGEST]);
                    len = LONGEST;
                }
                _ => return Err(Exception::UD.into()),
            }
        }
        self.within_limit(rip, &instruction, bitness)?;
        let execute = crate::step::classify(&instruction);
        Ok(Decoded { instruction, execute, bytes: u128::from_le_bytes(bytes) })
    }

    /// All of an instruction must be inside the code segment, but in 64-bit mode.
    fn within_limit(&self, rip: u64, instruction: &Instruction, bitness: u32) -> Result<(), Trap> {
        let last = rip.wrapping_add(instruction.len() as u64).wrapping_sub(1);
        if bitness != 64 && last > u64::from(self.state.segments[seg::CS].limit) {
            return Err(Exception::GP.into());
        }
        Ok(())
    }

    /// Decoder options that follow the vendor that CPUID names.
    pub(crate) fn decoder_options(amd: bool) -> u32 {
        if amd { DecoderOptions::AMD } else { DecoderOptions::NONE }
    }
}
