//! The generator of one block: checked memory operands, and what all templates share.
//!
//! Every check of an instruction precedes its first effect, so that leaving at a check leaves the guest's state as
//! it was before the instruction. Status flags that nobody reads before they are replaced are not kept.

use super::block::MAY_CROSS;
use super::emit::{Emitter, Mem, cc, r};
use super::hints::{self, Hint};
use super::linkage::{BRIDGES, Linkage};
use super::store::Note;
use super::thunk::{self, LINKAGE, Renewal, Thunks, linked, reason, spill};
use crate::state::{CpuState, Doorbell, TLB_ENTRIES, TlbEntry, TlbTable, seg};
use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, Register};
use std::mem::{offset_of, size_of};

/// What the stubs behind a check are told of an access, in R13: bits 32 to 63 are the offset of its hint in the state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor(pub u64);

impl Descriptor {
    /// Bits of the address that must be zero start here.
    pub(super) const ALIGN_SHIFT: u8 = 24;
    pub(super) const SIZE_SHIFT: u8 = 16;
    pub(super) const HINT_SHIFT: u8 = 32;

    fn new(offset: u16, access: Check, hint: u32, relative: bool, saved: bool) -> Self {
        Self(
            u64::from(offset & 0xfff)
                | u64::from(relative) << 12
                | u64::from(access.write) << 13
                | u64::from(saved) << 14
                | u64::from(access.more) << 15
                | u64::from(access.size) << Self::SIZE_SHIFT
                | ((1 << access.align) - 1) << Self::ALIGN_SHIFT
                | (hints::offset(hint) as u64) << Self::HINT_SHIFT,
        )
    }

    /// Page offset of the instruction.
    pub(super) fn offset(self) -> u64 {
        self.0 & 0xfff
    }

    /// The host address less the linear one is wanted, not the host address.
    pub(super) fn relative(self) -> bool {
        self.0 >> 12 & 1 != 0
    }

    pub(super) fn write(self) -> bool {
        self.0 >> 13 & 1 != 0
    }

    /// More than `size` bytes may be accessed: no page with code will do for writes.
    pub(super) fn more(self) -> bool {
        self.0 >> 15 & 1 != 0
    }

    /// The live flags are in `flags_saved`.
    pub(super) fn flags_saved(self) -> bool {
        self.0 >> 14 & 1 != 0
    }

    pub(super) fn size(self) -> u64 {
        self.0 >> Self::SIZE_SHIFT & 0xff
    }

    /// Bits of the address that must be zero.
    pub(super) fn align_mask(self) -> u64 {
        self.0 >> Self::ALIGN_SHIFT & 0xff
    }
}

/// Where an access goes: the linear address is `register` + `disp`, without `disp` if the register is ADDR.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub register: u8,
    pub disp: i32,
    /// The hint to look at.
    pub hint: u32,
}

/// A hint that an access of this block has looked at.
#[derive(Debug, Clone, Copy)]
struct Shared {
    base: Register,
    write: bool,
    disp: i64,
    hint: u32,
}

/// Displacements from one base share a hint if they are no farther apart: seldom on two pages.
const NEAR: u64 = 256;

/// A memory access to be checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check {
    /// Bytes, 1 to 64.
    pub size: u8,
    pub write: bool,
    /// log2 of the alignment it must have.
    pub align: u8,
    /// More bytes of the page are accessed as well.
    pub more: bool,
}

impl Check {
    pub(super) fn read(size: u8) -> Self {
        Self { size, write: false, align: 0, more: false }
    }

    pub(super) fn write(size: u8) -> Self {
        Self { size, write: true, align: 0, more: false }
    }
}

/// A direct jump that somebody may patch, to another block of the same page or to another page.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewJump {
    /// Position of what is patched.
    pub at: usize,
    /// Page offset of the target.
    pub target: u16,
    /// Cache offset of its note.
    pub note: u32,
}

enum Cold {
    Miss { field: usize, place: Place, descriptor: Descriptor, renewal: Renewal, resume: usize },
    Exit { field: usize, why: u32, value: u32, saved: bool },
}

