//! The generator of one block: checked memory operands, and what all templates share.
//!
//! Every check of an instruction precedes its first effect, so that leaving at a check leaves the guest's state as
//! it was before the instruction. Status flags that nobody reads before they are replaced are not kept.

use super::emit::{Emitter, Mem, cc, r};
use super::linkage::{JumpEntry, Linkage};
use super::thunk::{self, LINKAGE, Thunks, linked, reason, spill};
use crate::state::{CpuState, TlbEntry, TlbTable, seg};
use iced_x86::{Instruction, Register};
use std::mem::{offset_of, size_of};

/// What the miss stub tells of an access, packed into R13.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor(pub u32);

impl Descriptor {
    fn new(offset: u16, access: Check, saved: bool) -> Self {
        Self(
            u32::from(offset & 0xfff)
                | u32::from(access.write) << 13
                | u32::from(saved) << 14
                | u32::from(access.size) << 16
                | u32::from(access.align) << 24,
        )
    }

    /// Page offset of the instruction.
    pub(super) fn offset(self) -> u64 {
        u64::from(self.0 & 0xfff)
    }

    pub(super) fn write(self) -> bool {
        self.0 >> 13 & 1 != 0
    }

    /// The live flags are in `flags_saved`.
    pub(super) fn flags_saved(self) -> bool {
        self.0 >> 14 & 1 != 0
    }

    pub(super) fn size(self) -> u64 {
        u64::from(self.0 >> 16 & 0xff)
    }

    /// Bits of the address that must be zero.
    pub(super) fn align_mask(self) -> u64 {
        (1 << (self.0 >> 24 & 7)) - 1
    }
}

/// A memory access to be checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check {
    /// Bytes, 1 to 64.
    pub size: u8,
    pub write: bool,
    /// log2 of the alignment it must have.
    pub align: u8,
}

impl Check {
    pub(super) fn read(size: u8) -> Self {
        Self { size, write: false, align: 0 }
    }

    pub(super) fn write(size: u8) -> Self {
        Self { size, write: true, align: 0 }
    }
}

/// A direct jump to another block of the same page.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewLink {
    /// Position of the displacement to patch.
    pub field: usize,
    /// Position of the stub that asks for the link.
    pub stub: usize,
    /// Page offset of the target.
    pub target: u16,
}

enum Cold {
    Miss { field: usize, address: u8, descriptor: Descriptor, hit: usize },
    Exit { field: usize, why: u32, value: u32 },
}

pub(super) struct Generator {
    pub out: Emitter,
    pub links: Vec<NewLink>,
    /// Number that the first of `links` gets.
    pub first_link: u32,
    pub thunks: Thunks,
    /// 1 for CPL 3, else 0.
    pub class: usize,
    pub bmi2: bool,
    /// LOCK may be left out: there is one vCPU.
    pub drop_lock: bool,
    cold: Vec<Cold>,
}

/// The instruction being translated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site {
    /// Its page offset.
    pub offset: u16,
    /// Page offset of the next.
    pub next: u16,
    /// Some status flag is needed by it or later.
    pub live: bool,
    /// The status flags needed after it.
    pub live_after: bool,
    /// The block goes on after it, or leaves for the single-step tier without looking for events.
    pub followed: bool,
}

/// Host register of a guest register, if it has one.
pub(super) fn host(guest: u8) -> Option<u8> {
    match guest {
        4 => Some(r::GUEST_SP),
        12.. => None,
        same => Some(same),
    }
}

/// The indirect jump that leads to a lookup, to be undone if its target is no address: the page offset in bits 0 to 11,
/// then what must be added to RSP. All ones: not known, and not undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin(pub u64);

impl Default for Origin {
    fn default() -> Self {
        Self(u64::MAX)
    }
}

impl Origin {
    pub(super) fn new(offset: u16, undo: i64) -> Self {
        Self((undo << 12) as u64 | u64::from(offset & 0xfff))
    }

    /// Page offset, and what to add to RSP.
    pub(super) fn undo(self) -> Option<(u64, u64)> {
        (self != Self::default()).then_some((self.0 & 0xfff, (self.0 as i64 >> 12) as u64))
    }
}

impl Generator {
    pub(super) fn new(thunks: Thunks, bmi2: bool, drop_lock: bool) -> Self {
        let (out, links, cold) = (Emitter::default(), Vec::new(), Vec::new());
        Self { out, links, first_link: 0, thunks, class: 0, bmi2, drop_lock, cold }
    }