pub(super) struct Generator {
    pub out: Emitter,
    /// The code of the block that is seldom run, when finished.
    pub seldom: Emitter,
    pub links: Vec<NewJump>,
    pub bridges: Vec<NewJump>,
    pub thunks: Thunks,
    /// 1 for CPL 3, else 0.
    pub class: usize,
    pub bmi2: bool,
    /// There is one vCPU: nobody else writes its code.
    pub single_cpu: bool,
    cold: Vec<Cold>,
    first_hint: u32,
    /// Number that the next hint of this block gets.
    pub next_hint: u32,
    shared: Vec<Shared>,
    /// Hints of this block, counted from its first, that are no good.
    pub unsteady: Vec<u32>,
}

/// The instruction being translated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Site {
    /// Its page offset.
    pub offset: u16,
    /// Page offset of the next.
    pub next: u16,
    /// Some status flag is needed by it or later, and is in the host's flags.
    pub live: bool,
    /// Those needed are in `flags_saved`.
    pub saved: bool,
    /// The status flags needed after it.
    pub live_after: bool,
    /// The block goes on after it, or leaves for the single-step tier without looking for events.
    pub followed: bool,
    /// The block ends with it.
    pub last: bool,
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
    pub(super) fn new(thunks: Thunks, bmi2: bool, single_cpu: bool) -> Self {
        Self {
            out: Emitter::default(),
            seldom: Emitter::default(),
            links: Vec::new(),
            bridges: Vec::new(),
            thunks,
            class: 0,
            bmi2,
            single_cpu,
            cold: Vec::new(),
            first_hint: 0,
            next_hint: 0,
            shared: Vec::new(),
            unsteady: Vec::new(),
        }
    }

    /// Starts a block whose parts will stand at `bases`, with hints numbered from that given.
    pub(super) fn start(&mut self, bases: [usize; 2], hint: u32, class: usize) {
        self.out.bytes.clear();
        self.seldom.bytes.clear();
        [self.out.base, self.seldom.base] = bases;
        self.links.clear();
        self.cold.clear();
        self.shared.clear();
        self.bridges.clear();
        self.class = class;
        (self.first_hint, self.next_hint) = (hint, hint);
    }

    /// Where generation stands, for [`Self::rewind`].
    pub(super) fn mark(&self) -> [usize; 4] {
        [self.out.pos(), self.cold.len(), self.links.len(), self.bridges.len()]
    }

    /// Drops all that was generated since `mark`.
    pub(super) fn rewind(&mut self, [bytes, cold, links, bridges]: [usize; 4]) {
        self.out.bytes.truncate(bytes);
        self.cold.truncate(cold);
        self.links.truncate(links);
        self.bridges.truncate(bridges);
    }

    /// Where the memory operand is; emits what must be computed for that. `in_register` asks for it in ADDR. `None` if
    /// the shape is not translated.
    pub(super) fn place(
        &mut self,
        instruction: &Instruction,
        write: bool,
        in_register: bool,
    ) -> Option<Place> {
        let segment = match instruction.memory_segment() {
            Register::FS => Some(seg::FS),
            Register::GS => Some(seg::GS),
            _ => None,
        };
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let disp = instruction.memory_displacement64() as i64;
        let simple = segment.is_none() && index == Register::None;
        let hint = if simple && base != Register::None {
            self.shared_hint(base, write, disp)
        } else {
            self.fresh_hint()
        };
        if simple
            && !in_register
            && base.is_gpr64()
            && let Some(register) = host(base.number() as u8)
            && let Ok(disp) = i32::try_from(disp)
        {
            return Some(Place { register, disp, hint });
        }
        self.effective(instruction, r::ADDR, segment)?;
        Some(Place { register: r::ADDR, disp: 0, hint })
    }

    pub(super) fn fresh_hint(&mut self) -> u32 {
        self.next_hint += 1;
        self.next_hint - 1
    }

    fn shared_hint(&mut self, base: Register, write: bool, disp: i64) -> u32 {
        let near = |s: &&Shared| s.base == base && s.write == write && s.disp.abs_diff(disp) <= NEAR;
        if let Some(known) = self.shared.iter().find(near) {
            return known.hint;
        }
        let hint = self.fresh_hint();
        self.shared.push(Shared { base, write, disp, hint });
        hint
    }

    /// An instruction was translated: hints of bases that it changes are not shared with what follows.
    pub(super) fn executed(&mut self, instruction: &Instruction, info: &mut InstructionInfoFactory) {
        if self.shared.is_empty() {
            return;
        }
        for used in info.info(instruction).used_registers() {
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None) {
                let written = used.register().full_register();
                self.shared.retain(|shared| shared.base.full_register() != written);
            }
        }
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

    /// Checks an access and answers the operand that reaches it, which uses ADDR. Uses T1 and T2 too.
    pub(super) fn reach(&mut self, place: Place, access: Check, site: Site) -> Mem {
        if !site.live {
            let number = place.hint.wrapping_sub(self.first_hint);
            if self.unsteady.contains(&number) {
                return self.reach_lookup(place, access, site);
            }
            self.reach_plain(place, access, site, site.saved)
        } else if self.bmi2 {
            self.reach_flagless(place, access, site)
        } else {
            self.save_flags();
            let operand = self.reach_plain(place, access, site, true);
            self.restore_flags();
            operand
        }
    }

    fn renewal(&self, place: Place, access: Check, live: bool) -> Renewal {
        let stack = place.hint == hints::STACK[self.class];
        Renewal { class: self.class, write: access.write, stack, live, relative: place.register != r::ADDR }
    }

    fn operand_at(place: Place) -> Mem {
        match place.register {
            r::ADDR => Mem::base(r::ADDR),
            register => Mem::at(register, place.disp).with_index(r::ADDR, 0),
        }
    }

    /// The cheapest form, which replaces the flags.
    pub(super) fn reach_plain(&mut self, place: Place, access: Check, site: Site, saved: bool) -> Mem {
        let relative = place.register != r::ADDR;
        let (negative_page, addend) = hint_fields(place.hint);
        let out = &mut self.out;
        // The offset in the hint's page: in ADDR if only the addend is needed there, else in T1.
        let offset = if relative { r::ADDR } else { r::T1 };
        out.lea_or_mov(offset, place.register, place.disp);
        out.op_mem(true, &[0x03], offset, negative_page);
        if access.align > 0 {
            // What is not aligned becomes very large.
            out.ror(offset, access.align);
        }
        out.cmp_imm(offset, (4096 - i32::from(access.size)) >> access.align);
        let field = out.jump_if(cc::A);
        if relative {
            out.load(r::ADDR, addend);
        } else {
            out.op_mem(true, &[0x03], r::ADDR, addend);
        }
        let descriptor = Descriptor::new(site.offset, access, place.hint, relative, saved);
        let (renewal, resume) = (self.renewal(place, access, false), self.out.pos());
        self.cold.push(Cold::Miss { field, place, descriptor, renewal, resume });
        Self::operand_at(place)
    }

    /// The form that looks into the TLB itself, and replaces the flags.
    fn reach_lookup(&mut self, place: Place, access: Check, site: Site) -> Mem {
        let tables = if self.class == 0 { offset_of!(CpuState, tlb) } else { 0 };
        let table = tables + usize::from(access.write) * size_of::<TlbTable>();
        let entry = Mem::state(table).with_index(r::T1, 0);
        let class = self.class;
        let out = &mut self.out;
        out.lea_or_mov(r::ADDR, place.register, place.disp);
        out.mov32(r::T1, r::ADDR);
        out.shr32(r::T1, 8);
        out.and_imm(false, r::T1, ((TLB_ENTRIES - 1) * size_of::<TlbEntry>()) as i32);
        if class != 0 {
            out.op_mem(true, &[0x03], r::T1, Mem::state(offset_of!(CpuState, user_tlb)));
        }
        if access.align > 0 {
            out.mov(r::T2, r::ADDR);
            out.and_imm(true, r::T2, -4096 | ((1 << access.align) - 1));
        } else {
            // The page of the last byte: an access that leaves its page matches nothing.
            out.lea_or_mov(r::T2, r::ADDR, i32::from(access.size) - 1);
            out.and_imm(true, r::T2, -4096);
        }
        out.op_mem(true, &[0x3b], r::T2, entry);
        let field = out.jump_if(cc::NE);
        out.op_mem(
            true,
            &[0x03],
            r::ADDR,
            Mem { disp: entry.disp + offset_of!(TlbEntry, addend) as i32, ..entry },
        );
        let descriptor = Descriptor::new(site.offset, access, place.hint, false, site.saved);
        let at = Place { register: r::ADDR, disp: 0, hint: place.hint };
        let (renewal, resume) = (self.renewal(at, access, false), self.out.pos());
        self.cold.push(Cold::Miss { field, place: at, descriptor, renewal, resume });
        Mem::base(r::ADDR)
    }

    /// The form that leaves the flags alone (BMI2, LEA and JRCXZ). Up to eight bytes it does not know addresses that are
    /// not aligned to the access's size; vectors seldom are.
    fn reach_flagless(&mut self, place: Place, access: Check, site: Site) -> Mem {
        let relative = place.register != r::ADDR;
        let (negative_page, addend) = hint_fields(place.hint);
        let log = usize::from(access.size).next_power_of_two().trailing_zeros() as usize;
        let aligned = log <= 3 || access.align > 0;
        let mask = |log: usize| Mem::state(LINKAGE + offset_of!(Linkage, tag_masks) + log * 8);
        let out = &mut self.out;
        out.lea_or_mov(r::ADDR, place.register, place.disp);
        out.load(r::T1, negative_page);
        out.lea(r::T1, Mem::base(r::T1).with_index(r::ADDR, 0));
        out.mov(r::T2, r::CX);
        if aligned {
            out.pext(r::CX, r::T1, mask(log));
        } else {
            // The pages of the first and the last byte, less the hint's, are zero if their sum is.
            out.lea(r::CX, Mem::at(r::T1, i32::from(access.size) - 1));
            out.pext(r::T1, r::T1, mask(0));
            out.pext(r::CX, r::CX, mask(0));
            out.lea(r::CX, Mem::base(r::CX).with_index(r::T1, 0));
        }
        let inside = out.short(0xe3);
        out.mov(r::CX, r::T2);
        let field = out.jump();
        out.bind_short(inside);
        out.mov(r::CX, r::T2);
        if relative {
            out.load(r::ADDR, addend);
        } else {
            out.load(r::T1, addend);
            out.lea(r::ADDR, Mem::base(r::ADDR).with_index(r::T1, 0));
        }
        let descriptor = Descriptor::new(site.offset, access, place.hint, relative, false);
        let (renewal, resume) = (self.renewal(place, access, true), self.out.pos());
        self.cold.push(Cold::Miss { field, place, descriptor, renewal, resume });
        Self::operand_at(place)
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
        self.step_when(field, site, false);
    }

    /// Leaves for the single-step tier if the jump at `field` is taken; the live flags are in `flags_saved` if so said.
    pub(super) fn step_when(&mut self, field: usize, site: Site, saved: bool) {
        let value = u32::from(site.offset);
        self.cold.push(Cold::Exit { field, why: reason::STEP, value, saved });
    }

    /// Leaves before an instruction, or between two parts of it, if a kick is waiting. Writes flags.
    pub(super) fn kick_when(&mut self, site: Site, saved: bool) {
        self.out.op_mem(
            false,
            &[0x83],
            7,
            Mem::state(offset_of!(CpuState, doorbell) + offset_of!(Doorbell, kick)),
        );
        self.out.byte(0);
        let field = self.out.jump_if(cc::NE);
        self.cold.push(Cold::Exit { field, why: reason::KICK, value: u32::from(site.offset), saved });
    }

    /// Leaves before the target of a jump if a kick is waiting.
    pub(super) fn poll(&mut self, target: u16, live: bool) {
        let kick = Mem::state(offset_of!(CpuState, doorbell) + offset_of!(Doorbell, kick));
        if !live {
            self.out.op_mem(false, &[0x83], 7, kick);
            self.out.byte(0);
            let field = self.out.jump_if(cc::NE);
            self.cold.push(Cold::Exit { field, why: reason::KICK, value: u32::from(target), saved: false });
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

    /// Jumps to a page offset, through a link if it surely is in this page only, else over a bridge; `poll` for kicks, with or
    /// without live flags.
    pub(super) fn jump_page(&mut self, target: i64, poll: Option<bool>) {
        let (page, offset) = (target & !0xfff, (target & 0xfff) as u16);
        if page != 0 {
            self.out.load(r::ADDR, linked!(page_base));
            // Targets are at most 2 GiB and a page away.
            match i32::try_from(page) {
                Ok(disp) => self.out.lea(r::ADDR, Mem::at(r::ADDR, disp)),
                Err(_) => {
                    self.out.imm64(r::T1, page as u64);
                    self.out.lea(r::ADDR, Mem::base(r::ADDR).with_index(r::T1, 0));
                }
            }
            self.out.store(linked!(page_base), r::ADDR);
        }
        if let Some(live) = poll {
            self.poll(offset, live);
        }
        if Self::linked(target) {
            let field = self.out.jump();
            self.links.push(NewJump { at: field, target: offset, note: 0 });
            return;
        }
        let at = self.out.pos();
        // Room for the longest: until its first run it goes to its stub.
        bridge(&mut self.out, self.class, BRIDGES - 1);
        self.out.overwrite(at, &[0xe9]);
        self.bridges.push(NewJump { at, target: offset, note: 0 });
    }

    /// Whether a jump to this offset is linked to the block there: in this page, and surely all in it.
    pub(super) fn linked(target: i64) -> bool {
        (0..i64::from(MAY_CROSS)).contains(&target)
    }

    /// Jumps to the linear address in ADDR through the jump cache, keeping the flags. A waiting kick is a miss.
    pub(super) fn jump_found(&mut self, origin: Origin) {
        let gate = offset_of!(CpuState, doorbell) + offset_of!(Doorbell, gates) + self.class * 8;
        self.out.load(r::T1, Mem::state(gate));
        self.out.lea(r::T2, Mem::base(r::ADDR).with_index(r::T1, 0));
        if self.bmi2 {
            self.out.pext(r::T1, r::T2, linked!(jump_mask));
        } else {
            self.save_flags();
            self.out.mov32(r::T1, r::T2);
            self.out.shr32(r::T1, 1);
            self.out.and_imm(false, r::T1, super::linkage::JUMP_ENTRIES as i32 - 1);
            self.restore_flags();
        }
        let out = &mut self.out;
        out.store(linked!(slots), r::CX);
        out.load(r::CX, linked!(jump_keys).with_index(r::T1, 3));
        out.lea(r::CX, Mem::base(r::CX).with_index(r::T2, 0));
        let found = out.short(0xe3);
        out.load(r::CX, linked!(slots));
        out.imm64(r::T1, origin.0);
        out.jump_to(self.thunks.exit(reason::LOOKUP));
        out.bind_short(found);
        out.load(r::CX, linked!(slots));
        out.jump_mem(linked!(jump_hosts).with_index(r::T1, 3));
    }

    /// The entry for jumps through the jump cache: the page is that of the address in ADDR.
    pub(super) fn entry(&mut self, offset: u16) {
        self.out.lea_or_mov(r::ADDR, r::ADDR, -i32::from(offset));
        self.out.store(linked!(page_base), r::ADDR);
    }

    /// Emits what is seldom run, to stand elsewhere: see [`Self::seldom`].
    pub(super) fn finish(&mut self) {
        std::mem::swap(&mut self.out, &mut self.seldom);
        // From here on, `out` is what is seldom run.
        for cold in std::mem::take(&mut self.cold) {
            let here = self.out.base + self.out.pos();
            match cold {
                Cold::Miss { field, place, descriptor, renewal, resume } => {
                    self.seldom.bind_to(field, here);
                    self.out.lea_or_mov(r::ADDR, place.register, place.disp);
                    self.out.lea_offset(r::T2, self.seldom.base + resume);
                    self.out.imm64(r::T1, descriptor.0);
                    self.out.jump_to(self.thunks.renew(renewal));
                }
                Cold::Exit { field, why, value, saved } => {
                    self.seldom.bind_to(field, here);
                    if saved {
                        self.restore_flags();
                    }
                    self.exit(why, value);
                }
            }
        }
        for (why, opcode, jumps) in
            [(reason::LINK, 0, &mut self.links), (reason::BRIDGE, 1, &mut self.bridges)]
        {
            for jump in jumps {
                // `seldom` is what is run often: see above.
                let note =
                    Note { at: (self.seldom.base + jump.at) as u32, number: u32::MAX, target: jump.target };
                let at = self.out.base + self.out.pos();
                jump.note = at as u32;
                self.out.raw(&note.bytes());
                self.seldom.bind_to(jump.at + opcode, at + Note::LEN);
                self.out.imm32(r::T1, at as u32);
                self.out.jump_to(self.thunks.exit(why));
            }
        }
        std::mem::swap(&mut self.out, &mut self.seldom);
    }
}

/// The jump of a bridge, by privilege class. Uses T1.
pub(super) fn bridge(out: &mut Emitter, class: usize, number: usize) {
    if class == 0 {
        out.jump_mem(Mem::state(LINKAGE + Linkage::bridges_offset(0) + number * 8));
    } else {
        out.load(r::T1, linked!(user_bridges));
        out.jump_mem(Mem::state(number * 8).with_index(r::T1, 0));
    }
}

/// The two fields of a hint.
fn hint_fields(number: u32) -> (Mem, Mem) {
    let at = hints::offset(number);
    (Mem::state(at + offset_of!(Hint, negative_page)), Mem::state(at + offset_of!(Hint, addend)))
}