    /// Starts a block that will stand at `base`, with links numbered from `first_link`.
    pub(super) fn start(&mut self, base: usize, first_link: u32, class: usize) {
        self.out.bytes.clear();
        self.out.base = base;
        self.links.clear();
        self.cold.clear();
        (self.first_link, self.class) = (first_link, class);
    }

    /// Where generation stands, for [`Self::rewind`].
    pub(super) fn mark(&self) -> (usize, usize, usize) {
        (self.out.pos(), self.cold.len(), self.links.len())
    }

    /// Drops all that was generated since `mark`.
    pub(super) fn rewind(&mut self, mark: (usize, usize, usize)) {
        self.out.bytes.truncate(mark.0);
        self.cold.truncate(mark.1);
        self.links.truncate(mark.2);
    }

    /// The linear address of the memory operand, in the register answered: a guest register's own where the operand
    /// is just that, else ADDR. `None` if the shape is not translated.
    pub(super) fn address(&mut self, instruction: &Instruction) -> Option<u8> {
        let segment = instruction.memory_segment();
        let segment = match segment {
            Register::FS => Some(seg::FS),
            Register::GS => Some(seg::GS),
            _ => None,
        };
        let base = instruction.memory_base();
        if segment.is_none()
            && base.is_gpr64()
            && instruction.memory_index() == Register::None
            && instruction.memory_displacement64() == 0
            && let Some(register) = host(base.number() as u8)
        {
            return Some(register);
        }
        self.effective(instruction, r::ADDR, segment)?;
        Some(r::ADDR)
    }

    /// Emits `to` = effective address (plus segment base). Uses T1 and ADDR.
    pub(super) fn effective(
        &mut self,
        instruction: &Instruction,
        to: u8,
        segment: Option<usize>,
    ) -> Option<()> {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let narrow = base.is_gpr32() || index.is_gpr32();
        let disp = instruction.memory_displacement64() as i64;
        let segment_base =
            segment.map(|s| Mem::state(offset_of!(CpuState, segments) + s * size_of::<cpu::Segment>()));
        let mut mem = Mem {
            base: None,
            index: None,
            disp: i32::try_from(disp).ok().or_else(|| {
                // A 32-bit address without registers, or with narrow ones, is kept in its low half.
                u32::try_from(disp).ok().filter(|_| narrow).map(|d| d as i32)
            })?,
        };
        match base {
            Register::None => {}
            Register::RIP => {
                // The instruction was decoded as if its page were at address 0.
                self.out.load(r::ADDR, linked!(page_base));
                mem.base = Some(r::ADDR);
            }
            _ if base.is_gpr64() || base.is_gpr32() => {
                mem.base = Some(self.operand(base.number() as u8, r::ADDR))
            }
            _ => return None,
        }
        if index.is_gpr64() || index.is_gpr32() {
            let scale = instruction.memory_index_scale().trailing_zeros() as u8;
            mem.index = Some((self.operand(index.number() as u8, r::T1), scale));
        } else if index != Register::None {
            return None;
        }
        match segment_base {
            Some(field) if mem.index.is_none() && !narrow => {
                self.out.load(r::T1, field);
                let with = match mem.base {
                    Some(_) => mem.with_index(r::T1, 0),
                    None => Mem { base: Some(r::T1), ..mem },
                };
                self.out.lea(to, with);
            }
            _ => {
                self.out.op_mem(!narrow, &[0x8d], to, mem);
                if let Some(field) = segment_base {
                    self.out.load(r::T1, field);
                    self.out.lea(to, Mem::base(to).with_index(r::T1, 0));
                }
            }
        }
        Some(())
    }

    /// The host register that holds a guest register; a spilled one is loaded into `scratch`.
    pub(super) fn operand(&mut self, guest: u8, scratch: u8) -> u8 {
        host(guest).unwrap_or_else(|| {
            self.out.load(scratch, spill(guest));
            scratch
        })
    }

    fn tlb(&self, write: bool) -> i32 {
        let table = if write { offset_of!(CpuState, tlb_write) } else { offset_of!(CpuState, tlb_read) };
        (table + self.class * size_of::<TlbTable>()) as i32
    }

    /// Checks an access at the linear address in `address` and leaves the host address in ADDR. Uses T1 and T2.
    pub(super) fn check(&mut self, address: u8, access: Check, site: Site) {
        if !site.live {
            self.check_plain(address, access, site, false);
        } else if self.bmi2 {
            self.check_flagless(address, access, site);
        } else {
            self.save_flags();
            self.check_plain(address, access, site, true);
            self.restore_flags();
        }
    }

    /// The cheapest form, which replaces the flags.
    fn check_plain(&mut self, address: u8, access: Check, site: Site, saved: bool) {
        let tlb = self.tlb(access.write);
        let out = &mut self.out;
        // Index: bits 12 to 21, times the size of an entry.
        out.mov32(r::T1, address);
        out.shr32(r::T1, 8);
        out.and_imm(false, r::T1, 0x3ff0);
        if access.align > 0 {
            out.mov(r::T2, address);
            out.and_imm(true, r::T2, -4096 | ((1 << access.align) - 1));
        } else {
            // The page of the last byte: an access that leaves its page matches nothing.
            out.lea(r::T2, Mem::at(address, i32::from(access.size) - 1));
            out.and_imm(true, r::T2, -4096);
        }
        let entry = Mem::at(r::SP, tlb).with_index(r::T1, 0);
        let addend = Mem { disp: tlb + offset_of!(TlbEntry, addend) as i32, ..entry };
        out.op_mem(true, &[0x3b], r::T2, entry);
        let field = out.jump_if(cc::NE);
        if address == r::ADDR {
            out.op_mem(true, &[0x03], r::ADDR, addend);
        } else {
            out.load(r::ADDR, addend);
            out.op_reg(true, &[0x01], address, r::ADDR);
        }
        let (descriptor, hit) = (Descriptor::new(site.offset, access, saved), out.pos());
        self.cold.push(Cold::Miss { field, address, descriptor, hit });
    }

    /// The form that leaves the flags alone (BMI2, LEA and JRCXZ).
    fn check_flagless(&mut self, address: u8, access: Check, site: Site) {
        let tlb = self.tlb(access.write);
        let out = &mut self.out;
        let rcx = linked!(slots);
        out.mov(r::ADDR, address);
        out.pext(r::T1, r::ADDR, linked!(index_mask));
        out.op_mem(false, &[0x8d], r::T1, Mem::base(r::T1).with_index(r::T1, 0));
        out.store(rcx, r::CX);
        let entry = Mem::at(r::SP, tlb).with_index(r::T1, 3);
        let addend = Mem { disp: tlb + offset_of!(TlbEntry, addend) as i32, ..entry };
        // T2 = what must equal the tag, CX = the tag, both without the bits that are zero in every valid tag; the
        // invalid tag keeps ones above all real values.
        let mask = Mem::state(LINKAGE + offset_of!(Linkage, tag_masks) + usize::from(access.align) * 8);
        if access.align > 0 || access.size == 1 {
            out.pext(r::T2, r::ADDR, mask);
        } else {
            out.lea(r::T2, Mem::at(r::ADDR, i32::from(access.size) - 1));
            out.pext(r::T2, r::T2, mask);
        }
        out.rorx_mem(r::CX, entry, 12 - access.align);
        out.not(r::CX);
        out.lea(r::CX, Mem::at(r::CX, 1).with_index(r::T2, 0));
        let equal = out.short(0xe3);
        out.load(r::CX, rcx);
        let field = out.jump();
        out.bind_short(equal);
        out.load(r::CX, rcx);
        out.load(r::T1, addend);
        out.lea(r::ADDR, Mem::base(r::ADDR).with_index(r::T1, 0));
        let (descriptor, hit) = (Descriptor::new(site.offset, access, false), out.pos());
        self.cold.push(Cold::Miss { field, address: r::ADDR, descriptor, hit });
    }

    pub(super) fn save_flags(&mut self) {
        let out = &mut self.out;
        out.store(linked!(slots), r::AX);
        thunk::save_flags(out);
        out.store32(linked!(flags_saved), r::AX);
        out.load(r::AX, linked!(slots));
    }

    pub(super) fn restore_flags(&mut self) {
        let out = &mut self.out;
        out.store(linked!(slots), r::AX);
        out.load32(r::AX, linked!(flags_saved));
        thunk::restore_flags(out);
        out.load(r::AX, linked!(slots));
    }

    /// Leaves for `why`, with a value for the dispatcher.
    pub(super) fn exit(&mut self, why: u32, value: u32) {
        self.out.imm32(r::T1, value);
        self.out.jump_to(self.thunks.exit(why));
    }

    /// Leaves for the single-step tier, out of line, if `condition` holds.
    pub(super) fn step_if(&mut self, condition: u8, site: Site) {
        let field = self.out.jump_if(condition);
        self.cold.push(Cold::Exit { field, why: reason::STEP, value: u32::from(site.offset) });
    }

    /// Leaves before the target of a jump if a kick is waiting.
    pub(super) fn poll(&mut self, target: u16, live: bool) {
        let kick = Mem::state(offset_of!(CpuState, kick));
        if !live {
            self.out.op_mem(false, &[0x83], 7, kick);
            self.out.byte(0);
            let field = self.out.jump_if(cc::NE);
            self.cold.push(Cold::Exit { field, why: reason::KICK, value: u32::from(target) });
            return;
        }
        self.out.mov(r::T1, r::CX);
        self.out.load32(r::CX, kick);
        let none = self.out.short(0xe3);
        self.out.mov(r::CX, r::T1);
        self.exit(reason::KICK, u32::from(target));
        self.out.bind_short(none);
        self.out.mov(r::CX, r::T1);
    }

    /// Jumps to a page offset, through a link if it is in this page.
    pub(super) fn jump_page(&mut self, target: i64) {
        if let Ok(offset) = u16::try_from(target)
            && offset < 4096
        {
            let field = self.out.jump();
            self.links.push(NewLink { field, stub: 0, target: offset });
            return;
        }
        self.out.load(r::ADDR, linked!(page_base));
        // Targets are at most 2 GiB and a page away.
        match i32::try_from(target) {
            Ok(disp) => self.out.lea(r::ADDR, Mem::at(r::ADDR, disp)),
            Err(_) => {
                self.out.imm64(r::T1, target as u64);
                self.out.lea(r::ADDR, Mem::base(r::ADDR).with_index(r::T1, 0));
            }
        }
        self.jump_found(Origin::default());
    }

    /// Jumps to the linear address in ADDR through the jump cache, keeping the flags. A waiting kick is a miss.
    pub(super) fn jump_found(&mut self, origin: Origin) {
        let salt = Mem::state(LINKAGE + offset_of!(Linkage, salt) + self.class * 8);
        let jumps = LINKAGE + offset_of!(Linkage, jumps);
        self.out.load(r::T1, salt);
        self.out.lea(r::ADDR, Mem::base(r::ADDR).with_index(r::T1, 0));
        if self.bmi2 {
            self.out.pext(r::T1, r::ADDR, linked!(jump_mask));
        } else {
            self.save_flags();
            self.out.mov32(r::T1, r::ADDR);
            self.out.shr32(r::T1, 1);
            self.out.and_imm(false, r::T1, super::linkage::JUMP_ENTRIES as i32 - 1);
            self.restore_flags();
        }
        let out = &mut self.out;
        out.op_mem(false, &[0x8d], r::T1, Mem::base(r::T1).with_index(r::T1, 0));
        out.store(linked!(slots), r::CX);
        let entry = Mem::state(jumps).with_index(r::T1, 3);
        out.load(r::CX, entry);
        out.lea(r::CX, Mem::base(r::CX).with_index(r::ADDR, 0));
        // Keys of one index differ by 0, 1 or at least 8191, so eight times a kick (0 to 3) cannot make them equal.
        out.load32(r::T2, Mem::state(offset_of!(CpuState, kick)));
        out.lea(r::CX, Mem::base(r::CX).with_index(r::T2, 3));
        let found = out.short(0xe3);
        out.load(r::CX, linked!(slots));
        out.imm64(r::T1, origin.0);
        out.jump_to(self.thunks.exit(reason::LOOKUP));
        out.bind_short(found);
        out.load(r::CX, linked!(slots));
        out.jump_mem(Mem { disp: entry.disp + offset_of!(JumpEntry, host) as i32, ..entry });
    }

    /// The entry for jumps through the jump cache: the page is that of the address in ADDR, less the salt.
    pub(super) fn entry(&mut self, offset: u16) {
        let unsalt = Mem::state(LINKAGE + offset_of!(Linkage, unsalt) + self.class * 8);
        self.out.load(r::T1, unsalt);
        self.out.lea(r::ADDR, Mem::at(r::ADDR, -i32::from(offset)).with_index(r::T1, 0));
        self.out.store(linked!(page_base), r::ADDR);
    }

    /// Emits what is seldom run.
    pub(super) fn finish(&mut self) {
        for cold in std::mem::take(&mut self.cold) {
            match cold {
                Cold::Miss { field, address, descriptor, hit } => {
                    self.out.bind(field);
                    self.out.mov(r::ADDR, address);
                    self.out.lea_position(r::T2, hit);
                    self.exit(reason::MISS, descriptor.0);
                }
                Cold::Exit { field, why, value } => {
                    self.out.bind(field);
                    self.exit(why, value);
                }
            }
        }
        let mut links = std::mem::take(&mut self.links);
        for (i, link) in links.iter_mut().enumerate() {
            link.stub = self.out.pos();
            self.out.bind(link.field);
            self.exit(reason::LINK, self.first_link.wrapping_add(i as u32));
        }
        self.links = links;
    }
}
